"""The self-test of engines: a right one passes, and each engine that is wrong on purpose is refused with its reason."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from forking import Commands
from paceline.config.target import TargetConfig
from paceline.errors import ConfigError, TargetError
from paceline.launch.selftest import SelfTest, observe_own, prepare_selftest
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.target.hf.engine import HFEngine
from paceline.target.hf.loading import read_quantization
from paceline.target.selftest.reference import load_reference, observe
from paceline.target.selftest.reference import main as compute_reference
from paceline.target.selftest.run import SelfTestResult, run_selftest
from paceline.target.selftest.texts import build_texts
from paceline.target.selftest.tolerance import choose_tolerance
from quantised import save_quantised
from tiny import save_nested_tiny_target, save_tiny_target
from wrong_engines import (
    Change,
    WrongEngine,
    before_the_norm,
    documents_see_each_other,
    layer_before,
    next_layer,
    not_finite,
    other_greedy,
    rows_missing,
    shared_prefix_cache,
    shifted_by_one,
    stale_prefix_cache,
)

LAYERS = (0, 1, 2)


@pytest.fixture(scope="module")
def engine(tiny_target: Path) -> Iterator[HFEngine]:
    with contextlib.closing(HFEngine(config_of(tiny_target))) as engine:
        yield engine


@pytest.fixture(scope="module")
def test(engine: HFEngine, tiny_target: Path) -> SelfTest:
    return observe_own(config_of(tiny_target), engine)


def config_of(target: Path, **changes: object) -> TargetConfig:
    return TargetConfig.model_validate({"model": str(target), "device": "cpu", **changes})


def result_of(test: SelfTest, engine: object, dtype: str = "float32", quantised: str | None = None) -> SelfTestResult:
    tolerance = choose_tolerance(dtype, quantised)
    return run_selftest(engine, test.texts, test.reference, LAYERS, tolerance)  # type: ignore[arg-type]


def test_an_engine_that_is_right_passes_to_the_last_layer(test: SelfTest, engine: HFEngine) -> None:
    result = run_selftest(engine, test.texts, test.reference, (0, 1, 2, 3), test.tolerance)
    assert result.problem is None
    assert [line.name for line in result.lines] == ["layer 0", "layer 1", "layer 2", "layer 3", "final hidden"]
    assert all(line.works and line.relative < 1e-5 for line in result.lines)
    assert (result.num_wrong_tokens, result.repeats_are_equal) == (0, True)
    assert result.num_judged_tokens > 0.95 * 4 * len(test.texts.tokens)
    assert "compared within 0.001" in result.describe()[-1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_passes_within_its_own_limits(test: SelfTest, tiny_target: Path, dtype: str) -> None:
    with contextlib.closing(HFEngine(config_of(tiny_target, dtype=dtype))) as engine:
        result = result_of(test, engine, dtype)
    assert result.problem is None
    assert max(line.relative for line in result.lines) > 1e-4


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
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_an_engine_that_is_wrong_is_refused_with_the_reason(
    test: SelfTest, engine: HFEngine, change: Change, reason: str
) -> None:
    result = result_of(test, WrongEngine(engine, change))
    with pytest.raises(TargetError, match="Engine 3 does not compute this target") as error:
        result.check("Engine 3")
    assert reason in str(error.value)


def test_an_answer_of_another_length_is_named_with_both_lengths(test: SelfTest, engine: HFEngine) -> None:
    with pytest.raises(TargetError, match=r"'hidden': 256, .*rows of layers \[0, 1, 2\] to 320 tokens \(long; alone"):
        result_of(test, WrongEngine(engine, rows_missing))


def test_a_first_token_with_large_states_hides_no_other(test: SelfTest, engine: HFEngine) -> None:
    """Trained models have such tokens."""
    reference = replace(test.reference, layers=test.reference.layers.clone())
    starts = test.texts.bounds[:-1].tolist()
    reference.layers[starts] *= 1000

    def change(wrong: WrongEngine, request: RowRequest, spec: FeatureSpec) -> Features:
        features = wrong.ask(request, spec)
        hidden = features.hidden * 1.1
        hidden[request.documents[:-1].tolist()] = features.hidden[request.documents[:-1].tolist()] * 1000
        return replace(features, hidden=hidden)

    problem = result_of(SelfTest(test.texts, reference, test.tolerance), WrongEngine(engine, change)).problem
    assert problem is not None
    assert "layer 0" in problem


def test_greedy_tokens_are_judged_under_wide_limits_too(test: SelfTest, engine: HFEngine) -> None:
    result = result_of(test, WrongEngine(engine, other_greedy), quantised="awq")
    assert result.num_wrong_tokens > 0.9 * result.num_judged_tokens > 1000
    assert "greedy tokens differ" in str(result.problem)


def test_another_rope_is_told_by_where_states_begin_to_differ(
    test: SelfTest, tiny_target: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_target, tmp_path / "rope")
    file = tmp_path / "rope" / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    file.write_text(json.dumps(config))
    with contextlib.closing(HFEngine(config_of(tmp_path / "rope"))) as engine:
        problem = result_of(test, engine).problem
    assert problem is not None
    assert "wrong after it: another RoPE" in problem


def test_another_checkpoint_is_like_nothing(test: SelfTest, tmp_path: Path) -> None:
    with contextlib.closing(HFEngine(config_of(save_tiny_target(tmp_path / "t", seed=1)))) as engine:
        problem = result_of(test, engine).problem
    assert problem is not None
    assert "another checkpoint" in problem


def test_limits_as_wide_as_of_four_bits_still_tell_neighbours_apart(test: SelfTest, engine: HFEngine) -> None:
    assert result_of(test, engine, quantised="awq").problem is None
    problem = result_of(test, WrongEngine(engine, next_layer), quantised="awq").problem
    assert problem is not None
    assert "layer 0 asked, layer 1's output received" in problem
    assert "awq weights" in problem


@pytest.mark.parametrize(
    ("quantisation", "name", "relative"),
    [
        (None, "bfloat16", 3e-2),
        ("fp8", "fp8 weights", 0.3),
        ({"quant_method": "gptq", "bits": 4}, "gptq weights", 0.35),
        ({"quant_method": "gptq", "bits": 8}, "gptq weights", 0.2),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
            "compressed-tensors 8 bit weights",
            0.2,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}},
            },
            "compressed-tensors 8 bit weights",
            0.3,
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8 bit weights", 0.3),
        ("w8a8_int8", "w8a8_int8 weights", 0.3),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt nvfp4 weights", 0.35),
        ({"quant_method": "something new"}, "something new weights", 0.35),
    ],
    ids=str,
)
def test_limits_are_those_of_the_format_and_name_it(quantisation: object, name: str, relative: float) -> None:
    limits = choose_tolerance("bfloat16", quantisation)  # type: ignore[arg-type]
    assert (limits.name, limits.relative) == (name, relative)
    coarse = name not in ("bfloat16", "gptq weights", "something new weights") and relative != 0.2
    assert limits.widened(0.04).relative == (0.5 if coarse else max(relative, 0.08))
    assert name in str(limits)


def test_a_reference_travels_as_a_file_and_is_refused_for_others(
    test: SelfTest, engine: HFEngine, tmp_path: Path
) -> None:
    test.reference.save(tmp_path / "r.safetensors")
    fingerprint = engine.info().weight_fingerprint
    loaded = load_reference(tmp_path / "r.safetensors", fingerprint, test.texts)
    assert torch.equal(loaded.layers, test.reference.layers)
    assert run_selftest(engine, test.texts, loaded, LAYERS, test.tolerance).problem is None
    with pytest.raises(TargetError, match=f"of weights {fingerprint}, this target's are 0000"):
        load_reference(tmp_path / "r.safetensors", "0000", test.texts)
    with pytest.raises(TargetError, match="of texts"):
        load_reference(tmp_path / "r.safetensors", fingerprint, build_texts(200))
    (tmp_path / "r.safetensors").write_bytes(b"no")
    with pytest.raises(TargetError, match="cannot be read"):
        load_reference(tmp_path / "r.safetensors", fingerprint, test.texts)


def test_the_reference_is_what_transformers_says_a_text_at_a_time(test: SelfTest, tiny_target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_target, attn_implementation="eager").eval()
    other = observe(model, test.texts, "")
    torch.testing.assert_close(other.layers, test.reference.layers, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.final_hidden, test.reference.final_hidden, rtol=1e-4, atol=1e-5)
    assert other.before_norm is not None
    torch.testing.assert_close(model.model.norm(other.before_norm), other.final_hidden)


@pytest.mark.parametrize(("architecture", "nested"), [("gemma2", False), ("mistral3", True)])
def test_a_reference_is_computed_of_soft_capped_scores_and_of_models_that_see_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, nested: bool
) -> None:
    """transformers' sdpa leaves the soft cap out, and Mistral 3 is known as a model for pictures only."""
    path = (save_nested_tiny_target if nested else save_tiny_target)(tmp_path / "t", architecture)
    with contextlib.closing(HFEngine(config_of(path))) as engine:
        info, output = engine.info(), tmp_path / "r.safetensors"
        settings = {"model": str(path), "dtype": "float32", "device": "cpu", "output": str(output)}
        settings |= {
            "trust_remote_code": False,
            "quantised": False,
            "unpacked": False,
            "spread": {},
            "fingerprint": info.weight_fingerprint,
        }
        settings |= {"num_tokenizer_tokens": info.num_tokenizer_tokens, "num_positions": 0, "rounded_dtype": None}
        monkeypatch.setattr("sys.argv", ["reference", json.dumps(settings)])
        compute_reference()
        texts = build_texts(info.num_tokenizer_tokens)
        reference = load_reference(output, info.weight_fingerprint, texts)
        result = run_selftest(engine, texts, reference, LAYERS, choose_tolerance("float32"))
    assert result.problem is None


