"""The serving walk: acceptance of a draft read off captured features, without decoding.

A span [start, end) of a row is walked as a server would serve it: x_start comes from the target's prefill, then one
step at a time from the newest known token x_p. `remaining` is what the span still holds after x_p.
Source: ALGORITHMS, "Acceptance, measured three ways".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from paceline.drafts.interface import DraftAlgorithm
from paceline.drafts.sequence import gather_tokens, sequence_of
from paceline.errors import ConfigError
from paceline.schema.features import FeatureRow
from paceline.schema.parts import WHOLE, Part, part_range
from paceline.schema.rows import Row

_STARTS_PER_CALL = 1024
"""Steps proposed at a time: bounds a draft's memory on a row with many supervised tokens."""


@dataclass(frozen=True, slots=True)
class Step:
    """One drafting step: the same terms in the walk and in real decoding."""

    start: int
    """Index p of the newest known token when the step began (row or text coordinates)."""
    accepted: int
    """a: drafted tokens that stand, at most `remaining`."""
    remaining: int
    """Tokens of the span (or of the finished text) after x_p, at least 1."""
    full: bool
    """Whether all K predictions lie inside: `remaining` >= K."""

    @property
    def num_tokens(self) -> int:
        """Tokens this step adds to the text: the accepted ones and the target's own, if it still belongs to it."""
        return min(self.accepted + 1, self.remaining)


