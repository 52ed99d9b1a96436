"""Sequence parallelism: the ranks of a group train one row together, each with a part of its tokens.

Everything but attention over the context is local to a token or a slot. A rank has the keys and values of its own
tokens, and the queries of its own slots; each query must meet the keys of the whole row. An `Exchange` is a way to
bring them together. How many tokens and queries each rank has is known to all from the row alone, so sizes are never
sent and the device is never waited for.

Every rank must make the same exchanges in the same order, forward and backward, also one that has no slots: the others
need its keys, and it is told the gradient of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from paceline.errors import ConfigError
from paceline.schema.features import FeatureRow
from paceline.schema.parts import WHOLE, Part, part_range

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Attend = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Queries [Q, heads, head_dim] -> out [Q, heads, head_dim] and fp32 logsumexp [Q, heads]."""
# Its older name, which torch 2.13 warns of.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """The ranks that train each row together, as this one sees them."""

    group: ProcessGroup
    rank: int
    """Of this process in the group, which is also the part of each row that it trains."""
    size: int
    """P."""
    exchange: Literal["keys", "heads"] = "keys"
    """What changes hands for attention: see KeysExchange and HeadsExchange."""

    @property
    def part(self) -> Part:
        return Part(self.rank, self.size)

    def check_heads(self, num_heads: int, num_kv_heads: int) -> None:
        """Raise ConfigError unless each rank can have an equal share of the heads, where heads are shared out."""
        if self.exchange == "heads" and (num_heads % self.size or num_kv_heads % self.size):
            raise ConfigError(
                f"training.sequence_parallel = {self.size} does not divide the draft's {num_heads} heads and "
                f'{num_kv_heads} key/value heads: set training.sequence_exchange to "keys", which needs no divisor, or '
                "choose a divisor of both"
            )


def sequence_of(row: FeatureRow, sequence: SequenceGroup | None) -> SequenceGroup | None:
    """The group that trains `row`: None for a whole row, which this rank can train alone."""
    part = row.features.part
    if part == WHOLE:
        return None
    assert sequence is not None, f"row {row.row.position} came as {part}, and this rank trains rows alone"
    assert part == sequence.part, f"row {row.row.position} came as {part}, and this rank trains {sequence.part}"
    return sequence


