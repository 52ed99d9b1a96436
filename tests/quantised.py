"""Checkpoints in the formats that quantisers publish: weights of decoder layers rounded to four or eight bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from paceline.target.opening import ServedEngine
from paceline.target.selftest.reference import observe
from paceline.target.selftest.texts import build_texts

GROUP = 32
"""Weights of one output that share a scale."""
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each four bits of an int32 belong to, lowest first."""
BLOCK = 128
"""Rows and columns of the weights that share a scale, in fp8."""
FOUR_BITS = ("awq", "gptq")
CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]},
}


def save_quantised(plain: Path, directory: Path, kind: str) -> Path:
    """Write `plain` as `kind` into `directory`, and what that means as plain weights into "unpacked" beside it.

    Returns:
        The folder of the plain weights.
    """
    unpacked = directory.with_name(f"{directory.name}-unpacked")
    packed_tensors: dict[str, Tensor] = {}
    plain_tensors: dict[str, Tensor] = {}
    pack = _PACKERS[kind]
    for file in sorted(plain.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if not name.endswith("_proj.weight"):
                packed_tensors[name] = plain_tensors[name] = tensor
                continue
            packed, meant = pack(tensor)
            stem = name.removesuffix("weight")
            packed_tensors |= {stem + end: value.contiguous() for end, value in packed.items()}
            plain_tensors[name] = meant.contiguous()
    for folder, tensors in ((directory, packed_tensors), (unpacked, plain_tensors)):
        shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS[kind]}))
    return unpacked


def reference_of(plain: Path, engine: ServedEngine, path: Path) -> Path:
    """A file of what transformers says of plain weights in fp32, about the texts that `engine` will be asked for."""
    info = engine.info()
    texts = build_texts(info.num_tokenizer_tokens, info.max_position_embeddings)
    model = AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager", dtype="float32").eval()
    observe(model, texts, "of other weights").save(path)
    return path


def _pack_awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    grouped = weight.float().unflatten(1, (-1, GROUP))
    low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    steps = ((grouped / scale).round() + zero).clamp(0, 15)

    def packed(steps: Tensor) -> Tensor:
        """[n, out / 8] of [out, n]."""
        return _into_int32(steps.T.unflatten(1, (-1, 8))[:, :, list(_AWQ_ORDER)])

    tensors = {
        "qweight": packed(steps.flatten(1)),
        "qzeros": packed(zero.flatten(1)),
        "scales": scale.flatten(1).T.half(),
    }
    return tensors, ((steps - zero) * scale).flatten(1).to(weight.dtype)


def _pack_gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    grouped = weight.float().unflatten(1, (-1, GROUP))
    scale = (grouped.abs().amax(-1, keepdim=True) / 7).half().float()
    steps = ((grouped / scale).round() + 8).clamp(0, 15)
    zero = torch.full((steps.shape[1], len(steps)), 7)  # one less than it is, as the format has it
    tensors = {
        "qweight": _into_int32(steps.flatten(1).T.unflatten(0, (-1, 8)).transpose(1, 2)),
        "qzeros": _into_int32(zero.unflatten(1, (-1, 8))),
        "scales": scale.flatten(1).T.half(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return tensors, ((steps - 8) * scale).flatten(1).to(weight.dtype)


def _pack_fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    blocks = weight.float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    steps = (blocks / scale).to(torch.float8_e4m3fn)
    tensors = {"weight": steps.flatten(2).flatten(0, 1), "weight_scale_inv": scale.flatten(2).flatten(1)}
    return tensors, (steps.float() * scale).flatten(2).flatten(0, 1).to(weight.dtype)


def _into_int32(steps: Tensor) -> Tensor:
    """Eight numbers of four bits, the last dimension, lowest first."""
    shifted = steps.long() << (4 * torch.arange(8))
    total = shifted.sum(-1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).int()


_PACKERS: dict[str, Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]] = {
    "awq": _pack_awq,
    "gptq": _pack_gptq,
    "fp8": _pack_fp8,
}
