"""Attention of draft slots: over an interval of context keys, merged with a few keys of their own.

Every draft algorithm has the same two kinds of keys. *Context* keys belong to row tokens; what a query sees of
them is an interval [first, end) of the row, which says everything about documents, causality and windows. *Own*
keys belong to the draft's deeper steps (EAGLE-3: the slot's own depths; DFlash: the slot's own block); they are
few, so they are scored in closed form and merged through the context's logsumexp. No mask over all pairs of
queries and keys of several depths ever exists.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paceline.drafts.compiling import compile_rows
from paceline.drafts.sequence import ALONE, Exchange

Flex = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor]]
"""flex_attention of queries, keys and values [1, heads, n, head_dim] and a BlockMask -> out and logsumexp."""
_BLOCK = 128
"""Query and key block of flex_attention; its own default."""
_FEWEST = _BLOCK + 1
"""Queries, and keys, that flex_attention is given: for a single block of either torch.compile would compile anew."""
_DENSE_SCORES = 1 << 20
"""Pairs of fewer than a block of queries and all keys that are scored at once on CUDA: 128 MB with 32 heads."""


@dataclass(frozen=True, slots=True)
class Visibility:
    """For each query that this rank attends with, the interval [first, end) of context keys it sees.

    end <= first sees none. With `blocks` there may be more of them than queries: the last ones pad a block.
    """

    first: Tensor
    """int64[Q]."""
    end: Tensor
    """int64[Q]."""
    blocks: Any = None
    """flex_attention's BlockMask of the same intervals, where that backend is used; of at least two blocks each way."""
    exchange: Exchange = ALONE
    """How the ranks of a sequence-parallel group bring queries and keys together."""


def build_visibility(first: Tensor, end: Tensor, num_keys: int, exchange: Exchange = ALONE) -> Visibility:
    """Intervals with what the backend needs: block lists for flex_attention on CUDA.

    On a CPU flex_attention has no backward pass. A handful of queries (decoding, a part of a row with few slots) would
    leave its blocks empty; where there are too many keys to score at once, they are padded.

    Args:
        first, end: int64, of the queries of all ranks of `exchange`.
    """
    first, end = first[exchange.attending], end[exchange.attending]
    few = len(first) < _BLOCK and len(first) * num_keys <= _DENSE_SCORES
    if first.device.type != "cuda" or few:
        return Visibility(first, end, None, exchange)
    return _list_blocks(first, end, num_keys, exchange)


def attend_context(q: Tensor, k: Tensor, v: Tensor, visible: Visibility) -> tuple[Tensor, Tensor]:
    """Attention over context keys alone.

    Args:
        q: [Q, heads, head_dim]. k, v: [T, kv_heads, head_dim], kv_heads divides heads.
            q are this rank's own queries; k and v what `Exchange.share_keys` has made of its own keys and values.

    Returns:
        out [Q, heads, head_dim] and the fp32 logsumexp [Q, heads] of the scores; a query that sees no key has
        out 0 and logsumexp -inf.
    """
    return visible.exchange.attend(q, lambda queries: _attend(queries, k, v, visible))


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Visibility) -> tuple[Tensor, Tensor]:
    if visible.blocks is not None:
        return _attend_blocks(q, k, v, visible, _flex())
    return _attend_dense(q, k, v, visible)


def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, flex: Flex) -> tuple[Tensor, Tensor]:
    num_queries = len(q)
    q = _padded(q, len(visible.first))
    k, v = _padded(k, _FEWEST), _padded(v, _FEWEST)
    out, lse = flex(q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], visible.blocks)
    return out[0].transpose(0, 1)[:num_queries], lse[0].transpose(0, 1)[:num_queries]


