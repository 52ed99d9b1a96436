"""Replies and servers are compared with what was asked for; every difference names both sides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from paceline.client.checks import check_header, check_limits, check_reply, check_specs, check_target
from paceline.errors import CaptureMismatchError, HandshakeError
from paceline.schema.features import Features, FeatureSpec, FinalHidden
from paceline.schema.layout import reply_bytes, reply_layout
from paceline.schema.limits import Limits, RowSizes
from paceline.schema.parts import Part, requested_part
from paceline.schema.rows import request_features
from paceline.schema.target_info import LogitTransform
from paceline.transport.feature_bytes import describe
from small_engine import HIDDEN_SIZE, SmallEngine, small_info, small_row

SPEC = FeatureSpec((1, 4), final_hidden="supervised", greedy=True, logsumexp=True)
REQUEST = request_features(small_row(3, num_tokens=7), "training")  # spans [1, 2) and [3, 7)


@pytest.fixture
def features() -> Features:
    engine = SmallEngine()
    features: Features = engine.capture(REQUEST, SPEC).result(10)
    engine.close()
    return features


def check(features: Features, spec: FeatureSpec = SPEC) -> None:
    check_reply("server-0", REQUEST, spec, small_info(), features)


def test_the_right_reply_passes(features: Features) -> None:
    check(features)


def spoiled(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Features], None]:
    return lambda features: setattr(features, name, change(getattr(features, name)))


def with_value(place: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[place] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoiled("hidden", lambda t: t[:5]), "with 5 tokens, 7 were sent"),
        (lambda f: setattr(f, "row_hash", "0" * 16), f"hash {'0' * 16}, {REQUEST.row_hash()} was sent"),
        (lambda f: setattr(f, "layers", (1, 3)), r"layers \[1, 3\], \[1, 4\] were asked for"),
        (lambda f: setattr(f, "finite", False), "finite = False, expected True"),
        (lambda f: setattr(f, "greedy", None), "with tensors final_hidden, .* final_hidden, final_index, greedy"),
        (spoiled("hidden", lambda t: t.bfloat16()), r"hidden bfloat16\[7, 2, 8\], expected float32\[7, 2, 8\]"),
        (spoiled("hidden", lambda t: t[:, :1]), r"hidden float32\[7, 1, 8\], expected float32\[7, 2, 8\]"),
        (spoiled("final_hidden", lambda t: t[:4]), r"final_hidden float32\[4, 8\], expected float32\[5, 8\]"),
        (spoiled("greedy", lambda t: t.long()), r"greedy int64\[7\], expected int32\[7\]"),
        (spoiled("logsumexp", lambda t: t[:6]), r"logsumexp float32\[6\], expected float32\[7\]"),
        (spoiled("greedy", with_value(2, 50)), r"greedy tokens .*\.\.50, the vocabulary is 0\.\.49"),
        (spoiled("greedy", with_value(2, -1)), r"greedy tokens -1\.\."),
        (spoiled("final_index", with_value(1, 2)), r"final_index\[1\] = 2, expected 3"),
        (spoiled("final_index", with_value(4, 7)), r"final_index\[4\] = 7, expected 6"),
    ],
)
def test_a_wrong_reply_is_fatal_and_names_both_values(
    features: Features, spoil: Callable[[Features], None], message: str
) -> None:
    spoil(features)
    with pytest.raises(CaptureMismatchError, match=message) as caught:
        check(features)
    assert "server-0 answered row 3" in str(caught.value)
    assert not caught.value.retryable


@pytest.mark.parametrize("final_hidden", ["none", "supervised", "all"])
@pytest.mark.parametrize("more", [False, True])
def test_bytes_are_known_before_asking(final_hidden: str, more: bool) -> None:
    spec = FeatureSpec((0, 2, 5), final_hidden, greedy=more, logsumexp=more)  # type: ignore[arg-type]
    engine = SmallEngine()
    features = engine.capture(REQUEST, spec).result(10)
    engine.close()
    num_final = {"none": 0, "supervised": 5, "all": 7}[final_hidden]
    tensors = [7 * 3 * HIDDEN_SIZE * 4, num_final * HIDDEN_SIZE * 4, num_final * 4] + [7 * 4, 7 * 4] * more
    assert features.num_bytes == sum(tensors)
    by_hand = sum(math.ceil(num_bytes / 256) * 256 for num_bytes in tensors)
    assert reply_bytes(REQUEST, spec, small_info()) == by_hand
    check(features, spec)


def test_bytes_follow_the_targets_dtype() -> None:
    spec = FeatureSpec((0,))
    sizes = [reply_bytes(REQUEST, spec, small_info(dtype=dtype)) for dtype in ("bfloat16", "float32")]
    assert sizes == [7 * HIDDEN_SIZE * 2 + 144, 7 * HIDDEN_SIZE * 4 + 32]  # and the gaps up to multiples of 256


@pytest.mark.parametrize(
    ("fact", "value", "message"),
    [
        ("weight_fingerprint", "w2", "weight_fingerprint: server-1 has 'w2', this run expects 'w'"),
        ("tokenizer_fingerprint", "t2", "tokenizer_fingerprint: server-1 has 't2'"),
        ("dtype", "bfloat16", "dtype: server-1 has 'bfloat16', this run expects 'float32'"),
        ("hidden_size", 16, "hidden_size: server-1 has 16, this run expects 8"),
        ("vocab_size", 51, "vocab_size"),
        ("logit_transform", LogitTransform(soft_cap=30.0), "logit_transform: .*30.0.*None"),
    ],
)
def test_another_target_is_refused_with_both_sides_named(fact: str, value: object, message: str) -> None:
    check_target("server-1", small_info(), small_info())
    with pytest.raises(HandshakeError, match=message):
        check_target("server-1", small_info(**{fact: value}), small_info())


def test_the_same_target_under_another_path_is_the_same_target() -> None:
    check_target("server-1", small_info(name="/mnt/b/small"), small_info(name="/mnt/a/small"))


def test_all_differences_are_told_at_once() -> None:
    with pytest.raises(HandshakeError, match=r"(?s)hidden_size.*dtype|dtype.*hidden_size"):
        check_target("server-1", small_info(dtype="float16", hidden_size=9), small_info())


def test_capture_layers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(HandshakeError, match=r"'training' ask for capture layers \[6\], server-1 has 0\.\.5"):
        check_specs("server-1", small_info(), {"training": FeatureSpec((5, 6))})


LIMITS = Limits(layers=(1, 4, 5), max_document_tokens=100, max_row_tokens=300)


def test_a_server_that_takes_what_will_be_asked_passes() -> None:
    check_limits("server-1", LIMITS, {"training": FeatureSpec((1, 5))}, RowSizes(100, 300))
    check_limits("server-1", Limits(), {"training": FeatureSpec((0, 2))}, RowSizes(10**9, 10**9))


@pytest.mark.parametrize(
    ("layers", "sizes", "message"),
    [
        ((1, 2), RowSizes(), r"'training' ask for capture layers \[2\].* server-1 was started for \[1, 4, 5\]"),
        ((1, 5), RowSizes(101, 300), "longest document of these rows has 101 tokens, server-1 takes 100: lower data.r"),
        ((1, 5), RowSizes(100, 301), "longest row has 301 tokens, server-1 takes 300: lower data.row_tokens, or raise"),
    ],
)
def test_a_server_that_would_refuse_a_row_later_is_refused_before(
    layers: tuple[int, ...], sizes: RowSizes, message: str
) -> None:
    with pytest.raises(HandshakeError, match=message):
        check_limits("server-1", LIMITS, {"training": FeatureSpec(layers)}, sizes)


WIDE = replace(SPEC, halo=2)


@pytest.mark.parametrize("final_hidden", ["none", "supervised", "all"])
def test_the_right_part_passes_and_another_part_or_its_halo_does_not(final_hidden: FinalHidden) -> None:
    spec = replace(WIDE, final_hidden=final_hidden)
    engine = SmallEngine()
    whole = engine.capture(REQUEST, spec).result(10)
    engine.close()
    for part in (Part(index, 5) for index in range(5)):  # [0, 2), [2, 4), [4, 6), [6, 7), none
        request = replace(REQUEST, part=part)
        right = requested_part(request, spec, whole)
        check_reply("server-0", request, spec, small_info(), right)
        header, layout = describe(3, right)
        assert layout == reply_layout(request, spec, small_info(), part)
        check_header("server-0", request, spec, small_info(), header)
    request = replace(REQUEST, part=Part(1, 5))
    right = requested_part(request, spec, whole)
    other = requested_part(replace(REQUEST, part=Part(2, 5)), spec, whole)
    assert whole.greedy is not None
    cases = [
        (whole, "with part 0 of 1, part 1 of 5 was asked for"),
        (other, "with part 2 of 5, part 1 of 5 was asked for"),
        (replace(right, hidden=right.hidden[:1]), "with 1 tokens, 2 were sent"),
        (replace(right, greedy=whole.greedy[2:4]), r"greedy int32\[2\], expected int32\[4\]"),
    ]
    if right.final_index is not None:
        expected = {"all": [2, 3, 4, 5], "supervised": [3, 4, 5]}[final_hidden]
        assert right.final_index.tolist() == expected
        message = rf"final_index\[0\] = {expected[0] + 1}, expected {expected[0]}"
        cases.append((replace(right, final_index=right.final_index + 1), message))
    for wrong, message in cases:
        with pytest.raises(CaptureMismatchError, match=message):
            check_reply("server-0", request, spec, small_info(), wrong)
    header, _ = describe(3, other)
    with pytest.raises(CaptureMismatchError, match="with part 2 of 5, part 1 of 5 was asked for"):
        check_header("server-0", request, spec, small_info(), header)
