"""What DFlash proposes: many blocks of a row at once, or one block at a time with a key/value cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from paceline.drafts.dflash.model import DFlashDraft, KeysValues
from paceline.drafts.head_loss import Head
from paceline.drafts.interface import DraftDecoder


@dataclass(frozen=True, slots=True)
class BlockProposer:
    """A draft with the target's frozen embedding and head."""

    draft: DFlashDraft
    embedding: Tensor
    """[V, H]."""
    head: Head
    mask_token_id: int
    chunk: int
    """Slots whose logits exist at one time."""

    def block_inputs(self, tokens: Tensor) -> Tensor:
        """[A, B, H]: the embedding of each block's first token, then B - 1 times the mask token's."""
        ids = tokens.new_full((len(tokens), self.draft.sizes.block_size), self.mask_token_id)
        ids[:, 0] = tokens
        return functional.embedding(ids, self.embedding)

    def propose(self, tokens: Tensor, first: Tensor, anchors: Tensor, context: list[KeysValues]) -> Tensor:
        """int64[A, B-1]: the argmax token of slots 1..B-1 of the block at each anchor.

        Args:
            tokens: int64[A], x_a. first, anchors: int64[A], the context keys [first, anchor) it sees.
            context: keys and values of `DFlashDraft.read_context`.
        """
        size = self.draft.sizes.block_size
        at_a_time = max(1, self.chunk // size)
        proposed = tokens.new_empty((len(tokens), size - 1))
        for start in range(0, len(tokens), at_a_time):
            part = slice(start, start + at_a_time)
            x = self.block_inputs(tokens[part])
            geometry = self.draft.place_blocks(first[part], anchors[part], len(context[0][0]), x.dtype)
            slots = torch.arange(len(x) * size, device=x.device).view(-1, size)[:, 1:].flatten()
            states = self.draft(x, context, geometry, slots)
            proposed[part] = self.head.logits(states).argmax(-1).view(-1, size - 1)
        return proposed


class DFlashDecoder(DraftDecoder):
    """Proposes the block after the newest token of one sequence; keeps the context's keys and values."""

    def __init__(self, proposer: BlockProposer) -> None:
        self.num_drafted = proposer.draft.sizes.block_size - 1
        self._proposer = proposer
        self._length = 0
        self._newest: Tensor | None = None
        self._cache: list[KeysValues] = []

    def extend(self, hidden: Tensor, next_tokens: Tensor) -> None:
        if not len(hidden):
            return
        end = self._length + len(hidden)
        positions = torch.arange(self._length, end, device=hidden.device)
        fresh = self._proposer.draft.read_context(hidden.to(self._proposer.embedding.dtype), positions)
        self._cache = [
            (_placed(old_k, k, self._length), _placed(old_v, v, self._length))
            for (old_k, old_v), (k, v) in zip(self._cache or fresh, fresh, strict=True)
        ]
        self._length, self._newest = end, next_tokens[-1:]

    def propose(self) -> Tensor:
        assert self._newest is not None, "extend() comes first"
        context = [(k[: self._length], v[: self._length]) for k, v in self._cache]
        anchor = self._newest.new_full((1,), self._length)
        return self._proposer.propose(self._newest, torch.zeros_like(anchor), anchor, context)[0]


def _placed(cache: Tensor, fresh: Tensor, length: int) -> Tensor:
    """`cache` with `fresh` written after its first `length` entries; doubled when it is too short."""
    end = length + len(fresh)
    if end > len(cache) or length == 0:
        larger = fresh.new_empty((max(2 * end, 256), *fresh.shape[1:]))
        larger[:length] = cache[:length]
        cache = larger
    cache[length:end] = fresh
    return cache