def _padded(items: Tensor, num: int) -> Tensor:
    """At least `num` of [n, heads, head_dim]; what is added is zero."""
    return items if len(items) >= num else torch.nn.functional.pad(items, (0, 0, 0, 0, 0, num - len(items)))


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, visible: Visibility) -> tuple[Tensor, Tensor]:
    """A block of queries at a time, over the keys that any of them sees: short documents cost what they are worth."""
    if q.device.type != "cpu" or len(q) <= _BLOCK:
        return _attend_block(q, k, v, visible.first, visible.end)
    outs, lses = [], []
    for start in range(0, len(q), _BLOCK):
        part = slice(start, start + _BLOCK)
        first, end = visible.first[part], visible.end[part]
        # Padded queries see nothing, wherever they say: they must not widen the range.
        seen = end > first
        low = int(torch.where(seen, first, len(k) - 1).min())
        keys = slice(low, max(low + 1, int(torch.where(seen, end, 0).max())))
        out, lse = _attend_block(q[part], k[keys], v[keys], first - low, end - low)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def _attend_block(q: Tensor, k: Tensor, v: Tensor, first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    num_queries, heads, head_dim = q.shape
    num_keys, kv_heads, _ = k.shape
    grouped = q.view(num_queries, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("qhgd,khd->hgqk", grouped.float(), k.float()) / math.sqrt(head_dim)
    keys = torch.arange(num_keys, device=q.device)
    blind = (end <= first)[:, None]
    # Rows without any key: softmax of all -inf is NaN, in the gradient too, so they are scored 0 and zeroed after.
    unseen = ((keys < first[:, None]) | (keys >= end[:, None])) & ~blind
    scores = scores.masked_fill(unseen, -math.inf).masked_fill(blind, 0.0)
    weights = torch.softmax(scores, -1)
    # The largest weight is exp(largest score - lse). torch.logsumexp would take the exponential of every -inf again,
    # which on a CPU is seven times slower than that of a number.
    lse = (scores.amax(-1) - weights.amax(-1).log()).masked_fill(blind[:, 0], -math.inf)
    out = torch.einsum("hgqk,khd->qhgd", weights.masked_fill(blind, 0.0), v.float()).reshape(q.shape).to(q.dtype)
    return out, lse.permute(2, 0, 1).reshape(num_queries, heads)


def merge_own(context: tuple[Tensor, Tensor], scores: Tensor, weigh: Callable[[Tensor], Tensor]) -> Tensor:
    """Join attention over the context with attention over own keys, as one softmax.

    Args:
        context: out [Q, heads, head_dim] and lse [Q, heads] of `attend_context`.
        scores: fp32 [Q, heads, m], scaled scores of each query's m own keys (-inf: not seen).
        weigh: sums own values: fp32 weights [Q, heads, m] -> [Q, heads, head_dim].
    """
    out, lse = context
    weights = torch.softmax(torch.cat([lse[..., None], scores], -1), -1)
    merged = out.float() * weights[..., :1] + weigh(weights[..., 1:])
    return merged.to(out.dtype)


@functools.cache
def _flex(backend: Any = "inductor") -> Flex:
    """Whole or not at all: where flex_attention is not compiled, it scores all pairs of queries and keys."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Any) -> tuple[Tensor, Tensor]:
        grouped = q.shape[1] != k.shape[1]
        out, aux = flex_attention(q, k, v, block_mask=blocks, enable_gqa=grouped, return_aux=AuxRequest(lse=True))
        assert aux.lse is not None, "it was asked for"
        return out, aux.lse

    return compile_rows(attend, dynamic=True, fullgraph=True, backend=backend)


def _list_blocks(first: Tensor, end: Tensor, num_keys: int, exchange: Exchange = ALONE) -> Visibility:
    num_missing = max(0, _FEWEST - len(first))
    first, end = (torch.nn.functional.pad(bounds, (0, num_missing)) for bounds in (first, end))
    return Visibility(first, end, _interval_blocks(first, end, max(num_keys, _FEWEST)), exchange)


def _interval_blocks(first: Tensor, end: Tensor, num_keys: int) -> Any:
    """A BlockMask from intervals: O(blocks), never a table of queries x keys."""
    from torch.nn.attention.flex_attention import BlockMask

    num_queries = len(first)
    query_blocks, key_blocks = -(-num_queries // _BLOCK), -(-num_keys // _BLOCK)
    pad = query_blocks * _BLOCK - num_queries
    seen = end > first
    low = torch.where(seen, first, num_keys)
    high = torch.where(seen, end, 0)
    union_first = torch.nn.functional.pad(low, (0, pad), value=num_keys).view(-1, _BLOCK).amin(1)
    union_end = torch.nn.functional.pad(high, (0, pad), value=0).view(-1, _BLOCK).amax(1)
    all_first = torch.nn.functional.pad(first, (0, pad), value=num_keys).view(-1, _BLOCK).amax(1)
    all_end = torch.nn.functional.pad(end, (0, pad), value=0).view(-1, _BLOCK).amin(1)
    key_start = torch.arange(key_blocks, device=first.device) * _BLOCK
    touched = (key_start[None] + _BLOCK > union_first[:, None]) & (key_start[None] < union_end[:, None])
    full = (key_start[None] >= all_first[:, None]) & (key_start[None] + _BLOCK <= all_end[:, None])
    partial = touched & ~full

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(chosen.int(), dim=1, descending=True, stable=True).int()
        return chosen.sum(1).int()[None, None], order[None, None].contiguous()

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key < end[query])

    partial_count, partial_index = listed(partial)
    full_count, full_index = listed(full)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_index,
        full_count,
        full_index,
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(num_queries, num_keys),
    )
