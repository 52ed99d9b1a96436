"""The self-test on a target that makes much of rounding: judged by what transformers itself is off there."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from paceline.config.target import TargetConfig
from paceline.errors import TargetError
from paceline.launch.selftest import SelfTest, compare, observe_own, prepare_selftest
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.target.hf.engine import HFEngine
from paceline.target.selftest.run import SelfTestResult, run_selftest
from paceline.target.selftest.tolerance import choose_tolerance
from tiny import save_tiny_target
from wrong_engines import (
    Change,
    WrongEngine,
    before_the_norm,
    documents_see_each_other,
    layer_before,
    next_layer,
    shared_prefix_cache,
    shifted_by_one,
    stale_prefix_cache,
)

LAYERS = (1, 6, 10)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TargetConfig:
    directory = tmp_path_factory.mktemp("rounding")
    target = save_tiny_target(
        directory / "target", hidden_size=64, intermediate_size=128, num_hidden_layers=12, max_position_embeddings=1024
    )
    return TargetConfig(model=str(target), device="cpu", dtype="bfloat16", documents="padded")


@pytest.fixture(scope="module")
def test(config: TargetConfig, tmp_path_factory: pytest.TempPathFactory) -> SelfTest:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return prepare_selftest(config)


@pytest.fixture(scope="module")
def engine(config: TargetConfig) -> Iterator[HFEngine]:
    with contextlib.closing(HFEngine(config)) as engine:
        yield engine


def result_of(test: SelfTest, engine: object) -> SelfTestResult:
    return run_selftest(engine, test.texts, test.reference, LAYERS, test.tolerance)  # type: ignore[arg-type]


class Changed(HFEngine):
    """The hf engine, with features as a test says."""

    change: Callable[[Features], Features]

    def capture(self, request: RowRequest, spec: FeatureSpec) -> Future[Features]:
        future: Future[Features] = Future()
        future.set_result(self.change(super().capture(request, spec).result(60)))
        return future


def rounded(features: Features) -> Features:
    assert features.final_hidden is not None
    return replace(features, hidden=features.hidden * (1 + 2**-7), final_hidden=features.final_hidden * (1 + 2**-7))


def mixed_up(features: Features) -> Features:
    return replace(features, hidden=features.hidden.roll(1, 0))


def test_a_server_of_transformers_compares_with_float32_before_it_refuses(
    config: TargetConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two ways to compute in bf16 differ by more than a limit on some targets: rounding alone, or a fault?"""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def strict(config: TargetConfig, engine: HFEngine) -> SelfTest:
        test = observe_own(config, engine)
        return replace(test, tolerance=replace(test.tolerance, relative=5e-3))

    monkeypatch.setattr("paceline.launch.selftest.observe_own", strict)
    with contextlib.closing(Changed(config)) as engine, caplog.at_level(logging.INFO):
        engine.change = lambda features: features
        compare(config, engine, None).check("engine")
        assert "float32 tells" not in caplog.text
        engine.change = rounded
        compare(config, engine, None).check("engine")
        assert "float32 tells how much of that is rounding" in caplog.text
        engine.change = mixed_up
        with pytest.raises(TargetError, match="engine does not compute this target"):
            compare(config, engine, None).check("engine")
        engine.change = rounded
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
        monkeypatch.setattr("paceline.launch.reference_place.free_memory", lambda: 1)
        both = (
            r"transformers \(hf\) does not compute this target as transformers in bfloat16 does: .*is off by .*; "
            r"whether that is rounding alone cannot be told: transformers in float32 needs 0\.\d+ GB"
        )
        with pytest.raises(TargetError, match=both):
            compare(config, engine, None).check("engine")


