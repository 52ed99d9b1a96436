"""What paceline computes beside a production engine: norm and lm_head of checkpoints that it cannot run itself."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from paceline.config.target import TargetConfig
from paceline.target.engines.outer_parts import load_outer_parts
from tiny import save_tiny_target


def quantise(checkpoint: Path) -> None:
    """Layers as an fp8 checkpoint has them: float8 numbers and their scales; embedding, norms and lm_head as before."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale.reshape(1, 1)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (checkpoint / "config.json").write_text(json.dumps(config))


def test_outer_parts_of_a_quantised_checkpoint_are_those_of_the_original(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = TargetConfig(model=str(save_tiny_target(tmp_path / "t")), device="cpu", dtype="float32")
    plain = load_outer_parts(config)
    quantise(tmp_path / "t")
    with caplog.at_level(logging.WARNING):
        parts = load_outer_parts(config)
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for name in ("norm", "lm_head"):
        assert torch.equal(getattr(parts, name)(states), getattr(plain, name)(states))
    assert parts.info.num_layers == 4
    assert parts.info.logit_transform == plain.info.logit_transform
    assert parts.info.weight_fingerprint != plain.info.weight_fingerprint
    assert "LOAD REPORT" not in caplog.text


def test_an_engine_on_several_gpus_has_its_outer_parts_on_one(tmp_path: Path):
    config = TargetConfig(model=str(save_tiny_target(tmp_path / "t")), device="cpu", dtype="float32", engine="vllm")
    alone = load_outer_parts(config)
    spread = load_outer_parts(config.model_copy(update={"tensor_parallel": 2}))
    assert spread.info == alone.info
    assert torch.equal(spread.lm_head.weight, alone.lm_head.weight)