def test_a_target_of_one_layer_is_compared(tmp_path: Path) -> None:
    config = config_of(save_tiny_target(tmp_path / "t", num_hidden_layers=1))
    with contextlib.closing(HFEngine(config)) as engine:
        result = observe_own(config, engine).run(config, engine)
    assert result.problem is None
    assert [line.name for line in result.lines] == ["layer 0", "final hidden"]


def test_a_target_too_short_for_the_texts_is_named_with_the_way_out(tmp_path: Path) -> None:
    config = config_of(save_tiny_target(tmp_path / "t", max_position_embeddings=128))
    with (
        contextlib.closing(HFEngine(config)) as engine,
        pytest.raises(ConfigError, match=r"texts \(up to 320 tokens\).*128 positions.*target\.selftest = false"),
    ):
        observe_own(config, engine).run(config, engine)


def test_the_doctor_tests_an_engine_and_saves_a_reference(tiny_target: Path, tmp_path: Path) -> None:
    """Through a reference that a process of its own computes, without anything of the engine."""
    with Commands(tmp_path, {"XDG_CACHE_HOME": str(tmp_path / "cache")}) as commands:
        saved = commands.start(
            "doctor", str(tiny_target), "--save-reference", str(tmp_path / "r.safetensors"), "target.device=cpu"
        )
        assert saved.wait(120) == 0, saved.output
        (kept,) = (tmp_path / "cache" / "paceline" / "selftest").glob("*.safetensors")
        copy = load_file(tmp_path / "r.safetensors")
        assert len(copy["final_hidden"]) == build_texts(261, 4096).bounds[-1] > len(build_texts(261).tokens)
        assert all(torch.equal(tensor, copy[name]) for name, tensor in load_file(kept).items())
        tested = commands.start("doctor", str(tiny_target), "--engine", "hf", "target.device=cpu")
        assert tested.wait(120) == 0, tested.output
        assert "computes" in tested.output
        assert "final hidden" in tested.output
        other = save_tiny_target(tmp_path / "other", seed=1)
        refused = commands.start(
            "doctor", str(other), f"target.selftest_reference={tmp_path / 'r.safetensors'}", "target.device=cpu"
        )
        assert refused.wait(60) == 1
        assert "make it anew with" in refused.output


