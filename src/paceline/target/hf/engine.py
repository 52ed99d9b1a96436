"""The `hf` engine: a transformers model owned by one thread, rows one after the other."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paceline.config.target import TargetConfig
from paceline.errors import (
    ConfigError,
    EngineLostError,
    OutOfMemoryError,
    PacelineError,
    StoppedError,
    TargetError,
)
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.limits import Limits
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo
from paceline.target.checks import check_request
from paceline.target.hf.followers import Followers
from paceline.target.hf.loaded import LoadedTarget, load_target
from paceline.target.hf.loading import ModelParts, resolve_checkpoint, resolve_device
from paceline.target.hf.parallel import abort_group, check_parallel, join_group, leave_group, rank_environment

logger = logging.getLogger(__name__)

_MODEL_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    OSError,
)
"""What a model's code, which may come with its checkpoint, raises: that row fails, the engine goes on."""
_ROWS_AT_ONCE = 2
"""One row computing and one queued behind it keep the device at work."""
_LOST_S = 2.0
"""What failed on rank 0 because a follower died is explained better by that follower, if it is heard of in time."""
_CLOSE_S = 5.0
"""Ranks that do not finish their row by then are inside a collective that nobody else is in."""


@dataclass(slots=True, eq=False)
class _Job:
    request: RowRequest
    spec: FeatureSpec
    future: Future[Features]
    submitted_s: float


@dataclass(slots=True)
class _Launched:
    """A row whose kernels are queued on the device."""

    job: _Job
    tensors: dict[str, Tensor]
    finite: Tensor
    """bool[], in host memory once `event` has passed."""
    started_s: float
    event: torch.cuda.Event | None


