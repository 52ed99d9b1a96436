"""Fixtures shared by the whole suite: tiny targets are made once a session."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 checkpoint with tokenizer (4 layers, hidden 32, V 300)."""
    from tiny import save_tiny_target

    return save_tiny_target(tmp_path_factory.mktemp("target") / "qwen3")
