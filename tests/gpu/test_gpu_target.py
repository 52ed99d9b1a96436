"""The hf engine on CUDA: bf16 features against fp32, packed against padded, rows in flight."""

import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.config.target import TargetConfig
from paceline.schema.features import Features, FeatureSpec
from paceline.target.hf.engine import HFEngine
from paceline.target.hf.weights import CheckpointWeights
from tiny import save_tiny_target, tiny_request

pytestmark = pytest.mark.gpu

MID_SIZE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
SPEC = FeatureSpec(layers=(0, 1, 3), final_hidden="all", greedy=True, logsumexp=True)
LENGTHS = (300, 1, 77, 646)


@pytest.fixture(scope="module", params=["tiny", "mid-size"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    if request.param == "tiny":
        return save_tiny_target(path)
    save_tiny_target(path, **MID_SIZE)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():  # tiny targets are scaled up to be opinionated; this size is so without
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)
    model.save_pretrained(path)
    return path


def compute(target: Path, request, spec=SPEC, **settings) -> Features:
    engine = HFEngine(TargetConfig(model=str(target), device="cuda", **settings))
    features = engine.capture(request, spec).result(300)
    engine.close()
    return features


def load_lm_head(target: Path) -> torch.Tensor:
    config = TargetConfig(model=str(target))
    return CheckpointWeights(config, torch.device("cuda"), torch.float32).lm_head()


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.float() - reference.float()).norm() / reference.float().norm())


def cosine(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float(torch.cosine_similarity(value.float(), reference.float(), dim=-1).mean())


@pytest.mark.parametrize("documents", ["packed", "padded"])
def test_bf16_features_are_close_to_fp32(target: Path, documents: str):
    request = tiny_request(LENGTHS)
    exact = compute(target, request, dtype="float32", documents="padded")
    ours = compute(target, request, dtype="bfloat16", documents=documents)
    assert ours.hidden.is_cuda
    assert ours.hidden.dtype is torch.bfloat16
    assert ours.finite
    for slot in range(3):
        assert relative(ours.hidden[:, slot], exact.hidden[:, slot]) < 3e-2
        assert cosine(ours.hidden[:, slot], exact.hidden[:, slot]) > 0.999
    assert cosine(ours.final_hidden, exact.final_hidden) > 0.999
    # A greedy token may only change where the exact logits all but tie.
    logits = exact.final_hidden @ load_lm_head(target).T
    given_up = logits.max(-1).values - logits.gather(-1, ours.greedy.long()[:, None])[:, 0]
    assert (given_up / logits.std(-1)).max() < 0.15
    assert (ours.greedy == exact.greedy).float().mean() > 0.9
    assert (ours.logsumexp - exact.logsumexp).abs().max() < 0.1


def test_fp32_packed_equals_padded(target: Path):
    request = tiny_request(LENGTHS)
    packed = compute(target, request, dtype="float32", documents="packed")
    padded = compute(target, request, dtype="float32", documents="padded")
    assert relative(packed.hidden, padded.hidden) < 1e-5
    assert relative(packed.final_hidden, padded.final_hidden) < 1e-5


def test_packed_documents_do_not_see_each_other_in_bf16(target: Path):
    engine = HFEngine(TargetConfig(model=str(target), device="cuda", dtype="bfloat16", documents="packed"))
    request = tiny_request(LENGTHS)
    before = engine.capture(request, SPEC).result(60)
    request.tokens[:300] = (request.tokens[:300] + 1) % 300
    after = engine.capture(request, SPEC).result(60)
    engine.close()
    assert not torch.equal(before.hidden[:300], after.hidden[:300])
    assert torch.equal(before.hidden[300:], after.hidden[300:])
    assert torch.equal(before.final_hidden[300:], after.final_hidden[300:])


def test_a_sliding_window_holds_in_bf16_packed_documents(tmp_path: Path):
    layer_types = ["sliding_attention", "full_attention"] * 2
    save_tiny_target(tmp_path, layer_types=layer_types, use_sliding_window=True, sliding_window=16)
    request = tiny_request((200, 30))
    packed = compute(tmp_path, request, dtype="bfloat16", documents="packed")
    padded = compute(tmp_path, request, dtype="bfloat16", documents="padded")
    assert relative(packed.hidden, padded.hidden) < 2e-2


def test_rows_submitted_without_waiting_are_bit_equal_to_rows_alone(target: Path):
    engine = HFEngine(TargetConfig(model=str(target), device="cuda", dtype="bfloat16"))
    requests = [tiny_request((50 + seed, 200, 7), seed=seed) for seed in range(20)]
    alone = [engine.capture(request, SPEC).result(60) for request in requests]
    together = [future.result(60) for future in [engine.capture(request, SPEC) for request in requests]]
    engine.close()
    for one, other in zip(alone, together, strict=True):
        for name, tensor in one.tensors().items():
            assert torch.equal(tensor, other.tensors()[name]), name


def test_submitting_a_row_never_waits_for_the_device(target: Path):
    """No synchronisation while a row's kernels are queued: the debug mode of torch raises on one."""
    engine = HFEngine(TargetConfig(model=str(target), device="cuda", dtype="bfloat16"))
    request = tiny_request(LENGTHS, spans=[(3, 200), (400, 900)])
    spec = FeatureSpec(layers=(0, 1, 3), final_hidden="supervised", greedy=True, logsumexp=True)
    engine.capture(request, spec).result(60)
    torch.cuda.set_sync_debug_mode("error")
    try:
        features = engine.capture(request, spec).result(60)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert features.finite
    engine.close()


def test_times_of_rows_in_flight_together_do_not_overlap(target: Path):
    """The next row's kernels are queued while a row computes: its time begins when that row is done."""
    engine = HFEngine(TargetConfig(model=str(target), device="cuda", dtype="bfloat16"))
    engine.capture(tiny_request(LENGTHS), SPEC).result(60)
    began = time.monotonic()
    futures = [engine.capture(tiny_request(LENGTHS, seed=seed), SPEC) for seed in range(30)]
    rows = [future.result(60) for future in futures]
    wall_s = time.monotonic() - began
    assert 0.5 * wall_s < sum(row.computed_s for row in rows) <= wall_s
    engine.close()


def test_compiled_layers_give_the_same_features(target: Path):
    request = tiny_request(LENGTHS)
    plain = compute(target, request, dtype="bfloat16")
    compiled = compute(target, request, dtype="bfloat16", compile=True)
    for slot in range(3):
        assert relative(compiled.hidden[:, slot], plain.hidden[:, slot]) < 3e-2


def test_memory_is_returned_after_a_row_that_does_not_fit(target: Path):
    from paceline.errors import OutOfMemoryError

    engine = HFEngine(TargetConfig(model=str(target), device="cuda", dtype="bfloat16"))
    torch.cuda.empty_cache()
    fill = torch.empty(int(torch.cuda.mem_get_info()[0] - (96 << 20)), dtype=torch.uint8, device="cuda")
    big = tiny_request((4096,) * 128)
    with pytest.raises(OutOfMemoryError, match=r"data\.row_tokens"):
        engine.capture(big, SPEC).result(60)
    del fill
    torch.cuda.empty_cache()  # or the next row is cut out of this block, which then can never be returned
    assert engine.capture(tiny_request(LENGTHS), SPEC).result(60).finite
    engine.close()


def test_close_is_quick(target: Path):
    engine = HFEngine(TargetConfig(model=str(target), device="cuda", dtype="bfloat16"))
    for seed in range(50):
        engine.capture(tiny_request(LENGTHS, seed=seed), SPEC)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 5.0
