"""A directory of files that is published whole or not at all, and can be proved undamaged later."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import xxhash

from paceline.config.files import fsync
from paceline.errors import CheckpointError

MANIFEST = "manifest.json"
_FORMAT = 1
_BLOCK_BYTES = 8 << 20


def write_manifest(directory: Path, run_id: str, step: int) -> None:
    """Name size and xxh3-64 of every file in `directory`, with all of them on the disk first."""
    files = {}
    for path in sorted(directory.iterdir()):
        fsync(path)
        files[path.name] = {"bytes": path.stat().st_size, "xxh3": _xxh3(path)}
    manifest = {"format": _FORMAT, "run_id": run_id, "step": step, "files": files}
    write_durably(directory / MANIFEST, json.dumps(manifest, indent=1))
    fsync(directory)


def write_durably(path: Path, text: str) -> None:
    """Write a file and wait until the disk has its content."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def publish(written: Path, final: Path, replaced: Path) -> None:
    """Rename `written` to `final`; one that is there already waits as `replaced` until the new one stands."""
    if final.exists():
        final.rename(replaced)
    written.rename(final)
    fsync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def load_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a published directory.

    Raises:
        CheckpointError: missing, not JSON, or of a format this version does not know.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {_remedy(directory)}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged (not JSON: {error}); {_remedy(directory)}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a manifest of format {_FORMAT}; {_remedy(directory)}")
    return manifest


def check_files(directory: Path) -> dict[str, Any]:
    """The manifest, after every file was found to have its size and checksum.

    Raises:
        CheckpointError: names the first file that is missing or differs, and both values.
    """
    manifest = load_manifest(directory)
    for name, expected in manifest["files"].items():
        path = directory / name
        try:
            num_bytes, checksum = path.stat().st_size, _xxh3(path)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}; {_remedy(directory)}") from error
        if num_bytes != expected["bytes"]:
            raise CheckpointError(
                f"{path} is damaged: {num_bytes} bytes, {expected['bytes']} were written; {_remedy(directory)}"
            )
        if checksum != expected["xxh3"]:
            raise CheckpointError(
                f"{path} is damaged: checksum {checksum}, {expected['xxh3']} was written; {_remedy(directory)}"
            )
    return manifest


def _remedy(directory: Path) -> str:
    return f"remove {directory} to resume from the checkpoint before it"


def _xxh3(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
