"""The transport contract: a sender beside the engine, a receiver beside the trainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from paceline.schema.features import Features
from paceline.schema.layout import ReplyLayout
from paceline.schema.protocol import ReplyHeader

SentT_co = TypeVar("SentT_co", covariant=True)
SentT_contra = TypeVar("SentT_contra", contravariant=True)


class Sender(Protocol[SentT_co]):
    """The server's end of one session's channel.

    A parcel is what has to reach the receiver by the control plane: the features themselves (local), a body, the name
    of a file, or nothing but a header while the tensors take a channel of their own.
    """

    def send(self, position: int, features: Features) -> SentT_co:
        """The parcel for the row at `position`; its numbers are in memory; called for one row at a time.

        May wait for copies off the device, so a server calls it on a thread of the session, never on the engine's.

        Raises:
            TransportError: the channel is broken; the client will notice and open another.
        """

    def close(self) -> None:
        """Free what the channel holds; safe to call twice."""


class Receiver(Protocol[SentT_contra]):
    """The client's end of one session's channel."""

    def receive(self, parcel: SentT_contra) -> Delivery:
        """The delivery of one row; called on any thread, never on the trainer's.

        Raises:
            TransportError: the features were lost or damaged on the way.
        """

    def close(self) -> None:
        """Free what the channel holds; deliveries already handed out stay valid. Safe to call twice."""


class Delivery(Protocol):
    """One row's features on the trainer's device, perhaps still being written by another stream of that device."""

    @property
    def features(self) -> Features:
        """The features; their shapes may be read at once, their numbers only in `inspect` or after `take`."""

    def inspect(self) -> AbstractContextManager[None]:
        """A block in which the numbers may be read, without touching the trainer's streams."""

    def take(self) -> Features:
        """The features, usable by whatever the calling thread queues on its current stream from now on."""

    def release(self) -> None:
        """Give the memory back: the features' tensors are emptied, so that nobody reads them by mistake.

        Work queued before on the calling thread's current stream still sees them, if that thread called `take`.
        Safe to call twice.
        """

    def is_free(self) -> bool:
        """Whether, after `release`, that work is done, so that the memory can hold another row."""

    def wait_until_free(self) -> None:
        """Return when `is_free`; blocks the host."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answers a row request with: the whole HTTP body, and what comes after it."""

    body: tuple[bytes | memoryview, ...]
    """In order; memory that stays as it is until `sent` is called."""
    content_type: str
    """SAFETENSORS for a head with its tensors behind it, JSON for a ReplyHeader whose tensors travel elsewhere."""
    checksum: str
    """xxh3-64 of the body."""
    sent: Callable[[bool], None]
    """Called exactly once: True when the body has left, False when it could not be sent or nobody waits for it."""


SAFETENSORS = "application/x-safetensors"
JSON = "application/json"


class Body(Protocol):
    """The rest of a reply's body, behind its head."""

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the body's last bytes, and prove that the whole body is what was sent.

        Raises:
            DamagedError: fewer or more bytes than `view` has, or another checksum.
            ServerLostError: the connection broke, or stood still for too long.
        """


@dataclass(frozen=True, slots=True)
class Incoming:
    """A reply whose head has come and is proved to be undamaged, or will be by `body`."""

    header: ReplyHeader
    layout: ReplyLayout
    """What was asked for, and therefore where the tensors lie in `buffer`."""
    buffer: RowBuffer
    """Reserved before the row was asked for."""
    body: Body | None
    """The tensors, where they come in the HTTP body."""


class RowBuffer(Protocol):
    """Memory for one row: on the host (pinned for a trainer on a GPU), or on the device for GPU to GPU channels."""

    @property
    def memory(self) -> torch.Tensor:
        """uint8[n], n at least what was reserved; begins at a multiple of ALIGNMENT."""

    def give_back(self, after: torch.cuda.Event | None = None) -> None:
        """Another row may have it, once `after` has passed (None: at once). Safe to call twice."""


class RemoteReceiver(Receiver[Incoming], Protocol):
    """The client's end of a channel to another process."""

    def reserve(self, num_bytes: int) -> RowBuffer:
        """Memory for a row's tensors, taken before it is asked for; the delivery gives it back when it is released.

        Whoever gets no delivery (the row was lost) gives it back himself.
        """

    def drop(self, header: ReplyHeader) -> None:
        """The reply `header` belongs to is not wanted: throw away what of it does not come in the HTTP body."""

    def lost(self, position: int) -> None:
        """No reply came to a row that was asked for; what of it does not come in the HTTP body may come or not."""
