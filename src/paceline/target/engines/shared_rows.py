"""Memory for rows' states that an engine's process maps, too, and writes into by itself: nothing is copied here."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import math
import mmap
import os
import shutil
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from paceline.target.engines.interface import RowMemory
from paceline.transport.buffers import block_size

logger = logging.getLogger(__name__)

_FOR_ALL_GPUS = 1
"""cudaHostRegisterPortable"""


@dataclass(slots=True, eq=False)
class _Block:
    """A file that holds one row after the other, under a name of its own for each."""

    path: Path
    fd: int
    memory: np.ndarray
    is_pinned: bool

    def drop(self) -> None:
        """Nothing refers to its memory."""
        self.unpin()
        self.remove()

    def unpin(self) -> None:
        """Before the memory may go: a GPU would read from its address whatever was there."""
        if self.is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self.memory.ctypes.data)

    def remove(self) -> None:
        """Its name; the memory stays as long as somebody has it."""
        with contextlib.suppress(OSError):  # gone, or not ours any more
            self.path.unlink()
        os.close(self.fd)


class SharedRows:
    """Rows of one client of an engine; `target.inside.paceline_shared_rows` is the engine's side, with what is agreed.

    Used again only when nothing refers to a row's memory any more, and when no writer holds it.
    """

    def __init__(self, directory: Path, prefix: str) -> None:
        """Files in `directory` begin with `prefix`; none is made where that is no memory."""
        self._directory, self._prefix = directory, prefix
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._blocks: set[_Block] = set()
        self._free: list[_Block] = []
        self._returned: deque[_Block] = deque()
        """Filled without the lock: the garbage collector may do so at any moment, on any thread."""
        self._can_share = _is_memory(directory)
        self._has_warned = self._closed = False

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> RowMemory:
        """Memory for a row's states; the process's own where none can be shared. What stands in it is anything.

        Args:
            pinned: for copies to a GPU, the current one.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        block = self._take(num_bytes, pinned) if num_bytes else None
        if block is None:
            return RowMemory("", torch.empty(shape, dtype=dtype, pin_memory=pinned))
        lease = block.memory[:num_bytes]
        # The tensor's storage keeps `lease` alive, and so does every view of it.
        weakref.finalize(lease, self._give_back, block).atexit = False
        label = block.path.name.removeprefix(f"{self._prefix}-")
        return RowMemory(label, torch.from_numpy(lease).view(dtype).view(shape))

    def close(self) -> None:
        """Remove the files; rows that are out keep their memory. Safe to call twice."""
        with self._lock:
            self._can_share, self._closed = False, True
            for block in self._blocks:
                block.remove()
            self._blocks.clear()
            for block in self._free:
                block.unpin()
            self._free.clear()
        self._unpin_returned()

    def _give_back(self, block: _Block) -> None:
        """On any thread, by the garbage collector too: no lock is taken."""
        self._returned.append(block)
        if self._closed:
            self._unpin_returned()

    def _unpin_returned(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._returned.popleft().unpin()

    def _take(self, num_bytes: int, pinned: bool) -> _Block | None:
        with self._lock:
            if not self._can_share:
                return None
            self._collect()
            for block in sorted(self._free, key=lambda block: block.memory.nbytes):
                if block.memory.nbytes >= num_bytes and self._rename(block):
                    self._free.remove(block)
                    return block
            for block in [block for block in self._free if block.memory.nbytes < num_bytes]:
                self._forget(block)
            made = self._make(num_bytes, pinned)
            if made is not None:
                self._blocks.add(made)
            return made

    def _collect(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())

    def _forget(self, block: _Block) -> None:
        self._free.remove(block)
        self._blocks.remove(block)
        block.drop()

    def _next_path(self) -> Path:
        return self._directory / f"{self._prefix}-row{next(self._numbers)}"

    def _rename(self, block: _Block) -> bool:
        """Make it another row's; not while somebody writes into it."""
        try:
            fcntl.flock(block.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            block.path = block.path.rename(self._next_path())
        except OSError:  # somebody has removed it, and with it the engine's way into it
            is_there = False
        else:
            is_there = True
        fcntl.flock(block.fd, fcntl.LOCK_UN)
        if not is_there:
            self._forget(block)
        return is_there

    def _make(self, num_bytes: int, pinned: bool) -> _Block | None:
        """A new file, of memory that is there: to write into what is not would end the engine. None for no room."""
        size, path = block_size(num_bytes), self._next_path()
        try:
            if 2 * size > shutil.disk_usage(self._directory).free:
                raise OSError(f"{size / 1e6:.0f} MB would be more than half of what is free")
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
                memory = np.frombuffer(mmap.mmap(fd, size), np.uint8)
            except OSError:
                os.close(fd)
                path.unlink(missing_ok=True)
                raise
        except FileNotFoundError:  # the directory went with its engine, as requests will say
            return None
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "%s has no room for rows (%s): some hidden states come in files, which costs copies",
                    *(self._directory, error),
                )
            return None
        return _Block(path, fd, memory, pinned and _pin(memory))


def _pin(memory: np.ndarray) -> bool:
    """Let the current GPU copy from it without a copy in between."""
    error = int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, _FOR_ALL_GPUS))
    if error:
        logger.warning(
            "rows of %.0f MB cannot be pinned (CUDA error %d): copies are slower", memory.nbytes / 1e6, error
        )
    return not error


def _is_memory(directory: Path) -> bool:
    """Whether files in it are in memory: on a disk those that stay would be written again and again."""
    device = directory.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == wanted:
            return kind.split()[0] in ("tmpfs", "ramfs")
    return False
