"""Features recorded on disk as one more source of the pool."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from paceline.client.checks import check_header
from paceline.client.connection import Connection
from paceline.client.recording import Recording, RowPlace, read_row
from paceline.client.server_list import MakeConnection, ServerList
from paceline.errors import DamagedError, DataError, ServerLostError, StoppedError
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.layout import ReplyLayout, layout_bytes, reply_layout
from paceline.schema.limits import Limits
from paceline.schema.parts import WHOLE, num_supervised, part_range, part_reach
from paceline.schema.protocol import ReplyHeader, TensorEntry
from paceline.schema.recording import row_key
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo
from paceline.schema.wire import LENGTH_BYTES, decode_reply_head
from paceline.transport.base import Delivery, Incoming
from paceline.transport.buffers import HostBuffer, HostBuffers
from paceline.transport.delivery import HostToTrainer
from paceline.transport.feature_bytes import unpack, unpack_tensors

_NUM_THREADS = 4
"""Rows read at one time; more only compete for the disk."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Pieces:
    """What is kept of a recorded row."""

    body_bytes: int
    """Of the row without its head."""
    places: Sequence[tuple[int, memoryview]]
    """See `read_row`."""


class RecordedConnection:
    """Every row of a run from a recording (client.connection.Connection).

    consumes: rows of any thread      waits for: the disk, on threads of its own
    unblocked by: the disk, abort(), close()

    A damaged row is read a second time, from the disk itself; if that does not help, the run ends.
    """

    def __init__(self, recording: Recording, buffers: HostBuffers, device: torch.device) -> None:
        """Read nothing yet.

        Args:
            buffers: host memory for rows, pinned where `device` is a GPU; may be shared.
            device: the trainer's.
        """
        self._recording = recording
        self._buffers = buffers
        self._to_trainer = HostToTrainer(device)
        self._specs: dict[str, FeatureSpec] = {}
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="recording")
        self._lock = threading.Lock()
        """Guards everything below."""
        self._outstanding: dict[Future[Delivery], int] = {}
        """Answers not yet given -> position."""
        self._ended: Exception | None = None

    @property
    def name(self) -> str:
        return self._recording.name

    def info(self) -> TargetInfo:
        return self._recording.info

    def limits(self) -> Limits:
        return Limits()  # `open_session` says what is not there

    def open_session(self, specs: Mapping[str, FeatureSpec], group: str | None = None) -> None:
        del group  # nothing is computed
        self._recording.check_covers(specs)
        self._specs = dict(specs)

    def request(self, request: RowRequest) -> Future[Delivery]:
        answer: Future[Delivery] = Future()
        answer.set_running_or_notify_cancel()
        with self._lock:
            if self._ended is not None:
                raise type(self._ended)(f"{self._ended}: row {request.position} is not asked for")
            self._outstanding[answer] = request.position
            self._threads.submit(self._answer, request, answer)
        return answer

    def abort(self) -> None:
        self._end(ServerLostError(f"{self.name} was given up"))

    def close(self) -> None:
        self._end(StoppedError(f"{self.name} was closed"))

    def _end(self, reason: Exception) -> None:
        with self._lock:
            self._ended = self._ended or reason
            outstanding, self._outstanding = self._outstanding, {}
        self._threads.shutdown(wait=False, cancel_futures=True)
        for answer, position in outstanding.items():
            answer.set_exception(type(reason)(f"{reason} before row {position} came"))

    def _answer(self, request: RowRequest, answer: Future[Delivery]) -> None:
        """On a thread of its own; every error belongs to whoever waits for the row."""
        delivery: Delivery | None = None
        error: BaseException | None = None
        begin = time.monotonic()
        try:
            delivery = self._deliver(request)
            delivery.features.transfer_s = time.monotonic() - begin
        except BaseException as failure:
            error = failure
        with self._lock:
            wanted = self._outstanding.pop(answer, None) is not None
        if not wanted:
            if delivery is not None:
                delivery.release()
        elif delivery is not None:
            answer.set_result(delivery)
        else:
            answer.set_exception(error)

    def _deliver(self, request: RowRequest) -> Delivery:
        key = row_key(request)
        place = self._recording.find(key)
        if place is None:
            raise self._lacks(request)
        whole = replace(request, part=WHOLE)
        spec, info = self._recording.spec, self._recording.info
        kept = reply_layout(request, replace(spec, halo=self._specs[request.spec].halo), info, request.part)
        buffer = self._buffers.reserve(layout_bytes(kept))
        try:
            header = self._read(key, place, _pieces_of_part(request, spec, info, kept, buffer.view))
            check_header(self.name, whole, spec, info, header)
            return self._to_trainer.deliver(self._select(request, header, kept, buffer))
        except BaseException:
            buffer.give_back()
            raise

    def _read(self, key: str, place: RowPlace, pieces: _Pieces) -> ReplyHeader:
        try:
            return _read_reply(key, place, pieces)
        except DamagedError as error:
            _logger.warning("%s; it is read again", error)
        try:
            return _read_reply(key, place, pieces, from_disk=True)
        except DamagedError as error:
            raise self._is_damaged(key, error) from error

    def _lacks(self, request: RowRequest) -> Exception:
        """The error for a row that is not there."""
        return DataError(
            f"{self.name} does not hold row {request.position} of {len(request.tokens)} tokens: its rows are of other "
            "data, or packed in another way"
        )

    def _is_damaged(self, key: str, error: DamagedError) -> Exception:
        """The error for a row that was damaged when it was read a second time."""
        del key
        return DataError(
            f"{error}; copy the file anew, or remove its entry from {self._recording.paths.manifest} and record again"
        )

    def _select(self, request: RowRequest, header: ReplyHeader, kept: ReplyLayout, buffer: HostBuffer) -> Incoming:
        """The reply that was asked for, out of what was kept of the recorded one; in `buffer` if they are the same."""
        spec = self._specs[request.spec]
        layout = reply_layout(request, spec, self._recording.info, request.part)
        if layout != kept:
            selected = self._buffers.reserve(layout_bytes(layout))
            source = unpack(header, kept, buffer.memory)
            _copy_selected(source, unpack_tensors(layout, selected.memory), spec, request)
            del source  # views of the buffer, which is another row's next
            buffer.give_back()
            buffer = selected
        asked = header.model_copy(
            update={
                "position": request.position,
                "row_hash": request.row_hash(),
                "num_tokens": layout["hidden"].shape[0],
                "part": request.part.index,
                "num_parts": request.part.count,
                "layers": spec.layers,
                "tensors": {name: TensorEntry.of(tensor) for name, tensor in layout.items()},
                "num_bytes": layout_bytes(layout),
            }
        )
        return Incoming(asked, layout, buffer, None)


