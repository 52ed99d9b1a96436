"""Drafts over two and four processes that train each row together: losses and gradients of one, half the memory."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from paceline.config.drafts import DFlashConfig, Eagle3Config
from paceline.drafts.dflash.anchors import draw_anchors
from paceline.drafts.eagle3.slots import plan_slots
from paceline.drafts.sequence import SequenceGroup
from paceline.drafts.vocabulary import DraftVocabulary
from paceline.errors import ConfigError
from paceline.schema.parts import Part, part_range
from rows import make_row, tiny_info
from sequence_ranks import (
    INFO,
    Case,
    Ranks,
    Result,
    Watched,
    add_up_gradients,
    build,
    compute_loss,
    exchange_numbers,
    gather_numbers,
    part_of_row,
    running_ranks,
    walk_held_out,
    watch_loss,
    weigh_fixed_row,
)

EAGLE3 = Eagle3Config(num_depths=4, vocab_size=0)
DFLASH = DFlashConfig(num_layers=2, block_size=4, anchor_every=3, target_layers=(1, 3, 6))
SLIDING = DFLASH.model_copy(
    update={
        "num_layers": 3,
        "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
        "sliding_window": 9,
    }
)
HALF = DraftVocabulary(np.arange(0, 64, 2, dtype=np.int64), 64)
# 67 tokens: parts of 34 and 33, and of 17, 17, 17 and 16.
PACKED = ([23, 9, 31, 4], [[(5, 12), (15, 23)], [(0, 9)], [(1, 8), (10, 31)], [(0, 4)]])
FIRST_EMPTY = ([50, 17], [[(40, 49)], [(2, 17)]])
LAST_EMPTY = ([30, 37], [[(3, 12), (14, 20)], []])
CASES = {
    "eagle3": Case(EAGLE3, *PACKED),
    "eagle3, half the vocabulary": Case(EAGLE3, *PACKED, {"vocabulary": HALF, "head_chunk_tokens": 8}),
    "eagle3, checkpointed": Case(EAGLE3, *PACKED, {"activation_checkpointing": True}),
    "eagle3, first part without slots": Case(EAGLE3, *FIRST_EMPTY),
    "eagle3, last part without supervised tokens": Case(EAGLE3, *LAST_EMPTY, {"activation_checkpointing": True}),
    "eagle3, fewer tokens than parts have room for": Case(EAGLE3, [5], [[(1, 5)]]),
    "dflash": Case(DFLASH, *PACKED),
    "dflash, sliding": Case(SLIDING, *PACKED),
    "dflash, sliding, checkpointed": Case(SLIDING, *PACKED, {"activation_checkpointing": True}),
    "dflash, first part without anchors": Case(DFLASH, *FIRST_EMPTY),
    "dflash, last part without supervised tokens": Case(DFLASH, *LAST_EMPTY),
    "dflash, one anchor": Case(DFLASH, [5], [[(3, 5)]]),
}
EXCHANGES = ("keys", "heads")
# Impossible with heads on four ranks, and on two and four where there is one of them.
FEW = {"num_heads": 4, "num_kv_heads": 2}
FEW_HEADS = {
    "eagle3, two key/value heads": Case(EAGLE3.model_copy(update=FEW), *PACKED),
    "dflash, two key/value heads": Case(SLIDING.model_copy(update=FEW), *PACKED),
    "eagle3, one key/value head, first part without slots": Case(
        EAGLE3.model_copy(update={"num_heads": 3, "num_kv_heads": 1}), *FIRST_EMPTY, {"activation_checkpointing": True}
    ),
}
EVALUATED = {
    name: CASES[name]
    for name in (
        "eagle3, half the vocabulary",
        "eagle3, first part without slots",
        "eagle3, last part without supervised tokens",
        "dflash, sliding",
        "dflash, first part without anchors",
    )
}
# Short documents: dense attention on a CPU would otherwise be all that counts.
LONG = ([70] * 33, [[(8, 66)]] * 33)
WIDE = tiny_info(hidden_size=96, num_heads=8, num_kv_heads=4)
OF_64K = ([64] * 1024, [[(8, 60)]] * 1024)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with running_ranks(tmp_path_factory.mktemp("ranks"), 4) as ranks:
        yield ranks


def added(results: Sequence[Result]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Sums over ranks of (total, weight and metrics), and of gradients."""
    assert all(g is not None for result in results for g in result.gradients.values()), "each rank has every gradient"
    figures = [{"total": r.total, "weight": r.weight, **r.metrics} for r in results]
    return tuple(
        {name: np.sum([shares[name] for shares in of_ranks], axis=0) for name in of_ranks[0]}
        for of_ranks in (figures, [result.gradients for result in results])
    )


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ranks_that_share_a_row_compute_what_one_rank_computes(ranks: Ranks, case: Case, num_ranks: int):
    alone = compute_loss(None, case)
    for exchange in EXCHANGES:
        shares = ranks.call(num_ranks, compute_loss, dataclasses.replace(case, exchange=exchange))
        assert_equal(shares, alone)


