"""What a reply must look like, known before the row is asked for: names, dtypes, shapes, places, bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from paceline.schema.features import FeatureSpec
from paceline.schema.parts import WHOLE, Part, num_supervised, part_range, part_reach
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo

ALIGNMENT = 256
"""Every tensor begins at a multiple of this many bytes: what CUDA copies and vector loads like best."""
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4}


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """One tensor of a reply and its place in the row's buffer."""

    dtype: str
    """As TargetInfo spells it, e.g. "bfloat16"."""
    shape: tuple[int, ...]
    offset: int = 0
    """Bytes from the start of the row's buffer; a multiple of ALIGNMENT."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]


ReplyLayout = Mapping[str, TensorLayout]
"""Tensors by name, in the order of their offsets."""


def reply_layout(
    request: RowRequest, spec: FeatureSpec, info: TargetInfo, part: Part = WHOLE
) -> dict[str, TensorLayout]:
    """Every tensor of the reply to `request`, one behind the other in one buffer; both sides compute the same.

    Args:
        part: the part of the row that the reply holds.
    """
    num_tokens = len(request.tokens)
    start, end = part_range(num_tokens, part)
    _, reach = part_reach(num_tokens, part, spec.halo)
    tensors: list[tuple[str, str, tuple[int, ...]]] = [
        ("hidden", info.dtype, (end - start, len(spec.layers), info.hidden_size))
    ]
    if spec.greedy:
        tensors.append(("greedy", "int32", (reach - start,)))
    if spec.final_hidden != "none":
        num_final = reach - start
        if spec.final_hidden == "supervised":
            num_final = num_supervised(request.spans, start, reach)
        tensors.append(("final_hidden", info.dtype, (num_final, info.hidden_size)))
        tensors.append(("final_index", "int32", (num_final,)))
    if spec.logsumexp:
        tensors.append(("logsumexp", "float32", (reach - start,)))
    return place(tensors)


def place(tensors: list[tuple[str, str, tuple[int, ...]]]) -> dict[str, TensorLayout]:
    """(name, dtype, shape) one behind the other, each at the next multiple of ALIGNMENT."""
    layout: dict[str, TensorLayout] = {}
    offset = 0
    for name, dtype, shape in tensors:
        layout[name] = TensorLayout(dtype, shape, offset)
        offset = _aligned(offset + layout[name].num_bytes)
    return layout


def layout_bytes(layout: ReplyLayout) -> int:
    """Bytes of a buffer that holds all tensors, padding included; a multiple of ALIGNMENT."""
    return max((_aligned(tensor.offset + tensor.num_bytes) for tensor in layout.values()), default=0)


def reply_bytes(request: RowRequest, spec: FeatureSpec, info: TargetInfo, part: Part = WHOLE) -> int:
    """Bytes of the buffer that the reply to `request` takes, or that of one part of it."""
    return layout_bytes(reply_layout(request, spec, info, part))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
