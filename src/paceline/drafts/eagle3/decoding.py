"""EAGLE-3 while decoding one sequence: depth-0 keys and values of the verified text are kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from paceline.drafts.attention import Visibility, build_visibility
from paceline.drafts.eagle3.model import Context, Eagle3Draft
from paceline.drafts.interface import DraftDecoder

Chain = Callable[[Tensor, Tensor, Context, Visibility], Tensor]


class Eagle3Decoder(DraftDecoder):
    """Extends its context by verified tokens; proposes a chain from the last slot."""

    def __init__(self, draft: Eagle3Draft, embedding: Tensor, chain: Chain, num_drafted: int) -> None:
        self.num_drafted = num_drafted
        self._draft, self._embedding, self._chain = draft, embedding, chain
        self._context: Context | None = None

    def extend(self, hidden: Tensor, next_tokens: Tensor) -> None:
        known = 0 if self._context is None else len(self._context.keys)
        positions = torch.arange(known, known + len(next_tokens), device=hidden.device)
        new = self._draft.read_context(hidden.to(self._embedding.dtype), self._embedding[next_tokens], positions)
        if self._context is None:
            self._context = new
            return
        # Only the last slot is ever asked again: states of older ones are not kept.
        self._context = Context(
            states=new.states,
            mixed=new.mixed,
            keys=torch.cat([self._context.keys, new.keys]),
            values=torch.cat([self._context.values, new.values]),
        )

    def propose(self) -> Tensor:
        context = self._context
        if context is None:
            raise ValueError("propose() before extend(): the draft has read no text yet")
        known = torch.tensor([len(context.keys)], device=context.keys.device)
        last = torch.tensor([len(context.states) - 1], device=known.device)
        visible = build_visibility(torch.zeros_like(known), known, len(context.keys))
        position = (known - 1).expand(len(context.states))
        states = self._draft.first_depth(context, last, position, visible)
        return self._chain(states, known - 1, context, visible)[0]
