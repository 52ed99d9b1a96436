"""EAGLE-3's loss against a naive version in fp64: one slot, one depth, one key at a time."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode

from paceline.config.drafts import Eagle3Config
from paceline.drafts.eagle3.algorithm import Eagle3
from paceline.drafts.vocabulary import DraftVocabulary
from paceline.errors import DraftError
from paceline.schema.target_info import LogitTransform
from rows import RandomWeights, make_context, make_row, random_features, tiny_info

INFO = tiny_info()
LENGTHS = [23, 9, 31, 2]
SPANS = [[(5, 12), (15, 23)], [(0, 9)], [(3, 4), (6, 8), (20, 31)], [(0, 2)]]
HALF = DraftVocabulary(np.arange(0, 64, 2, dtype=np.int64), 64)


def build(config=None, info=INFO, **changes):
    algorithm = Eagle3(config or Eagle3Config(num_depths=4, vocab_size=0), make_context(info, **changes))
    with torch.no_grad():  # larger than at birth, so that every path matters
        for parameter in algorithm.draft.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
            else:
                parameter.add_(torch.linspace(-0.3, 0.3, len(parameter)))
    return algorithm


def features_of(algorithm, row, info=INFO, evaluation=False):
    return random_features(row, algorithm.feature_spec(algorithm.config, info, evaluation), info)


def naive_loss(algorithm, feature_row, info=INFO):  # noqa: C901 - one loop a line of the definition
    """(sum, weight, {name: gradient}) by the book, with the row's documents taken one by one."""
    weights = {n: p.detach().double().requires_grad_() for n, p in algorithm.draft.named_parameters()}
    row, features = feature_row.row, feature_row.features
    raw = algorithm.context.weights
    embedding, ids = raw.embedding().double(), torch.from_numpy(algorithm.context.vocabulary.ids)
    target_head, bias = raw.lm_head().double()[ids], raw.lm_head_bias()
    final = dict(zip(features.final_index.tolist(), features.final_hidden.double(), strict=True))
    in_draft = {int(t): j for j, t in enumerate(ids)}
    shape = algorithm.shape
    groups = shape.num_heads // shape.num_kv_heads

    def norm(x, name):
        return weights[name] * x * torch.rsqrt(x.pow(2).mean() + shape.norm_eps)

    def turn(x, position):
        half = shape.head_dim // 2
        angle = position * info.rope.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        cos, sin = torch.cat([angle.cos()] * 2), torch.cat([angle.sin()] * 2)
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def heads(x, name, count):
        return (weights[f"midlayer.self_attn.{name}.weight"] @ x).view(count, shape.head_dim)

    total, weight = torch.zeros((), dtype=torch.float64), 0
    for begin, end in zip(row.documents[:-1].tolist(), row.documents[1:].tolist(), strict=True):
        tokens = row.tokens[begin:end].tolist()
        spans = [(s - begin, e - begin) for s, e in row.spans.tolist() if begin <= s < end]
        hidden = features.hidden[begin:end].double().flatten(1)

        def mixed(token, g):
            return torch.cat(
                [norm(embedding[token], "midlayer.input_layernorm.weight"), norm(g, "midlayer.hidden_norm.weight")]
            )

        def key_value(x, position):
            k = turn(heads(x, "k_proj", shape.num_kv_heads), position)
            return k.repeat_interleave(groups, 0), heads(x, "v_proj", shape.num_kv_heads).repeat_interleave(groups, 0)

        fused = [weights["fc.weight"] @ h for h in hidden]
        base = [key_value(mixed(tokens[j + 1], fused[j]), j) for j in range(len(tokens) - 1)]
        for t in range(len(tokens) - 2):
            g, own = fused[t], []
            for k in range(algorithm.config.num_depths):
                last = t + 2 + k
                if last >= len(tokens) or not any(s <= t + 1 and last < e for s, e in spans):
                    break
                x = mixed(tokens[t + 1 + k], g)
                if k:
                    own.append(key_value(x, t + k))
                q = turn(heads(x, "q_proj", shape.num_heads), t + k)
                seen = base[: t + 1] + own
                scores = torch.stack([(q * key).sum(-1) for key, _ in seen]) / math.sqrt(shape.head_dim)
                share = torch.softmax(scores, 0)
                out = sum(share[i][:, None] * value for i, (_, value) in enumerate(seen)).flatten()
                g = g + weights["midlayer.self_attn.o_proj.weight"] @ out
                y = norm(g, "midlayer.post_attention_layernorm.weight")
                gate = silu(weights["midlayer.mlp.gate_proj.weight"] @ y) * (weights["midlayer.mlp.up_proj.weight"] @ y)
                g = g + weights["midlayer.mlp.down_proj.weight"] @ gate
                taught_by = begin + t + 1 + k
                if int(features.greedy[taught_by]) not in in_draft:
                    continue
                teacher = target_head @ final[taught_by]
                teacher = teacher + (bias.double()[ids] if bias is not None else 0)
                teacher = teacher * info.logit_transform.scale
                if cap := info.logit_transform.soft_cap:
                    teacher = cap * torch.tanh(teacher / cap)
                log_q = torch.log_softmax(weights["lm_head.weight"] @ norm(g, "norm.weight"), 0)
                total = total - algorithm.config.depth_decay**k * (torch.softmax(teacher, 0) * log_q).sum()
                weight += k == 0
    total.backward()
    return total.item(), weight, {n: w.grad for n, w in weights.items()}


