"""How the two ends agree on the next epoch; the keys are described in the package's docstring."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from paceline.errors import DamagedError, TransportError
from paceline.schema.protocol import StoreCall
from paceline.transport.p2p.store import AskStore, SessionStore

PROPOSAL, JOINED = "proposal", "joined"
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.001, 0.05


@dataclass(frozen=True, slots=True)
class Proposal:
    """An epoch, and the attempt to begin it."""

    epoch: int
    nonce: str

    def text(self) -> bytes:
        """As a value of the store."""
        return f"{self.epoch}:{self.nonce}".encode()

    @classmethod
    def read(cls, text: bytes) -> Proposal:
        """From a value of the store.

        Raises:
            DamagedError: it is none.
        """
        epoch, _, nonce = text.decode(errors="replace").partition(":")
        if not epoch.isascii() or not epoch.isdigit() or not nonce:
            raise DamagedError(f"no epoch and nonce: {text[:40]!r}")
        return cls(int(epoch), nonce)


def propose(ask: AskStore, at_least: int, timeout_s: float, is_over: Callable[[], bool]) -> Proposal:
    """The client's half: the epoch that the server joins.

    Raises:
        TransportError: it did not answer within `timeout_s`.
    """
    proposal = Proposal(at_least, secrets.token_hex(16))
    ask(StoreCall(op="set", keys=(PROPOSAL,), values=(proposal.text(),)))
    deadline = time.monotonic() + timeout_s
    look_s = _FIRST_LOOK_S
    while True:
        (value,) = ask(StoreCall(op="get", keys=(JOINED,))).values
        if value is not None and (joined := Proposal.read(value)).nonce == proposal.nonce:
            return joined
        if is_over():
            raise TransportError("the channel was closed while it was being opened")
        if time.monotonic() > deadline:
            raise TransportError(f"the server did not join epoch {at_least} of the channel within {timeout_s:g} s")
        time.sleep(look_s)
        look_s = min(2 * look_s, _LONGEST_LOOK_S)


def proposed(store: SessionStore) -> Proposal | None:
    """What the client proposed last, None if nothing that can be read."""
    value = store.get(PROPOSAL)
    try:
        return None if value is None else Proposal.read(value)
    except DamagedError:
        return None


def join(store: SessionStore, epoch: int, proposal: Proposal) -> None:
    """The server's half: the client may connect to `epoch`."""
    store.forget_all_but((PROPOSAL,))
    store.set(JOINED, Proposal(epoch, proposal.nonce).text())
