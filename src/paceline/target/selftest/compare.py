"""What an engine sent, held against the reference, and what is wrong with it, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from paceline.schema.features import Features
from paceline.target.selftest.reference import Reference
from paceline.target.selftest.texts import Capture, KnownTexts
from paceline.target.selftest.tolerance import Tolerance

_LOGIT_NOISE = 6.0
"""A relative error of states moves a logit by as much of the logits' spread, give or take: two logits, in thousands of
tokens."""

What = int | Literal["final hidden"]
"""A capture layer, or the state after the final norm."""


@dataclass(frozen=True, slots=True)
class Distance:
    """Of one document's states, in one capture, from the reference."""

    what: What
    document: int
    capture: Capture
    relative: float
    """|received - reference| / |reference| of a token, root mean square over the document."""
    cosine: float
    """Mean over its tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The features of one capture."""

    capture: Capture
    features: Features


class Comparison:
    """All answers of an engine against one reference."""

    def __init__(
        self, texts: KnownTexts, reference: Reference, layers: Sequence[int], answers: Sequence[Answer]
    ) -> None:
        self.texts, self.reference, self.answers = texts, reference, answers
        last = reference.layers.shape[1]
        # Of the last layer there is a reference only where the final norm was found.
        known = [layer for layer in layers if layer < last or reference.before_norm is not None]
        self.whats: list[What] = [*known, "final hidden"]
        self.distances = [
            _distance(what, document, answer.capture, self.received(answer, what, place), self.expected(what, document))
            for answer in answers
            for place, document in enumerate(answer.capture.documents)
            for what in self.whats
        ]

    def expected(self, what: What, document: int) -> Tensor:
        """[n, H]."""
        rows = slice(*self.texts.bounds[document : document + 2].tolist())
        return self._expected(what)[rows]

    def received(self, answer: Answer, what: What, place: int) -> Tensor:
        """[n, H] of the document at `place` of a row."""
        sizes = [len(self.texts.documents[document].tokens) for document in answer.capture.documents]
        rows = slice(sum(sizes[:place]), sum(sizes[: place + 1]))
        features = answer.features
        if what == "final hidden":
            assert features.final_hidden is not None, "it was asked for"
            return features.final_hidden[rows].cpu()
        return features.hidden[rows, features.layers.index(what)].cpu()

    def worst(self, what: What) -> Distance:
        """The farthest of all captures and documents."""
        return max((one for one in self.distances if one.what == what), key=_badness)

    def nearest(self, what: What, document: int) -> What:
        """What the reference has that is most like what was received as `what` for a document alone."""
        received = self.received(self.alone(document), what, 0)
        return min(self._all(), key=lambda other: _badness(_distance_of(received, self.expected(other, document))))

    def alone(self, document: int) -> Answer:
        """The first answer to a document alone."""
        return next(answer for answer in self.answers if answer.capture.documents == (document,))

    def wrong_tokens(self) -> tuple[int, int]:
        """(wrong greedy tokens, those that can be judged).

        A token is right if its logit is within what the distance of the final hidden state explains of the largest.
        Where sixteen are, nothing can be said.
        """
        wrong = judged = 0
        for one in (one for one in self.distances if one.what == "final hidden"):
            answer = next(answer for answer in self.answers if answer.capture == one.capture)
            rows = slice(*self.texts.bounds[one.document : one.document + 2].tolist())
            top, ids = self.reference.top_logits[rows], self.reference.top_ids[rows]
            allowed = top >= top[:, :1] - _LOGIT_NOISE * one.relative * self.reference.logit_spread[rows, None]
            greedy = self._greedy(answer, one.document)
            right = ((greedy[:, None] == ids) & allowed).any(1)
            known = ~allowed[:, -1]
            wrong += int((~right & known).sum())
            judged += int(known.sum())
        return wrong, judged

    def _greedy(self, answer: Answer, document: int) -> Tensor:
        """[n]."""
        assert answer.features.greedy is not None, "it was asked for"
        before = answer.capture.documents[: answer.capture.documents.index(document)]
        start = sum(len(self.texts.documents[one].tokens) for one in before)
        return answer.features.greedy[start : start + len(self.texts.documents[document].tokens)].cpu().long()

    def repeats_are_equal(self) -> bool:
        """Whether what was asked twice came with the same bits."""
        first = {answer.capture.documents: answer for answer in self.answers if not answer.capture.again}
        pairs = [(first[answer.capture.documents], answer) for answer in self.answers if answer.capture.again]
        return all(
            torch.equal(tensor, other.features.tensors()[name])
            for one, other in pairs
            for name, tensor in one.features.tensors().items()
        )

    def _all(self) -> list[What]:
        layers: list[What] = list(range(self.reference.layers.shape[1]))
        last: list[What] = [] if self.reference.before_norm is None else [len(layers)]
        return [*layers, *last, "final hidden"]

    def _expected(self, what: What) -> Tensor:
        if what == "final hidden":
            return self.reference.final_hidden
        if what < self.reference.layers.shape[1]:
            return self.reference.layers[:, what]
        assert self.reference.before_norm is not None, "the caller looked"
        return self.reference.before_norm


