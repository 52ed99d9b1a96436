"""Where rows come from: JSON lines, JSON, Parquet, a directory of them, or a data set on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasets.exceptions import DatasetGenerationError

from paceline.errors import DataError

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_JSON, _ORIGIN = "_json", "_origin"
_READ_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it was read, and where from."""

    origin: str
    """For messages: file and line, or data set and row."""
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a source whose rows all have the same columns; a source is one or several."""

    name: str
    rows: datasets.Dataset


class Source:
    """Rows of one `data.train` or `data.eval`: local files, or a data set on the hub."""

    def __init__(self, name: str) -> None:
        """Find the files.

        Args:
            name: a path, or OWNER/NAME or OWNER/NAME:SPLIT of a data set on the hub.

        Raises:
            DataError: nothing is there, it is empty, or of a kind that cannot be read.
        """
        self.name = name
        self.files = _find_files(name)
        self._hub = _load_hub(name) if not self.files else None

    def fingerprint(self) -> str:
        """xxh3-128 (32 hex digits) of the content of every file and of the files' names, in order."""
        digest = xxhash.xxh3_128()
        paths = [Path(entry["filename"]) for entry in self._hub.cache_files] if self._hub else self.files
        for path in paths:
            digest.update(f"|{path.name}|{path.stat().st_size}|".encode())
            with path.open("rb") as file:
                while block := file.read(_READ_BYTES):
                    digest.update(block)
        return digest.hexdigest()

    def load(self, cache_dir: Path) -> list[Part]:
        """The rows, memory-mapped; what has to be converted for that is written to `cache_dir`.

        Raises:
            DataError: a file that is not what its name says.
        """
        if self._hub is not None:
            return [Part(self.name, self._hub)]
        parts = []
        text_files = [path for path in self.files if path.suffix != ".parquet"]
        if text_files:
            parts.append(Part(self.name, _load_json_files(text_files, cache_dir)))
        for path in self.files:
            if path.suffix == ".parquet":
                rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(cache_dir))
                assert isinstance(rows, datasets.Dataset)
                parts.append(Part(str(path), rows))
        return parts

    def __iter__(self) -> Iterator[RawRow]:
        """Every row in order, nothing kept in memory or on disk (save for .json files, which are read whole).

        Raises:
            DataError: a line that is not a JSON object.
        """
        if self._hub is not None:
            for index, values in enumerate(self._hub):
                yield RawRow(f"{self.name} row {index}", _without_none(dict(values)))
        for path in self.files:
            if path.suffix == ".parquet":
                batches = pq.ParquetFile(path).iter_batches(batch_size=256)
                for index, values in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches)):
                    yield RawRow(f"{path} row {index}", _without_none(values))
            else:
                for entry in _json_entries([str(path)]):
                    yield _parse(entry[_JSON], entry[_ORIGIN])


def read_rows(name: str) -> Iterator[RawRow]:
    """Every row of a source in order; see `Source` for what may be named and what is raised."""
    yield from Source(name)


def decode_batch(part_name: str, batch: dict[str, list[Any]], indices: list[int]) -> list[RawRow]:
    """The rows of a batch of a part, as `datasets.Dataset.map` hands it out with indices.

    Raises:
        DataError: a line that is not a JSON object.
    """
    if _JSON in batch:
        return [_parse(text, origin) for text, origin in zip(batch[_JSON], batch[_ORIGIN], strict=True)]
    return [
        RawRow(f"{part_name} row {index}", {key: _without_none(values[i]) for key, values in batch.items()})
        for i, index in enumerate(indices)
    ]


def _find_files(name: str) -> list[Path]:
    """Local files of a source, sorted; empty if it can only be a data set on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"{path} has no {', '.join(_SUFFIXES)} file: there is no data in this directory")
    elif path.is_file():
        if path.suffix not in _SUFFIXES:
            raise DataError(
                f"{path}: cannot read {path.suffix or 'a file without a suffix'}, only {', '.join(_SUFFIXES)}"
            )
        files = [path]
    elif path.suffix in _SUFFIXES or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise DataError(f"{path} does not exist: give a file, a directory, or OWNER/NAME of a data set on the hub")
    else:
        return []
    for file in files:
        _check_file(file)
    return files


def _check_file(path: Path) -> None:
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    if path.suffix == ".parquet":
        try:
            num_rows = pq.ParquetFile(path).metadata.num_rows
        except pa.ArrowException as error:
            raise DataError(f"{path} is not a Parquet file: {error}") from error
        if not num_rows:
            raise DataError(f"{path} is empty: it has no rows")


def _load_hub(name: str) -> datasets.Dataset:
    repository, _, split = name.partition(":")
    try:
        found = datasets.load_dataset(repository)
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise DataError(f"{name} is neither a local file or directory nor a data set on the hub: {error}") from error
    splits = list(found)
    chosen = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
    if chosen not in splits:
        raise DataError(f"{repository} has no split {chosen!r}: name one, {repository}:SPLIT, of {', '.join(splits)}")
    if not len(found[chosen]):
        raise DataError(f"{name} is empty: its split {chosen} has no rows")
    return found[chosen]


def _load_json_files(paths: list[Path], cache_dir: Path) -> datasets.Dataset:
    """One row a JSON value, still as text: Arrow would give every object the keys of all others, with nulls."""
    features = datasets.Features({_JSON: datasets.Value("large_string"), _ORIGIN: datasets.Value("string")})
    try:
        rows = datasets.Dataset.from_generator(
            _json_entries,
            features=features,
            cache_dir=str(cache_dir),
            gen_kwargs={"paths": [str(path) for path in paths]},
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise
    assert isinstance(rows, datasets.Dataset)
    return rows


def _json_entries(paths: list[str]) -> Iterator[dict[str, str]]:
    for path in map(Path, paths):
        num_entries = 0
        entries = _array_entries(path) if path.suffix == ".json" else _line_entries(path)
        for text, origin in entries:
            num_entries += 1
            yield {_JSON: text, _ORIGIN: origin}
        if not num_entries:
            raise DataError(f"{path} is empty: it has no rows")


def _line_entries(path: Path) -> Iterator[tuple[str, str]]:
    # Split at b"\n" only: str.splitlines would also break a string that holds a raw U+2028.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{path} line {number} is not UTF-8: {error}") from error
            if text:
                yield text, f"{path} line {number}"


def _array_entries(path: Path) -> Iterator[tuple[str, str]]:
    """Rows of a .json file: an array of objects, one object, or (as some tools write it) one object a line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            yield from _line_entries(path)
            return
        raise DataError(f"{path} is not JSON on line {error.lineno}: {error.msg}") from error
    for index, row in enumerate(value if isinstance(value, list) else [value]):
        yield json.dumps(row, ensure_ascii=False), f"{path} row {index}"


def _parse(text: str, origin: str) -> RawRow:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{origin} is not JSON: {error.msg} at character {error.pos + 1}") from error
    if not isinstance(values, dict):
        raise DataError(f"{origin} is not a JSON object but {type(values).__name__}: one row is one object")
    return RawRow(origin, values)


def _without_none(value: Any) -> Any:
    """Arrow structs carry every key of their column, null where a row had none: those keys go."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value
