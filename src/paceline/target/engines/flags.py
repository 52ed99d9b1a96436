"""An engine's own options: as a table (`[target.engine_args]`), and as words of its command line.

paceline knows none of them by name, except those that it must set itself; of those that change what is computed it
knows words.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from paceline.errors import ConfigError

_SHORTEST = 4
"""Letters of a beginning that is taken for the whole: shorter ones are names of their own."""
_COMPUTE = (
    *("quantization", "quantize", "quant", "dtype", "torchao", "sparsity", "scales"),
    *("hf", "override", "overrides", "impl", "rope", "sliding", "lora"),
    *("tokenizer", "revision", "loader", "format"),
    *("precision", "fp32", "int8", "modelopt", "hisparse", "kt"),
)
"""Words in names of options that change what is computed, beyond the last bits: numbers and how weights become them,
parts of the model, files that are read. Both engines build their names of such words: kv-cache-dtype, load-format."""
_COMPUTE_SHORT = ("-q",)


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


def write_flags(table: Mapping[str, Any], negation: str | None) -> list[str]:
    """Command line words of a table; true is a bare option, none is left out, a table becomes JSON.

    Args:
        negation: what the name of an option that is false begins with: "no-" where the engine has `--no-X` for each
            such X; None leaves it out.
    """
    words: list[str] = []
    for name, value in table.items():
        option = name if name.startswith("-") else f"--{option_name(name)}"
        if value is None:
            continue
        if isinstance(value, bool) and "." in option:  # a key inside a value
            words += [option, json.dumps(value)]
        elif value is False:
            words += _negated(option, negation)
        elif value is True:
            words.append(option)
        else:
            words += [option, *(_write(one) for one in (value if isinstance(value, list | tuple) else [value]))]
    return words


def _negated(option: str, negation: str | None) -> list[str]:
    if negation is None or not option.startswith("--"):
        return []
    name = option.removeprefix("--")
    return [f"--{name.removeprefix(negation) if name.startswith(negation) else negation + name}"]


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
    taken = find_options(table, own)
    if taken:
        raise ConfigError(
            f"target.engine_args of {engine} hold {', '.join(taken)}, which paceline sets itself: leave them out"
        )


def find_options(table: Mapping[str, Any], wanted: Iterable[str]) -> list[str]:
    """Which options of `table` are `wanted`, whole or in part, as command line words; see `check_not_set`."""
    options = list(wanted)
    names = {option_name(name).partition(".")[0] for name in table}
    found = sorted(name for name in names if any(_may_be(name, one) for one in options))
    return [name if name.startswith("-") else "--" + name for name in found]


def changes_what_is_computed(option: str) -> bool:
    """Whether features could be others, beyond their last bits, with another value of an option."""
    name = option_name(option).partition(".")[0]
    if name.startswith("-"):
        return name in _COMPUTE_SHORT
    *words, last = name.split("-")
    return bool(set(words) & set(_COMPUTE)) or any(_may_be(last, one) for one in _COMPUTE)


def _may_be(name: str, option: str) -> bool:
    return name == option or (len(name) >= _SHORTEST and not name.startswith("-") and option.startswith(name))


def _is_option(word: str) -> bool:
    """Negative numbers are values."""
    return word.startswith("-") and not word[1:2].isdigit() and word not in ("-", "--")


def _write(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)
