"""Rank 0's side of tensor parallelism: the child processes that compute every row with it."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from paceline.config.target import TargetConfig
from paceline.errors import EngineLostError, OutOfMemoryError, PacelineError, StoppedError
from paceline.schema.features import FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.target.hf.handed_rows import encode_end, encode_row
from paceline.target.hf.parallel import device_of

logger = logging.getLogger(__name__)

_KEPT_LINES = 20
_LOG_EVERY_S = 30.0
_ORDERLY_END_S = 5.0
_KILLED_END_S = 2.0
_STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM})


@dataclass(slots=True, eq=False)
class _Follower:
    rank: int
    size: int
    process: subprocess.Popen[bytes]
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What it has reported, by "state"."""
    log: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))
    threads: list[threading.Thread] = field(default_factory=list)


class Followers:
    """Ranks 1..N-1 of a tensor-parallel target, children of this process.

    Two threads a follower: one copies its log into ours, one takes what it reports.

    consumes: reports and logs of the followers      waits for: the next line of each
    unblocked by: a line, a follower's end

    They end with this process, whatever ends it: each holds a pipe from it.
    """

    def __init__(
        self, config: TargetConfig, checkpoint: Path, device: torch.device, on_lost: Callable[[PacelineError], None]
    ) -> None:
        """Start them; they load their shares when all ranks have joined.

        Args:
            device: rank 0's own.
            on_lost: called once, on one of the threads, when a follower ends that was not asked to; by then it is in
                `lost`.
        """
        self.directory = Path(tempfile.mkdtemp(prefix="paceline-ranks-"))
        """Private to the user (mode 0700); the ranks meet in it."""
        self._on_lost = on_lost
        self._changed = threading.Condition()
        self._ending = False
        self._lost: PacelineError | None = None
        self._num_rows = 0
        # A hub model was resolved once; a follower asks nobody.
        self._config = config.model_copy(update={"model": str(checkpoint), "revision": None})
        self._followers: list[_Follower] = []
        try:
            for rank in range(1, config.tensor_parallel):
                self._followers.append(self._start(rank, device_of(device, rank)))
        except OSError:
            self.kill()
            raise
        for follower in self._followers:
            self._watch(follower)

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank from 1."""
        return [follower.process.pid for follower in self._followers]

    def wait_for(self, state: str) -> list[dict[str, Any]]:
        """What each follower reported with `state` ("started", "ready"), by rank, once all have.

        Raises:
            EngineLostError: one ended before; OutOfMemoryError where its share did not fit.
        """
        begin = last = time.monotonic()
        with self._changed:
            while True:
                if self._lost is not None:
                    raise self._lost
                if self._ending:
                    raise StoppedError("the other ranks of the target were ended while it was loaded")
                missing = [f.rank for f in self._followers if state not in f.told]
                if not missing:
                    return [f.told[state] for f in self._followers]
                self._changed.wait(1.0)
                if time.monotonic() - last >= _LOG_EVERY_S:
                    last = time.monotonic()
                    logger.info("ranks %s are not %s after %.0f s", missing, state, last - begin)

    def hand_over(self, request: RowRequest, spec: FeatureSpec) -> None:
        """Have every follower compute a row, after those handed over before. By the engine's thread alone.

        Raises:
            OSError: a follower is gone.
        """
        frame = encode_row(self._num_rows, request, spec)
        self._num_rows += 1
        for follower in self._followers:
            _write(follower, frame)

    def lost(self, timeout_s: float) -> PacelineError | None:
        """Why a follower ended that was not asked to; None if none has after `timeout_s`, or all are being ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None or self._ending, timeout_s)
            return self._lost

    def close(self) -> None:
        """End them after the rows they have; killed where that takes longer than 5 s. Idempotent."""
        with self._changed:
            self._ending = True
        for follower in self._followers:
            with contextlib.suppress(OSError):  # it ended by itself
                _write(follower, encode_end())
        deadline = time.monotonic() + _ORDERLY_END_S
        for follower in self._followers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                follower.process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End those that still run, at once. Idempotent; any thread."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        for follower in self._followers:
            if follower.process.poll() is None:
                follower.process.kill()
        for follower in self._followers:
            with contextlib.suppress(subprocess.TimeoutExpired):  # inside the kernel; the pipe's end ends it later
                follower.process.wait(_KILLED_END_S)
            for thread in follower.threads:
                if thread is not threading.current_thread():
                    thread.join(_KILLED_END_S)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _start(self, rank: int, device: torch.device) -> _Follower:
        # -P: no module out of the current directory. A follower sets its own signals; until then none may reach it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "paceline.target.hf.follower"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        setup = {
            "rank": rank,
            "device": str(device),
            "directory": str(self.directory),
            "log_level": logger.getEffectiveLevel(),
            "target": self._config.model_dump(mode="json"),
        }
        follower = _Follower(rank, self._config.tensor_parallel, process)
        with contextlib.suppress(BrokenPipeError):  # it could not even start: its end says why
            _write(follower, json.dumps(setup).encode() + b"\n")
        return follower

    def _watch(self, follower: _Follower) -> None:
        log = threading.Thread(target=_copy_log, args=(follower,), name=f"rank {follower.rank} log", daemon=True)
        reports = threading.Thread(
            target=self._take_reports, args=(follower, log), name=f"rank {follower.rank}", daemon=True
        )
        follower.threads += [log, reports]
        log.start()
        reports.start()

    def _take_reports(self, follower: _Follower, log: threading.Thread) -> None:
        for line in _stream(follower.process.stdout):
            try:
                told = json.loads(line)
            except ValueError:  # something printed before the follower took its pipes
                logger.info("rank %d: %s", follower.rank, line)
                continue
            with self._changed:
                follower.told[told["state"]] = told
                self._changed.notify_all()
        code = follower.process.wait()
        log.join(1.0)  # its last lines; a child of its own may hold the pipe open for longer
        with self._changed:
            if self._ending or self._lost is not None:
                return
            self._lost = lost = _explain(follower, code)
            self._changed.notify_all()
        logger.error("%s", lost)
        self._on_lost(lost)


def _explain(follower: _Follower, code: int) -> PacelineError:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    told = follower.told.get("failed", {})
    why = f": {told['error']}: {told['message']}" if told else ""
    lines = "".join(f"\n  {line}" for line in follower.log)
    where = f"rank {follower.rank} of {follower.size} of the target"
    ran_out = told.get("error") == OutOfMemoryError.__name__
    if ran_out and "ready" not in follower.told:
        return OutOfMemoryError(f"{where} has too little memory for its share ({told['message']})")
    advice = "lower data.row_tokens or target.vocab_chunk_tokens, and start" if ran_out else "start"
    return EngineLostError(f"{where} {how}{why}: {advice} the target anew. Its last log lines:{lines or ' none'}")


def _write(follower: _Follower, data: bytes) -> None:
    stream = follower.process.stdin
    assert stream is not None
    view = memoryview(data)
    while view:  # a pipe takes what fits
        view = view[stream.write(view) :]


def _copy_log(follower: _Follower) -> None:
    for line in _stream(follower.process.stderr):
        text = line.decode(errors="replace").rstrip()
        follower.log.append(text)
        logger.info("rank %d: %s", follower.rank, text)


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream
