"""One server, as its clients see it; and the one in this process."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from typing import Generic, Protocol, TypeVar, runtime_checkable

from paceline.errors import ServerLostError, StoppedError
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.limits import Limits
from paceline.schema.parts import requested_part
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo
from paceline.transport.base import Delivery, Receiver, Sender

ParcelT = TypeVar("ParcelT")


class Connection(Protocol):
    """A session on one server."""

    @property
    def name(self) -> str:
        """The server, as messages call it."""

    def info(self) -> TargetInfo:
        """The server's facts about its target."""

    def limits(self) -> Limits:
        """What the server takes."""

    def open_session(self, specs: Mapping[str, FeatureSpec], group: str | None = None) -> None:
        """Register what rows may ask for; once, before the first request.

        Args:
            group: the secret of the sequence-parallel group whose ranks ask for parts of the same rows, so that a
                server computes each once; None where rows are asked for whole.

        Raises:
            ConfigError: a spec that the target cannot serve.
            ServerBusyError: no further session is taken now.
        """

    def request(self, request: RowRequest) -> Future[Delivery]:
        """Ask for one row; answers come in any order, on any thread.

        The future fails with TransportError for a row that is worth asking for again (ServerBusyError: later;
        ServerLostError: the server is gone with every row it had).
        """

    def abort(self) -> None:
        """Fail every row not yet answered with ServerLostError, now; nothing but `close` may follow. Safe twice."""

    def close(self) -> None:
        """Release the session; rows not yet answered fail with StoppedError. Safe to call twice."""


@runtime_checkable
class HoldsSomeRows(Protocol):
    """What a connection has besides, that can answer some rows only; one without it can answer any row."""

    def holds(self, request: RowRequest) -> bool:
        """Whether the row may be asked for here; then it is, rather than elsewhere. Called with a lock held: quick."""


class RowServer(Protocol):
    """A server in this process: admission of rows to an engine."""

    def info(self) -> TargetInfo: ...
    def limits(self) -> Limits: ...
    def open_session(self, specs: Mapping[str, FeatureSpec]) -> str: ...
    def submit(self, session: str, request: RowRequest) -> Future[Features]: ...
    def close_session(self, session: str) -> None: ...


class LocalConnection(Generic[ParcelT]):
    """A session on a server in this process; both ends of its channel are here.

    The sender runs on the thread that resolves the server's future, and the receiver right after it. Of a group there
    is only one rank in a process, so each part is cut out of a row that was computed for it alone.
    """

    def __init__(
        self, server: RowServer, sender: Sender[ParcelT], receiver: Receiver[ParcelT], name: str = "the target"
    ) -> None:
        self._name = name
        self._server = server
        self._sender = sender
        self._receiver = receiver
        self._session: str | None = None
        self._specs: dict[str, FeatureSpec] = {}
        self._lock = threading.Lock()
        """Guards what `abort` touches: `_outstanding`, `_aborted`."""
        self._outstanding: dict[Future[Delivery], int] = {}
        """Answers not yet given -> position."""
        self._aborted = False
        self._closed = False

    @property
    def name(self) -> str:
        return self._name

    def info(self) -> TargetInfo:
        return self._server.info()

    def limits(self) -> Limits:
        return self._server.limits()

    def open_session(self, specs: Mapping[str, FeatureSpec], group: str | None = None) -> None:
        del group
        assert self._session is None, "a session is opened once"
        self._session = self._server.open_session(specs)
        self._specs = dict(specs)

    def request(self, request: RowRequest) -> Future[Delivery]:
        if self._closed:
            raise StoppedError(f"the session is closed: row {request.position} is not asked for")
        assert self._session is not None, "open_session comes first"
        answer: Future[Delivery] = Future()
        answer.set_running_or_notify_cancel()
        with self._lock:
            if self._aborted:
                raise ServerLostError(f"{self._name} was given up: row {request.position} is not asked for")
            self._outstanding[answer] = request.position
        try:
            captured = self._server.submit(self._session, request)
        except BaseException:
            self._take_back(answer)
            raise
        captured.add_done_callback(partial(self._deliver, answer, request))
        return answer

    def _deliver(self, answer: Future[Delivery], request: RowRequest, captured: Future[Features]) -> None:
        error = captured.exception()
        delivery: Delivery | None = None
        if error is None:
            try:
                features = requested_part(request, self._specs[request.spec], captured.result())
                delivery = self._receiver.receive(self._sender.send(request.position, features))
            except BaseException as failure:
                # an error in a callback is lost; it belongs to whoever waits for the row
                error = failure
        if not self._take_back(answer):
            if delivery is not None:
                delivery.release()
        elif delivery is not None:
            answer.set_result(delivery)
        else:
            answer.set_exception(error)

    def _take_back(self, answer: Future[Delivery]) -> bool:
        """Whether the caller is the one to answer: whoever takes it back first is."""
        with self._lock:
            return self._outstanding.pop(answer, None) is not None

    def abort(self) -> None:
        with self._lock:
            self._aborted = True
            outstanding, self._outstanding = self._outstanding, {}
        for answer, position in outstanding.items():
            answer.set_exception(ServerLostError(f"{self._name} was given up before row {position} came"))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._session is not None:
            self._server.close_session(self._session)
        self._sender.close()
        self._receiver.close()
