"""Rows as rank 0 of a tensor-parallel target hands them to its followers, through a pipe each. Imports no torch."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from paceline.schema.features import FeatureSpec
from paceline.schema.rows import RowRequest

_HEADER = struct.Struct("<QIIBB")
"""Number of the row from 0, tokens, documents, greedy, logsumexp. No tokens: there are no more rows."""


@dataclass(frozen=True, slots=True)
class HandedRow:
    """What a follower needs of a row: documents count their positions from 0, and features stay with rank 0."""

    number: int
    tokens: np.ndarray
    """int32[T]."""
    documents: np.ndarray
    """int32[D+1]."""
    greedy: bool
    logsumexp: bool

    def spec(self) -> FeatureSpec:
        """What takes part in every collective and keeps nothing."""
        return FeatureSpec(layers=(), final_hidden="none", greedy=self.greedy, logsumexp=self.logsumexp)

    def request(self, num_position_axes: int) -> RowRequest:
        """The row as `capture` takes it."""
        lengths = np.diff(self.documents)
        positions = np.arange(len(self.tokens), dtype=np.int32) - np.repeat(self.documents[:-1], lengths)
        return RowRequest(
            position=self.number,
            spec="",
            tokens=self.tokens,
            documents=self.documents,
            spans=np.zeros((0, 2), np.int32),
            positions=np.tile(positions, (num_position_axes, 1)),
        )


def encode_row(number: int, request: RowRequest, spec: FeatureSpec) -> bytes:
    """A row as it goes to every follower: a fixed header, then int32 tokens and documents."""
    header = _HEADER.pack(number, len(request.tokens), len(request.documents) - 1, spec.greedy, spec.logsumexp)
    tokens, documents = (np.ascontiguousarray(a, dtype="<i4").tobytes() for a in (request.tokens, request.documents))
    return header + tokens + documents


def encode_end() -> bytes:
    """What tells a follower that there are no more rows."""
    return _HEADER.pack(0, 0, 0, False, False)


def read_row(stream: BinaryIO) -> HandedRow | None:
    """The next row; None where there are no more.

    Raises:
        EOFError: rank 0 is gone.
    """
    number, num_tokens, num_documents, greedy, logsumexp = _HEADER.unpack(_read(stream, _HEADER.size))
    if num_tokens == 0:
        return None
    integers = np.frombuffer(_read(stream, 4 * (num_tokens + num_documents + 1)), "<i4").astype(np.int32)
    return HandedRow(number, integers[:num_tokens], integers[num_tokens:], bool(greedy), bool(logsumexp))


def _read(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError(f"{len(data)} of {size} bytes came before rank 0 ended")
    return data
