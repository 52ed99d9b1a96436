"""Memory of rows that paceline shares with an engine: runs in the engine's process, which needs nothing else of it.

The id of a request may say where its hidden states go: `paceline-ID-7-row3.2048.300-...` is for the file
`paceline-ID-row3` in the engine's directory, there for 300 tokens from the row's token 2048 on. The file is a row's
states [T, L, H] and nothing else.

It has that name for one row only, and gets another one under a lock that forbids those who write into it: what comes
late, for a row that was given up, finds no place, and never another row's.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_PLACE = re.compile(r"(paceline-[0-9a-f]{16})-\d+-(row\d+)\.(\d+)\.(\d+)-")
_LOOK_EVERY_S = 5.0
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Mapped:
    """A file's memory in this process."""

    memory: np.ndarray
    fd: int
    client: Path
    """Its names begin with this."""

    def is_over(self) -> bool:
        """Whether its client has let go of it, or is dead: then its files are removed."""
        if os.fstat(self.fd).st_nlink == 0:
            return True
        if _is_alive(self.client):
            return False
        for path in self.client.parent.glob(f"{self.client.name}-row*"):
            with contextlib.suppress(OSError):  # gone, or not ours to remove
                path.unlink()
        return True


class SharedRows:
    """The rows that clients share; any number of threads may write into them at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watcher: threading.Thread | None = None
        self._mapped: dict[tuple[int, int], _Mapped] = {}
        """By device and inode, which are nobody else's as long as the file is open."""

    def put(self, path: Path, first: int, states: Tensor) -> bool:
        """Copy states to the place of their request; False where it names none that is there. Raises nothing.

        Args:
            path: of the file that would hold them; the id of the request is in its name.
            first: of the request's tokens.
            states: [n, L, H] on the host.
        """
        place = _PLACE.search(path.name)
        if place is None or not len(states):
            return False
        try:
            return self._put(path, place, first, states)
        except OSError:  # the row is over, or gets its next name at this moment, or is another user's
            return False
        except Exception:  # whoever waits for the states gets them in a file
            _logger.exception("hidden states cannot be put to the place of %s", path.name)
            return False

    def _put(self, path: Path, place: re.Match[str], first: int, states: Tensor) -> bool:
        row = path.with_name(f"{place[1]}-{place[2]}")
        start, length = int(place[3]), int(place[4])
        fd = os.open(row, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(fd), row.stat()):
                return False
            source = states.contiguous().view(torch.uint8).numpy().reshape(-1)
            begin = (start + first) * (source.nbytes // len(states))
            memory = self._memory(fd, path.with_name(place[1]))
            if first + len(states) > length or begin + source.nbytes > memory.nbytes:
                return False
            np.copyto(memory[begin : begin + source.nbytes], source)  # other threads run meanwhile
            return True
        finally:
            # By name: a process that was forked meanwhile has the file open, too.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def num_mapped(self) -> int:
        """Files that are mapped here."""
        with self._lock:
            return len(self._mapped)

    def _memory(self, fd: int, client: Path) -> np.ndarray:
        """The whole file's, mapped once."""
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino)
        with self._lock:
            if key not in self._mapped:
                # An open file of its own: with a copy of `fd` it would share the lock.
                own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
                try:
                    memory = np.frombuffer(mmap.mmap(own, status.st_size), np.uint8)
                except BaseException:
                    os.close(own)
                    raise
                self._mapped[key] = _Mapped(memory, own, client)
                if self._watcher is None or not self._watcher.is_alive():
                    self._watcher = threading.Thread(target=self._watch, name="paceline-shared-rows", daemon=True)
                    self._watcher.start()
            return self._mapped[key].memory

    def _watch(self) -> None:
        """Let go of rows whose clients have; the memory is theirs and ours until then."""
        while True:
            time.sleep(_LOOK_EVERY_S)
            with self._lock:
                for key, mapped in list(self._mapped.items()):
                    if mapped.is_over():
                        del self._mapped[key]
                        os.close(mapped.fd)
                if not self._mapped:
                    self._watcher = None
                    return


def _is_alive(client: Path) -> bool:
    """Whether a client holds the lock of the file that says so."""
    try:
        fd = os.open(client.with_name(client.name + ".owner"), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)
