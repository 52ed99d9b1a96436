"""Rows dealt to ranks: disjoint, complete, and the same rows in a step whatever the number of ranks."""

import itertools

import pytest

from paceline.client.positions import DealtPositions


@pytest.mark.parametrize(
    ("num_rows", "rows_per_step", "num_ranks"), itertools.product((0, 1, 7, 12, 24), (1, 3, 4), (1, 2, 3, 5))
)
def test_ranks_share_out_the_rows_of_every_step(num_rows: int, rows_per_step: int, num_ranks: int) -> None:
    shares = [list(DealtPositions(num_rows, rows_per_step, rank, num_ranks)) for rank in range(num_ranks)]
    assert sorted(itertools.chain(*shares)) == list(range(num_rows))
    for start in range(0, num_rows, rows_per_step):
        of_step = range(start, min(start + rows_per_step, num_rows))
        for rank, share in enumerate(shares):
            assert [position for position in share if position in of_step] == list(of_step)[rank::num_ranks]


def test_positions_are_found_without_listing_them() -> None:
    positions = DealtPositions(10**9, 10, rank=3, num_ranks=4)
    assert len(positions) == 2 * 10**8
    assert [positions[0], positions[1], positions[2], positions[-1]] == [3, 7, 13, 10**9 - 3]
    with pytest.raises(IndexError):
        positions[len(positions)]


def test_a_rank_without_a_row_in_a_step_has_none() -> None:
    assert list(DealtPositions(20, 2, rank=2, num_ranks=3)) == []
