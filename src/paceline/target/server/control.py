"""The control calls: health, metrics, facts, tokenizer, sessions and their rendezvous."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from paceline.errors import WireError
from paceline.schema.protocol import (
    MAX_CONTROL_BYTES,
    PROTOCOL_VERSION,
    SESSION_KEY_HEADER,
    Message,
    ServerInfo,
    SessionRequest,
    StoreCall,
)
from paceline.target.server.answers import answer, bytes_answer, describe_invalid
from paceline.target.server.bodies import read_body
from paceline.target.server.health import Health
from paceline.target.server.metrics import ServerMetrics
from paceline.target.server.session import Session
from paceline.target.server.sessions import Sessions, protocol_refusal
from paceline.target.server.settings import ServerSettings
from paceline.transport.base import JSON

MessageT = TypeVar("MessageT", bound=BaseModel)
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


class _Versioned(BaseModel):
    """What every version's request has in common."""

    model_config = ConfigDict(extra="ignore")
    protocol: int


@dataclass(frozen=True, slots=True)
class ControlCalls:
    """Endpoints; each answers at once, whatever the engine does."""

    info: ServerInfo
    tokenizer: Callable[[], Mapping[str, str]]
    sessions: Sessions
    settings: ServerSettings
    health: Health
    metrics: ServerMetrics

    async def healthz(self, request: Request) -> Response:
        """GET /healthz: 200 while rows are taken, else 503; asks for no token."""
        del request
        status = self.health.status()
        facts = {
            "status": status,
            "server_id": self.info.server_id,
            "sessions": self.sessions.count(),
            "queued_rows": self.sessions.num_waiting(),
        }
        return bytes_answer(json.dumps(facts).encode(), JSON, 200 if status == "ok" else 503)

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics."""
        del request
        return bytes_answer(self.metrics.text(), _PROMETHEUS)

    async def show_info(self, request: Request) -> Response:
        """GET /v1/info."""
        del request
        return answer(self.info)

    async def show_tokenizer(self, request: Request) -> Response:
        """GET /v1/tokenizer: the tokenizer's files, data only."""
        del request
        files = await run_in_threadpool(self.tokenizer)
        return bytes_answer(json.dumps(dict(files)).encode(), JSON)

    async def open_session(self, request: Request) -> Response:
        """POST /v1/sessions."""
        self.health.check_serving()
        body = await self._body(request)
        theirs = _read(_Versioned, body).protocol
        if theirs != PROTOCOL_VERSION:  # before fields are looked at that another version may not know
            raise protocol_refusal(theirs)
        asked = _read(SessionRequest, body)
        request.scope["state"]["label"] = asked.label
        return answer(await run_in_threadpool(self.sessions.open, asked))

    async def renew(self, request: Request) -> Response:
        """POST /v1/sessions/{session}/renew."""
        self._use(request)
        return answer(Message())

    async def end(self, request: Request) -> Response:
        """DELETE /v1/sessions/{session}."""
        self._use(request)
        await run_in_threadpool(self.sessions.end, request.path_params["session"])
        return answer(Message())

    async def store(self, request: Request) -> Response:
        """POST /v1/sessions/{session}/store."""
        session = self._use(request)
        call = _read(StoreCall, await self._body(request))
        if session.opened.rendezvous is None:
            raise WireError("this session's transport has no rendezvous")
        return answer(session.opened.rendezvous.answer(call))

    def _use(self, request: Request) -> Session:
        session = self.sessions.use(request.path_params["session"], request.headers.get(SESSION_KEY_HEADER))
        request.scope["state"]["label"] = session.label
        return session

    async def _body(self, request: Request) -> bytearray:
        return await read_body(request.scope, request.receive, MAX_CONTROL_BYTES, self.settings.body_timeout_s)


def _read(message: type[MessageT], body: bytearray) -> MessageT:
    try:
        return message.model_validate_json(body)
    except ValidationError as error:
        raise WireError(f"no {message.__name__.strip('_')}: {describe_invalid(error)}") from error