class PartialConnection(RecordedConnection):
    """The rows that a recording has, beside servers that are asked for the others, and for those damaged on disk."""

    def holds(self, request: RowRequest) -> bool:
        """Whether the row is to be asked for here."""
        return self._recording.find(row_key(request)) is not None

    def _lacks(self, request: RowRequest) -> Exception:
        return DamagedError(f"{self.name} does not hold row {request.position} any more")

    def _is_damaged(self, key: str, error: DamagedError) -> Exception:
        self._recording.forget(key)
        return DamagedError(f"{error}; a server is asked for it instead")


class RecordingBeside:
    """The servers of another list, and a recording (client.server_list.ServerList)."""

    def __init__(self, servers: ServerList, recording: Recording, connect: Callable[[], Connection]) -> None:
        self._servers = servers
        self._recorded = {recording.name: connect}

    def read(self) -> Mapping[str, MakeConnection]:
        return {**self._recorded, **self._servers.read()}


def _pieces_of_part(
    request: RowRequest, spec: FeatureSpec, info: TargetInfo, kept: ReplyLayout, memory: memoryview
) -> _Pieces:
    """Where the bytes of the wanted part lie in the recorded row, and where they belong in `memory`.

    Args:
        spec: what was recorded.
        kept: places in `memory`.
    """
    whole = reply_layout(request, spec, info)
    if request.part == WHOLE:
        return _Pieces(layout_bytes(whole), [(0, memory)])
    start, _ = part_range(len(request.tokens), request.part)
    pieces = []
    for name, tensor in kept.items():
        of_supervised = name.startswith("final_") and spec.final_hidden == "supervised"
        first = num_supervised(request.spans, 0, start) if of_supervised else start
        recorded = whole[name]
        row_bytes = recorded.num_bytes // max(1, recorded.shape[0])
        pieces.append((recorded.offset + first * row_bytes, memory[tensor.offset : tensor.offset + tensor.num_bytes]))
    return _Pieces(layout_bytes(whole), pieces)


def _read_reply(key: str, place: RowPlace, pieces: _Pieces, *, from_disk: bool = False) -> ReplyHeader:
    """Fill the pieces; the header in front of them, which proves that it is the row of this key."""
    head = bytearray(max(place.row.num_bytes - pieces.body_bytes, LENGTH_BYTES))
    read_row(place, memoryview(head), pieces.places, from_disk=from_disk)
    header = decode_reply_head(memoryview(head)[LENGTH_BYTES:])
    if header.row_hash != key:
        raise DamagedError(f"{place} is the row of hash {header.row_hash}, expected {key}")
    return header


def _copy_selected(
    source: Features, wanted: Mapping[str, torch.Tensor], spec: FeatureSpec, request: RowRequest
) -> None:
    """Fill the tensors that are wanted from those that were recorded for more layers, or for more tokens."""
    given = source.tensors()
    for name, tensor in wanted.items():
        if name == "hidden":
            layers = [source.layers.index(layer) for layer in spec.layers]
            torch.index_select(given[name], 1, torch.tensor(layers), out=tensor)
        elif given[name].shape == tensor.shape:
            tensor.copy_(given[name])
        else:  # of all tokens; the supervised ones are wanted
            torch.index_select(given[name], 0, _supervised(request, spec), out=tensor)


def _supervised(request: RowRequest, spec: FeatureSpec) -> torch.Tensor:
    """int64[F]: the supervised tokens of a part with its halo, counted from its start."""
    start, reach = part_reach(len(request.tokens), request.part, spec.halo)
    supervised = torch.zeros(len(request.tokens), dtype=torch.bool)
    for first, end in request.spans:
        supervised[first:end] = True
    return supervised[start:reach].nonzero().squeeze(1)
