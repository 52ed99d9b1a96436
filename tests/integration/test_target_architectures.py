"""The hf engine on each supported architecture equals transformers' own hidden states, a document at a time."""

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from architectures import ARCHITECTURES, NESTED
from paceline.config.target import TargetConfig
from paceline.errors import TargetError
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import LogitTransform, TargetInfo
from paceline.target.hf.capture import apply_logit_transform
from paceline.target.hf.engine import HFEngine
from paceline.target.hf.loading import find_parts
from paceline.target.hf.selftest import choose_layout
from paceline.target.hf.weights import CheckpointWeights
from tiny import save_nested_tiny_target, save_tiny_target, tiny_config, tiny_request

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (9, 1, 70, 23)
"""70 is longer than the chunks of 64 in which hybrid layers run, than all windows, and than Phi-3's first 32 tokens."""
SPEC = FeatureSpec(layers=(0, 1, 2), final_hidden="all", greedy=True, logsumexp=True)


@pytest.fixture(scope="module", params=[*ARCHITECTURES, *(f"nested_{kind}" for kind in NESTED)])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("architecture") / request.param
    if request.param.startswith("nested_"):
        return save_nested_tiny_target(path, request.param.removeprefix("nested_"))
    return save_tiny_target(path, request.param)


def load(path: Path, **options: str) -> PreTrainedModel:
    loader = AutoModelForImageTextToText if path.name == "nested_mistral3" else AutoModelForCausalLM
    return loader.from_pretrained(path, **options).eval()


