"""Rows: documents packed end to end, the unit of request, transport and training."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import xxhash

from paceline.schema.parts import WHOLE, Part


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row of the training stream, as planned on the trainer's side.

    All indices are row coordinates (0..T-1) unless said otherwise.
    """

    position: int
    """Place in the stream of all epochs, from 0; the id of a request."""
    epoch: int
    row_id: int
    """Which packed row this is; the same in every epoch."""
    tokens: np.ndarray
    """int32[T]."""
    documents: np.ndarray
    """int32[D+1]: document d is tokens[documents[d]:documents[d+1]]."""
    spans: np.ndarray
    """int32[S, 2]: maximal runs of supervised tokens, [start, end), ascending, each inside one document."""
    span_cut: np.ndarray
    """bool[S]: the span goes on in the sample beyond this document's last token (a cut sample)."""
    sample_ids: np.ndarray
    """int64[D]: the sample each document is (a piece of)."""
    pieces: np.ndarray
    """int32[D]: which piece of its sample a document is; 0 unless the sample was longer than a row."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_supervised(self) -> int:
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    def supervised_index(self) -> np.ndarray:
        """int32[F]: indices of all supervised tokens, ascending."""
        if not len(self.spans):
            return np.zeros(0, np.int32)
        index: np.ndarray = np.concatenate([np.arange(start, end, dtype=np.int32) for start, end in self.spans])
        return index

    def document_positions(self) -> np.ndarray:
        """int32[T]: each token's index in its own document."""
        starts = np.repeat(self.documents[:-1], np.diff(self.documents))
        positions: np.ndarray = (np.arange(self.num_tokens) - starts).astype(np.int32)
        return positions

    def document_ids(self) -> np.ndarray:
        """int32[T]: which document of the row each token belongs to."""
        return np.repeat(np.arange(len(self.documents) - 1, dtype=np.int32), np.diff(self.documents))


@dataclass(frozen=True, slots=True, eq=False)
class RowRequest:
    """What is asked of a target for one row: everything its features depend on, and nothing else."""

    position: int
    spec: str
    """Name of a FeatureSpec registered by the session, e.g. "training"."""
    tokens: np.ndarray
    """int32[T]."""
    documents: np.ndarray
    """int32[D+1]."""
    spans: np.ndarray
    """int32[S, 2]."""
    positions: np.ndarray
    """int32[P, T], P = 1, or 3 for mRoPE; position ids restart in every document."""
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    """Named inputs beyond tokens (vision), layout declared by the target."""
    part: Part = WHOLE
    """What of the row's features is wanted; they are computed for the whole row, whatever this says."""

    def row_hash(self) -> str:
        """xxh3-64 (16 hex digits) of everything but `position` and `part`; a reply must carry the same."""
        digest = xxhash.xxh3_64()
        digest.update(self.spec.encode())
        arrays = {
            "tokens": self.tokens,
            "documents": self.documents,
            "spans": self.spans,
            "positions": self.positions,
            **{f"extras.{name}": self.extras[name] for name in sorted(self.extras)},
        }
        for name, array in arrays.items():
            digest.update(f"|{name}{array.dtype.str}{array.shape}|".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def request_features(row: Row, spec: str, num_position_axes: int = 1, part: Part = WHOLE) -> RowRequest:
    """The request for a text-only row: sequential positions, equal on every axis."""
    positions = np.broadcast_to(row.document_positions(), (num_position_axes, row.num_tokens))
    return RowRequest(
        position=row.position,
        spec=spec,
        tokens=row.tokens,
        documents=row.documents,
        spans=row.spans,
        positions=np.ascontiguousarray(positions),
        part=part,
    )
