"""The self-test in hard cases: faults that begin late in a long text, tokens that rounding sends to other experts."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from paceline.config.target import TargetConfig
from paceline.errors import ConfigError
from paceline.launch.selftest import SelfTest, observe_own
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.target.hf.engine import HFEngine
from paceline.target.selftest.reference import observe
from paceline.target.selftest.run import SelfTestResult, run_selftest
from paceline.target.selftest.texts import build_texts, plan_captures
from paceline.target.selftest.tolerance import Tolerance, choose_tolerance
from tiny import save_tiny_target
from wrong_engines import (
    Change,
    WrongEngine,
    before_the_norm,
    chunk_without_its_past,
    documents_see_each_other,
    layer_before,
    next_layer,
    not_finite,
    one_token_documents_spoilt,
    other_greedy,
    rerouted,
    shared_prefix_cache,
    shifted_by_one,
    spoil,
    stale_prefix_cache,
)

LAYERS = (0, 1, 2)
FP32 = choose_tolerance("float32")
ROUTED = choose_tolerance("bfloat16", experts=True)
"""An engine of experts in bf16 is held against what fp32 says with these limits."""


def config_of(target: Path, **changes: object) -> TargetConfig:
    return TargetConfig.model_validate({"model": str(target), "device": "cpu", **changes})


@pytest.fixture(scope="module")
def engine(tiny_target: Path) -> Iterator[HFEngine]:
    with contextlib.closing(HFEngine(config_of(tiny_target))) as engine:
        yield engine


@pytest.fixture(scope="module")
def far(tiny_target: Path) -> SelfTest:
    """With the text of 2,304 tokens."""
    model = AutoModelForCausalLM.from_pretrained(tiny_target, attn_implementation="sdpa").eval()
    texts = build_texts(261, 4096)
    return SelfTest(texts, observe(model, texts, ""), FP32)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HFEngine]:
    path = save_tiny_target(tmp_path_factory.mktemp("experts") / "t", "qwen3_moe")
    with contextlib.closing(HFEngine(config_of(path))) as engine:
        yield engine


@pytest.fixture(scope="module")
def routed(experts: HFEngine) -> SelfTest:
    texts = build_texts(261)
    return SelfTest(texts, observe(experts.model, texts, ""), ROUTED)


def result_of(test: SelfTest, engine: object, limits: Tolerance | None = None) -> SelfTestResult:
    return run_selftest(engine, test.texts, test.reference, LAYERS, limits or test.tolerance)  # type: ignore[arg-type]


def test_a_text_longer_than_an_engine_computes_at_once_is_compared_where_the_target_takes_it(far: SelfTest) -> None:
    (long,) = [text for text in far.texts.documents if text.windows]
    assert len(long.tokens) == 2304
    assert long.places[-1] == 2303
    assert len(far.reference.final_hidden) == far.texts.bounds[-1] < len(far.texts.tokens) / 2
    assert not any(text.windows for text in build_texts(261, 2304).documents)
    assert build_texts(261, 2304).text_hash() != far.texts.text_hash(), "the reference is kept under another name"
    asked = [one for one in plan_captures(far.texts, 6) if far.texts.documents[one.documents[0]] is long]
    assert len(asked) == len(set(asked)) == 6
    assert all(one.alone and not one.again for one in asked)


def test_an_engine_that_is_right_passes_with_the_long_text(far: SelfTest, engine: HFEngine) -> None:
    result = result_of(far, engine)
    assert (result.problem, result.unproven, result.num_wrong_tokens) == (None, None, 0)
    assert max(line.relative for line in result.lines) < 1e-5


@pytest.mark.parametrize("limits", [FP32, choose_tolerance("bfloat16"), ROUTED], ids=str)
@pytest.mark.parametrize(("first", "told"), [(2048, 2272), (2290, 2288), (600, 736)])
def test_a_chunk_that_does_not_see_those_before_is_found_however_short_it_is(
    far: SelfTest, engine: HFEngine, limits: Tolerance, first: int, told: int
) -> None:
    """2,290: the last 14 tokens of 2,304."""
    problem = result_of(far, WrongEngine(engine, chunk_without_its_past(first)), limits).problem
    assert problem is not None
    assert f"right in 320 tokens and wrong from about token {told} of 2304 on: a prefill in chunks" in problem


def test_a_sliding_window_that_is_not_the_targets_is_found(tmp_path: Path) -> None:
    """Of 1,024 tokens: nothing of 774 tokens shows it."""
    wide = save_tiny_target(tmp_path / "wide", "mistral", sliding_window=None)
    narrow = shutil.copytree(wide, tmp_path / "narrow")
    file = narrow / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sliding_window": 1024}))
    model = AutoModelForCausalLM.from_pretrained(narrow, attn_implementation="sdpa").eval()
    texts = build_texts(261, 4096)
    test = SelfTest(texts, observe(model, texts, ""), FP32)
    with contextlib.closing(HFEngine(config_of(wide))) as engine:
        problem = result_of(test, engine).problem
    assert problem is not None
    assert "right in 320 tokens and wrong from about token 1248 of 2304 on" in problem


def test_an_engine_that_takes_no_such_long_text_is_compared_without_it_and_this_is_said(
    far: SelfTest, engine: HFEngine
) -> None:
    class Short(WrongEngine):
        def capture(self, request: RowRequest, spec: FeatureSpec) -> Future[Features]:
            if len(request.tokens) < 1024:
                return super().capture(request, spec)
            future: Future[Features] = Future()
            future.set_exception(ConfigError("2304 tokens for an engine that takes 1023"))
            return future

    result = result_of(far, Short(engine, lambda wrong, request, spec: wrong.ask(request, spec)))
    assert result.problem is None
    (said,) = [line for line in result.describe() if "not compared" in line]
    assert "prefill in chunks, sliding windows, RoPE for long texts (2304 tokens for an engine that takes 1023)" in said


def test_a_target_of_few_positions_is_compared_without_the_long_text_and_this_is_said(tmp_path: Path) -> None:
    config = config_of(save_tiny_target(tmp_path / "t", max_position_embeddings=1024))
    with contextlib.closing(HFEngine(config)) as engine:
        result = observe_own(config, engine).run(config, engine)
    assert result.problem is None
    assert "RoPE for long texts (the target has 1024 positions)" in "\n".join(result.describe())


def test_a_token_that_goes_to_other_experts_is_no_fault_of_an_engine(routed: SelfTest, experts: HFEngine) -> None:
    wrong = WrongEngine(experts, rerouted)
    result = result_of(routed, wrong)
    assert result.problem is None
    moved = [text for text in routed.texts.documents if text.is_short and int(text.tokens[0]) % 4 == 0]
    assert 1 <= len(moved) < len([text for text in routed.texts.documents if text.is_short]) / 2
    assert any(len(text.tokens) == 1 for text in moved)
    strict = [replace(ROUTED, routed=False), choose_tolerance("bfloat16")]
    assert all(result_of(routed, WrongEngine(experts, rerouted), limits).problem is not None for limits in strict)


def test_a_fault_of_more_tokens_than_other_experts_would_have_is_found(routed: SelfTest, experts: HFEngine) -> None:
    """Eight of the 192 tokens and more that a document has."""

    def change(wrong: WrongEngine, request: RowRequest, spec: FeatureSpec) -> Features:
        return spoil(wrong.ask(request, spec), request, lambda tokens: len(tokens) >= 32, 8)

    assert result_of(routed, WrongEngine(experts, change)).problem is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (next_layer, "layer 0 asked, layer 1's output received"),
        (layer_before, "layer 1 asked, layer 0's output received"),
        (shifted_by_one, "tokens are shifted by one: token t has the state of token t + 1"),
        (before_the_norm, "final hidden asked, layer 3's output, before the final norm, received"),
        (documents_see_each_other, "documents of a row see each other"),
        (stale_prefix_cache, "right the first time and wrong the second: a cache of prefixes"),
        (shared_prefix_cache, "wrong where a document begins like an earlier one: a cache of prefixes"),
        (other_greedy, "greedy tokens differ from transformers', while the hidden states agree"),
        (not_finite, "states that are not finite"),
        (one_token_documents_spoilt, "'one token (0) and others like it' (alone, first time) is off by"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_limits_for_experts_hide_no_fault(routed: SelfTest, experts: HFEngine, change: Change, reason: str) -> None:
    problem = result_of(routed, WrongEngine(experts, change)).problem
    assert problem is not None
    assert reason in problem


def test_documents_that_see_each_other_are_found_by_short_ones_alone(routed: SelfTest, experts: HFEngine) -> None:
    """With the limits for experts, where nothing of the long ones is wrong."""

    def change(wrong: WrongEngine, request: RowRequest, spec: FeatureSpec) -> Features:
        features, mixed = wrong.ask(request, spec), documents_see_each_other(wrong, request, spec)
        for start, end in zip(request.documents, request.documents[1:], strict=False):
            if end - start < 32:
                features.hidden[start:end] = mixed.hidden[start:end]
        return features

    problem = result_of(routed, WrongEngine(experts, change)).problem
    assert problem is not None
    assert "documents of a row see each other" in problem
