"""Rows between the memories of two GPUs."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor, distributed

from paceline.errors import TransportError
from paceline.transport.p2p.communicator import Group, look_until, torch_errors
from paceline.transport.p2p.store import StoreView

logger = logging.getLogger(__name__)

_ABORT_S = 5.0


class NCCLCommunicator:
    """Between the memories of two GPUs."""

    def __init__(self, group: Group, store: StoreView, peer: int, stream: torch.cuda.Stream) -> None:
        """`group` connects by its first operation, through `store`; all are ordered with the work on `stream`."""
        self._group = group
        self._store = store  # a store written in Python is gone with its last reference on this side
        self._peer = peer
        self._stream = stream
        self._lock = threading.Lock()
        self._is_connected = False
        self._is_aborted = False

    def send(self, memory: Tensor, timeout_s: float) -> None:
        self._move("send", lambda: self._group.send([memory], self._peer, 0), memory, timeout_s)

    def receive(self, memory: Tensor, timeout_s: float) -> None:
        self._move("receive", lambda: self._group.recv([memory], self._peer, 0), memory, timeout_s)

    def _move(self, what: str, begin: Callable[[], distributed.Work], memory: Tensor, timeout_s: float) -> None:
        what = f"NCCL could not {what} {memory.numel()} bytes"
        deadline = time.monotonic() + timeout_s
        with torch_errors(what):
            work, moved = self._begin(begin, deadline)
            try:
                self._watch(work, moved, deadline)
            finally:
                if not moved.query():  # it must not write to the memory any more when this returns
                    self.abort()
                    look_until(moved.query, time.monotonic() + _ABORT_S)
        if self._is_aborted:
            raise TransportError(f"{what}: the communicator was aborted")

    def _begin(
        self, begin: Callable[[], distributed.Work], deadline: float
    ) -> tuple[distributed.Work, torch.cuda.Event]:
        """The operation is queued. The first one connects, on the host: it may wait for the peer, even for ever."""
        if self._is_connected:
            return self._queue(begin)
        queued: list[tuple[distributed.Work, torch.cuda.Event]] = []
        failed: list[BaseException] = []

        def connect() -> None:
            try:
                queued.append(self._queue(begin))
            except BaseException as error:  # raised where it is waited for
                failed.append(error)

        thread = threading.Thread(target=connect, name="nccl connect", daemon=True)
        thread.start()
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            self.abort()
            thread.join(_ABORT_S)
        if failed:
            raise failed[0]
        if not queued:
            logger.warning("a thread is left behind in NCCL, which waits for a peer that is gone")
            raise TransportError("NCCL could not connect in time: the peer did not come")
        self._is_connected = True
        return queued[0]

    def _queue(self, begin: Callable[[], distributed.Work]) -> tuple[distributed.Work, torch.cuda.Event]:
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            work = begin()
            work.synchronize()  # the stream waits, not the host
            return work, self._stream.record_event()

    def _watch(self, work: distributed.Work, moved: torch.cuda.Event, deadline: float) -> None:
        """Return when `moved` has passed."""
        if look_until(lambda: moved.query() or self._is_aborted or work.is_completed(), deadline):
            # completed without having moved: NCCL noticed that the connection is broken
            if look_until(moved.query, time.monotonic() + 1.0):
                return
            raise TransportError("the connection to the peer is broken, or was aborted")
        raise TransportError("nothing came or went in time")

    def abort(self) -> None:
        with self._lock:
            if self._is_aborted:
                return
            self._is_aborted = True
        with contextlib.suppress(RuntimeError):  # it says that aborting took too long; nothing is left to do about it
            self._group.abort()
