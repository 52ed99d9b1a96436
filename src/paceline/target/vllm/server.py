"""A vLLM server: how it is started so that it writes hidden states, and where it answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from paceline.config.target import TargetConfig
from paceline.errors import TargetError
from paceline.target.engines.flags import check_not_set, option_name, write_flags
from paceline.target.engines.interface import EngineAddress
from paceline.target.engines.own_files import NAMES_BEGIN
from paceline.target.engines.programs import EngineProgram, release_of
from paceline.target.hf.loading import resolve_dtype

KEY = "VLLM_API_KEY"
_CONNECTOR = "paceline_vllm_connector"
"""On vLLM's import path; it gives way to vLLM's own where that has changed."""
_MAX_SOCKET_DIRECTORY = 64
"""Characters: the system takes 107, and vLLM adds 37."""
_OWN_FLAGS = (
    *("model", "host", "port", "api-key", "speculative-config", "-sc", "kv-transfer-config"),
    *("enable-prefix-caching", "no-enable-prefix-caching", "uds", "config"),
    *("kv-offloading-size", "kv-offloading-backend"),  # each puts another connector in the place of ours
    *("ssl-keyfile", "ssl-certfile"),  # it would never be seen to be ready
)
_NEGATION = "no-"
"""Its options of yes and no are argparse.BooleanOptionalAction."""
_FIRST = (0, 24)
"""Until 0.23 a step's hidden states were cut up as if it held whole new prompts alone; beside requests of other clients
documents got states that were not theirs (read in vLLM's example_hidden_states_connector.py)."""
_FIRST_KNOWN = (0, 2)
"""Builds of vLLM's sources may call themselves 0.1.dev1, 0.0.0 or dev."""
SHARDING = ("tensor-parallel-size", "-tp", "pipeline-parallel-size", "-pp")
SPREADING = (
    *SHARDING,
    *("data-parallel-size", "-dp", "data-parallel-size-local", "-dpl", "prefill-context-parallel-size", "-pcp"),
)
"""Options that say over how many GPUs a target is spread."""


def check_version(version: str, name: str) -> None:
    """Raise TargetError for a vLLM whose hidden states are not those of the tokens they come with."""
    if _FIRST_KNOWN <= release_of(version) < _FIRST:
        first = ".".join(map(str, _FIRST))
        raise TargetError(
            f"{name} is version {version}, and vLLM before {first} gives a document hidden states that are not its own "
            f"where it computes anything but whole new prompts with it: install vLLM {first} or later"
        )


def capture_flags(layers: Sequence[int], directory: Path) -> list[str]:
    """Command line words with which a vLLM writes hidden states as the engine reads them.

    Args:
        layers: 0-based; vLLM's id i + 1 is the output of decoder layer i.
    """
    layer_ids = [layer + 1 for layer in layers]
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layer_ids}},
    }
    transfer = {
        "kv_connector": "HiddenStatesConnector",
        "kv_connector_module_path": _CONNECTOR,
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(directory), "paceline_prefix": NAMES_BEGIN},
    }
    return [
        *("--speculative-config", json.dumps(speculative)),
        *("--kv-transfer-config", json.dumps(transfer)),
        "--no-enable-prefix-caching",  # a cached prefix is not computed again, and has no hidden states
    ]


def vllm_command(config: TargetConfig, program: EngineProgram, checkpoint: Path, address: EngineAddress) -> list[str]:
    """The command line of a server at `address`; `INSIDE` must be on its import path.

    Raises:
        ConfigError: options that are set here.
        TargetError: a vLLM that is too old.
    """
    check_version(program.version, f"vLLM of {program.python}")
    check_not_set(config.engine_args, _OWN_FLAGS, "vLLM")
    parts = urlsplit(address.url)
    return [
        *(str(program.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)),
        *("--host", str(parts.hostname), "--port", str(parts.port)),
        *capture_flags(address.layers, address.directory),
        *_flags_of_target(config, checkpoint),
        *write_flags(config.engine_args, _NEGATION),
    ]


def own_words(config: TargetConfig, key: str, root: Path) -> tuple[list[str], dict[str, str]]:
    """The key as a variable, and a place for its sockets, which it leaves when it is killed."""
    del config
    sockets = {"VLLM_RPC_BASE_PATH": str(root)} if len(str(root)) <= _MAX_SOCKET_DIRECTORY else {}
    return [], {KEY: key, **sockets}


def _flags_of_target(config: TargetConfig, checkpoint: Path) -> list[str]:
    """Settings of [target] that vLLM has, too, unless `engine_args` have them."""
    given = {option_name(name) for name in config.engine_args}
    flags = {
        "dtype": resolve_dtype(config, checkpoint),  # by itself vLLM takes fp32 for bf16 or fp16
        "tensor-parallel-size": config.tensor_parallel if config.tensor_parallel > 1 else None,
        "trust-remote-code": config.trust_remote_code or None,
        "served-model-name": config.model,
        "disable-uvicorn-access-log": True,  # a line a document, in memory
    }
    return write_flags({name: value for name, value in flags.items() if name not in given}, _NEGATION)
