"""Real decoding with real drafts: lossless, and step by step what the serving walk reads off captured features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.config.drafts import DFlashConfig, Eagle3Config
from paceline.config.target import TargetConfig
from paceline.drafts.dflash.algorithm import DFlash
from paceline.drafts.eagle3.algorithm import Eagle3
from paceline.drafts.interface import DraftAlgorithm, DraftContext
from paceline.drafts.vocabulary import build_vocabulary
from paceline.evaluation.decoding import decode_with_draft
from paceline.evaluation.evaluate import decode_references, evaluate_algorithm
from paceline.evaluation.losslessness import Prompt
from paceline.evaluation.walk import walk_feature_row, walk_row
from paceline.export.exporting import export_draft
from paceline.schema.features import FeatureRow, merge_specs
from paceline.schema.rows import Row, request_features
from paceline.target.hf.engine import HFEngine
from paceline.target.hf.stepping import SteppingTarget
from paceline.target.hf.weights import CheckpointWeights
from tiny import tiny_config, tiny_tokenizer

CPU = torch.device("cpu")
NEW_TOKENS = 60
PROMPTS = [Prompt("short", (7,)), Prompt("longer", tuple(range(40, 60))), Prompt("other", (200, 3, 3, 90, 17))]


@dataclass
class Target:
    engine: HFEngine
    weights: CheckpointWeights
    stepping: SteppingTarget


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    path = tmp_path_factory.mktemp("lively")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 16.0 if "q_proj" in name or "q_norm" in name else 4.0
            parameter.mul_(scale if parameter.dim() > 1 else 1.0)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    config = TargetConfig(model=str(path), device="cpu")
    engine = HFEngine(config)
    yield Target(engine, CheckpointWeights(config, CPU, torch.float32), SteppingTarget(model))
    engine.close()


def build(kind: str, target: Target) -> DraftAlgorithm:
    info = target.engine.info()
    size = {"eagle3, D = V": 0, "eagle3, D < V": 120}.get(kind, 0)
    counts = np.bincount(
        [token for prompt in PROMPTS for token in target.stepping.generate(prompt.tensor(), NEW_TOKENS)],
        minlength=info.vocab_size,
    )
    if size:
        counts[np.argsort(-counts)[40:]] = 0  # tokens that the target writes and the draft cannot
    vocabulary = build_vocabulary(counts, size, info.vocab_size)
    context = DraftContext(info, target.weights, vocabulary, CPU, torch.float32, seed=0)
    if kind.startswith("eagle3"):
        return Eagle3(Eagle3Config(num_depths=4, vocab_size=size), context)
    return DFlash(DFlashConfig(num_layers=2, block_size=5, anchor_every=1), context)


def captured(target: Target, algorithm: DraftAlgorithm, prompt: Prompt, answer: list[int]) -> FeatureRow:
    """Prompt and answer as a row, with features from the engine."""
    tokens = np.array([*prompt.tokens, *answer], np.int32)
    row = Row(
        position=0,
        epoch=0,
        row_id=0,
        tokens=tokens,
        documents=np.array([0, len(tokens)], np.int32),
        spans=np.array([[len(prompt.tokens), len(tokens)]], np.int32),
        span_cut=np.zeros(1, bool),
        sample_ids=np.array([len(tokens)]),
        pieces=np.zeros(1, np.int32),
    )
    specs = [type(algorithm).feature_spec(algorithm.config, target.engine.info(), evaluation=e) for e in (False, True)]
    spec = merge_specs(specs)
    return FeatureRow(row, target.engine.capture(request_features(row, "test"), spec).result(60))


def train_a_little(algorithm: DraftAlgorithm, rows: list[FeatureRow], num_steps: int = 40) -> None:
    """Enough for the draft to be right here and wrong there."""
    optimizer = torch.optim.AdamW(algorithm.draft.parameters(), lr=3e-3)
    for _ in range(num_steps):
        terms = [algorithm.loss(row) for row in rows]
        (sum(term.total for term in terms) / sum(term.weight for term in terms)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["eagle3, D = V", "eagle3, D < V", "dflash"])
def test_decoding_is_lossless_and_takes_the_steps_of_the_walk(kind: str, target: Target, tmp_path: Path) -> None:
    references = decode_references(target.stepping, PROMPTS, NEW_TOKENS)
    algorithm = build(kind, target)
    rows = [captured(target, algorithm, r.prompt, r.generated) for r in references]
    untrained = evaluate_algorithm(target.stepping, references, algorithm, NEW_TOKENS).result()
    train_a_little(algorithm, rows)
    result = evaluate_algorithm(target.stepping, references, algorithm, NEW_TOKENS)
    figures = result.result()
    assert untrained["acceptance_length"] < 1.5 < figures["acceptance_length"] < algorithm.num_drafted + 1
    assert untrained["lossless"] == figures["lossless"] == "exact"
    assert result.answers == [reference.generated for reference in references]

    assert figures["walk"]["agreeing_steps"] == figures["steps"] == figures["walk"]["steps"]
    assert figures["walk"]["greedy_match"] == 1.0
    for row, steps in zip(rows, result.steps, strict=True):  # and over features captured by the engine
        assert walk_feature_row(algorithm, row) == [steps]
    walked = walk_row(algorithm, rows[0]) + walk_row(algorithm, rows[1]) + walk_row(algorithm, rows[2])
    for name in ("acceptance_length", "acceptance_length_all", "rate", "tokens"):
        assert walked.result()[name] == figures[name], name

    export_draft(algorithm, tmp_path / "draft")
    config = algorithm.config.model_copy(update={"init_from": str(tmp_path / "draft")})
    again = type(algorithm)(config, algorithm.context)
    layers = type(again).feature_spec(again.config, target.engine.info(), evaluation=True).layers
    with torch.no_grad():
        decoded = decode_with_draft(target.stepping, again.decoder(), layers, PROMPTS[1].tensor(), NEW_TOKENS)
    assert decoded.steps == result.steps[1]
