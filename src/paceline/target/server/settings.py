"""What a target server is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from paceline.target.groups import KeptBounds


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Address, secrets and bounds of one server."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: chosen by the system."""
    token: str | None = None
    """What clients have to know; None only on a loopback address."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    advertise: str | None = None
    """The name or address that clients reach this server by, where it is not `host`."""
    max_row_tokens: int = 131_072
    """Longer rows are refused; with the number of position axes it bounds the body of a row request."""
    max_sessions: int = 64
    max_queued_rows: int = 64
    """Rows of one session that wait as tokens; more are refused with 429."""
    max_unsent_rows: int = 4
    """Rows of one session in the engine or on their way out. Two are in the engine and one is being sent, so that the
    engine works while a row travels; a client that stops reading holds no more features than these."""
    max_unsent_tokens: int = 0
    """Up to so many tokens there may be more of these rows, as many as `max_queued_rows`: for an engine that computes
    documents of many rows at once. A client that stops reading holds the features of as many."""
    max_unsent_bytes: int = 8 << 30
    """The same in bytes of features; a larger row is computed alone. A p2p channel has room for as much again."""
    kept: KeptBounds = field(default_factory=KeptBounds)
    """Rows that a part was asked for of, for the rest of the group to come."""
    max_lease_s: float = 600.0
    """Longer leases are cut to this: a client that died holds a session for so long."""
    body_timeout_s: float = 60.0
    """A request's body has to come within this time: it is a few megabytes at most."""
    stall_timeout_s: float = 60.0
    """A client that takes nothing of a reply for so long is cut off."""
    max_connections: int = 2048
    """Open at one time; further ones are told to come later."""

    @property
    def most_unsent_rows(self) -> int:
        """Of one session, however few tokens they have."""
        return max(self.max_unsent_rows, self.max_queued_rows if self.max_unsent_tokens else 0)
