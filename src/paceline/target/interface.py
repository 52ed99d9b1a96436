"""The engine interface: who runs the target."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from paceline.errors import PacelineError
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.limits import Limits
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo

SELFTEST = "selftest"
"""Name of the features that a self-test asks for: it says itself what is wrong with an answer, if it gets one."""
OnLost = Callable[[PacelineError], None]
"""Hears why an engine can compute no more."""


class Engine(Protocol):
    """Runs the target over rows.

    Nobody waits for one row before submitting the next; answers may come in any order.
    """

    def info(self) -> TargetInfo:
        """The facts about the loaded target; the same object every time."""

    def limits(self) -> Limits:
        """What `capture` takes; the same every time."""

    def capture(self, request: RowRequest, spec: FeatureSpec) -> Future[Features]:
        """Compute features of one row.

        The future resolves when every number is in memory (on a GPU too: `finite` is known by then), so that any
        stream may read them. It fails with CaptureMismatchError or ConfigError for a request that cannot be right
        (token ids outside the vocabulary, layers out of range), OutOfMemoryError, or TargetError.
        """

    def room(self) -> int:
        """How many more rows may be submitted now without only queueing up behind others."""

    def close(self) -> None:
        """End the engine; futures not yet done fail with StoppedError. Safe to call twice."""
