"""The DFlash draft: decoder layers in which a block of slots attends to the target's states and to itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from paceline.drafts.attention import Visibility, attend_context, build_visibility, merge_own
from paceline.drafts.compiling import compile_rows
from paceline.drafts.layers import RMSNorm, Rotary, SwiGLU, rotate
from paceline.drafts.sequence import ALONE, Exchange

CosSin = tuple[Tensor, Tensor]
KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Everything that shapes the draft's weights, and its attention pattern."""

    hidden_size: int
    num_captured: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    block_size: int
    windows: tuple[int | None, ...]
    """One a draft layer: the window of a sliding layer, None for full attention."""


@dataclass(frozen=True, slots=True)
class BlockGeometry:
    """Where a set of blocks lies: positions, and the context keys their slots see in each kind of layer."""

    cos_sin: CosSin
    """Of this rank's slots' positions in their documents, [A, B, 1, head_dim]."""
    visible: dict[int | None, Visibility]
    """By window (None: full attention)."""
    own_bias: dict[int | None, Tensor]
    """By window: fp32[B, B], 0, or -inf where slot i does not see slot j of its block."""


class BlockAttention(nn.Module):
    """Attention of block slots to context keys before their anchor and to their own block."""

    def __init__(self, sizes: Sizes, window: int | None) -> None:
        super().__init__()
        hidden, heads, kv_heads, head_dim = sizes.hidden_size, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(head_dim, sizes.norm_eps)
        self.k_norm = RMSNorm(head_dim, sizes.norm_eps)
        self.head_dim, self.window = head_dim, window

    def queries(self, states: Tensor, cos_sin: CosSin) -> Tensor:
        """[..., heads, head_dim] of [..., H]."""
        return rotate(self.q_norm(self.q_proj(states).unflatten(-1, (-1, self.head_dim))), cos_sin)

    def keys_values(self, states: Tensor, cos_sin: CosSin) -> KeysValues:
        """k and v, each [..., kv_heads, head_dim], of [..., H]."""
        k = rotate(self.k_norm(self.k_proj(states).unflatten(-1, (-1, self.head_dim))), cos_sin)
        return k, self.v_proj(states).unflatten(-1, (-1, self.head_dim))

    def merge_block(self, q: Tensor, own: KeysValues, own_bias: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        """[A, B, heads * head_dim]: attention to the context joined with attention inside each block.

        Args:
            q: [A, B, heads, head_dim]. own: k and v, [A, B, kv_heads, head_dim].
            own_bias: fp32[B, B], -inf where a slot does not see another of its block.
            context: out [A, B, heads, head_dim] and lse [A, B, heads] of attention to the context.
        """
        num_blocks, size, heads, head_dim = q.shape
        kv_heads = own[0].shape[2]
        # One small product a block and key head, in fp32: its scores meet the context's fp32 logsumexp.
        queries = q.view(num_blocks, size, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4).float()
        k, v = (keys.transpose(1, 2).float() for keys in own)
        products = queries.flatten(2, 3) @ k.transpose(2, 3) / math.sqrt(head_dim)
        scores = (products.view(num_blocks, heads, size, size) + own_bias).transpose(1, 2)

        def weigh(weights: Tensor) -> Tensor:
            grouped = weights.transpose(1, 2).reshape(num_blocks, kv_heads, -1, size)
            return (grouped @ v).view(num_blocks, heads, size, head_dim).transpose(1, 2)

        merged: Tensor = merge_own(context, scores, weigh).flatten(2)
        return merged


class DFlashLayer(nn.Module):
    """One decoder layer (Qwen3 style: per-head norms, SwiGLU)."""

    def __init__(self, sizes: Sizes, window: int | None) -> None:
        super().__init__()
        self.self_attn = BlockAttention(sizes, window)
        self.mlp = SwiGLU(sizes.hidden_size, sizes.intermediate_size)
        self.input_layernorm = RMSNorm(sizes.hidden_size, sizes.norm_eps)
        self.post_attention_layernorm = RMSNorm(sizes.hidden_size, sizes.norm_eps)


def _read_states(draft: DFlashDraft, captured: Tensor) -> Tensor:
    """c [T, H] of captured states [T, L * H]."""
    c: Tensor = draft.hidden_norm(draft.fc(captured))
    return c


def _context_keys(layer: DFlashLayer, c: Tensor, cos_sin: CosSin) -> KeysValues:
    """The context's keys and values in one layer; c gets no layer norm."""
    return layer.self_attn.keys_values(c, cos_sin)


def _project(layer: DFlashLayer, x: Tensor, cos_sin: CosSin) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of block slots."""

    def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = layer.input_layernorm(x)
        return layer.self_attn.queries(h, cos_sin), *layer.self_attn.keys_values(h, cos_sin)

    q, k, v = _keep_products(project, x)
    return q, k, v


def _finish(
    layer: DFlashLayer, x: Tensor, q: Tensor, own: KeysValues, own_bias: Tensor, context: tuple[Tensor, Tensor]
) -> Tensor:
    """The layer's output from its attention to the context."""

    def finish(x: Tensor, q: Tensor, own: KeysValues, context: tuple[Tensor, Tensor]) -> Tensor:
        x = x + layer.self_attn.o_proj(layer.self_attn.merge_block(q, own, own_bias, context))
        out: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
        return out

    finished: Tensor = _keep_products(finish, x, q, own, context)
    return finished


def _keep_products(function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs); compiled code keeps for the backward pass only inputs and outputs of linear layers.

    What is cheap between them is repeated. Left alone, the compiler also keeps the results of norms and activations and
    fp32 copies of what attention inside a block reads: half of all that a layer keeps.
    """
    if not torch.compiler.is_compiling():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_linear_outputs)


def _keep_linear_outputs() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])


def _norm_slots(draft: DFlashDraft, x: Tensor, slots: Tensor) -> Tensor:
    """[N, H]: final states of chosen slots, block * B + slot each."""
    states: Tensor = draft.norm(x.flatten(0, 1).index_select(0, slots))
    return states


class DFlashDraft(nn.Module):
    """fc + norm over captured states, decoder layers over blocks, a final norm; no embedding, no head.

    Compiled are the pieces around attention to the context, which chooses its own kernel.
    """

    def __init__(self, sizes: Sizes, rotary: Rotary, compile_pieces: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(sizes.num_captured * sizes.hidden_size, sizes.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(sizes.hidden_size, sizes.norm_eps)
        self.layers = nn.ModuleList([DFlashLayer(sizes, window) for window in sizes.windows])
        self.norm = RMSNorm(sizes.hidden_size, sizes.norm_eps)
        self.sizes = sizes
        self._rotary = rotary
        self._compile_pieces = compile_pieces

    def read_context(self, captured: Tensor, positions: Tensor) -> list[KeysValues]:
        """Keys and values of every layer for the target's states.

        Args:
            captured: [T, L * H]. positions: int[T], each token's index in its document.
        """
        c = self._piece(_read_states)(self, captured)
        cos_sin = self._rotary(positions, c.dtype)
        return [self._piece(_context_keys)(layer, c, cos_sin) for layer in self._decoder_layers()]

    def place_blocks(
        self, first: Tensor, anchors: Tensor, num_keys: int, dtype: torch.dtype, exchange: Exchange = ALONE
    ) -> BlockGeometry:
        """Geometry of blocks.

        Args:
            first: int64[A], context key where the anchor's document starts. anchors: int64[A], also context keys.
            num_keys: T.
            exchange: `first` and `anchors` are those of the blocks of all its ranks.
        """
        size = self.sizes.block_size
        slots = torch.arange(size, device=anchors.device)
        positions = ((anchors - first)[:, None] + slots).flatten()
        starts, ends = first.repeat_interleave(size), anchors.repeat_interleave(size)
        visible, own_bias = {}, {}
        for window in set(self.sizes.windows):
            begin = starts
            if window is not None:
                begin = torch.maximum(starts, starts + positions - window + 1)
            visible[window] = build_visibility(begin, ends, num_keys, exchange)
            own_bias[window] = _own_bias(size, window, anchors.device)
        cos, sin = self._rotary(positions[exchange.own], dtype)
        return BlockGeometry((cos.unflatten(0, (-1, size)), sin.unflatten(0, (-1, size))), visible, own_bias)

    def forward(
        self,
        x: Tensor,
        context: list[KeysValues],
        geometry: BlockGeometry,
        slots: Tensor,
        checkpoint_layers: bool = False,
    ) -> Tensor:
        """[N, H]: what the head reads, for the chosen `slots` int64[N] (block * B + slot) of block inputs [A, B, H]."""
        for layer, keys_values in zip(self._decoder_layers(), context, strict=True):
            if checkpoint_layers and torch.is_grad_enabled():
                x = checkpoint(
                    self._run_layer, layer, x, keys_values, geometry, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = self._run_layer(layer, x, keys_values, geometry)
        states: Tensor = self._piece(_norm_slots)(self, x, slots)
        return states

    def _run_layer(self, layer: DFlashLayer, x: Tensor, keys_values: KeysValues, geometry: BlockGeometry) -> Tensor:
        q, k, v = self._piece(_project)(layer, x, geometry.cos_sin)
        # Compiled code gets [A, B, ...]: from [A * B, ...] it would have to reason about A * B // B everywhere.
        window = layer.self_attn.window
        attended, lse = attend_context(q.flatten(0, 1), *keys_values, geometry.visible[window])
        context = attended.unflatten(0, q.shape[:2]), lse.unflatten(0, q.shape[:2])
        out: Tensor = self._piece(_finish)(layer, x, q, (k, v), geometry.own_bias[window], context)
        return out

    def _piece(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Evaluation and decoding run blocks of many shapes without gradients: not worth compiling for.
        return _compiled(function) if self._compile_pieces and torch.is_grad_enabled() else function

    def _decoder_layers(self) -> list[DFlashLayer]:
        return [layer for layer in self.layers if isinstance(layer, DFlashLayer)]


def _own_bias(size: int, window: int | None, device: torch.device) -> Tensor:
    """fp32[B, B]: all of the block is seen, in a sliding layer only what is at or before a slot, in its window."""
    if window is None:
        return torch.zeros(size, size, device=device)
    slot = torch.arange(size, device=device)
    distance = slot[:, None] - slot[None, :]
    return torch.zeros(size, size, device=device).masked_fill((distance < 0) | (distance >= window), -math.inf)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled function for all layers: their weights are its inputs.

    Only sizes seen to change (blocks in a row, tokens) become symbols. With dynamic=True block size and heads would be
    symbols, too, and the many reshapes of `merge_block` then take minutes to compile.
    """
    return compile_rows(function)
