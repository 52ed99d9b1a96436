"""The verdict on servers and trainers as log lines: when it changes, now and then, and for the whole run at its end."""

from __future__ import annotations

import logging
from typing import Any

from paceline.observe.balance import BalanceWindow, judge, window_of_line
from paceline.observe.metrics import Line

_REPEAT_EVERY = 50
"""Logging intervals after which an unchanged verdict is said again."""
logger = logging.getLogger(__name__)


class BalanceLines:
    """A view of the `balance` tables in lines of metrics; what the trainer wrote there is all it knows."""

    def __init__(self) -> None:
        self._new: dict[str, Any] | None = None
        self._last_limit: str | None = None
        """Of the interval before."""
        self._said_limit: str | None = None
        self._num_intervals = 0
        self._num_said = 0
        """Intervals there were when something was said last."""
        self._first: dict[str, Any] | None = None
        self._rest = BalanceWindow()
        self._num_trainers = 1

    def write(self, line: Line) -> None:
        if line["kind"] == "train" and line.get("balance"):
            self._new = line["balance"]

    def flush(self) -> None:
        """An interval is over: say what is new. The first is warm-up, and one alone may be chance."""
        balance, self._new = self._new, None
        if balance is None:
            return
        self._num_intervals += 1
        self._num_trainers = int(balance["num_trainers"])
        if self._first is None:
            self._first = balance
            return
        self._rest += window_of_line(balance)
        limit, before, self._last_limit = balance["limit"], self._last_limit, balance["limit"]
        settled = limit == before and limit != self._said_limit
        if settled or (self._said_limit and self._num_intervals - self._num_said >= _REPEAT_EVERY):
            logger.info("balance: %s", balance["text"])
            self._said_limit, self._num_said = limit, self._num_intervals

    def close(self) -> None:
        """Say it once for the whole attempt, without its warm-up if there is more."""
        self.flush()
        window = self._rest if self._rest.tokens else window_of_line(self._first) if self._first else None
        verdict = judge(window, self._num_trainers) if window else None
        if verdict is not None:
            logger.info("balance over the whole run: %s (%.0f tokens/s)", verdict.text, verdict.tokens_per_s)
