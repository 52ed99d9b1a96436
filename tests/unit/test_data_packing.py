"""Properties of the row plan."""

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.data.packing import RowPlan, _OpenRows

LENGTHS = st.lists(st.integers(1, 200), max_size=80)


def plan_documents(plan: RowPlan) -> list[list[tuple[int, int, int, int]]]:
    return [plan.row_documents(row) for row in range(plan.num_rows)]


def lognormal(num_samples: int, mean: float = 1000.0, sigma: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(3)
    return np.maximum(1, rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, num_samples).astype(np.int64))


@given(LENGTHS, st.integers(1, 64), st.integers(-3, 3), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_every_token_is_in_exactly_one_row_and_rows_are_within_the_limit(lengths, row_tokens, seed, window):
    plan = RowPlan.build(np.array(lengths), row_tokens, seed, window)
    seen = [np.zeros(length, int) for length in lengths]
    for documents in plan_documents(plan):
        assert 1 <= sum(end - start for _, start, end, _ in documents) <= row_tokens
        for sample, start, end, piece in documents:
            assert start == piece * row_tokens
            assert piece == 0 or lengths[sample] > row_tokens
            seen[sample][start:end] += 1
    assert all((counts == 1).all() for counts in seen)
    assert plan.num_tokens == sum(lengths)
    assert plan.num_cut == sum(length > row_tokens for length in lengths)
    assert plan.fill <= plan.best_fill + 1e-12


@given(LENGTHS, st.integers(1, 64), st.integers(0, 3), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_a_plan_built_twice_is_the_same_plan(lengths, row_tokens, seed, window):
    first, second = (RowPlan.build(np.array(lengths), row_tokens, seed, window) for _ in range(2))
    assert plan_documents(first) == plan_documents(second)
    assert np.array_equal(first.row_order(5), second.row_order(5))


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=30), st.lists(st.integers(1, 3000), max_size=30))
@settings(deadline=None)
def test_the_row_taken_is_the_tightest_that_fits(spaces, sizes):
    open_rows = _OpenRows(3000)
    left = dict(enumerate(spaces))
    for row, space in left.items():
        open_rows.add(row, space)
    for size in sizes:
        row, space = open_rows.take(size)
        fitting = [s for s in left.values() if s >= size]
        assert (row >= 0) == bool(fitting)
        if fitting:
            assert space == min(fitting) == left.pop(row)
    row, space = open_rows.take_emptiest()
    assert space == max(left.values(), default=0)


def test_another_seed_packs_other_rows():
    lengths = lognormal(500)
    assert plan_documents(RowPlan.build(lengths, 8192, 0)) != plan_documents(RowPlan.build(lengths, 8192, 1))


def test_two_epochs_are_two_different_permutations_of_the_same_rows():
    plan = RowPlan.build(lognormal(2000), 8192, seed=1)
    first, second = plan.row_order(0), plan.row_order(1)
    assert plan.num_rows > 100
    assert sorted(first) == sorted(second) == list(range(plan.num_rows))
    assert not np.array_equal(first, second)


def test_lognormal_lengths_fill_97_percent_of_the_rows():
    plan = RowPlan.build(lognormal(20_000), 8192, seed=0)
    assert 0.97 <= plan.fill <= plan.best_fill <= 1.0


@pytest.mark.parametrize("window", [8, 64])
def test_small_windows_do_not_waste_half_a_row_each(window):
    plan = RowPlan.build(lognormal(5000, mean=500), 8192, seed=0, window=window)
    assert plan.fill >= 0.97


def test_best_fill_is_the_fill_of_the_fewest_rows_there_can_be():
    plan = RowPlan.build(np.array([6, 6, 6]), 10, seed=0)
    assert plan.num_rows == 3
    assert plan.fill == pytest.approx(18 / 30)
    assert plan.best_fill == pytest.approx(18 / 20)


def test_no_samples_give_no_rows():
    plan = RowPlan.build(np.zeros(0, np.int64), 16, seed=0)
    assert (plan.num_rows, plan.fill, plan.best_fill) == (0, 0.0, 0.0)
    assert len(plan.row_order(0)) == 0


def test_rows_are_shuffled_after_packing_so_that_long_documents_do_not_come_first():
    plan = RowPlan.build(np.arange(501, 1000), 1000, seed=0)
    assert plan.num_rows == 499, "each document fills more than half a row"
    longest = [plan.row_documents(row)[0][2] for row in range(plan.num_rows)]
    assert longest != sorted(longest, reverse=True)
    assert abs(np.corrcoef(np.arange(499), longest)[0, 1]) < 0.2


def test_a_saved_plan_is_loaded_whole(tmp_path: Path):
    plan = RowPlan.build(lognormal(300, sigma=2.0), 1000, seed=-7)
    plan.save(tmp_path / "rows.npz")
    loaded = RowPlan.load(tmp_path / "rows.npz")
    assert plan.num_cut > 0
    assert plan_documents(loaded) == plan_documents(plan)
    assert np.array_equal(loaded.row_order(3), plan.row_order(3))
    assert (loaded.fill, loaded.num_cut, loaded.row_tokens) == (plan.fill, plan.num_cut, 1000)


def test_two_hundred_thousand_samples_are_planned_in_seconds():
    begin = time.perf_counter()
    plan = RowPlan.build(lognormal(200_000), 8192, seed=0)
    assert time.perf_counter() - begin < 10.0
    assert plan.fill > 0.99
