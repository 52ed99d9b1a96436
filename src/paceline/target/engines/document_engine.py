"""An engine of documents: those of a row as requests of their own, answered in any order, packed again here."""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from paceline.config.target import TargetConfig
from paceline.errors import (
    CaptureMismatchError,
    ConfigError,
    EngineLostError,
    OutOfMemoryError,
    PacelineError,
    StoppedError,
    TargetError,
    TransportError,
)
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.limits import Limits
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo
from paceline.target.checks import check_request
from paceline.target.engines.interface import CapturedDocument, DocumentServer, Place, RowMemory
from paceline.target.engines.next_tokens import find_other_token
from paceline.target.engines.outer_parts import OuterParts
from paceline.target.interface import SELFTEST

logger = logging.getLogger(__name__)

_NUM_PROBE_TOKENS = 8
_VERDICT_S = 30.0
"""Whoever watches the server knows sooner whether it is gone: a child's end takes some seconds after that of its core,
an attached one is missed after three looks in vain."""
_LOOK_EVERY_S = 1.0


@dataclass(slots=True, eq=False)
class _Row:
    """A row whose documents are out."""

    request: RowRequest
    spec: FeatureSpec
    future: Future[Features]
    submitted_s: float
    num_missing: int
    """Documents whose states are not in their place yet."""
    next_tokens: list[int]
    """The engine's own, after each document; -1 where it has not answered yet."""
    memory: RowMemory | None = None
    """For its states, pinned if a GPU will read them; from its first document on."""
    started_s: float | None = None
    over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class DocumentEngine:
    """A production engine as a target's engine (`target.interface.Engine`); its server is its starter's to end.

    consumes: requests, their documents in order      waits for: the server's answers; one thread packs rows
    unblocked by: an answer, a time-out, lose(), close()
    """

    def __init__(self, config: TargetConfig, server: DocumentServer, outer: OuterParts) -> None:
        """Prove on one document that the server computes the target whose `outer` parts are at hand.

        Raises:
            TargetError: the server computes something else.
            TransportError: the server does not answer.
        """
        self._server, self._outer = server, outer
        self._max_documents, self._max_tokens = config.engine_documents, config.engine_tokens
        self._chunk_tokens = config.vocab_chunk_tokens
        self._lock = threading.Lock()
        self._rows: set[_Row] = set()
        self._ended: PacelineError | None = None
        self._gone = threading.Event()
        self._on_lost: list[Callable[[PacelineError], None]] = []
        self._last_end_s = 0.0
        """When the row before was packed; the packer's alone."""
        self._senders = ThreadPoolExecutor(self._max_documents, "engine-request", self._own_device)
        self._packer = ThreadPoolExecutor(1, "engine-packer", self._own_device)
        try:
            self._packer.submit(self._prove).result()
        except BaseException:
            self.close()
            raise

    def info(self) -> TargetInfo:
        """The facts about the target; the same object every time."""
        return self._outer.info

    def limits(self) -> Limits:
        """The layers that the server was started for, and the longest document that it takes."""
        longest = min(self._server.max_tokens, self.info().max_position_embeddings)
        return Limits(self._server.layers, longest)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's tokenizer."""
        return self._outer.tokenizer

    def capture(self, request: RowRequest, spec: FeatureSpec) -> Future[Features]:
        """Compute features of one row; rows are answered when the last of their documents is."""
        future: Future[Features] = Future()
        num_documents = len(request.documents) - 1
        row = _Row(request, spec, future, time.monotonic(), num_documents, [-1] * num_documents)
        try:
            self._check(request, spec)
            with self._lock:
                if self._ended is not None:
                    raise self._ended
                self._rows.add(row)
                for document in range(num_documents):
                    self._senders.submit(self._send, row, document)
        except PacelineError as error:
            future.set_exception(error)
        return future

    def room(self) -> int:
        """How many more rows may be submitted now without only queueing up behind others.

        The engine puts documents together as they come, so it should have more of them than it computes at once: as
        many rows like those that are out as make up `target.engine_tokens`, each document counted as waiting or there.
        """
        with self._lock:
            tokens = [len(row.request.tokens) for row in self._rows]
            num_documents = sum(row.num_missing for row in self._rows)
        if not tokens:
            return 2 * self._max_documents
        left = (self._max_tokens - sum(tokens)) * len(tokens) / sum(tokens)
        return max(0, min(math.ceil(left), 2 * self._max_documents - num_documents))

    def on_lost(self, call: Callable[[PacelineError], None]) -> None:
        """Call `call` with the reason once the engine can compute no more; at once if it cannot already."""
        with self._lock:
            lost = self._ended if isinstance(self._ended, EngineLostError) else None
            if lost is None:
                self._on_lost.append(call)
        if lost is not None:
            call(lost)

    def lose(self, reason: Exception) -> None:
        """The server is gone: every row fails, retryably. Any thread; the first reason counts."""
        lost = EngineLostError(str(reason))
        with self._lock:
            if self._ended is not None:
                return
            self._ended = lost
            calls, self._on_lost = self._on_lost, []
            rows = list(self._rows)
        self._gone.set()
        for row in rows:
            self._end(row, lost)
        for call in calls:
            call(lost)

    def close(self) -> None:
        """End the engine; futures not yet done fail with StoppedError. Safe to call twice."""
        with self._lock:
            self._ended = self._ended or StoppedError("the target engine is closed")
            rows = list(self._rows)
        self._gone.set()
        for row in rows:
            self._end(row, StoppedError("the target engine was closed before this row was computed"))
        self._server.close()
        self._senders.shutdown(cancel_futures=True)
        self._packer.shutdown()

    def _check(self, request: RowRequest, spec: FeatureSpec) -> None:
        check_request(request, spec, self.info())
        missing = sorted(set(spec.layers) - set(self._server.layers))
        if missing:
            raise ConfigError(
                f"capture layers {missing} of {self._server.name}, which was started for {list(self._server.layers)}: "
                "start it with all layers that will be asked for (target.capture_layers)"
            )
        longest = int(np.diff(request.documents).max())
        if longest > self._server.max_tokens:
            raise ConfigError(
                f"a document of {longest} tokens for {self._server.name}, which takes {self._server.max_tokens}: "
                "raise its context length in target.engine_args, or lower data.row_tokens"
            )

    def _own_device(self) -> None:
        """Of a thread: pinned memory and copies are this device's."""
        if self._outer.device.type == "cuda":
            torch.cuda.set_device(self._outer.device)

    def _send(self, row: _Row, document: int) -> None:
        """On a thread of its own: one document there and back."""
        with row.lock:
            if not row.over and row.started_s is None:
                row.started_s = time.monotonic()
                row.over = not row.future.set_running_or_notify_cancel()
            if row.over:
                self._forget(row)
                return
        try:
            self._fetch(row, document, *row.request.documents[document : document + 2].tolist())
        except TransportError as error:
            self._look_after(error)
            self._end(row, error)
            return
        except BaseException as error:  # whoever waits for the row must hear of it
            self._end(row, error)
            return
        with row.lock:
            row.num_missing -= 1
            complete = row.num_missing == 0 and not row.over
        if complete:
            try:
                self._packer.submit(self._pack, row)
            except RuntimeError:
                self._end(row, StoppedError("the target engine was closed before this row was packed"))

    def _fetch(self, row: _Row, document: int, start: int, end: int) -> None:
        place = self._memory_of(row).place(start, end)
        captured = self._server.capture(row.request.tokens[start:end], place)
        row.next_tokens[document] = captured.next_token
        _put(self._checked(captured, end - start), place)

    def _memory_of(self, row: _Row) -> RowMemory:
        with row.lock:
            if row.over:
                raise StoppedError("the row is over")
            if row.memory is None:
                info, is_cuda = self.info(), self._outer.device.type == "cuda"
                dtype = getattr(torch, info.dtype)
                row.memory = self._server.reserve(len(row.request.tokens), info.hidden_size, dtype, is_cuda)
            return row.memory

    def _look_after(self, error: TransportError) -> None:
        """A dead server fails each row at once: it must be known for dead before rows are asked for again in vain.

        Returns when the server is well again, or gone; after 30 s without either it is given up here.
        """
        deadline = time.monotonic() + _VERDICT_S
        while not self._gone.is_set() and not self._server.is_alive():
            if time.monotonic() > deadline:
                self.lose(error)
            self._gone.wait(_LOOK_EVERY_S)

    def _checked(self, document: CapturedDocument, num_tokens: int) -> Tensor:
        """[n, L, H] of all captured layers."""
        info, layers = self.info(), list(self._server.layers)
        shape, dtype = tuple(document.hidden.shape), str(document.hidden.dtype).removeprefix("torch.")
        expected = (num_tokens, len(layers), info.hidden_size)
        if document.layers != layers or shape != expected or dtype != info.dtype:
            raise CaptureMismatchError(
                f"{self._server.name} captured layers {document.layers} as {dtype}{list(shape)}, expected {layers} as "
                f"{info.dtype}{list(expected)}: start it for the same layers, with the data type of target.dtype"
            )
        return document.hidden

    def _pack(self, row: _Row) -> None:
        """On the packer's thread: what the engine does not return, once all documents are there."""
        try:
            features = self._features(row)
        except torch.OutOfMemoryError as error:
            failure = OutOfMemoryError(
                f"no memory to pack row {row.request.position} of {len(row.request.tokens)} tokens: "
                "lower data.row_tokens or target.vocab_chunk_tokens"
            )
            failure.__cause__ = error
            self._end(row, failure)
        except BaseException as error:  # a bug: whoever waits for the row must hear of it
            self._end(row, error)
        else:
            self._end(row, features)

    @torch.no_grad()
    def _features(self, row: _Row) -> Features:
        assert row.started_s is not None
        spec, memory = row.spec, self._memory_of(row)  # here until the copy to the GPU is over
        packed = memory.states.to(self._outer.device, non_blocking=True)
        slots = [self._server.layers.index(layer) for layer in spec.layers]
        wanted = spec.final_hidden != "none" or spec.greedy or spec.logsumexp
        final = self._outer.norm(packed[:, -1]) if wanted else None
        tensors = self._outer.capture.complete(packed[:, slots], final, row.request, spec)
        finite = bool(tensors["finite"])
        if row.request.spec != SELFTEST:
            self._check_next_tokens(row, packed)
        begin_s, self._last_end_s = max(row.started_s, self._last_end_s), time.monotonic()
        return Features(
            layers=spec.layers,
            hidden=tensors["hidden"],
            greedy=tensors.get("greedy"),
            final_hidden=tensors.get("final_hidden"),
            final_index=tensors.get("final_index"),
            logsumexp=tensors.get("logsumexp"),
            row_hash=row.request.row_hash(),
            finite=finite,
            queued_s=begin_s - row.submitted_s,
            computed_s=self._last_end_s - begin_s,  # rows are out together: their times do not overlap
        )

    def _check_next_tokens(self, row: _Row, packed: Tensor) -> None:
        """Raise unless every document's states lead to the token that came with them; `packed` is [T, L, H].

        The row can be asked for again: an engine computes other last bits then, and a fault that stays ends the run.
        """
        last = torch.from_numpy(row.request.documents[1:].astype(np.int64) - 1).to(packed.device)
        other = find_other_token(self._outer, packed[last, -1], row.next_tokens, self._chunk_tokens)
        if other is not None:
            raise TransportError(
                f"{self._server.name} answered document {other.document} of row {row.request.position} with {other}: "
                "were weights of its lm_head or its last norm replaced, or are these the states of another request?"
            )

    def _end(self, row: _Row, outcome: Features | BaseException) -> None:
        """Answer a row, once: the first outcome counts."""
        with row.lock:
            if row.over:
                return
            row.over, row.memory = True, None
            alive = row.started_s is not None or row.future.set_running_or_notify_cancel()
        self._forget(row)
        if not alive:
            return
        if isinstance(outcome, Features):
            row.future.set_result(outcome)
        else:
            _clear_frames(outcome)
            row.future.set_exception(outcome)

    def _forget(self, row: _Row) -> None:
        with self._lock:
            self._rows.discard(row)

    @torch.no_grad()
    def _prove(self) -> None:
        """Raise unless the engine's own next token is the one that our norm and lm_head find in its hidden states."""
        info, outer = self.info(), self._outer
        tokens = np.linspace(0, info.num_tokenizer_tokens - 1, _NUM_PROBE_TOKENS).astype(np.int32)
        document = self._server.capture(tokens)
        last = self._checked(document, len(tokens))[-1:, -1]
        other = find_other_token(outer, last, [document.next_token], self._chunk_tokens)
        if other is not None:
            raise TargetError(f"{self._server.name} answers with {other}: does it run another checkpoint?")


def _clear_frames(error: BaseException | None) -> None:
    """An error that somebody keeps would keep what its frames have seen: memory of rows, here and on a GPU."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _put(hidden: Tensor, place: Place) -> None:
    """Copy states to their place, unless the engine has: here, where as many threads do so as read files."""
    if hidden.data_ptr() != place.states.data_ptr():
        # torch's copy would bring a team of OpenMP threads for each of ours.
        np.copyto(_bytes(place.states), _bytes(hidden))


def _bytes(tensor: Tensor) -> np.ndarray:
    """The same memory; of a tensor of the host."""
    if not tensor.is_contiguous():
        raise CaptureMismatchError(f"hidden states of shape {list(tensor.shape)} and strides {tensor.stride()}")
    return tensor.view(torch.uint8).numpy()
