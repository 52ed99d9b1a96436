"""Directories that are there whole or not at all, and the remains of processes that were killed while writing one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from paceline.errors import DataError

_log = logging.getLogger(__name__)
_OWNER = ".owner"
"""Ends the name of the file that is locked as long as the process lives that writes the directory of that name."""


def publish_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Make `directory` whole or not at all: written under another name, then renamed. Nothing if it exists.

    What processes that are gone left unfinished beside it is removed.

    Raises:
        DataError: a full disk.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory.parent)
    if directory.exists():
        _log.info("reusing %s", directory)
        return
    with _owned_name(directory) as work:
        try:
            work.mkdir()
            write(work)
            try:
                work.rename(directory)
            except OSError:
                if not directory.exists():
                    raise
                _log.info("%s was published by another process meanwhile", directory)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Remove unfinished directories in `parent` whose processes are gone; those of living ones stay."""
    for owner in parent.glob(f".*{_OWNER}"):
        try:
            with owner.open("r+") as file:
                _lock(file)
                work = owner.with_name(owner.name.removesuffix(_OWNER))
                if work.is_dir():
                    _log.warning("removing %s, which a process that is gone left unfinished", work)
                    shutil.rmtree(work, ignore_errors=True)
                owner.unlink(missing_ok=True)
        except OSError:
            continue  # its process lives, or it is another user's, or somebody has just removed it


@contextlib.contextmanager
def _owned_name(directory: Path) -> Iterator[Path]:
    """A name for a directory beside `directory` that is this process's alone, until the block ends or it dies."""
    while True:
        work = directory.with_name(f".{directory.name}-{secrets.token_hex(4)}")
        owner = work.with_name(work.name + _OWNER)
        with _full_disk_named(directory.parent), owner.open("x") as file:
            try:
                _lock(file)
            except BlockingIOError:
                continue  # somebody found it before it was locked, and takes its process for dead
            except OSError as error:
                _log.info("%s cannot be locked (%s): it stays if this process is killed", owner, error)
            if not owner.exists():
                continue
            try:
                yield work
            finally:
                owner.unlink(missing_ok=True)
            return


def _lock(file: IO[str]) -> None:
    """Lock an open file; the operating system lets go of it when the process ends, however it ends.

    Raises:
        OSError: another process holds it (BlockingIOError), or the file system has no locks.
    """
    # A worker forked later would hold the lock for as long as it lives, also after this process is gone.
    os.register_at_fork(after_in_child=file.close)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def _full_disk_named(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DataError(f"no space left in {directory}: free some, or set data.cache_dir to another disk") from error
