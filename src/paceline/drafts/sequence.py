"""Sequence parallelism (Ulysses): the ranks of a group train one row together, each with a part of its tokens.

Everything but attention over the context is local to a token or a slot. Around that attention items (the row's tokens
with their keys and values, or the slots with their queries) change hands: a rank that had some items with all heads
gets all items with some heads, and back. How many items each rank has is known to all from the row alone, so sizes are
never sent and the device is never waited for.

Every rank must make the same exchanges in the same order, forward and backward, also one that has no slots: the others
need its keys, and it is told the gradient of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from paceline.errors import ConfigError
from paceline.schema.features import FeatureRow
from paceline.schema.parts import WHOLE, Part, part_range

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """The ranks that train each row together, as this one sees them."""

    group: ProcessGroup
    rank: int
    """Of this process in the group, which is also the part of each row that it trains."""
    size: int
    """P."""

    @property
    def part(self) -> Part:
        return Part(self.rank, self.size)

    def check_heads(self, num_heads: int, num_kv_heads: int) -> None:
        """Raise ConfigError unless each rank can have an equal share of the heads."""
        if num_heads % self.size or num_kv_heads % self.size:
            raise ConfigError(
                f"training.sequence_parallel = {self.size} does not divide the draft's {num_heads} heads and "
                f"{num_kv_heads} key/value heads: choose a divisor of both, or set num_heads and num_kv_heads of the "
                "draft to multiples of it"
            )


@dataclass(frozen=True, slots=True)
class Exchange:
    """Items that the ranks of a group have shared out among them, in order of rank."""

    sequence: SequenceGroup
    counts: tuple[int, ...]
    """Items of each rank."""

    @property
    def own(self) -> slice:
        """This rank's among all items."""
        start = sum(self.counts[: self.sequence.rank])
        return slice(start, start + self.counts[self.sequence.rank])

    def to_heads(self, own: Tensor) -> Tensor:
        """[N, heads / P, ...]: all items with this rank's heads, of [n, heads, ...]: its items with all heads."""
        exchanged: Tensor = _ToHeads.apply(own, self)
        return exchanged

    def to_items(self, all_items: Tensor) -> Tensor:
        """[n, heads, ...] of [N, heads / P, ...]: the way back."""
        exchanged: Tensor = _ToItems.apply(all_items, self)
        return exchanged


def sequence_of(row: FeatureRow, sequence: SequenceGroup | None) -> SequenceGroup | None:
    """The group that trains `row`: None for a whole row, which this rank can train alone."""
    part = row.features.part
    if part == WHOLE:
        return None
    assert sequence is not None, f"row {row.row.position} came as {part}, and this rank trains rows alone"
    assert part == sequence.part, f"row {row.row.position} came as {part}, and this rank trains {sequence.part}"
    return sequence


def exchange_tokens(sequence: SequenceGroup, num_tokens: int) -> Exchange:
    """The exchange of what belongs to the tokens of a row."""
    ranges = [part_range(num_tokens, Part(rank, sequence.size)) for rank in range(sequence.size)]
    return Exchange(sequence, tuple(end - start for start, end in ranges))


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return _to_heads(own, exchange)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _to_items(gradient, ctx.exchange), None


class _ToItems(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, all_items: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return _to_items(all_items, exchange)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _to_heads(gradient, ctx.exchange), None


def _to_heads(own: Tensor, exchange: Exchange) -> Tensor:
    size, num_own = exchange.sequence.size, len(own)
    by_rank = own.unflatten(1, (size, own.shape[1] // size)).transpose(0, 1).flatten(0, 1).contiguous()
    received: Tensor = by_rank.new_empty((sum(exchange.counts), *by_rank.shape[1:]))
    dist.all_to_all_single(received, by_rank, list(exchange.counts), [num_own] * size, group=exchange.sequence.group)
    return received


def _to_items(all_items: Tensor, exchange: Exchange) -> Tensor:
    size, num_own = exchange.sequence.size, exchange.counts[exchange.sequence.rank]
    received: Tensor = all_items.new_empty((size * num_own, *all_items.shape[1:]))
    dist.all_to_all_single(
        received, all_items.contiguous(), [num_own] * size, list(exchange.counts), group=exchange.sequence.group
    )
    own: Tensor = received.unflatten(0, (size, num_own)).transpose(0, 1).flatten(1, 2)
    return own
