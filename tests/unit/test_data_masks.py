"""Spans from masks and markers, checked by hand."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paceline.data.masks import spans_between, spans_of_mask


def between(tokens: list[int], start: list[int], end: list[int]) -> list[list[int]]:
    return spans_between(np.array(tokens), np.array(start), np.array(end, np.int64)).tolist()


@given(st.lists(st.booleans(), max_size=40))
def test_spans_are_the_maximal_runs_of_the_mask(mask):
    spans = spans_of_mask(np.array(mask, bool)).tolist()
    again = np.zeros(len(mask), bool)
    for start, end in spans:
        assert start < end
        again[start:end] = True
    assert again.tolist() == mask
    assert all(left[1] < right[0] for left, right in itertools.pairwise(spans))


def test_markers_of_several_tokens_enclose_spans_and_the_end_is_included():
    #          0  1  2  3  4  5  6  7  8  9 10 11
    tokens = [5, 8, 9, 1, 2, 7, 5, 8, 9, 3, 7, 5]
    assert between(tokens, [8, 9], [7]) == [[3, 6], [9, 11]]


def test_a_span_without_its_end_goes_to_the_end_of_the_text():
    assert between([8, 1, 2], [8], [7]) == [[1, 3]]
    assert between([8, 1, 2], [8], []) == [[1, 3]]


def test_a_start_inside_a_span_and_an_end_outside_mean_nothing():
    assert between([7, 8, 1, 8, 2, 7, 7, 3], [8], [7]) == [[2, 6]]


def test_an_end_that_overlaps_the_start_marker_does_not_count():
    assert between([8, 7, 7, 1, 7, 7, 2], [8, 7], [7, 7]) == [[2, 6]]


def test_no_marker_no_spans():
    assert between([1, 2], [8], [7]) == []
    assert between([1], [8, 9], [7]) == []
