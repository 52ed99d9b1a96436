"""Features as the bytes of one buffer and back: the same bytes in a body, in a file, on a channel, in a recording."""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.schema.features import Features
from paceline.schema.layout import ReplyLayout, TensorLayout, layout_bytes, place
from paceline.schema.parts import Part
from paceline.schema.protocol import ReplyHeader, TensorEntry


def describe(position: int, features: Features) -> tuple[ReplyHeader, dict[str, TensorLayout]]:
    """What is said about the features of the row at `position`, and where each tensor lies in the row's buffer."""
    layout = place([(name, _dtype_name(tensor), tuple(tensor.shape)) for name, tensor in features.tensors().items()])
    header = ReplyHeader(
        position=position,
        row_hash=features.row_hash,
        num_tokens=features.num_tokens,
        layers=features.layers,
        part=features.part.index,
        num_parts=features.part.count,
        tensors={name: TensorEntry.of(tensor) for name, tensor in layout.items()},
        num_bytes=layout_bytes(layout),
        finite=features.finite,
        queued_s=features.queued_s,
        computed_s=features.computed_s,
    )
    return header, layout


def views(features: Features, layout: ReplyLayout) -> tuple[memoryview, ...]:
    """The bytes of the row's buffer, piece by piece; of features on the CPU nothing is copied that is contiguous.

    The pieces keep the memory alive, and show what later writes to the features.
    """
    pieces: list[memoryview] = []
    end = 0
    tensors = features.tensors()
    for name, tensor in layout.items():
        pieces += _zeros(tensor.offset - end)
        pieces.append(memoryview(as_bytes(tensors[name]).numpy().data))
        end = tensor.offset + tensor.num_bytes
    pieces += _zeros(layout_bytes(layout) - end)
    return tuple(pieces)


def pack(features: Features, layout: ReplyLayout, memory: Tensor) -> None:
    """Copy the features into `memory` (uint8, at least `layout_bytes(layout)`), gaps filled with zeros.

    On CUDA the copies are queued on the current stream; those to pinned memory do not wait.
    """
    tensors = features.tensors()
    ends = [0, *(tensor.offset + tensor.num_bytes for tensor in layout.values())]
    begins = [*(tensor.offset for tensor in layout.values()), layout_bytes(layout)]
    for end, begin in zip(ends, begins, strict=True):
        memory[end:begin].zero_()
    for name, place_in_memory in unpack_tensors(layout, memory).items():
        place_in_memory.copy_(tensors[name], non_blocking=True)


def unpack_tensors(layout: ReplyLayout, memory: Tensor) -> dict[str, Tensor]:
    """The tensors in `memory` (uint8), as views of it."""
    return {
        name: memory[tensor.offset : tensor.offset + tensor.num_bytes]
        .view(getattr(torch, tensor.dtype))
        .view(tensor.shape)
        for name, tensor in layout.items()
    }


def unpack(header: ReplyHeader, layout: ReplyLayout, memory: Tensor) -> Features:
    """The features that `header` speaks of, as views of `memory` (uint8, on any device)."""
    tensors = unpack_tensors(layout, memory)
    return Features(
        layers=header.layers,
        hidden=tensors["hidden"],
        greedy=tensors.get("greedy"),
        final_hidden=tensors.get("final_hidden"),
        final_index=tensors.get("final_index"),
        logsumexp=tensors.get("logsumexp"),
        row_hash=header.row_hash,
        finite=header.finite,
        queued_s=header.queued_s,
        computed_s=header.computed_s,
        part=Part(header.part, header.num_parts),
    )


def as_bytes(tensor: Tensor) -> Tensor:
    """uint8[n]: the tensor's bytes in row-major order; a view where it is contiguous."""
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8)
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _zeros(num_bytes: int) -> list[memoryview]:
    """Fewer than ALIGNMENT of them, or none."""
    return [memoryview(bytes(num_bytes))] if num_bytes else []
