"""The server's ASGI application: routes, and every error in one form."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from paceline.errors import PacelineError
from paceline.schema.protocol import ErrorKind
from paceline.target.server.answers import Refusal, refusal_of, refuse
from paceline.target.server.control import ControlCalls
from paceline.target.server.gate import Gate
from paceline.target.server.rows import RowRoute
from paceline.target.server.sessions import Sessions
from paceline.target.server.weights import WeightRoute


def build_app(control: ControlCalls, rows: RowRoute, weights: WeightRoute) -> ASGIApp:
    """Everything that answers a request."""
    session = "/v1/sessions/{session}"
    routes = [
        Route("/healthz", control.healthz, methods=["GET"]),
        Route("/metrics", control.show_metrics, methods=["GET"]),
        Route("/v1/info", control.show_info, methods=["GET"]),
        Route("/v1/tokenizer", control.show_tokenizer, methods=["GET"]),
        Route("/v1/weights/{table}", weights, methods=["GET", "POST"]),
        Route("/v1/sessions", control.open_session, methods=["POST"]),
        Route(session, control.end, methods=["DELETE"]),
        Route(session + "/renew", control.renew, methods=["POST"]),
        Route(session + "/store", control.store, methods=["POST"]),
        Route(session + "/rows", rows, methods=["POST"]),
    ]
    errors = _Errors(control.sessions)
    handlers = {
        HTTPException: errors.of_http,
        Refusal: errors.of_ours,
        PacelineError: errors.of_ours,
        Exception: errors.of_ours,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Gate(app, routes, control.settings, control.metrics)


class _Errors:
    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def of_ours(self, request: Request, error: Exception) -> Response:
        del request
        refusal = refusal_of(error)
        if refusal.kind == "busy":
            refusal.headers.setdefault("retry-after", str(self._sessions.retry_after_s()))
        return refuse(refusal)

    async def of_http(self, request: Request, error: Exception) -> Response:
        """404, 405 and what else the framework refuses."""
        assert isinstance(error, HTTPException)
        kind: ErrorKind = "not_found" if error.status_code in (404, 405) else "wrong_request"
        message = f"{request.method} of this path: {error.detail}"
        return refuse(Refusal(kind, message, status=error.status_code, headers=error.headers))
