"""Writing a recording: shards that are published whole or not at all, and a manifest that names what is there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import xxhash
from pydantic import BaseModel

from paceline.client.recording import file_checksum
from paceline.config.files import fsync
from paceline.errors import DataError
from paceline.schema.features import Features
from paceline.schema.recording import (
    RecordedRow,
    RecordedShard,
    RecordingDir,
    RecordingManifest,
    ShardRows,
    SplitName,
)
from paceline.schema.wire import checksum, encode_reply_head
from paceline.transport.feature_bytes import describe, views

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
logger = logging.getLogger(__name__)


class RecordingWriter:
    """Rows of features into shards, one after the other; used by one thread.

    A row is recorded when its shard is: the file is on the disk and renamed, so is the list of its rows, and the
    manifest with its entry is put in place last. What a killed process was writing is removed by the next.
    """

    def __init__(self, paths: RecordingDir, manifest: RecordingManifest, shard_bytes: int) -> None:
        """Go on behind the shards of `manifest`, which is in place; a shard is published when it has `shard_bytes`."""
        self.manifest = manifest
        self.paths = paths
        self._shard_bytes = shard_bytes
        self._file: BinaryIO | None = None
        self._partial = Path()
        self._digest = xxhash.xxh3_64()
        self._rows: list[RecordedRow] = []
        self._num_bytes = 0
        paths.shards.mkdir(exist_ok=True)
        self._remove_leftovers()

    def add(self, split: SplitName, row_id: int, features: Features) -> int:
        """Write one row of the split's plan; its bytes. `features` are on the CPU, and not needed afterwards.

        Raises:
            OSError: the disk is full, for instance.
        """
        header, layout = describe(row_id, features)
        # how long it took belongs to this run: equal features are equal bytes
        header = header.model_copy(update={"queued_s": 0.0, "computed_s": 0.0})
        parts: tuple[bytes | memoryview, ...] = (encode_reply_head(header, layout), *views(features, layout))
        if self._file is None:
            self._open()
        assert self._file is not None
        num_bytes = 0
        for part in parts:
            self._file.write(part)
            self._digest.update(part)
            num_bytes += len(part)
        self._rows.append(
            RecordedRow(
                split=split,
                row_id=row_id,
                key=features.row_hash,
                offset=self._num_bytes,
                num_bytes=num_bytes,
                checksum=checksum(*parts),
            )
        )
        self._num_bytes += num_bytes
        if self._num_bytes >= self._shard_bytes:
            self.publish()
        return num_bytes

    def publish(self) -> None:
        """Make what was written since the last shard a shard; nothing if there is nothing."""
        if self._file is None:
            return
        name, file = self._partial.stem.removeprefix("."), self._file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._file = None
        self._partial.replace(self.paths.features(name))
        rows = ShardRows(rows=tuple(self._rows)).model_dump_json().encode()
        write_durably(self.paths.shard_rows(name), rows)
        shard = RecordedShard(
            name=name,
            num_rows=len(self._rows),
            num_bytes=self._num_bytes,
            checksum=self._digest.hexdigest(),
            rows_checksum=checksum(rows),
        )
        self._put(self.manifest.model_copy(update={"shards": (*self.manifest.shards, shard)}))
        logger.info("%s: %d rows, %.2f GiB", self.paths.features(name), len(self._rows), self._num_bytes / 2**30)

    def finish(self) -> None:
        """Every row is there."""
        self.publish()
        self._put(self.manifest.model_copy(update={"complete": True}))

    def close(self) -> None:
        """Drop what is in no shard. Safe to call twice."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what is buffered may not fit
                self._file.close()
            self._file = None
            self._partial.unlink(missing_ok=True)

    def _open(self) -> None:
        number = 1 + max((int(shard.name) for shard in self.manifest.shards), default=-1)
        self._partial = self.paths.shards / f".{number:05d}.partial"
        self._file = self._partial.open("wb")
        self._digest = xxhash.xxh3_64()
        self._rows, self._num_bytes = [], 0

    def _put(self, manifest: RecordingManifest) -> None:
        put_manifest(self.paths, manifest)
        self.manifest = manifest

    def _remove_leftovers(self) -> None:
        names = {shard.name for shard in self.manifest.shards}
        for file in self.paths.shards.iterdir():
            if file.suffix == ".partial" or (file.suffix in (".features", ".json") and file.stem not in names):
                file.unlink()


def put_manifest(paths: RecordingDir, manifest: RecordingManifest) -> None:
    """Replace manifest.json as a whole."""
    write_durably(paths.manifest, _json(manifest))


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file as a whole, and wait until the disk has it."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync(path.parent)


def file_checksums(paths: RecordingDir) -> dict[str, str]:
    """By path in the directory: of everything but shards, manifest and lock; all of it is on the disk."""
    parts = [paths.target_info, paths.weights, *paths.tokenizer.rglob("*"), *paths.prepared.rglob("*")]
    files = sorted(path for path in parts if path.is_file())
    for path in files:
        fsync(path)
    return {path.relative_to(paths.root).as_posix(): file_checksum(path) for path in files}


@contextlib.contextmanager
def recording_directory(paths: RecordingDir) -> Iterator[None]:
    """The directory, held for this process and made if need be; a full disk is named.

    Raises:
        DataError: it is no recording, in use, cannot be written, or its disk is full.
    """
    with contextlib.ExitStack() as stack:
        try:
            paths.root.mkdir(parents=True, exist_ok=True)
            _check_ours(paths)
            file = stack.enter_context(paths.lock.open("a+", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{paths.root} is being written by another process: wait until it ends") from error
        except OSError as error:
            raise DataError(f"cannot write to {paths.root}: {error.strerror or error}") from error
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise DataError(
                f"no space left for {paths.root} ({error.strerror}): free some and run the same command again, it goes "
                "on behind the last shard"
            ) from error


def _check_ours(paths: RecordingDir) -> None:
    others = sorted(path.name for path in paths.root.iterdir())
    if others and paths.lock.name not in others and paths.manifest.name not in others:
        raise DataError(
            f"{paths.root} is no recording, and not empty ({others[0]} is in it): choose another directory with "
            "--output"
        )


def replace_tree(source: Path, copy: Path) -> None:
    """`copy` becomes a copy of `source`."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)


def _json(document: BaseModel) -> bytes:
    return document.model_dump_json(indent=1).encode() + b"\n"
