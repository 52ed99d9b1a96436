"""The DFlash loss against a version written with plain loops and full masks in double precision."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from paceline.config.drafts import DFlashConfig
from paceline.drafts.dflash.algorithm import DFlash
from paceline.drafts.dflash.anchors import draw_anchors
from paceline.schema.features import FeatureRow
from paceline.schema.target_info import LogitTransform
from rows import RandomWeights, make_context, make_row, random_features, tiny_info

INFO = tiny_info()
SMALL = DFlashConfig(num_layers=2, block_size=4, anchor_every=3, target_layers=(1, 3, 6))
MIXED = SMALL.model_copy(
    update={
        "num_layers": 3,
        "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
        "sliding_window": 5,
        "num_heads": 6,
        "num_kv_heads": 3,
    }
)


def build(config: DFlashConfig = SMALL, **changes) -> DFlash:
    info = changes.pop("info", INFO)
    algorithm = DFlash(config, make_context(info, **changes))
    with torch.no_grad():  # weights of 0.02 would leave attention nearly uniform
        for parameter in algorithm.draft.parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            scale = 0.25 if parameter.dim() > 1 else 0.3
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return algorithm


def feature_row(lengths, spans, algorithm: DFlash, **changes) -> FeatureRow:
    row = make_row(lengths, spans, **changes)
    info = algorithm.context.info
    return random_features(row, DFlash.feature_spec(algorithm.config, info), info)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + INFO.norm_eps) * weight


def naive_rope(x: Tensor, positions: list[int]) -> Tensor:
    half = x.shape[-1] // 2
    out = x.clone()
    for row, position in enumerate(positions):
        for i in range(half):
            angle = position * INFO.rope.theta ** (-2 * i / x.shape[-1])
            first, second = x[row, :, i], x[row, :, i + half]
            out[row, :, i] = first * math.cos(angle) - second * math.sin(angle)
            out[row, :, i + half] = second * math.cos(angle) + first * math.sin(angle)
    return out


def naive_block(w: dict[str, Tensor], x: Tensor, captured: Tensor, config: DFlashConfig, heads, kv_heads) -> Tensor:
    """[B, H] after the final norm: one block behind `captured` [a, L * H], the context of its document."""
    anchor, size, dim = len(captured), config.block_size, INFO.head_dim
    c = rms(captured @ w["fc.weight"].T, w["hidden_norm.weight"])
    for i in range(config.num_layers):
        at = f"layers.{i}.self_attn."
        h = rms(x, w[f"layers.{i}.input_layernorm.weight"])
        both = torch.cat([c, h])
        q = rms((h @ w[at + "q_proj.weight"].T).view(size, heads, dim), w[at + "q_norm.weight"])
        k = rms((both @ w[at + "k_proj.weight"].T).view(-1, kv_heads, dim), w[at + "k_norm.weight"])
        v = (both @ w[at + "v_proj.weight"].T).view(-1, kv_heads, dim)
        q = naive_rope(q, list(range(anchor, anchor + size)))
        k = naive_rope(k, list(range(anchor + size)))
        seen = torch.ones(size, anchor + size, dtype=torch.bool)
        if config.layer_types and config.layer_types[i] == "sliding_attention":
            for slot in range(size):
                for position in range(anchor + size):
                    here = anchor + slot
                    seen[slot, position] = here - config.sliding_window < position <= here
        attended = []
        for head in range(heads):
            scores = q[:, head] @ k[:, head // (heads // kv_heads)].T / math.sqrt(dim)
            weights = torch.softmax(scores.masked_fill(~seen, -math.inf), -1)
            attended.append(weights @ v[:, head // (heads // kv_heads)])
        x = x + torch.cat(attended, -1) @ w[at + "o_proj.weight"].T
        h = rms(x, w[f"layers.{i}.post_attention_layernorm.weight"])
        gate, up = (h @ w[f"layers.{i}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"layers.{i}.mlp.down_proj.weight"].T
    return rms(x, w["norm.weight"])


def naive_loss(algorithm: DFlash, row: FeatureRow) -> tuple[Tensor, float, dict[str, Tensor], Tensor]:
    """(total, weight, weights with gradients, right predictions by position)."""
    config, info = algorithm.config, algorithm.context.info
    w = {name: p.detach().double().requires_grad_() for name, p in algorithm.draft.named_parameters()}
    embedding = algorithm.context.weights.embedding().double()
    head = algorithm.context.weights.lm_head().double()
    bias = algorithm.context.weights.lm_head_bias()
    heads, kv_heads = config.num_heads or info.num_heads, config.num_kv_heads or info.num_kv_heads
    total, weight, right = torch.zeros((), dtype=torch.float64), 0.0, torch.zeros(config.block_size - 1)
    tokens, plain = row.row.tokens, row.row
    for anchor in draw_anchors(plain, config.anchor_every, algorithm.context.seed).tolist():
        start = max(int(d) for d in plain.documents[:-1] if d <= anchor)
        span_end = next(int(e) for s, e in plain.spans if s <= anchor < e)
        x = embedding[[int(tokens[anchor])] + [info.mask_token_id] * (config.block_size - 1)]
        captured = row.features.hidden[start:anchor].double().flatten(1)
        states = naive_block(w, x, captured, config, heads, kv_heads)
        for k in range(1, config.block_size):
            if anchor + k >= span_end:
                break
            logits = states[k] @ head.T + (0 if bias is None else bias.double())
            logits = logits * info.logit_transform.scale
            if info.logit_transform.soft_cap:
                logits = info.logit_transform.soft_cap * torch.tanh(logits / info.logit_transform.soft_cap)
            label = int(tokens[anchor + k])
            slot_weight = math.exp(-(k - 1) / (config.loss_gamma or 7 * config.block_size / 16))
            total = total - slot_weight * torch.log_softmax(logits, -1)[label]
            weight += slot_weight
            right[k - 1] += float(logits.argmax() == label)
    return total, weight, w, right


ROWS = {
    "several documents and spans": ([23, 9, 17], [[(2, 11), (14, 20)], [(4, 9)], [(1, 16)]]),
    "an anchor without context": ([3, 6], [[(0, 3)], [(0, 2)]]),
    "short documents": ([2, 1, 2, 4], [[(0, 2)], [(0, 1)], [(0, 2)], [(1, 4)]]),
    "blocks past the end of the row": ([14], [[(10, 14)]]),
}


@pytest.mark.parametrize("config", [SMALL, MIXED], ids=["full", "sliding"])
@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS)
def test_loss_and_gradients_equal_the_naive_version(shape, config):
    algorithm = build(config)
    row = feature_row(*shape, algorithm)
    terms = algorithm.loss(row)
    terms.total.backward()
    total, weight, naive, right = naive_loss(algorithm, row)
    total.backward()
    assert terms.total.dtype == torch.float32
    assert terms.weight.item() == pytest.approx(weight, rel=1e-6)
    assert weight > 0
    assert terms.total.item() == pytest.approx(total.item(), rel=1e-5)
    assert terms.metrics["accuracy"][0].tolist() == right.tolist()
    for name, parameter in algorithm.draft.named_parameters():
        expected = naive[name].grad if naive[name].grad is not None else torch.zeros_like(naive[name])
        difference = (parameter.grad.double() - expected).norm() / max(float(expected.norm()), 1e-3)
        assert difference < 1e-4, name


def test_the_targets_own_logit_transform_reaches_the_loss():
    info = tiny_info(logit_transform=LogitTransform(scale=0.5, soft_cap=3.0, has_bias=True))
    algorithm = build(info=info, weights=RandomWeights(info, bias=True))
    row = feature_row([20], [[(3, 18)]], algorithm)
    terms = algorithm.loss(row)
    terms.total.backward()
    total, _, naive, _ = naive_loss(algorithm, row)
    total.backward()
    assert terms.total.item() == pytest.approx(total.item(), rel=1e-5)
    gradient = algorithm.draft.fc.weight.grad
    assert torch.allclose(gradient.double(), naive["fc.weight"].grad, rtol=1e-3, atol=1e-5)


def test_metrics_count_every_position_once():
    algorithm = build()
    terms = algorithm.loss(feature_row([9], [[(0, 9)]], algorithm))
    anchors = draw_anchors(make_row([9], [[(0, 9)]]), 3, 0)
    counts = [float(sum(anchor + k < 9 for anchor in anchors)) for k in (1, 2, 3)]
    assert terms.metrics["loss"][1].tolist() == counts
    decay = [math.exp(-(k - 1) / (7 * 4 / 16)) for k in (1, 2, 3)]
    weighted = sum(w * float(s) for w, s in zip(decay, terms.metrics["loss"][0], strict=True))
    assert weighted == pytest.approx(terms.total.item(), rel=1e-5)


def test_checkpointed_layers_give_the_same_gradients():
    plain, recomputed = build(MIXED), build(MIXED, activation_checkpointing=True)
    for algorithm in (plain, recomputed):
        algorithm.loss(feature_row(*ROWS["several documents and spans"], algorithm)).total.backward()
    for one, other in zip(plain.draft.parameters(), recomputed.draft.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


class LargestTensors(TorchDispatchMode):
    """Records the shapes of everything any operation returns."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor):
                self.shapes.append(tuple(tensor.shape))
        return out


