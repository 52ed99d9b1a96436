"""`python -m paceline`: the same as the `paceline` command."""

from paceline.cli.main import main

main()