@pytest.mark.parametrize("option", ["quantization", "-q"])
def test_limits_are_those_of_what_the_engine_is_asked_to_quantise_to(
    tiny_target: Path, tmp_path: Path, engine: HFEngine, option: str
) -> None:
    config = config_of(tiny_target, engine="vllm", engine_args={option: "fp8"}, selftest_reference=str(tmp_path / "r"))
    own = observe_own(config_of(tiny_target), engine).reference
    replace(own, text_hash=build_texts(261, 4096).text_hash()).save(tmp_path / "r")
    assert prepare_selftest(config).tolerance.name == "fp8 weights"


@pytest.fixture(scope="module")
def fp8_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks a weight, two of some."""
    directory = tmp_path_factory.mktemp("fp8")
    shapes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
    plain = save_tiny_target(directory / "plain", **shapes, head_dim=32, dtype="bfloat16")
    save_quantised(plain, directory / "fp8", "fp8")
    return directory / "fp8"


def test_the_reference_of_an_fp8_checkpoint_is_what_its_weights_mean(
    fp8_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, with the rounding of its own data type, wherever it is computed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    test = prepare_selftest(config_of(fp8_target, engine="vllm", dtype="bfloat16"))
    assert test.tolerance.name == "fp8 weights"
    assert test.reference.dtype == "float32"
    loaded = {}
    for name in ("plain", "fp8-unpacked"):
        model = AutoModelForCausalLM.from_pretrained(
            fp8_target.with_name(name), attn_implementation="eager", dtype="float32"
        )
        loaded[name] = observe(model.eval(), test.texts, "").layers
    meant = loaded["fp8-unpacked"]
    distance = (test.reference.layers - meant).norm() / meant.norm()
    assert distance < 0.01  # "unpacked" is rounded to bf16, the reference is not
    assert (loaded["plain"] - meant).norm() / meant.norm() > 3 * distance, "the premise"
    assert test.reference.rounding is not None
    assert test.reference.rounding.max() < 0.05, "its bf16 has the same RoPE"


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, "float32"),
        ({"weight_block_size": None}, "auto"),
        ({"weight_block_size": [192, 128]}, "auto"),
        ({"quant_method": "gptq"}, "auto"),
    ],
    ids=["blocks", "one scale a tensor", "a last block that is smaller", "another format"],
)
def test_fp8_in_whole_blocks_alone_is_unpacked_for_the_reference(
    fp8_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], dtype: str
) -> None:
    """transformers passes over the scales of others, or takes them for those of other weights."""
    shutil.copytree(fp8_target, tmp_path / "t")
    file = tmp_path / "t" / "config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"quantization_config": stored["quantization_config"] | changes}))
    asked: list[dict[str, object]] = []

    def find(kept: object, texts: object, fingerprint: str, plan: Callable[[], Any], *_: object) -> object:
        asked.append(plan()[1])
        raise TargetError("enough")

    monkeypatch.setattr("paceline.launch.selftest.find_reference", find)
    with pytest.raises(TargetError, match="enough"):
        prepare_selftest(config_of(tmp_path / "t", engine="vllm"))
    assert [(one["dtype"], one["unpacked"]) for one in asked] == [(dtype, dtype == "float32")]


def test_a_quantised_target_asks_for_what_transformers_needs_to_load_it(
    fp8_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r'without accelerate: pip install "paceline\[accelerate\]"'):
        prepare_selftest(config_of(fp8_target, engine="vllm"))


def test_a_checkpoint_says_how_it_is_quantised(tiny_target: Path, tmp_path: Path) -> None:
    assert read_quantization(tiny_target) is None
    nested = {"text_config": {"quantization_config": {"quant_method": "fp8"}}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert read_quantization(tmp_path) == {"quant_method": "fp8"}
