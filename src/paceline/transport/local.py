"""The local transport: features handed over inside one process, without a copy on the trainer's own device.

An engine resolves a row when its numbers are in memory (it has read `finite` by then), so the hand-over itself waits
for nothing. What is left to order on CUDA: copies to another device run on streams of their own and end in an event
that the consumer's current stream waits for; and the caching allocator is told of every stream that reads a tensor, so
that no memory is used again too early. No device is synchronized.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from paceline.schema.features import Features
from paceline.transport.delivery import RowDelivery


class LocalSender:
    """The engine's end: nothing has to be done to features that stay in the process."""

    def send(self, position: int, features: Features) -> Features:
        del position
        return features

    def close(self) -> None:
        """Nothing is held."""


class LocalReceiver:
    """Hands features over where they lie, or moves them to `device` on copy streams of its own."""

    def __init__(self, device: torch.device) -> None:
        """`device` is the trainer's; "cuda" without an index is the current one."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        self._side_streams: dict[torch.device, torch.cuda.Stream] = {}

    def receive(self, parcel: Features) -> RowDelivery:
        """The features on the trainer's device; the same object if they are there already."""
        tensors = parcel.tensors()
        elsewhere = {tensor.device for tensor in tensors.values()} - {self._device}
        if not elsewhere:
            return RowDelivery(parcel, (), self._side_stream(self._device))
        # a copy between two GPUs is queued on the current streams of both
        sides = [side for device in (*elsewhere, self._device) if (side := self._side_stream(device)) is not None]
        with contextlib.ExitStack() as current:
            for side in sides:
                current.enter_context(torch.cuda.stream(side))
            moved: dict[str, Any] = {name: self._move(tensor) for name, tensor in tensors.items()}
            copied = tuple(side.record_event() for side in sides)
        return RowDelivery(replace(parcel, **moved), copied, self._side_stream(self._device))

    def _move(self, tensor: Tensor) -> Tensor:
        if tensor.device == self._device:
            return tensor
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        if self._device.type == "cpu":  # only a pinned destination lets the copy run by itself
            return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        source = tensor if tensor.is_cuda else tensor.pin_memory()
        return source.to(self._device, non_blocking=True)

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if device not in self._side_streams:
            self._side_streams[device] = torch.cuda.Stream(device)
        return self._side_streams[device]

    def close(self) -> None:
        """Forget the copy streams; deliveries hold their own."""
        self._side_streams.clear()
