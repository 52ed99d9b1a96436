"""What an engine sent, held against the reference, and what is wrong with it, in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from paceline.schema.features import Features
from paceline.target.selftest.reference import Reference, token_errors
from paceline.target.selftest.texts import Capture, KnownTexts
from paceline.target.selftest.tolerance import Tolerance

_LOGIT_NOISE = 6.0
"""A relative error of states moves a logit by as much of the logits' spread, give or take: two logits, in thousands of
tokens."""
_OTHER_EXPERTS = 0.02
"""Share of a long document's tokens that may be anywhere, where tokens are routed."""

What = int | Literal["final hidden"]
"""A capture layer, or the state after the final norm."""


@dataclass(frozen=True, slots=True)
class Distance:
    """From the reference, of tokens that are judged as one: a document's, a window's, or those of short documents."""

    what: What
    document: int
    """The first of them."""
    capture: Capture
    start: int
    """The first token, in its document."""
    relative: float
    """|received - reference| / |reference| of a token, over the tokens as `Comparison` says."""
    cosine: float
    """Over the tokens in the same way."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The features of one capture."""

    capture: Capture
    features: Features


_Errors = Callable[[Answer, What, int], tuple[Tensor, Tensor]]
"""(answer, what, place in its row): errors and cosines [m] of the tokens that are compared."""


