"""Directories of the file transport: private to one session, seen by two processes, cleared away when their owner dies.

    BASE/paceline-[0-9a-f]{32}/        mode 0700, made by the client, gone when its channel is closed
        owner                          locked (flock) by the client as long as it lives; its text is the client's host
        nonce                          what the client told the server over HTTP: both see the same directory
        [0-9a-f]{32}.safetensors       a row, complete
        [0-9a-f]{32}.part              a row being written
        [0-9a-f]{32}.free              a file that was read: its pages are used for the next row

Everything is opened relative to the directory, without following links, and only names of these forms are touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from paceline.transport.negotiation import TransportRefused

_PREFIX = "paceline-"
_DIRECTORY = re.compile(r"paceline-[0-9a-f]{32}")
_FILE = re.compile(r"[0-9a-f]{32}\.(safetensors|part|free|owner)")
OWNER, NONCE = "owner", "nonce"
_NONCE_BYTES = 32
_SURELY_MADE_S = 60.0
"""A directory without an owner may be one that is just being made; after so long it is not."""
_PRIVATE = 0o700
_logger = logging.getLogger(__name__)


class PrivateDirectory:
    """An open directory of the file transport; its files are reached through here and nowhere else."""

    def __init__(self, path: Path) -> None:
        """Open a directory that is there.

        Raises:
            OSError: it is not, or it is no directory, or a link.
            TransportRefused: it is not this user's own, or others may enter it.
        """
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(self._fd)
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != _PRIVATE:
                raise TransportRefused(
                    f"{path} belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}, expected user "
                    f"{os.geteuid()} and mode 700: run server and trainer as one user, or use transport.kind = http"
                )
        except BaseException:
            os.close(self._fd)
            raise

    def open(self, name: str, flags: int) -> int:
        """A file descriptor of a regular file of this user.

        Raises:
            OSError: there is no such file, or it is a link.
            TransportRefused: it is something else than a file of this user.
        """
        fd = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600, dir_fd=self._fd)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_nlink > 1:
            os.close(fd)
            raise TransportRefused(f"{self.path / name} is no file of this user alone")
        return fd

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def names(self) -> list[str]:
        """Of all that is in it."""
        return os.listdir(self._fd)  # noqa: PTH208 - of the open directory, whatever its path is by now

    def age_s(self, name: str) -> float:
        """Seconds since a file was last written; 0 if it is not there."""
        try:
            return time.time() - os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_mtime
        except FileNotFoundError:
            return 0.0

    def destroy(self) -> None:
        """Remove our files and the directory itself; what is not ours stays, and the directory with it."""
        for _ in range(3):  # a server may still be publishing its last row
            for name in self.names():
                if _FILE.fullmatch(name) or name in (OWNER, NONCE):
                    self.remove(name)
            try:
                self.path.rmdir()
            except FileNotFoundError:
                return  # the other side was first
            except OSError:
                continue
            return
        _logger.warning("%s could not be removed: %s is in it", self.path, ", ".join(sorted(self.names())[:8]))

    def remove_if_left(self) -> None:
        """Remove it if its owner has gone."""
        if OWNER not in self.names():
            self.destroy()

    def close(self) -> None:
        """Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class OwnDirectory:
    """A new directory, and the lock that says that its owner lives."""

    def __init__(self, base: Path, host_id: str) -> None:
        """Make it.

        Raises:
            OSError: nothing can be made in `base`.
        """
        path = base / f"{_PREFIX}{secrets.token_hex(16)}"
        path.mkdir(_PRIVATE)
        path.chmod(_PRIVATE)  # whatever the umask
        self.nonce = secrets.token_hex(_NONCE_BYTES // 2)
        self.directory = PrivateDirectory(path)
        try:
            not_yet = f"{secrets.token_hex(16)}.owner"
            self._lock_fd = self._write(not_yet, host_id)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.directory.rename(not_yet, OWNER)  # whoever looks for dead owners never sees it without its lock
            os.close(self._write(NONCE, self.nonce))
        except BaseException:
            self.directory.destroy()
            raise

    def _write(self, name: str, text: str) -> int:
        fd = self.directory.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.write(fd, text.encode())
        return fd

    def destroy(self) -> None:
        """Remove it. Safe to call twice."""
        if self._lock_fd >= 0:
            self.directory.destroy()
            self.directory.close()
            os.close(self._lock_fd)
            self._lock_fd = -1


def open_offered(path: str, nonce: str) -> PrivateDirectory:
    """The directory that a client offers.

    Raises:
        TransportRefused: it is none, or not the one that the client sees; says why.
    """
    place = Path(path)
    if not place.is_absolute() or ".." in place.parts or not _DIRECTORY.fullmatch(place.name):
        raise TransportRefused("the offer names no directory of the file transport")
    try:
        directory = PrivateDirectory(place)
    except OSError as error:
        raise TransportRefused(f"the server does not see {place}: {error.strerror}") from error
    try:
        fd = directory.open(NONCE, os.O_RDONLY)
        try:
            seen = os.read(fd, _NONCE_BYTES + 1)
        finally:
            os.close(fd)
        if not secrets.compare_digest(seen, nonce.encode(errors="replace")):
            raise TransportRefused(f"{place} is another directory on the server's side")
    except OSError as error:
        directory.close()
        raise TransportRefused(f"the server cannot read {place}: {error.strerror}") from error
    except BaseException:
        directory.close()
        raise
    return directory


def remove_leftovers(base: Path, host_id: str) -> int:
    """How many directories in `base` were removed: those of this user whose owners, on this host, have died.

    Locks of other hosts are not always seen (a network file system may keep them local), so their directories are
    left to processes on those hosts.
    """
    return sum(_remove_if_dead(path, host_id) for path in _candidates(base))


def _candidates(base: Path) -> Iterator[Path]:
    try:
        entries = list(base.iterdir())
    except OSError:
        return
    yield from (entry for entry in entries if _DIRECTORY.fullmatch(entry.name))


def _remove_if_dead(path: Path, host_id: str) -> bool:
    try:
        directory = PrivateDirectory(path)
    except (OSError, TransportRefused):
        return False  # gone meanwhile, or somebody else's
    try:
        if not _is_dead(directory, host_id):
            return False
        directory.destroy()
    except OSError as error:
        _logger.warning("%s was left by a process that died, and cannot be removed: %s", path, error)
        return False
    finally:
        directory.close()
    _logger.info("removed %s, left by a process that died", path)
    return True


def _is_dead(directory: PrivateDirectory, host_id: str) -> bool:
    try:
        fd = directory.open(OWNER, os.O_RDWR)
    except FileNotFoundError:
        return time.time() - directory.path.stat().st_mtime > _SURELY_MADE_S
    except TransportRefused:
        return False
    try:
        if os.read(fd, 256).decode(errors="replace") != host_id:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
