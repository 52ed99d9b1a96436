"""Attention by flex_attention's block lists: of rows of every length, compiled a few times and never run uncompiled."""

import random
from importlib import import_module

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from paceline.drafts.attention import _attend_block, _attend_blocks, _flex, _list_blocks

SIZES = [(1, 3), (1, 700), (128, 128), (128, 129), (129, 128), (300, 100), (640, 640), (1000, 200)]
"""Queries and keys: one block of either, of both, as many of one as of the other."""


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch):
    # Traced for a GPU, which these tests do not have: on a CPU flex_attention has no backward pass, and says so.
    monkeypatch.setattr(import_module("torch.nn.attention.flex_attention"), "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def attend(counter, num_queries: int, num_keys: int, heads: int = 4, kv_heads: int = 2, dtype=torch.float32):
    q = torch.randn(num_queries, heads, 32, dtype=dtype, requires_grad=torch.is_grad_enabled())
    k, v = torch.randn(2, num_keys, kv_heads, 32, dtype=dtype).unbind()
    first = torch.randint(num_keys, (num_queries,), generator=torch.Generator().manual_seed(num_keys))
    end = torch.maximum(first, first.flip(0) + 1)
    out, lse = _attend_blocks(q, k, v, _list_blocks(first, end, num_keys), _flex(counter))
    return (out, lse), _attend_block(q, k, v, first, end)


def test_rows_of_any_length_compile_at_most_three_variants_with_and_three_without_gradients(counter):
    generator = random.Random(0)
    some = [(generator.randint(1, 1500), generator.randint(1, 3000)) for _ in range(60)]
    for sizes in [(512, 512), (1100, 1100), *SIZES, *some]:
        attend(counter, *sizes)
        with torch.no_grad():
            attend(counter, *sizes)
    assert counter.frame_count <= 6


def test_more_kinds_of_drafts_than_torch_compiles_by_default_all_run_compiled(counter, recwarn):
    kinds = [(h, h // g, dtype) for h in (2, 4, 6, 8) for g in (1, 2) for dtype in (torch.float32, torch.bfloat16)]
    for kind in kinds:
        for sizes in ((300, 500), (900, 400)):
            attend(counter, *sizes, *kind)
    assert counter.frame_count > 8, "the premise: more than torch's default limit"
    assert not [str(w.message) for w in recwarn if "without torch.compile" in str(w.message)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_blocks_attend_as_a_table_of_all_pairs_does(counter, sizes: tuple[int, int]):
    with torch.no_grad():
        (out, lse), (expected, expected_lse) = attend(counter, *sizes)
    assert torch.isfinite(expected_lse).any()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
