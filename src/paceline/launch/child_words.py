"""What the processes of a run are started with: command lines and settings, the same whoever starts them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from paceline.config.run import RunConfig
from paceline.config.target import TargetConfig
from paceline.launch.target_facts import outline_target, training_spec


def server_target(config: RunConfig, device: str) -> TargetConfig:
    """Settings of a server's target, on its (first) device.

    As many threads as the trainer has, and the layers that the run's drafts read, unless either is set.
    """
    target = config.target.model_copy(update={"device": device})
    if target.num_threads is None:
        target = target.model_copy(update={"num_threads": config.training.num_threads})
    if target.engine != "hf" and target.capture_layers is None:
        layers = training_spec(config, outline_target(config)).layers
        target = target.model_copy(update={"capture_layers": layers})
    return target


def serve_words(model: str, target_file: Path, token_file: Path, ready_file: Path, host: str) -> list[str]:
    """Arguments of a server that listens on a port the system chooses."""
    return [
        *("serve", model, "--target-config", str(target_file), "--host", host, "--port", "0"),
        *("--token-file", str(token_file), "--ready-file", str(ready_file)),
    ]


def worker_words(
    words: Sequence[str], config_file: Path, token_file: Path | None, failure_file: Path | None
) -> list[str]:
    """Arguments of a process that does the run's work.

    Args:
        words: its verb, "trainer" or "recorder", and options that this verb has besides.
        token_file: of the run's own servers, if it has any.
        failure_file: where it writes why it failed, if it does.
    """
    arguments = [words[0], str(config_file), *words[1:]]
    for option, file in (("--token-file", token_file), ("--failure-file", failure_file)):
        if file is not None:
            arguments += [option, str(file)]
    return arguments


def rank_words(rank: int, num_ranks: int, rendezvous: str) -> list[str]:
    """Further arguments of one of several trainer ranks."""
    return ["--rank", str(rank), "--num-ranks", str(num_ranks), "--rendezvous", rendezvous]


def draw_token() -> str:
    """A token of one run's servers."""
    return secrets.token_hex(32)


def write_private(path: Path, text: str) -> Path:
    """A new file that nobody else may read; returns `path`."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    return path
