"""Rows over TCP, between buffers of host memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import Tensor, distributed

from paceline.errors import TransportError
from paceline.transport.p2p.communicator import Group, torch_errors

_ROWS, _ABORT, _WATCH = 0, 1, 2
"""gloo's tags."""
_FOR_EVER = timedelta(days=365)
_GRACE_S = 0.1
"""For a transfer that ended together with its connection."""


class GlooCommunicator:
    """A connected group of two.

    gloo tells the operations that wait for a connection when it breaks, but not the one whose bytes are just coming
    in. So an operation that has nothing else to wait for watches the connection, and each transfer is waited for on a
    thread of its own, which is left to its time-out when the connection is gone; nothing writes to memory then.
    """

    def __init__(self, group: Group, peer: int) -> None:
        """Begin to watch the connection to rank `peer`."""
        self._group = group
        self._peer = peer
        self._changed = threading.Condition()
        self._is_aborted = False
        self._is_broken = False
        threading.Thread(target=self._watch, name="gloo watch", daemon=True).start()

    def send(self, memory: Tensor, timeout_s: float) -> None:
        self._move("send", lambda: self._group.send([memory], self._peer, _ROWS), memory, timeout_s)

    def receive(self, memory: Tensor, timeout_s: float) -> None:
        self._move("receive", lambda: self._group.recv([memory], self._peer, _ROWS), memory, timeout_s)

    def abort(self) -> None:
        with self._changed:
            if self._is_aborted:
                return
            self._is_aborted = True
        # gloo has no abort; but an operation that times out closes the connection, under all others too
        with contextlib.suppress(RuntimeError):
            self._wait_for_nothing(_ABORT, timedelta(milliseconds=1))
        self._break()

    def _watch(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._wait_for_nothing(_WATCH, _FOR_EVER)
        self._break()

    def _wait_for_nothing(self, tag: int, timeout: timedelta) -> None:
        self._group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, tag).wait(timeout)

    def _break(self) -> None:
        with self._changed:
            self._is_broken = True
            self._changed.notify_all()

    def _move(self, what: str, begin: Callable[[], distributed.Work], memory: Tensor, timeout_s: float) -> None:
        what = f"gloo could not {what} {memory.numel()} bytes"
        outcome: list[BaseException | None] = []

        def wait() -> None:
            error: BaseException | None = None
            try:
                begin().wait(timedelta(seconds=timeout_s))
            except BaseException as failure:  # raised where it is waited for
                error = failure
            with self._changed:
                outcome.append(error)
                self._changed.notify_all()

        threading.Thread(target=wait, name="gloo transfer", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: outcome or self._is_broken, timeout_s + _GRACE_S)
            if not outcome:
                self._changed.wait_for(lambda: outcome, _GRACE_S)
        if not outcome:
            raise TransportError(f"{what}: the connection is gone")
        with torch_errors(what):
            if outcome[0] is not None:
                raise outcome[0]
