"""EAGLE-3 on CUDA: flex_attention and bf16 against the dense fp32 path of a CPU."""

import pytest
import torch

from paceline.config.drafts import Eagle3Config
from paceline.drafts.eagle3.algorithm import Eagle3
from paceline.schema.features import FeatureRow, Features
from rows import RandomWeights, make_context, make_row, random_features, tiny_info

pytestmark = pytest.mark.gpu
INFO = tiny_info(hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, intermediate_size=512)
LENGTHS = [300, 77, 410, 90]
SPANS = [[(50, 120), (150, 300)], [(0, 77)], [(3, 4), (6, 8), (20, 400)], [(10, 90)]]


def on_device(row, device, dtype):
    f = row.features
    moved = Features(
        layers=f.layers,
        hidden=f.hidden.to(device, dtype),
        greedy=f.greedy.to(device),
        final_hidden=f.final_hidden.to(device, dtype),
        final_index=f.final_index.to(device),
        logsumexp=None,
        row_hash=f.row_hash,
        finite=True,
    )
    return FeatureRow(row.row, moved)


def loss_and_gradient(device, dtype, compiled=False):
    weights = RandomWeights(INFO, dtype=dtype, device=device)
    context = make_context(INFO, device=torch.device(device), dtype=dtype, compile=compiled, weights=weights)
    algorithm = Eagle3(Eagle3Config(num_depths=4, vocab_size=0), context)
    row = random_features(make_row(LENGTHS, SPANS), algorithm.feature_spec(algorithm.config, INFO), INFO)
    terms = algorithm.loss(on_device(row, device, dtype))
    terms.total.backward()
    gradient = torch.cat([p.grad.float().flatten().cpu() for p in algorithm.draft.parameters()])
    return (terms.total / terms.weight).item(), terms.weight.item(), gradient


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def test_fp32_on_cuda_equals_the_cpu():
    loss, weight, gradient = loss_and_gradient("cuda", torch.float32)
    expected, expected_weight, expected_gradient = loss_and_gradient("cpu", torch.float32)
    assert weight == expected_weight
    assert loss == pytest.approx(expected, rel=1e-3)  # flex_attention multiplies in tf32
    assert cosine(gradient, expected_gradient) > 0.9999


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_on_cuda_is_close_to_fp32_on_the_cpu(compiled):
    loss, _, gradient = loss_and_gradient("cuda", torch.bfloat16, compiled)
    expected, _, expected_gradient = loss_and_gradient("cpu", torch.float32)
    assert loss == pytest.approx(expected, rel=2e-2)
    assert cosine(gradient, expected_gradient) > 0.99