def check_features(features: Features, request: RowRequest, model: PreTrainedModel) -> None:
    """Every document has what transformers computes for it alone."""
    assert features.finite
    for start, end in zip(request.documents, request.documents[1:], strict=False):
        tokens = torch.from_numpy(request.tokens[start:end]).long()[None]
        with torch.no_grad():
            alone = model(tokens, output_hidden_states=True, use_cache=False)
        for slot in range(3):
            expected = alone.hidden_states[slot + 1][0]
            torch.testing.assert_close(features.hidden[start:end, slot], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features.final_hidden[start:end], alone.hidden_states[-1][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features.logsumexp[start:end], alone.logits[0].logsumexp(-1), rtol=1e-5, atol=1e-5)
        assert torch.equal(features.greedy[start:end].long(), alone.logits[0].argmax(-1))


def test_features_equal_those_of_transformers(target: Path):
    engine = HFEngine(TargetConfig(model=str(target), device="cpu", vocab_chunk_tokens=16))
    request = tiny_request(LENGTHS, num_position_axes=engine.info().num_position_axes)
    features = engine.capture(request, SPEC).result(60)
    engine.close()
    check_features(features, request, load(target, attn_implementation="eager"))


@pytest.mark.parametrize("documents", ["packed", "padded"])
def test_documents_on_both_sides_of_longrope_are_computed_apart(tmp_path: Path, documents: str):
    """The frequencies are those of the longest text of a forward: 32 tokens and fewer have others than 33."""
    save_tiny_target(tmp_path, "phi3")
    model = load(tmp_path, attn_implementation="eager")
    engine = HFEngine(TargetConfig(model=str(tmp_path), device="cpu", documents=documents))
    for lengths in ((32, 33, 20, 40), (9, 32), (33, 50)):
        request = tiny_request(lengths)
        check_features(engine.capture(request, SPEC).result(60), request, model)
    engine.close()


@pytest.mark.parametrize(("architecture", "named"), [("gemma2", r"soft cap of 0\.5.*gemma2"), ("gpt_oss", "GptOss")])
def test_sdpa_is_refused_by_name_where_it_would_leave_something_out(tmp_path: Path, architecture: str, named: str):
    """Soft-capped scores, sinks: an attention function that does not know them would ignore them."""
    save_tiny_target(tmp_path, architecture)
    with pytest.raises(TargetError, match=named):
        HFEngine(TargetConfig(model=str(tmp_path), device="cpu", attention="sdpa"))


def test_chunked_attention_is_not_packed(tmp_path: Path):
    save_tiny_target(tmp_path, "llama4_text")
    with pytest.raises(TargetError, match=r"attention in chunks.*\"padded\""):
        HFEngine(TargetConfig(model=str(tmp_path), device="cpu", documents="packed"))


def documented() -> dict[str, dict[str, str]]:
    """The table of tried architectures: its rows by model type."""
    lines = (ROOT / "docs" / "targets.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    header = next(row for row in rows if row[0] == "`model_type`")
    return {
        row[0].strip("`"): dict(zip(header, row, strict=True))
        for row in rows
        if row[0].startswith("`") and row is not header
    }


def shown_logits(info: TargetInfo) -> str:
    transform = info.logit_transform
    assert not transform.has_bias
    parts = ["scale"] * (transform.scale != 1.0) + ["soft cap"] * (transform.soft_cap is not None)
    assert parts or transform == LogitTransform()
    return ", ".join(parts) or "-"


def test_the_table_of_tried_architectures_is_true(target: Path):
    """Of a model that also sees, its text model's row counts."""
    engine = HFEngine(TargetConfig(model=str(target), device="cpu"))
    info = engine.info()
    row = documented()[info.model_type]
    layout = choose_layout(find_parts(load(target)), TargetConfig(model=str(target)))
    engine.close()
    assert row["documents"] == {"documents": "packed", "padded": "padded"}[layout]
    assert row["logits"] == shown_logits(info)
    assert row["embedding"] == ("scaled" if info.embedding_scale != 1.0 else "-")


def test_the_table_names_nothing_that_no_test_holds():
    assert documented().keys() == {tiny_config(architecture).model_type for architecture in ARCHITECTURES}


def test_logits_rebuilt_from_checkpoint_rows_are_those_of_transformers(target: Path):
    """What a trainer does: lm_head rows from the files, final hidden from the features, the rest from TargetInfo."""
    model = load(target, attn_implementation="eager")
    config = TargetConfig(model=str(target), device="cpu")
    engine = HFEngine(config)
    info = engine.info()
    request = tiny_request((20,), num_position_axes=info.num_position_axes)
    features = engine.capture(request, SPEC).result(60)
    rows = torch.arange(3, 300, 7)
    head = CheckpointWeights(config, torch.device("cpu"), torch.float32).lm_head(rows)
    rebuilt = apply_logit_transform(features.final_hidden @ head.T, info.logit_transform)
    with torch.no_grad():
        own = model(torch.from_numpy(request.tokens).long()[None], use_cache=False).logits[0]
    torch.testing.assert_close(rebuilt, own[:, rows], rtol=1e-4, atol=1e-5)
    engine.close()


def test_compiled_layers_give_the_same_features_without_compiling_for_each_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    graphs = []

    def count_graphs(graph, inputs):
        """Traces as torch.compile does; leaves the C++ compiler out, which takes half a minute here."""
        graphs.append(graph)
        return graph.forward

    save_tiny_target(tmp_path)
    spec = FeatureSpec(layers=(0, 3), greedy=True)
    plain = HFEngine(TargetConfig(model=str(tmp_path), device="cpu"))
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count_graphs))
    compiled = HFEngine(TargetConfig(model=str(tmp_path), device="cpu", compile=True))
    counts = []
    for lengths in ((9, 1, 30), (4, 44), (20, 6, 2), (50, 2), (3, 3, 3)):
        request = tiny_request(lengths)
        one, other = plain.capture(request, spec).result(60), compiled.capture(request, spec).result(60)
        torch.testing.assert_close(other.hidden, one.hidden, rtol=1e-4, atol=1e-5)
        assert torch.equal(other.greedy, one.greedy)
        counts.append(len(graphs))
    assert counts[0] > 0
    assert counts[1] == counts[-1]  # one row's shape, then any
    plain.close()
    compiled.close()
