"""Where the pool learns which servers there are: a fixed set, or a file that is replaced while the run goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field

from paceline.client.connection import Connection
from paceline.config.files import write_whole

MakeConnection = Callable[[], Connection]
"""Makes an unopened connection to one server; called anew each time the server is connected.

Called on threads of the pool, whose current CUDA device is the first: devices have to be named with their index.
"""

_logger = logging.getLogger(__name__)


class ServerList(Protocol):
    """The servers that a pool should use now."""

    def read(self) -> Mapping[str, MakeConnection]:
        """Name of each server -> what connects it; called about twice a second, on one thread.

        While an entry is the same, so is its callable: another callable under the same name tells the pool to try a
        server again that it had refused.
        """


class FixedServers:
    """Servers known when the pool is built; none joins, none leaves."""

    def __init__(self, servers: Mapping[str, MakeConnection]) -> None:
        self._servers = dict(servers)

    def read(self) -> Mapping[str, MakeConnection]:
        return self._servers


class _Entry(BaseModel):
    """One server; keys besides the url are its manager's own."""

    model_config = ConfigDict(frozen=True, extra="allow")

    url: str = Field(pattern="^https?://[^/]")


class _ServersDocument(BaseModel):
    servers: tuple[_Entry, ...]


class ServersFile:
    """The servers named in a `servers.json`, which whoever manages them replaces atomically.

        {"servers": [{"url": "http://10.0.0.7:8400"}, ...]}

    An entry may have keys of its manager's own (when it was started, its process id): a change of them says that the
    server behind the address is another one. A file that is missing or damaged keeps the last good list, with a
    WARNING for each change that cannot be read.
    """

    def __init__(self, path: Path, connect: Callable[[str], Connection]) -> None:
        """`connect` makes an unopened connection to the server at a url."""
        self._path = path
        self._connect = connect
        self._version: tuple[int, ...] | None = ()
        """Of the file read last; None while it is missing, () before the first look."""
        self._entries: dict[str, tuple[_Entry, MakeConnection]] = {}
        """By url: the entry as it was written, and what connects it."""

    def read(self) -> Mapping[str, MakeConnection]:
        version = self._look()
        if version != self._version:
            self._version = version
            self._read_anew()
        return {url: make for url, (_, make) in self._entries.items()}

    def _look(self) -> tuple[int, ...] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return (status.st_ino, status.st_mtime_ns, status.st_size)

    def _read_anew(self) -> None:
        try:
            listed = _ServersDocument.model_validate_json(self._path.read_bytes()).servers
        except (OSError, ValueError) as error:
            _logger.warning(
                "%s cannot be read, the %d servers of its last good version stay: %s",
                self._path,
                len(self._entries),
                error,
            )
            return
        before, self._entries = self._entries, {}
        for entry in listed:
            known = before.get(entry.url)
            if known is None or known[0] != entry:
                known = (entry, partial(self._connect, entry.url))
            self._entries[entry.url] = known


def write_servers(path: Path, urls: Sequence[str]) -> None:
    """Replace a `servers.json` as a whole: readers see the old list or the new one."""
    write_whole(path, json.dumps({"servers": [{"url": url} for url in urls]}, indent=1) + "\n")
