"""safetensors files written beside a busy Python: an engine schedules its next batch in the same process.

The library's own `save_file` copies every tensor while no other thread may run, 20 ms for 64 MiB; a write of a buffer
lets them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int64: "I64",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous tensors on the CPU, under another name until the file is whole.

    Raises:
        OSError: it cannot be written; nothing is left of it then.
    """
    header: dict[str, object] = {}
    buffers, end = [], 0
    # Wide numbers first: all of them lie at multiples of their size then.
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        buffer = tensor.contiguous().view(torch.uint8).reshape(-1).numpy().data
        start, end = end, end + buffer.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        buffers.append(buffer)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}")
    try:
        with partial.open("wb", buffering=0) as file:
            for part in (memoryview(len(text).to_bytes(8, "little") + text), *buffers):
                _write(file.fileno(), part)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write(descriptor: int, part: memoryview) -> None:
    """All of it: the system writes 2 GiB at a time."""
    written = 0
    while written < part.nbytes:
        written += os.write(descriptor, part[written:])
