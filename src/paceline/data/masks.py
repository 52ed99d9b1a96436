"""Spans of supervised tokens: from a loss mask, or between markers."""

from __future__ import annotations

import numpy as np


def spans_of_mask(mask: np.ndarray) -> np.ndarray:
    """int32[S, 2]: the maximal runs [start, end) of true values in bool[n] `mask`, ascending."""
    edges = np.diff(mask.astype(np.int8), prepend=0, append=0)
    return np.stack([np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)], axis=1).astype(np.int32)


def spans_between(tokens: np.ndarray, start_ids: np.ndarray, end_ids: np.ndarray) -> np.ndarray:
    """int32[S, 2]: from after each start marker to the end marker that follows, which is included.

    Markers are matched on token ids. A start marker inside a span does not begin another; a span whose end marker
    is missing (or where `end_ids` is empty) ends with the tokens.
    """
    starts = _occurrences(tokens, start_ids) + len(start_ids)
    ends = _occurrences(tokens, end_ids) + len(end_ids) if len(end_ids) else np.zeros(0, np.int64)
    mask = np.zeros(len(tokens), bool)
    covered = 0
    for start in starts.tolist():
        if start < covered:
            continue
        # The first end marker that lies wholly at or after the start.
        later = np.searchsorted(ends, start + len(end_ids))
        covered = int(ends[later]) if later < len(ends) else len(tokens)
        mask[start:covered] = True
    return spans_of_mask(mask)


def _occurrences(tokens: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """int64[m]: where `pattern` (not empty) begins in `tokens`."""
    num_places = len(tokens) - len(pattern) + 1
    if num_places <= 0:
        return np.zeros(0, np.int64)
    found = np.ones(num_places, bool)
    for offset, token in enumerate(pattern.tolist()):
        found &= tokens[offset : offset + num_places] == token
    return np.flatnonzero(found)
