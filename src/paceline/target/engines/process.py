"""An engine as a child process: started, watched, its last words kept, ended with whoever started it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from paceline.errors import PacelineError, StoppedError, TargetError

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.2
_LOG_EVERY_S = 30.0
_END_S = 11.0
"""The guard takes 8 s at most."""
_NUM_LOG_LINES = 12
_TAIL_BYTES = 1 << 20
"""An engine of days writes gigabytes."""
_NUM_ERRORS = 5
_NAMES_AN_ERROR = re.compile(r"\b\w*(Error|Exception)\b: ?\S|out of memory", re.IGNORECASE)
_LAST_WORDS_S = 10.0
_LEAST_MEMORY = 2 << 30
"""Free bytes of a directory in memory that a pool of rows may need."""
_SIGNALS = frozenset(map(int, signal.valid_signals()))


class EngineProcess:
    """A child that lives until `close()`, or until this process ends, however that happens.

    consumes: nothing      waits for: the child's end, on a thread of its own
    unblocked by: the child's end, which close() brings about
    """

    def __init__(self, name: str, root: Path, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start `command`; nothing of it goes to our own terminal.

        Args:
            name: for messages, e.g. "vLLM".
            root: a private directory for its log and files, removed when it has ended.
            environment: the whole of it.
        """
        self.name = name
        self._root = root
        self._log = root / "engine.log"
        self._closing = False
        self._last_words: str | None = None
        self._ended = threading.Event()
        reading, self._writing = os.pipe()
        guard = [sys.executable, "-I", str(Path(__file__).with_name("guard.py")), str(reading), str(root)]
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(  # noqa: S603  # the user's own engine
                    [*guard, *command],
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a Ctrl-C is for us: we end it in order
                    pass_fds=[reading],
                )
        except BaseException:
            os.close(self._writing)
            raise
        finally:
            os.close(reading)
        self._watcher = threading.Thread(target=self._watch, name="engine-watcher", daemon=True)
        self._on_end: Callable[[TargetError], None] | None = None
        self._watcher.start()

    @property
    def pid(self) -> int:
        """Of the guard, the engine's parent."""
        return self._process.pid

    @property
    def log(self) -> Path:
        """What the engine writes to stdout and stderr."""
        return self._log

    def wait_until(self, ready: Callable[[], bool], timeout_s: float, stop: threading.Event | None = None) -> None:
        """Return when `ready` says so.

        Raises:
            TargetError: the engine ended, or was not ready in time; with the last lines of its log.
            StoppedError: `stop` was set.
        """
        begin = told = time.monotonic()
        while not ready():
            if self._ended.is_set():
                raise self._describe_end("before it was ready")
            now = time.monotonic()
            if now - begin > timeout_s:
                raise TargetError(
                    f"{self.name} was not ready after {timeout_s:.0f} s (target.engine_start_timeout_s), the last "
                    f"lines of its log:\n{self.tail()}"
                )
            if now - told > _LOG_EVERY_S:
                told = now
                logger.info("waiting for %s for %.0f s; its log: %s", self.name, now - begin, self._log)
            if (stop or self._ended).wait(_LOOK_EVERY_S) and stop is not None:
                raise StoppedError(f"stopped while {self.name} was starting")
        logger.info("%s is ready after %.0f s", self.name, time.monotonic() - begin)

    def on_end(self, call: Callable[[TargetError], None]) -> None:
        """Call `call` with its last words should the engine end before `close()`; at once if it has."""
        self._on_end = call
        if self._ended.is_set() and not self._closing:
            call(self._describe_end("while it served"))

    def explain(self, error: PacelineError) -> TargetError:
        """What failed because of the engine, with the last lines of its log; it may end because of the same."""
        if self._ended.wait(_LAST_WORDS_S):
            return self._describe_end("at its first documents")
        return TargetError(f"{error}\nThe last lines of the log of {self.name}:\n{self.tail()}")

    def tail(self) -> str:
        """The last lines of its log, after earlier ones that name errors."""
        if self._last_words is not None:
            return self._last_words
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = log.read().decode(errors="replace").splitlines()
        except FileNotFoundError:  # it was ended by us, and removed
            return ""
        # An engine's server ends after its core did, and only the core says why.
        errors = [line for line in lines[:-_NUM_LOG_LINES] if _NAMES_AN_ERROR.search(line)]
        return "\n".join([*errors[-_NUM_ERRORS:], *lines[-_NUM_LOG_LINES:]])

    def close(self) -> None:
        """End the engine and all its workers, and remove its directory. Safe to call twice."""
        self._closing = True
        if self._writing >= 0:
            os.close(self._writing)
            self._writing = -1
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        self._process.kill()
        self._watcher.join()

    def _watch(self) -> None:
        self._process.wait()
        self._last_words = self.tail()
        shutil.rmtree(self._root, ignore_errors=True)  # whoever hears of this end may end at once, too
        self._ended.set()
        if not self._closing and self._on_end is not None:
            self._on_end(self._describe_end("while it served"))

    def _describe_end(self, when: str) -> TargetError:
        code = self._process.returncode
        how = f"signal {code - 128}" if code - 128 in _SIGNALS else f"code {code}"
        return TargetError(f"{self.name} ended with {how} {when}, the last lines of its log:\n{self.tail()}")


def private_directory(engine: str) -> Path:
    """A new directory of mode 0700 for an engine's log, code and hidden states."""
    return Path(tempfile.mkdtemp(prefix=f"paceline-{engine}-", dir=_memory()))


def _memory() -> Path | None:
    """Hidden states go through memory where the host has such a directory."""
    shared = Path("/dev/shm")  # noqa: S108  # a directory in it is private
    if not shared.is_dir() or not os.access(shared, os.W_OK):
        return None
    free = shutil.disk_usage(shared).free
    if free < _LEAST_MEMORY:
        logger.warning(
            "hidden states go through %s, since %s has %.0f MB free: containers have more with --shm-size=16g",
            tempfile.gettempdir(),
            shared,
            free / 1e6,
        )
        return None
    return shared
