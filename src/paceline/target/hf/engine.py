"""The `hf` engine: a transformers model owned by one thread, rows one after the other."""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paceline.config.target import TargetConfig
from paceline.errors import (
    CaptureMismatchError,
    ConfigError,
    OutOfMemoryError,
    PacelineError,
    StoppedError,
    TargetError,
)
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo
from paceline.target.hf.capture import RowCapture
from paceline.target.hf.info import build_target_info
from paceline.target.hf.loading import (
    ModelParts,
    find_parts,
    load_model,
    load_tokenizer,
    resolve_checkpoint,
    resolve_device,
)
from paceline.target.hf.selftest import choose_layout

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


@dataclass(slots=True)
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


@dataclass(frozen=True, slots=True)
class _Loaded:
    parts: ModelParts
    tokenizer: PreTrainedTokenizerBase
    info: TargetInfo
    capture: RowCapture


class HFEngine:
    """A transformers model as an engine (`target.interface.Engine`).

    The owner thread loads the model and is the only one that runs it.

    consumes: requests, in order      waits for: the next request, or the device to finish the row before
    unblocked by: a request, the device, close()
    """

    def __init__(self, config: TargetConfig) -> None:
        """Load the target and prove that it can be captured.

        Raises:
            TargetError: it cannot be loaded or described.
            OutOfMemoryError: it does not fit on the device.
        """
        self._config = config
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._num_outstanding = 0
        loaded: Future[_Loaded] = Future()
        self._owner = threading.Thread(target=self._own, args=(loaded,), name="target-engine", daemon=True)
        self._owner.start()
        self._loaded = loaded.result()

    @property
    def model(self) -> PreTrainedModel:
        """The loaded model, for decoding; to be used only while no capture is in flight."""
        return self._loaded.parts.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's tokenizer."""
        return self._loaded.tokenizer

    def info(self) -> TargetInfo:
        """The facts about the loaded target; the same object every time."""
        return self._loaded.info

    def capture(self, request: RowRequest, spec: FeatureSpec) -> Future[Features]:
        """Compute features of one row; rows are answered in the order they were submitted."""
        future: Future[Features] = Future()
        with self._lock:
            if self._closed:
                future.set_exception(StoppedError("the target engine is closed"))
                return future
            self._num_outstanding += 1
            self._jobs.put(_Job(request, spec, future, time.monotonic()))
        return future

    def room(self) -> int:
        """How many more rows may be submitted now without only queueing up behind others."""
        with self._lock:
            return max(0, _ROWS_AT_ONCE - self._num_outstanding)

    def close(self) -> None:
        """End the engine after the row it is computing; other futures fail with StoppedError."""
        with self._lock:
            first = not self._closed
            self._closed = True
        if first:
            self._jobs.put(None)
        if threading.current_thread() is not self._owner:
            self._owner.join()

    def _own(self, loaded: Future[_Loaded]) -> None:
        try:
            target = _load(self._config)
        except BaseException as error:  # handed to the thread that waits in __init__
            loaded.set_exception(error)
            return
        loaded.set_result(target)
        try:
            self._serve(target)
        finally:  # reached by close() or by a bug: either way nobody may be left waiting
            with self._lock:
                self._closed = True
            self._fail_the_rest()

    def _serve(self, target: _Loaded) -> None:
        before: _Launched | None = None
        while not self._closed:
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
        if before is not None:
            self._finish(before)

    def _fail_the_rest(self) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                self._fail(job, StoppedError("the target engine was closed before this row was computed"))

    def _launch(self, target: _Loaded, job: _Job) -> _Launched | None:
        """Queue a row's kernels; None where the row failed."""
        if not job.future.set_running_or_notify_cancel():
            self._leave()
            return None
        started_s = time.monotonic()
        try:
            check_request(job.request, job.spec, target.info)
            tensors = target.capture(job.request, job.spec)
            finite = tensors.pop("finite")
            event = None
            if finite.is_cuda:
                finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
        except PacelineError as error:
            self._fail(job, error)
        except _MODEL_ERRORS as error:
            self._fail(job, _explain(error, job.request))
        except BaseException as error:  # a bug: whoever waits for the row must hear of it, with its traceback
            self._fail(job, error)
        else:
            return _Launched(job, tensors, finite, started_s, event)
        return None

    def _finish(self, launched: _Launched) -> None:
        """Answer a row once the device has computed it."""
        job = launched.job
        try:
            if launched.event is not None:
                launched.event.synchronize()  # this row alone; the next one's kernels are already queued
            features = Features(
                layers=job.spec.layers,
                hidden=launched.tensors["hidden"],
                greedy=launched.tensors.get("greedy"),
                final_hidden=launched.tensors.get("final_hidden"),
                final_index=launched.tensors.get("final_index"),
                logsumexp=launched.tensors.get("logsumexp"),
                row_hash=job.request.row_hash(),
                finite=bool(launched.finite),
                queued_s=launched.started_s - job.submitted_s,
                computed_s=time.monotonic() - launched.started_s,
            )
        except RuntimeError as error:  # a kernel failed after it was queued
            self._fail(job, _explain(error, job.request))
            return
        self._leave()
        job.future.set_result(features)

    def _fail(self, job: _Job, error: BaseException) -> None:
        self._leave()
        if job.future.running() or job.future.set_running_or_notify_cancel():
            job.future.set_exception(error)

    def _leave(self) -> None:
        with self._lock:
            self._num_outstanding -= 1


