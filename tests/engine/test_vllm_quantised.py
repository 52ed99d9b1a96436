"""Quantised checkpoints in a real vLLM: what their weights mean, and within their format what the original says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from engine.test_vllm_engine import ARGS, PYTHON, target_config
from paceline.config.target import TargetConfig
from paceline.errors import TargetError
from paceline.launch.selftest import prepare_selftest
from paceline.target.opening import ServedEngine, open_engine
from paceline.target.selftest.tolerance import choose_tolerance
from quantised import FOUR_BITS, reference_of, save_quantised
from tiny import save_tiny_target

TRAINED = Path(__file__).parents[2] / "src" / "paceline" / "quickstart_target"
"""Random weights would make anything of a rounding."""
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@dataclass
class Quantised:
    """A checkpoint that vLLM serves, beside one of the plain weights that it means."""

    kind: str
    config: TargetConfig
    engine: ServedEngine
    unpacked: Path


@pytest.fixture(scope="module", params=FOUR_BITS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quantised]:
    assert PYTHON.exists(), "make engine-test installs vLLM"
    directory = tmp_path_factory.mktemp(request.param)
    unpacked = save_quantised(TRAINED, directory / "packed", request.param)
    config = target_config(directory / "packed", dtype="bfloat16", engine_args=ARGS | {"max-model-len": 2048})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with open_engine(config) as engine:
            yield Quantised(request.param, config, engine, unpacked)


def test_it_computes_what_its_weights_mean(served: Quantised, tmp_path: Path):
    """Rounding apart: limits of bf16, not those of four bits."""
    reference = reference_of(served.unpacked, served.engine, tmp_path / "reference.safetensors")
    test = prepare_selftest(served.config.model_copy(update={"selftest_reference": str(reference)}))
    result = replace(test, tolerance=choose_tolerance("bfloat16")).run(served.config, served.engine)
    assert result.problem is None


def test_the_self_test_compares_with_the_original_within_the_format(
    served: Quantised, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    reference = reference_of(TRAINED, served.engine, tmp_path / "reference.safetensors")
    test = prepare_selftest(served.config.model_copy(update={"selftest_reference": str(reference)}))
    result = test.run(served.config, served.engine)
    assert result.problem is None
    assert f"{served.kind} weights" in "\n".join(result.describe())
    assert "compares with other weights" in caplog.text


def test_an_fp8_checkpoint_is_compared_with_what_its_weights_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In blocks of 128 x 128, as Qwen3-8B-FP8 comes; vLLM's build for CPUs rounds no activations, and wants AMX."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    shapes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    plain = save_tiny_target(tmp_path / "plain", **shapes, head_dim=64, dtype="bfloat16")
    save_quantised(plain, tmp_path / "fp8", "fp8")
    config = target_config(tmp_path / "fp8", dtype="bfloat16")
    test = prepare_selftest(config)
    assert (test.tolerance.name, test.reference.dtype) == ("fp8 weights", "float32")
    if "amx_tile" not in Path("/proc/cpuinfo").read_text():
        no_kernel = r"vLLM .* ended .*before it was ready(.|\n)*Failed to find a kernel that can implement the ScaledMM"
        with pytest.raises(TargetError, match=no_kernel), open_engine(config):
            pytest.fail("it cannot run here")
        return
    with open_engine(config) as engine:
        result = test.run(config, engine)
        exact = replace(test, tolerance=choose_tolerance("bfloat16")).run(config, engine)
    assert (result.problem, exact.problem) == (None, None)
    assert max(line.relative for line in exact.lines) < choose_tolerance("bfloat16").relative
