"""What every draft algorithm must do, shown for DFlash."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from overfit import ModelWeights, acceptance_length, greedy_rows, pack
from paceline.config.drafts import DFlashConfig
from paceline.drafts.dflash.algorithm import DFlash
from paceline.schema.features import FeatureRow
from rows import make_context, make_row, random_features, tiny_info

INFO = tiny_info()
CONFIG = DFlashConfig(num_layers=2, block_size=4, anchor_every=3)


def build(config: DFlashConfig = CONFIG, info=INFO, **changes) -> DFlash:
    algorithm = DFlash(config, make_context(info, **changes))
    with torch.no_grad():
        for parameter in algorithm.draft.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return algorithm


def features(algorithm: DFlash, lengths, spans, **changes) -> FeatureRow:
    row = make_row(lengths, spans, **changes)
    return random_features(row, DFlash.feature_spec(algorithm.config, INFO, evaluation=True), INFO)


DOCUMENTS = {4: (21, [(3, 12), (13, 20)]), 9: (7, [(0, 7)]), 2: (16, [(10, 16)])}


def packed(algorithm: DFlash, ids: list[int]) -> FeatureRow:
    chosen = [DOCUMENTS[i] for i in ids]
    return features(algorithm, [n for n, _ in chosen], [s for _, s in chosen], sample_ids=ids)


def test_packing_and_order_do_not_change_the_loss():
    algorithm = build()
    alone = [algorithm.loss(packed(algorithm, [i])) for i in DOCUMENTS]
    total, weight = sum(t.total.item() for t in alone), sum(t.weight.item() for t in alone)
    for order in ([4, 9, 2], [2, 9, 4], [9, 4, 2]):
        together = algorithm.loss(packed(algorithm, order))
        assert together.weight.item() == pytest.approx(weight, rel=1e-6)
        assert together.total.item() == pytest.approx(total, rel=1e-6)
        for metric in ("accuracy", "loss"):
            summed = sum(t.metrics[metric] for t in alone)
            assert torch.allclose(together.metrics[metric], summed, rtol=1e-5)


def test_unsupervised_padding_does_not_change_the_loss():
    algorithm = build()
    bare = algorithm.loss(packed(algorithm, [4, 9]))
    (long, spans), (short, more) = DOCUMENTS[4], DOCUMENTS[9]
    padded = algorithm.loss(features(algorithm, [long, short, 33], [spans, more, []], sample_ids=[4, 9, 11]))
    assert padded.total.item() == pytest.approx(bare.total.item(), rel=1e-6)
    assert padded.weight.item() == bare.weight.item()


@pytest.mark.parametrize("lengths", [[12, 9], []], ids=["no supervised token", "no token"])
def test_a_row_that_teaches_nothing_has_weight_zero_and_zero_gradients(lengths):
    algorithm = build()
    terms = algorithm.loss(features(algorithm, lengths, [[] for _ in lengths]))
    assert terms.total.item() == 0
    assert terms.weight.item() == 0
    assert terms.metrics["loss"].tolist() == [[0.0] * 3] * 2
    terms.total.backward()
    for parameter in algorithm.draft.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_another_epoch_draws_other_anchors():
    algorithm = build()
    spans = [[(0, 90)]]
    first, again, other = (algorithm.loss(features(algorithm, [90], spans, epoch=e)) for e in (0, 0, 1))
    assert first.total.item() == again.total.item()
    assert first.total.item() != other.total.item()


def test_proposals_see_only_their_own_document_before_the_anchor():
    algorithm = build()
    row = packed(algorithm, [4, 9, 2])
    starts = torch.tensor([3, 24, 38])  # one in each document
    before = algorithm.propose(row, starts)
    hidden = row.features.hidden
    unseen = torch.ones(44, dtype=torch.bool)
    for start, document in zip(starts.tolist(), (0, 21, 28), strict=True):
        unseen[document:start] = False
    assert before.shape == (3, 3)
    hidden[unseen] = torch.randn(hidden[unseen].shape) * 10
    assert torch.equal(algorithm.propose(row, starts), before)
    hidden[~unseen] = torch.randn(hidden[~unseen].shape)
    assert not torch.equal(algorithm.propose(row, starts), before)


SLIDING = CONFIG.model_copy(update={"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 6})


@pytest.mark.parametrize("config", [CONFIG, SLIDING], ids=["full", "sliding"])
def test_the_decoder_proposes_what_the_walk_proposes(config):
    algorithm = build(config, head_chunk_tokens=20)  # several chunks of blocks
    length = 400  # the cache grows twice
    row = features(algorithm, [length], [[(0, length)]])
    tokens = torch.from_numpy(row.row.tokens).long()
    captured = row.features.hidden.flatten(1)
    decoder = algorithm.decoder()
    starts, sizes = [], [5, 1, 3, 200, 4, 1, 180]
    proposed = []
    with torch.no_grad():
        for size in sizes:
            begin = starts[-1] if starts else 0
            decoder.extend(captured[begin : begin + size], tokens[begin + 1 : begin + size + 1])
            starts.append(begin + size)
            proposed.append(decoder.propose())
            assert torch.equal(decoder.propose(), proposed[-1])
    assert decoder.num_drafted == algorithm.num_drafted == 3
    assert torch.equal(torch.stack(proposed), algorithm.propose(row, torch.tensor(starts)))


def test_it_overfits_eight_rows_of_the_targets_own_greedy_answers(tiny_target):
    model = AutoModelForCausalLM.from_pretrained(tiny_target).eval()
    info = tiny_info(
        num_layers=4,
        vocab_size=300,
        num_tokenizer_tokens=261,
        mask_token_id=261,
        rope={"theta": model.config.rope_parameters["rope_theta"]},
    )
    config = DFlashConfig(num_layers=2, block_size=4, anchor_every=1, loss_gamma=100.0)
    algorithm = DFlash(config, make_context(info, weights=ModelWeights(model)))
    rows = greedy_rows(model, DFlash.feature_spec(config, info).layers, count=8, prompt=4, length=28)
    assert acceptance_length(algorithm, rows) < 2
    together = pack(rows)
    with torch.no_grad():
        algorithm.draft.norm.weight.fill_(4.0)  # logits of a hidden size of 32 are small, and slow to grow
    optimizer = torch.optim.Adam(algorithm.draft.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=110)
    for _ in range(110):
        terms = algorithm.loss(together)
        optimizer.zero_grad()
        (terms.total / terms.weight).backward()
        optimizer.step()
        schedule.step()
    assert acceptance_length(algorithm, rows) == algorithm.num_drafted + 1
