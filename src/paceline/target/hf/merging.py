"""Several rows in one forward: more work for a device that one row does not fill.

Lossy, and therefore named so: the last bits of a row's features depend on what else was asked for.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from paceline.errors import EngineLostError, StoppedError
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.limits import Limits
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo
from paceline.target.interface import Engine

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Asked:
    request: RowRequest
    spec: FeatureSpec
    answer: Future[Features] = field(default_factory=Future)


class MergingEngine:
    """An engine that hands rows which wait for `engine` on to it as one.

    consumes: requests      waits for: nothing; rows wait here while the engine has no room
    unblocked by: a request, a row that is done, close()

    Rows keep their documents, so that a merged row is a row like any other. Should one fail, or not be finite, each of
    its rows is computed alone: nobody pays for another's mistake.
    """

    def __init__(self, engine: Engine, rows_per_forward: int) -> None:
        """Merge up to `rows_per_forward` rows of one spec; `engine` is closed with this."""
        self._engine = engine
        self._rows_per_forward = rows_per_forward
        self._info = engine.info().model_copy(update={"deterministic": False})
        self._lock = threading.Lock()
        self._waiting: deque[_Asked] = deque()
        self._closed = False

    def info(self) -> TargetInfo:
        """The engine's facts, but for `deterministic`."""
        return self._info

    def limits(self) -> Limits:
        """The engine's."""
        return self._engine.limits()

    def capture(self, request: RowRequest, spec: FeatureSpec) -> Future[Features]:
        """Compute features of one row, alone or with others."""
        asked = _Asked(request, spec)
        with self._lock:
            if self._closed:
                asked.answer.set_exception(StoppedError("the target engine is closed"))
                return asked.answer
            self._waiting.append(asked)
        self._hand_over()
        return asked.answer

    def room(self) -> int:
        """Rows for the engine, and one merged row that waits for it."""
        with self._lock:
            return max(0, self._engine.room() + self._rows_per_forward - len(self._waiting))

    def close(self) -> None:
        """End; rows that wait fail with StoppedError."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
        for asked in waiting:
            asked.answer.set_exception(StoppedError("the target engine was closed before this row was computed"))
        self._engine.close()

    def _hand_over(self) -> None:
        """Give the engine what it has room for; any thread, the engine's own included."""
        while True:
            with self._lock:
                if not self._waiting or self._engine.room() <= 0:
                    return
                rows = self._take()
                # under the lock: the next to look must see that the room is taken
                captured = self._capture(rows)
            captured.add_done_callback(partial(self._done, rows))

    def _take(self) -> list[_Asked]:
        """The first row that waits, and others of its spec; the lock is held."""
        first = self._waiting[0]
        rows = [asked for asked in self._waiting if asked.spec == first.spec][: self._rows_per_forward]
        self._waiting = deque(asked for asked in self._waiting if asked not in rows)
        return rows

    def _capture(self, rows: list[_Asked]) -> Future[Features]:
        if len(rows) == 1:
            return self._engine.capture(rows[0].request, rows[0].spec)
        try:
            merged = merge_requests([asked.request for asked in rows])
        except ValueError as error:  # arrays that do not fit together: which row is wrong shows when each is alone
            failed: Future[Features] = Future()
            failed.set_exception(error)
            return failed
        return self._engine.capture(merged, rows[0].spec)

    def _done(self, rows: list[_Asked], captured: Future[Features]) -> None:
        error = captured.exception()
        if len(rows) > 1 and not isinstance(error, EngineLostError | StoppedError):
            if error is None and captured.result().finite:
                parts = split_features(captured.result(), [asked.request for asked in rows])
                for asked, features in zip(rows, parts, strict=True):
                    asked.answer.set_result(features)
            else:
                logger.warning("%d rows in one forward failed (%s): each alone now", len(rows), error or "not finite")
                for asked in rows:
                    alone = self._engine.capture(asked.request, asked.spec)
                    alone.add_done_callback(partial(self._done, [asked]))
        else:
            for asked in rows:
                if error is not None:
                    asked.answer.set_exception(error)
                else:
                    asked.answer.set_result(captured.result())
        self._hand_over()


def merge_requests(requests: Sequence[RowRequest]) -> RowRequest:
    """One row of all documents, in order, at the first one's position.

    Raises:
        ValueError: arrays of different axes.
    """
    starts = np.cumsum([0, *(len(request.tokens) for request in requests)])
    documents = [request.documents[:-1] + start for request, start in zip(requests, starts, strict=False)]
    spans = [request.spans + start for request, start in zip(requests, starts, strict=False)]
    return RowRequest(
        position=requests[0].position,
        spec=requests[0].spec,
        tokens=np.concatenate([request.tokens for request in requests]),
        documents=np.concatenate([*documents, starts[-1:]]).astype(np.int32),
        spans=np.concatenate(spans).astype(np.int32),
        positions=np.concatenate([request.positions for request in requests], axis=1),
    )


def split_features(merged: Features, requests: Sequence[RowRequest]) -> list[Features]:
    """The features of each row, as views of those of the merged one; its time is shared out by tokens."""
    parts = []
    token = final = 0
    for request in requests:
        tokens = slice(token, token + len(request.tokens))
        finals = slice(0, 0)
        if merged.final_index is not None:
            inside = (merged.final_index >= tokens.start) & (merged.final_index < tokens.stop)
            finals = slice(final, final + int(inside.sum()))
        parts.append(
            Features(
                layers=merged.layers,
                hidden=merged.hidden[tokens],
                greedy=None if merged.greedy is None else merged.greedy[tokens],
                final_hidden=None if merged.final_hidden is None else merged.final_hidden[finals],
                final_index=None if merged.final_index is None else merged.final_index[finals] - tokens.start,
                logsumexp=None if merged.logsumexp is None else merged.logsumexp[tokens],
                row_hash=request.row_hash(),
                finite=merged.finite,
                queued_s=merged.queued_s,
                computed_s=merged.computed_s * len(request.tokens) / len(merged.hidden),
            )
        )
        token, final = tokens.stop, finals.stop
    return parts
