"""Which slots of a row EAGLE-3 trains, and which target state teaches each of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paceline.drafts.head_loss import TeacherPairs
from paceline.drafts.upload import upload
from paceline.schema.rows import Row


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """The slots of a row (S of them) and their teachers, on the draft's device.

    Slot t reads the target's state of x_t and the token x_{t+1}; at depth k it predicts x_{t+2+k} and is taught by
    the final hidden state of x_{t+1+k}. Slots stand in row order, so the slot taught at depth k by the teacher of
    slot n (at depth 0) is slot n - k of the same span.
    """

    slots: Tensor
    """int64[S]: row index t."""
    document_start: Tensor
    """int64[S]: first row index of the slot's document."""
    teacher_rows: Tensor
    """int64[S]: index into `final_hidden` of the state of x_{t+1}."""
    teacher_tokens: Tensor
    """int64[S]: row index t + 1."""
    pairs: TeacherPairs
    """Student rows are k * S + n: depth k of slot n."""
    depth: Tensor
    """int64[N]: k of each pair."""

    @property
    def num_slots(self) -> int:
        return len(self.slots)


def plan_slots(row: Row, num_depths: int, chunk: int, num_final: int, device: torch.device) -> SlotPlan:
    """Slots counted at depth 0 and their (slot, depth) pairs, from spans alone (host arithmetic, no device sync).

    Args:
        chunk: student rows whose logits may exist at one time.
        num_final: rows of `final_hidden`: all T tokens, or the supervised ones.
    """
    taught, first, document_start = _taught_tokens(row)
    count = len(taught)
    all_tokens = num_final == row.num_tokens
    teacher_rows = taught if all_tokens else np.searchsorted(row.supervised_index(), taught)
    order, depth = np.nonzero((taught - first)[:, None] >= np.arange(num_depths)[None])
    per_chunk = max(1, chunk // num_depths)
    bounds = [*range(0, count, per_chunk), count] if count else [0]
    pairs = TeacherPairs(
        student=upload(depth * count + order - depth, device),
        teacher=upload(order, device),
        teacher_bounds=tuple(bounds),
        pair_bounds=tuple(int(b) for b in np.searchsorted(order, bounds)),
    )
    return SlotPlan(
        slots=upload(taught - 1, device),
        document_start=upload(document_start, device),
        teacher_rows=upload(teacher_rows, device),
        teacher_tokens=upload(taught, device),
        pairs=pairs,
        depth=upload(depth, device),
    )


def _taught_tokens(row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every slot: row index of its depth-0 teacher, the least such index of its span, its document's start."""
    starts, ends = row.spans[:, 0].astype(np.int64), row.spans[:, 1].astype(np.int64)
    document = np.searchsorted(row.documents, starts, side="right") - 1
    document_start = row.documents[document].astype(np.int64)
    # A span at index 0 of its document has no slot -1: its first slot is 0, taught by the state of token 1.
    firsts = np.maximum(starts, document_start + 1)
    lengths = np.maximum(ends - 1 - firsts, 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    first = np.repeat(firsts, lengths)
    return first + within, first, np.repeat(document_start, lengths)
