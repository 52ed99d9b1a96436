"""Which positions of the stream a trainer rank trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload


class DealtPositions(Sequence[int]):
    """The positions of one of R ranks, ascending: of those of step s, [s * G, (s + 1) * G), every R-th (rule N1).

    Together the ranks have every position once. What a step holds does not depend on R.
    """

    def __init__(self, num_rows: int, rows_per_step: int, rank: int = 0, num_ranks: int = 1) -> None:
        """`num_rows` positions (all epochs), dealt to `rank` (0-based) of `num_ranks`."""
        assert 0 <= rank < num_ranks
        self._rows_per_step, self._rank, self._num_ranks = rows_per_step, rank, num_ranks
        self._per_step = len(range(rank, rows_per_step, num_ranks))
        num_steps, rest = divmod(num_rows, rows_per_step)
        self._len = num_steps * self._per_step + len(range(rank, rest, num_ranks))

    def __len__(self) -> int:
        return self._len

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._len))]
        if not -self._len <= index < self._len:
            raise IndexError(f"position {index} of {self._len}")
        step, place = divmod(index % self._len, self._per_step)
        return step * self._rows_per_step + self._rank + place * self._num_ranks
