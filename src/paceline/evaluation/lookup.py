"""Prompt look-up: drafts copied from the text itself, the baseline that needs no training."""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.drafts.interface import DraftDecoder

_LONGEST_MATCH = 3


class LookupDecoder(DraftDecoder):
    """Proposes what followed the latest earlier occurrence of the newest tokens, the longest match first.

    It proposes fewer than K tokens, or none, where the text has no more: the target then just takes one step.
    """

    def __init__(self, num_drafted: int) -> None:
        self.num_drafted = num_drafted
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        """Where each n-gram that something follows last ended, exclusive."""

    def extend(self, hidden: Tensor, next_tokens: Tensor) -> None:
        """Remember `next_tokens`; the target's states are not looked at (and the text's first token never comes)."""
        for token in next_tokens.tolist():
            for length in range(1, min(_LONGEST_MATCH, len(self._text)) + 1):
                self._ends[tuple(self._text[-length:])] = len(self._text)
            self._text.append(token)

    def propose(self) -> Tensor:
        """int64[<= K]."""
        for length in range(min(_LONGEST_MATCH, len(self._text)), 0, -1):
            end = self._ends.get(tuple(self._text[-length:]))
            if end is not None:
                return torch.tensor(self._text[end : end + self.num_drafted], dtype=torch.int64)
        return torch.zeros(0, dtype=torch.int64)
