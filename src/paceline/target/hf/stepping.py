"""The target as a step-wise decoder: a key/value cache that can be cropped, and captured states of every forward."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from paceline.errors import ConfigError
from paceline.target.hf.capture import rope_lengths
from paceline.target.hf.loading import ModelParts, find_parts


@dataclass(frozen=True, slots=True)
class Advance:
    """What one forward of the target gives for its last tokens."""

    logits: Tensor
    """float32[m, V]: after each of the last m tokens."""
    hidden: Tensor
    """[n, L * H]: captured states of all n tokens, layers in ascending order; L may be 0."""


class TargetSequence:
    """One text being decoded by the target, batch 1.

    Layers whose cache cannot be cropped (recurrent ones) are copied before each forward; a crop puts the copy back
    and reads the tokens that stay once more. A text that grows beyond a length of longrope is read anew, as
    transformers' `generate` does it.
    """

    def __init__(self, parts: ModelParts, layers: tuple[int, ...] = ()) -> None:
        """
        Args:
            layers: capture layers, ascending; layer i is the output of the 0-based decoder layer i.

        Raises:
            ConfigError: a layer the target does not have.
        """
        num_layers = len(parts.layers)
        if layers and not 0 <= min(layers) <= max(layers) < num_layers:
            raise ConfigError(f"capture layers {list(layers)}: the target has layers 0..{num_layers - 1}")
        self._parts = parts
        self._layers = layers
        self._cache = DynamicCache(config=parts.model.config)
        self._num_tokens = 0
        self._copies: dict[int, Any] = {}
        self._newest = torch.empty(0, dtype=torch.int64)
        self._rope_lengths = rope_lengths(parts.config)
        self._text = torch.empty(0, dtype=torch.int64)
        """All tokens read so far; kept for longrope alone."""
        self._read_anew = False
        """Whether the newest `advance` crossed a length of longrope."""

    @property
    def num_tokens(self) -> int:
        """Tokens read so far."""
        return self._num_tokens

    @torch.no_grad()
    def advance(self, tokens: Tensor, num_logits: int = 0) -> Advance:
        """Read int64[n] further `tokens`; logits of the last `num_logits` of them (0: all)."""
        if self._rope_lengths:
            self._text = torch.cat([self._text, tokens.cpu()])
            end = self._num_tokens + len(tokens)
            crossed = [bound for bound in self._rope_lengths if 0 < self._num_tokens <= bound < end]
            self._read_anew = bool(crossed)
            if crossed:
                return self._advance_across(crossed, tokens, num_logits)
        return self._advance(tokens, num_logits)

    def _advance_across(self, bounds: list[int], tokens: Tensor, num_logits: int) -> Advance:
        """What each token gives where the length of the text up to it decides the frequencies of all."""
        read = self._num_tokens
        before = bounds[0] - read
        parts = [self._forward(tokens[:before], 0)] if before else []
        for start, end in pairwise([*bounds, read + len(tokens)]):
            self._forget()
            whole = self._forward(self._text[:end], end - start)
            parts.append(Advance(whole.logits, whole.hidden[start:]))
        self._newest = tokens
        logits = torch.cat([part.logits for part in parts])
        return Advance(logits[-num_logits:], torch.cat([part.hidden for part in parts]))

    def _forget(self) -> None:
        self._cache = DynamicCache(config=self._parts.model.config)
        self._num_tokens = 0
        self._copies = {}

    def _advance(self, tokens: Tensor, num_logits: int) -> Advance:
        # Recording lets fixed-size caches (sliding windows) keep what a crop may want back.
        if self._num_tokens:
            for i, layer in enumerate(self._cache.layers):
                if layer.is_croppable:
                    if hasattr(layer, "activate_past_recording"):
                        layer.activate_past_recording()
                else:
                    self._copies[i] = copy.deepcopy(layer)
        self._newest = tokens
        return self._forward(tokens, num_logits)

    @torch.no_grad()
    def crop(self, num_removed: int) -> None:
        """Forget the last `num_removed` tokens, all of them from the newest `advance` and fewer than it read.

        To be called after every `advance` but the first, with 0 too: it bounds what sliding layers keep.
        """
        if not 0 <= num_removed < len(self._newest):
            raise ValueError(f"cannot remove {num_removed} of the {len(self._newest)} tokens of the newest forward")
        if self._rope_lengths:
            self._text = self._text[: self._num_tokens - num_removed]
            if self._read_anew:
                if num_removed:
                    self._forget()
                    self._forward(self._text, num_logits=1)
                return
        if not self._copies or num_removed == 0:
            self._crop_layers(num_removed)
            return
        self._crop_layers(len(self._newest))
        for i, layer in self._copies.items():
            self._cache.layers[i] = layer
        self._copies = {}
        self._forward(self._newest[: len(self._newest) - num_removed], num_logits=1)
        self._crop_layers(0)

    def _crop_layers(self, num_removed: int) -> None:
        # By a negative count: the other ways of calling `crop` left transformers in 5.18.
        for layer in self._cache.layers:
            if layer.is_croppable:
                cast(Any, layer).crop(-num_removed)
        self._num_tokens -= num_removed

    def _forward(self, tokens: Tensor, num_logits: int) -> Advance:
        device = self._parts.device
        with _captured(self._parts.layers, self._layers) as states:
            output = self._parts.model(
                input_ids=tokens.to(device)[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=num_logits,
            )
        self._num_tokens += len(tokens)
        hidden = [states[i].to(device)[0] for i in self._layers]
        return Advance(
            logits=output.logits[0].float(),
            hidden=torch.cat(hidden, dim=-1) if hidden else torch.empty(len(tokens), 0, device=device),
        )


class SteppingTarget:
    """A loaded causal language model that starts sequences, scores texts and writes on its own."""

    def __init__(self, model: PreTrainedModel, eos_token_ids: tuple[int, ...] | None = None) -> None:
        """`eos_token_ids`: None takes the model's own generation settings.

        Raises:
            TargetError: an architecture that cannot be captured.
        """
        self.model = model.eval()
        self._parts = find_parts(model)
        self.eos_token_ids = _own_eos(model) if eos_token_ids is None else eos_token_ids

    @property
    def device(self) -> torch.device:
        return self._parts.device

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states; weights may be quantised."""
        return self._parts.state_dtype

    def sequence(self, layers: tuple[int, ...] = ()) -> TargetSequence:
        """A new, empty text with states of `layers` captured."""
        return TargetSequence(self._parts, layers)

    @torch.no_grad()
    def score(self, text: Tensor, num_logits: int) -> Tensor:
        """[num_logits, V] in the target's dtype: logits that predict the last tokens of int64[n] `text`.

        One plain forward, no cache.
        """
        output = self.model(input_ids=text[None, :-1].to(self.device), use_cache=False, logits_to_keep=num_logits)
        return cast(Tensor, output.logits[0])

    @torch.no_grad()
    def generate(self, prompt: Tensor, max_new_tokens: int) -> list[int]:
        """What transformers' own greedy `generate` writes after int64[n] `prompt`, the end token included.

        Settings of the checkpoint that would bend greedy decoding (penalties, suppressed tokens) are neutralised.
        """
        output = self.model.generate(
            prompt.to(self.device)[None],
            attention_mask=torch.ones_like(prompt, device=self.device)[None],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=list(self.eos_token_ids) or None,
            pad_token_id=self.eos_token_ids[0] if self.eos_token_ids else 0,
            **_PLAIN_GREEDY,
        )
        tokens: list[int] = cast(Tensor, output)[0, len(prompt) :].tolist()
        return tokens


_PLAIN_GREEDY: dict[str, Any] = {
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}


def _own_eos(model: PreTrainedModel) -> tuple[int, ...]:
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)


@contextmanager
def _captured(modules: nn.ModuleList, layers: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
    """Outputs of `layers` by id, filled in by forward hooks while the block runs."""
    states: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            states[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [modules[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
