"""An engine of any kind as a child of ours, on loopback behind a key."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from paceline.config.target import TargetConfig
from paceline.target.engines.http_calls import EngineCalls
from paceline.target.engines.interface import INSIDE, EngineAddress, EngineKind
from paceline.target.engines.process import EngineProcess, private_directory
from paceline.target.engines.programs import EngineProgram, check_spread, child_environment, free_port


def start_engine(
    kind: EngineKind, config: TargetConfig, program: EngineProgram, checkpoint: Path, layers: Sequence[int]
) -> tuple[EngineProcess, EngineAddress]:
    """Start a server, hidden states into a private directory; it is not ready yet.

    Only the files of `INSIDE` enter its process: its Python needs no paceline, ours no engine.

    Raises:
        ConfigError: options that cannot be given; GPUs that are not there, or not shown to it.
    """
    check_spread(config, kind.spreading, kind.title)
    root = private_directory(config.engine)
    hidden = root / "hidden"
    address = EngineAddress(f"http://127.0.0.1:{free_port()}", hidden, tuple(layers), secrets.token_hex(16))
    try:
        hidden.mkdir()
        words, variables = kind.own_words(config, address.key, root)
        command = [*kind.command(config, program, checkpoint, address), *words]
        threads = {} if config.num_threads is None else kind.thread_variables
        environment = {**kind.variables, **threads, **child_environment(config, program, INSIDE), **variables}
        return EngineProcess(f"{kind.title} {program.version}", root, command, environment), address
    except BaseException:  # a process that has started removes it
        shutil.rmtree(root, ignore_errors=True)
        raise


def is_ready(kind: EngineKind, address: EngineAddress) -> bool:
    """Whether the server answers."""
    return EngineCalls(kind.title, address.url, address.key).is_healthy()
