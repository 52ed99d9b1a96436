"""AWQ, GPTQ and fp8 checkpoints, and fp8 made while loading, in vLLM and SGLang themselves on a GPU.

Which Pythons have them: see test_gpu_engines.py.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from gpu.test_gpu_engines import NAMED, PYTHONS, config_of, target  # noqa: F401 - a fixture
from paceline.launch.selftest import prepare_selftest
from paceline.target.opening import open_engine
from paceline.target.selftest.tolerance import choose_tolerance
from quantised import FOUR_BITS, reference_of, save_quantised

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]


@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize("name", NAMED)
def test_it_computes_what_its_weights_mean(name: str, kind: str, target: Path, tmp_path: Path):  # noqa: F811
    """Rounding apart: limits of bf16, twice for kernels that round scales to bf16 too, not those of four bits."""
    assert name in PYTHONS, "set PACELINE_TEST_VLLM or PACELINE_TEST_SGLANG to the Python that has it"
    unpacked = save_quantised(target, tmp_path / kind, kind)
    config = config_of(name, tmp_path / kind)
    plain = choose_tolerance("bfloat16")
    limits = replace(plain, relative=2 * plain.relative, cosine=1 - 4 * (1 - plain.cosine))
    with open_engine(config) as engine:
        reference = reference_of(unpacked, engine, tmp_path / "reference.safetensors")
        test = prepare_selftest(config.model_copy(update={"selftest_reference": str(reference)}))
        result = replace(test, tolerance=limits).run(config, engine)
    print("\n".join(result.describe()))
    assert result.problem is None


@pytest.mark.parametrize("name", NAMED)
def test_fp8_made_while_loading_is_compared_within_its_own_limits(name: str, target: Path):  # noqa: F811
    """And is further from transformers than bf16 is allowed to be, so that those limits are needed."""
    assert name in PYTHONS, "set PACELINE_TEST_VLLM or PACELINE_TEST_SGLANG to the Python that has it"
    plain = config_of(name, target)
    config = plain.model_copy(update={"engine_args": plain.engine_args | {"quantization": "fp8"}})
    with open_engine(config) as engine:
        result = prepare_selftest(config).run(config, engine)
    print("\n".join(result.describe()))
    assert result.problem is None
    assert str(result.tolerance) == "compared within 0.3 and cosine 0.955: fp8 weights"
    assert max(line.relative for line in result.lines) > choose_tolerance("bfloat16").relative


@pytest.mark.timeout(2000)
@pytest.mark.parametrize("name", NAMED)
def test_an_fp8_checkpoint_is_compared_with_what_its_weights_mean(
    name: str,
    target: Path,  # noqa: F811
    tmp_path: Path,
):
    """In blocks of 128 x 128, as Qwen3-8B-FP8 comes. SGLang may compile kernels for many minutes."""
    assert name in PYTHONS, "set PACELINE_TEST_VLLM or PACELINE_TEST_SGLANG to the Python that has it"
    unpacked = save_quantised(target, tmp_path / "fp8", "fp8")
    waits = {"sglang": {"watchdog-timeout": 1500}}.get(name, {})
    config = config_of(name, tmp_path / "fp8", engine_start_timeout_s=1500)
    config = config.model_copy(update={"engine_args": config.engine_args | waits})
    test = prepare_selftest(config)
    with open_engine(config) as engine:
        result = test.run(config, engine)
        print("\n".join(result.describe()))
        assert result.problem is None
        assert "fp8 weights" in str(result.tolerance)
        meant = reference_of(unpacked, engine, tmp_path / "reference.safetensors")
        test = prepare_selftest(config.model_copy(update={"selftest_reference": str(meant)}))
        same = test.run(config, engine)
    assert [line.relative for line in same.lines] == pytest.approx([line.relative for line in result.lines], rel=0.05)
