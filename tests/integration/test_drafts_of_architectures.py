"""Drafts of every tried architecture: trained for a few steps, exported, and decoding without a change of output."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from architectures import ARCHITECTURES, NESTED
from paceline.config.run_dir import RunDir
from paceline.export.layouts import find_layout
from paceline.launch.evaluate import evaluate_run
from paceline.launch.export import export_run
from paceline.launch.trained import recall_target
from tiny import save_nested_tiny_target, save_tiny_target
from whole_run import losses, run, run_config, weights, write_data

NUM_STEPS = 6
ROPE: dict[str, dict[str, Any]] = {
    "gemma3": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "gpt_oss": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 128,
    },
    "deepseek_v3": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 128,
    },
    "llama4_text": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "glm4_moe": {"rope_type": "default", "rope_theta": 1e6},
    "cohere": {"rope_type": "default", "rope_theta": 500000.0},
}
"""As exported; all others have plain RoPE of theta 10000."""
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
WIDTH = {"qwen3_moe": 96, "gpt_oss": 96}
"""Three times the hidden size, where all layers have experts."""
KV_HEADS = {"deepseek_v3": 4}


def train_and_export(architecture: str, target: Path, tmp_path: Path) -> Any:
    """Both drafts, trained and exported; what their config.json says is compared with the architecture's."""
    data = write_data(tmp_path / "data", num_eval=2)
    # This one's greedy tokens are not among the 64 of the draft vocabulary: EAGLE-3 would learn nothing.
    changes = {"drafts__eagle3__vocab_size": 0} if architecture == "granite" else {}
    config = run_config(
        tmp_path / "run",
        target,
        data,
        training__max_steps=NUM_STEPS,
        training__rows_per_step=2,
        training__num_epochs=4,
        evaluation__max_new_tokens=24,
        **changes,
    )
    start = config.model_copy(update={"run_dir": str(tmp_path / "start")})
    run(start.model_copy(update={"training": start.training.model_copy(update={"max_steps": 1})}))
    run(config)
    for name in config.drafts:
        trace = losses(config, name)
        assert len(trace) == NUM_STEPS
        assert all(math.isfinite(loss) for loss in trace)
    dflash = losses(config, "dflash")
    assert dflash[-1] < dflash[0]
    before, after = weights(start), weights(config)
    assert all(not (before[name] == after[name]).all() for name in before)
    for directory in export_run(config, []).values():
        exported = json.loads((directory / "config.json").read_text())
        assert find_layout(exported) is not None
        assert exported["rope_parameters"] == ROPE.get(architecture, PLAIN_ROPE)
        assert exported["intermediate_size"] == WIDTH.get(architecture, 64)
        assert exported["num_attention_heads"] == 4
        assert exported["num_key_value_heads"] == KV_HEADS.get(architecture, 2)
        assert exported["head_dim"] == 8
        assert exported["max_position_embeddings"] == 4096
        assert exported["rms_norm_eps"] == recall_target(RunDir(Path(config.run_dir))).norm_eps
    return config


def test_both_drafts_of_a_target_with_sinks_windows_and_experts_are_trained_and_exported(tmp_path: Path) -> None:
    train_and_export("gpt_oss", save_tiny_target(tmp_path / "target", "gpt_oss"), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_drafts_are_trained_exported_and_decode_without_changing_the_output(architecture: str, tmp_path: Path) -> None:
    config = train_and_export(architecture, save_tiny_target(tmp_path / "target", architecture), tmp_path)
    for name, figures in evaluate_run(config, []).drafts.items():  # raises if a token differs from generate's
        assert figures["new_tokens"] > 0, name


@pytest.mark.long
@pytest.mark.parametrize("kind", NESTED)
def test_drafts_of_a_nested_text_model_are_trained_exported_and_decode(kind: str, tmp_path: Path) -> None:
    config = train_and_export(NESTED[kind][2], save_nested_tiny_target(tmp_path / "target", kind), tmp_path)
    for name, figures in evaluate_run(config, []).drafts.items():
        assert figures["new_tokens"] > 0, name