class Exchange(ABC):
    """How queries that the ranks of a group have shared out attend to keys that they have shared out, too.

    The queries of all ranks are numbered in order of rank.
    """

    own: slice = slice(None)
    """This rank's, among the queries of all ranks."""
    attending: slice = slice(None)
    """Those that this rank attends with, among the queries of all ranks; `Visibility` is of them."""

    @abstractmethod
    def share_keys(self, own: Tensor) -> Tensor:
        """The row's keys, or values, that this rank attends to: of [n, kv_heads, head_dim], those of its tokens."""

    @abstractmethod
    def attend(self, queries: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """What attention makes of this rank's own queries, with all heads.

        Args:
            attend: attention of the queries this rank attends with to the keys it attends to.
        """


class Alone(Exchange):
    """One rank with a whole row: nothing changes hands."""

    def share_keys(self, own: Tensor) -> Tensor:
        return own

    def attend(self, queries: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        return attend(queries)


ALONE = Alone()


class KeysExchange(Exchange):
    """Each rank gets the keys of the whole row, with all heads, and its queries stay with it.

    Keys travel once, forward, and their gradients once back, however often they are attended to.
    """

    def __init__(self, sequence: SequenceGroup, num_tokens: int, num_queries: Sequence[int]) -> None:
        """
        Args:
            num_queries: of each rank.
        """
        self._sequence, self._num_tokens = sequence, num_tokens
        self.own = self.attending = _own_items(sequence, num_queries)

    def share_keys(self, own: Tensor) -> Tensor:
        return gather_tokens(own, self._num_tokens, self._sequence)

    def attend(self, queries: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        return attend(queries)


class HeadsExchange(Exchange):
    """Each rank gets the keys and the queries of all ranks with 1 / P of the heads (Ulysses, arXiv 2309.14509).

    Queries travel at every attention, and what comes of them travels back.
    """

    def __init__(self, sequence: SequenceGroup, num_tokens: int, num_queries: Sequence[int]) -> None:
        """
        Args:
            num_queries: of each rank.
        """
        ranges = [part_range(num_tokens, Part(rank, sequence.size)) for rank in range(sequence.size)]
        self._tokens = SharedItems(sequence, tuple(end - start for start, end in ranges))
        self._queries = SharedItems(sequence, tuple(num_queries))
        self.own = _own_items(sequence, num_queries)

    def share_keys(self, own: Tensor) -> Tensor:
        return self._tokens.to_heads(own)

    def attend(self, queries: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        out, lse = attend(self._queries.to_heads(queries))
        return self._queries.to_items(out), self._queries.to_items(lse)


def open_exchange(row: FeatureRow, sequence: SequenceGroup | None, num_queries: Sequence[int]) -> Exchange:
    """The exchange that the ranks which train `row` have chosen.

    Args:
        num_queries: of each rank; means nothing for a whole row.
    """
    sequence = sequence_of(row, sequence)
    if sequence is None:
        return ALONE
    kind = KeysExchange if sequence.exchange == "keys" else HeadsExchange
    return kind(sequence, row.row.num_tokens, num_queries)


def gather_tokens(own: Tensor, num_tokens: int, sequence: SequenceGroup | None) -> Tensor:
    """[T, ...]: what all ranks have of the tokens of a row, of [n, ...]: what this one has of its part.

    Each rank's gradient is the sum of what the ranks found for its tokens. Without a group it is `own`.
    """
    if sequence is None:
        return own
    gathered: Tensor = _GatherTokens.apply(own, num_tokens, sequence)
    return gathered


class _GatherTokens(torch.autograd.Function):
    """Parts have one length but for the last ones, so padding stands behind the row and nowhere else."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, num_tokens: int, sequence: SequenceGroup) -> Tensor:
        ctx.num_own, ctx.sequence = len(own), sequence
        length = -(-num_tokens // sequence.size)
        gathered = own.new_empty((sequence.size * length, *own.shape[1:]))
        _all_gather(gathered, _padded(own, length), group=sequence.group)
        return gathered[:num_tokens]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        sequence = ctx.sequence
        length = -(-len(gradient) // sequence.size)
        given = _padded(gradient, sequence.size * length)
        found = torch.empty_like(given)
        # As much travels as in a reduce-scatter, which in bf16 would round after every rank.
        dist.all_to_all_single(found, given, group=sequence.group)
        of_ranks = found.unflatten(0, (sequence.size, length))[:, : ctx.num_own]
        return of_ranks.sum(0, dtype=torch.float32).to(gradient.dtype), None, None


@dataclass(frozen=True, slots=True)
class SharedItems:
    """Items with heads (tokens, or queries) that the ranks of a group have shared out among them, in order of rank."""

    sequence: SequenceGroup
    counts: tuple[int, ...]
    """Items of each rank."""

    def to_heads(self, own: Tensor) -> Tensor:
        """[N, heads / P, ...]: all items with this rank's heads, of [n, heads, ...]: its items with all heads."""
        exchanged: Tensor = _ToHeads.apply(own, self)
        return exchanged

    def to_items(self, all_items: Tensor) -> Tensor:
        """[n, heads, ...] of [N, heads / P, ...]: the way back."""
        exchanged: Tensor = _ToItems.apply(all_items, self)
        return exchanged


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, items: SharedItems) -> Tensor:
        ctx.items = items
        return _to_heads(own, items)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _to_items(gradient, ctx.items), None


class _ToItems(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, all_items: Tensor, items: SharedItems) -> Tensor:
        ctx.items = items
        return _to_items(all_items, items)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _to_heads(gradient, ctx.items), None


def _to_heads(own: Tensor, items: SharedItems) -> Tensor:
    size, num_own = items.sequence.size, len(own)
    by_rank = own.unflatten(1, (size, own.shape[1] // size)).transpose(0, 1).flatten(0, 1).contiguous()
    received: Tensor = by_rank.new_empty((sum(items.counts), *by_rank.shape[1:]))
    dist.all_to_all_single(received, by_rank, list(items.counts), [num_own] * size, group=items.sequence.group)
    return received


def _to_items(all_items: Tensor, items: SharedItems) -> Tensor:
    size, num_own = items.sequence.size, items.counts[items.sequence.rank]
    received: Tensor = all_items.new_empty((size * num_own, *all_items.shape[1:]))
    dist.all_to_all_single(
        received, all_items.contiguous(), [num_own] * size, list(items.counts), group=items.sequence.group
    )
    own: Tensor = received.unflatten(0, (size, num_own)).transpose(0, 1).flatten(1, 2)
    return own


def _own_items(sequence: SequenceGroup, counts: Sequence[int]) -> slice:
    start = sum(counts[: sequence.rank])
    return slice(start, start + counts[sequence.rank])


def _padded(items: Tensor, num: int) -> Tensor:
    """Contiguous, `num` long; what is added is zero."""
    if len(items) < num:
        items = pad(items, (0, 0) * (items.dim() - 1) + (0, num - len(items)))
    return items.contiguous()
