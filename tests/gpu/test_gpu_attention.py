"""flex_attention on CUDA: drafts of many kinds and rows of many lengths in one process, and never all pairs scored."""

import random

import pytest
import torch

from paceline.drafts.attention import attend_context, build_visibility

pytestmark = pytest.mark.gpu
# More than the eight variants that torch compiles by default.
KINDS = [(heads, heads // group, head_dim) for heads in (4, 8, 12) for group in (1, 4) for head_dim in (64, 128)]


def attend_peak(num_queries: int, num_keys: int, heads: int = 8, kv_heads: int = 2, head_dim: int = 64) -> int:
    """Bytes that causal attention takes at one time."""
    end = torch.arange(num_queries, device="cuda") % num_keys + 1
    visible = build_visibility(torch.zeros_like(end), end, num_keys)
    q = torch.randn(num_queries, heads, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = torch.randn(2, num_keys, kv_heads, head_dim, device="cuda", dtype=torch.bfloat16).unbind()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, lse = attend_context(q, k, v, visible)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    return torch.cuda.max_memory_allocated() - before


def test_more_kinds_of_drafts_than_torch_compiles_by_default_score_no_table_of_pairs():
    length = 16384
    with torch.no_grad():
        for heads, kv_heads, head_dim in KINDS:
            # The first call compiles: kernels are timed beside a buffer of the L2 cache's size.
            attend_peak(length, length, heads, kv_heads, head_dim)
            peak = attend_peak(length, length, heads, kv_heads, head_dim)
            # Out and what isfinite makes of it (3.5 outputs on an H200); scores would take heads * length * length.
            assert peak < 4 * length * heads * head_dim * 2 < heads * length * length


def test_rows_of_any_length_compile_at_most_three_variants():
    generator = random.Random(0)
    sizes = [(512, 512), (1100, 1100)] + [(generator.randint(1, 1500), generator.randint(1, 3000)) for _ in range(60)]
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    for size in sizes:
        attend_peak(*size)
    assert 0 < stats["unique_graphs"] - before <= 3
