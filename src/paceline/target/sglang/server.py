"""The command line of an SGLang server that writes hidden states."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from paceline.config.target import TargetConfig
from paceline.target.engines.flags import check_not_set, find_options, option_name, write_flags
from paceline.target.engines.interface import EngineAddress
from paceline.target.engines.own_files import NAMES_BEGIN
from paceline.target.engines.programs import EngineProgram, free_port
from paceline.target.hf.loading import resolve_dtype

HOOK_FACTORY = "paceline_sglang_hooks:build_hook"
_OWN_FLAGS = (
    *("model", "model-path", "host", "port", "config", "api-key", "admin-api-key", "forward-hooks"),
    *("disable-radix-cache", "disable-cuda-graph", "skip-tokenizer-init"),
    # Each of these would change, cut, mix or spread what a hook sees.
    *("allow-auto-truncate", "enable-mixed-chunk", "speculative-algorithm", "enable-dp-attention", "enable-lora"),
    *("enable-two-batch-overlap", "pp-size", "pipeline-parallel-size", "disaggregation-mode", "enable-pdmux"),
    *("enable-attn-tp-input-scattered", "attn-cp-size", "attention-context-parallel-size", "enable-prefill-cp"),
    *("enable-prefill-context-parallel", "enable-dsa-prefill-context-parallel", "enable-nsa-prefill-context-parallel"),
    *("dllm-algorithm", "attn-dp-size", "attention-data-parallel-size", "enable-layernorm-sp"),
    *("enable-megamoe-for-layernorm-sp", "enable-pd-role-switch"),
    # Each of these brings graphs back, which run no hooks.
    *("cuda-graph-config", "cuda-graph-backend-prefill", "enforce-piecewise-cuda-graph", "enable-breakable-cuda-graph"),
    # A server that speaks otherwise would never be seen to be ready.
    *(
        "grpc-mode",
        "smg-grpc-mode",
        "grpc-port",
        "sidecar",
        "encoder-only",
        "is-embedding",
        "ssl-keyfile",
        "ssl-certfile",
    ),
)
_NEGATION = None
"""Its options of yes and no say yes; no is said by leaving them out."""
SHARDING = ("tp", "tp-size", "tensor-parallel-size")
REPLICAS = ("dp", "dp-size", "data-parallel-size")
SPREADING = (*SHARDING, *REPLICAS)
"""Options that say over how many GPUs a target is spread."""
_BODIES = ("model", "language_model", "language_model.model", "model.language_model", "llm.model")
"""Where architectures keep their decoder layers."""


def capture_flags(layers: Sequence[int], directory: Path) -> list[str]:
    """Command line words with which an SGLang writes hidden states as the engine reads them.

    Args:
        layers: 0-based, ascending.
    """
    # Other clients' requests are not written, nor SGLang's own of its health.
    shared = {"layers": list(layers), "directory": str(directory), "prefix": NAMES_BEGIN}
    hooks = [_hook(f"layer {layer}", f".layers.{layer}", {**shared, "layer": layer}) for layer in layers]
    hooks.append(_hook("batch", "", {**shared, "layer": None}))
    return [
        *("--forward-hooks", json.dumps(hooks)),
        "--disable-radix-cache",  # a cached prefix is not computed again, and has no hidden states
        "--disable-cuda-graph",  # a graph runs no hooks
        "--skip-tokenizer-init",
    ]


def sglang_command(config: TargetConfig, program: EngineProgram, checkpoint: Path, address: EngineAddress) -> list[str]:
    """The command line of a server at `address`; `INSIDE` must be on its import path.

    Raises:
        ConfigError: options that are set here.
    """
    check_not_set(config.engine_args, _OWN_FLAGS, "SGLang")
    parts = urlsplit(address.url)
    return [
        *(str(program.python), "-m", "sglang.launch_server", "--model-path", str(checkpoint)),
        *("--host", str(parts.hostname), "--port", str(parts.port)),
        *capture_flags(address.layers, address.directory),
        *_flags_of_target(config, checkpoint),
        *write_flags(config.engine_args, _NEGATION),
    ]


def own_words(config: TargetConfig, key: str, root: Path) -> tuple[list[str], dict[str, str]]:
    """The key in a file: SGLang reads it from no variable, and a command line is everybody's to read.

    And the port where its processes meet, which it would choose a minute before it listens there. A command line comes
    first.
    """
    path = root / "sglang.yaml"
    options: dict[str, object] = {"api-key": key}
    if not find_options(config.engine_args, REPLICAS):  # each of several would take the same port
        options["nccl-port"] = free_port()
    path.write_text(json.dumps(options), encoding="utf-8")
    return ["--config", str(path)], {}


def _hook(name: str, end: str, config: dict[str, object]) -> dict[str, object]:
    modules = [f"{body}{end}" for body in _BODIES]
    return {"name": name, "target_modules": modules, "hook_factory": HOOK_FACTORY, "config": config}


def _flags_of_target(config: TargetConfig, checkpoint: Path) -> list[str]:
    """Settings of [target] that SGLang has, too, unless `engine_args` have them."""
    given = {option_name(name) for name in config.engine_args}
    flags: dict[str, object] = {
        "dtype": resolve_dtype(config, checkpoint),  # by itself SGLang takes fp32 for fp16
        "trust-remote-code": config.trust_remote_code,
        "log-level-http": "warning",  # otherwise a line a document, in memory
        "served-model-name": config.model.replace(":", "-"),  # it takes no colon, which a path may have
    }
    spread = given.intersection(SHARDING)
    if config.tensor_parallel > 1 and not spread:
        flags["tp-size"] = config.tensor_parallel
    if config.tensor_parallel > 1 or spread:
        # Otherwise the sum over GPUs may be left to the next layer's norm, after our hook.
        flags["enforce-disable-flashinfer-allreduce-fusion"] = True
    return write_flags({name: value for name, value in flags.items() if name not in given}, _NEGATION)
