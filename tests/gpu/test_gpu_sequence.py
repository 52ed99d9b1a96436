"""Sequence parallelism on two GPUs: NCCL, bf16, compiled; half the memory for a long row; no wait for the device."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from paceline.config.drafts import DFlashConfig, Eagle3Config
from rows import tiny_info
from sequence_ranks import (
    Case,
    Ranks,
    compute_loss,
    compute_without_waiting,
    measure_peak,
    running_ranks,
    walk_held_out,
)

pytestmark = pytest.mark.gpu2
INFO = tiny_info(hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, intermediate_size=512)
PACKED = ([300, 77, 410, 90], [[(50, 120), (150, 300)], [(0, 77)], [(3, 4), (6, 8), (20, 400)], [(10, 90)]])
FIRST_EMPTY = ([500, 377], [[(440, 490)], [(10, 377)]])
EAGLE3 = Case(Eagle3Config(num_depths=4, vocab_size=0), *PACKED, info=INFO, device="cuda", dtype=torch.bfloat16)
DFLASH = dataclasses.replace(
    EAGLE3,
    config=DFlashConfig(
        num_layers=2, anchor_every=4, layer_types=("sliding_attention", "full_attention"), sliding_window=40
    ),
)
COMPILED = {"compile": True, "activation_checkpointing": True}
CASES = {
    "eagle3": EAGLE3,
    "eagle3, compiled and checkpointed": dataclasses.replace(EAGLE3, changes=COMPILED),
    "eagle3, first part without slots": dataclasses.replace(
        EAGLE3, lengths=FIRST_EMPTY[0], spans=FIRST_EMPTY[1], changes={"compile": True}
    ),
    "dflash": DFLASH,
    "dflash, compiled and checkpointed": dataclasses.replace(DFLASH, changes=COMPILED),
}
# 120 slots in the second part: too few for a block, and too many keys to score at once.
FEW_SLOTS = dataclasses.replace(EAGLE3, lengths=[24000], spans=[[(100, 1000), (20000, 20122)]])
# With one key/value head, heads could not be shared out.
CASES |= {
    f"{name}, heads": dataclasses.replace(CASES[name], exchange="heads")
    for name in ("eagle3, compiled and checkpointed", "dflash")
}
CASES |= {
    "eagle3, one key/value head": dataclasses.replace(
        EAGLE3, config=EAGLE3.config.model_copy(update={"num_heads": 3, "num_kv_heads": 1})
    ),
    "dflash, one key/value head": dataclasses.replace(
        DFLASH, config=DFLASH.config.model_copy(update={"num_heads": 3, "num_kv_heads": 1})
    ),
}
EXCHANGES = ("keys", "heads")
# An 8B target's shapes, divided by four; documents that cross the middle.
LARGE = tiny_info(
    hidden_size=1024, intermediate_size=3072, num_heads=8, num_kv_heads=2, head_dim=128, vocab_size=8192,
    num_tokenizer_tokens=8000, mask_token_id=8000,
)  # fmt: skip
LONG = ([5000, 7000, 4384], [[(200, 4900)], [(200, 6900)], [(200, 4300)]])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    count = torch.cuda.device_count()
    assert count >= 2, f"these tests need 2 CUDA devices, this machine has {count}: run them with make gpu-test-2 there"
    with running_ranks(tmp_path_factory.mktemp("ranks"), 2, "nccl") as ranks:
        yield ranks


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_two_gpus_compute_what_one_computes(ranks: Ranks, case: Case):
    alone = compute_loss(None, dataclasses.replace(case, changes={}))
    shares = ranks.call(2, compute_loss, case, timeout_s=280)
    assert sum(share.weight for share in shares) == pytest.approx(alone.weight, rel=1e-6)
    assert sum(share.total for share in shares) == pytest.approx(alone.total, rel=1e-2)
    for name, expected in alone.gradients.items():
        gradient = np.sum([share.gradients[name] for share in shares], axis=0)
        cosine = (gradient * expected).sum() / np.linalg.norm(gradient) / np.linalg.norm(expected)
        assert cosine > 0.99, f"{name}: {cosine}"


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("case", [EAGLE3, DFLASH, FEW_SLOTS], ids=["eagle3", "dflash", "eagle3, few slots"])
def test_fp32_differs_in_the_last_bits_alone(ranks: Ranks, case: Case, exchange):
    exact = dataclasses.replace(case, dtype=torch.float32, exchange=exchange)
    alone, shares = compute_loss(None, exact), ranks.call(2, compute_loss, exact, timeout_s=280)
    # flex_attention multiplies in tf32 on both sides.
    assert sum(share.total for share in shares) == pytest.approx(alone.total, rel=1e-4)
    for name, expected in alone.gradients.items():
        gradient = np.sum([share.gradients[name] for share in shares], axis=0)
        assert np.linalg.norm(gradient - expected) < 2e-3 * np.linalg.norm(expected), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "config",
    [Eagle3Config(num_depths=4, vocab_size=0), DFlashConfig(num_layers=3, anchor_every=6)],
    ids=["eagle3", "dflash"],
)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_each_of_two_gpus_needs_less_than_60_percent_of_the_memory_of_one(
    ranks: Ranks, config, checkpointing: bool, exchange
):
    changes = {"head_chunk_tokens": 1024, "activation_checkpointing": checkpointing}
    case = Case(config, *LONG, changes, LARGE, "cuda", torch.bfloat16, exchange)
    measure_peak(None, dataclasses.replace(case, lengths=[2000], spans=[[(100, 1900)]]))  # compiles attention
    alone = measure_peak(None, case)
    assert alone > 1 << 30, "the premise: more than weights and one chunk of logits"
    for peak in ranks.call(2, measure_peak, case, timeout_s=280):
        assert peak < 0.6 * alone


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("case", [EAGLE3, DFLASH], ids=["eagle3", "dflash"])
def test_a_shared_loss_never_waits_for_the_device(ranks: Ranks, case: Case, exchange):
    shared = dataclasses.replace(case, exchange=exchange)
    assert all(np.isfinite(ranks.call(2, compute_without_waiting, shared, timeout_s=280)))


@pytest.mark.parametrize("case", [EAGLE3, DFLASH], ids=["eagle3", "dflash"])
def test_a_held_out_row_is_walked_by_two_gpus_as_by_one(ranks: Ranks, case: Case):
    alone, shares = walk_held_out(None, case), ranks.call(2, walk_held_out, case, timeout_s=280)
    assert shares[0].sums + shares[1].sums == alone.sums
    proposals = np.concatenate([share.proposals for share in shares])
    assert (proposals[:, 0] == alone.proposals[:, 0]).mean() > 0.95, (
        "bf16: few are so close that the order of sums says"
    )
    assert sum(share.loss for share in shares) == pytest.approx(alone.loss, rel=1e-2)
