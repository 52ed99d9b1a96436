"""An engine's own options: as a table (`[target.engine_args]`), and as words of its command line.

paceline knows none of them by name, except those that it must set itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from paceline.errors import ConfigError

_SHORTEST = 4
"""Letters of a beginning that is taken for the whole: shorter ones are names of their own."""


def parse_flags(words: Sequence[str]) -> dict[str, Any]:
    """The table of command line words: `--a 1 --b=2 --c -d x y` is {a: "1", b: "2", c: True, "-d": ["x", "y"]}.

    Raises:
        ConfigError: words before the first option.
    """
    table: dict[str, Any] = {}
    name = ""
    for word in words:
        if _is_option(word):
            name, given, value = word.partition("=")
            name = option_name(name)
            table[name] = value if given else True
        elif not name:
            raise ConfigError(f"{word!r} is no option of the engine: after -- come options, which begin with -")
        else:
            before = table[name]
            table[name] = word if before is True else [*(before if isinstance(before, list) else [before]), word]
    return table


def write_flags(table: Mapping[str, Any]) -> list[str]:
    """Command line words of a table; true is a bare option, false and none are left out, a table becomes JSON."""
    words: list[str] = []
    for name, value in table.items():
        if value is None or value is False:
            continue
        words.append(name if name.startswith("-") else f"--{option_name(name)}")
        if value is not True:
            words += [_write(one) for one in (value if isinstance(value, list | tuple) else [value])]
    return words


def option_name(option: str) -> str:
    """How a table names an option: `--max-model-len` and max_model_len are "max-model-len"; `-tp` stays.

    What follows a dot is a key inside the option's value, and stays, too: `--hf-overrides.rope_theta`.
    """
    if option.startswith("-") and not option.startswith("--"):
        return option
    name, dot, keys = option.removeprefix("--").partition(".")
    return name.replace("_", "-") + dot + keys


def check_not_set(table: Mapping[str, Any], own: Iterable[str], engine: str) -> None:
    """Raise ConfigError if `table` holds options that paceline sets itself.

    Args:
        own: with dashes; a short one with its dash in front ("-sc"). Keys inside their values count, and so do their
            beginnings, which an engine may complete: "speculative-config.method", "api-k".
    """
    names = {option_name(name).partition(".")[0] for name in table}
    taken = sorted(name for name in names if any(_may_be(name, one) for one in own))
    if taken:
        shown = ", ".join(name if name.startswith("-") else "--" + name for name in taken)
        raise ConfigError(f"target.engine_args of {engine} hold {shown}, which paceline sets itself: leave them out")


def _may_be(name: str, option: str) -> bool:
    return name == option or (len(name) >= _SHORTEST and not name.startswith("-") and option.startswith(name))


def _is_option(word: str) -> bool:
    """Negative numbers are values."""
    return word.startswith("-") and not word[1:2].isdigit() and word not in ("-", "--")


def _write(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)
