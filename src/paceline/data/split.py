"""Tokenized samples on disk: an Arrow file that is memory-mapped and read at random."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from paceline.data.summary import SplitSummary

_SCHEMA = pa.schema(
    [
        ("tokens", pa.list_(pa.int32())),
        ("spans", pa.list_(pa.int32())),
        ("sample_id", pa.int64()),
        ("origin", pa.string()),
    ]
)
_BATCH_SAMPLES = 1024


@dataclass(frozen=True, slots=True, eq=False)
class PreparedSample:
    """One tokenized sample; arrays are read-only views of the file."""

    tokens: np.ndarray
    """int32[n]."""
    spans: np.ndarray
    """int32[S, 2]: maximal runs of supervised tokens [start, end), ascending."""
    sample_id: int
    origin: str
    """Where it was read: file and line, or data set and row."""


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Flat columns of one record batch."""

    tokens: np.ndarray
    token_offsets: np.ndarray
    spans: np.ndarray
    span_offsets: np.ndarray
    origins: pa.StringArray


class PreparedSplit:
    """The samples of one split, memory-mapped: opening reads lengths and ids, a sample is a slice."""

    def __init__(self, path: Path) -> None:
        """Open what `write_split` wrote.

        Raises:
            OSError: the file cannot be read.
            pyarrow.ArrowException: it is not such a file.
        """
        self.path = path
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._batches = [_flat(batch) for batch in batches]
        no_numbers = np.zeros(0, np.int64)
        self.lengths: np.ndarray = np.concatenate(
            [no_numbers, *(np.diff(batch.token_offsets) for batch in self._batches)], dtype=np.int64
        )
        """int64[N]: tokens of each sample."""
        self.sample_ids: np.ndarray = np.concatenate(
            [no_numbers, *(batch.column("sample_id").to_numpy() for batch in batches)]
        )
        """int64[N]: xxh3-64 >> 1 of each sample's content; samples of equal content share theirs."""
        self._firsts = np.cumsum([0] + [batch.num_rows for batch in batches])

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> PreparedSample:
        """Sample `index`, in 0..N-1."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        batch = self._batches[number]
        inner = index - int(self._firsts[number])
        return PreparedSample(
            tokens=batch.tokens[batch.token_offsets[inner] : batch.token_offsets[inner + 1]],
            spans=batch.spans[batch.span_offsets[inner] : batch.span_offsets[inner + 1]].reshape(-1, 2),
            sample_id=int(self.sample_ids[index]),
            origin=batch.origins[inner].as_py(),
        )


def write_split(path: Path, rows: datasets.Dataset, keep: np.ndarray, summary: SplitSummary) -> np.ndarray:
    """Write the kept samples, add their counts to `summary`, and count the supervised tokens.

    Args:
        path: the Arrow file to write.
        rows: entries of `SAMPLE_FEATURES`.
        keep: bool[n] which of them are samples of this split.
        summary: gets the number of samples, tokens and supervised tokens.

    Returns:
        int64[max supervised id + 1]: how often each token is supervised.
    """
    counts = np.zeros(0, np.int64)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        for batch in _kept_batches(rows, keep):
            writer.write_batch(batch)
            flat = _flat(batch)
            supervised = _supervised_tokens(flat)
            summary.num_samples += batch.num_rows
            summary.num_tokens += len(flat.tokens)
            summary.num_supervised += len(supervised)
            more = np.bincount(supervised, minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
    return counts


def _kept_batches(rows: datasets.Dataset, keep: np.ndarray) -> Iterator[pa.RecordBatch]:
    table = rows.with_format("arrow")
    for begin in range(0, len(rows), _BATCH_SAMPLES):
        kept = keep[begin : begin + _BATCH_SAMPLES]
        if kept.any():
            part = table[begin : begin + _BATCH_SAMPLES].filter(pa.array(kept)).select(_SCHEMA.names)
            yield part.cast(_SCHEMA).combine_chunks().to_batches()[0]


def _flat(batch: pa.RecordBatch) -> _Batch:
    tokens, spans = batch.column("tokens"), batch.column("spans")
    return _Batch(
        tokens=tokens.values.to_numpy(zero_copy_only=True),
        token_offsets=tokens.offsets.to_numpy(zero_copy_only=True),
        spans=spans.values.to_numpy(zero_copy_only=True),
        span_offsets=spans.offsets.to_numpy(zero_copy_only=True),
        origins=batch.column("origin"),
    )


def _supervised_tokens(batch: _Batch) -> np.ndarray:
    """The supervised tokens of a batch, in order, without a loop over samples."""
    pairs = batch.spans.reshape(-1, 2)
    spans_per_sample = np.diff(batch.span_offsets) // 2
    pairs = pairs + np.repeat(batch.token_offsets[:-1], spans_per_sample)[:, None]
    steps = np.zeros(len(batch.tokens) + 1, np.int64)
    np.add.at(steps, pairs[:, 0], 1)
    np.add.at(steps, pairs[:, 1], -1)
    return batch.tokens[np.cumsum(steps[:-1]) > 0]
