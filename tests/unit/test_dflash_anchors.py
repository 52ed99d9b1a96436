"""Anchors of DFlash: where they may be, that packing cannot change them, and which slots count."""

import numpy as np

from paceline.drafts.dflash.anchors import draw_anchors, plan_blocks
from rows import make_row


def test_only_tokens_followed_by_a_token_of_their_span_are_anchors():
    row = make_row([12, 3, 10], [[(0, 2), (4, 8)], [(1, 2)], [(9, 10), (2, 5)][::-1]])
    anchors = draw_anchors(row, anchor_every=1, seed=0)
    # Document 0: 0 of [0, 2), 4..6 of [4, 8); document 1 has a span of one token; document 2 starts at 15.
    assert anchors.tolist() == [0, 4, 5, 6, 17, 18]


def test_a_document_draws_one_anchor_in_anchor_every_tokens_and_at_least_one():
    row = make_row([60, 5, 30], [[(0, 60)], [(1, 4)], [(0, 3)]])
    anchors = draw_anchors(row, anchor_every=6, seed=3)
    per_document = np.histogram(anchors, bins=row.documents)[0]
    assert per_document.tolist() == [10, 1, 2]  # the last document has two valid anchors, and n // 6 = 5
    assert len(set(anchors.tolist())) == len(anchors)


def test_a_row_without_supervised_tokens_has_no_anchors():
    row = make_row([8, 8], [[], []])
    assert len(draw_anchors(row, 1, 0)) == 0
    plan = plan_blocks(row, draw_anchors(row, 1, 0), 4)
    assert len(plan) == 0
    assert len(plan.counted) == 0


def test_packing_does_not_change_a_documents_anchors():
    alone = make_row([40], [[(3, 39)]], sample_ids=[7])
    packed = make_row([9, 40, 11], [[(0, 9)], [(3, 39)], [(2, 5)]], sample_ids=[5, 7, 2], position=99)
    drawn = draw_anchors(packed, 4, seed=1)
    inside = drawn[(drawn >= 9) & (drawn < 49)] - 9
    assert inside.tolist() == draw_anchors(alone, 4, seed=1).tolist()


def test_anchors_change_with_the_epoch_the_seed_the_sample_and_the_piece():
    def draw(seed: int = 0, epoch: int = 0, sample: int = 0, piece: int = 0) -> list[int]:
        row = make_row([200], [[(0, 200)]], sample_ids=[sample], pieces=[piece], epoch=epoch)
        return draw_anchors(row, 6, seed).tolist()

    draws = [draw(), draw(seed=1), draw(seed=-1), draw(epoch=1), draw(sample=1), draw(piece=1)]
    assert draw() == draw()
    assert len({tuple(anchors) for anchors in draws}) == len(draws)


def test_anchors_are_uniform_over_the_valid_ones():
    hits = np.zeros(32)
    for epoch in range(1500):
        row = make_row([32], [[(0, 9), (16, 32)]], epoch=epoch)
        hits[draw_anchors(row, 8, seed=0)] += 1
    valid = [*range(8), *range(16, 31)]
    share = hits[valid] / (1500 * 4 / len(valid))
    assert hits.sum() == 1500 * 4
    assert hits[valid].sum() == hits.sum()
    assert np.abs(share - 1).max() < 0.25  # 261 expected, standard deviation 15


def test_slots_count_up_to_the_end_of_their_span_and_predict_the_next_tokens():
    row = make_row([6, 10], [[(1, 4)], [(2, 9)]])
    plan = plan_blocks(row, np.array([2, 8, 13]), block_size=4)
    assert len(plan) == 64
    assert plan.anchors[:4].tolist() == [2, 8, 13, 0]
    assert plan.first[:4].tolist() == [0, 6, 6, 0]
    # Spans [1, 4) and [8, 15): anchor 2 predicts x_3, anchor 8 x_9..x_11, anchor 13 x_14.
    assert plan.counted.tolist() == [1, 5, 6, 7, 9]
    assert plan.labels.tolist() == row.tokens[[3, 9, 10, 11, 14]].tolist()