def assert_agrees_with_naive(algorithm, feature_row, info=INFO):
    terms = algorithm.loss(feature_row)
    terms.total.backward()
    total, weight, gradients = naive_loss(algorithm, feature_row, info)
    assert weight > 3
    assert terms.weight.item() == weight
    assert terms.total.item() == pytest.approx(total, rel=1e-5)
    for name, parameter in algorithm.draft.named_parameters():
        difference = (parameter.grad.double() - gradients[name]).norm() / gradients[name].norm()
        assert difference < 2e-5, name
    return terms


def test_loss_and_gradients_equal_the_naive_version_with_the_whole_vocabulary():
    algorithm = build()
    terms = assert_agrees_with_naive(algorithm, features_of(algorithm, make_row(LENGTHS, SPANS)))
    assert terms.metrics["accuracy"][1].tolist() == [31.0, 26.0, 22.0, 18.0]


def test_loss_and_gradients_equal_the_naive_version_with_half_the_vocabulary():
    algorithm = build(vocabulary=HALF)
    assert_agrees_with_naive(algorithm, features_of(algorithm, make_row(LENGTHS, SPANS)))


def test_loss_follows_the_targets_logit_transform_and_bias():
    info = tiny_info(logit_transform=LogitTransform(scale=0.5, soft_cap=3.0, has_bias=True))
    algorithm = build(info=info, weights=RandomWeights(info, bias=True))
    assert_agrees_with_naive(algorithm, features_of(algorithm, make_row(LENGTHS, SPANS), info), info)


def test_five_captured_layers_and_other_sizes_work_as_well():
    config = Eagle3Config(
        num_depths=2,
        vocab_size=0,
        target_layers=(0, 1, 3, 5, 6),
        num_heads=2,
        num_kv_heads=1,
        head_dim=6,
        depth_decay=0.5,
    )
    algorithm = build(config)
    assert_agrees_with_naive(algorithm, features_of(algorithm, make_row(LENGTHS, SPANS)))


def loss_and_gradient(algorithm, row):
    terms = algorithm.loss(features_of(algorithm, row))
    gradients = torch.autograd.grad(terms.total, list(algorithm.draft.parameters()), materialize_grads=True)
    return terms, torch.cat([g.flatten() for g in gradients])


def test_packing_does_not_change_loss_or_gradient():
    algorithm = build()
    packed, packed_gradient = loss_and_gradient(algorithm, make_row(LENGTHS, SPANS))
    alone = [
        loss_and_gradient(algorithm, make_row([length], [spans], sample_ids=[i]))
        for i, (length, spans) in enumerate(zip(LENGTHS, SPANS, strict=True))
    ]
    assert packed.weight.item() == sum(terms.weight.item() for terms, _ in alone)
    assert packed.total.item() == pytest.approx(sum(terms.total.item() for terms, _ in alone), rel=1e-6)
    torch.testing.assert_close(packed_gradient, sum(g for _, g in alone), rtol=1e-4, atol=1e-5)


