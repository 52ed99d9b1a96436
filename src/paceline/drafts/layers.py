"""Building blocks that every draft shares: norm, rotary positions, MLP, weight initialisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from paceline.schema.target_info import RopeInfo


class RMSNorm(nn.Module):
    """Root-mean-square norm computed in fp32, as Llama and Qwen do it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class Rotary:
    """Cosines and sines of positions over the whole head, with the target's theta and scaling.

    No module: it holds no weights, and stays fp32 whatever the draft's dtype.
    """

    def __init__(self, rope: RopeInfo, head_dim: int, max_positions: int, device: torch.device) -> None:
        parameters = {"rope_type": "default", **(rope.scaling or {}), "rope_theta": rope.theta}
        config = LlamaConfig(
            hidden_size=head_dim,
            num_attention_heads=1,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rope_parameters=parameters,
        )
        embedding = LlamaRotaryEmbedding(config)
        self.inv_freq: Tensor = embedding.inv_freq.float().to(device)
        self.scale = float(embedding.attention_scaling)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [n, 1, head_dim] in `dtype`, for int [n] positions."""
        angles = positions.float()[:, None] * self.inv_freq[None, :]
        angles = torch.cat([angles, angles], -1)[:, None]
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of [n, heads, head_dim] (halves paired, as Llama does)."""
    cos, sin = cos_sin
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def init_weights(module: nn.Module, seed: int, std: float = 0.02) -> None:
    """Normal(0, std) for matrices, ones for norms, drawn on the CPU so that a device changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
            else:
                parameter.fill_(1.0)
