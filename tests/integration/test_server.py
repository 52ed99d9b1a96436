"""The target server over its sockets: rows, sessions and leases, bounds, weights, and an end in bounded time."""

from __future__ import annotations

import gc
import json
import logging
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from paceline.client.calls import ServerCalls
from paceline.config.placement import PoolConfig, TransportConfig
from paceline.errors import ConfigError, TransportError
from paceline.schema.features import Features
from paceline.schema.protocol import SESSION_KEY_HEADER, SessionReply, TransportName
from paceline.schema.rows import RowRequest, request_features
from paceline.schema.wire import checksum, decode_reply_head, encode_request, head_length
from paceline.target.admission import Admission
from paceline.target.server.server import ServedTarget, TargetServer
from paceline.target.server.settings import ServerSettings
from paceline.transport.base import JSON, Reply
from paceline.transport.buffers import HostBuffers
from paceline.transport.http import HttpSender
from paceline.transport.negotiation import OpenedSender, OpenSender, SenderRequest, TransportRefused, host_facts
from small_engine import SmallEngine, expected_hidden, small_info, small_row
from small_server import CPU, SmallTables, serve
from talk import SPEC, Answer, Talk, row_headers


def over_http(sender: type[HttpSender] = HttpSender) -> dict[TransportName, OpenSender]:
    buffers = HostBuffers(1 << 20)
    return {"http": lambda request: OpenedSender(sender(buffers), {})}


def serving(engine: SmallEngine, **settings: Any) -> AbstractContextManager[TargetServer]:
    return serve(engine, **{"senders": over_http(), **settings})


@pytest.fixture
def engine() -> SmallEngine:
    return SmallEngine(num_threads=4)


def asked(position: int, num_tokens: int | None = None) -> RowRequest:
    return request_features(small_row(position, num_tokens=num_tokens), "training")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def park(server: TargetServer, engine: SmallEngine, session: SessionReply, rows: Sequence[RowRequest]) -> list[Talk]:
    """Rows of which the engine holds the first and the others wait, in order."""
    talks = []
    for number, request in enumerate(rows):
        talks.append(Talk(server.url))
        talks[-1].send_row(session, request)
        wait_until(lambda: len(engine.submitted) > 0, "the first row is not computed")
        wait_until(lambda number=number: server.sessions.num_waiting() == number, "the row does not wait")
    return talks


def check_row(answer: Answer, request: RowRequest) -> None:
    """The features are the engine's for this row, bit by bit."""
    assert answer.status == 200, answer.body[:500]
    length = head_length(answer.body[:8])
    header = decode_reply_head(answer.body[8 : 8 + length])
    assert (header.position, header.row_hash, header.finite) == (request.position, request.row_hash(), True)
    tensors = safetensors.torch.load(answer.body)
    assert torch.equal(tensors["hidden"], expected_hidden(request.tokens, SPEC.layers))
    supervised = [i for start, end in request.spans for i in range(start, end)]
    assert tensors["final_index"].tolist() == supervised