def test_a_row_without_supervised_tokens_has_no_loss_and_no_gradient():
    algorithm = build()
    terms, gradient = loss_and_gradient(algorithm, make_row([12], [[]]))
    assert terms.total.item() == terms.weight.item() == gradient.abs().sum().item() == 0


@pytest.mark.parametrize("spans", [[(3, 4)], [(0, 2)], [(10, 12)]])
def test_spans_too_short_to_draft_in_teach_only_what_lies_inside(spans):
    algorithm = build()
    terms, _ = loss_and_gradient(algorithm, make_row([12], [spans]))
    assert terms.weight.item() == max(0, min(spans[0][1] - spans[0][0] - 1, 1)) * (spans[0][0] > 0)


def test_chunking_and_checkpointing_change_nothing():
    row = make_row(LENGTHS, SPANS)
    whole, whole_gradient = loss_and_gradient(build(), row)
    small, small_gradient = loss_and_gradient(build(head_chunk_tokens=8, activation_checkpointing=True), row)
    assert small.total.item() == pytest.approx(whole.total.item(), rel=1e-6)
    torch.testing.assert_close(small_gradient, whole_gradient, rtol=1e-4, atol=1e-5)


class _LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else [out]
        self.shapes += [tuple(t.shape) for t in tensors if isinstance(t, torch.Tensor)]
        return out


def test_no_tensor_of_the_loss_has_more_than_chunk_rows_of_logits_and_no_mask_covers_depths():
    info = tiny_info(vocab_size=4096, num_tokenizer_tokens=4000, mask_token_id=4001)
    algorithm = build(info=info, head_chunk_tokens=16)
    feature_row = features_of(algorithm, make_row([200, 120], [[(10, 190)], [(5, 110)]], vocab=4000), info)
    with _LargestTensor() as seen:
        algorithm.loss(feature_row).total.backward()
    weights = {tuple(p.shape) for p in algorithm.draft.parameters()} | {(4096, 32), (32, 4096)}
    others = [shape for shape in seen.shapes if shape not in weights]
    assert any(shape[-1:] == (4096,) and len(shape) == 2 for shape in others), "the logits were seen at all"
    assert max(math.prod(shape) for shape in others if shape[-1:] == (4096,)) <= 16 * 4096
    slots, depths = 179 + 104, algorithm.config.num_depths
    masks = [shape for shape in others if len(shape) >= 2 and shape[-1] in (320 * depths, 320 + slots * (depths - 1))]
    assert not masks


def test_a_published_draft_is_read_back_bit_by_bit():
    algorithm, other = build(vocabulary=HALF), build(vocabulary=HALF, seed=1)
    row = make_row(LENGTHS, SPANS)
    before, _ = loss_and_gradient(other, row)
    other.load_published(algorithm.published_config(), algorithm.published_tensors())
    expected, _ = loss_and_gradient(algorithm, row)
    after, _ = loss_and_gradient(other, row)
    assert after.total.item() == expected.total.item() != before.total.item()


def test_decoding_token_by_token_proposes_what_the_whole_row_does():
    algorithm = build(vocabulary=HALF)
    feature_row = features_of(algorithm, make_row([40], [[(2, 40)]]), evaluation=True)
    starts = torch.arange(1, 40)
    with torch.no_grad():
        proposals = algorithm.propose(feature_row, starts)
        decoder = algorithm.decoder()
        hidden, tokens = feature_row.features.hidden.flatten(1), torch.from_numpy(feature_row.row.tokens).long()
        decoder.extend(hidden[:5], tokens[1:6])
        assert decoder.propose().tolist() == proposals[4].tolist()
        for begin, end in [(5, 6), (6, 9), (9, 30)]:
            decoder.extend(hidden[begin:end], tokens[begin + 1 : end + 1])
            assert decoder.propose().tolist() == proposals[end - 1].tolist()
    assert len({tuple(p) for p in proposals.tolist()}) > 5, "proposals depend on the text"
    assert set(proposals.flatten().tolist()) <= set(HALF.ids.tolist())


