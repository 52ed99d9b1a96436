"""DFlash on CUDA: flex_attention and bf16 against the dense fp32 path of a CPU."""

import dataclasses

import pytest
import torch

from paceline.config.drafts import DFlashConfig
from paceline.drafts.dflash.algorithm import DFlash
from paceline.schema.features import FeatureRow
from rows import RandomWeights, make_context, make_row, random_features, tiny_info

pytestmark = pytest.mark.gpu
INFO = tiny_info(hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, intermediate_size=512)
LENGTHS = [300, 77, 410, 90]
SPANS = [[(50, 120), (150, 300)], [(0, 77)], [(3, 4), (6, 8), (20, 400)], [(10, 90)]]
FULL = DFlashConfig(num_layers=2, anchor_every=4)
SLIDING = FULL.model_copy(update={"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 40})


def build(config, device, dtype, **changes) -> DFlash:
    weights = RandomWeights(INFO, dtype=dtype, device=device)
    context = make_context(INFO, device=torch.device(device), dtype=dtype, weights=weights, **changes)
    return DFlash(config, context)


def features(algorithm: DFlash) -> FeatureRow:
    row = random_features(make_row(LENGTHS, SPANS), algorithm.feature_spec(algorithm.config, INFO), INFO)
    hidden = row.features.hidden.to(algorithm.context.device, algorithm.context.dtype)
    return FeatureRow(row.row, dataclasses.replace(row.features, hidden=hidden))


def loss_and_gradient(algorithm: DFlash) -> tuple[float, float, torch.Tensor]:
    terms = algorithm.loss(features(algorithm))
    terms.total.backward()
    gradient = torch.cat([p.grad.float().flatten().cpu() for p in algorithm.draft.parameters()])
    return (terms.total / terms.weight).item(), terms.weight.item(), gradient


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


@pytest.mark.parametrize("config", [FULL, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("changes", [{}, {"compile": True}, {"compile": True, "activation_checkpointing": True}])
def test_bf16_on_cuda_is_close_to_fp32_on_the_cpu(config, changes):
    loss, weight, gradient = loss_and_gradient(build(config, "cuda", torch.bfloat16, **changes))
    expected, expected_weight, expected_gradient = loss_and_gradient(build(config, "cpu", torch.float32))
    assert weight == pytest.approx(expected_weight, rel=1e-6)
    assert loss == pytest.approx(expected, rel=2e-2)
    assert cosine(gradient, expected_gradient) > 0.99


def test_fp32_on_cuda_equals_the_cpu():
    loss, _, gradient = loss_and_gradient(build(FULL, "cuda", torch.float32))
    expected, _, expected_gradient = loss_and_gradient(build(FULL, "cpu", torch.float32))
    assert loss == pytest.approx(expected, rel=1e-3)  # flex_attention multiplies in tf32
    assert cosine(gradient, expected_gradient) > 0.9999


def test_a_loss_never_waits_for_the_device():
    algorithm = build(FULL, "cuda", torch.bfloat16)
    row = features(algorithm)
    algorithm.loss(row).total.backward()  # compiles attention, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        algorithm.loss(row).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_decoder_proposes_what_the_walk_proposes():
    algorithm = build(FULL, "cuda", torch.float32)
    row = features(algorithm)
    tokens = torch.from_numpy(row.row.tokens).long().cuda()
    decoder, starts, proposed = algorithm.decoder(), [1, 40, 299], []
    with torch.no_grad():
        for begin, end in zip([0, 1, 40], starts, strict=True):
            decoder.extend(row.features.hidden[begin:end].flatten(1), tokens[begin + 1 : end + 1])
            proposed.append(decoder.propose())
    together = algorithm.propose(row, torch.arange(300, device="cuda"))[starts]
    # flex_attention's tf32 may turn a near tie.
    assert (torch.stack(proposed) == together).float().mean() > 0.9
