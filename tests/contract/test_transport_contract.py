"""What every transport must do: every bit arrives, damage and dead peers are noticed in time, nothing leaks."""

from __future__ import annotations

import gc
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paceline.client.connection import Connection, LocalConnection
from paceline.errors import PacelineError, ServerLostError, StoppedError, TransportError
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.parts import Part
from paceline.schema.rows import Row, RowRequest, request_features
from paceline.target.admission import Admission
from paceline.transport.base import Delivery
from paceline.transport.buffers import HostBuffers
from paceline.transport.feature_bytes import as_bytes
from paceline.transport.local import LocalReceiver, LocalSender
from random_features import ALL_SPECS, random_features
from small_engine import SmallEngine, small_info, small_row
from small_server import CPU, connect, serve

KINDS = ["local", "http", "file", "gloo"]
REMOTE = [kind for kind in KINDS if kind != "local"]
SPECS = {f"spec-{number}": spec for number, spec in enumerate(ALL_SPECS[:16])}
ONE = {"training": FeatureSpec((0, 3), "supervised", greedy=True)}


class RandomEngine(SmallEngine):
    """Answers with random bits of its dtype."""

    def __init__(self, dtype: str = "float32") -> None:
        super().__init__(num_threads=2, info=small_info(dtype=dtype))
        self._dtype = dtype

    def _features(self, request: RowRequest, spec: FeatureSpec) -> Features:
        features: Features = random_features(row_of(request), spec, self._dtype, seed=request.position)
        features.row_hash = request.row_hash()
        return features


def row_of(request: RowRequest) -> Row:
    row: Row = small_row(0, num_tokens=len(request.tokens))
    row.spans.resize(request.spans.shape, refcheck=False)
    row.spans[:] = request.spans
    return row


@contextmanager
def path(kind: str, engine: SmallEngine, directory: Path, buffers: HostBuffers | None = None) -> Iterator[Connection]:
    """An unopened connection to the engine by a transport."""
    with ExitStack() as stack:
        if kind == "local":
            admission = Admission(engine)
            stack.callback(engine.close)
            stack.callback(admission.close)
            connection: Connection = LocalConnection(admission, LocalSender(), LocalReceiver(CPU))
        else:
            server = stack.enter_context(serve(engine))
            transport = {"kind": kind, "directory": str(directory), "stall_timeout_s": 2.0}
            connection = connect(server.url, transport=transport, buffers=buffers)
        stack.callback(connection.close)
        yield connection


