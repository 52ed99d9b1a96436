"""Files that an engine's server writes for our requests: which are ours, and what is left of requests that failed."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import secrets
import threading
import time
from pathlib import Path

from paceline.errors import TargetError

NAMES_BEGIN = "paceline-"
"""Names of requests, and of those who make them."""
_OWNER = re.compile(NAMES_BEGIN + r"[0-9a-f]{16}\.(owner|left)")
_SURELY_OVER_S = 600.0
"""After so long a server writes nothing more for a client that is gone."""
_SWEEP_EVERY_S = 5.0


class OwnFiles:
    """Names for requests, which the server puts into the names of its files; other clients' files are never touched.

    A file `paceline-ID.owner` is locked as long as its client lives, so that others know what a dead one left. It is
    `paceline-ID.left` then, and stays for a while: the server may write yet.
    """

    def __init__(self, directory: Path) -> None:
        """Remove what clients have left that are dead.

        Raises:
            TargetError: nothing can be written in `directory`.
        """
        self._directory = directory
        self.prefix = f"{NAMES_BEGIN}{secrets.token_hex(8)}"
        """Of the names of all requests."""
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._out: set[int] = set()
        """Numbers of requests whose files may be there."""
        self._swept_s = 0.0
        try:
            _remove_of_the_dead(directory)
            self._owner_fd = self._own()
        except OSError as error:
            raise TargetError(
                f"{directory}, where the engine writes hidden states, is not to be written by this user "
                f"({error.strerror}): its files are removed once they are read"
            ) from error

    def new_name(self, label: str = "") -> str:
        """For one request, until `finish`; it ends with `label`."""
        with self._lock:
            number = next(self._numbers)
            self._out.add(number)
        return f"{self.prefix}-{number}" + (f"-{label}" if label else "")

    def finish(self, name: str) -> None:
        """A request is over: whatever else the server has written for it, or writes yet, is to be removed."""
        with self._lock:
            self._out.discard(int(name.removeprefix(f"{self.prefix}-").partition("-")[0]))

    def sweep(self) -> None:
        """Remove what is left of requests that are over, or came too late: ours and those of dead clients.

        Looks every 5 s at most, however often it is called.
        """
        with self._lock:
            if time.monotonic() - self._swept_s < _SWEEP_EVERY_S:
                return
            self._swept_s = time.monotonic()
        own = re.compile(re.escape(self.prefix) + r"-(\d+)-")
        found = [(path, int(match[1])) for path in self._directory.iterdir() if (match := own.search(path.name))]
        with self._lock:  # after the look: what has come since may be of requests that are younger than it
            over = [path for path, number in found if number not in self._out]
        for path in over:
            path.unlink(missing_ok=True)
        _remove_of_the_dead(self._directory)

    def close(self) -> None:
        """Remove all that is ours; what the server writes later is left to other clients. Safe to call twice."""
        with self._lock:
            fd, self._owner_fd = self._owner_fd, -1
            unused = next(self._numbers) == 0
        if fd >= 0:
            with contextlib.suppress(OSError):  # the directory may be gone
                if unused:  # nothing will come
                    (self._directory / f"{self.prefix}.owner").unlink(missing_ok=True)
            os.close(fd)
            with contextlib.suppress(OSError):
                _remove_of_the_dead(self._directory)

    def _own(self) -> int:
        """An open file, locked before others see it under its name."""
        path = self._directory / f"{self.prefix}.owner"
        unseen = path.with_suffix(".new")
        fd = os.open(unseen, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unseen.rename(path)
        except BaseException:
            os.close(fd)
            raise
        return fd


def _remove_of_the_dead(directory: Path) -> None:
    for owner in [path for path in directory.iterdir() if _OWNER.fullmatch(path.name)]:
        # Another client may do the same at this moment.
        with contextlib.suppress(FileNotFoundError, PermissionError), owner.open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            _remove(directory, (owner.stem + "-",))
            if owner.suffix == ".owner":
                os.utime(owner)
                owner.rename(owner.with_suffix(".left"))
            elif time.time() - owner.stat().st_mtime > _SURELY_OVER_S:
                owner.unlink()


def _remove(directory: Path, names: tuple[str, ...]) -> None:
    """A file that is being written is gone when it is closed."""
    for entry in directory.iterdir():
        if any(name in entry.name for name in names):
            entry.unlink(missing_ok=True)