def test_rows_asked_for_by_many_threads_come_back_right(engine: SmallEngine) -> None:
    with serving(engine) as server:
        session = Talk(server.url).session()

        def ask(first: int) -> None:
            talk = Talk(server.url)
            for position in range(first, first + 10):
                check_row(talk.row(session, asked(position)), asked(position))
                right.append(position)

        right: list[int] = []
        threads = [threading.Thread(target=ask, args=(10 * number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(right) == list(range(40))


def test_a_reply_follows_its_request_without_waiting_for_acknowledgements(engine: SmallEngine) -> None:
    """40 ms each, where a server leaves Nagle's algorithm on: the fastest of 20 shows it on any machine."""
    with serving(engine) as server:
        talk = Talk(server.url)
        session, seconds = talk.session(), []
        for position in range(20):
            begin = time.monotonic()
            talk.row(session, asked(position))
            seconds.append(time.monotonic() - begin)
        assert min(seconds) < 0.03


def test_a_server_says_what_it_is(engine: SmallEngine) -> None:
    with serving(engine, max_row_tokens=4321, tokenizer=lambda: {"tokenizer.json": "{}"}) as server:
        talk = Talk(server.url)
        info = talk.ask("GET", "/v1/info").json()
        assert info["target"] == small_info().model_dump(mode="json")
        assert (info["max_row_tokens"], info["transports"], info["lossy"]) == (4321, ["http"], False)
        assert (info["max_document_tokens"], info["capture_layers"]) == (None, None)
        assert talk.ask("GET", "/v1/tokenizer").json() == {"tokenizer.json": "{}"}
        health = talk.ask("GET", "/healthz").json()
        assert (health["status"], health["server_id"]) == ("ok", info["server_id"])


def test_metrics_count_what_was_done(engine: SmallEngine) -> None:
    with serving(engine) as server:
        talk = Talk(server.url)
        session = talk.session()
        requests = [asked(position) for position in range(3)]
        sizes = [len(talk.row(session, request).body) for request in requests]

        def figures() -> dict[str, float]:
            lines = talk.ask("GET", "/metrics").body.decode().splitlines()
            return {name: float(value) for name, value in (li.rsplit(" ", 1) for li in lines if not li.startswith("#"))}

        wait_until(lambda: figures().get('paceline_rows_total{outcome="sent"}') == 3, "the rows are not counted")
        counted = figures()
        assert counted["paceline_row_tokens_total"] == sum(len(request.tokens) for request in requests)
        assert counted["paceline_sent_bytes_total"] == sum(sizes)
        assert counted["paceline_sessions"] == 1
        assert counted["paceline_queued_rows"] == 0
        assert counted["paceline_row_forward_seconds_count"] == counted["paceline_row_send_seconds_count"] == 3
        assert 0 <= counted["paceline_engine_utilisation"] <= 1
        assert counted['paceline_http_requests_total{route="POST /v1/sessions/{session}/rows",status="200"}'] == 3


def test_weights_come_whole_or_row_by_row_in_the_dtype_asked_for(engine: SmallEngine) -> None:
    embedding = SmallTables().tensors["embedding"]
    with serving(engine) as server:
        calls = ServerCalls(server.url, TransportConfig(), PoolConfig())
        assert torch.equal(calls.weights("embedding"), embedding)
        assert torch.equal(calls.weights("embedding", [7, 3, 49, 3]), embedding[[7, 3, 49, 3]])
        assert calls.weights("embedding", []).shape == (0, 8)
        talk = Talk(server.url)
        half = safetensors.torch.load(talk.ask("GET", "/v1/weights/lm_head?dtype=bfloat16").body)
        assert torch.equal(half["lm_head"], SmallTables().tensors["lm_head"].bfloat16())
        missing = talk.ask("GET", "/v1/weights/lm_head_bias")
        assert (missing.status, missing.error().error) == (404, "not_found")
        for body in (b'{"rows": [50]}', b'{"rows": [-1]}', b'{"rows": "all"}', b"[", b'{"rows": [1e30]}'):
            refused = talk.ask("POST", "/v1/weights/embedding", body)
            assert (refused.status, refused.error().error) == (400, "wrong_request")
        assert talk.ask("GET", "/v1/weights/embedding?dtype=int32").status == 400


def test_a_client_of_another_protocol_or_target_is_refused_with_both_sides_named(engine: SmallEngine) -> None:
    with serving(engine) as server:
        talk = Talk(server.url)
        here = small_info().model_dump(mode="json")
        renamed = talk.open(target={**here, "name": "a copy elsewhere"})
        assert renamed.status == 200
        cases: list[tuple[dict[str, object], list[str]]] = [
            ({"protocol": 99, "unheard_of": True}, ["protocol 2", "protocol 99"]),
            ({"target": {**here, "weight_fingerprint": "other"}}, ["weight_fingerprint", "'w'", "'other'"]),
            ({"target": {**here, "tokenizer_fingerprint": "x"}}, ["tokenizer_fingerprint", "'t'", "'x'"]),
            ({"target": {**here, "dtype": "bfloat16"}}, ["dtype", "'float32'", "'bfloat16'"]),
            ({"specs": {"training": {"layers": [6]}}}, ["[6]", "0..5"]),
            ({"offers": [{"name": "nccl"}]}, ["nccl", "http only"]),
        ]
        for changes, words in cases:
            refused = talk.open(**changes)
            assert (refused.status, refused.error().error) == (409, "handshake")
            for word in words:
                assert word in refused.error().message
        assert server.sessions.count() == 1


def test_the_first_offer_that_works_is_taken_and_the_others_are_explained(engine: SmallEngine) -> None:
    def refuse(request: SenderRequest) -> OpenedSender:
        raise TransportRefused(f"{request.parameters['directory']} is not seen from here")

    def open_http(request: SenderRequest) -> OpenedSender:
        assert request.session
        return OpenedSender(HttpSender(HostBuffers(1 << 20)), {"greeting": "hello"})

    with serving(engine, senders={"file": refuse, "http": open_http}) as server:
        offers = [{"name": "gloo"}, {"name": "file", "parameters": {"directory": "/x"}}, {"name": "http"}]
        session = Talk(server.url).session(offers=offers)
        assert session.transport == "http"
        assert session.parameters == {"greeting": "hello"}
        assert session.refused["file"] == "/x is not seen from here"
        assert "file, http only" in session.refused["gloo"]


def test_a_lease_ends_by_itself_unless_it_is_renewed_or_used(engine: SmallEngine) -> None:
    with serving(engine) as server:
        talk = Talk(server.url)
        forgotten, renewed, used = (talk.session(lease_s=0.6) for _ in range(3))
        for position in range(10):
            time.sleep(0.15)
            assert talk.of_session("POST", renewed, "/renew").status == 200
            check_row(talk.row(used, asked(position)), asked(position))
        lost = talk.of_session("POST", forgotten, "/renew")
        assert (lost.status, lost.error().error) == (404, "unknown_session")
        assert server.sessions.count() == 2
        wait_until(lambda: server.sessions.count() == 0, "leases that nobody renews have not ended")


def test_a_session_belongs_to_who_has_its_key(engine: SmallEngine) -> None:
    with serving(engine) as server:
        talk = Talk(server.url)
        mine, other = talk.session(), talk.session()
        stolen = SessionReply.model_validate({**mine.model_dump(), "key": other.key})
        for answer in (
            talk.row(stolen, asked(0)),
            talk.of_session("POST", stolen, "/renew"),
            talk.of_session("DELETE", stolen),
            talk.ask("DELETE", f"/v1/sessions/{mine.session}"),
            talk.ask("DELETE", f"/v1/sessions/{mine.session}", **{SESSION_KEY_HEADER: "\xe9"}),
        ):
            assert (answer.status, answer.error().error) == (403, "unauthorized")
        assert talk.of_session("DELETE", mine).status == 200
        assert talk.of_session("DELETE", mine).error().error == "unknown_session"
        assert talk.row(mine, asked(0)).error().error == "unknown_session"
        check_row(talk.row(other, asked(0)), asked(0))


def test_a_full_queue_answers_busy_and_each_session_has_its_own(engine: SmallEngine) -> None:
    engine.hold(0)
    with serving(engine, max_queued_rows=2, max_unsent_rows=1) as server:
        talk = Talk(server.url)
        session, other = talk.session(), talk.session()
        waiting = park(server, engine, session, [asked(position) for position in range(3)])
        busy = talk.row(session, asked(3))
        assert (busy.status, busy.error().error, busy.error().position) == (429, "busy", 3)
        assert int(busy.headers["retry-after"]) >= 1
        check_row(talk.row(other, asked(4)), asked(4))
        engine.let_go(0)
        for position, one in enumerate(waiting):
            check_row(one.answer(), asked(position))


def test_an_engine_of_many_rows_at_once_is_given_small_ones_beyond_the_number(engine: SmallEngine) -> None:
    """Of rows of 10 tokens four where two would be allowed, then one in the place of each that has left."""
    engine.hold(*range(6))
    with serving(engine, max_unsent_rows=2, max_unsent_tokens=40) as server:
        session = Talk(server.url).session()
        waiting = [Talk(server.url) for _ in range(6)]
        for position, one in enumerate(waiting):
            one.send_row(session, asked(position, num_tokens=10))
        wait_until(lambda: server.sessions.num_waiting() == 2, "other rows than the last two wait")
        wait_until(lambda: len(engine.submitted) == 4, "the engine has not four rows")
        (first, *_) = [position for _, position in engine.submitted]
        engine.let_go(first)
        check_row(waiting[first].answer(), asked(first, num_tokens=10))
        wait_until(lambda: len(engine.submitted) == 5, "no row takes the place of the one that left")
        assert server.sessions.num_waiting() == 1
        engine.let_go(*set(range(6)) - {first})
        for position in set(range(6)) - {first}:
            check_row(waiting[position].answer(), asked(position, num_tokens=10))


@pytest.mark.parametrize(("num_tokens", "num_with_engine"), [(100, 2), (4, 4)])
def test_rows_beyond_the_number_are_bounded(num_tokens: int, num_with_engine: int, engine: SmallEngine) -> None:
    """By their tokens, and however few these are, by the rows that may wait."""
    engine.hold(*range(6))
    with serving(engine, max_unsent_rows=2, max_unsent_tokens=200, max_queued_rows=4) as server:
        session = Talk(server.url).session()
        waiting = [Talk(server.url) for _ in range(6)]
        for position, one in enumerate(waiting):
            one.send_row(session, asked(position, num_tokens=num_tokens))
        wait_until(lambda: server.sessions.num_waiting() == 6 - num_with_engine, "other rows wait")
        wait_until(lambda: len(engine.submitted) == num_with_engine, "the engine has others")
        engine.let_go(*range(6))
        for position, one in enumerate(waiting):
            check_row(one.answer(), asked(position, num_tokens=num_tokens))


def test_too_many_sessions_are_told_to_come_later(engine: SmallEngine) -> None:
    with serving(engine, max_sessions=2) as server:
        talk = Talk(server.url)
        first = talk.session()
        talk.session()
        refused = talk.open()
        assert (refused.status, refused.error().error) == (429, "busy")
        assert "retry-after" in refused.headers
        talk.of_session("DELETE", first)
        assert talk.open().status == 200


def test_the_row_of_a_client_that_left_never_reaches_the_engine(engine: SmallEngine) -> None:
    engine.hold(0)
    with serving(engine, max_unsent_rows=1) as server:
        session = Talk(server.url).session()
        first, second = park(server, engine, session, [asked(0), asked(1)])
        second.close()
        wait_until(lambda: server.sessions.num_waiting() == 0, "the row of the client that left still waits")
        first.close()
        engine.let_go(0)
        wait_until(lambda: engine.live.get("training") == 0, "features nobody waits for are kept")
        check_row(Talk(server.url).row(session, asked(2)), asked(2))
        assert [position for _, position in engine.submitted] == [0, 2]


def test_a_client_that_stops_reading_holds_no_more_features_than_the_bound_and_is_cut_off(engine: SmallEngine) -> None:
    """Of 12 rows of several megabytes each, two at a time are computed."""
    sent: list[tuple[int, bool]] = []

    class Recording(HttpSender):
        def send(self, position: int, features: Features) -> Reply:
            reply = super().send(position, features)
            return Reply(reply.body, reply.content_type, reply.checksum, lambda left: sent.append((position, left)))

    senders = over_http(Recording)
    with serving(engine, senders=senders, max_unsent_rows=2, stall_timeout_s=1.0) as server:
        session = Talk(server.url).session()
        stuck = [Talk(server.url) for _ in range(12)]
        for position, one in enumerate(stuck):
            one.connection.connect()
            one.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.send_row(session, asked(position, num_tokens=100_000))
        wait_until(lambda: len(sent) == 12, "clients that read nothing are not cut off", 60)
        assert sorted(sent) == [(position, False) for position in range(12)]
        assert engine.most_live_at_all <= 3  # one may be freed a moment after the next has begun
        wait_until(lambda: engine.live.get("training") == 0, "features that could not be sent are kept")
        check_row(Talk(server.url).row(session, asked(20)), asked(20))
        wait_until(lambda: (20, True) in sent, "the reply that was read has not left")
        assert len(sent) == 13


def test_rows_in_flight_are_bounded_in_bytes_too(engine: SmallEngine) -> None:
    engine.hold(0, 1)
    one_row = 4 * 1000 * (8 * 2 + 1 + 8 + 1)
    with serving(engine, max_unsent_bytes=int(1.5 * one_row)) as server:
        session = Talk(server.url).session()
        talks = park(server, engine, session, [asked(position, num_tokens=1000) for position in range(2)])
        assert len(engine.submitted) == 1
        engine.let_go(0, 1)
        for position, talk in enumerate(talks):
            check_row(talk.answer(), asked(position, num_tokens=1000))


def test_control_calls_are_answered_while_features_are_computed(engine: SmallEngine) -> None:
    engine.hold(0)
    with serving(engine) as server:
        session = Talk(server.url).session()
        row = Talk(server.url)
        row.send_row(session, asked(0))
        wait_until(lambda: len(engine.submitted) == 1, "the row is not computed")
        paths = ["/healthz", "/v1/info", "/metrics", "/v1/tokenizer", "/v1/weights/embedding"]
        statuses: list[int] = []

        def ask(path: str) -> None:
            statuses.append(Talk(server.url).ask("GET", path).status)

        threads = [threading.Thread(target=ask, args=(paths[number % len(paths)],)) for number in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert statuses == [200] * 100
        engine.let_go(0)
        check_row(row.answer(), asked(0))


def test_twenty_clients_come_and_go_and_leave_nothing(engine: SmallEngine) -> None:
    with serving(engine) as server:
        threads_before = threading.active_count()

        def visit(number: int) -> None:
            for visit in range(3):
                talk = Talk(server.url)
                session = talk.session(label=f"client {number}")
                check_row(talk.row(session, asked(3 * number + visit)), asked(3 * number + visit))
                if visit < 2:
                    assert talk.of_session("DELETE", session).status == 200
                    talk.close()
            done.append(session)

        done: list[SessionReply] = []
        clients = [threading.Thread(target=visit, args=(number,)) for number in range(20)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(60)
        assert len(done) == server.sessions.count() == 20
        talk = Talk(server.url)
        for session in done:
            talk.of_session("DELETE", session)
        assert server.sessions.count() == 0
        wait_until(lambda: threading.active_count() <= threads_before + 45, "threads of sessions are left")
        wait_until(
            lambda: not [thread for thread in threading.enumerate() if thread.name == "session sender"],
            "senders of sessions are left",
        )


def test_a_sender_that_fails_costs_its_row_and_a_broken_one_its_session(engine: SmallEngine) -> None:
    class Failing(HttpSender):
        def send(self, position: int, features: Features) -> Reply:
            if position == 0:
                raise TransportError("the channel broke")
            if position == 2:
                raise RuntimeError("a bug")
            return super().send(position, features)

    senders = over_http(Failing)
    with serving(engine, senders=senders) as server:
        talk = Talk(server.url)
        session = talk.session()
        broken = talk.row(session, asked(0))
        assert (broken.status, broken.error().error, broken.error().position) == (500, "engine", 0)
        check_row(talk.row(session, asked(1)), asked(1))
        bug = talk.row(session, asked(2))
        assert (bug.status, bug.error().error) == (500, "engine")
        assert "a bug" not in bug.error().message
        assert talk.row(session, asked(3)).error().error == "unknown_session"
        check_row(talk.row(talk.session(), asked(4)), asked(4))
        assert server.health.status() == "ok"


def test_replies_that_are_no_features_are_sent_as_they_are(engine: SmallEngine) -> None:
    class Elsewhere(HttpSender):
        def send(self, position: int, features: Features) -> Reply:
            body = json.dumps({"position": position}).encode()
            return Reply((body,), JSON, checksum(body), lambda left: None)

    with serving(engine, senders=over_http(Elsewhere)) as server:
        talk = Talk(server.url)
        answer = talk.row(talk.session(), asked(5))
        assert (answer.status, answer.headers["content-type"], answer.json()) == (200, JSON, {"position": 5})


def test_rows_that_wait_are_told_that_the_server_stops(engine: SmallEngine) -> None:
    engine.hold(0)
    with serving(engine, max_unsent_rows=1) as server:
        session = Talk(server.url).session()
        talks = park(server, engine, session, [asked(position) for position in range(3)])
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        for talk in talks:
            answer = talk.answer()
            assert (answer.status, answer.error().error) == (503, "stopping")
        stopping.join(5)
        assert not stopping.is_alive()


def test_a_server_stops_in_bounded_time_beside_a_client_that_reads_nothing(engine: SmallEngine) -> None:
    with serving(engine) as server:
        talk = Talk(server.url)
        session = talk.session()
        talk.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        talk.send_row(session, asked(0, num_tokens=200_000 // 2))
        wait_until(lambda: len(engine.answered) == 1, "the row is not computed")
        begin = time.monotonic()
        server.stop()
        assert time.monotonic() - begin < 6


def test_an_engine_that_dies_is_said_so_to_everyone(engine: SmallEngine, caplog: pytest.LogCaptureFixture) -> None:
    def spoil(request: RowRequest, features: Features) -> Features:
        if request.position == 1:
            raise RuntimeError("an illegal memory access")
        return features

    failing = SmallEngine(spoil=spoil)
    with serving(failing) as server:
        talk = Talk(server.url)
        session = talk.session()
        check_row(talk.row(session, asked(0)), asked(0))
        died = talk.row(session, asked(1))
        assert (died.status, died.error().error, died.error().position) == (500, "engine", 1)
        wait_until(lambda: server.health.failure is not None, "the engine's end is not noticed")
        health = talk.ask("GET", "/healthz")
        assert (health.status, health.json()["status"]) == (503, "failed")
        assert talk.row(session, asked(2)).status == 500
        assert "the target engine is dead" in caplog.text


def test_the_access_log_has_one_line_a_request_and_no_secret(
    engine: SmallEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(engine, token="a-secret-token") as server:
        talk = Talk(server.url, "a-secret-token")
        session = talk.session(label='run "one"\nrank 0')
        talk.row(session, asked(0))
        Talk(server.url, "a-wrong-token").ask("GET", "/v1/info?token=a-query")

        def logged() -> list[str]:
            return [record.getMessage() for record in caplog.records if record.name == "paceline.access"]

        wait_until(lambda: len(logged()) >= 3, "requests are missing in the log")
        lines = logged()
        assert len(lines) == 3
        assert 'route="POST /v1/sessions/{session}/rows" status=200' in lines[1]
        assert 'label="run \\"one\\"\\nrank 0"' in lines[1]
        assert "status=401" in lines[2]
    for secret in ("a-secret-token", "a-wrong-token", "a-query", session.key):
        assert secret not in caplog.text


def test_a_token_is_asked_for_everywhere_but_at_healthz(engine: SmallEngine) -> None:
    with serving(engine, token="secret") as server:
        for token in (None, "wrong", "", "secretx", "secret secret", "\xe9"):
            talk = Talk(server.url, token)
            assert talk.ask("GET", "/healthz").status == 200
            for path in ("/v1/info", "/metrics", "/v1/weights/embedding", "/nothing"):
                refused = talk.ask("GET", path)
                assert (refused.status, refused.error().error) == (401, "unauthorized")
            assert talk.open().status == 401
        other_scheme = Talk(server.url).ask("GET", "/v1/info", authorization="Basic secret")
        assert other_scheme.status == 401
        assert Talk(server.url, "secret").ask("GET", "/v1/info").status == 200


def test_another_address_demands_a_token(engine: SmallEngine) -> None:
    with pytest.raises(ConfigError, match="token"), serving(engine, host="0.0.0.0"):
        pass
    with serving(SmallEngine(), host="0.0.0.0", token="secret", advertise="gpu-7.example") as server:
        assert server.url == f"http://gpu-7.example:{server.port}"
        talk = Talk(f"http://127.0.0.1:{server.port}", "secret")
        for host in ("127.0.0.1", "gpu-7.example", f"GPU-7.example:{server.port}", socket.gethostname()):
            assert talk.ask("GET", "/v1/info", host=host).status == 200
        assert talk.ask("GET", "/v1/info", host="elsewhere.example").status == 403


def test_an_address_in_use_says_so(engine: SmallEngine) -> None:
    with serving(engine) as server:
        admission = Admission(engine)
        second = ServedTarget(admission, CPU, SmallTables(), dict, host_facts(CPU), over_http())
        with pytest.raises(ConfigError, match="another --host or --port"):
            TargetServer(second, ServerSettings(port=server.port))
        admission.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    directory = tmp_path_factory.mktemp("tls")
    cert, key = directory / "cert.pem", directory / "key.pem"
    words = f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout {key} -out {cert}"
    subprocess.run(
        ["openssl", *words.split(), "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )
    return cert, key


def test_over_tls_a_server_proves_who_it_is(engine: SmallEngine, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    with serving(engine, tls_cert=cert, tls_key=key) as server:
        assert server.url.startswith("https://")
        calls = ServerCalls(server.url, TransportConfig(), PoolConfig(), tls_ca=str(cert))
        assert calls.info().server_id == server.server_id
        with pytest.raises(TransportError):
            ServerCalls(server.url, TransportConfig(), PoolConfig()).info()
    with pytest.raises(ConfigError, match="both or neither"), serving(SmallEngine(), tls_cert=cert):
        pass
    with pytest.raises(ConfigError, match="tls-cert"), serving(SmallEngine(), tls_cert=key, tls_key=cert):
        pass


def test_a_body_that_does_not_come_is_not_waited_for(engine: SmallEngine) -> None:
    with serving(engine, body_timeout_s=0.3) as server:
        talk = Talk(server.url)
        session = talk.session()
        body = encode_request(asked(0))
        slow = Talk(server.url)
        slow.connection.putrequest("POST", f"/v1/sessions/{session.session}/rows")
        for name, value in {**row_headers(session, body), "content-length": str(len(body))}.items():
            slow.connection.putheader(name, value)
        slow.connection.endheaders(body[:100])
        late = slow.answer()
        assert (late.status, late.error().error) == (408, "damaged")
        check_row(talk.row(session, asked(0)), asked(0))


def test_features_are_let_go_of_when_their_reply_has_left(engine: SmallEngine) -> None:
    """Not when the garbage collector finds them: it may take its time."""
    gc.disable()
    try:
        with serving(engine) as server:
            talk = Talk(server.url)
            session = talk.session()
            for position in range(20):
                check_row(talk.row(session, asked(position)), asked(position))
            wait_until(lambda: engine.live["training"] == 0, "features outlive their reply", 5)
            assert engine.most_live_at_all <= 2
    finally:
        gc.enable()