class HFEngine:
    """A transformers model as an engine (`target.interface.Engine`).

    The owner thread loads the model and is the only one that runs it. With `target.tensor_parallel` > 1 it is rank 0
    of a process group, one such engine in a process; the other ranks are children, which compute the rows it hands
    them. Should one end, or a row fail in the middle, the ranks are out of step: the engine is lost, and rows it has
    or gets fail with EngineLostError.

    consumes: requests, in order      waits for: the next request, or the device to finish the row before
    unblocked by: a request, the device, a follower's end, close()
    """

    def __init__(self, config: TargetConfig) -> None:
        """Load the target and prove that it can be captured.

        Raises:
            ConfigError: tensor parallelism that this target or machine does not allow.
            TargetError: it cannot be loaded or described.
            OutOfMemoryError: it does not fit on the device.
        """
        self._config = config
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._outstanding: set[_Job] = set()
        """Rows that nobody has answered; whoever takes one out answers it."""
        self._last_end_s = 0.0
        """When the row before was done; the owner's alone."""
        self._lost: PacelineError | None = None
        self._on_lost: list[Callable[[PacelineError], None]] = []
        self._loading: Future[LoadedTarget] = Future()
        device = resolve_device(config.device)
        checkpoint = resolve_checkpoint(config.model, config.revision, config.trust_remote_code)
        self._followers: Followers | None = None
        if config.tensor_parallel > 1:
            check_parallel(config, checkpoint, device)
            self._followers = Followers(config, checkpoint, device, self._lose)
        self._owner = threading.Thread(target=self._own, args=(checkpoint, device), name="target-engine", daemon=True)
        self._owner.start()
        self._loaded = self._loading.result()

    @property
    def model(self) -> PreTrainedModel:
        """The loaded model, for decoding; to be used only while no capture is in flight.

        Raises:
            ConfigError: with tensor parallelism, where one rank alone can compute nothing.
        """
        if self._followers is not None:
            raise ConfigError(
                f"decoding with target.tensor_parallel = {self._config.tensor_parallel}, it needs the whole model in "
                "one process: use target.tensor_parallel = 1 (target.device_map spreads a large one over GPUs)"
            )
        return self._loaded.parts.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's tokenizer."""
        return self._loaded.tokenizer

    @property
    def follower_pids(self) -> list[int]:
        """Process ids of ranks 1..N-1; empty without tensor parallelism."""
        return [] if self._followers is None else self._followers.pids

    def info(self) -> TargetInfo:
        """The facts about the loaded target; the same object every time."""
        return self._loaded.info

    def limits(self) -> Limits:
        """Documents of as many tokens as the target has positions."""
        return Limits(max_document_tokens=self.info().max_position_embeddings)

    def capture(self, request: RowRequest, spec: FeatureSpec) -> Future[Features]:
        """Compute features of one row; rows are answered in the order they were submitted."""
        job = _Job(request, spec, Future(), time.monotonic())
        with self._lock:
            reason = StoppedError("the target engine is closed") if self._closed else self._lost
            if reason is not None:
                job.future.set_exception(reason)
                return job.future
            self._outstanding.add(job)
            self._jobs.put(job)
        return job.future

    def room(self) -> int:
        """How many more rows may be submitted now without only queueing up behind others."""
        with self._lock:
            return max(0, _ROWS_AT_ONCE - len(self._outstanding))

    def on_lost(self, call: Callable[[PacelineError], None]) -> None:
        """Have `call` called once, on another thread or at once, when the engine has lost a process it needs.

        Its rows have failed by then. What is left to a server is to end, non-zero and by `os._exit`: a thread of this
        process may be inside a collective for ever.
        """
        with self._lock:
            if self._lost is None:
                self._on_lost.append(call)
                return
        call(self._lost)

    def close(self) -> None:
        """End the engine after the row it is computing; other futures fail with StoppedError.

        With tensor parallelism in bounded time (about 15 s) whatever state the other ranks are in; they are gone then.
        """
        with self._lock:
            first = not self._closed
            self._closed = True
        if first:
            self._jobs.put(None)
        if threading.current_thread() is self._owner:
            return
        if self._followers is None:
            self._owner.join()
            return
        self._owner.join(_CLOSE_S)
        if self._owner.is_alive():
            logger.warning("the row in work does not end: ending the other ranks")
            self._followers.kill()
            self._abort()
            self._owner.join(_CLOSE_S)
        self._answer_the_rest(StoppedError("the target engine was closed before this row was computed"))

    def _own(self, checkpoint: Path, device: torch.device) -> None:
        try:
            target = self._load(checkpoint, device)
        except BaseException as error:  # handed to the thread that waits in __init__
            reason = self._explained_by_followers(error)
            self._end_group(None)
            _fail_loading(self._loading, reason)
            return
        with contextlib.suppress(InvalidStateError):  # lost in this moment
            self._loading.set_result(target)
        try:
            self._serve(target)
        finally:  # reached by close() or by a bug: either way nobody may be left waiting
            with self._lock:
                self._closed = self._closed or self._lost is None
            self._answer_the_rest(StoppedError("the target engine was closed before this row was computed"))
            self._end_group(target.parts)

    def _load(self, checkpoint: Path, device: torch.device) -> LoadedTarget:
        if self._followers is None:
            return load_target(self._config, checkpoint, device)
        self._followers.wait_for("started")
        with rank_environment(device):
            join_group(0, self._config.tensor_parallel, self._followers.directory, device)
            target = load_target(self._config, checkpoint, device)
        for rank, ready in enumerate(self._followers.wait_for("ready"), start=1):
            if ready["layout"] != target.layout:  # they would issue different collectives
                raise TargetError(
                    f'rank 0 takes documents as "{target.layout}", rank {rank} as "{ready["layout"]}": set '
                    'target.documents = "padded"'
                )
        return target

    def _end_group(self, parts: ModelParts | None) -> None:
        """End the other ranks, in order unless they are lost, and leave their group."""
        if self._followers is None:
            return
        self._followers.close()
        leave_group(parts)

    def _explained_by_followers(self, error: BaseException) -> BaseException:
        """Why this rank failed: a collective fails on all ranks, one of them knows the reason."""
        return error if self._followers is None else self._followers.lost(_LOST_S) or error

    def _lose(self, reason: PacelineError) -> None:
        """Give up every row: the ranks cannot go on together. Any thread; the first reason counts."""
        assert self._followers is not None
        with self._lock:
            if self._closed or self._lost is not None:
                return
            self._lost = reason
            calls, self._on_lost = self._on_lost, []
        _fail_loading(self._loading, reason)
        self._answer_the_rest(reason)
        self._jobs.put(None)
        self._followers.kill()
        self._abort()
        for call in calls:
            call(reason)

    def _abort(self) -> None:
        """Free the owner from a collective; on a thread of its own, since it may not come back from that."""
        loaded = self._loading
        parts = loaded.result().parts if loaded.done() and loaded.exception() is None else None
        threading.Thread(target=abort_group, args=(parts,), name="abort ranks", daemon=True).start()

    def _serve(self, target: LoadedTarget) -> None:
        before: _Launched | None = None
        while not self._closed and self._lost is None:
            try:
                job = self._jobs.get(block=before is None)
            except queue.Empty:
                assert before is not None
                self._finish(before)
                before = None
                continue
            if job is None:
                break
            launched = self._launch(target, job)
            if before is not None:
                self._finish(before)
            before = launched
            if launched is not None and launched.event is None:  # computed already: not on CUDA
                self._finish(launched)
                before = None
            del job, launched  # else the last row's features stay until another comes
        if before is not None:
            self._finish(before)

    def _answer_the_rest(self, reason: PacelineError) -> None:
        with self._lock:
            jobs = list(self._outstanding)
        for job in jobs:
            self._fail(job, reason)

    def _launch(self, target: LoadedTarget, job: _Job) -> _Launched | None:
        """Queue a row's kernels; None where the row failed."""
        if not self._begin(job):
            return None
        started_s = time.monotonic()
        handed_over = False
        failure: BaseException
        try:
            check_request(job.request, job.spec, target.info)
            if self._followers is not None:
                handed_over = True
                self._followers.hand_over(job.request, job.spec)
            tensors = target.capture(job.request, job.spec)
            finite = tensors.pop("finite")
            event = None
            if finite.is_cuda:
                finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
        except PacelineError as error:
            failure = error
        except _MODEL_ERRORS as error:
            failure = _explain(error, job.request)
        except BaseException as error:  # a bug: whoever waits for the row must hear of it, with its traceback
            failure = error
        else:
            return _Launched(job, tensors, finite, started_s, event)
        self._fail_computed(job, failure) if handed_over else self._fail(job, failure)
        return None

    def _fail_computed(self, job: _Job, failure: BaseException) -> None:
        """Fail a row that was being computed; with tensor parallelism the other ranks are still at it."""
        if self._followers is None:
            self._fail(job, failure)
            return
        lost = self._followers.lost(_LOST_S)
        self._fail(job, lost or failure)
        self._lose(
            lost
            or EngineLostError(
                f"row {job.request.position} failed on rank 0 while the other ranks computed it, the target has to be "
                f"started anew: {failure}"
            )
        )

    def _finish(self, launched: _Launched) -> None:
        """Answer a row once the device has computed it."""
        job = launched.job
        try:
            if launched.event is not None:
                launched.event.synchronize()  # this row alone; the next one's kernels are already queued
            begin_s, self._last_end_s = max(launched.started_s, self._last_end_s), time.monotonic()
            features = Features(
                layers=job.spec.layers,
                hidden=launched.tensors["hidden"],
                greedy=launched.tensors.get("greedy"),
                final_hidden=launched.tensors.get("final_hidden"),
                final_index=launched.tensors.get("final_index"),
                logsumexp=launched.tensors.get("logsumexp"),
                row_hash=job.request.row_hash(),
                finite=bool(launched.finite),
                queued_s=begin_s - job.submitted_s,
                computed_s=self._last_end_s - begin_s,  # behind the row before it: rows overlap, their times do not
            )
        except RuntimeError as error:  # a kernel failed after it was queued
            self._fail_computed(job, _explain(error, job.request))
            return
        if self._leave(job):
            job.future.set_result(features)

    def _begin(self, job: _Job) -> bool:
        """Whether a row is still to be computed: neither cancelled nor answered."""
        with self._lock:
            if job not in self._outstanding:
                return False
            if job.future.set_running_or_notify_cancel():
                return True
            self._outstanding.discard(job)
            return False

    def _fail(self, job: _Job, error: BaseException) -> None:
        if self._leave(job):
            job.future.set_exception(error)

    def _leave(self, job: _Job) -> bool:
        """Take a row off the list; whether the caller is the one to answer it."""
        with self._lock:
            if job not in self._outstanding:
                return False
            self._outstanding.discard(job)
            return job.future.running() or job.future.set_running_or_notify_cancel()


def _fail_loading(loading: Future[LoadedTarget], reason: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):  # loaded, or failed for another reason
        loading.set_exception(reason)


def _explain(error: Exception, request: RowRequest) -> PacelineError:
    """The error of a failed forward in our words."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        explained: PacelineError = OutOfMemoryError(
            f"the target ran out of memory on row {request.position} of {len(request.tokens)} tokens: "
            "lower data.row_tokens or target.vocab_chunk_tokens"
        )
    else:
        explained = TargetError(f"the target failed on row {request.position}: {type(error).__name__}: {error}")
        # Not a mistake of the user: whoever looks for it needs to know where it happened.
        explained.add_note("".join(traceback.format_exception(error)).rstrip())
    explained.__cause__ = error
    return explained
