"""A server among hostile clients: each is refused with the reason, memory stays flat, and it serves on."""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import random
import re
import secrets
import socket
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from forking import Commands
from paceline.schema.parts import Part
from paceline.schema.protocol import CHECKSUM_HEADER, MAX_CONTROL_BYTES, PROTOCOL_VERSION, SessionReply
from paceline.schema.rows import RowRequest
from paceline.schema.wire import encode_request
from served import Served, start_servers
from talk import Answer, Talk, row_headers
from tiny import tiny_request

MAX_ROW_TOKENS = 4096
STRANGE: list[Any] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    1e308,
    "",
    "x" * 5000,
    [],
    {},
    [[[]]],
    {"a": {"b": []}},
    "F64",
    [-1],
]


@pytest.fixture(scope="module")
def token() -> str:
    return secrets.token_hex(16)


@pytest.fixture(scope="module")
def server(commands: Commands, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory, token: str) -> Served:
    directory = tmp_path_factory.mktemp("hostile")
    file = directory / "token"
    file.touch(0o600)
    file.write_text(token + "\n")
    options = ("--token-file", str(file), "--max-row-tokens", str(MAX_ROW_TOKENS), "--log-level", "WARNING")
    (server,) = start_servers(commands, tiny_target, directory, 1, *options)
    return server


@pytest.fixture
def talk(server: Served, token: str) -> Talk:
    return Talk(server.url, token)