def name_of(what: What) -> str:
    """For messages."""
    return f"layer {what}" if isinstance(what, int) else what


def _distance(what: What, document: int, capture: Capture, received: Tensor, expected: Tensor) -> Distance:
    relative, cosine = _distance_of(received, expected)
    return Distance(what, document, capture, relative, cosine)


def diagnose(comparison: Comparison, limits: Tolerance) -> str | None:
    """What is wrong, in words; None if nothing is."""
    longest = max(range(len(comparison.texts.documents)), key=lambda d: len(comparison.texts.documents[d].tokens))
    for what in comparison.whats:
        # However wide the limits are: what was asked for must be what is nearest.
        nearest = comparison.nearest(what, longest)
        received = comparison.received(comparison.alone(longest), what, 0)
        found = _distance_of(received, comparison.expected(nearest, longest))
        if nearest != what and limits.allows(*found) and not _alike(comparison, what, nearest, longest, limits):
            return f"{name_of(what)} asked, {_origin(comparison, nearest)} received (off by {found[0]:.3g}; {limits})"
    bad = [one for one in comparison.distances if not limits.allows(one.relative, one.cosine)]
    if bad:
        return _wrong_states(comparison, bad, longest, limits)
    wrong, compared = comparison.wrong_tokens()
    if wrong:
        return (
            f"{wrong} of {compared} greedy tokens differ from transformers', while the hidden states agree: another "
            "lm_head, or another transformation of logits"
        )
    return None


def _origin(comparison: Comparison, what: What) -> str:
    if what == "final hidden":
        return "the state after the final norm"
    if what == comparison.reference.layers.shape[1]:
        return f"layer {what}'s output, before the final norm,"
    return f"layer {what}'s output"


def _wrong_states(comparison: Comparison, bad: Sequence[Distance], longest: int, limits: Tolerance) -> str:
    worst = max(bad, key=_badness)
    text = comparison.texts.documents[worst.document].name
    figures = (
        f"{name_of(worst.what)} of {text!r} ({worst.capture}) is off by {worst.relative:.3g}, cosine "
        f"{worst.cosine:.4f}; {limits}"
    )
    return f"{_reason(comparison, bad, longest, limits)}: {figures}"


def _reason(comparison: Comparison, bad: Sequence[Distance], longest: int, limits: Tolerance) -> str:
    if any(math.isnan(one.relative) for one in bad):
        return "states that are not finite"
    alone = {one.document for one in bad if one.capture.alone and not one.capture.again}
    if not alone and any(one.capture.alone for one in bad):
        return "right the first time and wrong the second: a cache of prefixes answers with something else"
    if not alone:
        return "documents of a row see each other: alone they are right, in one row they are not"
    if longest not in alone and any(comparison.texts.documents[document].begins_like_another for document in alone):
        return "wrong where a document begins like an earlier one: a cache of prefixes"
    what = bad[0].what
    received, expected = comparison.received(comparison.alone(longest), what, 0), comparison.expected(what, longest)
    for by, mine, theirs in ((1, received[1:], expected[:-1]), (-1, received[:-1], expected[1:])):
        if limits.allows(*_distance_of(mine, theirs)):
            return f"tokens are shifted by one: token t has the state of token t {'-' if by > 0 else '+'} 1"
    errors = (received.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    if float(errors[0]) <= limits.relative < float(errors[-len(errors) // 4 :].mean()):
        first = int((errors > limits.relative).nonzero()[0])
        return f"right up to token {first - 1} and wrong after it: another RoPE (type, base or scaling)"
    return "nothing of the reference is like it: another checkpoint, or other weights"


def _alike(comparison: Comparison, what: What, other: What, document: int, limits: Tolerance) -> bool:
    """Whether the reference's own states are too alike to be told apart in the engine's precision."""
    relative, _ = _distance_of(comparison.expected(what, document), comparison.expected(other, document))
    return relative < 0.25 * limits.relative and relative < 1e-3


def _distance_of(received: Tensor, expected: Tensor) -> tuple[float, float]:
    mine, theirs = received.float(), expected.float()
    # A token at a time: the first one's states may be a thousand times as large as those of all others.
    errors = (mine - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-12)
    relative = float(errors.square().mean().sqrt())
    return relative, float(torch.nn.functional.cosine_similarity(mine, theirs, dim=-1).mean())


def _badness(one: Distance | tuple[float, float]) -> float:
    """Relative error; infinite where it is no number."""
    relative = one.relative if isinstance(one, Distance) else one[0]
    return math.inf if math.isnan(relative) else relative
