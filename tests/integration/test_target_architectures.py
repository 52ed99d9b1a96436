"""The hf engine on each supported architecture equals transformers' own hidden states, a document at a time."""

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.config.target import TargetConfig
from paceline.schema.features import FeatureSpec
from paceline.target.hf.capture import apply_logit_transform
from paceline.target.hf.engine import HFEngine
from paceline.target.hf.weights import CheckpointWeights
from tiny import save_nested_tiny_target, save_tiny_target, tiny_request

LENGTHS = (9, 1, 70, 23)
"""70 is longer than the chunks of 64 in which hybrid layers run."""
SPEC = FeatureSpec(layers=(0, 1, 2), final_hidden="all", greedy=True, logsumexp=True)
ARCHITECTURES = ["llama", "qwen3", "qwen3_moe", "qwen3_5", "nested", "gemma2", "cohere", "granite"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("architecture") / request.param
    return save_nested_tiny_target(path) if request.param == "nested" else save_tiny_target(path, request.param)


def test_features_equal_those_of_transformers(target: Path):
    model = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager").eval()
    engine = HFEngine(TargetConfig(model=str(target), device="cpu", vocab_chunk_tokens=16))
    request = tiny_request(LENGTHS, num_position_axes=engine.info().num_position_axes)
    features = engine.capture(request, SPEC).result(60)
    assert features.finite
    for start, end in zip(request.documents, request.documents[1:], strict=False):
        with torch.no_grad():
            alone = model(
                torch.from_numpy(request.tokens[start:end]).long()[None], output_hidden_states=True, use_cache=False
            )
        for slot in range(3):
            expected = alone.hidden_states[slot + 1][0]
            torch.testing.assert_close(features.hidden[start:end, slot], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features.final_hidden[start:end], alone.hidden_states[-1][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features.logsumexp[start:end], alone.logits[0].logsumexp(-1), rtol=1e-5, atol=1e-5)
        assert torch.equal(features.greedy[start:end].long(), alone.logits[0].argmax(-1))
    engine.close()


def test_logits_rebuilt_from_checkpoint_rows_are_those_of_transformers(target: Path):
    """What a trainer does: lm_head rows from the files, final hidden from the features, the rest from TargetInfo."""
    model = AutoModelForCausalLM.from_pretrained(target).eval()
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
