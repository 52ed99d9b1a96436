"""A session on a server in another process."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from paceline.client.calls import RowReply, ServerCalls
from paceline.client.checks import check_header, check_target
from paceline.client.http_connections import ConnectionBrokenError
from paceline.client.opening import OpenSession, SessionOpener
from paceline.config.placement import PoolConfig, TransportConfig
from paceline.errors import (
    DamagedError,
    PacelineError,
    ServerBusyError,
    ServerFailedError,
    ServerLostError,
    SessionLostError,
    StoppedError,
    TransportError,
    WireError,
)
from paceline.schema.features import FeatureSpec
from paceline.schema.layout import layout_bytes, reply_layout
from paceline.schema.limits import Limits
from paceline.schema.protocol import (
    ServerInfo,
    TransportName,
)
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo
from paceline.schema.wire import encode_request
from paceline.transport.base import Delivery, Incoming
from paceline.transport.buffers import HostBuffers

_SPARE_THREADS = 2
"""Beyond the prefetched rows: one for a hedged row, one for evaluation's own."""
_REFUSALS = (ServerBusyError, ServerFailedError, SessionLostError)
"""Answers of a server that will send nothing for a row."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    request: RowRequest
    answer: Future[Delivery]


class RemoteConnection:
    """One server, reached by HTTP, and a session on it (client.connection.Connection).

    consumes: rows of any thread      waits for: replies, each on a thread of its own
    unblocked by: a reply, a broken connection, abort(), close()

    A keeper thread renews the lease and looks at /healthz: a server that does not answer it is given up, with every
    row it has. A session that the server forgot is opened again by whoever notices, and the row is asked for there.
    """

    def __init__(
        self,
        url: str,
        transport: TransportConfig,
        pool: PoolConfig,
        device: torch.device,
        *,
        token: str | None = None,
        tls_ca: str | None = None,
        label: str = "",
        buffers: HostBuffers | None = None,
    ) -> None:
        """Connect to nothing yet.

        Args:
            url: http://HOST:PORT or https://HOST:PORT.
            device: the trainer's; deliveries are there.
            token: the servers'.
            tls_ca: a file of certificates to trust; None takes the system's.
            label: who asks, for the server's log: run and rank.
            buffers: host memory for rows, to be shared by all connections of a trainer; None makes some for this one.
        """
        self._calls = ServerCalls(url, transport, pool, token=token, tls_ca=tls_ca)
        self._transport = transport
        self._pool = pool
        buffers = buffers or HostBuffers(transport.prefetch_bytes, pinned=device.type == "cuda")
        self._opener = SessionOpener(self._calls, transport, pool, device, label, buffers)
        self._specs: dict[str, FeatureSpec] = {}
        self._group: str | None = None
        self._server_info: ServerInfo | None = None
        self._opening = threading.Lock()
        """Held while a session is opened."""
        self._changed = threading.Condition()
        """Guards what `abort` and `close` touch: everything below."""
        self._session: OpenSession | None = None
        self._waiting: deque[_Asked] = deque()
        self._outstanding: dict[Future[Delivery], int] = {}
        """Answers not yet given -> position."""
        self._num_threads = 0
        self._num_free_threads = 0
        self._ended: PacelineError | None = None
        self._closed = False

    @property
    def name(self) -> str:
        return self._calls.url

    @property
    def server_id(self) -> str:
        """Drawn when the server started: another one says that it was started anew."""
        return self.server_info().server_id

    @property
    def transport(self) -> TransportName | None:
        """What rows travel by; None before a session is open."""
        session = self._session
        return session.reply.transport if session is not None else None

    def info(self) -> TargetInfo:
        return self.server_info().target

    def limits(self) -> Limits:
        served = self.server_info()
        return Limits(served.capture_layers, served.max_document_tokens, served.max_row_tokens)

    def server_info(self) -> ServerInfo:
        """What the server says about itself; asked for once.

        Raises:
            ServerLostError: it cannot be reached.
            HandshakeError: it speaks another version of the protocol.
            AuthorizationError: it refuses our token.
        """
        if self._server_info is None:
            self._server_info = self._calls.info()
        return self._server_info

    def open_session(self, specs: Mapping[str, FeatureSpec], group: str | None = None) -> None:
        assert not self._specs, "a session is opened once"
        self.server_info()
        self._specs, self._group = dict(specs), group
        self._open(None)
        threading.Thread(target=self._keep, name=f"keeper of {self.name}", daemon=True).start()

    def request(self, request: RowRequest) -> Future[Delivery]:
        answer: Future[Delivery] = Future()
        answer.set_running_or_notify_cancel()
        with self._changed:
            if self._ended is not None:
                raise type(self._ended)(f"{self._ended}: row {request.position} is not asked for")
            assert self._session is not None, "open_session comes first"
            self._outstanding[answer] = request.position
            self._waiting.append(_Asked(request, answer))
            start = self._num_free_threads < len(self._waiting) and self._num_threads < self._max_threads
            if start:
                self._num_threads += 1
                number = self._num_threads
            self._changed.notify_all()  # the keeper waits here as well: a single wake-up might be its
        if start:
            threading.Thread(target=self._ask_rows, name=f"row {number} of {self.name}", daemon=True).start()
        return answer

    def abort(self) -> None:
        self._give_up(f"{self.name} was given up")

    def close(self) -> None:
        with self._changed:
            closed, self._closed = self._closed, True
            goodbye = self._session if self._ended is None else None
        if closed:
            return
        self._end(StoppedError(f"the connection to {self.name} was closed"))
        self._calls.break_off()
        if goodbye is not None:
            try:
                self._calls.end(goodbye.reply)
            except PacelineError as error:
                _logger.info("%s was not told that the session is over, its lease will end it: %s", self.name, error)
        self._calls.close()
        session = self._session
        if session is not None:
            session.receiver.close()

    @property
    def _max_threads(self) -> int:
        return self._transport.prefetch_rows + _SPARE_THREADS

    def _give_up(self, reason: str) -> None:
        """Whoever waits for a row gets ServerLostError now, and so does whoever asks for one."""
        self._end(ServerLostError(reason))
        self._calls.close()

    def _end(self, reason: PacelineError) -> None:
        with self._changed:
            if self._ended is None or self._closed:
                self._ended = reason
            outstanding, self._outstanding = self._outstanding, {}
            self._waiting.clear()
            self._changed.notify_all()
        for answer, position in outstanding.items():
            answer.set_exception(type(reason)(f"{reason} before row {position} came"))

    def _ask_rows(self) -> None:
        """A thread's life: one row after the other."""
        while (asked := self._next_row()) is not None:
            delivery, failure = None, None
            try:
                delivery = self._ask(asked.request)
            except BaseException as error:  # handed to whoever waits for the row
                # what its frames refer to, a row's buffer among it, goes back now and not when the error is forgotten
                traceback.clear_frames(error.__traceback__)
                failure = error
            with self._changed:
                wanted = self._outstanding.pop(asked.answer, None) is not None
            if not wanted:
                if delivery is not None:
                    delivery.release()
            elif failure is not None:
                asked.answer.set_exception(failure)
            else:
                assert delivery is not None
                asked.answer.set_result(delivery)
            del asked, delivery, failure

    def _next_row(self) -> _Asked | None:
        with self._changed:
            self._num_free_threads += 1
            try:
                while not self._waiting and self._ended is None:
                    self._changed.wait()
                return self._waiting.popleft() if self._waiting else None
            finally:
                self._num_free_threads -= 1

    def _ask(self, request: RowRequest) -> Delivery:
        session = self._session
        assert session is not None
        try:
            return self._ask_in(session, request)
        except SessionLostError as error:
            _logger.warning("%s; another is opened", error)
            return self._ask_in(self._open(session), request)
        except WireError as error:
            # the head of a request has no checksum: only what is refused twice was not damaged on its way
            _logger.warning("row %d is asked for once more: %s", request.position, error)
            return self._ask_in(session, request)
        except ConnectionBrokenError as error:
            self._check_alive(error)
            raise TransportError(f"{error}; the server lives") from error

    def _ask_in(self, session: OpenSession, request: RowRequest) -> Delivery:
        layout = reply_layout(request, self._specs[request.spec], self.info(), request.part)
        buffer = session.receiver.reserve(layout_bytes(layout))
        answered = False
        try:
            with self._calls.row(session.reply, encode_request(request)) as reply:
                answered = True
                self._check_header(session, request, reply)
                return session.receiver.receive(Incoming(reply.header, layout, buffer, reply.body))
        except BaseException as error:
            buffer.give_back()
            if not answered and not isinstance(error, _REFUSALS):
                session.receiver.lost(request.position)
            raise

    def _check_header(self, session: OpenSession, request: RowRequest, reply: RowReply) -> None:
        """Return if the header announces this row, in the layout that was asked for.

        Raises:
            DamagedError: damaged, or another row's reply.
            CaptureMismatchError: undamaged, this row's and not what was asked for.
        """
        header, row_hash = reply.header, request.row_hash()
        ours = (header.position, header.row_hash) == (request.position, row_hash)
        try:
            check_header(self.name, request, self._specs[request.spec], self.info(), header)
            fits = None
        except PacelineError as error:
            fits = error
        if ours and fits is None:
            return
        if reply.body is not None:
            reply.body.discard()  # a damaged header may say anything
        session.receiver.drop(header)
        if not ours:
            raise DamagedError(
                f"{self.name} answered row {request.position} (hash {row_hash}) with row {header.position} "
                f"(hash {header.row_hash})"
            )
        assert fits is not None
        raise fits

    def _check_alive(self, broken: ConnectionBrokenError) -> None:
        """Return if the same server still answers: then a connection was lost, and no server.

        Raises:
            ServerLostError: it does not, or another one answers in its place.
        """
        with self._changed:
            if self._ended is not None:
                raise broken
        try:
            served_by = self._calls.info().server_id
        except PacelineError as error:
            raise ServerLostError(f"{broken}; and then: {error}") from broken
        if served_by != self.server_id:
            raise ServerLostError(f"{broken}; the server was started anew") from broken

    def _open(self, lost: OpenSession | None) -> OpenSession:
        """The session, opened if it is still the `lost` one.

        Raises:
            HandshakeError: another target is served there now, or no transport works.
            PacelineError: what the server says instead.
        """
        with self._opening:
            session = self._session
            if session is not lost:
                assert session is not None
                return session
            if lost is not None:
                self._check_same_target()
            opened = self._opener.open(self.server_info(), self._specs, self._group)
            with self._changed:
                ended, self._session = self._ended, opened
            if ended is not None:
                opened.receiver.close()
                raise type(ended)(str(ended))
        if lost is not None:
            lost.receiver.close()
        return opened

    def _check_same_target(self) -> None:
        """A server that was started anew is as good as the old one if it serves the same target."""
        info = self._calls.info()
        check_target(self.name, info.target, self.info())
        self._server_info = info

    def _keep(self) -> None:
        """The keeper's life. Without a keeper there is no connection: whatever ends it fails the rows."""
        try:
            self._look_and_renew()
        except BaseException as error:
            _logger.critical("the keeper of %s ended: %r", self.name, error)
            self._give_up(f"the keeper of {self.name} ended: {error!r}")
            raise

    def _look_and_renew(self) -> None:
        """Look at the server's health and renew the lease, until the connection ends."""
        health_s = self._pool.health_every_s
        next_renewal, next_look = time.monotonic() + self._renew_every_s, time.monotonic() + health_s
        while not self._ends_within(min(next_renewal, next_look) - time.monotonic()):
            if time.monotonic() >= next_look:
                self._look()
                next_look = time.monotonic() + health_s
            if time.monotonic() >= next_renewal:
                self._try("renewing the session", self._renew)
                next_renewal = time.monotonic() + self._renew_every_s

    @property
    def _renew_every_s(self) -> float:
        """A third of the lease; a server may give a shorter one than was asked for."""
        session = self._session
        assert session is not None
        return session.reply.lease_s / 3

    def _ends_within(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._ended is not None, max(0.0, seconds))

    def _look(self) -> None:
        try:
            self._calls.check_health()
        except DamagedError:
            return  # it answers
        except ConnectionBrokenError:
            self._try("looking at the server's health", self._calls.check_health)
        except TransportError as error:
            self._give_up(f"{self.name} does not answer /healthz: {error}")

    def _renew(self) -> None:
        session = self._session
        assert session is not None
        try:
            self._calls.renew(session.reply)
        except SessionLostError as error:
            _logger.warning("%s; another is opened", error)
            self._open(session)

    def _try(self, what: str, call: Callable[[], None]) -> None:
        """Do something that is tried again soon; what no trying again can help gives the server up."""
        try:
            call()
        except DamagedError as error:
            _logger.warning("%s: %s: %s", self.name, what, error)
        except PacelineError as error:
            if isinstance(error, ServerLostError) or not error.retryable:
                self._give_up(f"{self.name}: {what}: {error}")
            else:
                _logger.warning("%s: %s: %s", self.name, what, error)