@pytest.mark.parametrize("case", FEW_HEADS.values(), ids=FEW_HEADS)
def test_a_group_that_exchanges_keys_may_have_more_ranks_than_key_heads(ranks: Ranks, case: Case):
    assert_equal(ranks.call(4, compute_loss, case), compute_loss(None, case))
    group = SequenceGroup(None, 0, 4)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r'set training\.sequence_exchange to "keys"'):
        build(dataclasses.replace(case, exchange="heads"), group)


@pytest.mark.long
@pytest.mark.parametrize("name", ["eagle3", "eagle3, first part without slots", "dflash, sliding, checkpointed"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_compiled_ranks_compute_it_too(ranks: Ranks, name: str, exchange):
    changes = {**CASES[name].changes, "compile": True}
    compiled = dataclasses.replace(CASES[name], changes=changes, exchange=exchange)
    assert_equal(ranks.call(2, compute_loss, compiled, timeout_s=250), compute_loss(None, CASES[name]))


def assert_equal(shares: Sequence[Result], alone: Result) -> None:
    assert alone.weight > 0
    figures, gradients = added(shares)
    expected_figures, expected_gradients = added([alone])
    for name, expected in expected_figures.items():
        np.testing.assert_allclose(figures[name], expected, rtol=1e-5, err_msg=name)
    for name, expected in expected_gradients.items():
        difference = np.linalg.norm(gradients[name] - expected) / np.linalg.norm(expected)
        assert difference < 1e-5, f"{name}: {difference}"


def test_the_cases_are_what_they_are_called():
    def counts(case: Case, num_parts: int) -> tuple[int, ...]:
        algorithm = build(case, None)
        parts = [part_of_row(case, algorithm, Part(index, num_parts)) for index in range(num_parts)]
        plans = [plan_slots(part, EAGLE3.num_depths, 64, torch.device("cpu")) for part in parts]
        assert [plan.num_slots for plan in plans] == list(plans[0].counts)
        return plans[0].counts

    packed = make_row(*PACKED)
    assert part_range(packed.num_tokens, Part(0, 2)) == (0, 34)
    assert any(start < 34 < end for start, end in zip(packed.documents[:-1], packed.documents[1:], strict=True))
    for border in (17, 34, 51):
        assert any(start < border < end for start, end in packed.spans), "spans cross the borders"
    assert counts(CASES["eagle3, first part without slots"], 2)[0] == 0
    assert counts(CASES["eagle3, last part without supervised tokens"], 2)[1] == 0
    last = part_of_row(CASES["eagle3, last part without supervised tokens"], build(CASES["eagle3"], None), Part(1, 2))
    assert len(last.features.final_hidden) == 0
    assert part_range(5, Part(3, 4)) == (5, 5), "a part without tokens"
    assert len(draw_anchors(make_row([5], [[(3, 5)]]), DFLASH.anchor_every, 0)) == 1


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("config", [EAGLE3, DFLASH], ids=["eagle3", "dflash"])
def test_gradients_that_fsdp_adds_up_over_rows_and_ranks_are_those_of_one_rank(ranks: Ranks, config, sharding: str):
    cases = [Case(config, *row, {"activation_checkpointing": True}) for row in (FIRST_EMPTY, PACKED)]
    alone = [compute_loss(None, case).gradients for case in cases]
    for gradients in ranks.call(4, add_up_gradients, cases, sharding):
        for name, gradient in gradients.items():
            expected = sum(one[name] for one in alone)
            assert np.linalg.norm(gradient - expected) < 1e-5 * np.linalg.norm(expected), name


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("case", EVALUATED.values(), ids=EVALUATED)
def test_ranks_that_share_a_held_out_row_propose_and_accept_what_one_rank_does(ranks: Ranks, case: Case, num_ranks):
    alone = walk_held_out(None, case)
    shares = ranks.call(num_ranks, walk_held_out, case)
    np.testing.assert_array_equal(np.concatenate([share.starts for share in shares]), alone.starts)
    np.testing.assert_array_equal(np.concatenate([share.proposals for share in shares]), alone.proposals)
    total = sum((share.sums for share in shares[1:]), shares[0].sums)
    assert total == alone.sums
    assert sum(share.loss for share in shares) == pytest.approx(alone.loss, rel=1e-5)
    assert alone.sums.accepted > alone.sums.steps > 3, "the premise: steps reach far, and some end early"
    assert 0 < alone.sums.greedy_matches < alone.sums.positions


def test_a_held_out_row_is_proposed_in_as_many_pieces_by_every_rank(ranks: Ranks):
    """1024 starts a piece: the last part has none, the first has two pieces."""
    case = Case(DFLASH, [2600], [[(10, 1250)]])
    alone = walk_held_out(None, case)
    assert len(alone.starts) == 1239
    shares = ranks.call(2, walk_held_out, case)
    assert [len(share.starts) for share in shares] == [1239, 0]
    assert shares[0].sums + shares[1].sums == alone.sums


@pytest.mark.parametrize("config", [EAGLE3, DFLASH], ids=["eagle3", "dflash"])
def test_rows_to_compile_on_come_in_parts_too(ranks: Ranks, config):
    case = Case(config, *PACKED)
    alone = weigh_fixed_row(None, case, 67)
    assert sum(ranks.call(2, weigh_fixed_row, case, 67)) == pytest.approx(alone, rel=1e-6)


def test_a_row_that_teaches_nothing_needs_no_exchange(ranks: Ranks):
    for config in (EAGLE3, DFLASH):
        for result in ranks.call(2, compute_loss, Case(config, [20], [[]])):
            assert result.total == result.weight == 0


def test_every_rank_may_hold_features_of_its_own_part_alone(ranks: Ranks):
    """No rank makes anything of the whole row but keys, values, queries and what attention makes of them."""
    for config in (EAGLE3, DFLASH):
        case = Case(config, *LONG, info=WIDE)
        num_tokens = sum(case.lengths)

        def states_of_all_tokens(result: Watched, num_tokens: int = num_tokens) -> set[tuple[int, ...]]:
            return {s for s in result.shapes if s[:1] == (num_tokens,) and math.prod(s) >= num_tokens * 96}

        assert states_of_all_tokens(watch_loss(None, case)), "the premise: one rank alone makes them"
        for exchange in EXCHANGES:
            for result in ranks.call(2, watch_loss, dataclasses.replace(case, exchange=exchange)):
                assert not states_of_all_tokens(result)


@pytest.mark.parametrize("config", [EAGLE3, DFLASH], ids=["eagle3", "dflash"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_of_two_ranks_needs_little_more_than_half_the_memory(ranks: Ranks, config, checkpointing: bool):
    case = Case(config, *LONG, {"activation_checkpointing": checkpointing, "head_chunk_tokens": 256}, WIDE)
    alone = watch_loss(None, case)
    for exchange in EXCHANGES:
        for result in ranks.call(2, watch_loss, dataclasses.replace(case, exchange=exchange)):
            assert result.peak_bytes < 0.6 * alone.peak_bytes


@pytest.mark.long
@pytest.mark.parametrize("config", [EAGLE3, DFLASH], ids=["eagle3", "dflash"])
def test_rows_of_65536_tokens_are_trained_by_two_ranks_that_each_hold_their_part(ranks: Ranks, config):
    case = Case(config, *OF_64K)
    assert sum(case.lengths) == 65536
    shares, alone = ranks.call(2, compute_loss, case, timeout_s=600), compute_loss(None, case)
    figures, gradients = added(shares)
    assert figures["total"] == pytest.approx(alone.total, rel=1e-5)
    assert figures["weight"] == pytest.approx(alone.weight, rel=1e-6)
    for name, gradient in alone.gradients.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(gradients[name], gradient, rtol=1e-3, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("counts", [(3, 5), (0, 4), (2, 0, 7, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_items_go_to_heads_and_back_whatever_number_each_rank_has(ranks: Ranks, counts, dtype):
    table = np.arange(sum(counts) * 12, dtype=np.float32).reshape(-1, 4, 3)
    owner = np.repeat(np.arange(len(counts)), counts)
    for rank, (heads, back, gradient) in enumerate(ranks.call(len(counts), exchange_numbers, counts, dtype)):
        share = 4 // len(counts)
        np.testing.assert_array_equal(heads, table[:, rank * share : (rank + 1) * share])
        np.testing.assert_array_equal(back, table[owner == rank])
        # Of (rank + 1) x^2, wherever it was squared.
        np.testing.assert_allclose(gradient, 2 * (rank + 1) * table[owner == rank], rtol=1e-2)


@pytest.mark.parametrize("num_tokens", [8, 7, 5, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_gathered_and_their_gradients_added_up_also_of_parts_that_are_short_or_empty(
    ranks: Ranks, num_tokens: int, dtype
):
    table = np.arange(num_tokens * 4, dtype=np.float32).reshape(num_tokens, 2, 2)
    for num_ranks in (2, 4):
        for rank, (gathered, gradient) in enumerate(ranks.call(num_ranks, gather_numbers, num_tokens, dtype)):
            np.testing.assert_array_equal(gathered, table)
            own = table[slice(*part_range(num_tokens, Part(rank, num_ranks)))]
            weight = sum(range(1, num_ranks + 1))  # of (rank + 1) x^2, on every rank
            np.testing.assert_allclose(gradient, 2 * weight * own, rtol=1e-2)


@pytest.mark.parametrize("config", [EAGLE3, DFLASH], ids=["eagle3", "dflash"])
@pytest.mark.parametrize(("size", "changes"), [(3, {}), (8, {}), (2, {"num_heads": 3, "num_kv_heads": 1})])
def test_heads_that_cannot_be_shared_out_are_refused_with_all_numbers(config, size, changes):
    group = SequenceGroup(None, 0, size)  # type: ignore[arg-type]
    case = Case(config.model_copy(update=changes), *PACKED)
    build(case, group)
    heads, kv_heads = (changes or {"num_heads": 8, "num_kv_heads": 4}).values()
    expected = rf"sequence_parallel = {size} does not divide the draft's {heads} heads and {kv_heads} key/value heads"
    with pytest.raises(ConfigError, match=expected):
        build(dataclasses.replace(case, exchange="heads"), group)


def test_a_part_is_trained_by_the_rank_it_is_for_alone():
    case = CASES["eagle3"]
    part = part_of_row(case, build(case, None), Part(1, 2))
    for group in (None, SequenceGroup(None, 0, 2)):  # type: ignore[arg-type]
        with pytest.raises(AssertionError, match=r"Part\(index=1, count=2\)"):
            build(case, group).loss(part)


def test_whole_rows_are_trained_and_evaluated_alone_by_a_rank_that_has_a_group():
    case = CASES["dflash"]
    group = SequenceGroup(None, 0, 2)  # type: ignore[arg-type]
    algorithm = build(case, group)
    row = part_of_row(case, algorithm, Part(0, 1))
    assert algorithm.loss(row).total.item() == compute_loss(None, case).total
    assert algorithm.propose(row, torch.arange(3)).shape == (3, DFLASH.block_size - 1)


def test_a_halo_that_is_too_short_is_noticed_before_the_device_is():
    case = CASES["eagle3"]
    row = part_of_row(case, build(case, None), Part(2, 4))
    short = dataclasses.replace(row.features, greedy=row.features.greedy[:17])
    with pytest.raises(AssertionError, match="halo"):
        plan_slots(dataclasses.replace(row, features=short), EAGLE3.num_depths, 64, torch.device("cpu"))
    assert INFO.num_kv_heads == 4
