"""A connection to a real server: what it is told, what it survives, and what it never takes for an answer."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from paceline.client.calls import ServerCalls
from paceline.client.remote import RemoteConnection
from paceline.config.placement import PoolConfig, TransportConfig
from paceline.errors import (
    AuthorizationError,
    CaptureMismatchError,
    DamagedError,
    HandshakeError,
    ServerBusyError,
    ServerFailedError,
    ServerLostError,
    TargetError,
    TransportError,
    WireError,
)
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.limits import Limits
from paceline.schema.protocol import CHECKSUM_HEADER, ServerInfo
from paceline.schema.rows import RowRequest, request_features
from paceline.schema.wire import checksum
from paceline.target.server.server import TargetServer
from paceline.transport.base import Delivery
from small_engine import SmallEngine, expected_hidden, small_info, small_row
from small_server import connect, serve

SPECS = {"training": FeatureSpec((1, 3))}


def ask(connection: RemoteConnection, position: int) -> Future[Delivery]:
    return connection.request(request_features(small_row(position), "training"))


def is_right(answer: Future[Delivery], position: int) -> bool:
    delivery = answer.result(20)
    right: bool = delivery.take().hidden.equal(expected_hidden(small_row(position).tokens, (1, 3)))
    delivery.release()
    return right


def calls_to(url: str, token: str | None = None, **transport: object) -> ServerCalls:
    return ServerCalls(url, TransportConfig.model_validate(transport), PoolConfig(connect_timeout_s=2), token=token)


def test_facts_weights_and_tokenizer_come_from_the_server() -> None:
    with serve(SmallEngine(), tokenizer=lambda: {"tokenizer.json": '{"é": 1}'}) as server:
        calls = calls_to(server.url)
        assert calls.info().target == small_info()
        whole = torch.arange(400.0).view(50, 8)
        assert calls.weights("embedding").equal(whole)
        assert calls.weights("lm_head", [49, 0, 7]).equal(-whole[[49, 0, 7]])
        assert calls.tokenizer() == {"tokenizer.json": '{"é": 1}'}
        with pytest.raises(WireError, match="no lm_head_bias"):
            calls.weights("lm_head_bias")
        with pytest.raises(WireError, match="50"):
            calls.weights("lm_head", [50])
        calls.close()
        with pytest.raises(ServerLostError, match="is closed"):
            calls.info()


@pytest.mark.parametrize("name", ["../tokenizer.json", "a/b", ".hidden", ""])
def test_a_tokenizer_file_with_a_path_for_a_name_is_refused(name: str) -> None:
    with serve(SmallEngine(), tokenizer=lambda: {name: "{}"}) as server, pytest.raises(WireError, match="tokenizer"):
        calls_to(server.url).tokenizer()


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_wrong_token_is_refused_at_once_with_the_remedy(token: str | None) -> None:
    with serve(SmallEngine(), token="right") as server:
        with pytest.raises(AuthorizationError, match=r"placement\.token_file") as caught:
            connect(server.url, token=token).info()
        assert not caught.value.retryable
        connection = connect(server.url, token="right")
        connection.open_session(SPECS)
        assert is_right(ask(connection, 3), 3)
        connection.close()


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serve(SmallEngine()) as server:
        assert calls_to(server.url).info().target.name == "small"


def test_nobody_at_the_address_is_a_lost_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ServerLostError, match="takes no connection"):
        connect(f"http://127.0.0.1:{port}").info()


def test_a_session_that_the_server_forgot_is_opened_again_once_for_all_rows() -> None:
    with serve(SmallEngine(num_threads=2)) as server:
        connection = connect(server.url)
        connection.open_session(SPECS)
        assert is_right(ask(connection, 0), 0)
        for _ in range(3):
            for session in list(server.sessions._leases):
                server.sessions.end(session)
            answers = [ask(connection, position) for position in range(6)]
            assert all(is_right(answer, position) for position, answer in enumerate(answers))
            assert server.sessions.count() == 1
        connection.close()
        assert server.sessions.count() == 0


def test_the_keeper_renews_the_lease() -> None:
    with serve(SmallEngine()) as server:
        connection = connect(server.url, pool={"lease_s": 0.4})
        connection.open_session(SPECS)
        (session,) = server.sessions._leases
        time.sleep(1.2)
        assert list(server.sessions._leases) == [session]
        connection.close()


def restarted(server: TargetServer, engine: SmallEngine) -> AbstractContextManager[TargetServer]:
    port = server.port
    server.stop()
    anew: AbstractContextManager[TargetServer] = serve(engine, port=port)
    return anew


def test_a_server_started_anew_goes_on_where_the_old_one_was() -> None:
    with serve(SmallEngine()) as server:
        connection = connect(server.url)
        connection.open_session(SPECS)
        assert is_right(ask(connection, 1), 1)
        first = connection.server_id
        with restarted(server, SmallEngine()):
            assert is_right(ask(connection, 2), 2)
            assert connection.server_id != first
        connection.close()


def test_another_target_at_the_same_address_is_refused() -> None:
    with serve(SmallEngine()) as server:
        connection = connect(server.url)
        connection.open_session(SPECS)
        with restarted(server, SmallEngine(info=small_info(weight_fingerprint="w2"))):
            with pytest.raises(HandshakeError, match=r"'w2'.*'w'"):
                ask(connection, 2).result(20)
            connection.close()


def spoiled(change: Callable[[Features], None]) -> SmallEngine:
    def spoil(request: RowRequest, features: Features) -> Features:
        del request
        change(features)
        return features

    return SmallEngine(spoil=spoil)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda f: setattr(f, "hidden", f.hidden[:3]), CaptureMismatchError, "with 3 tokens, .* were sent"),
        (lambda f: setattr(f, "hidden", f.hidden.bfloat16()), CaptureMismatchError, r"hidden bfloat16.*float32"),
        (lambda f: setattr(f, "layers", (1, 2)), CaptureMismatchError, r"layers \[1, 2\], \[1, 3\]"),
        (lambda f: setattr(f, "greedy", f.hidden[:, 0, 0].int()), CaptureMismatchError, "with tensors greedy, hidden"),
        (lambda f: setattr(f, "row_hash", "0" * 16), DamagedError, "with row 2 .hash 0000"),
    ],
)
@pytest.mark.parametrize("transport", ["http", "file"])
def test_an_undamaged_reply_that_is_wrong_is_fatal_and_another_rows_is_not(
    change: Callable[[Features], None], kind: type[Exception], message: str, transport: str
) -> None:
    with serve(spoiled(change)) as server:
        connection = connect(server.url, transport={"kind": transport})
        connection.open_session(SPECS)
        with pytest.raises(kind, match=message):
            ask(connection, 2).result(20)
        connection.close()


def test_errors_of_the_engine_and_a_full_queue_keep_their_kind() -> None:
    def fail(request: RowRequest, features: Features) -> Features:
        if request.position == 1:
            raise TargetError("the target fell over")
        return features

    engine = SmallEngine(num_threads=3, num_slots=1, spoil=fail)
    engine.hold(5)
    with serve(engine, max_queued_rows=1, max_unsent_rows=1) as server:
        connection = connect(server.url)
        connection.open_session(SPECS)
        with pytest.raises(ServerFailedError, match="fell over"):
            ask(connection, 1).result(20)
        held = ask(connection, 5)
        deadline = time.monotonic() + 10
        while engine.num_computing == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        answers = [ask(connection, position) for position in (6, 7, 8)]  # one may wait, whichever comes first
        while sum(answer.done() for answer in answers) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        refused = [error for answer in answers if answer.done() and (error := answer.exception())]
        assert len(refused) == 2
        assert all(isinstance(error, ServerBusyError) for error in refused)
        assert all(error.retry_after_s is not None for error in refused)  # type: ignore[attr-defined]
        engine.let_go(5)
        assert is_right(held, 5)
        connection.close()


@contextmanager
def talking(*replies: bytes, keep_open: bool = False) -> Iterator[tuple[str, list[int]]]:
    """A server that answers each request with the next of `replies`, on whichever connection; and counts both."""
    listening = socket.create_server(("127.0.0.1", 0))
    counts = [0, 0]
    left = list(replies)

    def serve_one(connected: socket.socket) -> None:
        with connected:
            while connected.recv(1 << 16):
                counts[1] += 1
                connected.sendall(left.pop(0))
                if not keep_open:
                    return

    def run() -> None:
        while True:
            try:
                connected, _ = listening.accept()
            except OSError:
                return
            counts[0] += 1
            threading.Thread(target=serve_one, args=(connected,), daemon=True).start()

    threading.Thread(target=run, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", counts
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def reply(body: bytes, status: str = "200 OK", more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{CHECKSUM_HEADER}: {checksum(body)}\r\n{more}\r\n"
    return head.encode() + body


def info_body(**changes: object) -> bytes:
    with serve(SmallEngine()) as server:
        info: ServerInfo = calls_to(server.url).info()
    return info.model_copy(update=changes).model_dump_json().encode()


def test_limits_of_an_engine_are_known_before_the_first_row() -> None:
    class Limited(SmallEngine):
        def limits(self) -> Limits:
            return Limits(layers=(0, 2), max_document_tokens=99)

    with serve(Limited()) as server:
        connection = connect(server.url)
        assert connection.limits() == Limits((0, 2), 99, connection.server_info().max_row_tokens)
        connection.close()


def test_a_server_of_a_later_version_may_say_more() -> None:
    body = json.dumps(json.loads(info_body()) | {"something_new": [1]}).encode()
    with talking(reply(body)) as (url, _):
        assert calls_to(url).info().target == small_info()


def test_a_connection_that_the_server_closed_while_idle_is_replaced_silently() -> None:
    body = info_body()
    with talking(reply(body), reply(body), reply(body)) as (url, counts):
        calls = calls_to(url)
        for _ in range(3):
            assert calls.info().target == small_info()
            time.sleep(0.05)
        assert counts == [3, 3]
    with talking(*[reply(body)] * 3, keep_open=True) as (url, counts):
        calls = calls_to(url)
        for _ in range(3):
            calls.info()
        assert counts == [1, 3]  # the premise: a connection that stays open is used again


def test_a_server_of_another_protocol_version_is_refused() -> None:
    with (
        talking(reply(info_body(protocol=99))) as (url, _),
        pytest.raises(HandshakeError, match=r"speaks version 99 .*, this trainer speaks 2"),
    ):
        calls_to(url).info()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * (1 << 20) + b"\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 500 Oops\r\nContent-Length: 5\r\n\r\n<html",
        reply(b"{}").replace(b"{}", b"[]"),
    ],
)
def test_what_is_no_answer_is_lost_or_damaged_and_never_followed(answer: bytes) -> None:
    with talking(answer) as (url, counts), pytest.raises(TransportError):
        calls_to(url, stall_timeout_s=0.5).info()
    assert counts == [1, 1]


def test_a_reply_that_says_forbidden_without_our_words_is_a_matter_of_the_token() -> None:
    with (
        talking(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 5\r\n\r\n<html") as (url, _),
        pytest.raises(AuthorizationError, match="HTTP 403"),
    ):
        calls_to(url).info()
