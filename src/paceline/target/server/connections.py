"""One HTTP connection, bounded in time before a request is there, and with errors of our own form."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from paceline.schema.protocol import CHECKSUM_HEADER, ErrorReply
from paceline.schema.wire import checksum
from paceline.transport.base import JSON

KEEP_ALIVE_S = 75.0
"""An idle connection is kept so long for its client's next request."""
_HEAD_TIMEOUT_S = 15.0
"""From a connection's beginning to the end of its first request's head."""


class BoundedConnection(H11Protocol):
    """uvicorn's connection. It ends clients that never finish a request's head, and can be found by its requests.

    h11's parser, since it alone bounds the head of a request (64 KiB).
    """

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], _loop: Any = None) -> None:
        super().__init__(config, server_state, {**app_state, "connection": self}, _loop)
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does it only for sockets that say their protocol; without it each reply waits 40 ms for an ACK
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._expect_request(_HEAD_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._patience is not None:
            self._patience.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._expect_request(KEEP_ALIVE_S + _HEAD_TIMEOUT_S)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        body = ErrorReply(error="damaged", message=f"no HTTP request: {msg}").model_dump_json().encode()
        headers = [
            ("content-type", JSON),
            ("content-length", str(len(body))),
            (CHECKSUM_HEADER, checksum(body)),
            ("connection", "close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect_request(self, timeout_s: float) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._patience = self.loop.call_later(timeout_s, self._lose_patience)

    def _lose_patience(self) -> None:
        """A request that is being answered has time-outs of its own."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