@dataclass(slots=True)
class WalkSums:
    """Sums over steps; those of two rows, or of two prompts, add up."""

    num_drafted: int
    """K."""
    steps: int = 0
    tokens: int = 0
    accepted: int = 0
    full_steps: int = 0
    full_accepted: int = 0
    reached: list[int] = field(default_factory=list)
    """[K]: steps whose prediction k lies inside and whose predictions before k were right."""
    right: list[int] = field(default_factory=list)
    """[K]: of those, steps whose prediction k was right, too."""
    positions: int = 0
    """Positions whose token a step could have to predict."""
    greedy_matches: int = 0
    """Of those, positions that hold the target's greedy token."""

    def __post_init__(self) -> None:
        self.reached = self.reached or [0] * self.num_drafted
        self.right = self.right or [0] * self.num_drafted

    def add_steps(self, steps: Iterable[Step]) -> None:
        """Count `steps` of one span or one decoded text."""
        for step in steps:
            self.steps += 1
            self.tokens += step.num_tokens
            self.accepted += step.accepted
            self.full_steps += step.full
            self.full_accepted += step.accepted * step.full
            for k in range(min(self.num_drafted, step.remaining, step.accepted + 1)):
                self.reached[k] += 1
                self.right[k] += k < step.accepted

    def __add__(self, other: WalkSums) -> WalkSums:
        if self.num_drafted != other.num_drafted:
            raise ValueError(f"sums over K = {self.num_drafted} and K = {other.num_drafted} do not add up")
        total = WalkSums(self.num_drafted)
        for name in ("steps", "tokens", "accepted", "full_steps", "full_accepted", "positions", "greedy_matches"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        total.reached = [a + b for a, b in zip(self.reached, other.reached, strict=True)]
        total.right = [a + b for a, b in zip(self.right, other.right, strict=True)]
        return total

    def result(self) -> dict[str, Any]:
        """The figures, None where nothing was counted.

        acceptance_length: 1 + mean accepted over full steps (the headline, in [1, K+1]).
        acceptance_length_all: tokens / steps over all steps, cut at the end of the text (SGLang's counters).
        acceptance_length_uncut: 1 + accepted / steps over all steps (vLLM's counters).
        rate: [K], share of right predictions at position k among steps that reached it.
        greedy_match: share of positions where the text is the target's greedy output.
        """
        return {
            "acceptance_length": 1 + self.full_accepted / self.full_steps if self.full_steps else None,
            "acceptance_length_all": self.tokens / self.steps if self.steps else None,
            "acceptance_length_uncut": 1 + self.accepted / self.steps if self.steps else None,
            "rate": [right / n if n else None for right, n in zip(self.right, self.reached, strict=True)],
            "greedy_match": self.greedy_matches / self.positions if self.positions else None,
            "steps": self.steps,
            "full_steps": self.full_steps,
            "tokens": self.tokens,
        }


def walked_spans(row: Row, first_start: int) -> np.ndarray:
    """int64[S, 2]: the row's spans, later by what the algorithm cannot start from (`first_start` in its document)."""
    spans = row.spans.astype(np.int64).reshape(-1, 2)
    document = np.searchsorted(row.documents, spans[:, 0], side="right") - 1
    spans[:, 0] = np.maximum(spans[:, 0], row.documents[document] + first_start)
    return spans


def candidate_starts(row: Row, num_drafted: int, first_start: int) -> np.ndarray:
    """int64[S]: every index a step of the walk may start from, ascending."""
    starts = [
        np.arange(start, end - (num_drafted if cut else 1))
        for (start, end), cut in zip(walked_spans(row, first_start), row.span_cut, strict=True)
    ]
    return np.concatenate(starts) if starts else np.zeros(0, np.int64)


def walk_spans(
    row: Row, greedy: np.ndarray, starts: np.ndarray, proposals: np.ndarray, first_start: int
) -> list[list[Step]]:
    """The steps of each span of a whole row.

    Args:
        greedy: int[T], the target's argmax token after each token of the row.
        starts: int64[S] from `candidate_starts`.
        proposals: int64[S, K], what the draft proposes for x_{p+1} .. x_{p+K} at each start p.
    """
    accepted = np.full(row.num_tokens, -1, np.int64)
    accepted[starts] = _right_before_first_wrong(row.tokens, greedy, 0, starts, proposals)
    return _steps_of_spans(row, accepted, proposals.shape[1], first_start)


def _steps_of_spans(row: Row, accepted: np.ndarray, num_drafted: int, first_start: int) -> list[list[Step]]:
    """
    Args:
        accepted: int64[T], leading predictions of a step from each token that are right; -1 where none starts.
    """
    steps_of_spans = []
    for (start, end), cut in zip(walked_spans(row, first_start), row.span_cut, strict=True):
        steps: list[Step] = []
        p = int(start)
        while (remaining := int(end) - 1 - p) >= (num_drafted if cut else 1):
            step = Step(p, min(int(accepted[p]), remaining), remaining, remaining >= num_drafted)
            steps.append(step)
            p += step.accepted + 1
        steps_of_spans.append(steps)
    return steps_of_spans


def _right_before_first_wrong(
    tokens: np.ndarray, greedy: np.ndarray, begin: int, starts: np.ndarray, proposals: np.ndarray
) -> np.ndarray:
    """int64[S]: leading predictions that equal both the text and the target's greedy token.

    Args:
        greedy: int[n], of tokens from `begin` on.
    """
    places = starts[:, None] + np.arange(1, proposals.shape[1] + 1)
    inside = places < len(tokens)
    places = np.minimum(places, len(tokens) - 1)
    assert not places.size or places.max() - 1 - begin < len(greedy), "the halo holds what is accepted behind a part"
    text = tokens[places]
    right = inside & (proposals == text) & (greedy[places - 1 - begin] == text)
    leading: np.ndarray = np.cumprod(right, axis=1, dtype=np.int64).sum(axis=1)
    return leading


@torch.no_grad()
def _propose_everywhere(algorithm: DraftAlgorithm, row: FeatureRow, starts: np.ndarray, num_calls: int) -> np.ndarray:
    """int64[S, K]: the draft's proposals at all `starts`, a bounded number of them at a time."""
    device = row.features.hidden.device
    proposals = [np.zeros((0, algorithm.num_drafted), np.int64)]
    for begin in range(0, num_calls * _STARTS_PER_CALL, _STARTS_PER_CALL):
        some = torch.from_numpy(starts[begin : begin + _STARTS_PER_CALL]).to(device)
        proposals.append(algorithm.propose(row, some).cpu().numpy())
    return np.concatenate(proposals)


def _accepted_from_each_token(algorithm: DraftAlgorithm, row: FeatureRow) -> np.ndarray:
    """int64[T]: leading predictions of a step from each token that are right; -1 where none starts.

    Of a part of a row each rank proposes at the starts that are its own, and is told what the others found. All make as
    many calls: they exchange keys in each.
    """
    first_start, num_tokens = algorithm.first_start, row.row.num_tokens
    starts = candidate_starts(row.row, algorithm.num_drafted, first_start)
    begin, end = row.token_range
    part = row.features.part
    begins = [part_range(num_tokens, Part(index, part.count))[0] for index in range(part.count)]
    bounds = np.searchsorted(starts - first_start, [*begins, num_tokens])
    own = starts[bounds[part.index] : bounds[part.index + 1]]
    num_calls = -(-int(np.diff(bounds).max()) // _STARTS_PER_CALL)
    proposals = _propose_everywhere(algorithm, row, own, num_calls)
    found = np.full(end - begin, -1, np.int64)
    found[own - first_start - begin] = _right_before_first_wrong(row.row.tokens, _greedy_of(row), begin, own, proposals)
    sequence = sequence_of(row, algorithm.context.sequence) if part != WHOLE else None
    on_device = torch.from_numpy(found).to(row.features.hidden.device)
    everywhere = gather_tokens(on_device, num_tokens, sequence).cpu().numpy()
    accepted = np.full(num_tokens, -1, np.int64)
    accepted[first_start:] = everywhere[: num_tokens - first_start]
    return accepted


def walk_feature_row(algorithm: DraftAlgorithm, row: FeatureRow) -> list[list[Step]]:
    """The steps of each span of a row with its features, or with those of a part; see `walk_row`."""
    accepted = _accepted_from_each_token(algorithm, row)
    return _steps_of_spans(row.row, accepted, algorithm.num_drafted, algorithm.first_start)


def walk_row(algorithm: DraftAlgorithm, row: FeatureRow) -> WalkSums:
    """Sums of the serving walk over one held-out row.

    Of a part of a row they are this rank's share: those of the ranks of a group, which all call this, add up.

    Raises:
        ConfigError: the features were captured without greedy tokens.
    """
    return sum_walk(algorithm, row, walk_feature_row(algorithm, row))


def sum_walk(algorithm: DraftAlgorithm, row: FeatureRow, steps_of_spans: list[list[Step]]) -> WalkSums:
    """Sums over the steps that `walk_feature_row` gave for `row`; of a part, this rank's share."""
    sums = WalkSums(algorithm.num_drafted)
    if row.features.part.index == 0:  # every rank of a group knows all steps
        for steps in steps_of_spans:
            sums.add_steps(steps)
    greedy, (begin, stop) = _greedy_of(row), row.token_range
    for start, end in walked_spans(row.row, algorithm.first_start):
        first, last = max(int(start), begin), min(int(end) - 1, stop)
        if first < last:
            sums.positions += last - first
            text = row.row.tokens[first + 1 : last + 1]
            sums.greedy_matches += int((greedy[first - begin : last - begin] == text).sum())
    return sums


def _greedy_of(row: FeatureRow) -> np.ndarray:
    if row.features.greedy is None:
        raise ConfigError("the serving walk needs greedy tokens: ask for features with `greedy = True`")
    greedy: np.ndarray = row.features.greedy.cpu().numpy()
    return greedy
