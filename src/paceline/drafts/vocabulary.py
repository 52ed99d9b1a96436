"""The draft vocabulary: the D target tokens a draft can propose, and the maps between both numberings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paceline.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """D of the target's V tokens, ascending by id. D = V is the identity and needs no map."""

    ids: np.ndarray
    """int64[D]: target ids, strictly ascending; draft token j is target token ids[j]."""
    target_vocab_size: int
    """V."""

    @property
    def size(self) -> int:
        return len(self.ids)

    @property
    def is_full(self) -> bool:
        return self.size == self.target_vocab_size

    def t2d(self) -> Tensor:
        """bool[V]: whether a target token is in the draft vocabulary (published layout)."""
        mask = torch.zeros(self.target_vocab_size, dtype=torch.bool)
        mask[torch.from_numpy(self.ids)] = True
        return mask

    def d2t(self) -> Tensor:
        """int64[D]: offset from draft id to target id, d2t[j] + j = ids[j] (published layout)."""
        return torch.from_numpy(self.ids) - torch.arange(self.size)

    def draft_index(self) -> Tensor:
        """int64[V]: draft id of each target token, -1 for those outside."""
        index = torch.full((self.target_vocab_size,), -1, dtype=torch.int64)
        index[torch.from_numpy(self.ids)] = torch.arange(self.size)
        return index

    def coverage(self, counts: np.ndarray) -> float:
        """Share of supervised tokens (`counts` int64[<= V] by target id) that the draft can say, in [0, 1]."""
        total = int(counts.sum())
        return float(counts[self.ids[self.ids < len(counts)]].sum()) / total if total else 1.0


def build_vocabulary(counts: np.ndarray, size: int, target_vocab_size: int) -> DraftVocabulary:
    """The `size` most frequent supervised tokens (ties by id), filled up with the lowest unused ids.

    Args:
        counts: int64[<= V], how often each target token is supervised in the training data.
        size: D; 0 means V.

    Raises:
        ConfigError: D is larger than V, or a counted token has no embedding row.
    """
    if size > target_vocab_size:
        raise ConfigError(f"vocab_size = {size} is more than the target's {target_vocab_size}: lower it, or 0 for all")
    if len(counts) > target_vocab_size and counts[target_vocab_size:].any():
        raise ConfigError(
            f"the data has token {int(np.flatnonzero(counts)[-1])}, the target's embedding has {target_vocab_size} "
            "rows: the data was tokenized with another tokenizer"
        )
    if size in (0, target_vocab_size):
        return DraftVocabulary(np.arange(target_vocab_size, dtype=np.int64), target_vocab_size)
    padded = np.zeros(target_vocab_size, dtype=np.int64)
    padded[: min(len(counts), target_vocab_size)] = counts[:target_vocab_size]
    # A stable sort by falling count keeps ids ascending among equals: unused ids (count 0) fill up lowest first.
    ids = np.sort(np.argsort(-padded, kind="stable")[:size])
    return DraftVocabulary(ids.astype(np.int64), target_vocab_size)
