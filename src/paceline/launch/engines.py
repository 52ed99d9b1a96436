"""Engines that somebody else starts: the command line for it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from paceline.config.target import TargetConfig
from paceline.errors import ConfigError
from paceline.launch.serve import with_capture_layers
from paceline.target.engines.http_calls import ENGINE_KEY
from paceline.target.engines.interface import INSIDE, EngineAddress
from paceline.target.engines.programs import find_program, visible_gpus
from paceline.target.hf.loading import load_config, resolve_checkpoint
from paceline.target.opening import ENGINES, engine_layers


def engine_command(config: TargetConfig) -> str:
    """A shell command that starts the engine so that `target.engine_url` can name it.

    Raises:
        ConfigError: an engine that is no server, or a directory that is not named.
    """
    if config.engine == "hf":
        raise ConfigError('target.engine = "hf" runs in the server\'s own process: there is no engine to start')
    if config.engine_url is None or config.engine_directory is None:
        raise ConfigError(
            "--show-command needs --engine-url and target.engine_directory: where the engine is to answer and to write"
        )
    url, directory = config.engine_url, Path(config.engine_directory).absolute()
    config = with_capture_layers(config)
    assert config.capture_layers is not None, "they were just set"
    checkpoint = resolve_checkpoint(config.model, config.revision, config.trust_remote_code)
    text = load_config(checkpoint, config.trust_remote_code).get_text_config(decoder=True)
    layers = engine_layers(config.capture_layers, int(text.num_hidden_layers))
    kind = ENGINES[config.engine]
    program = find_program(config, kind.packages, kind.install)
    words = kind.command(config, program, checkpoint, EngineAddress(url, directory, layers))
    started = kind.shell_command(shlex.join(words), f'"${ENGINE_KEY}"')
    gpus = "".join(f"{name}={value} " for name, value in visible_gpus(config, os.environ).items())
    return f"mkdir -p {shlex.quote(str(directory))} && {gpus}PYTHONPATH={shlex.quote(str(INSIDE))} {started}"