def test_proposals_see_their_own_document_only():
    algorithm = build()
    packed = features_of(algorithm, make_row([10, 20], [[(2, 10)], [(2, 20)]]), evaluation=True)
    alone = features_of(algorithm, make_row([20], [[(2, 20)]], sample_ids=[1]), evaluation=True)
    with torch.no_grad():
        from_packed = algorithm.propose(packed, torch.arange(11, 30))
        from_alone = algorithm.propose(alone, torch.arange(1, 20))
    assert from_packed.tolist() == from_alone.tolist()


@pytest.mark.parametrize("vocabulary", [HALF, None], ids=["D < V", "D = V"])
def test_a_chain_of_proposals_is_what_training_predicts_where_the_text_is_that_chain(vocabulary):
    algorithm = build(**({"vocabulary": vocabulary} if vocabulary else {}))
    with torch.no_grad():  # attention so sharp that a shift of one position shows
        algorithm.draft.midlayer.self_attn.q_proj.weight.mul_(8.0)
    depths = algorithm.config.num_depths
    for newest, length in itertools.product(range(1, 26), range(1, depths + 1)):
        # At its last depth such a span counts one slot, the one before `newest`.
        feature_row = features_of(algorithm, make_row([30], [[(newest, newest + 1 + length)]]))
        chain = algorithm.propose(feature_row, torch.tensor([newest]))[0]
        feature_row.row.tokens[newest + 1 : newest + 1 + depths] = chain.numpy()
        feature_row.features.greedy[newest : newest + depths] = chain.int()
        right, counted = algorithm.loss(feature_row).metrics["accuracy"][:, length - 1].tolist()
        assert (right, counted) == (1.0, 1.0)


def test_a_greedy_token_outside_the_draft_vocabulary_is_a_miss_and_not_in_the_loss():
    algorithm = build(vocabulary=HALF)
    feature_row = features_of(algorithm, make_row([20], [[(5, 12)]]))
    predicted = algorithm.propose(feature_row, torch.tensor([5]))[0, 0]
    feature_row.features.greedy[5:11] = predicted.int()
    inside = algorithm.loss(feature_row)
    feature_row.features.greedy[5] = 33  # odd: HALF does not have it
    outside = algorithm.loss(feature_row)
    assert (inside.weight.item(), outside.weight.item()) == (6, 5)
    # The state of token 5 teaches slot 4 at depth 0 alone.
    assert (outside.metrics["loss"][1] - inside.metrics["loss"][1]).tolist() == [-1, 0, 0, 0]
    assert (outside.metrics["accuracy"] - inside.metrics["accuracy"])[:, 0].tolist() == [-1, 0]
    assert outside.total.item() < inside.total.item()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 5e5}, "rope_theta of the published draft is 500000.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"norm_output": True}, "norm_output"),
        ({"norm_before_residual": True}, "norm_before_residual"),
        ({"eagle_config": None, "eagle_aux_hidden_state_layer_ids": [1, 4, 5]}, r"reads target layers \[0, 3, 4\]"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 3, 4]}}, r"reads target layers \[0, 3, 4\]"),
        ({"head_dim": 16}, "head_dim"),
        ({"draft_vocab_size": 64}, "draft_vocab_size"),
    ],
)
def test_a_published_draft_of_another_convention_is_refused(change, message):
    algorithm = build(vocabulary=HALF)
    with pytest.raises(DraftError, match=message):
        algorithm.load_published(algorithm.published_config() | change, algorithm.published_tensors())


def test_a_published_draft_that_names_no_layers_reads_the_default_ones():
    algorithm, other = build(), build(Eagle3Config(num_depths=4, vocab_size=0, target_layers=(0, 3, 4)))
    config = algorithm.published_config()
    for key in ("eagle_config", "eagle_aux_hidden_state_layer_ids", "num_aux_hidden_states"):
        del config[key]
    algorithm.load_published(config, algorithm.published_tensors())
    with pytest.raises(DraftError, match=r"reads target layers \[1, 3, 4\], this run captures \[0, 3, 4\]"):
        other.load_published(config, algorithm.published_tensors())