def same_bits(one: Features, other: Features) -> bool:
    first, second = one.tensors(), other.tensors()
    return first.keys() == second.keys() and all(
        (first[name].dtype, first[name].shape) == (second[name].dtype, second[name].shape)
        and as_bytes(first[name]).equal(as_bytes(second[name]))
        for name in first
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_of_every_dtype_and_spec_arrives(kind: str, dtype: str, tmp_path: Path) -> None:
    with path(kind, RandomEngine(dtype), tmp_path) as connection:
        connection.open_session(SPECS)
        unsupervised = small_row(1, num_tokens=9)
        unsupervised.spans.resize((0, 2), refcheck=False)
        rows = [small_row(0, num_tokens=3), small_row(1, num_tokens=300), unsupervised]
        asked: list[tuple[Future[Delivery], Row, FeatureSpec]] = []
        for position, row in enumerate(rows):
            for name, spec in SPECS.items():
                request = request_features(row, name)
                request = RowRequest(
                    position, name, request.tokens, request.documents, request.spans, request.positions
                )
                asked.append((connection.request(request), row, spec))
        for number, (answer, row, spec) in enumerate(asked):
            delivery = answer.result(30)
            features = delivery.take()
            assert same_bits(features, random_features(row, spec, dtype, seed=number // len(SPECS)))
            assert (features.layers, features.finite) == (spec.layers, True)
            delivery.release()
            assert features.num_tokens == 0


def part_of(features: Features, num_tokens: int, part: Part, halo: int) -> Features:
    """What a part must hold, cut out token by token."""
    per_part = math.ceil(num_tokens / part.count)
    own = [token for token in range(num_tokens) if token // per_part == part.index]
    wide = [*own, *range(own[-1] + 1, min(own[-1] + 1 + halo, num_tokens))] if own else []
    tensors = features.tensors()
    cut: dict[str, Any] = {name: tensors[name][wide] for name in ("greedy", "logsumexp") if name in tensors}
    if features.final_index is not None:
        inside = [place for place, token in enumerate(features.final_index.tolist()) if token in wide]
        cut |= {name: tensors[name][inside] for name in ("final_hidden", "final_index")}
    return replace(features, hidden=features.hidden[own], part=part, **cut)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_arrive_bit_for_bit_and_are_the_whole_row_together(kind: str, tmp_path: Path) -> None:
    specs = {name: replace(spec, halo=number % 4) for number, (name, spec) in enumerate(SPECS.items())}
    with path(kind, RandomEngine("bfloat16"), tmp_path) as connection:
        connection.open_session(specs, "ab" * 16)
        for number, (name, spec) in enumerate(specs.items()):
            row = small_row(0, num_tokens=(5, 9, 64, 301)[number % 4])
            whole = random_features(row, spec, "bfloat16", seed=number)
            request = replace(request_features(row, name), position=number)
            parts = [Part(index, 4) for index in range(4)]
            asked = [connection.request(replace(request, part=part)) for part in parts]
            received = [answer.result(30).take() for answer in asked]
            for part, features in zip(parts, received, strict=True):
                assert same_bits(features, part_of(whole, row.num_tokens, part, spec.halo)), (name, part)
                assert (features.part, features.row_hash) == (part, request.row_hash())
            assert torch.equal(torch.cat([features.hidden for features in received]), whole.hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaks_over_500_rows(kind: str, tmp_path: Path) -> None:
    buffers = HostBuffers(1 << 22)
    threads = threading.active_count()
    with path(kind, RandomEngine(), tmp_path, buffers) as connection:
        connection.open_session(ONE)
        after_100 = 0
        for first in range(0, 500, 4):
            asked = [connection.request(request_features(small_row(first + i), "training")) for i in range(4)]
            for answer in asked:
                answer.result(30).release()
            if first == 100:
                after_100 = buffers.num_bytes
                files = {file.name for folder in tmp_path.iterdir() for file in folder.iterdir()}
                assert len(files) <= 2 + 2  # owner and nonce, and what is kept to be written again
        assert buffers.num_bytes == after_100
        assert buffers.num_free_bytes == buffers.num_bytes
        del answer, asked
    wait_until(lambda: threading.active_count() <= threads)
    assert list(tmp_path.iterdir()) == []


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        gc.collect()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("kind", REMOTE)
@pytest.mark.parametrize("how", ["close", "abort"])
def test_closing_frees_whoever_waits_for_a_row(kind: str, how: str, tmp_path: Path) -> None:
    engine = RandomEngine()
    engine.hold(0)
    with path(kind, engine, tmp_path) as connection:
        connection.open_session(ONE)
        answer = connection.request(request_features(small_row(0), "training"))
        wait_until(lambda: engine.num_computing == 1)
        started = time.monotonic()
        getattr(connection, how)()
        expected = StoppedError if how == "close" else ServerLostError
        with pytest.raises(expected, match="before row 0 came"):
            answer.result(5)
        with pytest.raises(expected):
            connection.request(request_features(small_row(1), "training"))
        connection.close()
        assert time.monotonic() - started < 5
        engine.let_go(0)


class Relay:
    """A server in between that does to bytes what it is told."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.change: Callable[[bytes], bytes | None] = lambda data: data
        """Of what the server sends; None stands still from then on."""
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._open += [client, server]
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, replies: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                changed = self.change(data) if replies else data
                if changed is None:
                    return
                sink.sendall(changed)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def cut(self) -> None:
        """Every connection ends, and none is taken any more."""
        for connected in [self._listening, *self._open]:
            try:
                connected.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self._listening.close()


@contextmanager
def relayed(
    kind: str, engine: SmallEngine, directory: Path, stall_timeout_s: float = 2.0, **pool: object
) -> Iterator[tuple[Connection, Relay]]:
    with serve(engine) as server:
        relay = Relay(server.url)
        transport = {"kind": kind, "directory": str(directory), "stall_timeout_s": stall_timeout_s}
        connection = connect(relay.url, transport=transport, pool=pool)
        connection.open_session(ONE)
        try:
            yield connection, relay
        finally:
            relay.change = lambda data: data
            connection.close()
            relay.cut()


def long_request(position: int) -> RowRequest:
    row = small_row(0, num_tokens=1500)
    return RowRequest(position, "training", row.tokens, row.documents, row.spans, np.arange(1500, dtype=np.int32)[None])


@pytest.mark.parametrize("kind", REMOTE)
def test_damaged_bytes_are_noticed_and_the_connection_serves_on(kind: str, tmp_path: Path) -> None:
    with relayed(kind, RandomEngine(), tmp_path) as (connection, relay):
        draw = np.random.default_rng(0)
        num_lost = 0
        for position in range(60):

            def flip_one_bit(data: bytes) -> bytes:
                relay.change = lambda other: other
                place, flipped = int(draw.integers(len(data))), bytearray(data)
                flipped[place] ^= 1 << int(draw.integers(8))
                return bytes(flipped)

            relay.change = flip_one_bit
            expected = connection.request(long_request(position))
            try:
                features = expected.result(20).take()
            except PacelineError as error:
                assert error.retryable, error  # noqa: PT017 - not every bit matters: a blank, or upper and lower case
                num_lost += 1
            else:
                request = long_request(position)
                assert same_bits(features, random_features(row_of(request), ONE["training"], seed=position))
        assert num_lost > 20
        relay.change = lambda data: data
        assert connection.request(long_request(99)).result(20).take().num_tokens == 1500


@pytest.mark.parametrize("kind", REMOTE)
def test_a_reply_that_stands_still_is_lost_in_time(kind: str, tmp_path: Path) -> None:
    with relayed(kind, RandomEngine(), tmp_path, stall_timeout_s=1.0) as (connection, relay):

        def half(data: bytes) -> bytes:
            relay.change = lambda other: None
            return data[: len(data) // 2]

        relay.change = half
        started = time.monotonic()
        with pytest.raises(TransportError, match=r"stood still|stall_timeout_s"):
            connection.request(long_request(0)).result(20)
        assert time.monotonic() - started < 5
        relay.change = lambda data: data
        assert asked_again(connection, 1).take().num_tokens == 1500


def asked_again(connection: Connection, position: int) -> Delivery:
    """As the pool does: connections that stood still may be found one after the other."""
    for _ in range(5):
        try:
            return connection.request(long_request(position)).result(20)
        except TransportError:
            continue
    return connection.request(long_request(position)).result(20)


@pytest.mark.parametrize("kind", REMOTE)
def test_a_dead_server_fails_its_rows_at_once(kind: str, tmp_path: Path) -> None:
    engine = RandomEngine()
    engine.hold(0)
    with relayed(kind, engine, tmp_path) as (connection, relay):
        answer = connection.request(long_request(0))
        wait_until(lambda: engine.num_computing == 1)
        relay.cut()
        with pytest.raises(ServerLostError):
            answer.result(5)
        engine.let_go(0)


@pytest.mark.parametrize("kind", REMOTE)
def test_a_server_that_hangs_is_given_up_by_its_health(kind: str, tmp_path: Path) -> None:
    engine = RandomEngine()
    engine.hold(0)
    with relayed(kind, engine, tmp_path, health_every_s=0.2, health_timeout_s=0.3) as (connection, relay):
        answer = connection.request(long_request(0))
        wait_until(lambda: engine.num_computing == 1)
        time.sleep(1.0)
        assert not answer.done()  # a server that computes for long answers /healthz all the same
        relay.change = lambda data: None
        with pytest.raises(ServerLostError, match="/healthz"):
            answer.result(10)
        engine.let_go(0)


@pytest.mark.parametrize("kind", KINDS)
def test_deliveries_outlive_their_connection(kind: str, tmp_path: Path) -> None:
    with path(kind, RandomEngine(), tmp_path) as connection:
        connection.open_session(ONE)
        request = request_features(small_row(3), "training")
        delivery = connection.request(request).result(20)
        connection.close()
        assert same_bits(delivery.take(), random_features(row_of(request), ONE["training"], seed=3))
        assert isinstance(delivery.features.hidden, torch.Tensor)
