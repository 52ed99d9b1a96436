"""Deliveries: a row's features on the trainer's device, and what has to be waited for on the way in and out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from paceline.schema.features import Features
from paceline.transport.base import Incoming
from paceline.transport.feature_bytes import unpack


class RowDelivery:
    """Features on the trainer's device, the copies after which they may be read, and whom their memory goes back to."""

    def __init__(
        self,
        features: Features,
        copied: tuple[torch.cuda.Event, ...] = (),
        side: torch.cuda.Stream | None = None,
        on_release: Callable[[torch.cuda.Event | None], None] | None = None,
    ) -> None:
        """Features that nobody else writes to.

        Args:
            copied: what has to pass before the features may be read; empty when nothing was copied.
            side: a stream of the features' device to inspect them on; None on the CPU.
            on_release: takes the memory back (`RowBuffer.give_back`): once the event it is given has passed. None
                where the allocator does it.
        """
        self.features = features
        self._copied = copied
        self._side = side
        self._on_release = on_release
        self._taken_on: torch.device | None = None
        self._last_use: torch.cuda.Event | None = None

    @contextlib.contextmanager
    def inspect(self) -> Iterator[None]:
        self._wait_on(self._side)
        with torch.cuda.stream(self._side):  # None changes nothing
            yield

    def take(self) -> Features:
        if self._side is None:
            self._wait_on(None)
            return self.features
        self._taken_on = self._side.device
        stream = torch.cuda.current_stream(self._taken_on)
        self._wait_on(stream)
        for tensor in self.features.tensors().values():
            tensor.record_stream(stream)
        return self.features

    def release(self) -> None:
        if self._taken_on is not None and self._last_use is None:
            self._last_use = torch.cuda.current_stream(self._taken_on).record_event()
        hidden = self.features.hidden
        self.features.hidden = hidden.new_empty((0, *hidden.shape[1:]))
        self.features.greedy = None
        self.features.final_hidden = None
        self.features.final_index = None
        self.features.logsumexp = None
        on_release, self._on_release = self._on_release, None
        if on_release is not None:
            on_release(self._last_read())

    def is_free(self) -> bool:
        return self._last_use is None or self._last_use.query()

    def wait_until_free(self) -> None:
        if self._last_use is not None:
            self._last_use.synchronize()

    def _last_read(self) -> torch.cuda.Event | None:
        """After what nobody reads the memory: the consumer's work, or of a row that nobody took, an inspection."""
        if self._last_use is not None or self._side is None:
            return self._last_use
        self._wait_on(self._side)
        inspected: torch.cuda.Event = self._side.record_event()
        return inspected

    def _wait_on(self, stream: torch.cuda.Stream | None) -> None:
        for event in self._copied:
            if stream is None:
                event.synchronize()  # on the CPU nothing but the host can wait
            else:
                stream.wait_event(event)


class HostToTrainer:
    """Rows in buffers of host memory, delivered on the trainer's device; thread-safe.

    On the CPU the features are views of the buffer, which goes back when the row is released. For a GPU one copy of
    the whole buffer is queued on a stream of its own, and the buffer goes back when it has passed.
    """

    def __init__(self, device: torch.device) -> None:
        """`device` is the trainer's; "cuda" without an index is the current one."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def deliver(self, incoming: Incoming) -> RowDelivery:
        """The features whose bytes are in `incoming.buffer` (pinned, for a GPU)."""
        buffer = incoming.buffer
        if self._side is None:
            return RowDelivery(unpack(incoming.header, incoming.layout, buffer.memory), on_release=buffer.give_back)
        # each thread that touches CUDA sets its device
        with torch.cuda.device(self.device), torch.cuda.stream(self._side):
            memory = buffer.memory.to(self.device, non_blocking=True)
            copied = self._side.record_event()
        buffer.give_back(after=copied)
        return RowDelivery(unpack(incoming.header, incoming.layout, memory), (copied,), self._side)
