"""Plain HTTP to a target server, as a client in any language would speak it; every reply's checksum is proved."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from paceline.schema.features import FeatureSpec
from paceline.schema.protocol import CHECKSUM_HEADER, PROTOCOL_VERSION, SESSION_KEY_HEADER, ErrorReply, SessionReply
from paceline.schema.rows import RowRequest
from paceline.schema.wire import checksum, encode_request

SPEC = FeatureSpec((1, 3), final_hidden="supervised", greedy=True)


@dataclass(frozen=True)
class Answer:
    """One reply."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> ErrorReply:
        assert self.status >= 400, self.body[:500]
        return ErrorReply.model_validate_json(self.body)


class Talk:
    """One kept connection to a server."""

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 30.0) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
        self.token = token

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Send one request; `_` in names of headers is "-"."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.token is not None:
            named.setdefault("authorization", f"Bearer {self.token}")
        self.connection.request(method, path, body, named)
        return self.answer()

    def answer(self) -> Answer:
        """The reply to what was sent."""
        reply = self.connection.getresponse()
        answer = Answer(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
        assert answer.headers[CHECKSUM_HEADER] == checksum(answer.body)
        return answer

    def open(self, **changes: Any) -> Answer:
        """Ask for a session over http; `changes` are fields of the SessionRequest."""
        asked = {
            "protocol": PROTOCOL_VERSION,
            "specs": {"training": {"layers": SPEC.layers, "final_hidden": SPEC.final_hidden, "greedy": True}},
            "client": {"host_id": "here", "device": "cpu"},
            "offers": [{"name": "http"}],
            "lease_s": 60,
            "label": "tests",
            **changes,
        }
        return self.ask("POST", "/v1/sessions", json.dumps(asked).encode())

    def session(self, **changes: Any) -> SessionReply:
        answer = self.open(**changes)
        assert answer.status == 200, answer.body
        return SessionReply.model_validate_json(answer.body)

    def row(self, session: SessionReply, request: RowRequest) -> Answer:
        """The features of one row."""
        self.send_row(session, request)
        return self.answer()

    def send_row(self, session: SessionReply, request: RowRequest) -> None:
        """Ask for a row and wait for nothing."""
        body = encode_request(request)
        path, headers = f"/v1/sessions/{session.session}/rows", row_headers(session, body)
        if self.token is not None:
            headers["authorization"] = f"Bearer {self.token}"
        self.connection.request("POST", path, body, headers)

    def of_session(self, method: str, session: SessionReply, what: str = "") -> Answer:
        return self.ask(method, f"/v1/sessions/{session.session}{what}", **{SESSION_KEY_HEADER: session.key})

    def close(self) -> None:
        self.connection.close()


def row_headers(session: SessionReply, body: bytes) -> dict[str, str]:
    return {SESSION_KEY_HEADER: session.key, CHECKSUM_HEADER: checksum(body)}
