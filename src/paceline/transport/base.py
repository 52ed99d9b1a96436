"""The transport contract: a sender beside the engine, a receiver beside the trainer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from paceline.schema.features import Features

SentT_co = TypeVar("SentT_co", covariant=True)
SentT_contra = TypeVar("SentT_contra", contravariant=True)


class Sender(Protocol[SentT_co]):
    """The server's end of one session's channel.

    A parcel is what has to reach the receiver by the control plane: the features themselves (local), a body, the name
    of a file, or nothing but a header while the tensors take a channel of their own.
    """

    def send(self, features: Features) -> SentT_co:
        """The parcel for one row; its numbers are in memory; called on the thread that resolved the engine's future."""

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
