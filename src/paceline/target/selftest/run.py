"""The self-test: known texts through an engine, and the verdict."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_any
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from paceline.errors import ConfigError, OutOfMemoryError, StoppedError, TargetError, TransportError
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.target.interface import SELFTEST, Engine
from paceline.target.selftest.compare import Answer, Comparison, diagnose, name_of
from paceline.target.selftest.reference import Reference
from paceline.target.selftest.texts import Capture, KnownTexts, has_room_for_far, plan_captures
from paceline.target.selftest.tolerance import Tolerance

_UNPROVEN = "not compared, for want of a long text: prefill in chunks, sliding windows, RoPE for long texts"
_LOOK_EVERY_S = 0.2
_ANSWER_S = 600.0
"""A first row may compile kernels for minutes."""


@dataclass(frozen=True, slots=True)
class SelfTestLine:
    """One layer, or the final hidden state, over all captures."""

    name: str
    relative: float
    """The worst of all documents."""
    cosine: float
    text: str
    """Which document in which capture was the worst."""
    works: bool
    limit: float
    """Of `relative`."""


@dataclass(frozen=True, slots=True)
class SelfTestResult:
    """What an engine computed, held against transformers."""

    lines: tuple[SelfTestLine, ...]
    num_wrong_tokens: int
    """Greedy tokens that the distance of the states does not explain."""
    num_judged_tokens: int
    """Of all; where many tokens are alike to the reference, nothing can be said."""
    repeats_are_equal: bool
    """Whether the same row came twice with the same bits; nothing depends on it."""
    tolerance: Tolerance
    reference_dtype: str
    problem: str | None
    """What is wrong, in words."""
    unproven: str | None
    """What was not compared, and why."""

    def check(self, engine: str) -> None:
        """Raise TargetError if the engine is wrong."""
        if self.problem is not None:
            raise TargetError(f"{engine} does not compute this target: {self.problem}")

    def describe(self) -> list[str]:
        """Lines of text, for a log."""
        shown = [
            f"{line.name}: off by {line.relative:.2e} at most, cosine {line.cosine:.6f} ({line.text})"
            + ("" if line.works else "  <- wrong")
            for line in self.lines
        ]
        repeats = "bit-equal" if self.repeats_are_equal else "different in the last bits"
        unproven = [] if self.unproven is None else [self.unproven]
        return [
            *shown,
            *unproven,
            f"greedy tokens: {self.num_wrong_tokens} of {self.num_judged_tokens} wrong; repeats: {repeats}",
            f"{self.tolerance}; transformers in {self.reference_dtype}",
            *self._wider(),
        ]

    def _wider(self) -> list[str]:
        limits = {line.name: line.limit for line in self.lines if line.limit > self.tolerance.relative}
        if not limits:
            return []
        shown = ", ".join(f"{name} {limit:.3g}" for name, limit in limits.items())
        many = "twice" if self.tolerance.roundings == 2 else f"{self.tolerance.roundings:g} times"
        return [f"wider, {many} what transformers' own rounding makes of this target: {shown}"]


def run_selftest(
    engine: Engine,
    texts: KnownTexts,
    reference: Reference,
    layers: Sequence[int],
    tolerance: Tolerance,
    num_far: int = 1,
    unproven: str | None = None,
    stop: threading.Event | None = None,
) -> SelfTestResult:
    """Send the known texts through `engine`, each alone and all in one row, all of it twice; the far one if it can.

    Args:
        layers: capture layers to compare, ascending.
        num_far: copies of the far text, if there is one.
        unproven: what they do not prove.

    Raises:
        PacelineError: the engine fails on one of them.
        TransportError: it does not answer.
        StoppedError: `stop` was set.
    """
    spec = FeatureSpec(tuple(layers), final_hidden="all", greedy=True)
    answers, more_unproven = _ask(engine, texts, spec, num_far, stop or threading.Event())
    comparison = Comparison(texts, reference, layers, answers, tolerance)
    worst = [comparison.worst(what) for what in comparison.whats]
    lines = [
        SelfTestLine(
            name_of(one.what),
            one.relative,
            one.cosine,
            f"{comparison.place_of(one)}, {one.capture}",
            comparison.limits_of(one.what).allows(one.relative, one.cosine),
            comparison.limits_of(one.what).relative,
        )
        for one in worst
    ]
    wrong, judged = comparison.wrong_tokens()
    return SelfTestResult(
        tuple(lines),
        wrong,
        judged,
        comparison.repeats_are_equal(),
        tolerance,
        reference.dtype,
        diagnose(comparison),
        "; ".join(what for what in (more_unproven, unproven) if what) or None,
    )


def _ask(
    engine: Engine, texts: KnownTexts, spec: FeatureSpec, num_far: int, stop: threading.Event
) -> tuple[list[Answer], str | None]:
    """All answers, and what could not be asked."""
    answers: list[Answer] = []
    info = engine.info()
    unproven = None
    if not has_room_for_far(info.max_position_embeddings):
        unproven = f"{_UNPROVEN} (the target has {info.max_position_embeddings} positions)"
    captures, num_axes = plan_captures(texts, num_far), info.num_position_axes
    for again in (False, True):  # the second time is asked for when the first is answered: caches know it then
        rows = [one for one in captures if one.again == again]
        asked = deque((one, engine.capture(_request(texts, one, num_axes), spec)) for one in rows)
        while asked:
            capture, future = asked.popleft()
            try:
                answers.append(Answer(capture, _on_host(_answer(texts, capture, spec, _wait(future, capture, stop)))))
            except (ConfigError, OutOfMemoryError) as error:
                if texts.documents[capture.documents[0]].windows:
                    unproven = f"{_UNPROVEN} ({error})"
                    continue
                longest = len(texts.documents[texts.main].tokens)
                raise type(error)(
                    f"the self-test's texts (up to {longest} tokens) cannot be computed: {error}; or do without it "
                    "(target.selftest = false)"
                ) from error
    return answers, unproven


def _request(texts: KnownTexts, capture: Capture, num_axes: int) -> RowRequest:
    documents = [texts.documents[document].tokens for document in capture.documents]
    return RowRequest(
        position=0,
        spec=SELFTEST,
        tokens=np.concatenate(documents),
        documents=np.cumsum([0, *map(len, documents)]).astype(np.int32),
        spans=np.zeros((0, 2), np.int32),
        positions=np.tile(np.concatenate([np.arange(len(one), dtype=np.int32) for one in documents]), (num_axes, 1)),
    )


def _wait(future: Future[Features], capture: Capture, stop: threading.Event) -> Features:
    deadline = time.monotonic() + _ANSWER_S
    while not stop.is_set():
        if future in wait_for_any([future], _LOOK_EVERY_S).done:
            return future.result()
        if time.monotonic() > deadline:
            raise TransportError(f"the engine did not answer within {_ANSWER_S:.0f} s to the self-test ({capture})")
    raise StoppedError("stopped during the self-test")


def _on_host(features: Features) -> Features:
    """The same, out of the way of the rows that follow."""
    moved: dict[str, Any] = {name: tensor.cpu() for name, tensor in features.tensors().items()}
    return replace(features, **moved)


def _answer(texts: KnownTexts, capture: Capture, spec: FeatureSpec, features: Features) -> Features:
    """`features`, if they are as many as were asked for."""
    num_tokens = sum(len(texts.documents[document].tokens) for document in capture.documents)
    received = {name: len(tensor) for name, tensor in features.tensors().items()}
    if set(received.values()) != {num_tokens} or features.layers != spec.layers:
        names = ", ".join(texts.documents[document].name for document in capture.documents)
        raise TargetError(
            f"the engine answered {received} rows of layers {list(features.layers)} to {num_tokens} tokens ({names}; "
            f"{capture}) and layers {list(spec.layers)}: does it keep prefixes in a cache, or compute chunks?"
        )
    return features
