"""Bodies that somebody made up or that were damaged: thousands of cases, one kind of error, bounded memory."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import DamagedError, WireError
from paceline.schema.features import FeatureSpec
from paceline.schema.parts import Part
from paceline.schema.protocol import ReplyHeader
from paceline.schema.rows import request_features
from paceline.schema.wire import LENGTH_BYTES, decode_reply_head, decode_request, encode_reply_head, encode_request
from paceline.transport.feature_bytes import describe
from random_features import random_features
from small_engine import small_row

MAX_TOKENS = 64
ROW = small_row(3, num_tokens=20)
REQUEST = encode_request(request_features(ROW, "training", part=Part(1, 3)))
HEADER, LAYOUT = describe(3, random_features(ROW, FeatureSpec((1, 3), "supervised", greedy=True, logsumexp=True)))
HEAD = encode_reply_head(HEADER, LAYOUT)[LENGTH_BYTES:]


def mutations(body: bytes, seed: int, num: int) -> Iterator[bytes]:
    """Bits turned, pieces cut, repeated, moved, and numbers made large."""
    draw = np.random.default_rng(seed)
    numbers = [b"-1", b"1e9", b"9" * 30, b"null", b"[]", b'"x"', b"{}", b"true", b"0.5"]
    for _ in range(num):
        changed = bytearray(body)
        for _ in range(int(draw.integers(1, 4))):
            start, end = sorted(int(place) for place in draw.integers(0, len(changed) + 1, 2))
            kind = draw.integers(6)
            if kind == 0 and changed:
                changed[int(draw.integers(len(changed)))] ^= 1 << int(draw.integers(8))
            elif kind == 1:
                del changed[start:end]
            elif kind == 2:
                changed[start:start] = changed[start:end][:200]
            elif kind == 3:
                changed = changed[:end]
            elif kind == 4:
                changed[start:start] = draw.bytes(int(draw.integers(1, 9)))
            else:
                digits = [place for place, byte in enumerate(changed[:700]) if chr(byte).isdigit()]
                if digits:
                    place = digits[int(draw.integers(len(digits)))]
                    changed[place : place + 1] = numbers[int(draw.integers(len(numbers)))]
        yield bytes(changed)


def accepted_request(body: bytes) -> bool:
    try:
        request = decode_request(body, MAX_TOKENS)
    except WireError:
        return False
    assert len(request.tokens) <= MAX_TOKENS + 1
    return True


def accepted_head(text: bytes) -> bool:
    try:
        header = decode_reply_head(text)
    except DamagedError:
        return False
    assert isinstance(header, ReplyHeader)
    return True


def test_the_bodies_themselves_are_accepted() -> None:
    assert accepted_request(REQUEST)
    assert accepted_head(HEAD)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_requests_are_refused_with_one_kind_of_error(seed: int) -> None:
    tracemalloc.start()
    accepted = sum(accepted_request(body) for body in mutations(REQUEST, seed, 1500))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert accepted < 150  # a hash guards everything that matters; blanks and unused bytes do not
    assert peak < 4 << 20


@pytest.mark.parametrize("seed", range(4))
def test_mutated_heads_are_refused_with_one_kind_of_error(seed: int) -> None:
    tracemalloc.start()
    accepted = sum(accepted_head(text) for text in mutations(HEAD, seed, 1500))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert accepted < 1200  # the safetensors table around the header is not ours to read
    assert peak < 4 << 20


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["I32", "F32", "I64", 3, None]),
        "shape": JSON_VALUES | st.lists(st.integers(-(2**70), 2**70), max_size=3),
        "data_offsets": JSON_VALUES | st.lists(st.integers(-(2**70), 2**70), min_size=2, max_size=2),
    },
)
NAMES = ("tokens", "documents", "spans", "positions")
TABLES = st.fixed_dictionaries(
    dict.fromkeys(NAMES, ENTRIES | JSON_VALUES),
    optional={"__metadata__": JSON_VALUES | st.fixed_dictionaries({"position": JSON_VALUES, "spec": JSON_VALUES})},
)


@settings(max_examples=600, deadline=None)
@given(TABLES | JSON_VALUES, st.binary(max_size=300), st.integers(-3, 3))
def test_made_up_tables_are_refused(table: object, data: bytes, wrong_by: int) -> None:
    text = json.dumps(table).encode()
    accepted_request(struct.pack("<Q", max(0, len(text) + wrong_by)) + text + data)
    accepted_head(text)


@settings(max_examples=300, deadline=None)
@given(JSON_VALUES | st.integers(-2, 70).map(str), JSON_VALUES | st.integers(-2, 70).map(str))
def test_made_up_parts_are_refused_unless_they_are_some(part: object, num_parts: object) -> None:
    (length,) = struct.unpack("<Q", REQUEST[:8])
    table = json.loads(REQUEST[8 : 8 + length])
    table["__metadata__"] |= {"part": part, "num_parts": num_parts}
    text = json.dumps(table).encode()
    body = struct.pack("<Q", len(text)) + text + REQUEST[8 + length :]
    if accepted_request(body):
        asked = decode_request(body, MAX_TOKENS).part
        assert 0 <= asked.index < asked.count <= 64


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    assert not accepted_request(data)
    assert not accepted_head(data)


def test_a_table_that_is_nested_without_end_is_refused() -> None:
    text = b"[" * 200_000
    assert not accepted_request(struct.pack("<Q", len(text)) + text)
    assert not accepted_head(text)


@given(st.binary(max_size=8))
def test_a_length_that_no_head_has_is_refused(first: bytes) -> None:
    from paceline.schema.wire import head_length

    try:
        assert 0 < head_length(first) <= 1 << 20
    except DamagedError:
        assert len(first) < LENGTH_BYTES or not 0 < int.from_bytes(first, "little") <= 1 << 20