def test_no_tensor_is_larger_than_a_chunk_of_logits_and_no_mask_spans_all_keys():
    info = tiny_info(vocab_size=4000, num_tokenizer_tokens=3990, mask_token_id=3990)
    chunk = 64
    algorithm = build(info=info, weights=RandomWeights(info), head_chunk_tokens=chunk)
    row = feature_row([60, 40], [[(0, 60)], [(0, 40)]], algorithm)
    with LargestTensors() as seen:
        terms = algorithm.loss(row)
        terms.total.backward()
    num_counted = int(terms.metrics["loss"][1].sum())
    assert num_counted > chunk  # all logits together would be too large
    largest = max(math.prod(shape) for shape in seen.shapes)
    assert largest == chunk * 4000
    num_slots = 64 * 4
    assert not any(num_slots in shape and 100 + num_slots in shape for shape in seen.shapes)


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_pieces_give_the_same_loss_and_gradients(checkpointing):
    plain, compiled = build(MIXED), build(MIXED, compile=True, activation_checkpointing=checkpointing)
    for name in ("several documents and spans", "an anchor without context"):
        losses = []
        for algorithm in (plain, compiled):
            algorithm.draft.zero_grad()
            losses.append(algorithm.loss(feature_row(*ROWS[name], algorithm)).total)
            losses[-1].backward()
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
        for one, other in zip(plain.draft.parameters(), compiled.draft.parameters(), strict=True):
            assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", [SMALL, MIXED], ids=["full", "sliding"])
def test_proposals_are_what_training_predicts_where_the_text_is_what_is_proposed(config):
    algorithm = build(config.model_copy(update={"anchor_every": 1}))
    size = config.block_size
    for anchor in (0, 1, 4, 9, 15):
        for length in range(2, size + 1):  # the last position of such a span is predicted by the block at its start
            row = feature_row([7, 20], [[(0, 7)], [(anchor, anchor + length)]], algorithm)
            proposed = algorithm.propose(row, torch.tensor([7 + anchor]))[0]
            row.row.spans[0] = (0, 1)  # no anchor in the first document
            room = min(size - 1, 27 - 7 - anchor - 1)
            row.row.tokens[8 + anchor : 8 + anchor + room] = proposed[:room].numpy()
            accuracy = algorithm.loss(row).metrics["accuracy"]
            assert accuracy[:, length - 2].tolist() == [1.0, 1.0]
