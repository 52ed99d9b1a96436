"""The actors of a run: thin, each starts one of the entry points as a child process and says how it is doing.

Imported by Ray's workers, which need neither torch nor anything else of paceline.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paceline.launch.child_words import serve_words, worker_words, write_private
from paceline.launch.children import Child
from paceline.version import VERSION

_LOOK_EVERY_S = 0.1
_SEEN_WITHIN_S = 10.0
"""A network file system may show a new file late."""
_PIECE_BYTES = 65_536
THREADS_VARIABLE = "OMP_NUM_THREADS"
FAILURE = "failure"
"""Name of the file in which a child says why it failed."""


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """What every node of a run must have in common."""

    working_dir: str
    """Absolute: relative paths of the configuration start there."""
    nonce_file: str
    """Absolute; in the run directory."""
    nonce: str
    version: str
    num_threads: str | None
    """OMP_NUM_THREADS of the command, which Ray would replace by the number of CPUs of the actor."""

    def problem(self, node: str) -> str | None:
        """Why a process of the run cannot work on this node, or None."""
        if self.version != VERSION:
            return f"node {node} has paceline {VERSION}, the command has {self.version}: install the same everywhere"
        if not Path(self.working_dir).is_dir():
            return (
                f"node {node} has no directory {self.working_dir}, in which the command was started: start it in one "
                "that every node has"
            )
        deadline = time.monotonic() + _SEEN_WITHIN_S
        while not self._is_seen():
            if time.monotonic() > deadline:
                return (
                    f"node {node} does not see the run directory {Path(self.nonce_file).parent}: set run_dir to a "
                    "directory on a file system that all nodes of the cluster share"
                )
            time.sleep(_LOOK_EVERY_S)
        return None

    def _is_seen(self) -> bool:
        try:
            return Path(self.nonce_file).read_text(encoding="utf-8") == self.nonce
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class ServerOrder:
    """A server to start."""

    name: str
    model: str
    files: Mapping[str, str]
    """Name -> text of what it reads, besides the token: "config.toml"."""
    output: str
    """Absolute path of the file that takes what it writes."""
    loopback: bool
    """Whether all clients are on this host."""

    def words(self, private: Path, node: str) -> list[str]:
        host = "127.0.0.1" if self.loopback else node
        return serve_words(self.model, private / "config.toml", private / "token", private / "ready.json", host)


@dataclass(frozen=True, slots=True)
class WorkerOrder:
    """A process to start that does the run's work."""

    name: str
    verb: tuple[str, ...]
    """With options of its own."""
    rank: tuple[str, ...]
    """Options of one of several ranks."""
    has_token: bool
    writes_failure: bool
    files: Mapping[str, str]
    output: str

    def words(self, private: Path, node: str) -> list[str]:
        del node
        token_file = private / "token" if self.has_token else None
        failure_file = private / FAILURE if self.writes_failure else None
        return [*worker_words(self.verb, private / "config.toml", token_file, failure_file), *self.rank]


Order = ServerOrder | WorkerOrder


@dataclass(frozen=True, slots=True)
class ActorState:
    """What the driver learns of an actor and its child."""

    actor_id: str
    """Of this start of the actor; another one says that Ray has started it anew."""
    node: str
    """The node's IP address."""
    pid: int | None
    """Of the child."""
    problem: str | None
    """Why there is no child."""
    url: str | None
    """Of a server that is ready."""
    code: int | None
    """The child's exit code once it has ended; negative: the signal that ended it."""
    failure: str | None
    """What the child wrote of why it failed, as it is in its file."""
    last_lines: str
    output: str
    """What the child wrote from the asked offset on, in pieces."""
    output_end: int

    @property
    def stage(self) -> tuple[str, str | None, int | None]:
        """What a change of is worth telling at once."""
        return (self.actor_id, self.url, self.code)


