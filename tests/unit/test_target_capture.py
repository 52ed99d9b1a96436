"""What capture keeps in memory, and that the documents of a row never meet."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from paceline.config.target import TargetConfig
from paceline.errors import TargetError
from paceline.schema.features import FeatureSpec
from paceline.schema.target_info import LogitTransform
from paceline.target.hf.attention import DOCUMENT_ATTENTION
from paceline.target.hf.capture import Layout, RowCapture, batches_of_similar_length
from paceline.target.hf.info import read_logit_transform
from paceline.target.hf.loading import ModelParts, find_parts
from paceline.target.hf.selftest import choose_layout
from tiny import tiny_config, tiny_request

EVERYTHING = FeatureSpec(layers=(0, 1, 3), final_hidden="all", greedy=True, logsumexp=True)
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "use_sliding_window": True, "sliding_window": 4}


def build_parts(architecture: str = "qwen3", attention: str = "sdpa", **changes) -> ModelParts:
    torch.manual_seed(0)
    config = tiny_config(architecture, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return find_parts(model)


def build_capture(parts: ModelParts, documents: str = "auto", chunk: int = 16) -> tuple[RowCapture, Layout]:
    layout = choose_layout(parts, TargetConfig(model="-", documents=documents))
    return RowCapture(parts, read_logit_transform(parts.config), layout, chunk), layout


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).abs().max() / reference.abs().max())


class TensorWatch(TorchDispatchMode):
    """Sees every tensor that is made, and knows which are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, ...]] = []
        self._alive: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.made += [tuple(tensor.shape) for tensor in tensors]
        self._alive += [weakref.ref(tensor) for tensor in tensors]
        return result

    def alive_bytes(self, frozen: set[int], least: int) -> int:
        """Of everything that is at least as large as `least` bytes (position tables and indices are not states)."""
        tensors = [tensor for ref in self._alive if (tensor := ref()) is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(size for place, size in storages.items() if place not in frozen and size >= least)


@contextmanager
def watching(parts: ModelParts, state_bytes: int = 0) -> Iterator[tuple[TensorWatch, list[int]]]:
    """Count the bytes alive before each decoder layer runs."""
    frozen = {t.untyped_storage().data_ptr() for t in (*parts.model.parameters(), *parts.model.buffers())}
    kept: list[int] = []
    watch = TensorWatch()

    def count(*_: object) -> None:
        kept.append(watch.alive_bytes(frozen, state_bytes))

    handles = [layer.register_forward_pre_hook(count) for layer in parts.layers]
    with watch:
        yield watch, kept
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("documents", ["packed", "padded"])
def test_three_of_24_layers_keep_at_most_five_states_of_the_row(documents: str):
    parts = build_parts("llama", num_hidden_layers=24, hidden_size=64)
    capture, _ = build_capture(parts, documents)
    request = tiny_request((64, 64, 64, 64))
    state_bytes = request.tokens.size * 64 * 4
    with watching(parts, state_bytes) as (_, kept):
        capture(request, FeatureSpec(layers=(1, 11, 22), final_hidden="all", greedy=True))
    assert len(kept) == 24
    assert 3 * state_bytes < max(kept) <= 5 * state_bytes


def test_the_count_of_kept_states_notices_one_that_keeps_them_all():
    parts = build_parts("llama", num_hidden_layers=24, hidden_size=64)
    tokens = torch.arange(256)[None]
    state_bytes = 256 * 64 * 4
    with watching(parts, state_bytes) as (_, kept), torch.no_grad():
        parts.body(input_ids=tokens, use_cache=False, output_hidden_states=True)
    assert max(kept) > 20 * state_bytes


@pytest.mark.parametrize("documents", ["packed", "padded"])
def test_logits_of_the_whole_row_never_exist(documents: str):
    parts = build_parts()
    capture, _ = build_capture(parts, documents, chunk=16)
    request = tiny_request((40, 8, 80))
    with watching(parts) as (watch, _):
        capture(request, EVERYTHING)
    head_rows = [shape[:-1] for shape in watch.made if shape[-1:] == (300,) and shape != (32, 300)]
    assert head_rows
    assert max(int(np.prod(rows)) for rows in head_rows) <= 16
    assert max(int(np.prod(shape)) for shape in watch.made) < 128 * 300 / 2


def test_a_packed_row_makes_no_mask_of_its_square():
    parts = build_parts()
    capture, layout = build_capture(parts)
    assert layout == "documents"
    with watching(parts) as (watch, _):
        capture(tiny_request((40, 8, 80)), EVERYTHING)
    assert not [shape for shape in watch.made if shape[-2:] == (128, 128)]


# transformers offers no sdpa for Gemma 2's soft-capped attention.
@pytest.mark.parametrize(
    ("architecture", "attention"),
    [(name, "sdpa") for name in ("llama", "qwen3", "qwen3_moe", "cohere")]
    + [(name, "eager") for name in ("llama", "qwen3", "qwen3_moe", "cohere", "gemma2")],
)
def test_packed_and_padded_documents_have_the_same_features(architecture: str, attention: str):
    request = tiny_request((9, 1, 30, 17, 2))
    packed, _ = build_capture(build_parts(architecture, attention), "packed")
    padded, layout = build_capture(build_parts(architecture, attention), "padded")
    assert layout == "padded"
    ours, theirs = packed(request, EVERYTHING), padded(request, EVERYTHING)
    for name in ("hidden", "final_hidden", "logsumexp"):
        assert relative(ours[name], theirs[name]) < 1e-5, name
    assert torch.equal(ours["greedy"], theirs["greedy"])


@pytest.mark.parametrize("documents", ["packed", "padded"])
@pytest.mark.parametrize("changes", [{}, SLIDING], ids=["full", "sliding"])
def test_documents_do_not_see_each_other(documents: str, changes: dict):
    capture, _ = build_capture(build_parts("qwen3", **changes), documents)
    request = tiny_request((9, 1, 30))
    before = capture(request, EVERYTHING)
    request.tokens[:9] = (request.tokens[:9] + 1) % 300
    after = capture(request, EVERYTHING)
    assert not torch.equal(before["hidden"][:9], after["hidden"][:9])
    for name in ("hidden", "final_hidden", "logsumexp", "greedy"):
        assert torch.equal(before[name][9:], after[name][9:]), name


def test_a_sliding_window_holds_in_packed_documents_longer_than_it():
    request = tiny_request((30, 3, 12))
    packed, layout = build_capture(build_parts("qwen3", **SLIDING), "packed")
    padded, _ = build_capture(build_parts("qwen3", **SLIDING), "padded")
    full, _ = build_capture(build_parts("qwen3"), "padded")
    assert layout == "documents"
    hidden = packed(request, EVERYTHING)["hidden"]
    assert relative(hidden, padded(request, EVERYTHING)["hidden"]) < 1e-5
    assert relative(hidden, full(request, EVERYTHING)["hidden"]) > 1e-2  # the window matters at this length


def test_hybrid_layers_are_padded_by_themselves_and_never_packed():
    assert build_capture(build_parts("qwen3_5"))[1] == "padded"
    with pytest.raises(TargetError, match=r"linear_attention.*\"padded\""):
        build_capture(build_parts("qwen3_5"), "packed")


def test_a_leak_between_packed_documents_is_found_when_the_target_is_loaded(monkeypatch: pytest.MonkeyPatch):
    parts = build_parts()

    def forget_documents(documents, device):
        return {"attention_mask": None}

    monkeypatch.setattr("paceline.target.hf.capture.packed_arguments", forget_documents)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    with pytest.raises(TargetError, match="changing one document changed another"):
        build_capture(parts, "packed")


def test_the_model_still_generates_as_transformers_does():
    prompt = torch.tensor([[7, 7, 7, 20, 30, 40, 50], [1, 2, 3, 4, 5, 6, 8]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    parts, untouched = build_parts(), build_parts()
    assert build_capture(parts)[1] == "documents"
    assert parts.config._attn_implementation == DOCUMENT_ATTENTION
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 256}
    assert torch.equal(parts.model.generate(prompt, **settings), untouched.model.generate(prompt, **settings))


def test_supervised_final_states_are_those_of_the_spans():
    capture, _ = build_capture(build_parts())
    request = tiny_request((9, 12), spans=[(2, 5), (9, 10), (15, 21)])
    some = capture(request, FeatureSpec((0,), "supervised"))
    everything = capture(request, FeatureSpec((0,), "all"))
    assert some["final_index"].tolist() == [2, 3, 4, 9, 15, 16, 17, 18, 19, 20]
    assert torch.equal(some["final_hidden"], everything["final_hidden"][some["final_index"].long()])


def test_only_what_a_spec_names_is_returned():
    capture, _ = build_capture(build_parts())
    tensors = capture(tiny_request((5,)), FeatureSpec((2,)))
    assert set(tensors) == {"hidden", "finite"}
    assert capture(tiny_request((5,)), FeatureSpec((), greedy=True))["hidden"].shape == (5, 0, 32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_noticed(value: float):
    parts = build_parts()
    capture, _ = build_capture(parts)
    request = tiny_request((5, 6))
    assert bool(capture(request, EVERYTHING)["finite"])
    parts.embedding.weight[int(request.tokens[8])] = value
    assert not bool(capture(request, EVERYTHING)["finite"])


def test_features_can_be_used_in_a_graph():
    capture, _ = build_capture(build_parts())
    hidden = capture(tiny_request((5,)), EVERYTHING)["hidden"]
    weight = torch.ones(32, requires_grad=True)
    (hidden * weight).sum().backward()
    assert weight.grad is not None
    assert not hidden.requires_grad


def test_padding_is_less_than_the_row_itself():
    lengths = np.random.default_rng(0).lognormal(5, 1.2, 500).astype(int) + 1
    batches = batches_of_similar_length(lengths)
    assert sorted(np.concatenate(batches)) == list(range(500))
    assert sum(int(lengths[batch].max()) * len(batch) for batch in batches) < 2 * lengths.sum()
    assert len(batches) <= np.log2(lengths.max()) + 1


def test_a_layer_that_returns_another_shape_is_refused():
    parts = build_parts()
    capture = RowCapture(parts, LogitTransform(), "padded", 16)
    parts.layers[1].register_forward_hook(lambda module, args, output: output[None])
    with pytest.raises(TargetError, match=r"expected \[batch, tokens, hidden\]"):
        capture(tiny_request((5,)), FeatureSpec((1,)))
