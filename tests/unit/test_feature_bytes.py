"""Features as bytes and back: bit by bit, for every dtype and spec, and readable by any safetensors reader."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from paceline.schema.features import Features, FeatureSpec
from paceline.schema.layout import ALIGNMENT, layout_bytes, reply_layout
from paceline.schema.protocol import ReplyHeader
from paceline.schema.rows import request_features
from paceline.schema.wire import LENGTH_BYTES, decode_reply_head, encode_reply_head, head_length
from paceline.transport.feature_bytes import as_bytes, describe, pack, unpack, views
from random_features import ALL_SPECS, random_features
from small_engine import small_info, small_row


def both_ways(features: Features) -> tuple[bytes, bytes, ReplyHeader, dict[str, object]]:
    """(bytes by views, bytes by packing, header, layout)"""
    header, layout = describe(7, features)
    memory = torch.full((layout_bytes(layout),), 255, dtype=torch.uint8)
    pack(features, layout, memory)
    return b"".join(views(features, layout)), memory.numpy().tobytes(), header, dict(layout)


def equal(one: Features, other: Features) -> bool:
    first, second = one.tensors(), other.tensors()
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and as_bytes(first[name]).equal(as_bytes(second[name]))
        for name in first
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("num_tokens", [3, 64])
def test_features_come_back_bit_by_bit(dtype: str, num_tokens: int) -> None:
    row = small_row(1, num_tokens=num_tokens)
    for spec in ALL_SPECS:
        features = random_features(row, spec, dtype)
        by_views, by_packing, header, layout = both_ways(features)
        assert by_views == by_packing
        assert len(by_views) == header.num_bytes
        memory = torch.frombuffer(bytearray(by_views), dtype=torch.uint8)
        back = unpack(header, layout, memory)  # type: ignore[arg-type]
        assert equal(back, features)
        assert (back.row_hash, back.finite, back.layers) == (features.row_hash, features.finite, features.layers)
        assert back.hidden.untyped_storage().data_ptr() == memory.data_ptr()  # views, no copies
        asked = reply_layout(request_features(row, "training"), spec, small_info(dtype=dtype))
        assert layout == asked  # both sides compute the same


def test_a_row_without_supervised_tokens_travels_too() -> None:
    row = small_row(1, num_tokens=5)
    row.spans.resize((0, 2), refcheck=False)
    features = random_features(row, FeatureSpec((0,), "supervised", greedy=True), "bfloat16")
    assert features.final_hidden is not None
    assert features.final_hidden.shape == (0, 8)
    by_views, by_packing, header, layout = both_ways(features)
    assert by_views == by_packing
    assert equal(unpack(header, layout, torch.frombuffer(bytearray(by_views), dtype=torch.uint8)), features)  # type: ignore[arg-type]


def test_features_that_are_not_contiguous_are_sent_in_their_order() -> None:
    features = random_features(small_row(1, num_tokens=6), FeatureSpec((1, 2)), "float32")
    expected = b"".join(views(features, describe(0, features)[1]))
    features.hidden = features.hidden.transpose(0, 2).contiguous().transpose(0, 2)
    assert not features.hidden.is_contiguous()
    by_views, by_packing, _, _ = both_ways(features)
    assert by_views == by_packing == expected


def test_a_body_is_a_safetensors_file() -> None:
    spec = FeatureSpec((1, 4), "supervised", greedy=True, logsumexp=True)
    for dtype in ("float32", "bfloat16", "float16"):
        features = random_features(small_row(2, num_tokens=7), spec, dtype)
        header, layout = describe(2, features)
        head = encode_reply_head(header, layout)
        body = head + b"".join(views(features, layout))
        loaded = safetensors.torch.load(body)
        for name, tensor in features.tensors().items():
            assert loaded[name].equal(tensor), name
        assert len(head) % ALIGNMENT == 0
        assert head_length(body[:LENGTH_BYTES]) == len(head) - LENGTH_BYTES
        assert decode_reply_head(head[LENGTH_BYTES:]) == header


def test_views_copy_nothing_and_keep_the_memory_alive() -> None:
    features = random_features(small_row(2, num_tokens=64), FeatureSpec((1, 4)), "float32")
    expected = features.hidden.numpy().tobytes()
    pieces = views(features, describe(0, features)[1])
    features.hidden[0] += 1
    assert bytes(pieces[0]) == features.hidden.numpy().tobytes() != expected
    seen = features.hidden.numpy().tobytes()
    del features
    assert bytes(pieces[0]) == seen
