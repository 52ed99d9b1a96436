"""Where DFlash puts its blocks: anchors drawn per document, and which slots of a block count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.schema.rows import Row

_LIST_MULTIPLE = 64
"""Lists of anchors are padded to a multiple of this: compiled code then sees few sizes at little waste."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockPlan:
    """The blocks of one row and their slots that count; A blocks of B slots, padded ones at the end."""

    anchors: np.ndarray
    """int64[A]: row index of each block's anchor; 0 for padding."""
    first: np.ndarray
    """int64[A]: where the anchor's document starts; its context is [first, anchor), none for padding."""
    counted: np.ndarray
    """int64[N]: block * B + slot of every slot that counts, ascending."""
    labels: np.ndarray
    """int64[N]: the token each of them predicts."""

    def __len__(self) -> int:
        return len(self.anchors)


def draw_anchors(row: Row, anchor_every: int, seed: int) -> np.ndarray:
    """int64: row indices of this epoch's anchors, ascending.

    Anchor a is valid iff x_a and x_{a+1} lie in one span. A document of n tokens draws min(valid, max(1, n //
    anchor_every)) of them, uniformly without replacement, by a generator of its own seeded from (seed, epoch, sample
    id, piece): packing, placement and ranks cannot change them.
    """
    drawn = [np.zeros(0, np.int64)]
    # Spans are ascending and each is inside one document: one search tells which spans a document has.
    bounds = np.searchsorted(row.spans[:, 0], row.documents)
    for index, (start, end) in enumerate(zip(row.documents[:-1], row.documents[1:], strict=True)):
        spans = row.spans[bounds[index] : bounds[index + 1]].astype(np.int64)
        num_valid = spans[:, 1] - spans[:, 0] - 1
        total = int(num_valid.sum())
        if total == 0:
            continue
        entropy = [seed % 2**64, row.epoch, int(row.sample_ids[index]), int(row.pieces[index])]
        generator = np.random.default_rng(entropy)
        count = min(total, max(1, int(end - start) // anchor_every))
        chosen = np.sort(generator.choice(total, count, replace=False, shuffle=False))
        # The i-th valid anchor of the document lies in the span whose share of them holds i.
        ends = np.cumsum(num_valid)
        span = np.searchsorted(ends, chosen, side="right")
        drawn.append(spans[span, 0] + chosen - (ends - num_valid)[span])
    return np.concatenate(drawn)


def share_blocks(row: Row, anchors: np.ndarray, block_size: int, num_parts: int) -> list[BlockPlan]:
    """The blocks of each part of a row: equal shares of its anchors in their order, whatever tokens a part has.

    A block reads nothing of its place but keys, which all ranks have of all tokens, so that shares may be even. All
    are padded to one length, so that no rank's code sees another size.
    """
    shares = np.array_split(anchors, num_parts)
    longest = max(len(share) for share in shares)
    return [plan_blocks(row, share, block_size, longest) for share in shares]


def plan_blocks(row: Row, anchors: np.ndarray, block_size: int, at_least: int = 0) -> BlockPlan:
    """Blocks of a row at valid anchors, padded to a multiple of 64 that has room for `at_least`.

    Slot k >= 1 of the block at a counts iff x_a .. x_{a+k} lie in one span.
    """
    documents = row.documents.astype(np.int64)
    first = documents[np.searchsorted(documents, anchors, side="right") - 1]
    span_end = row.spans[np.searchsorted(row.spans[:, 0], anchors, side="right") - 1, 1].astype(np.int64)
    slots = np.arange(1, block_size)
    counts = anchors[:, None] + slots < span_end[:, None]
    block, slot = np.nonzero(counts)
    num_blocks = -(-max(len(anchors), at_least) // _LIST_MULTIPLE) * _LIST_MULTIPLE
    pad = num_blocks - len(anchors)
    return BlockPlan(
        anchors=np.pad(anchors, (0, pad)),
        first=np.pad(first, (0, pad)),
        counted=block * block_size + slot + 1,
        labels=row.tokens[anchors[block] + slot + 1].astype(np.int64),
    )
