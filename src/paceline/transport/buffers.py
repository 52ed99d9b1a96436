"""Host memory for rows, used again and again: fresh memory costs a page fault every 4 KiB, pinned memory far more."""

from __future__ import annotations

import threading
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

from paceline.schema.features import Features
from paceline.schema.layout import ALIGNMENT, ReplyLayout, layout_bytes
from paceline.transport.feature_bytes import pack, views

_SMALLEST_BLOCK = 4096


class HostBuffer:
    """A row's memory; it holds another row only when nothing refers to it, not even a tensor kept by mistake."""

    def __init__(self, pool: HostBuffers, block: np.ndarray, num_bytes: int) -> None:
        """`num_bytes` of `block`, which goes back to `pool`."""
        self._pool = pool
        lease = block[:num_bytes]
        # the tensor's storage keeps `lease` alive, and so does every view of it: autograd may hold one for longer
        # than whoever gives the buffer back can know
        weakref.finalize(lease, pool._returned.append, block).atexit = False  # noqa: SLF001 - the pool's own part
        self._lease: np.ndarray | None = lease
        self._memory: Tensor | None = torch.from_numpy(lease)

    @property
    def memory(self) -> Tensor:
        """uint8[n], on the host."""
        assert self._memory is not None, "the buffer was given back"
        return self._memory

    @property
    def view(self) -> memoryview:
        """The same bytes."""
        assert self._lease is not None, "the buffer was given back"
        return memoryview(self._lease.data)

    def give_back(self, after: torch.cuda.Event | None = None) -> None:
        """Another row may have the memory once `after` has passed and no tensor of it is left. Safe to call twice."""
        memory, self._memory, self._lease = self._memory, None, None
        if memory is not None and after is not None:
            self._pool._in_use_until.append((after, memory))  # noqa: SLF001 - the pool's own part


class HostBuffers:
    """Buffers of host memory, shared by all threads of a process.

    Whatever is asked for is given: bounds on rows in flight are the budget's. What is free is kept for the next row
    as long as all blocks together are no more than `max_bytes`.
    """

    def __init__(self, max_bytes: int, pinned: bool = False) -> None:
        """`pinned` for copies to and from a GPU."""
        self._max_bytes = max_bytes
        self._pinned = pinned
        self._lock = threading.Lock()
        self._free: deque[np.ndarray] = deque()
        """The one given back last is the last: what is not used for long goes first."""
        self._num_bytes = 0
        self._num_free_bytes = 0
        # both are filled without the lock: the garbage collector may do so at any moment, on any thread
        self._returned: deque[np.ndarray] = deque()
        self._in_use_until: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    @property
    def num_bytes(self) -> int:
        """Of all blocks, free or not."""
        with self._lock:
            self._collect()
            return self._num_bytes

    @property
    def num_free_bytes(self) -> int:
        """Of blocks that wait for a row."""
        with self._lock:
            self._collect()
            return self._num_free_bytes

    def reserve(self, num_bytes: int) -> HostBuffer:
        """Memory for a row; what stands in it is what stood there before."""
        size = block_size(num_bytes)
        with self._lock:
            self._collect()
            block = self._take_free(size)
            if block is None:
                self._num_bytes += size
                self._drop_superfluous()
        if block is None:
            try:
                block = self._allocate(size)
            except BaseException:
                with self._lock:
                    self._num_bytes -= size
                raise
        return HostBuffer(self, block, num_bytes)

    def _collect(self) -> None:
        for _ in range(len(self._in_use_until)):
            self._look_at_oldest()
        while self._returned:
            block = self._returned.popleft()
            self._free.append(block)
            self._num_free_bytes += block.nbytes
        self._drop_superfluous()

    def _look_at_oldest(self) -> None:
        """Let go of the memory whose event has passed; a function, so that no local keeps it."""
        event, memory = self._in_use_until.popleft()
        if not event.query():
            self._in_use_until.append((event, memory))

    def _take_free(self, size: int) -> np.ndarray | None:
        """The smallest free block that holds `size` and is not twice as large."""
        fitting = [block for block in self._free if size <= block.nbytes <= 2 * size]
        if not fitting:
            return None
        chosen = min(fitting, key=lambda block: block.nbytes)
        self._free = deque(block for block in self._free if block is not chosen)
        self._num_free_bytes -= chosen.nbytes
        return chosen

    def _drop_superfluous(self) -> None:
        while self._free and self._num_bytes > self._max_bytes:
            dropped = self._free.popleft().nbytes
            self._num_bytes -= dropped
            self._num_free_bytes -= dropped

    def _allocate(self, size: int) -> np.ndarray:
        if self._pinned:
            pinned: np.ndarray = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
            return pinned
        block = np.empty(size + ALIGNMENT, np.uint8)
        begin = -block.ctypes.data % ALIGNMENT
        return block[begin : begin + size]


def block_size(num_bytes: int) -> int:
    """At most an eighth more: rows of nearly the same size share their blocks."""
    step = max(_SMALLEST_BLOCK, 1 << max(0, num_bytes.bit_length() - 4))
    return max(1, -(-num_bytes // step)) * step


class HostBytes:
    """The bytes of rows' features in host memory, for whoever sends them."""

    def __init__(self, buffers: HostBuffers) -> None:
        """`buffers` take features of a GPU (pinned, then); those of the CPU are sent from where they lie."""
        self._buffers = buffers
        self._side_streams: dict[torch.device, torch.cuda.Stream] = {}

    def of(self, features: Features, layout: ReplyLayout) -> tuple[memoryview, ...]:
        """The pieces of the row's buffer; their memory is used again when nothing refers to them any more.

        Waits for copies off a GPU, queued on a stream of their own; the features' numbers must be in memory.
        """
        device = features.hidden.device
        if device.type != "cuda":
            return views(features, layout)
        buffer = self._buffers.reserve(layout_bytes(layout))
        with torch.cuda.device(device), torch.cuda.stream(stream := self._side_stream(device)):
            for tensor in features.tensors().values():
                tensor.record_stream(stream)
            pack(features, layout, buffer.memory)
            stream.record_event().synchronize()
        return (buffer.view,)

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._side_streams:
            self._side_streams[device] = torch.cuda.Stream(device)
        return self._side_streams[device]
