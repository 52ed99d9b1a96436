"""Where rows lie before they are sent and after they have come: on the device for nccl, on the host for gloo."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from paceline.errors import OutOfMemoryError
from paceline.schema.features import Features
from paceline.schema.layout import ReplyLayout, layout_bytes
from paceline.transport.base import Incoming, RowBuffer
from paceline.transport.buffers import HostBuffers
from paceline.transport.delivery import HostToTrainer, RowDelivery
from paceline.transport.feature_bytes import pack, unpack


class DeviceBuffer:
    """A row's memory on a GPU; the caching allocator has it back when nobody refers to it."""

    def __init__(self, memory: Tensor) -> None:
        """uint8[n], allocated on the stream that fills it."""
        self._memory: Tensor | None = memory

    @property
    def memory(self) -> Tensor:
        """uint8[n], on the device."""
        assert self._memory is not None, "the buffer was given back"
        return self._memory

    def give_back(self, after: torch.cuda.Event | None = None) -> None:
        """Another row may have it; `after` is the allocator's care, which knows every stream that reads it."""
        del after
        self._memory = None


class RowMemory(Protocol):
    """Memory that a kind of communicator can send from and receive into."""

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """Of the transfers; None where the host orders them."""

    def reserve(self, num_bytes: int) -> RowBuffer:
        """Memory for a row.

        Raises:
            OutOfMemoryError: the device has none.
        """

    def pack(self, features: Features, layout: ReplyLayout) -> RowBuffer:
        """The features in one buffer, ready to be sent; their numbers must be in memory."""

    def deliver(self, incoming: Incoming) -> RowDelivery:
        """The features in `incoming.buffer`, which has been filled."""


class DeviceMemory:
    """For nccl."""

    def __init__(self, device: torch.device) -> None:
        """A GPU; "cuda" without an index is the current one."""
        self.stream: torch.cuda.Stream = torch.cuda.Stream(device)
        self._side = torch.cuda.Stream(device)
        """Rows are allocated, packed and inspected on it, while others are being transferred on `stream`."""

    def reserve(self, num_bytes: int) -> DeviceBuffer:
        device = self.stream.device
        with torch.cuda.device(device), torch.cuda.stream(self._side):
            try:
                memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            except torch.OutOfMemoryError as error:
                raise OutOfMemoryError(
                    f"{device} has no room for a row of {num_bytes / 2**20:.0f} MiB of features: lower "
                    "transport.prefetch_rows, transport.prefetch_bytes or data.row_tokens"
                ) from error
            self.stream.wait_event(self._side.record_event())  # for whoever read the memory before
        return DeviceBuffer(memory)

    def pack(self, features: Features, layout: ReplyLayout) -> DeviceBuffer:
        buffer = self.reserve(layout_bytes(layout))
        with torch.cuda.device(self.stream.device), torch.cuda.stream(self._side):
            for tensor in features.tensors().values():
                if tensor.is_cuda:
                    tensor.record_stream(self._side)
            pack(features, layout, buffer.memory)
            self.stream.wait_event(self._side.record_event())
        return buffer

    def deliver(self, incoming: Incoming) -> RowDelivery:
        # the host has waited for the transfer: no event is needed, and one of `stream` would wait for later rows too
        features = unpack(incoming.header, incoming.layout, incoming.buffer.memory)
        return RowDelivery(features, (), self._side, incoming.buffer.give_back)


class HostMemory:
    """For gloo."""

    stream: torch.cuda.Stream | None = None

    def __init__(self, buffers: HostBuffers, device: torch.device) -> None:
        """`device` is the engine's or the trainer's; `buffers` are pinned if it is a GPU."""
        self._buffers = buffers
        self._to_trainer = HostToTrainer(device)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def reserve(self, num_bytes: int) -> RowBuffer:
        return self._buffers.reserve(num_bytes)

    def pack(self, features: Features, layout: ReplyLayout) -> RowBuffer:
        buffer = self._buffers.reserve(layout_bytes(layout))
        if self._side is None:
            pack(features, layout, buffer.memory)
            return buffer
        with torch.cuda.device(self._side.device), torch.cuda.stream(self._side):
            for tensor in features.tensors().values():
                if tensor.is_cuda:
                    tensor.record_stream(self._side)
            pack(features, layout, buffer.memory)
            self._side.record_event().synchronize()
        return buffer

    def deliver(self, incoming: Incoming) -> RowDelivery:
        return self._to_trainer.deliver(incoming)
