"""The http transport: features are the body of the reply to a row's request, read straight into the row's buffer."""

from __future__ import annotations

import torch

from paceline.schema.features import Features
from paceline.schema.protocol import ReplyHeader
from paceline.schema.wire import checksum, encode_reply_head
from paceline.transport.base import SAFETENSORS, Incoming, Reply, RowBuffer
from paceline.transport.buffers import HostBuffers, HostBytes
from paceline.transport.delivery import HostToTrainer, RowDelivery
from paceline.transport.feature_bytes import describe


class HttpSender:
    """The server's end: bodies made of the features where they lie, of a GPU's in pinned memory."""

    def __init__(self, buffers: HostBuffers) -> None:
        """`buffers` may be shared by all sessions of a server; pinned where the engine runs on a GPU."""
        self._bytes = HostBytes(buffers)

    def send(self, position: int, features: Features) -> Reply:
        header, layout = describe(position, features)
        body: tuple[bytes | memoryview, ...] = (encode_reply_head(header, layout), *self._bytes.of(features, layout))
        return Reply(body, SAFETENSORS, checksum(*body), sent=nothing_to_do)

    def close(self) -> None:
        """Nothing is held: bodies own their memory."""


def nothing_to_do(left: bool) -> None:
    """What comes after a body that owns its memory."""
    del left


class HttpReceiver:
    """The client's end: the body is read into the row's buffer and delivered on the trainer's device."""

    def __init__(self, buffers: HostBuffers, device: torch.device) -> None:
        """`buffers` may be shared by all connections of a trainer; pinned where `device` is a GPU."""
        self._buffers = buffers
        self._to_trainer = HostToTrainer(device)

    def reserve(self, num_bytes: int) -> RowBuffer:
        return self._buffers.reserve(num_bytes)

    def receive(self, parcel: Incoming) -> RowDelivery:
        assert parcel.body is not None, "over http the tensors come in the body"
        memory = parcel.buffer.memory[: parcel.header.num_bytes]
        parcel.body.read_into(memory.numpy().data)
        return self._to_trainer.deliver(parcel)

    def drop(self, header: ReplyHeader) -> None:
        """Everything comes in the body."""

    def lost(self, position: int) -> None:
        """Everything comes in the body."""

    def close(self) -> None:
        """Nothing is held; deliveries own their memory."""
