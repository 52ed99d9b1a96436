"""What a reply must look like, known before the row is asked for: names, dtypes, shapes, bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from paceline.schema.features import FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4}


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """One tensor of a reply."""

    dtype: str
    """As TargetInfo spells it, e.g. "bfloat16"."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ELEMENT_BYTES[self.dtype]


def reply_layout(request: RowRequest, spec: FeatureSpec, info: TargetInfo) -> dict[str, TensorLayout]:
    """Every tensor of the reply to `request`, by name."""
    num_tokens = len(request.tokens)
    layout = {"hidden": TensorLayout(info.dtype, (num_tokens, len(spec.layers), info.hidden_size))}
    if spec.greedy:
        layout["greedy"] = TensorLayout("int32", (num_tokens,))
    if spec.final_hidden != "none":
        num_final = num_tokens
        if spec.final_hidden == "supervised":
            num_final = int((request.spans[:, 1] - request.spans[:, 0]).sum())
        layout["final_hidden"] = TensorLayout(info.dtype, (num_final, info.hidden_size))
        layout["final_index"] = TensorLayout("int32", (num_final,))
    if spec.logsumexp:
        layout["logsumexp"] = TensorLayout("float32", (num_tokens,))
    return layout


def reply_bytes(request: RowRequest, spec: FeatureSpec, info: TargetInfo) -> int:
    """Bytes of tensors in the reply to `request`."""
    return sum(tensor.num_bytes for tensor in reply_layout(request, spec, info).values())
