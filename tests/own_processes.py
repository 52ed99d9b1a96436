"""A run that `paceline train` has started with processes of its own, as tests watch it from outside."""

from __future__ import annotations

import json
import re
from pathlib import Path

import tomli_w

from forking import Command, Commands
from paceline.config.run import RunConfig


def start(commands: Commands, config: RunConfig, directory: Path, *overrides: str) -> Command:
    """`paceline train` of `config`, whose file is written into `directory`."""
    return commands.start("train", str(write_config(config, directory)), *overrides)


def write_config(config: RunConfig, directory: Path) -> Path:
    file = directory / "run.toml"
    file.write_text(tomli_w.dumps(json.loads(config.model_dump_json(exclude_none=True))))
    return file


def children_of(pid: int) -> dict[str, int]:
    """Name of each process of the run -> its id: "server-0", "trainer-0"."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            parent = int(re.search(r"^PPid:\s+(\d+)", (entry / "status").read_text(), re.MULTILINE)[1])  # type: ignore[index]
        except OSError:
            continue
        if parent == pid and "paceline.cli" in words:
            name = next(Path(word).stem for word in words if word.endswith(".toml"))  # each has its own configuration
            found[name] = int(entry.name)
    return found


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def num_steps(config: RunConfig) -> int:
    """Steps that were trained so far."""
    path = Path(config.run_dir) / "metrics.jsonl"
    return path.read_bytes().count(b'"kind":"train"') if path.exists() else 0
