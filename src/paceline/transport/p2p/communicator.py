"""What a communicator of two does, and what its kinds have in common: torch's errors, waits, variables."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal, Protocol

from torch import Tensor, distributed

from paceline.errors import TransportError

P2PName = Literal["nccl", "gloo"]
SERVER, CLIENT = 0, 1
INTERFACE, BLOCKING_WAIT = "GLOO_SOCKET_IFNAME", "TORCH_NCCL_BLOCKING_WAIT"
_AS_IF_UNSET = {INTERFACE: "", BLOCKING_WAIT: "0"}
_ENVIRONMENT = threading.Lock()
"""The variables of a process are one for all its threads."""
_SHORTEST_LOOK_S, _LONGEST_LOOK_S = 0.0001, 0.002


class Group(Protocol):
    """What is used of torch's process groups; their type stubs leave it out."""

    def send(self, tensors: list[Tensor], dst_rank: int, tag: int) -> distributed.Work: ...
    def recv(self, tensors: list[Tensor], src_rank: int, tag: int) -> distributed.Work: ...
    def abort(self) -> None: ...


class Communicator(Protocol):
    """Moves buffers of bytes, one at a time and in order, to or from one peer."""

    def send(self, memory: Tensor, timeout_s: float) -> None:
        """Return when the peer has `memory` (uint8) or the network has; it may be used again.

        Raises:
            TransportError: not within `timeout_s`, or the peer is gone; the communicator is of no further use.
        """

    def receive(self, memory: Tensor, timeout_s: float) -> None:
        """Return when `memory` (uint8) is filled. Raises as `send` does; nothing writes to it afterwards."""

    def abort(self) -> None:
        """Make all calls fail, those under way as well; any thread, safe to call twice. Takes milliseconds."""


def look_until(is_done: Callable[[], bool], deadline: float) -> bool:
    """Whether it was done before the deadline."""
    look_s = _SHORTEST_LOOK_S
    while not is_done():
        if time.monotonic() > deadline:
            return False
        time.sleep(look_s)
        look_s = min(2 * look_s, _LONGEST_LOOK_S)
    return True


@contextlib.contextmanager
def torch_errors(what: str) -> Iterator[None]:
    """TransportError in the place of torch's errors."""
    try:
        yield
    except TransportError as error:
        raise TransportError(f"{what}: {error}") from error
    except (RuntimeError, ValueError) as error:  # torch.distributed's own are RuntimeErrors
        raise TransportError(f"{what}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error


def is_interface_given() -> bool:
    """Whether who started the process has told gloo an interface."""
    with _ENVIRONMENT:
        return bool(os.environ.get(INTERFACE))


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[Callable[[], None]]:
    """Variables that torch reads only from the environment, until the function that is yielded is called, or the end.

    Afterwards they are what they were or, in the place of none, what means the same: other threads may be reading the
    environment, and replacing a value is the one change that does not move the others.
    """
    _ENVIRONMENT.acquire()
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    pending = [True]

    def restore() -> None:
        if pending:
            pending.clear()
            os.environ.update({name: value or _AS_IF_UNSET[name] for name, value in before.items()})
            _ENVIRONMENT.release()

    try:
        yield restore
    finally:
        restore()
