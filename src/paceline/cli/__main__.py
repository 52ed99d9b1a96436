"""`python -m paceline.cli`: the same as the `paceline` command."""

from paceline.cli.main import main

main()