class Comparison:
    """All answers of an engine against one reference.

    A document is judged as one, its tokens' root mean square. Of a long one that is compared in windows each window is,
    so that a wrong end is not lost among right tokens. Where tokens are routed to experts (`Tolerance.routed`), one
    that goes to other experts would be most of a short document: documents of the same few tokens are judged together,
    they and windows by their median token, which a fault of the engine moves and a few other experts do not. Of long
    documents the worst tokens, one in fifty, are left out.
    """

    def __init__(
        self,
        texts: KnownTexts,
        reference: Reference,
        layers: Sequence[int],
        answers: Sequence[Answer],
        limits: Tolerance,
    ) -> None:
        self.texts, self.reference, self.answers, self.limits = texts, reference, answers, limits
        self._limits: dict[What, Tolerance] = {}
        last = reference.layers.shape[1]
        # Of the last layer there is a reference only where the final norm was found.
        known = [layer for layer in layers if layer < last or reference.before_norm is not None]
        self.whats: list[What] = [*known, "final hidden"]
        self.distances = [distance for what in self.whats for distance in self._distances(what, self._errors)]

    def limits_of(self, what: What) -> Tolerance:
        """The limits, wider where transformers' own rounding makes as much of this layer."""
        if what not in self._limits:
            roundings = [] if self.reference.rounding is None else self._distances(what, self._roundings)
            worst = max((one.relative for one in roundings), default=0.0)
            self._limits[what] = self.limits.widened(worst)
        return self._limits[what]

    def _distances(self, what: What, errors: _Errors) -> Iterator[Distance]:
        together: dict[tuple[int, bool, bool], list[_Piece]] = {}
        for answer in self.answers:
            for place, document in enumerate(answer.capture.documents):
                piece = _Piece(document, answer.capture, 0, *errors(answer, what, place))
                text = self.texts.documents[document]
                if self.limits.routed and text.is_short:
                    key = (len(text.tokens), answer.capture.alone, answer.capture.again)
                    together.setdefault(key, []).append(piece)
                elif text.windows:
                    judge = _median if self.limits.routed else _mean
                    yield from (_judge(what, [one], judge) for one in piece.cut(text.windows))
                else:
                    yield _judge(what, [piece], _mean_of_most if self.limits.routed else _mean)
        yield from (_judge(what, pieces, _median) for pieces in together.values())

    def _errors(self, answer: Answer, what: What, place: int) -> tuple[Tensor, Tensor]:
        return _token_errors(self.received(answer, what, place), self.expected(what, answer.capture.documents[place]))

    def _roundings(self, answer: Answer, what: What, place: int) -> tuple[Tensor, Tensor]:
        """As `_errors`, of transformers in the engine's data type; cosines follow from them."""
        assert self.reference.rounding is not None, "the caller looked"
        document = answer.capture.documents[place]
        rows = slice(*self.texts.bounds[document : document + 2].tolist())
        errors = self.reference.rounding[rows, -1 if what == "final hidden" else what]
        return errors, 1 - errors.square() / 2

    def expected(self, what: What, document: int) -> Tensor:
        """[m, H] of the tokens that are compared."""
        rows = slice(*self.texts.bounds[document : document + 2].tolist())
        return self._expected(what)[rows]

    def received(self, answer: Answer, what: What, place: int) -> Tensor:
        """[m, H] of the tokens that are compared of the document at `place` of a row."""
        rows, features = self._rows(answer, place), answer.features
        if what == "final hidden":
            assert features.final_hidden is not None, "it was asked for"
            return features.final_hidden[rows].cpu()
        return features.hidden[rows, features.layers.index(what)].cpu()

    def worst(self, what: What) -> Distance:
        """The farthest of all captures and documents."""
        return max((one for one in self.distances if one.what == what), key=_badness)

    def place_of(self, one: Distance) -> str:
        """For messages: "long", or "far, from token 2288 on"."""
        text = self.texts.documents[one.document]
        if text.windows:
            return f"{text.name}, from token {one.start} on"
        return text.name if not (self.limits.routed and text.is_short) else f"{text.name} and others like it"

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
        for answer in self.answers:
            assert answer.features.greedy is not None, "it was asked for"
            for place, document in enumerate(answer.capture.documents):
                errors, _ = self._errors(answer, "final hidden", place)
                far = errors.clamp(min=float(errors.square().mean().sqrt()))[:, None]
                rows = slice(*self.texts.bounds[document : document + 2].tolist())
                top, ids = self.reference.top_logits[rows], self.reference.top_ids[rows]
                allowed = top >= top[:, :1] - _LOGIT_NOISE * far * self.reference.logit_spread[rows, None]
                greedy = answer.features.greedy[self._rows(answer, place)].cpu().long()
                right = ((greedy[:, None] == ids) & allowed).any(1)
                known = ~allowed[:, -1]
                wrong += int((~right & known).sum())
                judged += int(known.sum())
        return wrong, judged

    def _rows(self, answer: Answer, place: int) -> Tensor:
        """int64[m]: where an answer has the tokens that are compared of the document at `place`."""
        before = sum(len(self.texts.documents[one].tokens) for one in answer.capture.documents[:place])
        return torch.from_numpy(before + self.texts.documents[answer.capture.documents[place]].places)

    def repeats_are_equal(self) -> bool:
        """Whether what was asked twice came with the same bits."""
        first = {answer.capture.documents: answer for answer in reversed(self.answers) if not answer.capture.again}
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


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Tokens of one document of one answer."""

    document: int
    capture: Capture
    start: int
    errors: Tensor
    """[m]: relative, of a token."""
    cosines: Tensor
    """[m]"""

    def cut(self, windows: Sequence[tuple[int, int]]) -> Iterator[_Piece]:
        """The windows that the compared tokens are, end to end."""
        sizes = [end - start for start, end in windows]
        parts = zip(windows, self.errors.split(sizes), self.cosines.split(sizes), strict=True)
        for (start, _), errors, cosines in parts:
            yield _Piece(self.document, self.capture, start, errors, cosines)


def _judge(what: What, pieces: Sequence[_Piece], judge: Callable[[Tensor, Tensor], tuple[float, float]]) -> Distance:
    """All pieces as one."""
    first = pieces[0]
    errors, cosines = torch.cat([one.errors for one in pieces]), torch.cat([one.cosines for one in pieces])
    return Distance(what, first.document, first.capture, first.start, *judge(errors, cosines))


def _mean(errors: Tensor, cosines: Tensor) -> tuple[float, float]:
    return float(errors.square().mean().sqrt()), float(cosines.mean())


def _mean_of_most(errors: Tensor, cosines: Tensor) -> tuple[float, float]:
    """Without the worst; NaN if any is, which is no question of experts."""
    if errors.isnan().any():
        return math.nan, math.nan
    num = len(errors) - int(_OTHER_EXPERTS * len(errors))
    return _mean(errors.topk(num, largest=False).values, cosines.topk(num).values)


def _median(errors: Tensor, cosines: Tensor) -> tuple[float, float]:
    """NaN if any is."""
    return float(errors.median()), float(cosines.median())


def diagnose(comparison: Comparison) -> str | None:
    """What is wrong, in words; None if nothing is."""
    longest = comparison.texts.main
    for what in comparison.whats:
        limits = comparison.limits_of(what)
        # However wide the limits are: what was asked for must be what is nearest.
        nearest = comparison.nearest(what, longest)
        received = comparison.received(comparison.alone(longest), what, 0)
        found = _distance_of(received, comparison.expected(nearest, longest))
        if nearest != what and limits.allows(*found) and not _alike(comparison, what, nearest, longest, limits):
            return f"{name_of(what)} asked, {_origin(comparison, nearest)} received (off by {found[0]:.3g}; {limits})"
    bad = [one for one in comparison.distances if not comparison.limits_of(one.what).allows(one.relative, one.cosine)]
    if bad:
        return _wrong_states(comparison, bad, longest)
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


def _wrong_states(comparison: Comparison, bad: Sequence[Distance], longest: int) -> str:
    worst = max(bad, key=_badness)
    limits = comparison.limits_of(worst.what)
    figures = (
        f"{name_of(worst.what)} of {comparison.place_of(worst)!r} ({worst.capture}) is off by {worst.relative:.3g}, "
        f"cosine {worst.cosine:.4f}; {limits}"
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
    texts = comparison.texts.documents
    if all(texts[document].windows for document in alone):
        start = min(one.start for one in bad if one.document in alone)
        return (
            f"right in {len(texts[longest].tokens)} tokens and wrong from about token {start} of "
            f"{len(texts[min(alone)].tokens)} on: a prefill in chunks, a sliding window, or RoPE for long texts"
        )
    if longest not in alone and any(texts[document].begins_like_another for document in alone):
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
    return _mean(*_token_errors(received, expected))


def _token_errors(received: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """(relative errors, cosines), of each token."""
    cosines = torch.nn.functional.cosine_similarity(received.float(), expected.float(), dim=-1)
    return token_errors(received, expected), cosines


def _badness(one: Distance | tuple[float, float]) -> float:
    """Relative error; infinite where it is no number."""
    relative = one.relative if isinstance(one, Distance) else one[0]
    return math.inf if math.isnan(relative) else relative
