"""The draft vocabulary: which tokens, in which order, and the published maps."""

import time

import numpy as np
import pytest
import torch

from paceline.drafts.vocabulary import build_vocabulary
from paceline.errors import ConfigError


def test_most_frequent_tokens_are_taken_ties_by_id_and_listed_in_ascending_order():
    counts = np.array([5, 0, 9, 5, 5, 1])
    assert build_vocabulary(counts, 3, 8).ids.tolist() == [0, 2, 3]


def test_a_vocabulary_larger_than_the_data_is_filled_with_the_lowest_unused_ids():
    counts = np.array([0, 0, 0, 7])
    assert build_vocabulary(counts, 4, 8).ids.tolist() == [0, 1, 2, 3]
    assert build_vocabulary(counts, 3, 8).ids.tolist() == [0, 1, 3]


def test_maps_agree_with_each_other():
    vocabulary = build_vocabulary(np.array([0, 3, 0, 2, 9, 0, 1]), 3, 9)
    t2d, d2t = vocabulary.t2d(), vocabulary.d2t()
    assert t2d.nonzero()[:, 0].tolist() == (d2t + torch.arange(3)).tolist() == [1, 3, 4]
    assert vocabulary.draft_index()[torch.tensor([1, 3, 4, 0])].tolist() == [0, 1, 2, -1]


def test_zero_means_the_whole_vocabulary():
    vocabulary = build_vocabulary(np.array([1]), 0, 5)
    assert vocabulary.is_full
    assert vocabulary.size == 5


def test_coverage_is_the_share_of_supervised_tokens_the_draft_can_say():
    assert build_vocabulary(np.array([6, 0, 3, 1]), 2, 4).coverage(np.array([6, 0, 3, 1])) == pytest.approx(0.9)


def test_a_token_without_an_embedding_row_is_refused():
    with pytest.raises(ConfigError, match=r"token 5.*has 4"):
        build_vocabulary(np.array([1, 0, 0, 0, 0, 2]), 2, 4)


def test_more_draft_tokens_than_target_tokens_are_refused():
    with pytest.raises(ConfigError, match=r"vocab_size = 9.*4"):
        build_vocabulary(np.array([1]), 9, 4)


def test_32k_of_152k_tokens_are_chosen_in_a_tenth_of_a_second():
    counts = np.random.default_rng(0).zipf(1.2, 151_936).astype(np.int64)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        vocabulary = build_vocabulary(counts, 32_000, 151_936)
        maps = vocabulary.draft_index()
        seconds.append(time.perf_counter() - started)
    assert vocabulary.size == int((maps >= 0).sum()) == 32_000
    assert min(seconds) < 0.1
