"""Where an engine is installed, which version it is, and what its process gets from ours."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from paceline.config.target import TargetConfig
from paceline.errors import ConfigError
from paceline.target.engines.flags import find_options
from paceline.target.engines.http_calls import ENGINE_KEY
from paceline.target.hf.loading import resolve_device

_ASK = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        print(version(name))
        break
    except PackageNotFoundError:
        pass
"""
_ASK_S = 60.0
_QUIET_PORTS = range(20_000, 30_000)
_GIVEN_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_HIGHEST_PORT = 55_535
"""SGLang 0.5.14 adds 10,000 to its own for another, which must be a port, too."""
_NUM_TRIES = 20
_NOT_HANDED_ON = ("PACELINE_TOKEN", ENGINE_KEY, "SGLANG_GRPC_PORT")
"""Secrets that are nothing to an engine that is started here, and what makes an SGLang serve gRPC, without a key."""


@dataclass(frozen=True, slots=True)
class EngineProgram:
    """An installed engine."""

    python: Path
    """The interpreter of the environment that has it."""
    version: str


def release_of(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparisons: of "0.32.0rc1" (0, 32, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def find_program(config: TargetConfig, packages: Sequence[str], install: str) -> EngineProgram:
    """The engine that `target.engine_python` has, paceline's own Python without that.

    Args:
        packages: names under which it may be installed.
        install: what to do where nothing is named, for messages.

    Raises:
        ConfigError: it is not there.
    """
    python = Path(config.engine_python or sys.executable).expanduser()
    name = f"set target.engine_python to the Python of an environment that has {config.engine}"
    remedy = name if config.engine_python else f"{install}, or {name}"
    try:
        asked = subprocess.run(  # noqa: S603  # the user's own Python
            [str(python), "-c", _ASK, *packages], capture_output=True, text=True, timeout=_ASK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"target.engine_python = {str(python)!r} cannot be run on {socket.gethostname()} ({error}): {remedy}; it "
            "must be there on every host that starts servers (all nodes of a Ray cluster)"
        ) from error
    if asked.returncode or not asked.stdout.strip():
        said = f" ({asked.stderr.strip().splitlines()[-1]})" if asked.stderr.strip() else ""
        raise ConfigError(f"{python} on {socket.gethostname()} has no package {' or '.join(packages)}{said}: {remedy}")
    return EngineProgram(python, asked.stdout.strip())


def child_environment(config: TargetConfig, program: EngineProgram, code: Path) -> dict[str, str]:
    """This process's variables, with the folder `code` to import from and the GPUs of `target.device` alone in sight.

    Another Python gets none of our import path: packages of one environment break another. The threads are
    `target.num_threads`, where that is set.

    Raises:
        ConfigError: as `visible_gpus`.
    """
    own = Path(sys.executable) == program.python
    path = [str(code), *([os.environ["PYTHONPATH"]] if own and os.environ.get("PYTHONPATH") else [])]
    ours = {name: value for name, value in os.environ.items() if name not in _NOT_HANDED_ON}
    threads = {} if config.num_threads is None else {"OMP_NUM_THREADS": str(config.num_threads)}
    return {**ours, **threads, **visible_gpus(config, os.environ), "PYTHONPATH": os.pathsep.join(path)}


def visible_gpus(config: TargetConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES of an engine that computes on `target.device` and the `tensor_parallel` - 1 after it.

    Raises:
        ConfigError: fewer GPUs are visible.
    """
    device = resolve_device(config.device)
    if device.type != "cuda":
        return {}
    first = device.index or 0
    chosen = range(first, first + config.tensor_parallel)
    seen = environment.get("CUDA_VISIBLE_DEVICES", "")
    names = seen.split(",") if seen else [str(index) for index in range(torch.cuda.device_count())]
    if chosen.stop > len(names):
        raise ConfigError(
            f'target.tensor_parallel = {config.tensor_parallel} from target.device = "{config.device}" on needs '
            f"{chosen.stop} GPUs, {len(names)} are visible here: lower target.tensor_parallel, or make more visible "
            "(CUDA_VISIBLE_DEVICES)"
        )
    if not _is_pinned(config):
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[index] for index in chosen)}


def check_spread(config: TargetConfig, spreading: Iterable[str], engine: str) -> None:
    """Raise ConfigError if `target.engine_args` spread a target over GPUs that `target.device` hides from the engine.

    Args:
        spreading: options that say over how many GPUs, written as for `check_not_set`.
    """
    if resolve_device(config.device).type != "cuda" or not _is_pinned(config):
        return
    given = find_options(config.engine_args, spreading)
    if given:
        raise ConfigError(
            f"target.engine_args of {engine} hold {', '.join(given)}, but target.device = {config.device!r} shows it "
            f"{config.tensor_parallel} GPUs (target.tensor_parallel): set target.tensor_parallel instead, or start a "
            'server by itself with target.device = "cuda", which shows it all'
        )


def _is_pinned(config: TargetConfig) -> bool:
    """Whether the target has GPUs of its own, of all that are visible."""
    return config.device not in ("auto", "cuda")


def free_port() -> int:
    """A port of loopback that nobody listens on, for an engine that will, a minute later.

    One that a system gives to nobody who does not ask for it, where it says which those are: others would have been
    given it meanwhile.
    """
    quiet = [port for port in _QUIET_PORTS if port < _first_given_port()]
    for port in (*random.SystemRandom().sample(quiet, min(len(quiet), _NUM_TRIES)), *[0] * _NUM_TRIES):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found: int = probe.getsockname()[1]
            if found <= _HIGHEST_PORT:
                return found
    raise ConfigError(f"no port of 127.0.0.1 up to {_HIGHEST_PORT} is free: end what listens there")


def _first_given_port() -> int:
    """Of those that the system chooses itself; 0 where it does not say."""
    try:
        return int(_GIVEN_PORTS.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0
