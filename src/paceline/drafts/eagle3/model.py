"""The EAGLE-3 draft: one decoder layer over the target's states, unrolled over its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paceline.drafts.attention import Visibility, attend_context, merge_own
from paceline.drafts.compiling import compile_rows
from paceline.drafts.layers import RMSNorm, SwiGLU, rotate

CosSin = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Eagle3Shape:
    """Sizes of the draft."""

    hidden_size: int
    num_states: int
    """n: captured layers that are fused."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    """D."""
    norm_eps: float


@dataclass(frozen=True, slots=True)
class Context:
    """Depth 0 of every token of a row, of one part of it, or of a text so far.

    Under sequence parallelism keys and values are shared: those of the whole row, of all heads or of this rank's.
    """

    states: Tensor
    """[T, H]: g_0, the fused target states."""
    mixed: Tensor
    """[T, 2H]: normed next-token embedding beside normed state, what q, k and v read."""
    keys: Tensor
    """[T, kv_heads, head_dim], rotated."""
    values: Tensor
    """[T, kv_heads, head_dim]."""

    def share(self, share_keys: Callable[[Tensor], Tensor]) -> Context:
        """With what the ranks that train the row together make of its keys and values."""
        return dataclasses.replace(self, keys=share_keys(self.keys), values=share_keys(self.values))


class _Attention(nn.Module):
    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        width, d = 2 * shape.hidden_size, shape.head_dim
        self.q_proj = nn.Linear(width, shape.num_heads * d, bias=False)
        self.k_proj = nn.Linear(width, shape.num_kv_heads * d, bias=False)
        self.v_proj = nn.Linear(width, shape.num_kv_heads * d, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * d, shape.hidden_size, bias=False)


class _Layer(nn.Module):
    """Names are those of the published layout."""

    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.hidden_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = SwiGLU(shape.hidden_size, shape.intermediate_size)

    def mix(self, embeddings: Tensor, states: Tensor) -> Tensor:
        return torch.cat([self.input_layernorm(embeddings), self.hidden_norm(states)], -1)

    def queries(self, mixed: Tensor, cos_sin: CosSin) -> Tensor:
        return rotate(self.self_attn.q_proj(mixed).unflatten(-1, (-1, self.head_dim)), cos_sin)

    def keys_values(self, mixed: Tensor, cos_sin: CosSin) -> tuple[Tensor, Tensor]:
        keys = rotate(self.self_attn.k_proj(mixed).unflatten(-1, (-1, self.head_dim)), cos_sin)
        return keys, self.self_attn.v_proj(mixed).unflatten(-1, (-1, self.head_dim))

    def finish(self, states: Tensor, attended: Tensor) -> Tensor:
        """The residual is the state before its norm."""
        states = states + self.self_attn.o_proj(attended.flatten(1))
        out: Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return out


class Eagle3Draft(nn.Module):
    """Weights that are trained, named as published (`midlayer.*`, `fc`, `norm`, `lm_head`)."""

    def __init__(self, shape: Eagle3Shape, rotary: Callable[[Tensor, torch.dtype], CosSin], compiled: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(shape.num_states * shape.hidden_size, shape.hidden_size, bias=False)
        self.midlayer = _Layer(shape)
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self._rotary = rotary
        layer = self.midlayer
        pieces: tuple[Any, ...] = (layer.mix, layer.queries, layer.keys_values, layer.finish, merge_depths)
        # Attention lies between them: each piece compiles once for rows of any size.
        self._pieces = tuple(compile_rows(piece, dynamic=True) for piece in pieces) if compiled else pieces

    def read_context(self, hidden: Tensor, next_embeddings: Tensor, positions: Tensor) -> Context:
        """Depth 0 of T tokens.

        Args:
            hidden: [T, n * H] captured states. next_embeddings: [T, H], of the token after each.
            positions: int[T], index of each token in its document.
        """
        mix, _, keys_values, _, _ = self._pieces
        states = self.fc(hidden)
        mixed = mix(next_embeddings, states)
        keys, values = keys_values(mixed, self._rotary(positions, hidden.dtype))
        return Context(states, mixed, keys, values)

    def first_depth(self, context: Context, slots: Tensor, positions: Tensor, visible: Visibility) -> Tensor:
        """g_1 [S, H] of the slots (int64[S] indices into the context)."""
        _, queries, _, finish, _ = self._pieces
        q = queries(context.mixed[slots], self._rotary(positions[slots], context.states.dtype))
        attended, _ = attend_context(q, context.keys, context.values, visible)
        out: Tensor = finish(context.states[slots], attended)
        return out

    def next_depth(
        self,
        states: Tensor,
        embeddings: Tensor,
        positions: Tensor,
        context: Context,
        visible: Visibility,
        own: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """g_{k+1} from g_k.

        Args:
            states: [S, H]. embeddings: [S, H], of the token each slot reads at this depth.
            positions: int[S], index of the slot in its document + k.
            own: keys and values [k - 1, S, kv_heads, head_dim] of the slots' depths 1 .. k-1; None at depth 1.

        Returns:
            the new states [S, H], and `own` with this depth added.
        """
        mix, queries, keys_values, finish, merge = self._pieces
        mixed = mix(embeddings, states)
        cos_sin = self._rotary(positions, states.dtype)
        q = queries(mixed, cos_sin)
        k, v = keys_values(mixed, cos_sin)
        own = (k[None], v[None]) if own is None else (torch.cat([own[0], k[None]]), torch.cat([own[1], v[None]]))
        out, lse = attend_context(q, context.keys, context.values, visible)
        return finish(states, merge(out, lse, q, *own)), own


def merge_depths(out: Tensor, lse: Tensor, q: Tensor, own_keys: Tensor, own_values: Tensor) -> Tensor:
    """Add each slot's own keys of deeper steps to its attention over the context.

    Args:
        out, lse: of `attend_context`. q: [S, heads, d]. own_keys, own_values: [m, S, kv_heads, d].
    """
    num_slots, heads, head_dim = q.shape
    kv_heads = own_keys.shape[2]
    grouped = q.view(num_slots, kv_heads, heads // kv_heads, head_dim).float()
    scores = (grouped[None] * own_keys.float()[:, :, :, None]).sum(-1) / math.sqrt(head_dim)
    # Sizes are spelled out: from no slots at all, none could be inferred.
    num_own = len(own_keys)

    def weigh(weights: Tensor) -> Tensor:
        by_group = weights.view(num_slots, kv_heads, heads // kv_heads, num_own).permute(3, 0, 1, 2)
        return (by_group[..., None] * own_values.float()[:, :, :, None]).sum(0).reshape(q.shape)

    return merge_own((out, lse), scores.permute(1, 2, 3, 0).reshape(num_slots, heads, num_own), weigh)
