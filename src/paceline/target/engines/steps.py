"""How many tokens an engine computes at once, as far as that is known before it is asked."""

from __future__ import annotations

import re

from paceline.config.target import TargetConfig
from paceline.target.engines.flags import find_options, option_name
from paceline.target.engines.interface import EngineKind

_GPU_TOKENS = 16_384
"""The most that engines choose by themselves, on the largest GPUs."""
_CPU_TOKENS = 2048
"""For each process of a vLLM on a CPU."""
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)([kKmM]?)")
_UNITS = {"": 1, "k": 1000, "K": 1024, "m": 10**6, "M": 2**20}


def step_tokens(kind: EngineKind, config: TargetConfig, on_gpu: bool) -> int:
    """As many tokens as surely fill a step, all replicas together.

    What `target.engine_args` say, or the engine's own where that is more: a step may be larger than its option.
    """
    replicas = _product(config, kind.replica_options)
    processes = max(_product(config, kind.spreading) // replicas, config.tensor_parallel)
    own = _GPU_TOKENS if on_gpu else _CPU_TOKENS * processes
    return replicas * max([own, *_numbers(config, kind.step_options)])


def num_shards(kind: EngineKind, config: TargetConfig) -> int:
    """Over how many GPUs one copy of the weights is spread, as far as `target.engine_args` say."""
    return _product(config, kind.sharding)


def is_known(kind: EngineKind, config: TargetConfig) -> bool:
    """Whether nobody else has started the engine with other options."""
    return config.engine_url is None or bool(_numbers(config, kind.step_options))


def _product(config: TargetConfig, options: tuple[str, ...]) -> int:
    product = 1
    for number in _numbers(config, options):
        product *= max(1, number)
    return product


def _numbers(config: TargetConfig, options: tuple[str, ...]) -> list[int]:
    """Values of the options that are given, vLLM's own units (8k, 8K) understood."""
    found = []
    for name, value in config.engine_args.items():
        if find_options({option_name(name): value}, options) and (number := _NUMBER.fullmatch(str(value))):
            found.append(int(float(number[1]) * _UNITS[number[2]]))
    return found
