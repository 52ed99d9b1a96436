"""Make docs/configuration.md from the configuration schema.

    python benchmarks/make_config_reference.py docs/configuration.md     # writes the page
    python benchmarks/make_config_reference.py                           # prints it

Every field is listed with its type, default and docstring; a field without a docstring is an error.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from paceline.config.data import DataConfig, RegenerationConfig
from paceline.config.drafts import DFlashConfig, DraftConfig, Eagle3Config
from paceline.config.placement import PlacementConfig, PoolConfig, RayConfig, TransportConfig
from paceline.config.recording import RecordingConfig
from paceline.config.run import RunConfig
from paceline.config.target import TargetConfig
from paceline.config.training import EvaluationConfig, ExportConfig, ProfileConfig, TrackingConfig, TrainingConfig
from paceline.launch.run import _may_change

HEADER = """\
# Configuration reference

*Made from the schema by `benchmarks/make_config_reference.py` (`make docs`). Do not edit this page by hand.*

A run is described by one TOML file. Any setting can be changed on the command line by `section.field=value`; the value
is TOML, a bare word is a string, and `none` takes a setting away. Top-level settings have no section.

```bash
paceline train run.toml training.max_steps=1000 drafts.eagle.lr=5e-5 run_dir=runs/second
paceline config show run.toml      # everything, defaults filled in
paceline config check run.toml     # is it correct? every mistake is named
```

Unknown keys are refused, with the nearest real one. Paths are relative to the working directory. The resolved
configuration is written to `resolved.toml` in the run directory.

"None" in a description means that the field is not set. The column *later* says whether a run that has begun may go on
with another value. `no` means that the run directory refuses it: what is trained could change. `in part` means that the
description says what may change.
"""

IN_PART = ("target.engine_args",)
"""Tables of which some keys may change: their docstrings say which."""
RANGES = {"Ge": "at least {}", "Gt": "above {}", "Le": "at most {}", "Lt": "below {}"}
SECTIONS: tuple[tuple[str, type[BaseModel], str], ...] = (
    ("target", TargetConfig, "required"),
    ("data", DataConfig, "required"),
    ("training", TrainingConfig, ""),
    ("training.profile", ProfileConfig, "left out unless you want a profile"),
    ("placement", PlacementConfig, ""),
    ("placement.ray", RayConfig, ""),
    ("transport", TransportConfig, ""),
    ("pool", PoolConfig, ""),
    ("recording", RecordingConfig, ""),
    ("evaluation", EvaluationConfig, ""),
    ("regeneration", RegenerationConfig, ""),
    ("tracking", TrackingConfig, ""),
    ("export", ExportConfig, ""),
)


def render_page() -> str:
    """The whole page."""
    tables = {"drafts", *(name for name, _, _ in SECTIONS)}
    own = [name for name in RunConfig.model_fields if name not in tables]
    parts = [HEADER, "## Top level\n\n" + _table(RunConfig, "", own)]
    for name, model, note in SECTIONS:
        parts.append(_section(f"`[{name}]`", model, note) + _table(model, f"{name}.", list(model.model_fields)))
        if name == "data":
            parts += list(_draft_parts())
    return "\n".join(parts)


def _draft_parts() -> typing.Iterator[str]:
    yield (
        "## `[drafts.NAME]`\n\n"
        "One table a draft, at least one; NAME is yours (letters, digits, `_` and `-`) and appears in metrics, "
        "checkpoints and exports. `algorithm` says which kind it is. Settings that every draft has:\n\n"
        + _table(DraftConfig, "drafts.NAME.", list(DraftConfig.model_fields))
    )
    for model in (Eagle3Config, DFlashConfig):
        algorithm = model.model_fields["algorithm"].default
        own = [name for name in model.model_fields if name in model.__annotations__]
        yield (
            f'### `algorithm = "{algorithm}"`\n\n{_first_line(model)} Its own settings, and those of every draft that '
            "have another default here:\n\n" + _table(model, "drafts.NAME.", own)
        )


def _section(title: str, model: type[BaseModel], note: str) -> str:
    about = f" ({note})" if note else ""
    return f"## {title}\n\n{_first_line(model)}{about}\n\n"


def _first_line(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _table(model: type[BaseModel], prefix: str, names: list[str]) -> str:
    lines = ["| field | type | default | later | meaning |", "| --- | --- | --- | --- | --- |"]
    for name in names:
        field = model.model_fields[name]
        if not field.description:
            raise SystemExit(f"{model.__name__}.{name} has no docstring: say what it means below the field")
        later = "in part" if prefix + name in IN_PART else "yes" if _may_change(prefix + name) else "no"
        meaning = _escape(" ".join(field.description.split()))
        lines.append(f"| `{name}` | {_escape(_type_of(field))} | {_escape(_default_of(field))} | {later} | {meaning} |")
    return "\n".join(lines) + "\n"


def _type_of(field: FieldInfo) -> str:
    limits = [
        RANGES[type(limit).__name__].format(f"{getattr(limit, type(limit).__name__.lower()):g}")
        for limit in field.metadata
        if type(limit).__name__ in RANGES
    ]
    return ", ".join([_type_name(field.annotation), *limits])


def _type_name(annotation: Any) -> str:
    """A type in words: `"a"` or `"b"`, integer, number, list of integers ..."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments if argument is not type(None))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            inner = _type_name(arguments[0])
            return f"list of {inner}" if get_origin(arguments[0]) is Literal else f"list of {inner}s"
        return f"list of {len(arguments)} {_type_name(arguments[0])}s"
    if origin is dict:
        return "table"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    return {str: "string", int: "integer", float: "number", bool: "true or false"}[annotation]


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    if value is None:
        return "not set"
    if isinstance(value, BaseModel):
        return "its defaults"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{json.dumps(value)}`"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the configuration reference.")
    parser.add_argument("output", nargs="?", type=Path, help="file to write; printed if left out")
    output = parser.parse_args().output
    page = render_page()
    if output is None:
        sys.stdout.write(page)
    else:
        output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
