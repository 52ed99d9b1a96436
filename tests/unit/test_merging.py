"""Several rows in one forward: each gets its own features, and nobody another's mistake."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from paceline.config.target import TargetConfig
from paceline.errors import CaptureMismatchError, StoppedError
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.rows import RowRequest, request_features
from paceline.target.hf.engine import HFEngine
from paceline.target.hf.merging import MergingEngine, merge_requests, split_features
from small_engine import SmallEngine, expected_hidden, small_row
from tiny import tiny_request

SPEC = FeatureSpec((1, 3), final_hidden="supervised", greedy=True)


def asked(position: int) -> RowRequest:
    return request_features(small_row(position), "training")


def check(features: Features, request: RowRequest) -> None:
    assert features.row_hash == request.row_hash()
    assert torch.equal(features.hidden, expected_hidden(request.tokens, features.layers))
    if features.final_index is not None:
        supervised = [i for start, end in request.spans for i in range(start, end)]
        assert features.final_index.tolist() == supervised
        assert features.final_hidden is not None
        assert len(features.final_hidden) == len(supervised)


def test_rows_that_wait_for_the_engine_are_computed_together() -> None:
    inner = SmallEngine(num_slots=1)
    inner.hold(0)
    engine = MergingEngine(inner, 3)
    assert not engine.info().deterministic
    answers = [engine.capture(asked(position), SPEC) for position in range(5)]
    other = engine.capture(asked(5), FeatureSpec((2,)))
    assert engine.room() == 0
    inner.let_go(0)
    for position, answer in enumerate(answers):
        check(answer.result(10), asked(position))
    check(other.result(10), asked(5))
    assert [position for _, position in inner.submitted] == [0, 1, 4, 5]  # 2 and 3 went with 1
    engine.close()


def test_a_row_that_fails_or_is_not_finite_fails_alone() -> None:
    def spoil(request: RowRequest, features: Features) -> Features:
        hashes = {asked(2).row_hash(): "mismatch", asked(3).row_hash(): "infinite"}
        fault = hashes.get(
            request.row_hash(), "mismatch" if request.position == 1 and len(request.documents) > 3 else ""
        )
        if fault == "mismatch":
            raise CaptureMismatchError(f"row {request.position} cannot be right")
        features.finite = fault != "infinite"
        return features

    inner = SmallEngine(num_slots=1, spoil=spoil)
    inner.hold(0)
    engine = MergingEngine(inner, 3)
    answers = [engine.capture(asked(position), SPEC) for position in range(5)]
    inner.let_go(0)
    for position in (0, 1, 4):
        check(answers[position].result(10), asked(position))
    with pytest.raises(CaptureMismatchError, match="row 2"):
        answers[2].result(10)
    assert not answers[3].result(10).finite
    engine.close()


def test_rows_that_wait_when_it_is_closed_are_told() -> None:
    inner = SmallEngine(num_slots=1)
    inner.hold(0)
    engine = MergingEngine(inner, 2)
    first, second = engine.capture(asked(0), SPEC), engine.capture(asked(1), SPEC)
    engine.close()
    check(first.result(10), asked(0))
    for answer in (second, engine.capture(asked(2), SPEC)):
        with pytest.raises(StoppedError):
            answer.result(10)


def test_rows_of_a_real_target_computed_together_are_what_they_are_alone(tiny_target: Path) -> None:
    spec = FeatureSpec((0, 2), final_hidden="supervised", greedy=True, logsumexp=True)
    requests = [
        tiny_request((5, 7), seed=1, spans=[(1, 4), (6, 9)]),
        tiny_request((11,), seed=2),
        tiny_request((3, 1, 8), seed=3, spans=[(0, 3)]),
    ]
    engine = HFEngine(TargetConfig(model=str(tiny_target), device="cpu"))
    try:
        together = split_features(engine.capture(merge_requests(requests), spec).result(60), requests)
        for request, features in zip(requests, together, strict=True):
            alone = engine.capture(request, spec).result(60)
            assert features.row_hash == alone.row_hash
            for name, tensor in alone.tensors().items():
                assert tensor.shape == features.tensors()[name].shape, name
                assert torch.allclose(features.tensors()[name].float(), tensor.float(), atol=1e-4), name
        assert np.isclose(sum(one.computed_s for one in together), together[0].computed_s * 35 / 12)
    finally:
        engine.close()