def _load(config: TargetConfig) -> _Loaded:
    device = resolve_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    checkpoint = resolve_checkpoint(config.model, config.revision, config.trust_remote_code)
    tokenizer = load_tokenizer(str(checkpoint), None, config.trust_remote_code)
    parts = find_parts(load_model(config, checkpoint, device))
    info = build_target_info(config, checkpoint, parts, tokenizer)
    layout = choose_layout(parts, config)
    if config.compile:
        for layer in parts.layers:
            # The forward alone: hooks stay outside of the compiled code, where adding one recompiles nothing.
            layer.forward = torch.compile(layer.forward)
    logger.info("target %s on %s in %s, documents %s", config.model, parts.device, info.dtype, layout)
    capture = RowCapture(parts, info.logit_transform, layout, config.vocab_chunk_tokens)
    if config.compile:
        _compile(capture, info)
    return _Loaded(parts, tokenizer, info, capture)


def _compile(capture: RowCapture, info: TargetInfo) -> None:
    """Compile before the first row is asked for: no other thread may run compiled code while this one traces.

    Two rows of different lengths: after the second torch.compile takes rows of any length.
    """
    begin = time.monotonic()
    for lengths in ((160, 352), (90, 230, 400)):
        documents = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        request = RowRequest(
            position=0,
            spec="",
            tokens=np.arange(documents[-1], dtype=np.int32) % info.vocab_size,
            documents=documents,
            spans=np.array([[0, lengths[0]]], np.int32),
            positions=np.broadcast_to(positions, (info.num_position_axes, len(positions))).copy(),
        )
        capture(request, FeatureSpec(layers=(0,), final_hidden="supervised", greedy=True))
    logger.info("target compiled in %.0f s", time.monotonic() - begin)


def check_request(request: RowRequest, spec: FeatureSpec, info: TargetInfo) -> None:
    """Raise unless a request can be right for this target; both values are named.

    Raises:
        CaptureMismatchError: token ids, documents, spans or positions that cannot be.
        ConfigError: capture layers out of range, documents longer than the target's positions.
    """
    if spec.layers and not 0 <= spec.layers[0] <= spec.layers[-1] < info.num_layers:
        raise ConfigError(
            f"capture layers {list(spec.layers)} of a target with {info.num_layers} layers: "
            f"choose from 0..{info.num_layers - 1}"
        )
    if request.extras:
        raise ConfigError(f"the hf engine takes tokens only, row {request.position} has {sorted(request.extras)}")
    num_tokens = len(request.tokens)
    if request.tokens.ndim != 1 or num_tokens == 0:
        raise _mismatch(request, f"tokens of shape {request.tokens.shape}, expected [T] with T > 0")
    low, high = int(request.tokens.min()), int(request.tokens.max())
    if low < 0 or high >= info.vocab_size:
        wrong = low if low < 0 else high
        raise _mismatch(
            request,
            f"token id {wrong} outside 0..{info.vocab_size - 1}: "
            "target and trainer tokenize differently; compare target.model with data.tokenizer",
        )
    bounds = request.documents
    if bounds.ndim != 1 or len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != num_tokens or (np.diff(bounds) < 1).any():
        raise _mismatch(request, f"documents {bounds.tolist()[:8]} do not divide its {num_tokens} tokens")
    if int(np.diff(bounds).max()) > info.max_position_embeddings:
        raise ConfigError(
            f"a document of {int(np.diff(bounds).max())} tokens for a target of {info.max_position_embeddings} "
            "positions: lower data.row_tokens"
        )
    _check_positions(request, info)
    _check_spans(request)


def _check_positions(request: RowRequest, info: TargetInfo) -> None:
    expected = (info.num_position_axes, len(request.tokens))
    if request.positions.shape != expected:
        raise _mismatch(request, f"positions of shape {request.positions.shape}, expected {expected}")
    starts = np.repeat(request.documents[:-1], np.diff(request.documents))
    if (request.positions != np.arange(expected[1]) - starts).any():
        raise _mismatch(request, "positions that do not count from 0 in every document")


def _check_spans(request: RowRequest) -> None:
    spans = request.spans
    if spans.ndim != 2 or spans.shape[1] != 2:
        raise _mismatch(request, f"spans of shape {spans.shape}, expected [S, 2]")
    flat = spans.reshape(-1)
    if len(flat) and (
        flat[0] < 0 or flat[-1] > len(request.tokens) or (np.diff(flat) < 0).any() or (np.diff(spans) < 1).any()
    ):
        raise _mismatch(
            request, f"spans {spans.tolist()[:4]} that are empty, overlap or leave {len(request.tokens)} tokens"
        )


def _mismatch(request: RowRequest, what: str) -> CaptureMismatchError:
    return CaptureMismatchError(f"row {request.position} has {what}")


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
