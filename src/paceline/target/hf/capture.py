"""Computing the features of one row: hooks on decoder layers, final hidden states, greedy tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from paceline.errors import TargetError
from paceline.schema.features import FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import LogitTransform
from paceline.target.hf.attention import packed_arguments
from paceline.target.hf.loading import ModelParts

Layout = Literal["documents", "positions", "padded"]
"""How a row's documents share a forward: packed under our own attention ("documents"), packed as transformers does
it from position ids ("positions"), or as right-padded batches ("padded")."""

Put = Callable[[Tensor, Tensor], None]
"""put(buffer [T, H], states [B, n, H]): copy what belongs to the row."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """One forward of the model: its arguments, and where its outputs go in the row."""

    arguments: dict[str, Any]
    put: Put


def apply_logit_transform(logits: Tensor, transform: LogitTransform) -> Tensor:
    """fp32 logits from what the lm_head returned (its bias already added)."""
    logits = logits.float()
    if transform.scale != 1.0:
        logits = logits * transform.scale
    if transform.soft_cap is not None:
        logits = torch.tanh(logits / transform.soft_cap) * transform.soft_cap
    return logits


class RowCapture:
    """Computes features of rows with a loaded model; keeps only what a spec asks for."""

    def __init__(self, parts: ModelParts, transform: LogitTransform, layout: Layout, vocab_chunk_tokens: int) -> None:
        self._parts = parts
        self._transform = transform
        self._layout = layout
        self._vocab_chunk_tokens = vocab_chunk_tokens
        self._device = parts.device
        self._dtype = parts.state_dtype
        self._hidden_size = int(parts.config.hidden_size)
        self._rope_lengths = rope_lengths(parts.config)

    def __call__(self, request: RowRequest, spec: FeatureSpec) -> dict[str, Tensor]:
        """The tensors of Features by name, without waiting for the device; "finite" is bool[] on the device.

        Raises:
            TargetError: a layer whose output is not one state a token.
        """
        with torch.no_grad():
            return self._compute(request, spec)

    def _compute(self, request: RowRequest, spec: FeatureSpec) -> dict[str, Tensor]:
        num_tokens = len(request.tokens)
        hidden = self._empty(num_tokens, len(spec.layers), self._hidden_size)
        final = None
        for forward in self._passes(request):
            with self._keeping(spec.layers, hidden, forward.put):
                states = _states(self._parts.body(use_cache=False, **forward.arguments))
            if forward.put is _put_whole_row:
                final = states[0]
            elif spec.final_hidden != "none" or spec.greedy or spec.logsumexp:
                final = self._empty(num_tokens, self._hidden_size) if final is None else final
                forward.put(final, states)
            del states
        return self.complete(hidden, final, request, spec)

    @torch.no_grad()
    def complete(
        self, hidden: Tensor, final: Tensor | None, request: RowRequest, spec: FeatureSpec
    ) -> dict[str, Tensor]:
        """The tensors of Features from hidden states [T, L, H] and, where the spec needs them, final ones [T, H]."""
        tensors = {"hidden": hidden}
        if final is not None:
            final = final.to(self._device)
            tensors |= self._vocabulary_features(final, spec)
            tensors |= self._final_hidden(final, request, spec)
        tensors["finite"] = _all_finite([t for t in tensors.values() if t.is_floating_point()])
        return tensors

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    @contextmanager
    def _keeping(self, layers: tuple[int, ...], hidden: Tensor, put: Put) -> Iterator[None]:
        """Copy the output of each of `layers` into its slot of `hidden` [T, L, H] as it is made."""

        def keep(slot: int, module: nn.Module, arguments: Any, output: Any) -> None:
            put(hidden[:, slot], _states(output))

        handles = [
            self._parts.layers[layer].register_forward_hook(partial(keep, slot)) for slot, layer in enumerate(layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _passes(self, request: RowRequest) -> Iterator[_Pass]:
        starts, lengths = request.documents[:-1], np.diff(request.documents)
        for group in documents_of_one_rope(lengths, self._rope_lengths):
            if self._layout == "padded":
                for batch in batches_of_similar_length(lengths[group]):
                    yield self._padded_pass(request.tokens, starts[group[batch]], lengths[group[batch]])
            elif len(group) == len(lengths):
                yield self._packed_pass(request, slice(None), request.documents, _put_whole_row)
            else:
                inside = np.repeat(np.isin(np.arange(len(lengths)), group), lengths)
                in_row = self._to_device(np.flatnonzero(inside))
                bounds = np.concatenate([[0], np.cumsum(lengths[group])]).astype(np.int32)
                put = partial(_put_documents, torch.arange(len(in_row), device=in_row.device), in_row)
                yield self._packed_pass(request, inside, bounds, put)

    def _packed_pass(self, request: RowRequest, inside: slice | np.ndarray, documents: np.ndarray, put: Put) -> _Pass:
        arguments: dict[str, Any] = {
            "input_ids": self._to_device(request.tokens[inside])[None],
            "position_ids": self._to_device(request.positions[0][inside])[None],
        }
        if self._layout == "documents":
            arguments |= packed_arguments(documents, self._device)
        return _Pass(arguments, put)

    def _padded_pass(self, row_tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> _Pass:
        # No mask is needed: a causal model reads nothing to the right, where the padding is.
        longest = int(lengths.max())
        inside = np.arange(longest)[None] < lengths[:, None]
        tokens = np.zeros(inside.shape, np.int64)
        in_row = (starts[:, None] + np.arange(longest)[None])[inside]
        tokens[inside] = row_tokens[in_row]
        put = partial(_put_documents, self._to_device(np.flatnonzero(inside)), self._to_device(in_row))
        return _Pass({"input_ids": self._to_device(tokens)}, put)

    def _vocabulary_features(self, final: Tensor, spec: FeatureSpec) -> dict[str, Tensor]:
        """Greedy tokens and logsumexp, `vocab_chunk_tokens` tokens at a time: logits [T, V] never exist."""
        wanted: dict[str, Tensor] = {}
        if spec.greedy:
            wanted["greedy"] = torch.empty(len(final), dtype=torch.int32, device=final.device)
        if spec.logsumexp:
            wanted["logsumexp"] = torch.empty(len(final), dtype=torch.float32, device=final.device)
        if not wanted:
            return wanted
        for start in range(0, len(final), self._vocab_chunk_tokens):
            chunk = slice(start, start + self._vocab_chunk_tokens)
            logits = self._parts.lm_head(final[chunk])
            if spec.logsumexp or self._transform.scale != 1.0 or self._transform.soft_cap is not None:
                logits = apply_logit_transform(logits, self._transform)
            # Otherwise the largest is the largest in fp32 too, and 6 bytes a logit need not be written and read.
            if spec.greedy:
                wanted["greedy"][chunk] = logits.argmax(-1)
            if spec.logsumexp:
                wanted["logsumexp"][chunk] = logits.logsumexp(-1)
            del logits
        return wanted

    def _final_hidden(self, final: Tensor, request: RowRequest, spec: FeatureSpec) -> dict[str, Tensor]:
        if spec.final_hidden == "none":
            return {}
        if spec.final_hidden == "all":
            index = torch.arange(len(final), dtype=torch.int32, device=final.device)
            return {"final_hidden": final, "final_index": index}
        rows = [np.arange(start, end, dtype=np.int32) for start, end in request.spans]
        index = self._to_device(np.concatenate(rows) if rows else np.zeros(0, np.int32))
        return {"final_hidden": final[index.long()], "final_index": index}

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.array(array))  # a copy: a row's tokens may be a read-only view of a file
        tensor = tensor if tensor.dtype in (torch.int32, torch.int64) else tensor.long()
        if self._device.type == "cuda":
            # A copy from pageable memory would wait for everything queued on the stream.
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor


def rope_lengths(text: PretrainedConfig) -> tuple[int, ...]:
    """Lengths beyond which a text is turned by other frequencies as a whole (longrope: Phi-3, Phi-4), ascending."""
    parameters = getattr(text, "rope_parameters", None) or {}
    one_a_kind = [value for value in parameters.values() if isinstance(value, dict)]
    found = {
        int(each["original_max_position_embeddings"])
        for each in one_a_kind or [parameters]
        if each.get("rope_type") == "longrope"
    }
    return tuple(sorted(found))


def documents_of_one_rope(lengths: np.ndarray, bounds: tuple[int, ...]) -> list[np.ndarray]:
    """Documents that may share a forward: the model takes the frequencies of the longest for all that are in it."""
    if not bounds:
        return [np.arange(len(lengths))]
    kind = np.searchsorted(np.asarray(bounds), lengths)
    return [np.flatnonzero(kind == each) for each in np.unique(kind)]


def batches_of_similar_length(lengths: np.ndarray) -> list[np.ndarray]:
    """Documents grouped so that each is longer than half of its group's longest: under one token of padding a token.

    The number of groups is at most the logarithm of longest over shortest.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[np.ndarray] = []
    while len(order):
        fitting = lengths[order] * 2 > lengths[order[0]]
        batches.append(order[fitting])
        order = order[~fitting]
    return batches


def _put_whole_row(buffer: Tensor, states: Tensor) -> None:
    buffer.copy_(states[0])


def _put_documents(inside: Tensor, in_row: Tensor, buffer: Tensor, states: Tensor) -> None:
    kept = states.flatten(0, 1).index_select(0, inside.to(states.device))
    buffer.index_copy_(0, in_row, kept.to(buffer.device))


def _states(output: Any) -> Tensor:
    """[B, n, H] of a decoder layer or model body, whichever way it returns them."""
    states = output if isinstance(output, Tensor) else output[0]
    if states.dim() != 3:
        raise TargetError(f"a layer returned shape {tuple(states.shape)}, expected [batch, tokens, hidden]")
    return states


def _all_finite(tensors: list[Tensor]) -> Tensor:
    """bool[]: one reduction a tensor, nothing of its size is made and the host does not wait."""
    norms = [torch.linalg.vector_norm(t, ord=float("inf")).float() for t in tensors if t.numel()]
    return torch.stack(norms).isfinite().all() if norms else torch.tensor(True)
