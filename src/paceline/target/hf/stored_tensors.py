"""Where each tensor of a checkpoint lies in its safetensors files, read from their headers alone."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from paceline.errors import TargetError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 100 << 20
"""safetensors' own limit on a header."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint."""

    file: Path
    dtype: str
    """safetensors' name, e.g. "BF16"."""
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""
    num_bytes: int


def read_tensor_table(checkpoint: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, sharded or in a single file.

    Raises:
        TargetError: no safetensors files, one that the index names is missing, or a damaged header.
    """
    table: dict[str, StoredTensor] = {}
    for file in _weight_files(checkpoint):
        table.update(_read_header(file))
    return table


def _weight_files(checkpoint: Path) -> list[Path]:
    index = checkpoint / INDEX_NAME
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise TargetError(f"{index} is not a safetensors index ({error}): download the checkpoint again") from error
        missing = [name for name in names if not (checkpoint / name).is_file()]
        if missing:
            raise TargetError(
                f"{index} names {len(names)} files, {len(missing)} are missing, first {missing[0]}: "
                "download the checkpoint again"
            )
        return [checkpoint / name for name in names]
    if (checkpoint / SINGLE_NAME).is_file():
        return [checkpoint / SINGLE_NAME]
    files = sorted(checkpoint.glob("*.safetensors"))
    if len(files) == 1:
        return files
    found = ", ".join(file.name for file in files) or "none"
    raise TargetError(
        f"{checkpoint} has neither {SINGLE_NAME} nor {INDEX_NAME} (safetensors files found: {found}): "
        "convert the checkpoint with transformers' save_pretrained; pickled weights are not read"
    )


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        table = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= size - 8 - length:
                raise ValueError(f"{name} ends at byte {8 + length + end} of {size}")
            table[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TargetError(f"{file} is damaged ({error}): download it again") from error
    return table
