"""One server, as its clients see it; and the one in this process."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from typing import Generic, Protocol, TypeVar

from paceline.errors import StoppedError
from paceline.schema.features import Features, FeatureSpec
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

    def open_session(self, specs: Mapping[str, FeatureSpec]) -> None:
        """Register what rows may ask for; once, before the first request.

        Raises:
            ConfigError: a spec that the target cannot serve.
            ServerBusyError: no further session is taken now.
        """

    def request(self, request: RowRequest) -> Future[Delivery]:
        """Ask for one row; answers come in any order, on any thread.

        The future fails with TransportError for a row that is worth asking for again (ServerBusyError: later).
        """

    def close(self) -> None:
        """Release the session; rows not yet answered fail with StoppedError. Safe to call twice."""


class RowServer(Protocol):
    """A server in this process: admission of rows to an engine."""

    def info(self) -> TargetInfo: ...
    def open_session(self, specs: Mapping[str, FeatureSpec]) -> str: ...
    def submit(self, session: str, request: RowRequest) -> Future[Features]: ...
    def close_session(self, session: str) -> None: ...


class LocalConnection(Generic[ParcelT]):
    """A session on a server in this process; both ends of its channel are here.

    The sender runs on the thread that resolves the server's future, and the receiver right after it.
    """

    def __init__(
        self, server: RowServer, sender: Sender[ParcelT], receiver: Receiver[ParcelT], name: str = "the target"
    ) -> None:
        self._name = name
        self._server = server
        self._sender = sender
        self._receiver = receiver
        self._session: str | None = None
        self._closed = False

    @property
    def name(self) -> str:
        return self._name

    def info(self) -> TargetInfo:
        return self._server.info()

    def open_session(self, specs: Mapping[str, FeatureSpec]) -> None:
        assert self._session is None, "a session is opened once"
        self._session = self._server.open_session(specs)

    def request(self, request: RowRequest) -> Future[Delivery]:
        if self._closed:
            raise StoppedError(f"the session is closed: row {request.position} is not asked for")
        assert self._session is not None, "open_session comes first"
        answer: Future[Delivery] = Future()
        answer.set_running_or_notify_cancel()
        captured = self._server.submit(self._session, request)
        captured.add_done_callback(partial(self._deliver, answer, request.position))
        return answer

    def _deliver(self, answer: Future[Delivery], position: int, captured: Future[Features]) -> None:
        error = captured.exception()
        if error is not None:
            answer.set_exception(error)
            return
        try:
            delivery = self._receiver.receive(self._sender.send(position, captured.result()))
        except BaseException as failure:
            # an error in a callback is lost; it belongs to whoever waits for the row
            answer.set_exception(failure)
            return
        answer.set_result(delivery)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._session is not None:
            self._server.close_session(self._session)
        self._sender.close()
        self._receiver.close()
