"""TOML file + `section.field=value` overrides -> RunConfig, with errors a user can act on."""

from __future__ import annotations

import difflib
import functools
import tomllib
import typing
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tomli_w
from pydantic import BaseModel, Field, ValidationError, create_model

from paceline.config.drafts import DFlashConfig, DraftConfig, Eagle3Config
from paceline.config.run import RunConfig
from paceline.errors import ConfigError

_Classes = Mapping[str, type[DraftConfig]]
_OURS: _Classes = MappingProxyType({"eagle3": Eagle3Config, "dflash": DFlashConfig})


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a TOML configuration; relative paths in it stay relative to the working directory.

    Raises:
        ConfigError: the file is missing or not TOML, or a key or value is wrong (all of them are named).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    return build_config(apply_overrides(table, overrides), source=str(path))


def apply_overrides(table: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`table` with `section.field=value` set; "none" takes a setting away.

    Raises:
        ConfigError: an override that is not of that form.
    """
    for override in overrides:
        _apply_override(table, override)
    return table


def build_config(table: dict[str, Any], source: str = "configuration") -> RunConfig:
    """A RunConfig from plain tables; see `load_config` for errors."""
    classes = _draft_classes(_algorithms_asked_for(table))
    try:
        return _run_model(classes).model_validate(table)
    except ValidationError as error:
        problems = "\n".join(_explain(problem, classes) for problem in error.errors())
        raise ConfigError(f"{source}:\n{problems}") from error


def _algorithms_asked_for(table: dict[str, Any]) -> tuple[str, ...]:
    drafts = table.get("drafts")
    tables = drafts.values() if isinstance(drafts, dict) else ()
    names = {draft.get("algorithm") for draft in tables if isinstance(draft, dict)}
    return tuple(sorted(name for name in names if isinstance(name, str)))


@functools.cache
def _draft_classes(asked: tuple[str, ...]) -> _Classes:
    """Settings by algorithm: ours, and those of other packages that are asked for (only these are imported)."""
    classes = dict(_OURS)
    for entry in entry_points(group="paceline.algorithms"):
        if entry.name not in asked or entry.name in classes:
            continue
        config_class = getattr(entry.load(), "config_class", None)
        if not (isinstance(config_class, type) and issubclass(config_class, DraftConfig)):
            raise ConfigError(
                f"algorithm {entry.name!r} ({entry.value}) has config_class = {config_class!r}: "
                "it must be a subclass of paceline.config.drafts.DraftConfig"
            )
        classes[entry.name] = config_class
    return MappingProxyType(classes)


def _run_model(classes: _Classes) -> type[RunConfig]:
    return RunConfig if classes.keys() == _OURS.keys() else _extended_model(tuple(classes.values()))


@functools.cache  # one class for the same algorithms: only then are equal configurations equal
def _extended_model(classes: tuple[type[DraftConfig], ...]) -> type[RunConfig]:
    known: Any = typing.Union[classes]  # noqa: UP007 - made at run time
    drafts = (dict[str, typing.Annotated[known, Field(discriminator="algorithm")]], Field(min_length=1))
    model: type[RunConfig] = create_model("RunConfig", __base__=RunConfig, drafts=drafts)
    return model


def dump_config(config: BaseModel) -> str:
    """TOML that `build_config` reads back into an equal object; unset optional fields are left out."""
    return tomli_w.dumps(_without_none(config.model_dump(mode="json")))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return value


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"override {override!r} is not section.field=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: training.device=cpu
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {override!r}: {part} is a value, not a section")
    if value == "none" or text.strip() == "none":
        table.pop(parts[-1], None)
    else:
        table[parts[-1]] = value


def _explain(problem: Any, classes: _Classes) -> str:
    location = [str(part) for part in problem["loc"]]
    if location[:1] == ["drafts"] and len(location) > 2:
        del location[2]  # pydantic puts the algorithm behind the draft's name
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"], classes)
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(sorted(known))}"
        return f"  {key}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"  {key}: is required"
    if problem["type"] == "union_tag_not_found":
        return f'  {key}: is required: algorithm = "eagle3" or "dflash"'
    if problem["type"] == "union_tag_invalid":
        tag = problem["ctx"]["tag"]
        return f"  {key}.algorithm = {tag!r}: unknown; one of {', '.join(classes)}"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    shown = "" if isinstance(value, dict | list) else f" = {value!r}"
    return f"  {key}{shown}: {message}" if key else f"  {message}"


def _known_keys(location: tuple[Any, ...], classes: _Classes) -> list[str]:
    """Field names of the section that holds the last part of `location`."""
    model: Any = RunConfig
    for part in location[:-1]:
        if part in classes:
            model = classes[part]
        elif isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            annotation: Any = model.model_fields[part].annotation
            inner = [a for a in typing.get_args(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
            model = inner[0] if inner else annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
