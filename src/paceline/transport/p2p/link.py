"""How the two ends of a session's channel connect, again for each epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
from torch import distributed

from paceline.errors import TransportError
from paceline.transport.p2p.communicator import (
    BLOCKING_WAIT,
    INTERFACE,
    SERVER,
    Communicator,
    Group,
    P2PName,
    environment,
    torch_errors,
)
from paceline.transport.p2p.gloo import GlooCommunicator
from paceline.transport.p2p.nccl import NCCLCommunicator
from paceline.transport.p2p.store import AskStore, StoreView


@dataclass(frozen=True, slots=True)
class Link:
    """What the communicators of one session's channel, one after the other, have in common."""

    kind: P2PName
    rank: int
    """SERVER or CLIENT."""
    ask: AskStore
    timeout_s: float
    """transport.stall_timeout_s."""
    interface: str | None
    """gloo: which to listen on; None leaves it to the environment."""
    stream: torch.cuda.Stream | None
    """nccl: the stream that rows are packed and received on."""

    def connect(self, epoch: int, nonce: str, is_over: Callable[[], bool]) -> Communicator:
        """An open communicator: 256 bytes made of `nonce` have gone from the server to the client.

        Args:
            is_over: True gives up early.

        Raises:
            TransportError: the peer did not come, or another one did.
        """
        communicator = self._gloo(epoch, is_over) if self.kind == "gloo" else self._nccl(epoch, is_over)
        try:
            self._greet(communicator, nonce)
        except BaseException:
            communicator.abort()
            raise
        return communicator

    def _gloo(self, epoch: int, is_over: Callable[[], bool]) -> GlooCommunicator:
        variables = {} if self.interface is None else {INTERFACE: self.interface}
        with environment(variables) as restore, torch_errors(f"gloo could not connect (epoch {epoch})"):
            # the interface is chosen before the store is used, and then the peer is waited for
            store = StoreView(self.ask, f"{epoch}/", self.timeout_s, is_over, restore)
            group = distributed.ProcessGroupGloo(store, self.rank, 2, timedelta(seconds=self.timeout_s))
        return GlooCommunicator(cast("Group", group), 1 - self.rank)

    def _nccl(self, epoch: int, is_over: Callable[[], bool]) -> NCCLCommunicator:
        assert self.stream is not None
        store = StoreView(self.ask, f"{epoch}/", self.timeout_s, is_over, lambda: None)
        # Without it a watchdog ends the process when an operation fails or takes long; here that is an epoch's end.
        # Nothing in this file waits by `Work.wait`, which would then block.
        with environment({BLOCKING_WAIT: "1"}), torch_errors(f"no NCCL communicator (epoch {epoch})"):
            # before the kernels of a forward or backward that wait for a place on the GPU
            options = distributed.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            group = distributed.ProcessGroupNCCL(store, self.rank, 2, options)
        return NCCLCommunicator(cast("Group", group), store, 1 - self.rank, self.stream)

    def _greet(self, communicator: Communicator, nonce: str) -> None:
        device = None if self.stream is None else self.stream.device
        greeting = torch.frombuffer(bytearray(hashlib.sha256(nonce.encode()).digest() * 8), dtype=torch.uint8)
        with torch.cuda.stream(self.stream):  # None changes nothing
            memory = greeting.to(device) if self.rank == SERVER else torch.zeros_like(greeting, device=device)
        if self.rank == SERVER:
            communicator.send(memory, self.timeout_s)
            return
        communicator.receive(memory, self.timeout_s)
        with torch.cuda.stream(self.stream):
            is_right = torch.equal(memory.cpu(), greeting)
        if not is_right:
            raise TransportError(f"the first bytes over {self.kind} are not those of this session's server")
