"""A checkpoint of Qwen3-8B's shapes with random weights, for runs where only speed and memory matter.

    python benchmarks/make_random_target.py /tmp/target-8b [--layers 36] [--hidden 4096]

`--hidden` makes smaller ones of the same proportions: heads of 128, four to a key head, an MLP three times as wide.

The tokenizer is the quickstart's (its tokens are the first rows of the embedding).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

QUICKSTART_TARGET = Path(__file__).resolve().parents[1] / "src" / "paceline" / "quickstart_target"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}


def layer_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of one decoder layer, by the end of their names."""
    hidden, wide, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 128")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    num_heads = arguments.hidden // CONFIG["head_dim"]
    config = CONFIG | {
        "num_hidden_layers": arguments.layers,
        "hidden_size": arguments.hidden,
        "intermediate_size": 3 * arguments.hidden,
        "num_attention_heads": num_heads,
        "num_key_value_heads": max(1, num_heads // 4),
    }
    arguments.directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(arguments.device).manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        table = torch.empty(shape, device=arguments.device, dtype=torch.bfloat16)
        return table.normal_(0, 0.02, generator=generator).cpu()

    outer = {
        "model.embed_tokens.weight": draw((config["vocab_size"], config["hidden_size"])),
        "model.norm.weight": draw((config["hidden_size"],)),
        "lm_head.weight": draw((config["vocab_size"], config["hidden_size"])),
    }
    shards = {"model-outer.safetensors": outer}
    for first in range(0, arguments.layers, 12):
        layers = range(first, min(first + 12, arguments.layers))
        shards[f"model-layers-{first:02d}.safetensors"] = {
            f"model.layers.{i}.{name}.weight": draw(shape)
            for i in layers
            for name, shape in layer_shapes(config).items()
        }
    for file, tensors in shards.items():
        save_file(tensors, arguments.directory / file, metadata={"format": "pt"})
    index = {name: file for file, tensors in shards.items() for name in tensors}
    total = sum(t.numel() * t.element_size() for tensors in shards.values() for t in tensors.values())
    (arguments.directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    (arguments.directory / "config.json").write_text(json.dumps(config, indent=1))
    for name in TOKENIZER_FILES:
        shutil.copy(QUICKSTART_TARGET / name, arguments.directory)
    print(f"{arguments.directory}: {total / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
