"""Parts of a row: they cover it, overlap by the halo alone, and both sides know their sizes beforehand."""

import numpy as np
import pytest
import torch

from paceline.schema.features import FeatureRow, FeatureSpec, merge_specs
from paceline.schema.layout import reply_bytes, reply_layout
from paceline.schema.parts import WHOLE, Part, num_supervised, part_range, part_reach, slice_features
from paceline.schema.rows import request_features
from rows import make_row, random_features, tiny_info

INFO = tiny_info()
ROW = make_row([23, 9, 31, 2], [[(5, 12), (15, 23)], [(0, 9)], [(3, 4), (6, 8), (20, 31)], [(0, 2)]])
SPECS = [
    FeatureSpec((1, 3), final_hidden, greedy=more, logsumexp=more, halo=halo)
    for final_hidden in ("none", "supervised", "all")
    for more in (False, True)
    for halo in (0, 5)
]


@pytest.mark.parametrize(
    ("num_tokens", "count", "expected"),
    [
        (65, 1, [(0, 65)]),
        (65, 2, [(0, 33), (33, 65)]),
        (65, 4, [(0, 17), (17, 34), (34, 51), (51, 65)]),
        (5, 4, [(0, 2), (2, 4), (4, 5), (5, 5)]),
        (0, 2, [(0, 0), (0, 0)]),
    ],
)
def test_parts_cover_a_row_in_order(num_tokens, count, expected):
    assert [part_range(num_tokens, Part(index, count)) for index in range(count)] == expected


def test_a_halo_ends_with_the_row():
    assert part_reach(65, Part(0, 2), 8) == (0, 41)
    assert part_reach(65, Part(1, 2), 8) == (33, 65)


@pytest.mark.parametrize("index", [-1, 2])
def test_a_part_that_cannot_be_is_a_mistake_of_ours(index):
    with pytest.raises(ValueError, match=f"no part {index} of 2"):
        Part(index, 2)


def test_drafts_that_share_a_capture_get_the_widest_halo():
    assert merge_specs([FeatureSpec((1,), halo=8), FeatureSpec((2,))]).halo == 8
    assert merge_specs([]).halo == 0


def test_supervised_tokens_are_counted_inside_a_range():
    mask = np.zeros(65, bool)
    mask[ROW.supervised_index()] = True
    for start, end in [(0, 65), (0, 7), (7, 41), (13, 14), (30, 30)]:
        assert num_supervised(ROW.spans, start, end) == mask[start:end].sum()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 4, 70])
def test_a_part_has_the_features_of_its_tokens_and_of_its_halo(spec, count):
    whole = random_features(ROW, spec, INFO).features
    for index in range(count):
        part = slice_features(whole, 65, Part(index, count), spec.halo)
        start, end = FeatureRow(ROW, part).token_range
        reach = min(65, end + spec.halo)
        assert part.num_tokens == end - start
        assert torch.equal(part.hidden, whole.hidden[start:end])
        if spec.greedy:
            assert torch.equal(part.greedy, whole.greedy[start:reach])
            assert torch.equal(part.logsumexp, whole.logsumexp[start:reach])
        if spec.final_hidden != "none":
            inside = [i for i in whole.final_index.tolist() if start <= i < reach]
            assert part.final_index.tolist() == inside
            expected = dict(zip(whole.final_index.tolist(), whole.final_hidden, strict=True))
            assert all(torch.equal(state, expected[i]) for i, state in zip(inside, part.final_hidden, strict=True))
        assert part.row_hash == whole.row_hash
        assert part.hidden.untyped_storage().data_ptr() == whole.hidden.untyped_storage().data_ptr(), "a view"


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_layout_of_a_parts_reply_is_known_from_the_request(spec):
    request, whole = request_features(ROW, "training"), random_features(ROW, spec, INFO).features
    for count in (1, 2, 4, 70):
        for index in range(count):
            part = Part(index, count)
            sliced = slice_features(whole, 65, part, spec.halo, ROW.spans)
            layout = reply_layout(request, spec, INFO, part)
            assert {n: t.shape for n, t in layout.items()} == {n: tuple(t.shape) for n, t in sliced.tensors().items()}
            assert sliced.num_bytes <= reply_bytes(request, spec, INFO, part)


def test_the_only_part_of_a_row_is_the_row():
    spec = SPECS[-1]
    whole = random_features(ROW, spec, INFO).features
    only = slice_features(whole, 65, WHOLE, spec.halo)
    assert all(torch.equal(tensor, only.tensors()[name]) for name, tensor in whole.tensors().items())
    assert reply_layout(request_features(ROW, "t"), spec, INFO) == reply_layout(
        request_features(ROW, "t"), FeatureSpec(spec.layers, spec.final_hidden, spec.greedy, spec.logsumexp), INFO
    )
