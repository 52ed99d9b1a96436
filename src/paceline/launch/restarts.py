"""What a launcher does with servers that end: the first start must succeed, later ones are started anew, and how often.

Says nothing of how a server is started; each launcher does that in its own way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from paceline.config.placement import PlacementConfig
from paceline.errors import TargetError

SERVER_END_S = 6.0
"""Seconds servers get to end in order; they hold nothing that could be lost."""
HURRIED_END_S = 1.0
"""The same, when the time for an orderly end is over."""
_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 30.0
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class ServerLife:
    """One server over all its starts, as its launcher knows it."""

    name: str
    log: Path
    placement: PlacementConfig
    started: float = field(default_factory=time.monotonic)
    """When it was started the last time, of time.monotonic()."""
    url: str | None = None
    """Known once it is ready, and while it runs."""
    was_ready: bool = False
    num_restarts: int = 0
    start_at: float | None = None
    """When it is to be started anew; None while it runs, or is given up."""
    given_up: bool = False

    def begin(self) -> None:
        """It is started, now."""
        self.start_at, self.started = None, time.monotonic()

    def ready(self, url: str, where: str = "") -> None:
        """It answers at `url`."""
        self.url, self.was_ready = url, True
        logger.info("%s is ready at %s after %.0f s%s", self.name, url, time.monotonic() - self.started, where)

    def died(self, how: str, last_lines: str) -> None:
        """It ended by itself: at its first start that is an error of the user's, later it is started anew.

        Raises:
            TargetError: it had never been ready.
        """
        if not self.was_ready:
            raise TargetError(
                f"{self.name} ended while it was starting ({how}); the last lines of {self.log}:\n{last_lines}"
            )
        limit = self.placement.max_restarts
        self.url = None
        if self.num_restarts >= limit:
            self.given_up = True
            logger.error(
                "%s ended again (%s) and is given up after %d restarts:\n%s", self.name, how, limit, last_lines
            )
            return
        backoff_s = min(_FIRST_BACKOFF_S * 2.0**self.num_restarts, _LONGEST_BACKOFF_S)
        self.num_restarts += 1
        self.start_at = time.monotonic() + backoff_s
        logger.warning(
            "%s ended (%s) and is started anew (%d of %d); its last lines:\n%s",
            self.name,
            how,
            self.num_restarts,
            limit,
            last_lines,
        )

    def is_late(self) -> bool:
        """Whether it should have been ready by now."""
        return self.url is None and time.monotonic() - self.started > self.placement.start_timeout_s

    def too_late(self, last_lines: str) -> TargetError:
        """The error that ends the run then."""
        return TargetError(
            f"{self.name} is not ready after {self.placement.start_timeout_s:.0f} s (placement.start_timeout_s); the "
            f"last lines of {self.log}:\n{last_lines}"
        )


def check_any_left(lives: Sequence[ServerLife], last_lines: str) -> None:
    """Raise TargetError if every server is given up; `last_lines` are those of the last one."""
    if lives and all(life.given_up for life in lives):
        last = lives[-1]
        raise TargetError(
            f"all servers died more than placement.max_restarts = {last.placement.max_restarts} times; the last lines "
            f"of {last.log}:\n{last_lines}"
        )
