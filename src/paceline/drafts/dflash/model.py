"""The DFlash draft: decoder layers in which a block of slots attends to the target's states and to itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paceline.drafts.attention import Visibility, attend_context, build_visibility, merge_own
from paceline.drafts.layers import RMSNorm, Rotary, SwiGLU, rotate
from paceline.schema.target_info import RopeInfo

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
    """Of the slots' positions in their documents, [A * B, 1, head_dim]."""
    visible: dict[int | None, Visibility]
    """By window (None: full attention)."""


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
        self.block_size, self.head_dim, self.window = sizes.block_size, head_dim, window

    def queries(self, states: Tensor, cos_sin: CosSin) -> Tensor:
        """[n, heads, head_dim] of [n, H]."""
        return rotate(self.q_norm(self.q_proj(states).unflatten(-1, (-1, self.head_dim))), cos_sin)

    def keys_values(self, states: Tensor, cos_sin: CosSin) -> KeysValues:
        """k and v, each [n, kv_heads, head_dim], of [n, H]."""
        k = rotate(self.k_norm(self.k_proj(states).unflatten(-1, (-1, self.head_dim))), cos_sin)
        return k, self.v_proj(states).unflatten(-1, (-1, self.head_dim))

    def merge_block(self, q: Tensor, own: KeysValues, context: tuple[Tensor, Tensor]) -> Tensor:
        """[n, heads * head_dim]: attention to the context joined with attention inside each block."""
        size, head_dim = self.block_size, self.head_dim
        kv_heads = own[0].shape[1]
        # One small product a block and key head, in fp32: its scores meet the context's fp32 logsumexp.
        q_blocks = q.view(-1, size, kv_heads, q.shape[1] // kv_heads, head_dim).permute(0, 2, 3, 1, 4).float()
        k_blocks = own[0].view(-1, size, kv_heads, head_dim).permute(0, 2, 3, 1).float()
        v_blocks = own[1].view(-1, size, kv_heads, head_dim).permute(0, 2, 1, 3).float()
        scores = q_blocks.flatten(2, 3) @ k_blocks / math.sqrt(head_dim)
        scores = scores.unflatten(2, (-1, size)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)
        if self.window is not None:
            unseen = self._unseen(q.device)
            scores = scores.view(-1, size, q.shape[1], size).masked_fill(unseen, -math.inf).flatten(0, 1)

        def weigh(weights: Tensor) -> Tensor:
            grouped = weights.view(-1, size, kv_heads, q.shape[1] // kv_heads, size).permute(0, 2, 3, 1, 4)
            summed: Tensor = (grouped.flatten(2, 3) @ v_blocks).unflatten(2, (-1, size))
            return summed.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)

        merged: Tensor = merge_own(context, scores, weigh).flatten(1)
        return merged

    def _unseen(self, device: torch.device) -> Tensor:
        """bool[B, 1, B]: own keys that a slot of a sliding layer does not see (served causal, in its window)."""
        assert self.window is not None
        slot = torch.arange(self.block_size, device=device)
        distance = slot[:, None] - slot[None, :]
        return ((distance < 0) | (distance >= self.window))[:, None]


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
    h = layer.input_layernorm(x)
    return layer.self_attn.queries(h, cos_sin), *layer.self_attn.keys_values(h, cos_sin)


def _finish(layer: DFlashLayer, x: Tensor, q: Tensor, own: KeysValues, context: tuple[Tensor, Tensor]) -> Tensor:
    """The layer's output from its attention to the context."""
    x = x + layer.self_attn.o_proj(layer.self_attn.merge_block(q, own, context))
    out: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
    return out


def _norm_slots(draft: DFlashDraft, x: Tensor, slots: Tensor) -> Tensor:
    """Final states of chosen slots."""
    states: Tensor = draft.norm(x.index_select(0, slots))
    return states


class DFlashDraft(nn.Module):
    """fc + norm over captured states, decoder layers over blocks, a final norm; no embedding, no head.

    Compiled are the pieces around attention to the context, which chooses its own kernel.
    """

    def __init__(
        self, sizes: Sizes, rope: RopeInfo, max_positions: int, device: torch.device, compile_pieces: bool = False
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(sizes.num_captured * sizes.hidden_size, sizes.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(sizes.hidden_size, sizes.norm_eps)
        self.layers = nn.ModuleList([DFlashLayer(sizes, window) for window in sizes.windows])
        self.norm = RMSNorm(sizes.hidden_size, sizes.norm_eps)
        self.sizes = sizes
        self._rotary = Rotary(rope, sizes.head_dim, max_positions, device)
        self._compile_pieces = compile_pieces

    def read_context(self, captured: Tensor, positions: Tensor) -> list[KeysValues]:
        """Keys and values of every layer for the target's states.

        Args:
            captured: [T, L * H]. positions: int[T], each token's index in its document.
        """
        c = self._piece(_read_states)(self, captured)
        cos_sin = self._rotary(positions, c.dtype)
        return [self._piece(_context_keys)(layer, c, cos_sin) for layer in self._decoder_layers()]

    def place_blocks(self, first: Tensor, anchors: Tensor, num_keys: int, dtype: torch.dtype) -> BlockGeometry:
        """Geometry of blocks.

        Args:
            first: int64[A], context key where the anchor's document starts. anchors: int64[A], also context keys.
            num_keys: T.
        """
        size = self.sizes.block_size
        slots = torch.arange(size, device=anchors.device)
        positions = ((anchors - first)[:, None] + slots).flatten()
        starts, ends = first.repeat_interleave(size), anchors.repeat_interleave(size)
        visible = {}
        for window in set(self.sizes.windows):
            begin = starts
            if window is not None:
                begin = torch.maximum(starts, starts + positions - window + 1)
            visible[window] = build_visibility(begin, ends, num_keys)
        return BlockGeometry(self._rotary(positions, dtype), visible)

    def forward(
        self,
        x: Tensor,
        context: list[KeysValues],
        geometry: BlockGeometry,
        slots: Tensor,
        checkpoint_layers: bool = False,
    ) -> Tensor:
        """[N, H]: what the head reads, for the chosen `slots` int64[N] of block inputs [A * B, H]."""
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
        attended = attend_context(q, *keys_values, geometry.visible[layer.self_attn.window])
        out: Tensor = self._piece(_finish)(layer, x, q, (k, v), attended)
        return out

    def _piece(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return _compiled(function) if self._compile_pieces else function

    def _decoder_layers(self) -> list[DFlashLayer]:
        return [layer for layer in self.layers if isinstance(layer, DFlashLayer)]


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled function for all layers: their weights are its inputs."""
    return torch.compile(function, dynamic=True)
