"""Parts of a row: what each rank of a sequence-parallel group is given of a row's features."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from paceline.schema.features import Features, FeatureSpec
    from paceline.schema.rows import RowRequest


@dataclass(frozen=True, slots=True)
class Part:
    """One of `count` parts of a row, each with a contiguous range of its tokens."""

    index: int
    """0 .. count - 1."""
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"there is no part {self.index} of {self.count}: parts count from 0")


WHOLE = Part(0, 1)
"""All of a row."""


def part_range(num_tokens: int, part: Part) -> tuple[int, int]:
    """[start, end), row coordinates: parts of equal length, the last ones shorter or empty."""
    length = -(-num_tokens // part.count)
    return min(num_tokens, part.index * length), min(num_tokens, (part.index + 1) * length)


def part_reach(num_tokens: int, part: Part, halo: int) -> tuple[int, int]:
    """[start, reach): the range with `halo` tokens more on the right, as far as the row goes."""
    start, end = part_range(num_tokens, part)
    return start, min(num_tokens, end + halo)


def num_supervised(spans: np.ndarray, start: int, end: int) -> int:
    """How many tokens of [start, end) lie in `spans` (int32[S, 2])."""
    return int((np.clip(spans[:, 1], start, end) - np.clip(spans[:, 0], start, end)).sum())


def slice_features(
    features: Features, num_tokens: int, part: Part, halo: int, spans: np.ndarray | None = None
) -> Features:
    """The features of a part, as views of those of the whole row.

    Args:
        num_tokens: T of the row.
        halo: of the FeatureSpec.
        spans: int32[S, 2] of the row. Without them a `final_index` that is not that of all tokens is read, which
            waits for its device.
    """
    start, end = part_range(num_tokens, part)
    _, reach = part_reach(num_tokens, part, halo)
    first, last = _final_bounds(features, num_tokens, (start, reach), spans)
    return dataclasses.replace(
        features,
        hidden=features.hidden[start:end],
        greedy=None if features.greedy is None else features.greedy[start:reach],
        final_hidden=None if features.final_hidden is None else features.final_hidden[first:last],
        final_index=None if features.final_index is None else features.final_index[first:last],
        logsumexp=None if features.logsumexp is None else features.logsumexp[start:reach],
        part=part,
    )


def requested_part(request: RowRequest, spec: FeatureSpec, features: Features) -> Features:
    """What `request` wants of the row's `features`, as views; they themselves if it wants all. Waits for no device."""
    if request.part == features.part:
        return features
    return slice_features(features, len(request.tokens), request.part, spec.halo, request.spans)


def _final_bounds(
    features: Features, num_tokens: int, reach: tuple[int, int], spans: np.ndarray | None
) -> tuple[int, int]:
    """Which of `final_hidden` belong to tokens in `reach`."""
    index = features.final_index
    if index is None or len(index) == num_tokens:
        return reach
    if spans is not None:
        return num_supervised(spans, 0, reach[0]), num_supervised(spans, 0, reach[1])
    return int((index < reach[0]).sum()), int((index < reach[1]).sum())
