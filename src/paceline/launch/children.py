"""Processes of a run: started with clean signals, ended with their parent whatever ends it, with their last words."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from paceline.launch.signals import signals_for_children

_TAIL_BYTES = 16_384


class Child:
    """One process that this one started.

    It holds the reading end of a pipe whose other end is here: when this process ends, by whatever means, the pipe
    closes, and `end_with_parent` in the child ends it. Ctrl-C on the terminal reaches the parent alone.
    """

    def __init__(self, name: str, arguments: Sequence[str], log: Path | None = None) -> None:
        """Start `python -m paceline.cli ARGUMENTS --parent-pipe FD`.

        Args:
            name: as messages call it, e.g. "server-0".
            log: takes its output, appended; None lets it write where this process writes.
        """
        self.name = name
        self.log = log
        reading, self._writing = os.pipe()
        command = [sys.executable, "-m", "paceline.cli", *arguments, "--parent-pipe", str(reading)]
        output = None
        try:
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                output = log.open("ab")
            with signals_for_children():
                self._process = subprocess.Popen(  # noqa: S603 - our own program
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(reading,),
                    process_group=0,
                )
        except BaseException:
            os.close(self._writing)
            raise
        finally:
            os.close(reading)
            if output is not None:
                output.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), None while it runs."""
        code = self._process.poll()
        if code is not None:
            self._close_pipe()
        return code

    def ask_to_end(self) -> None:
        """SIGTERM, if it still runs."""
        if self.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.poll() is None:
            self._process.kill()

    def end(self, deadline: float) -> int:
        """Wait until it has ended, by SIGKILL at `deadline` (of time.monotonic()); the exit code."""
        try:
            self._process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close_pipe()
        return int(self._process.returncode)

    def last_lines(self, num: int = 20) -> str:
        """The last lines of its log, for the message that it died."""
        return "" if self.log is None else last_lines(self.log, num)

    def _close_pipe(self) -> None:
        if self._writing >= 0:
            os.close(self._writing)
            self._writing = -1


def last_lines(log: Path, num: int = 20) -> str:
    """The last lines of a log file, set off from the message they stand in."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = deque(file.read().decode(errors="replace").splitlines(), num)
    except OSError as error:
        return f"  (it cannot be read: {error.strerror})"
    return "\n".join(f"  | {line}" for line in lines)


def describe_exit(code: int) -> str:
    """ "exit code 1", or "killed by signal 9"."""
    return f"exit code {code}" if code >= 0 else f"killed by signal {-code}"


def end_with_parent(pipe: int | None) -> None:
    """End this process at once when `pipe`, inherited from the parent, is closed at its other end.

    A thread waits for that: it runs also while the main thread sits in a kernel or a collective.
    """
    if pipe is None:
        return
    os.set_inheritable(pipe, False)

    def wait() -> None:
        while os.read(pipe, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()
