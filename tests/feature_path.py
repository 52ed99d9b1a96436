"""The feature path around a small engine, as a run wires it, and a connection that misbehaves on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

import torch

from paceline.client.connection import Connection, LocalConnection
from paceline.client.pool import FeaturePool
from paceline.client.server_list import FixedServers
from paceline.config.placement import PoolConfig
from paceline.errors import ServerBusyError, TransportError
from paceline.schema.features import FeatureSpec
from paceline.schema.limits import Limits
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo
from paceline.target.admission import Admission
from paceline.transport.base import Delivery
from paceline.transport.local import LocalReceiver, LocalSender
from small_engine import SmallEngine

SPECS = {
    "training": FeatureSpec((1, 3)),
    "evaluation": FeatureSpec((1, 2, 3), final_hidden="supervised", greedy=True),
}


def local_connection(admission: Admission, name: str = "server-0") -> Connection:
    return LocalConnection(admission, LocalSender(), LocalReceiver(torch.device("cpu")), name)


def fixed(*connections: Connection) -> FixedServers:
    """Servers that are connected once, by `connections`."""
    return FixedServers({connection.name: partial(_same, connection) for connection in connections})


def _same(connection: Connection) -> Connection:
    return connection


@contextmanager
def open_pool(
    engines: SmallEngine | Sequence[SmallEngine],
    faults: Mapping[int, Sequence[str]] | None = None,
    **settings: float,
) -> Iterator[FeaturePool]:
    """A pool over one server an engine; `faults` are of the first, `settings` of the pool."""
    engines = [engines] if isinstance(engines, SmallEngine) else engines
    admissions = [Admission(engine) for engine in engines]
    connections = [local_connection(admission, f"server-{i}") for i, admission in enumerate(admissions)]
    connections[0] = FaultyConnection(connections[0], faults or {})
    pool = FeaturePool(fixed(*connections), SPECS, PoolConfig.model_validate(settings))
    try:
        yield pool
    finally:
        pool.close()
        for admission, engine in zip(admissions, engines, strict=True):
            admission.close()
            engine.close()


class ToldTwice(Future[Delivery]):
    """A future that tells every listener twice."""

    def add_done_callback(self, fn: Callable[[Future[Delivery]], object]) -> None:
        super().add_done_callback(fn)
        super().add_done_callback(fn)


class FaultyConnection:
    """A connection that loses, damages, refuses or repeats the replies it is told to, by position and attempt."""

    def __init__(self, connection: Connection, faults: Mapping[int, Sequence[str]]) -> None:
        self._connection = connection
        self._faults = {position: list(kinds) for position, kinds in faults.items()}
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self._connection.name

    def info(self) -> TargetInfo:
        return self._connection.info()

    def limits(self) -> Limits:
        return self._connection.limits()

    def open_session(self, specs: Mapping[str, FeatureSpec], group: str | None = None) -> None:
        self._connection.open_session(specs, group)

    def abort(self) -> None:
        self._connection.abort()

    def close(self) -> None:
        self._connection.close()

    def request(self, request: RowRequest) -> Future[Delivery]:
        with self._lock:
            kinds = self._faults.get(request.position)
            kind = kinds.pop(0) if kinds else "none"
        if kind == "busy":
            raise ServerBusyError("the queue is full")
        if kind == "unreachable":
            raise TransportError("connection refused")
        answer: Future[Delivery] = ToldTwice() if kind == "twice" else Future()

        def deliver(reply: Future[Delivery]) -> None:
            error = reply.exception()
            if error is not None:
                answer.set_exception(error)
            elif kind == "damaged":
                reply.result().release()
                answer.set_exception(TransportError("checksum 12ab, expected 34cd"))
            else:
                answer.set_result(reply.result())

        self._connection.request(request).add_done_callback(deliver)
        return answer
