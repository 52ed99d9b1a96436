"""Which slots of a row EAGLE-3 trains, and which target state teaches each of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paceline.drafts.head_loss import TeacherPairs
from paceline.drafts.upload import upload
from paceline.schema.features import FeatureRow
from paceline.schema.parts import Part, part_range
from paceline.schema.rows import Row


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """The slots of a row that this rank trains (S of them) and their teachers, on the draft's device.

    Slot t reads the target's state of x_t and the token x_{t+1}; at depth k it predicts x_{t+2+k} and is taught by
    the final hidden state of x_{t+1+k}. Slots stand in row order, so the slot taught at depth k by the teacher of
    slot n (at depth 0) is slot n - k of the same span.

    Of a part of a row, a rank trains the slots in its range of tokens. The first S teachers are those of its slots at
    depth 0; the few after them, in the halo, teach its last slots at deeper depths.
    """

    slots: Tensor
    """int64[S]: row index t."""
    teacher_rows: Tensor
    """int64[M]: index into the part's `final_hidden` of the state of x_{t+1}."""
    teacher_tokens: Tensor
    """int64[M]: index of token t + 1 in the part."""
    pairs: TeacherPairs
    """Student rows are k * S + n: depth k of slot n."""
    depth: Tensor
    """int64[N]: k of each pair."""
    counts: tuple[int, ...]
    """Slots of each part of the row."""
    document_start: Tensor
    """int64[sum(counts)]: first row index of the document of every slot of the row, whoever trains it."""
    seen_end: Tensor
    """int64[sum(counts)]: t + 1 of the same."""

    @property
    def num_slots(self) -> int:
        return len(self.slots)


def plan_slots(row: FeatureRow, num_depths: int, chunk: int, device: torch.device) -> SlotPlan:
    """Slots counted at depth 0 and their (slot, depth) pairs, from spans alone (host arithmetic, no device sync).

    Args:
        row: with `greedy` and `final_hidden` of all its tokens or of the supervised ones.
        chunk: student rows whose logits may exist at one time.
    """
    taught, first, document_start = _taught_tokens(row.row)
    part, num_tokens = row.features.part, row.row.num_tokens
    begins = [part_range(num_tokens, Part(index, part.count))[0] for index in range(part.count)]
    bounds = np.searchsorted(taught - 1, [*begins, num_tokens])
    own = slice(bounds[part.index], bounds[part.index + 1])
    num_slots = int(own.stop - own.start)
    # How deep a teacher reaches is where its span began: at depth k it teaches the slot k before its own.
    reach = (taught - first)[own.start : own.stop + num_depths - 1]
    teacher, depths = np.arange(len(reach))[:, None], np.arange(num_depths)[None]
    order, depth = np.nonzero((reach[:, None] >= depths) & (teacher >= depths) & (teacher - depths < num_slots))
    count = int(order[-1]) + 1 if len(order) else 0
    taught_by = taught[own.start : own.start + count]
    per_chunk = max(1, chunk // num_depths)
    chunks = [*range(0, count, per_chunk), count] if count else [0]
    pairs = TeacherPairs(
        student=upload(depth * num_slots + order - depth, device),
        teacher=upload(order, device),
        teacher_bounds=tuple(chunks),
        pair_bounds=tuple(int(b) for b in np.searchsorted(order, chunks)),
    )
    return SlotPlan(
        slots=upload(taught[own] - 1, device),
        teacher_rows=upload(_final_rows(row, taught_by), device),
        teacher_tokens=upload(taught_by - begins[part.index], device),
        pairs=pairs,
        depth=upload(depth, device),
        counts=tuple(int(n) for n in np.diff(bounds)),
        document_start=upload(document_start, device),
        seen_end=upload(taught, device),
    )


def _final_rows(row: FeatureRow, tokens: np.ndarray) -> np.ndarray:
    """Index into the row's `final_hidden` of each of `tokens` (row coordinates, ascending)."""
    final, greedy = row.features.final_hidden, row.features.greedy
    assert final is not None, "the feature spec asks for it"
    assert greedy is not None, "the feature spec asks for it"
    start, _ = row.token_range
    assert not len(tokens) or tokens[-1] < start + len(greedy), "the halo holds the teacher of every depth"
    if len(final) == len(greedy):  # those of all tokens
        return tokens - start
    supervised = row.row.supervised_index()
    rows: np.ndarray = np.searchsorted(supervised, tokens) - np.searchsorted(supervised, start)
    return rows


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