def test_a_reference_made_beforehand_in_bf16_is_no_last_word_either(
    config: TargetConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where float32 had no room, as of a target on several GPUs, or in a file; a clear fault needs no float32."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with contextlib.closing(Changed(config)) as engine, caplog.at_level(logging.INFO):
        beforehand = observe_own(config, engine)
        beforehand.reference.save(tmp_path / "reference.safetensors")
        config = config.model_copy(update={"selftest_reference": str(tmp_path / "reference.safetensors")})
        beforehand = replace(beforehand, tolerance=replace(beforehand.tolerance, relative=5e-3))
        engine.change = mixed_up
        with pytest.raises(TargetError, match="engine does not compute this target: "):
            compare(config, engine, beforehand).check("engine")
        assert "float32 tells" not in caplog.text
        engine.change = rounded
        assert beforehand.run(config, engine).problem is not None, "the premise: off by more than is allowed"
        compare(config, engine, beforehand).check("engine")
        assert "beside transformers in bfloat16" in caplog.text
        assert "computing what transformers says to the self-test, in float32" in caplog.text


def in_fp8(tensor: Tensor) -> Tensor:
    """As engines round by one scale for a whole tensor."""
    scale = tensor.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    return (tensor / scale).to(torch.float8_e4m3fn).to(tensor.dtype) * scale


def test_weights_and_activations_in_fp8_pass_within_the_limits_of_fp8_and_of_no_other(
    config: TargetConfig, test: SelfTest
) -> None:
    """The format's own rounding, in torch: more than the limits of most targets on one that makes much of any."""
    fp8 = choose_tolerance("bfloat16", "fp8")
    with contextlib.closing(HFEngine(config)) as engine:
        for module in engine.model.get_submodule("model.layers").modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = in_fp8(module.weight.data)
                module.register_forward_pre_hook(lambda _, inputs: (in_fp8(inputs[0]),))
        right, wrong, later = (
            run_selftest(one, test.texts, test.reference, LAYERS, fp8)
            for one in (engine, WrongEngine(engine, next_layer), WrongEngine(engine, shifted_by_one))
        )
        assert result_of(test, engine).problem is not None
    assert right.problem is None
    assert fp8.relative < max(line.relative for line in right.lines) < 0.5
    assert "wider, 16 times what transformers' own rounding makes of this target: layer 6" in right.describe()[-1]
    assert "layer 1 asked, layer 2's output received" in str(wrong.problem)
    assert "tokens are shifted by one" in str(later.problem)


def test_a_right_engine_passes_where_fixed_limits_would_refuse_it(test: SelfTest, engine: HFEngine) -> None:
    assert test.reference.rounding is not None
    assert test.reference.rounding.shape == (len(test.reference.final_hidden), 13)
    result = result_of(test, engine)
    assert result.problem is None
    assert "wider, twice what transformers' own rounding makes of this target: layer 6" in result.describe()[-1]
    fixed = result_of(replace(test, reference=replace(test.reference, rounding=None)), engine)
    assert fixed.problem is not None, "the premise: rounding alone is more than the limits of other targets"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (next_layer, "layer 1 asked, layer 2's output received"),
        (layer_before, "asked, layer .* output received"),
        (before_the_norm, "before the final norm, received"),
        (shifted_by_one, "tokens are shifted by one"),
        (documents_see_each_other, "documents of a row see each other"),
        (stale_prefix_cache, "a cache of prefixes"),
        (shared_prefix_cache, "a cache of prefixes"),
    ],
)
def test_wrong_engines_are_found_within_the_wider_limits(
    test: SelfTest, engine: HFEngine, change: Change, problem: str
) -> None:
    with pytest.raises(Exception, match=problem):
        result_of(test, WrongEngine(engine, change)).check("engine")


def test_a_rounding_of_another_data_type_widens_nothing(test: SelfTest, config: TargetConfig, tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    test.reference.save(path)
    given = config.model_copy(update={"selftest_reference": str(path)})
    assert prepare_selftest(given).reference.rounding is not None
    exact = prepare_selftest(given.model_copy(update={"dtype": "float32"})).reference
    assert (exact.rounding, exact.rounded_dtype) == (None, "")


def test_limits_grow_with_the_rounding_and_no_further_than_those_of_8_bits() -> None:
    plain = choose_tolerance("bfloat16")
    assert plain.widened(0.01) is plain
    assert plain.widened(math.nan) is plain
    wide = plain.widened(0.03)
    assert (wide.relative, wide.cosine) == (pytest.approx(0.06), pytest.approx(0.996))
    assert plain.widened(5.0).relative == 0.2
