"""Whole runs on a tiny target, in this process: data on disk, a configuration, `train`, what it left behind."""

from __future__ import annotations

import io
import json
import random
import string
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from paceline.config.loading import build_config
from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.launch.signals import StopSignals
from paceline.launch.train import train
from paceline.observe.metrics import read_metrics
from paceline.training.checkpoint import latest_checkpoint, load_draft_weights
from paceline.training.trainer import TrainingResult

DRAFTS: dict[str, dict[str, Any]] = {
    "eagle3": {"algorithm": "eagle3", "num_depths": 3, "vocab_size": 64, "lr": 5e-3},
    "dflash": {"algorithm": "dflash", "num_layers": 2, "block_size": 4, "anchor_every": 3, "lr": 5e-3},
}


class QuietSignals(StopSignals):
    """Signals that a test gives itself: nothing is installed in the test's process, and it is never ended."""

    def __init__(self, stop: threading.Event | None = None) -> None:
        self.stop = stop or threading.Event()
        self._grace_s = 8.0
        self._signum = None
        self._callbacks: list[Callable[[], None]] = []
        self._changed = threading.Condition()


class StopsAfter(threading.Event):
    """A stop that comes by itself the n-th time somebody looks: trainers look before every row."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def conversation(index: int, num_words: int = 6) -> dict[str, Any]:
    """A short question and answer of their own words."""
    draw = random.Random(index)
    words = ["".join(draw.choices(string.ascii_lowercase[:6], k=4)) for _ in range(num_words)]
    return {
        "messages": [
            {"role": "user", "content": f"{index}: {words[0]}?"},
            {"role": "assistant", "content": " ".join(words)},
        ]
    }


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """A JSONL file; a string is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_data(directory: Path, num_train: int = 24, num_eval: int = 4) -> Path:
    """train.jsonl and eval.jsonl, which share no conversation; returns `directory`."""
    write_lines(directory / "train.jsonl", (conversation(index) for index in range(num_train)))
    write_lines(directory / "eval.jsonl", (conversation(1000 + index) for index in range(num_eval)))
    return directory


def run_table(run_dir: Path, target: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """Plain tables of a run of both drafts; `changes` are "section.field" (with "__" for ".") and replace fields."""
    table: dict[str, Any] = {
        "run_dir": str(run_dir),
        "target": {"model": str(target), "device": "cpu", "dtype": "float32"},
        "data": {
            "train": str(data / "train.jsonl"),
            "eval": str(data / "eval.jsonl"),
            "row_tokens": 128,
            "cache_dir": str(data / "prepared"),
        },
        "drafts": {name: dict(draft) for name, draft in DRAFTS.items()},
        "training": {
            "dtype": "float32",
            "device": "cpu",
            "num_threads": 1,
            "log_every": 1,
            "eval_every": 0,
            "checkpoint_every": 0,
            "max_eval_rows": 2,
        },
    }
    for key, value in changes.items():
        *sections, field = key.split("__")
        place = table
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
    return table


def run_config(run_dir: Path, target: Path, data: Path, **changes: Any) -> RunConfig:
    return build_config(run_table(run_dir, target, data, **changes))


def run(config: RunConfig, stop: threading.Event | None = None) -> TrainingResult:
    """Train to the end, or until `stop`."""
    return train(config, QuietSignals(stop), Console(file=io.StringIO()))


def lines(config: RunConfig, kind: str = "train") -> list[dict[str, Any]]:
    """The last line of metrics of every step."""
    return [line for line in read_metrics(RunDir(Path(config.run_dir)).metrics) if line["kind"] == kind]


def losses(config: RunConfig, draft: str | None = None) -> list[Any]:
    """Loss of every step, bit by bit: a float for one draft, or a dictionary of all."""
    traces = [{name: figures["loss"] for name, figures in line["drafts"].items()} for line in lines(config)]
    return traces if draft is None else [trace[draft] for trace in traces]


def weights(config: RunConfig) -> dict[str, Tensor]:
    """fp32 weights of all drafts in the newest checkpoint."""
    path = latest_checkpoint(RunDir(Path(config.run_dir)))
    return {
        f"{draft}/{name}": tensor for draft in config.drafts for name, tensor in load_draft_weights(path, draft).items()
    }


def same_weights(one: RunConfig, other: RunConfig) -> bool:
    """Whether the newest checkpoints hold the same weights, bit by bit."""
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same_rows(one: RunConfig, other: RunConfig) -> None:
    for ours, theirs in zip(lines(one), lines(other), strict=True):
        for size in ("step", "rows", "tokens", "supervised_tokens"):
            assert ours[size] == theirs[size]


def assert_close_runs(one: RunConfig, other: RunConfig) -> None:
    """Losses within 1e-6, the same rows in every step, the same acceptance, weights that the order of sums explains."""
    assert_same_rows(one, other)
    for ours, theirs in zip(lines(one), lines(other), strict=True):
        for name, figures in ours["drafts"].items():
            assert figures["loss"] == pytest.approx(theirs["drafts"][name]["loss"], rel=1e-6)
            assert figures["weight"] == pytest.approx(theirs["drafts"][name]["weight"], rel=1e-6)
    for ours, theirs in zip(lines(one, "eval"), lines(other, "eval"), strict=True):
        for name, figures in ours["drafts"].items():
            assert figures["acceptance_length"] == theirs["drafts"][name]["acceptance_length"]
            assert figures["loss"] == pytest.approx(theirs["drafts"][name]["loss"], rel=1e-5)
    ours_w, theirs_w = weights(one), weights(other)
    assert ours_w.keys() == theirs_w.keys()
    for name, weight in ours_w.items():
        torch.testing.assert_close(weight, theirs_w[name], rtol=1e-4, atol=1e-5)
