"""Servers of small engines that die, return, hang and refuse as a test tells them, and pools over them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager

import torch

from feature_path import SPECS
from paceline.client.connection import LocalConnection
from paceline.client.pool import FeaturePool
from paceline.client.server_list import FixedServers, MakeConnection
from paceline.config.placement import PoolConfig
from paceline.errors import ServerLostError
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.rows import Row, RowRequest
from paceline.schema.target_info import TargetInfo
from paceline.target.admission import Admission
from paceline.transport.base import Delivery
from paceline.transport.local import LocalReceiver, LocalSender
from small_engine import SmallEngine, expected_hidden


class Server:
    """One server: an engine behind admission, reached over connections that end when it dies."""

    def __init__(
        self,
        name: str,
        engine: SmallEngine | None = None,
        *,
        alive: bool = True,
        dies_of: tuple[int, ...] = (),
        max_queued_rows: int = 64,
    ) -> None:
        """`dies_of`: positions it dies of as soon as it gets them, each time."""
        self.name = name
        self.engine = engine or SmallEngine(num_threads=2)
        self.admission = Admission(self.engine, max_queued_rows=max_queued_rows)
        self.refuses: BaseException | None = None
        """Raised by whoever connects, while it is set."""
        self.dies_of = dies_of
        self.num_connects = 0
        self.num_deaths = 0
        self.open: list[ServerConnection] = []
        self.in_flight_at_death: list[list[int]] = []
        self._lock = threading.Lock()
        self._alive = alive

    def connect(self) -> ServerConnection:
        self.num_connects += 1
        return ServerConnection(self)

    def die(self) -> None:
        """Every connection breaks, with the rows outstanding on it; nobody can connect."""
        with self._lock:
            self._alive = False
            self.num_deaths += 1
            broken, self.open = self.open, []
        self.in_flight_at_death += [sorted(connection.rows_outstanding()) for connection in broken]
        for connection in broken:
            connection.abort()

    def come_back(self) -> None:
        self._alive = True

    def welcome(self, connection: ServerConnection) -> None:
        with self._lock:
            if not self._alive:
                raise ServerLostError(f"{self.name}: connection refused")
            self.open.append(connection)

    def check(self) -> None:
        if self.refuses is not None:
            raise self.refuses
        if not self._alive:
            raise ServerLostError(f"{self.name}: connection refused")

    def positions(self) -> list[int]:
        return [position for _, position in self.engine.submitted]

    def holds_nothing(self) -> bool:
        """Whether every row it computed is free."""
        return not any(self.engine.live.values())

    def close(self) -> None:
        self.admission.close()
        self.engine.close()


class ServerConnection(LocalConnection[Features]):
    """A session on a `Server`."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.admission, LocalSender(), LocalReceiver(torch.device("cpu")), server.name)
        self._at = server
        self.num_closes = 0

    def info(self) -> TargetInfo:
        self._at.check()
        return super().info()

    def open_session(self, specs: Mapping[str, FeatureSpec], group: str | None = None) -> None:
        self._at.check()
        super().open_session(specs, group)
        self._at.welcome(self)

    def request(self, request: RowRequest) -> Future[Delivery]:
        answer = super().request(request)
        if request.position in self._at.dies_of:
            self._at.die()
        return answer

    def rows_outstanding(self) -> list[int]:
        return list(self._outstanding.values())

    def close(self) -> None:
        self.num_closes += 1
        if self in self._at.open:
            self._at.open.remove(self)
        super().close()


class ChangingServers:
    """A list of servers that a test changes."""

    def __init__(self, *servers: Server) -> None:
        self._listed: dict[str, MakeConnection] = {}
        self.change(add=servers)

    def change(self, add: tuple[Server, ...] = (), remove: tuple[str, ...] = ()) -> None:
        kept = {name: make for name, make in self._listed.items() if name not in remove}
        self.change_to(kept | {server.name: server.connect for server in add})

    def change_to(self, listed: Mapping[str, MakeConnection]) -> None:
        self._listed = dict(listed)

    def read(self) -> Mapping[str, MakeConnection]:
        return self._listed


@contextmanager
def pool_of(*servers: Server, listed: ChangingServers | None = None, **settings: float) -> Iterator[FeaturePool]:
    """A pool over `servers`; in the end nothing of it is left: no thread, no row, no session."""
    before = set(threading.enumerate())
    source = listed or FixedServers({server.name: server.connect for server in servers})
    log_every_s = settings.pop("log_every_s", 30.0)
    try:
        pool = FeaturePool(source, SPECS, PoolConfig.model_validate(settings), log_every_s=log_every_s)
        try:
            yield pool
        finally:
            started = time.monotonic()
            pool.close()
            assert time.monotonic() - started < 2
            ours = [
                thread for thread in threading.enumerate() if thread.name.startswith(("pool-", "connect ", "close "))
            ]
            assert [thread.name for thread in ours if thread not in before] == []
    finally:
        for server in servers:
            server.close()
    for server in servers:
        assert server.open == [], f"a session on {server.name} was left open"
        eventually(server.holds_nothing)


def eventually(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Return when `holds()`; an error after `timeout_s`."""
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until, "it never came to hold"
        time.sleep(0.005)


def right(answer: Future[Delivery], row: Row, timeout_s: float = 10.0) -> None:
    """Return if `answer` is, or becomes, the features of `row`; lets go of them."""
    delivery = answer.result(timeout_s)
    assert delivery.take().hidden.equal(expected_hidden(row.tokens, (1, 3)))
    delivery.release()
