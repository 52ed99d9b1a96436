"""The row plan: which documents share a row, and in which order an epoch trains the rows. Arithmetic on lengths."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_PACKING, _EPOCH = 1, 2  # separate the random streams that one seed feeds
_FACTS = ("row_tokens", "seed", "num_tokens", "num_cut")
_ARRAYS = ("offsets", "samples", "pieces", "lengths")


@dataclass(frozen=True, slots=True, eq=False)
class RowPlan:
    """Rows of at most `row_tokens` tokens that hold every token of every sample exactly once.

    A document is a whole sample, or, for a sample longer than a row, a piece of it: piece p is tokens
    [p * row_tokens, (p + 1) * row_tokens). The plan depends on (lengths, row_tokens, seed, window) alone, so
    every rank that builds it holds the same one.
    """

    row_tokens: int
    seed: int
    num_tokens: int
    """Tokens of all samples together."""
    num_cut: int
    """Samples longer than a row."""
    offsets: np.ndarray
    """int64[num_rows + 1]: row r holds documents offsets[r] .. offsets[r + 1]."""
    samples: np.ndarray
    """int32[num_documents]: the sample each document is (a piece of)."""
    pieces: np.ndarray
    """int32[num_documents]: 0 unless the sample was cut."""
    lengths: np.ndarray
    """int32[num_documents]."""

    @classmethod
    def build(cls, lengths: np.ndarray, row_tokens: int, seed: int, window: int = 2048) -> RowPlan:
        """Pack samples by best-fit-decreasing inside shuffled windows, then shuffle the rows.

        Args:
            lengths: int[N] tokens of each sample, at least 1 each.
            row_tokens: the most tokens a row may hold.
            seed: of the shuffles.
            window: documents packed together; larger fills better and mixes less.
        """
        lengths = np.asarray(lengths, np.int64)
        assert min(row_tokens, window) >= 1
        assert lengths.min(initial=1) >= 1, "a sample has at least one token"
        samples, pieces, sizes = _cut(lengths, row_tokens)
        rng = np.random.Generator(np.random.PCG64(_seed_sequence(seed, _PACKING)))
        shuffled = rng.permutation(len(samples))
        samples, pieces, sizes = samples[shuffled], pieces[shuffled], sizes[shuffled]
        del shuffled
        row_of, num_rows = _pack_windows(sizes, row_tokens, window)
        row_of = rng.permutation(num_rows).astype(np.int32)[row_of]
        # A stable sort keeps the shuffled order inside a row, so no row begins with its longest document by rule.
        order = np.argsort(row_of, kind="stable")
        offsets = np.zeros(num_rows + 1, np.int64)
        np.cumsum(np.bincount(row_of, minlength=num_rows), out=offsets[1:])
        return cls(
            row_tokens=row_tokens,
            seed=seed,
            num_tokens=int(lengths.sum()),
            num_cut=int((lengths > row_tokens).sum()),
            offsets=offsets,
            samples=samples[order],
            pieces=pieces[order],
            lengths=sizes[order],
        )

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def fill(self) -> float:
        """Share of the rows' room that holds tokens, in [0, 1]."""
        return self.num_tokens / (self.num_rows * self.row_tokens) if self.num_rows else 0.0

    @property
    def best_fill(self) -> float:
        """The fill of as few rows as the token count allows: no packing can do better."""
        least_rows = -(-self.num_tokens // self.row_tokens)
        return self.num_tokens / (least_rows * self.row_tokens) if least_rows else 0.0

    def row_documents(self, row_id: int) -> list[tuple[int, int, int, int]]:
        """(sample index, start, end, piece) of each document of a row; start and end count the sample's tokens."""
        begin, stop = self.offsets[row_id], self.offsets[row_id + 1]
        samples, pieces = self.samples[begin:stop].tolist(), self.pieces[begin:stop].tolist()
        lengths = self.lengths[begin:stop].tolist()
        return [
            (sample, piece * self.row_tokens, piece * self.row_tokens + length, piece)
            for sample, piece, length in zip(samples, pieces, lengths, strict=True)
        ]

    def row_order(self, epoch: int) -> np.ndarray:
        """int64[num_rows]: row ids in the order `epoch` trains them, a permutation drawn from (seed, epoch)."""
        rng = np.random.Generator(np.random.PCG64(_seed_sequence(self.seed, _EPOCH, epoch)))
        return rng.permutation(self.num_rows)

    def save(self, path: Path) -> None:
        """Write the plan as one uncompressed .npz file."""
        facts = {name: getattr(self, name) for name in _FACTS}
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        np.savez(path, facts=np.array(json.dumps(facts)), **arrays)

    @classmethod
    def load(cls, path: Path) -> RowPlan:
        """The plan that `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**json.loads(str(arrays["facts"])), **{name: arrays[name] for name in _ARRAYS})


def _seed_sequence(seed: int, *more: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed % 2**64, *more])  # entropy must not be negative; seeds may be


def _cut(lengths: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sample, piece, length) of every document, int32 each: samples longer than a row become several."""
    num_pieces = -(-lengths // row_tokens)
    samples = np.repeat(np.arange(len(lengths), dtype=np.int32), num_pieces)
    first = np.cumsum(num_pieces) - num_pieces
    pieces = (np.arange(len(samples)) - np.repeat(first, num_pieces)).astype(np.int32)
    sizes = np.minimum(np.repeat(lengths, num_pieces) - pieces.astype(np.int64) * row_tokens, row_tokens)
    return samples, pieces, sizes.astype(np.int32)


def _pack_windows(sizes: np.ndarray, row_tokens: int, window: int) -> tuple[np.ndarray, int]:
    """int32[n] the row of each document, and the number of rows.

    The emptiest row of a window stays open for the next: without that, every window wastes half a row, which
    is 6 % where a window makes only 8 rows.
    """
    row_of = np.empty(len(sizes), np.int32)
    num_rows = 0
    carried_row, carried_space = -1, 0
    for begin in range(0, len(sizes), window):
        block = sizes[begin : begin + window]
        order = np.argsort(-block, kind="stable")
        open_rows = _OpenRows(row_tokens)
        if carried_space:
            open_rows.add(carried_row, carried_space)
        placed = []
        for size in block[order].tolist():
            row, space = open_rows.take(size)
            if row < 0:
                row, space = num_rows, row_tokens
                num_rows += 1
            placed.append(row)
            if space > size:
                open_rows.add(row, space - size)
        row_of[begin + order] = placed
        carried_row, carried_space = open_rows.take_emptiest()
    return row_of, num_rows


class _OpenRows:
    """Rows with space left, found by best fit in constant time.

    The spaces in use are set bits, in words of 512 bits under one word that says which words are not empty: the
    best fit for n tokens is the lowest set bit at or above n, two shifts whether a row has 2,000 tokens or 200,000.
    """

    def __init__(self, row_tokens: int) -> None:
        self._rows: dict[int, list[int]] = {}
        self._words = [0] * ((row_tokens >> 9) + 1)
        self._used_words = 0

    def add(self, row: int, space: int) -> None:
        """Offer a row that has `space` >= 1 tokens left."""
        rows = self._rows.setdefault(space, [])
        if not rows:
            self._words[space >> 9] |= 1 << (space & 511)
            self._used_words |= 1 << (space >> 9)
        rows.append(row)

    def take(self, size: int) -> tuple[int, int]:
        """Withdraw the row with the least space >= `size`: (row, space), or (-1, 0) if none has."""
        word = size >> 9
        fitting = self._words[word] >> (size & 511)
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
        else:
            fuller = self._used_words >> (word + 1)
            if not fuller:
                return -1, 0
            word += (fuller & -fuller).bit_length()
            bits = self._words[word]
            space = (word << 9) + (bits & -bits).bit_length() - 1
        return self._withdraw(space)

    def take_emptiest(self) -> tuple[int, int]:
        """Withdraw the row with the most space: (row, space), or (-1, 0) if every row is full."""
        if not self._used_words:
            return -1, 0
        word = self._used_words.bit_length() - 1
        return self._withdraw((word << 9) + self._words[word].bit_length() - 1)

    def _withdraw(self, space: int) -> tuple[int, int]:
        rows = self._rows[space]
        row = rows.pop()
        if not rows:
            word = space >> 9
            self._words[word] ^= 1 << (space & 511)
            if not self._words[word]:
                self._used_words ^= 1 << word
        return row, space
