"""The local transport: features handed over inside one process, without a copy on the trainer's own device.

On CUDA the producing stream records an event when the features leave the engine; the consumer's current stream waits
for it, and the caching allocator is told of every stream that reads a tensor, so that no memory is reused too early.
Nothing waits on the host and no device is synchronized.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.schema.features import Features


@dataclass(frozen=True, slots=True, eq=False)
class LocalParcel:
    """Features as the engine left them."""

    features: Features
    written: dict[torch.device, torch.cuda.Event]
    """Per CUDA device, the event after which the numbers are there."""


class LocalSender:
    """Marks on the producing streams where the features are complete.

    The marks are on the current streams of the calling thread, so it must be the engine's own thread, or the engine
    must resolve a row only when its numbers are there. (It must know `finite` by then, so it does.)
    """

    def send(self, features: Features) -> LocalParcel:
        devices = {tensor.device for tensor in features.tensors().values() if tensor.is_cuda}
        return LocalParcel(features, {device: torch.cuda.current_stream(device).record_event() for device in devices})

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

    def receive(self, parcel: LocalParcel) -> LocalDelivery:
        tensors = parcel.features.tensors()
        if all(tensor.device == self._device for tensor in tensors.values()):
            side = self._side_stream(self._device) if parcel.written else None
            return LocalDelivery(parcel.features, tuple(parcel.written.values()), side)
        return self._move(parcel, tensors)

    def _move(self, parcel: LocalParcel, tensors: dict[str, Tensor]) -> LocalDelivery:
        devices = {self._device, *(tensor.device for tensor in tensors.values())}
        sides = {device: self._side_stream(device) for device in devices if device.type == "cuda"}
        with contextlib.ExitStack() as current:
            # a copy between two GPUs is queued on the current streams of both
            for stream in sides.values():
                current.enter_context(torch.cuda.stream(stream))
            for device, event in parcel.written.items():
                sides[device].wait_event(event)
            moved = {name: self._move_tensor(tensor, sides) for name, tensor in tensors.items()}
            done = sides.values() if self._device.type == "cpu" else [sides[self._device]]
            ready = tuple(stream.record_event() for stream in done)
        return LocalDelivery(_with_tensors(parcel.features, moved), ready, sides.get(self._device))

    def _move_tensor(self, tensor: Tensor, sides: dict[torch.device, torch.cuda.Stream]) -> Tensor:
        if tensor.device == self._device:
            return tensor
        if tensor.is_cuda:
            tensor.record_stream(sides[tensor.device])
        if self._device.type == "cpu":  # only a pinned destination lets the copy run by itself
            return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        source = tensor if tensor.is_cuda else tensor.pin_memory()
        return source.to(self._device, non_blocking=True)

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._side_streams:
            self._side_streams[device] = torch.cuda.Stream(device)
        return self._side_streams[device]

    def close(self) -> None:
        """Forget the copy streams; deliveries hold their own."""
        self._side_streams.clear()


class LocalDelivery:
    """Features in this process, and the events after which they may be read."""

    def __init__(self, features: Features, ready: tuple[torch.cuda.Event, ...], side: torch.cuda.Stream | None) -> None:
        """`ready` is empty when the numbers are there; `side` is a stream of the features' device, None on the CPU."""
        self.features = features
        self._ready = ready
        self._side = side
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

    def _wait_on(self, stream: torch.cuda.Stream | None) -> None:
        for event in self._ready:
            if stream is None:
                event.synchronize()  # written to the CPU by a copy stream: only the host can wait
            else:
                stream.wait_event(event)

    def release(self) -> None:
        if self._taken_on is not None and self._last_use is None:
            self._last_use = torch.cuda.current_stream(self._taken_on).record_event()
        hidden = self.features.hidden
        self.features.hidden = hidden.new_empty((0, *hidden.shape[1:]))
        self.features.greedy = None
        self.features.final_hidden = None
        self.features.final_index = None
        self.features.logsumexp = None

    def is_free(self) -> bool:
        return self._last_use is None or self._last_use.query()

    def wait_until_free(self) -> None:
        if self._last_use is not None:
            self._last_use.synchronize()


def _with_tensors(features: Features, tensors: dict[str, Tensor]) -> Features:
    return Features(
        layers=features.layers,
        hidden=tensors["hidden"],
        greedy=tensors.get("greedy"),
        final_hidden=tensors.get("final_hidden"),
        final_index=tensors.get("final_index"),
        logsumexp=tensors.get("logsumexp"),
        row_hash=features.row_hash,
        finite=features.finite,
        queued_s=features.queued_s,
        computed_s=features.computed_s,
    )
