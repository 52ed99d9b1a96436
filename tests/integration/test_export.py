"""Exports of real drafts: what is written is the layout engines load, and computes what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from paceline.config.drafts import DFlashConfig, DraftConfig, Eagle3Config
from paceline.drafts.dflash.algorithm import DFlash
from paceline.drafts.eagle3.algorithm import Eagle3
from paceline.drafts.interface import DraftAlgorithm
from paceline.drafts.published import read_published
from paceline.drafts.vocabulary import DraftVocabulary
from paceline.errors import ExportError
from paceline.export.exporting import check_export, export_draft
from paceline.schema.target_info import RopeInfo, TargetInfo
from rows import RandomWeights, make_context, tiny_info

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
SLIDING = {"num_layers": 2, "layer_types": ("sliding_attention", "full_attention"), "sliding_window": 8}


def build(kind: str, info: TargetInfo | None = None, **changes: Any) -> DraftAlgorithm:
    """A draft whose weights are not the initial ones."""
    info = info or tiny_info()
    context = make_context(info, **{k: changes.pop(k) for k in ("vocabulary", "dtype", "weights") if k in changes})
    config: DraftConfig
    if kind == "eagle3":
        config = Eagle3Config(**({"vocab_size": 0, "num_depths": 3} | changes))
        algorithm: DraftAlgorithm = Eagle3(config, context)
    else:
        config = DFlashConfig(**({"block_size": 4, "num_layers": 2} | changes))
        algorithm = DFlash(config, context)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in algorithm.draft.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return algorithm


def half_vocabulary(info: TargetInfo) -> DraftVocabulary:
    return DraftVocabulary(np.arange(0, info.vocab_size, 2, dtype=np.int64), info.vocab_size)


CASES: dict[str, Any] = {
    "eagle3, D = V": lambda: build("eagle3"),
    "eagle3, D < V": lambda: build("eagle3", vocabulary=half_vocabulary(tiny_info())),
    "eagle3, two layers, own sizes": lambda: build("eagle3", target_layers=(0, 6), num_heads=2, intermediate_size=40),
    "eagle3, yarn, no dense MLP": lambda: build(
        "eagle3", tiny_info(rope=RopeInfo(theta=5e5, scaling=YARN), intermediate_size=None)
    ),
    "dflash": lambda: build("dflash"),
    "dflash, sliding": lambda: build("dflash", **SLIDING),
}


@pytest.mark.parametrize("case", CASES)
def test_a_draft_is_exported_in_a_layout_that_passes_every_check(case: str, tmp_path: Path) -> None:
    algorithm = CASES[case]()
    export_draft(algorithm, tmp_path / "draft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft"]  # nothing temporary is left
    config, tensors = read_published(tmp_path / "draft")
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert {config["rope_theta"], config["rope_parameters"]["rope_theta"]} == {algorithm.context.info.rope.theta}
    for name, tensor in algorithm.published_tensors().items():
        assert torch.equal(tensor, tensors[name]), name


def test_the_eagle3_layout_is_the_one_engines_load(tmp_path: Path) -> None:
    export_draft(build("eagle3", vocabulary=half_vocabulary(tiny_info())), tmp_path / "draft")
    config, tensors = read_published(tmp_path / "draft")
    linear = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    inside = ["hidden_norm", "input_layernorm", "post_attention_layernorm", *linear]
    inside += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    expected = {f"midlayer.{name}.weight" for name in inside}
    assert set(tensors) == expected | {"fc.weight", "norm.weight", "lm_head.weight", "t2d", "d2t"}
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["draft_vocab_size"] == 32
    assert config["tie_word_embeddings"] is False
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    ids = torch.arange(32) + tensors["d2t"]
    assert torch.equal(ids, tensors["t2d"].nonzero()[:, 0])


def test_a_16_bit_target_gets_a_16_bit_export_of_a_draft_trained_in_fp32(tmp_path: Path) -> None:
    for kind in ("eagle3", "dflash"):
        export_draft(build(kind, tiny_info(dtype="bfloat16")), tmp_path / kind)
        config, tensors = read_published(tmp_path / kind)
        assert config["dtype"] == "bfloat16"
        assert tensors["fc.weight"].dtype == torch.bfloat16


def test_the_embedding_is_written_on_request_and_never_needed_again(tmp_path: Path) -> None:
    algorithm = build("eagle3")
    export_draft(algorithm, tmp_path / "with", include_embedding=True)
    config, tensors = read_published(tmp_path / "with")
    assert torch.equal(tensors["embed_tokens.weight"], algorithm.context.weights.embedding())
    warm = build("eagle3", init_from=str(tmp_path / "with"))
    warm.load_published(config, tensors)
    assert torch.equal(warm.published_tensors()["fc.weight"], algorithm.published_tensors()["fc.weight"])
    export_draft(build("dflash"), tmp_path / "dflash", include_embedding=True)
    assert "embed_tokens.weight" not in read_published(tmp_path / "dflash")[1]


def test_an_export_replaces_an_older_one_and_nothing_else(tmp_path: Path) -> None:
    export_draft(build("eagle3"), tmp_path / "draft")
    export_draft(build("dflash"), tmp_path / "draft")
    assert read_published(tmp_path / "draft")[0]["architectures"] == ["DFlashDraftModel"]
    (tmp_path / "draft" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"notes\.txt"):
        export_draft(build("eagle3"), tmp_path / "draft")
    assert (tmp_path / "draft" / "notes.txt").read_text() == "mine"


def damage_tensors(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def damage_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


TENSOR_DAMAGE: dict[str, Any] = {
    r"norm\.weight is missing": lambda t: t.pop("norm.weight"),
    r"_orig_mod\.fc\.weight does not belong": lambda t: t.update({"_orig_mod.fc.weight": t.pop("fc.weight")}),
    r"fc\.weight has shape \[32, 95\]": lambda t: t.update({"fc.weight": t["fc.weight"][:, 1:].contiguous()}),
    r"lm_head\.weight is torch\.bfloat16": lambda t: t.update({"lm_head.weight": t["lm_head.weight"].bfloat16()}),
    r"midlayer\.mlp\.up_proj\.weight has other values": lambda t: t["midlayer.mlp.up_proj.weight"][3, 3].add_(1),
}


@pytest.mark.parametrize("message", TENSOR_DAMAGE)
def test_a_wrong_tensor_is_named(message: str, tmp_path: Path) -> None:
    algorithm = build("eagle3")
    export_draft(algorithm, tmp_path / "draft")
    damage_tensors(tmp_path / "draft", TENSOR_DAMAGE[message])
    with pytest.raises(ExportError, match=message):
        check_export(algorithm, tmp_path / "draft")


CONFIG_DAMAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "draft_vocab_size is None": ("eagle3", {"draft_vocab_size": None}),
    "rope_theta is missing": ("eagle3", {"rope_theta": "gone"}),
    "rope_parameters": ("eagle3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "rope_scaling is missing": ("dflash", {"rope_scaling": "gone"}),
    "torch_dtype is missing": ("eagle3", {"torch_dtype": "gone"}),
    "tie_word_embeddings is True": ("eagle3", {"tie_word_embeddings": True}),
    "model_type is 'qwen3'": ("eagle3", {"model_type": "qwen3"}),
    "max_position_embeddings is 2048": ("dflash", {"max_position_embeddings": 2048}),
    "head_dim is missing": ("eagle3", {"head_dim": "gone"}),
    r"eagle_aux_hidden_state_layer_ids is \[0, 6\]": ("eagle3", {"eagle_aux_hidden_state_layer_ids": [0, 6]}),
    "num_aux_hidden_states is None": ("eagle3", {"num_aux_hidden_states": "gone"}),
    "quantization_config": ("eagle3", {"quantization_config": {}}),
    "norm_before_residual": ("eagle3", {"norm_before_residual": True}),
    r"layer_types is \['full_attention'\]": ("dflash", {"layer_types": ["full_attention"]}),
    "dflash_config.mask_token_id": ("dflash", {"dflash_config": {"target_layer_ids": [0, 6]}}),
    "causal must be left out": ("dflash", {"is_causal": True}),
}


@pytest.mark.parametrize("message", CONFIG_DAMAGE)
def test_a_configuration_that_an_engine_would_misread_is_refused(message: str, tmp_path: Path) -> None:
    kind, changes = CONFIG_DAMAGE[message]
    algorithm = build(kind, target_layers=(0, 6), **(SLIDING if kind == "dflash" else {}))
    export_draft(algorithm, tmp_path / "draft")
    damage_config(tmp_path / "draft", **changes)
    with pytest.raises(ExportError, match=message):
        check_export(algorithm, tmp_path / "draft")


def test_default_layers_may_be_left_out_of_an_eagle3_configuration(tmp_path: Path) -> None:
    algorithm = build("eagle3")
    export_draft(algorithm, tmp_path / "draft")
    damage_config(tmp_path / "draft", eagle_aux_hidden_state_layer_ids="gone", num_aux_hidden_states="gone")
    check_export(algorithm, tmp_path / "draft")


class _ForgetfulEagle3(Eagle3):
    """Reads a published draft, all but one weight."""

    def load_published(self, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        norm = self.draft.norm.weight.detach().clone()
        super().load_published(config, tensors)
        with torch.no_grad():
            self.draft.norm.weight.copy_(norm)


class _OtherConventionEagle3(Eagle3):
    """Once it has loaded a published draft, computes with another embedding than it was trained with."""

    def load_published(self, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        super().load_published(config, tensors)
        self.embedding = self.embedding.flip(0)


def test_a_weight_that_is_not_loaded_again_is_named_and_nothing_is_published(tmp_path: Path) -> None:
    algorithm = build("eagle3")
    algorithm.__class__ = _ForgetfulEagle3
    with pytest.raises(ExportError, match=r"loaded again .*\n  norm\.weight has other values"):
        export_draft(algorithm, tmp_path / "draft")
    assert list(tmp_path.iterdir()) == []


def test_a_draft_that_computes_differently_after_loading_is_refused(tmp_path: Path) -> None:
    algorithm = build("eagle3")
    algorithm.__class__ = _OtherConventionEagle3
    with pytest.raises(ExportError, match="do not compute the same"):
        export_draft(algorithm, tmp_path / "draft")


def test_files_that_cannot_be_written_are_an_error_and_leave_the_old_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_draft(build("eagle3"), tmp_path / "draft")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paceline.export.exporting.save_file", full)
    with pytest.raises(ExportError, match="No space left"):
        export_draft(build("dflash"), tmp_path / "draft")
    assert read_published(tmp_path / "draft")[0]["architectures"] == ["LlamaForCausalLMEagle3"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_biased_head_and_a_16_bit_draft_export_too(tmp_path: Path) -> None:
    info = tiny_info(dtype="bfloat16")
    weights = RandomWeights(info, dtype=torch.bfloat16)
    for kind in ("eagle3", "dflash"):
        export_draft(build(kind, info, dtype=torch.bfloat16, weights=weights), tmp_path / kind)
