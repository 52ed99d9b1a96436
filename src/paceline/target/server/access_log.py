"""The access log: one line a request, never a token or a key."""

from __future__ import annotations

import json
import logging

_logger = logging.getLogger("paceline.access")
_QUIET = ("GET /healthz", "GET /metrics")
"""Asked for every few seconds by every client: kept at DEBUG while they succeed."""


def log_request(
    client: str, label: str, route: str, status: int, received_bytes: int, sent_bytes: int, seconds: float
) -> None:
    """Log one request as key=value; times stand in front of every line.

    Args:
        client: the peer's address.
        label: of its session, as the client named it; "" where there is none.
        route: method and route as the server knows it, e.g. "POST /v1/sessions/{session}/rows".
        status: 499 for a client that left before it was answered.
    """
    quiet = route in _QUIET and status == 200
    _logger.log(
        logging.DEBUG if quiet else logging.INFO,
        "client=%s label=%s route=%s status=%d received=%d sent=%d seconds=%.4f",
        client,
        json.dumps(label),
        json.dumps(route),
        status,
        received_bytes,
        sent_bytes,
        seconds,
    )
