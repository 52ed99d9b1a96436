"""Fixtures shared by the whole suite: tiny targets are made once a session."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from forking import Commands
    from served import Served


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 checkpoint with tokenizer (4 layers, hidden 32, V 300)."""
    from tiny import save_tiny_target

    return save_tiny_target(tmp_path_factory.mktemp("target") / "qwen3")


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Commands"]:
    """Starts `paceline` commands as processes, children of one that has imported torch.

    References of the self-test are kept for the session alone: what computes them must work.
    """
    from forking import Commands

    own = {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    with Commands(tmp_path_factory.mktemp("commands"), own) as commands:
        yield commands


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 short conversations to train on and 4 held out; a module may have its own."""
    from whole_run import write_data

    return write_data(tmp_path_factory.mktemp("data"), num_train=96)


@pytest.fixture(scope="session")
def target_servers(commands: "Commands", tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> list["Served"]:
    """Three servers of `tiny_target` for the whole session; tests that kill servers start their own."""
    from served import start_servers

    return start_servers(commands, tiny_target, tmp_path_factory.mktemp("servers"), 3)
