"""The processes that do a run's work, one a trainer rank: all are awaited, and the first that fails ends the others."""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from paceline.errors import TrainerFailedError
from paceline.launch.children import describe_exit, last_lines
from paceline.launch.failures import Failure, read_failure

_LOOK_EVERY_S = 0.05
_OTHERS_S = 2.0
"""After the first failure: seconds for the others to notice by themselves, before they are asked to end."""
_LONGEST_END_S = 5.0
"""After a failure there is nothing left to save: seconds for the others to end, whatever their own grace is."""
_SOCKETS_BEFORE_S = 1.0
"""A killed process closes its sockets this long, at most, before its parent sees that it is gone."""
_ASKED_FROM_ELSEWHERE = (128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit codes of a rank that ended in order, if this process did not ask."""


class Process(Protocol):
    """One process, on this machine or another."""

    @property
    def name(self) -> str:
        """As messages call it."""

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), None while it runs."""

    def ask_to_end(self) -> None:
        """SIGTERM, if it still runs."""

    def kill(self) -> None:
        """SIGKILL, if it still runs."""


@dataclass(slots=True)
class Worker:
    """One process and what is known of its end."""

    child: Process
    log: Path
    """What it logs to, itself or through its output."""
    failure_file: Path | None
    """Where it writes why it failed; None for one that tells the user itself."""
    code: int | None = None
    """Its exit code, once it has ended."""
    ended_at: float = 0.0
    """Of time.time()."""
    as_told: bool = False
    """Whether it ended since it was asked to, or was killed at the deadline."""

    def written_failure(self) -> Failure | None:
        """What it wrote before it ended."""
        return None if self.failure_file is None else read_failure(self.failure_file)

    def failure(self) -> Failure | None:
        """Why it failed; None if it did not, or if it ended as it was told to."""
        if not self.code:
            return None
        written = self.written_failure()
        if written is not None or self.as_told:
            return written
        killed, aborted = self.code < 0, self.code == -signal.SIGABRT
        message = f"{_describe_end(self.code)}; the last lines of {self.log}:\n{last_lines(self.log)}"
        when = self.ended_at - (_SOCKETS_BEFORE_S if killed and not aborted else 0.0)
        # NCCL's watchdog aborts a process whose peers are gone.
        return Failure(when, message, (), follows=aborted)

    def keep_failure(self) -> None:
        """Append to its log what it wrote, once it has ended."""
        written = self.written_failure()
        if written is not None:
            with contextlib.suppress(OSError), self.log.open("a", encoding="utf-8") as file:
                file.write(written.text + "\n")


class Workers:
    """Started one after the other, then looked at again and again until all have ended.

    consumes: the ends of processes      waits for: nothing; `look` is called often
    unblocked by: `ask_to_end`, the first failure, and then a deadline at which whoever is left is killed
    """

    def __init__(self, grace_s: float, stragglers_s: float) -> None:
        """Watch nothing yet.

        Args:
            grace_s: what a worker needs to end in order.
            stragglers_s: the longest that one may still run when another has ended without a failure.
        """
        self._grace_s = grace_s
        self._stragglers_s = stragglers_s
        self._workers: list[Worker] = []
        self._asked_by_user = False
        self._first_end: float | None = None
        self._first_failure: float | None = None
        self._deadline: float | None = None
        self._straggling = ""
        self.num_killed = 0
        """How many had to be killed."""

    def add(self, worker: Worker) -> None:
        self._workers.append(worker)

    def ask_to_end(self) -> None:
        """Have all of them save and end; safe to call again."""
        if not self._asked_by_user and self._deadline is None:
            self._asked_by_user = True
            self._tell_to_end(self._grace_s)

    def look(self) -> bool:
        """Whether all have ended; does what is due about those that have not."""
        now = time.monotonic()
        for worker in self._workers:
            if worker.code is None and (code := worker.child.poll()) is not None:
                self._note_end(worker, code, now)
        running = [worker for worker in self._workers if worker.code is None]
        if not running:
            return True
        if self._deadline is not None:
            if now >= self._deadline:
                self._kill(running)
        elif self._first_failure is not None:
            if now >= self._first_failure + _OTHERS_S:
                self._tell_to_end(min(self._grace_s, _LONGEST_END_S))
        elif self._first_end is not None and now >= self._first_end + self._stragglers_s:
            names = ", ".join(worker.child.name for worker in running)
            self._straggling = (
                f"{names} still ran {self._stragglers_s:g} s (training.dist_timeout_s) after another rank had ended "
                "without an error"
            )
            self._tell_to_end(min(self._grace_s, _LONGEST_END_S))
        return False

    def _note_end(self, worker: Worker, code: int, now: float) -> None:
        worker.code, worker.ended_at = code, time.time()
        if self._deadline is not None:
            worker.as_told = code >= 0 or code == -signal.SIGTERM or now >= self._deadline
        self._first_end = self._first_end or now
        if code and self._first_failure is None:
            self._first_failure = now

    def result(self) -> int:
        """The exit code of the whole, once all have ended.

        Raises:
            TrainerFailedError: one failed; its own message, or the last lines of its log, before those of the others.
        """
        failed = [(worker, failure) for worker in self._workers if (failure := worker.failure()) is not None]
        for worker, _ in failed:
            worker.keep_failure()
        if self._asked_by_user:
            # Ranks that did not reach their common end in time lose each other: that is no news.
            failed = [(worker, failure) for worker, failure in failed if not failure.follows]
        if failed:
            failed.sort(key=lambda pair: (pair[1].follows, pair[1].time))
            first, failure = failed[0]
            if first.failure_file is None and first.code is not None and first.code > 0:
                return first.code  # it has told the user itself
            raise _error(first, failure, failed[1:], self._workers)
        if self._straggling:
            raise TrainerFailedError(self._straggling)
        code = next((worker.code for worker in self._workers if worker.code), 0)
        return code if code >= 0 else 128 - code

    def end_all(self) -> None:
        """End whoever is left, in order if there is time; returns when all are gone."""
        if self.look():
            return
        self._tell_to_end(self._grace_s)
        while not self.look():
            time.sleep(_LOOK_EVERY_S)

    def _kill(self, workers: list[Worker]) -> None:
        self.num_killed = len(workers)
        for worker in workers:
            worker.child.kill()

    def _tell_to_end(self, grace_s: float) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + grace_s
        for worker in self._workers:
            worker.child.ask_to_end()


def _describe_end(code: int) -> str:
    if code in _ASKED_FROM_ELSEWHERE:
        name = signal.Signals(code - 128).name
        return f"{name} from elsewhere asked it to end, and the others ended with it ({describe_exit(code)})"
    return describe_exit(code)


def _error(
    first: Worker, failure: Failure, others: list[tuple[Worker, Failure]], workers: list[Worker]
) -> TrainerFailedError:
    name, num = first.child.name, len(workers)
    if num == 1 and first.written_failure() is not None:
        error = TrainerFailedError(failure.message)
        for note in failure.notes:
            error.add_note(note)
        return error
    lines = [f"{name} failed first: {failure.text}" if num > 1 else f"{name} ended: {failure.text}"]
    lines += [f"{worker.child.name} after it: {other.summary}" for worker, other in others]
    if failure.waited_in_vain:
        lines.append(
            "ranks wait for each other as long as training.dist_timeout_s says: raise it if one is only slow "
            "(preparing data, which `paceline prepare` does beforehand, or compiling)"
        )
    if failure.follows:  # nobody said what was wrong
        killed = [worker for worker in workers if worker.as_told and worker.code == -signal.SIGKILL]
        lines += [
            f"{worker.child.name} had to be killed, and may be the one that others waited for; the last lines of "
            f"{worker.log}:\n{last_lines(worker.log)}"
            for worker in killed
        ]
    return TrainerFailedError("\n".join(lines))
