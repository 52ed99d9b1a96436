"""The hf engine on a GPU, on each architecture: transformers' own hidden states in fp32, near them in bf16."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from integration.test_target_architectures import LENGTHS, SPEC, load, target  # noqa: F401 - a fixture
from paceline.config.target import TargetConfig
from paceline.schema.features import Features
from paceline.schema.rows import RowRequest
from paceline.target.hf.engine import HFEngine
from tiny import tiny_request

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@contextlib.contextmanager
def captured(path: Path, **settings: Any) -> Iterator[tuple[RowRequest, Features]]:
    with contextlib.closing(HFEngine(TargetConfig(model=str(path), device="cuda", **settings))) as engine:
        request = tiny_request(LENGTHS, num_position_axes=engine.info().num_position_axes)
        yield request, engine.capture(request, SPEC).result(120)


def alone(path: Path, request: RowRequest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states ([T, 3, H]), final hidden states and logits that transformers computes on a CPU, a document at a
    time."""
    model, found = load(path, attn_implementation="eager"), []
    for start, end in zip(request.documents, request.documents[1:], strict=False):
        tokens = torch.from_numpy(request.tokens[start:end]).long()[None]
        with torch.no_grad():
            answer = model(tokens, output_hidden_states=True, use_cache=False)
        hidden = torch.stack([answer.hidden_states[layer + 1][0] for layer in SPEC.layers], dim=1)
        found.append((hidden, answer.hidden_states[-1][0], answer.logits[0]))
    hidden, final, logits = (torch.cat(parts) for parts in zip(*found, strict=True))
    return hidden, final, logits


def test_fp32_features_equal_those_of_transformers(target: Path):  # noqa: F811
    with captured(target, dtype="float32") as (request, features):
        hidden, final, logits = alone(target, request)
        assert features.hidden.is_cuda
        torch.testing.assert_close(features.hidden.cpu(), hidden, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(features.final_hidden.cpu(), final, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(features.logsumexp.cpu(), logits.logsumexp(-1), rtol=1e-4, atol=1e-4)
        assert (features.greedy.cpu() == logits.argmax(-1)).float().mean() > 0.98


def test_bf16_features_are_near(target: Path):  # noqa: F811
    """Half of the tokens: rounding sends some of the others to other experts."""
    with captured(target, dtype="bfloat16") as (request, features):
        hidden, _, _ = alone(target, request)
        errors = (features.hidden.cpu().float() - hidden).norm(dim=-1) / hidden.norm(dim=-1)
        assert features.finite
        assert errors.median(dim=0).values.max() < 4e-2
