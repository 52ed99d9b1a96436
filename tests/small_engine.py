"""A small real engine for tests of the feature path: embeddings of a fixed table, computed by threads."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from paceline.schema.features import Features, FeatureSpec
from paceline.schema.limits import Limits
from paceline.schema.rows import Row, RowRequest
from paceline.schema.target_info import RopeInfo, TargetInfo

HIDDEN_SIZE = 8
VOCAB_SIZE = 50
NUM_LAYERS = 6


def small_info(**changes: object) -> TargetInfo:
    facts = {
        "name": "small",
        "model_type": "small",
        "num_layers": NUM_LAYERS,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": None,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": HIDDEN_SIZE,
        "vocab_size": VOCAB_SIZE,
        "num_tokenizer_tokens": VOCAB_SIZE,
        "norm_eps": 1e-6,
        "rope": RopeInfo(),
        "max_position_embeddings": 4096,
        "dtype": "float32",
        "tied_embeddings": False,
        "weight_fingerprint": "w",
        "tokenizer_fingerprint": "t",
        "deterministic": True,
    }
    return TargetInfo.model_validate(facts | changes)


def small_row(position: int, num_rows: int = 5, num_tokens: int | None = None) -> Row:
    """A row of two documents; 4..10 tokens that depend on the row id; epochs of `num_rows` rows, each in its order."""
    epoch, place = divmod(position, num_rows)
    row_id = int(np.random.default_rng(epoch).permutation(num_rows)[place])
    draw = np.random.default_rng(1000 + row_id)
    length = num_tokens if num_tokens is not None else int(draw.integers(4, 11))
    return Row(
        position=position,
        epoch=epoch,
        row_id=row_id,
        tokens=draw.integers(0, VOCAB_SIZE, length).astype(np.int32),
        documents=np.array([0, 2, length], np.int32),
        spans=np.array([[1, 2], [3, length]], np.int32),
        span_cut=np.zeros(2, np.bool_),
        sample_ids=np.array([2 * row_id, 2 * row_id + 1], np.int64),
        pieces=np.zeros(2, np.int32),
    )


def expected_hidden(tokens: np.ndarray, layers: tuple[int, ...]) -> torch.Tensor:
    """[T, L, H]: what the engine computes, said another way."""
    table = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
    return torch.stack([table[torch.from_numpy(tokens).long()] * (layer + 1) for layer in layers], dim=1)


class SmallEngine:
    """Answers rows from threads, in whatever order they finish.

    `held` keeps rows back until `let_go`; `spoil` may change features, or raise, before they are answered.
    """

    def __init__(
        self,
        num_threads: int = 1,
        num_slots: int = 100,
        delay_s: Callable[[RowRequest], float] = lambda request: 0.0,
        spoil: Callable[[RowRequest, Features], Features] = lambda request, features: features,
        info: TargetInfo | None = None,
    ) -> None:
        self._info = info or small_info()
        self._table = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
        self._threads = ThreadPoolExecutor(num_threads)
        self._num_slots = num_slots
        self._delay_s = delay_s
        self._spoil = spoil
        self._lock = threading.Lock()
        self._held: dict[int, threading.Event] = {}
        self.submitted: list[tuple[str, int]] = []
        """(spec, position) in the order they came."""
        self.answered: list[tuple[str, int]] = []
        self.num_computing = 0
        self.most_computing = 0
        self.live: dict[str, int] = {}
        """Rows per spec asked for and not yet freed by whoever received them."""
        self.most_live: dict[str, int] = {}
        self.most_live_at_all = 0
        self.live_bytes = 0
        self.most_live_bytes = 0

    def hold(self, *positions: int) -> None:
        for position in positions:
            self._held[position] = threading.Event()

    def let_go(self, *positions: int) -> None:
        for position in positions:
            self._held[position].set()

    def info(self) -> TargetInfo:
        return self._info

    def limits(self) -> Limits:
        return Limits()

    def room(self) -> int:
        return self._num_slots - self.num_computing

    def capture(self, request: RowRequest, spec: FeatureSpec) -> Future[Features]:
        num_bytes = self._num_bytes(request, spec)
        with self._lock:
            self.submitted.append((request.spec, request.position))
            self.num_computing += 1
            self.most_computing = max(self.most_computing, self.num_computing)
            self.live[request.spec] = self.live.get(request.spec, 0) + 1
            self.live_bytes += num_bytes
            self.most_live[request.spec] = max(self.most_live.get(request.spec, 0), self.live[request.spec])
            self.most_live_at_all = max(self.most_live_at_all, sum(self.live.values()))
            self.most_live_bytes = max(self.most_live_bytes, self.live_bytes)
        return self._threads.submit(self._compute, request, spec, num_bytes)

    def close(self) -> None:
        for event in self._held.values():
            event.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _num_bytes(self, request: RowRequest, spec: FeatureSpec) -> int:
        num_tokens = len(request.tokens)
        num_final = {"none": 0, "all": num_tokens, "supervised": int(np.diff(request.spans).sum())}[spec.final_hidden]
        per_token = 4 * (len(spec.layers) * HIDDEN_SIZE + spec.greedy + spec.logsumexp)
        return num_tokens * per_token + num_final * 4 * (HIDDEN_SIZE + 1)

    def _compute(self, request: RowRequest, spec: FeatureSpec, num_bytes: int) -> Features:
        started = time.monotonic()
        features: Features | None = None
        try:
            if request.position in self._held:
                self._held[request.position].wait(30)
            time.sleep(self._delay_s(request))
            features = self._spoil(request, self._features(request, spec))
        finally:
            with self._lock:
                self.num_computing -= 1
                self.answered.append((request.spec, request.position))
            if features is None:
                self._forget(request.spec, num_bytes)
        weakref.finalize(features.hidden, self._forget, request.spec, num_bytes).atexit = False
        features.computed_s = time.monotonic() - started
        return features

    def _forget(self, spec: str, num_bytes: int) -> None:
        with self._lock:
            self.live[spec] -= 1
            self.live_bytes -= num_bytes

    def _features(self, request: RowRequest, spec: FeatureSpec) -> Features:
        tokens = torch.from_numpy(request.tokens).long()
        embedded = self._table[tokens]
        final_index = None
        if spec.final_hidden != "none":
            wanted = [i for start, end in request.spans for i in range(start, end)]
            final_index = torch.tensor(wanted if spec.final_hidden == "supervised" else range(len(tokens))).int()
        return Features(
            layers=spec.layers,
            hidden=embedded[:, None] * torch.tensor([layer + 1.0 for layer in spec.layers])[:, None],
            greedy=(tokens + 1).remainder(VOCAB_SIZE).int() if spec.greedy else None,
            final_hidden=embedded[final_index.long()] if final_index is not None else None,
            final_index=final_index,
            logsumexp=embedded.logsumexp(-1) if spec.logsumexp else None,
            row_hash=request.row_hash(),
            finite=True,
        )
