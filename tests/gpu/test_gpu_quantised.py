"""AWQ and GPTQ checkpoints in vLLM and SGLang themselves on a GPU; which Pythons have them: see test_gpu_engines.py."""

from dataclasses import replace
from pathlib import Path

import pytest

from gpu.test_gpu_engines import NAMED, PYTHONS, config_of, target  # noqa: F401 - a fixture
from paceline.launch.selftest import prepare_selftest
from paceline.target.opening import open_engine
from paceline.target.selftest.tolerance import choose_tolerance
from quantised import CONFIGS, reference_of, save_quantised

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]


@pytest.mark.parametrize("kind", sorted(CONFIGS))
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
