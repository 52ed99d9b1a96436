"""POST /v1/sessions/{session}/rows: the tokens of a row in, its features out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from paceline.errors import StoppedError
from paceline.schema.parts import WHOLE, part_range
from paceline.schema.protocol import CHECKSUM_HEADER, MAX_HEADER_BYTES, SESSION_KEY_HEADER
from paceline.schema.rows import RowRequest
from paceline.schema.wire import LENGTH_BYTES, decode_request
from paceline.target.server.answers import refusal_of
from paceline.target.server.bodies import (
    ClientGoneError,
    finish_body,
    read_body,
    send_body,
    send_head,
    until_gone,
)
from paceline.target.server.metrics import ServerMetrics
from paceline.target.server.session import RowWork, Session
from paceline.target.server.sessions import Sessions
from paceline.target.server.settings import ServerSettings
from paceline.transport.base import Reply

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 30.0


class RowRoute:
    """The ASGI application of row requests."""

    def __init__(
        self,
        sessions: Sessions,
        settings: ServerSettings,
        num_position_axes: int,
        metrics: ServerMetrics,
        check_serving: Callable[[], None],
    ) -> None:
        """`check_serving` raises when the server takes no more rows."""
        self._sessions = sessions
        self._settings = settings
        self._max_bytes = max_row_bytes(settings.max_row_tokens, num_position_axes)
        self._metrics = metrics
        self._check_serving = check_serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_serving()
        key = Headers(scope=scope).get(SESSION_KEY_HEADER)
        session = self._sessions.use(scope["path_params"]["session"], key)
        scope["state"]["label"] = session.label
        timeout_s = self._settings.body_timeout_s
        body = await read_body(scope, receive, self._max_bytes, timeout_s, checksum_required=True)
        request = decode_request(memoryview(body), self._settings.max_row_tokens)
        gone = asyncio.create_task(until_gone(receive))
        try:
            await self._answer(scope, send, session, request, gone)
        except ClientGoneError:
            self._metrics.row_lost("left")
            raise
        finally:
            gone.cancel()

    async def _answer(
        self, scope: Scope, send: Send, session: Session, request: RowRequest, gone: asyncio.Task[None]
    ) -> None:
        try:
            work = session.submit(request)
            reply = await _reply_of(session, work, gone)
        except (ClientGoneError, asyncio.CancelledError):
            raise
        except BaseException as error:  # handed to the client, who waits for the row
            if isinstance(error, StoppedError):
                self._check_serving()
            refusal = refusal_of(error, request.position)
            self._metrics.row_lost(refusal.kind)
            raise refusal from error
        sent = False
        try:
            num_bytes = await self._send(scope, send, reply, gone)
            sent = True
        finally:
            work.finish(reply, sent)
        start, end = part_range(len(request.tokens), request.part)
        send_s = time.monotonic() - work.computed_at
        self._metrics.row_sent(end - start, num_bytes, send_s, is_part=request.part != WHOLE)

    async def _send(self, scope: Scope, send: Send, reply: Reply, gone: asyncio.Task[None]) -> int:
        """Bytes of the body, once it has left."""
        num_bytes = sum(memoryview(part).nbytes for part in reply.body)
        headers = {
            "content-type": reply.content_type,
            "content-length": str(num_bytes),
            CHECKSUM_HEADER: reply.checksum,
        }
        await send_head(send, 200, headers)
        await send_body(scope, send, reply.body, self._settings.stall_timeout_s)
        await finish_body(send, gone)
        return num_bytes


def max_row_bytes(max_row_tokens: int, num_position_axes: int) -> int:
    """The longest body of a row request: a header, and int32 tokens, positions, document bounds and spans."""
    numbers = max_row_tokens * (1 + num_position_axes) + (max_row_tokens + 1) + 2 * max_row_tokens
    return LENGTH_BYTES + MAX_HEADER_BYTES + 4 * numbers


async def _reply_of(session: Session, work: RowWork, gone: asyncio.Task[None]) -> Reply:
    """The row's reply, when the engine and the sender are done with it.

    Raises:
        ClientGoneError: nobody waits for it any more.
        Exception: whatever the row failed with.
    """
    loop = asyncio.get_running_loop()
    answered = asyncio.Event()

    def tell(_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and this coroutine with it
            loop.call_soon_threadsafe(answered.set)

    work.reply.add_done_callback(tell)
    waiting = asyncio.create_task(answered.wait())
    since = time.monotonic()
    try:
        while not work.reply.done():
            await asyncio.wait({waiting, gone}, timeout=_LOG_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and not work.reply.done():
                raise ClientGoneError
            if not work.reply.done():
                logger.info(
                    "row %d of %r has waited %.0f s; %d rows of the session are behind the engine's",
                    work.request.position,
                    session.label,
                    time.monotonic() - since,
                    session.num_waiting(),
                )
    except BaseException:  # the client left, or the server ends: the row is let go of
        session.abandon(work)
        raise
    finally:
        waiting.cancel()
    return work.reply.result()
