"""A recording on disk, opened for reading: which rows it has, and their bytes, proved to be undamaged."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash
from pydantic import ValidationError

from paceline.errors import ConfigError, DamagedError, DataError
from paceline.schema.features import FeatureSpec, FinalHidden
from paceline.schema.recording import RecordedRow, RecordedShard, RecordingDir, RecordingManifest, ShardRows
from paceline.schema.target_info import TargetInfo

_BLOCK_BYTES = 8 << 20
_SERVED_BY: Mapping[FinalHidden, tuple[FinalHidden, ...]] = {
    "none": ("none", "supervised", "all"),
    "supervised": ("supervised", "all"),
    "all": ("all",),
}


@dataclass(frozen=True, slots=True)
class RowPlace:
    """Where a row lies."""

    file: Path
    row: RecordedRow

    def __str__(self) -> str:
        return f"row {self.row.row_id} of the {self.row.split} split, at byte {self.row.offset} of {self.file}"


class Recording:
    """What `paceline record` wrote; thread-safe."""

    def __init__(self, directory: str | Path) -> None:
        """Read what is recorded; opens no shard.

        Raises:
            DataError: there is no recording, or a part of it is missing or damaged: names the file.
        """
        self.paths = RecordingDir(Path(directory))
        self.manifest = read_manifest(self.paths)
        self.info = self._read_info()
        self.spec = self.manifest.spec.spec()
        self._lock = threading.Lock()
        """Guards what `forget` changes."""
        self._places: dict[str, RowPlace] = {}
        for shard in self.manifest.shards:
            self._add(shard)

    @property
    def name(self) -> str:
        return f"the recording {self.paths.root}"

    def __len__(self) -> int:
        return len(self._places)

    def find(self, key: str) -> RowPlace | None:
        """The place of the row with this `row_key`; None if it is not here, or was found damaged."""
        with self._lock:
            return self._places.get(key)

    def forget(self, key: str) -> None:
        """The row cannot be read: it is not asked for here any more."""
        with self._lock:
            self._places.pop(key, None)

    def forget_missing(self) -> list[str]:
        """Forget rows that cannot be whole, since their file is missing or too short; says what is wrong, a line each.

        Reads sizes alone; `read` finds the rest.
        """
        problems = []
        for shard in self.manifest.shards:
            file = self.paths.features(shard.name)
            num_bytes = file.stat().st_size if file.exists() else 0
            if num_bytes == shard.num_bytes:
                continue
            with self._lock:
                cut = [
                    (key, place)
                    for key, place in self._places.items()
                    if place.file == file and place.row.offset + place.row.num_bytes > num_bytes
                ]
                for key, _ in cut:
                    del self._places[key]
            first = f"; the first row it lacks is {cut[0][1]}" if cut else ""
            problems.append(f"{file} has {num_bytes} bytes, {shard.num_bytes} were written{first}")
        return problems

    def check_covers(self, specs: Mapping[str, FeatureSpec]) -> None:
        """Return if every spec can be served from what was recorded.

        Raises:
            ConfigError: names what is missing.
        """
        missing = []
        for name, spec in specs.items():
            layers = [layer for layer in spec.layers if layer not in self.spec.layers]
            if layers:
                missing.append(f"{name!r} wants capture layers {layers}, recorded are {list(self.spec.layers)}")
            if self.spec.final_hidden not in _SERVED_BY[spec.final_hidden]:
                missing.append(
                    f"{name!r} wants final hidden states of {_tokens(spec.final_hidden)}, recorded are those of "
                    f"{_tokens(self.spec.final_hidden)}"
                )
            missing += [
                f"{name!r} wants {what}, which was not recorded"
                for what, wanted, there in (
                    ("greedy tokens", spec.greedy, self.spec.greedy),
                    ("logsumexp", spec.logsumexp, self.spec.logsumexp),
                )
                if wanted and not there
            ]
        if missing:
            raise ConfigError(
                f"{self.name} does not hold the features that the drafts ask for:\n  "
                + "\n  ".join(missing)
                + "\nrecord again with these drafts in the configuration, or correct drafts.NAME.target_layers"
            )

    def check_files(self) -> None:
        """Return if everything but the shards is what was written.

        Raises:
            DataError: names the file.
        """
        for name, expected in self.manifest.files.items():
            check_file(self.paths.root / name, expected)

    def check_shards(self) -> None:
        """Return if every shard is what was written; reads all of them.

        Raises:
            DataError: names the file.
        """
        for shard in self.manifest.shards:
            check_file(self.paths.features(shard.name), shard.checksum)

    def _add(self, shard: RecordedShard) -> None:
        path, file = self.paths.shard_rows(shard.name), self.paths.features(shard.name)
        check_file(path, shard.rows_checksum)
        for row in ShardRows.model_validate_json(path.read_bytes()).rows:
            self._places[row.key] = RowPlace(file, row)

    def _read_info(self) -> TargetInfo:
        path = self.paths.target_info
        check_file(path, self.manifest.files.get(path.name, ""))
        return TargetInfo.model_validate_json(path.read_bytes())


def read_manifest(paths: RecordingDir) -> RecordingManifest:
    """manifest.json.

    Raises:
        DataError: it is missing, damaged, or of a version that is not known here.
    """
    try:
        return RecordingManifest.model_validate_json(paths.manifest.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"{paths.root} is no recording (there is no {paths.manifest}): write one with `paceline record`"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {paths.manifest}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{paths.manifest} cannot be read ({where}: {first['msg']}): it is damaged, or of another version of "
            "paceline; remove the directory and record again"
        ) from error


def check_file(path: Path, expected: str) -> None:
    """Return if the file's xxh3-64 is `expected`.

    Raises:
        DataError: it is not, or the file cannot be read.
    """
    found = file_checksum(path)
    if found != expected:
        raise DataError(
            f"{path} is damaged: checksum {found}, {expected} was written; copy it anew, or remove the recording and "
            "record again"
        )


def file_checksum(path: Path) -> str:
    """xxh3-64 of a file, 16 hex digits.

    Raises:
        DataError: it cannot be read.
    """
    digest = xxhash.xxh3_64()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; a recording is complete only as a whole") from error
    return digest.hexdigest()


def read_row(
    place: RowPlace, head: memoryview, pieces: Sequence[tuple[int, memoryview]], *, from_disk: bool = False
) -> None:
    """Fill `head`, and pieces of what lies behind it, with the row's bytes.

    All of the row is read, since its checksum is of all; what is in no piece is not kept.

    Args:
        pieces: (bytes from the end of the head, memory), in their order on disk.
        from_disk: let the system forget what it keeps of them in memory first: that copy may be the damaged one.

    Raises:
        DamagedError: they cannot be read, or are not what was written; names file and row.
    """
    descriptor = -1
    digest = xxhash.xxh3_64()
    offset, behind_head = place.row.offset, place.row.offset + len(head)
    try:
        descriptor = os.open(place.file, os.O_RDONLY)
        if from_disk:
            os.posix_fadvise(descriptor, offset, place.row.num_bytes, os.POSIX_FADV_DONTNEED)
        for start, view in [(-len(head), head), *pieces]:
            _read_past(descriptor, offset, behind_head + start, digest, place)
            offset = _fill(descriptor, view, behind_head + start, place)
            digest.update(view)
        _read_past(descriptor, offset, place.row.offset + place.row.num_bytes, digest, place)
    except OSError as error:
        raise DamagedError(f"{place} cannot be read: {error.strerror}") from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    found = digest.hexdigest()
    if found != place.row.checksum:
        raise DamagedError(f"{place} is damaged: checksum {found}, {place.row.checksum} was written")


def _fill(descriptor: int, view: memoryview, offset: int, place: RowPlace) -> int:
    """Read until `view` is full; the offset behind it."""
    while view:
        num_read = os.preadv(descriptor, [view], offset)
        if not num_read:
            raise DamagedError(f"{place} is cut off: the file ends at byte {offset}")
        offset += num_read
        view = view[num_read:]
    return offset


def _read_past(descriptor: int, offset: int, end: int, digest: xxhash.xxh3_64, place: RowPlace) -> None:
    """Add the bytes of [offset, end) to the checksum, and keep none."""
    if offset == end:
        return
    block = memoryview(bytearray(min(end - offset, _BLOCK_BYTES)))
    while offset < end:
        view = block[: end - offset]
        offset = _fill(descriptor, view, offset, place)
        digest.update(view)


def _tokens(final_hidden: FinalHidden) -> str:
    return {"none": "no tokens", "supervised": "supervised tokens", "all": "all tokens"}[final_hidden]