class ChildActor:
    """One process of a run on some node; the process ends with the actor, whatever ends it.

    consumes: `watch`, `ask_to_end`      waits for: the child; its ready file; what it writes
    unblocked by: the end of the worker process, which closes the child's pipe
    """

    def __init__(self, order: Order, whereabouts: Whereabouts, token: str | None) -> None:
        """Start the child; what keeps it from starting is told by `watch`.

        Args:
            token: of the servers; written to a file on this node that nobody else may read.
        """
        import ray

        self._node = str(ray.util.get_node_ip_address())
        self._id = secrets.token_hex(8)
        self._order = order
        self._child: Child | None = None
        self._private: Path | None = None
        self._url: str | None = None
        self._failure: str | None = None
        self._lock = threading.Lock()
        self._output_begin = 0
        self._problem = whereabouts.problem(self._node)
        if self._problem is None:
            self._start(whereabouts, token)

    def _start(self, whereabouts: Whereabouts, token: str | None) -> None:
        os.chdir(whereabouts.working_dir)
        if whereabouts.num_threads is None:
            os.environ.pop(THREADS_VARIABLE, None)
        else:
            os.environ[THREADS_VARIABLE] = whereabouts.num_threads
        private = self._private = Path(tempfile.mkdtemp(prefix="paceline-"))
        secret = {} if token is None else {"token": token}
        for name, text in {**self._order.files, **secret}.items():
            write_private(private / name, text)
        output = Path(self._order.output)
        self._output_begin = output.stat().st_size if output.exists() else 0
        self._child = Child(self._order.name, self._order.words(private, self._node), output)

    def watch(
        self, seen: tuple[str, str | None, int | None] | None, offset: int | None, timeout_s: float
    ) -> ActorState:
        """The state once it is another than `seen` or there is output after `offset`, or after `timeout_s`.

        Args:
            seen: the `stage` that the caller knows.
            offset: bytes of output that the caller has; None asks for none.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            state = self._state(offset)
            if state.stage != seen or state.output or time.monotonic() >= deadline:
                return state
            time.sleep(_LOOK_EVERY_S)

    def ask_to_end(self) -> None:
        """SIGTERM to the child, if it still runs."""
        with self._lock:
            if self._child is not None:
                self._child.ask_to_end()

    def _state(self, offset: int | None) -> ActorState:
        with self._lock:
            child = self._child
            code = None if child is None else child.poll()
            if self._private is not None:
                ready = self._private / "ready.json"
                if self._url is None and ready.exists():
                    self._url = str(json.loads(ready.read_text(encoding="utf-8"))["url"])
                if code is not None and (private := self._private / FAILURE).exists():
                    self._failure = private.read_text(encoding="utf-8")
                if self._url is not None or code is not None:
                    # a server has read its files once it is ready: none is left behind by whatever ends this process
                    shutil.rmtree(self._private, ignore_errors=True)
                    self._private = None
            output = b"" if offset is None or child is None else self._read(offset, to_the_end=code is not None)
            return ActorState(
                self._id,
                self._node,
                None if child is None else child.pid,
                self._problem,
                self._url,
                code,
                self._failure,
                "" if child is None or (code is None and self._url is not None) else child.last_lines(),
                output.decode(errors="replace"),
                (offset or 0) + len(output),
            )

    def _read(self, offset: int, to_the_end: bool) -> bytes:
        """Whole lines, as long as more may come."""
        with Path(self._order.output).open("rb") as file:
            file.seek(self._output_begin + offset)
            piece = file.read(_PIECE_BYTES)
        whole = piece if to_the_end else piece[: piece.rfind(b"\n") + 1]
        return piece if not whole and len(piece) == _PIECE_BYTES else whole


def find_address(loopback: bool) -> str:
    """ "tcp://HOST:PORT" where nobody listens now, on the node on which this runs."""
    import socket

    import ray

    host = "127.0.0.1" if loopback else str(ray.util.get_node_ip_address())
    with socket.create_server((host, 0)) as listening:
        return f"tcp://{host}:{listening.getsockname()[1]}"
