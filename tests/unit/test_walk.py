"""The serving walk, on rows small enough to walk by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import ConfigError
from paceline.evaluation.walk import Step, WalkSums, candidate_starts, walk_row, walk_spans, walked_spans
from paceline.schema.features import FeatureRow, Features
from paceline.schema.rows import Row


def row_of(tokens, spans, documents=None, cut=None) -> Row:
    documents = [0, len(tokens)] if documents is None else documents
    return Row(
        position=0,
        epoch=0,
        row_id=0,
        tokens=np.array(tokens, np.int32),
        documents=np.array(documents, np.int32),
        spans=np.array(spans, np.int32).reshape(-1, 2),
        span_cut=np.array(cut if cut is not None else [False] * len(spans), bool),
        sample_ids=np.arange(len(documents) - 1),
        pieces=np.zeros(len(documents) - 1, np.int32),
    )


def perfect(row: Row, starts: np.ndarray, num_drafted: int) -> np.ndarray:
    """The text itself after each start, -1 beyond the row."""
    padded = np.concatenate([row.tokens, np.full(num_drafted, -1)])
    return (
        np.stack([padded[p + 1 : p + 1 + num_drafted] for p in starts]) if len(starts) else np.zeros((0, num_drafted))
    )


def greedy_equal_to_text(row: Row) -> np.ndarray:
    return np.append(row.tokens[1:], -1)


def walk(row: Row, num_drafted: int, proposals=None, greedy=None, first_start: int = 0) -> list[list[Step]]:
    starts = candidate_starts(row, num_drafted, first_start)
    proposals = perfect(row, starts, num_drafted) if proposals is None else proposals
    greedy = greedy_equal_to_text(row) if greedy is None else greedy
    return walk_spans(row, greedy, starts, proposals, first_start)


def sums_of(spans: list[list[Step]], num_drafted: int) -> WalkSums:
    sums = WalkSums(num_drafted)
    for steps in spans:
        sums.add_steps(steps)
    return sums


def test_a_perfect_draft_scores_k_plus_one_over_full_steps_and_less_over_all() -> None:
    row = row_of(range(10, 33), [[2, 23]])  # x_2 from the prefill, then 20 tokens: 8 + 8 + 4
    (steps,) = walk(row, 7)
    assert steps == [Step(2, 7, 20, True), Step(10, 7, 12, True), Step(18, 4, 4, False)]
    result = sums_of([steps], 7).result()
    assert result["acceptance_length"] == 8
    assert result["acceptance_length_all"] == pytest.approx(20 / 3)
    assert result["rate"] == [1.0] * 7
    assert (result["tokens"], result["steps"], result["full_steps"]) == (20, 3, 2)


def test_a_perfect_step_with_exactly_k_tokens_left_is_full_and_adds_k_tokens() -> None:
    (steps,) = walk(row_of(range(5), [[1, 5]]), 3)
    assert steps == [Step(1, 3, 3, True)]
    assert steps[0].num_tokens == 3
    assert sums_of([steps], 3).result()["acceptance_length"] == 4


def test_a_draft_that_is_always_wrong_scores_one() -> None:
    row = row_of(range(10), [[1, 10]])
    starts = candidate_starts(row, 3, 0)
    (steps,) = walk(row, 3, proposals=np.full((len(starts), 3), 99))
    assert [step.start for step in steps] == list(range(1, 9))
    result = sums_of([steps], 3).result()
    assert result["acceptance_length"] == result["acceptance_length_all"] == 1.0
    assert result["rate"] == [0.0, None, None]


def test_a_prediction_must_equal_both_the_text_and_the_greedy_token() -> None:
    row = row_of(range(8), [[1, 8]])
    greedy = greedy_equal_to_text(row)
    greedy[2] = 50  # the target would not have written x_3
    (steps,) = walk(row, 3, greedy=greedy)
    assert steps[0] == Step(1, 1, 6, True)
    proposals = perfect(row, candidate_starts(row, 3, 0), 3)
    proposals[0, 1] = 50  # the draft says what the target would, the text goes on otherwise
    assert walk(row, 3, proposals=proposals, greedy=greedy)[0][0] == Step(1, 1, 6, True)


def test_nothing_is_accepted_beyond_the_end_of_a_span() -> None:
    row = row_of(range(12), [[1, 4], [6, 12]])
    first, second = walk(row, 4)
    assert first == [Step(1, 2, 2, False)]
    assert second == [Step(6, 4, 5, True)]


def test_a_cut_span_counts_only_steps_whose_predictions_all_lie_inside() -> None:
    row = row_of(range(10), [[0, 10]], cut=[True])
    (steps,) = walk(row, 3)
    assert [(s.start, s.full) for s in steps] == [(0, True), (4, True)]  # from 8 only x_9 is left
    (uncut,) = walk(row_of(range(10), [[0, 10]]), 3)
    assert [s.start for s in uncut] == [0, 4, 8]


def test_eagle3_starts_a_span_at_its_documents_first_token_one_later() -> None:
    row = row_of(range(12), [[0, 4], [6, 12]], documents=[0, 6, 12])
    assert walked_spans(row, 1).tolist() == [[1, 4], [7, 12]]
    assert walked_spans(row, 0).tolist() == [[0, 4], [6, 12]]
    later = row_of(range(12), [[2, 4], [7, 12]], documents=[0, 6, 12])
    assert walked_spans(later, 1).tolist() == [[2, 4], [7, 12]]


def test_a_span_of_one_token_has_no_step() -> None:
    row = row_of(range(4), [[0, 1], [2, 3]])
    assert walk(row, 3, first_start=1) == [[], []]
    assert sums_of([[]], 3).result()["acceptance_length"] is None


def test_rates_are_conditional_on_reaching_the_position() -> None:
    sums = WalkSums(3)
    sums.add_steps([Step(0, 0, 9, True), Step(1, 1, 8, True), Step(3, 3, 6, True), Step(7, 1, 2, False)])
    assert sums.reached == [4, 3, 1]
    assert sums.right == [3, 1, 1]
    assert sums.result()["rate"] == [3 / 4, 1 / 3, 1.0]
    assert sums.result()["acceptance_length"] == 1 + 4 / 3
    assert sums.result()["acceptance_length_uncut"] == 1 + 5 / 4
    assert sums.result()["acceptance_length_all"] == (1 + 2 + 4 + 2) / 4


def test_sums_of_two_rows_add_up_and_other_depths_do_not() -> None:
    a, b = WalkSums(2), WalkSums(2)
    steps = [Step(0, 2, 5, True), Step(3, 1, 2, True)]
    a.add_steps(steps[:1])
    b.add_steps(steps[1:])
    both = WalkSums(2)
    both.add_steps(steps)
    assert a + b == both
    with pytest.raises(ValueError, match="K = 2 and K = 3"):
        a + WalkSums(3)


class _Oracle:
    """Proposes the text, and keeps the starts it was asked for."""

    num_drafted = 3
    first_start = 1

    def __init__(self) -> None:
        self.calls: list[int] = []

    def propose(self, row: FeatureRow, starts: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(starts))
        return torch.from_numpy(perfect(row.row, starts.numpy(), 3))


def feature_row(row: Row, greedy: torch.Tensor | None) -> FeatureRow:
    hidden = torch.zeros(row.num_tokens, 1, 2)
    return FeatureRow(row, Features((0,), hidden, greedy, None, None, None, "", True))


def test_a_row_is_proposed_in_bounded_pieces_and_compared_with_greedy() -> None:
    row = row_of(np.arange(3000) % 251, [[0, 3000]])
    greedy = torch.from_numpy(greedy_equal_to_text(row)).int()
    greedy[1500] = -5
    oracle = _Oracle()
    sums = walk_row(oracle, feature_row(row, greedy))
    assert sum(oracle.calls) == 2998
    assert max(oracle.calls) <= 1024
    assert (sums.positions, sums.greedy_matches) == (2998, 2997)
    assert sums.tokens == 2998


def test_features_without_greedy_tokens_cannot_be_walked() -> None:
    with pytest.raises(ConfigError, match="greedy"):
        walk_row(_Oracle(), feature_row(row_of(range(4), [[0, 4]]), None))


@given(st.data())
def test_the_walk_equals_stepping_through_each_span_naively(data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(2, 30))
    num_drafted = data.draw(st.integers(1, 5))
    draw_tokens = st.lists(st.integers(0, 1), min_size=num_tokens, max_size=num_tokens)
    tokens, greedy = np.array(data.draw(draw_tokens)), np.array(data.draw(draw_tokens))
    start = data.draw(st.integers(0, num_tokens - 1))
    end = data.draw(st.integers(start + 1, num_tokens))
    cut = data.draw(st.booleans())
    row = row_of(tokens, [[start, end]], cut=[cut])
    starts = candidate_starts(row, num_drafted, 0)
    seed = data.draw(st.integers(0, 99))
    proposals = np.random.default_rng(seed).integers(0, 2, (len(starts), num_drafted))
    by_start = dict(zip(starts.tolist(), proposals, strict=True))

    expected, p = [], start
    while p < end - 1 and not (cut and p + num_drafted > end - 1):
        a = 0
        while a < num_drafted and p + a + 1 < end and by_start[p][a] == tokens[p + a + 1] == greedy[p + a]:
            a += 1
        expected.append((p, a, p + num_drafted <= end - 1))
        p += a + 1
    (steps,) = walk_spans(row, greedy, starts, proposals, 0)
    assert [(s.start, s.accepted, s.full) for s in steps] == expected