def rss_bytes(server: Served) -> int:
    (kib,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{server.command.pid}/status").read_text())
    return 1024 * int(kib)


def post_row(talk: Talk, session: SessionReply, body: bytes) -> Answer:
    return talk.ask("POST", f"/v1/sessions/{session.session}/rows", body, **row_headers(session, body))


def check_serves(talk: Talk) -> None:
    assert talk.row(talk.session(), tiny_request((5, 7))).status == 200


def split_body(body: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", body[:8])
    return json.loads(body[8 : 8 + length]), body[8 + length :]


def join_body(table: object, data: bytes) -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def garbled(draw: random.Random, body: bytes) -> bytes:
    """A row request with something wrong in it; one in many happens to be right."""
    table, data = split_body(body)
    kind = draw.randrange(8)
    if kind == 0:  # bytes of the header
        spoiled = bytearray(body)
        for _ in range(draw.randint(1, 8)):
            spoiled[draw.randrange(len(body) - len(data))] = draw.randrange(256)
        return bytes(spoiled)
    if kind == 1:
        return body[: draw.randrange(len(body))]
    if kind == 2:
        return struct.pack("<Q", draw.choice([0, 1, 2**20 + 1, 2**40, 2**64 - 1, draw.randrange(2**64)])) + body[8:]
    if kind == 3:
        return draw.randbytes(draw.randrange(2000))
    if kind == 4:
        text = draw.choice([b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b"nul", b"\xff\xfe{}", b'"' + b"a" * 9000])
        return struct.pack("<Q", len(text)) + text + data
    changed = copy.deepcopy(table)
    name = draw.choice(list(changed))
    if kind == 5:
        changed[name] = draw.choice(STRANGE)
    elif kind == 6:
        changed[name][draw.choice(list(changed[name]))] = draw.choice(STRANGE)
    else:
        numbers = [draw.choice([0, 1, -1, 3, 2**31, 2**62, 10**30]) for _ in range(draw.randrange(4))]
        changed[name][draw.choice(["shape", "data_offsets"])] = numbers
    return join_body(changed, data)


def test_thousands_of_garbled_rows_are_refused_and_memory_stays_flat(talk: Talk, server: Served) -> None:
    draw = random.Random(7)
    session, body = talk.session(), encode_request(tiny_request((5, 7), spans=[(1, 4), (6, 9)]))
    assert post_row(talk, session, body).status == 200
    after_1000 = 0
    refused = 0
    for number in range(4000):
        spoiled = garbled(draw, body)
        answer = post_row(talk, session, spoiled)
        assert answer.status == 200 or 400 <= answer.status < 500, (spoiled[:300], answer)
        if answer.status != 200:
            refused += 1
            assert answer.error().error in ("wrong_request", "mismatch")
            assert answer.error().message
        if number == 999:
            after_1000 = rss_bytes(server)
    assert refused > 3600
    assert rss_bytes(server) < 1.05 * after_1000
    check_serves(talk)


def test_numbers_that_no_row_of_this_target_has_are_refused_by_name(talk: Talk) -> None:
    session, right = talk.session(), tiny_request((5, 7), spans=[(1, 4)])

    def changed(**arrays: Any) -> RowRequest:
        fields = {name: getattr(right, name) for name in ("tokens", "documents", "spans", "positions")}
        fields |= {name: np.asarray(array, np.int32) for name, array in arrays.items()}
        return RowRequest(position=3, spec="training", **fields)

    cases = {
        "token id 300": changed(tokens=[*right.tokens[:-1], 300]),
        "token id -1": changed(tokens=[-1, *right.tokens[1:]]),
        "documents": changed(documents=[0, 5, 11]),
        "positions": changed(positions=[list(range(12))]),
        "spans": changed(spans=[[4, 1]]),
        "T > 0": changed(tokens=[], positions=np.zeros((1, 0))),
    }
    for words, request in cases.items():
        answer = talk.row(session, request)
        assert (answer.status, answer.error().error, answer.error().position) == (422, "mismatch", 3), words
        assert words in answer.error().message
    unknown = talk.row(
        session, RowRequest(0, "evaluation", right.tokens, right.documents, right.spans, right.positions)
    )
    assert (unknown.status, unknown.error().error) == (400, "wrong_request")
    assert "'evaluation'" in unknown.error().message
    assert "training" in unknown.error().message
    table, data = split_body(encode_request(right))
    table["extras.pixels"] = {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}
    assert post_row(talk, session, join_body(table, data)).status == 400
    check_serves(talk)


def test_a_row_that_is_too_long_is_refused_whatever_says_how_long_it_is(talk: Talk, server: Served) -> None:
    session, before = talk.session(), rss_bytes(server)
    long = talk.row(session, tiny_request((1_000_000,)))
    assert (long.status, long.error().error) == (413, "wrong_request")
    over = talk.row(session, tiny_request((MAX_ROW_TOKENS + 2,)))
    assert (over.status, over.error().error) == (400, "wrong_request")
    assert f"{MAX_ROW_TOKENS}" in over.error().message
    for path in (f"/v1/sessions/{session.session}/rows", "/v1/sessions", "/v1/weights/embedding"):
        chunks = iter([b"x" * 65_536] * (2 * MAX_CONTROL_BYTES // 65_536))
        talk.connection.request(
            "POST", path, chunks, {**row_headers(session, b""), "authorization": f"Bearer {talk.token}"}
        )
        answer = talk.answer()
        assert (answer.status, answer.error().error) == (413, "wrong_request")
    assert rss_bytes(server) - before < 64 << 20
    check_serves(talk)


def test_what_was_damaged_on_the_way_is_told_apart_from_what_was_wrong(talk: Talk) -> None:
    session, body = talk.session(), encode_request(tiny_request((5, 7)))
    path, headers = f"/v1/sessions/{session.session}/rows", row_headers(session, body)
    damaged = talk.ask("POST", path, body[:-1] + bytes([body[-1] ^ 1]), **headers)
    assert (damaged.status, damaged.error().error) == (400, "damaged")
    for wrong in ("", "0" * 15, "z" * 16, "0" * 17):
        assert talk.ask("POST", path, body, **{**headers, CHECKSUM_HEADER: wrong}).error().error == "damaged"
    del headers[CHECKSUM_HEADER]
    missing = talk.ask("POST", path, body, **headers)
    assert (missing.status, missing.error().error) == (400, "damaged")  # one turned bit in its name is enough
    assert CHECKSUM_HEADER in missing.error().message
    assert talk.ask("POST", "/v1/sessions", b"{}", **{CHECKSUM_HEADER: "0" * 16}).error().error == "damaged"


def test_nobody_without_the_token_or_under_another_name_gets_in(server: Served, token: str) -> None:
    for wrong in (None, "", token[:-1], token + "0", token.upper(), "Bearer " + token):
        talk = Talk(server.url, wrong)
        for answer in (
            talk.ask("GET", "/v1/info"),
            talk.open(),
            talk.ask("POST", "/v1/sessions/x/rows", b"x" * 100_000),
        ):
            assert (answer.status, answer.error().error) == (401, "unauthorized")
            assert token not in answer.error().message
    talk = Talk(server.url, token)
    for host in (
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "[::2]",
        "",
        "10.0.0.1",
    ):
        answer = talk.ask("GET", "/healthz", host=host)
        assert answer.status in (400, 403), host
        assert answer.error().message
    for host in ("localhost", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"):
        assert talk.ask("GET", "/v1/info", host=host).status == 200


def test_paths_and_methods_that_are_none_are_refused_in_the_same_form(talk: Talk) -> None:
    paths = [
        "/", "/v1", "/v1/", "/healthz/", "/docs", "/v1/weights/", "/v1/weights/..%2f..%2fetc%2fpasswd",
        "/v1/weights/../../../etc/passwd", "/v1/weights/model.norm.weight", "/v1/tokenizer/tokenizer.json",
        "/v1/tokenizer%00", "//etc/passwd", "/v1/sessions/..%2f..%2fx/rows/y", "/%ff%fe", "/v1/weights/embedding/x",
    ]  # fmt: skip
    for path in paths:
        answer = talk.ask("GET", path)
        assert (answer.status, answer.error().error) == (404, "not_found"), path
    for method, path in (
        ("PUT", "/v1/info"),
        ("GET", "/v1/sessions"),
        ("DELETE", "/healthz"),
        ("TRACE", "/v1/info"),
        ("BREW", "/healthz"),
    ):
        answer = talk.ask(method, path)
        assert (answer.status, answer.error().error) == (405, "not_found"), (method, path)
    for key in ("", "0" * 64, "\xff" * 64):
        for session in ("0" * 32, "x" * 5000, "..", "%00"):
            answer = talk.ask("POST", f"/v1/sessions/{session}/renew", **{"paceline-session-key": key})
            assert (answer.status, answer.error().error) == (404, "unknown_session")


def test_garbled_control_calls_are_refused_without_their_secrets_told(talk: Talk) -> None:
    draw = random.Random(11)
    right = {
        "protocol": PROTOCOL_VERSION,
        "specs": {"training": {"layers": [1]}},
        "client": {"host_id": "here", "device": "cpu"},
        "offers": [{"name": "http"}],
        "lease_s": 5,
        "group": "ab" * 16,
    }
    bodies = [b"", b"null", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"protocol":' * 1000, b"9" * 10_000]
    for _ in range(500):
        changed = copy.deepcopy(right)
        inside: Any = changed
        while isinstance(inside, dict) and draw.random() < 0.6 and inside:
            parent, key = inside, draw.choice(list(inside))
            inside = parent[key]
        parent[key] = draw.choice(STRANGE)
        bodies.append(json.dumps(changed).encode())
    for body in bodies:
        answer = talk.ask("POST", "/v1/sessions", body)
        assert answer.status == 200 or 400 <= answer.status < 500, (body[:200], answer)
        if answer.status == 200:
            talk.of_session("DELETE", SessionReply.model_validate_json(answer.body))
        else:
            assert answer.error().message
    leaky = talk.ask("POST", "/v1/sessions", json.dumps({**right, "secret": "my-password"}).encode())
    assert (leaky.status, "my-password" in leaky.error().message) == (400, False)
    check_serves(talk)


def test_parts_that_are_none_and_groups_of_others_are_refused_by_name(talk: Talk) -> None:
    group = secrets.token_hex(16)
    session, outside, other = talk.session(group=group), talk.session(), talk.session(group=secrets.token_hex(16))
    request = tiny_request((5, 7), spans=[(1, 4)])
    table, data = split_body(encode_request(replace(request, part=Part(1, 2))))
    assert post_row(talk, session, join_body(table, data)).status == 200
    for part, num_parts in (
        ("2", "2"), ("-1", "2"), ("0", "0"), ("0", "65"), ("0", "1" + "0" * 4000), ("x", "2"), (None, "2"), ([], {}),
        ("1", "1e3"), (1e308, "2"), ("0", float("inf")), ("9" * 5000, "2"), (True, "\ud800"),
    ):  # fmt: skip
        changed = {**table, "__metadata__": {**table["__metadata__"], "part": part, "num_parts": num_parts}}
        answer = post_row(talk, session, join_body(changed, data))
        assert (answer.status, answer.error().error) == (400, "wrong_request"), (part, num_parts)
        assert "part" in answer.error().message
    for asking, asked, words in (
        (session, replace(request, part=Part(0, 3)), "the group's rows have 2"),
        (outside, replace(request, part=Part(0, 2)), "a session of no group"),
    ):
        answer = talk.row(asking, asked)
        assert (answer.status, answer.error().error) == (400, "wrong_request"), words
        assert words in answer.error().message
    disagreeing = talk.open(group=group, specs={"training": {"layers": [2]}})
    assert (disagreeing.status, disagreeing.error().error) == (409, "handshake")
    assert group not in disagreeing.error().message
    for wrong in ("", "ab", "AB" * 16, "zz" * 16, "a" * 65, "../" * 11, 7, [group], {"key": group}):
        answer = talk.open(group=wrong)
        assert (answer.status, answer.error().error) == (400, "wrong_request"), wrong
        assert "group" in answer.error().message
    num_computed = computed_rows(talk)
    assert talk.row(other, replace(request, part=Part(1, 2))).status == 200  # its own row, not that of the first group
    assert computed_rows(talk) == num_computed + 1
    for key in (outside.key, other.key):
        stolen = talk.row(session.model_copy(update={"key": key}), replace(request, part=Part(0, 2)))
        assert (stolen.status, stolen.error().error) == (403, "unauthorized")
    check_serves(talk)


def computed_rows(talk: Talk) -> float:
    (value,) = re.findall(
        r"^paceline_computed_rows_total (\S+)$", talk.ask("GET", "/metrics").body.decode(), re.MULTILINE
    )
    return float(value)


def test_what_is_no_http_is_answered_or_cut_off(server: Served, talk: Talk) -> None:
    draw = random.Random(13)
    parts = urlsplit(server.url)
    assert parts.port is not None
    oversized = b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"x-filler: " + b"y" * 200_000
    twice = b"POST /v1/sessions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab"
    smuggled = b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked, gzip\r\n\r\n"
    for words in (
        oversized, twice, smuggled, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(200), b"\r\n" * 1000,
        *(draw.randbytes(draw.randrange(1, 3000)) for _ in range(100)),
    ):  # fmt: skip
        with socket.create_connection(("127.0.0.1", parts.port), timeout=10) as raw:
            with contextlib.suppress(OSError):
                raw.sendall(words)
                raw.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                answer = raw.recv(100_000)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer[:200]
    check_serves(talk)


def test_connections_that_are_left_in_the_middle_cost_nothing(server: Served, talk: Talk, token: str) -> None:
    session, body = talk.session(), encode_request(tiny_request((500,)))
    path, headers = f"/v1/sessions/{session.session}/rows", row_headers(session, body)
    headers |= {"authorization": f"Bearer {token}", "content-length": str(len(body))}

    def leave(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", urlsplit(server.url).port, timeout=10)
        connection.putrequest("POST", path)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders(body[: len(body) * number // 100])
        connection.close()

    for number in range(101):
        leave(number)
    before, num_files = rss_bytes(server), open_files(server)
    for _ in range(5):
        for number in range(101):
            leave(number)
    check_serves(talk)
    assert open_files(server) < num_files + 50
    assert rss_bytes(server) < 1.05 * before


def open_files(server: Served) -> int:
    return len(list(Path(f"/proc/{server.command.pid}/fd").iterdir()))


def test_the_token_stands_nowhere_in_the_log(server: Served, token: str) -> None:
    log = server.command.output
    assert "is served at" in log
    assert token not in log
