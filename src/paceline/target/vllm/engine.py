"""The `vllm` engine: documents of a row as requests of their own, answered in any order, packed again here."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

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
from paceline.target.hf.capture import apply_logit_transform
from paceline.target.hf.engine import check_request
from paceline.target.vllm.outer_parts import load_outer_parts
from paceline.target.vllm.requests import CapturedDocument, VLLMRequests
from paceline.target.vllm.server import VLLMAddress, vllm_layer_ids

logger = logging.getLogger(__name__)

_NUM_PROBE_TOKENS = 8
_LOGIT_TOLERANCE = 5e-2
"""Of the largest logit; vLLM and torch round differently, and a tie may go either way."""


@dataclass(slots=True, eq=False)
class _Row:
    """A row whose documents are out."""

    request: RowRequest
    spec: FeatureSpec
    future: Future[Features]
    submitted_s: float
    hidden: list[Tensor | None]
    """One a document."""
    num_missing: int
    started_s: float | None = None
    over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class VLLMEngine:
    """A vLLM server as an engine (`target.interface.Engine`). The server is its starter's to end, after this.

    consumes: requests, their documents in order      waits for: vLLM's answers and files; one thread packs rows
    unblocked by: an answer, a time-out, close()
    """

    def __init__(self, config: TargetConfig, address: VLLMAddress, num_requests: int = 16) -> None:
        """Load what vLLM does not return, and prove on one document that the server computes the same target.

        Args:
            num_requests: documents at the server at one time.

        Raises:
            TargetError: the checkpoint cannot be described, or the server computes something else.
            TransportError: the server does not answer.
        """
        self._layers = address.layers
        self._outer = load_outer_parts(config)
        self._layer_ids = vllm_layer_ids(address.layers, self._outer.info.num_layers)
        self._requests = VLLMRequests(address)
        self._num_requests = num_requests
        self._lock = threading.Lock()
        self._rows: set[_Row] = set()
        self._closed = False
        self._last_end_s = 0.0
        """When the row before was packed; the packer's alone."""
        self._senders = ThreadPoolExecutor(num_requests, "vllm-request")
        self._packer = ThreadPoolExecutor(1, "vllm-packer", self._own_device)
        try:
            self._packer.submit(self._prove).result()
        except BaseException:
            self.close()
            raise

    def info(self) -> TargetInfo:
        """The facts about the target; the same object every time."""
        return self._outer.info

    def capture(self, request: RowRequest, spec: FeatureSpec) -> Future[Features]:
        """Compute features of one row; rows are answered when the last of their documents is."""
        future: Future[Features] = Future()
        num_documents = len(request.documents) - 1
        row = _Row(request, spec, future, time.monotonic(), [None] * num_documents, num_documents)
        try:
            self._check(request, spec)
            with self._lock:
                if self._closed:
                    raise StoppedError("the target engine is closed")
                self._rows.add(row)
                for document in range(num_documents):
                    self._senders.submit(self._send, row, document)
        except PacelineError as error:
            future.set_exception(error)
        return future

    def room(self) -> int:
        """How many more rows may be submitted now without only queueing up behind others.

        As many as leave no more documents waiting than are at the server, were each row one document.
        """
        with self._lock:
            return max(0, 2 * self._num_requests - sum(len(row.hidden) for row in self._rows))

    def close(self) -> None:
        """End the engine; futures not yet done fail with StoppedError. Safe to call twice."""
        with self._lock:
            self._closed = True
            rows = list(self._rows)
        for row in rows:
            self._end(row, StoppedError("the target engine was closed before this row was computed"))
        self._requests.close()
        self._senders.shutdown(cancel_futures=True)
        self._packer.shutdown()

    def _check(self, request: RowRequest, spec: FeatureSpec) -> None:
        check_request(request, spec, self.info())
        missing = sorted(set(spec.layers) - set(self._layers) - {self.info().num_layers - 1})
        if missing:
            raise ConfigError(
                f"capture layers {missing} of a vLLM server that was started for {list(self._layers)}: "
                "start it with all layers that will be asked for"
            )
        longest = int(np.diff(request.documents).max())
        if longest > self._requests.max_tokens:
            raise ConfigError(
                f"a document of {longest} tokens for a vLLM server that takes {self._requests.max_tokens}: "
                "raise its --max-model-len or lower data.row_tokens"
            )

    def _own_device(self) -> None:
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
        start, end = row.request.documents[document : document + 2]
        try:
            hidden = self._checked(self._requests.capture(row.request.tokens[start:end]))
        except BaseException as error:  # whoever waits for the row must hear of it
            self._end(row, error)
            return
        with row.lock:
            row.hidden[document] = hidden
            row.num_missing -= 1
            complete = row.num_missing == 0 and not row.over
        if complete:
            try:
                self._packer.submit(self._pack, row)
            except RuntimeError:
                self._end(row, StoppedError("the target engine was closed before this row was packed"))

    def _checked(self, document: CapturedDocument) -> Tensor:
        """[n, L, H] of all captured layers."""
        info = self.info()
        shape, dtype = tuple(document.hidden.shape[1:]), str(document.hidden.dtype).removeprefix("torch.")
        expected = (len(self._layer_ids), info.hidden_size)
        if document.layer_ids != self._layer_ids or shape != expected or dtype != info.dtype:
            raise CaptureMismatchError(
                f"vLLM captured its layers {document.layer_ids} as {dtype}[n, {shape[0]}, {shape[1]}], expected "
                f"{self._layer_ids} as {info.dtype}[n, {expected[0]}, {expected[1]}]: start it for the same layers, "
                "with --dtype of target.dtype"
            )
        return document.hidden

    def _pack(self, row: _Row) -> None:
        """On the packer's thread: documents end to end, then what vLLM does not return."""
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
        spec = row.spec
        packed = torch.cat([hidden for hidden in row.hidden if hidden is not None]).to(self._outer.device)
        row.hidden = [None] * len(row.hidden)
        slots = [self._layer_ids.index(layer + 1) for layer in spec.layers]
        wanted = spec.final_hidden != "none" or spec.greedy or spec.logsumexp
        final = self._outer.norm(packed[:, -1]) if wanted else None
        tensors = self._outer.capture.complete(packed[:, slots], final, row.request, spec)
        finite = bool(tensors["finite"])
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

    def _end(self, row: _Row, outcome: Features | BaseException) -> None:
        """Answer a row, once: the first outcome counts."""
        with row.lock:
            if row.over:
                return
            row.over = True
            alive = row.started_s is not None or row.future.set_running_or_notify_cancel()
        self._forget(row)
        if not alive:
            return
        if isinstance(outcome, Features):
            row.future.set_result(outcome)
        else:
            row.future.set_exception(outcome)

    def _forget(self, row: _Row) -> None:
        with self._lock:
            self._rows.discard(row)

    @torch.no_grad()
    def _prove(self) -> None:
        """Raise unless vLLM's own next token is the one that our norm and lm_head find in its hidden states."""
        info, outer = self.info(), self._outer
        tokens = np.linspace(0, info.num_tokenizer_tokens - 1, _NUM_PROBE_TOKENS).astype(np.int32)
        document = self._requests.capture(tokens)
        final = outer.norm(self._checked(document)[-1:, -1].to(outer.device))
        logits = apply_logit_transform(outer.lm_head(final), info.logit_transform)[0]
        missed_by = float(logits.max() - logits[document.next_token])
        if not missed_by <= _LOGIT_TOLERANCE * max(1.0, float(logits.abs().max())):
            raise TargetError(
                f"vLLM says token {document.next_token} where {info.name} says {int(logits.argmax())} after its own "
                f"hidden states (logits differ by {missed_by:.3g}): does the server run another checkpoint?"
            )
        logger.info("vLLM serves %s in %s, its layers %s are captured", info.name, info.dtype, self._layer_ids)
