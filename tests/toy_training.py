"""A small draft algorithm, a stream of random features and a trainer on them, for tests of the loop itself.

Run as a program (`python toy_training.py RUN_DIR SEED`) it trains in child processes that it kills.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paceline.config.drafts import DraftConfig, Eagle3Config
from paceline.config.run_dir import RunDir
from paceline.config.training import TrainingConfig
from paceline.drafts.interface import DraftAlgorithm, DraftContext, DraftDecoder, LossTerms
from paceline.observe.metrics import MetricsWriter, read_metrics
from paceline.schema.features import FeatureRow, Features, FeatureSpec
from paceline.schema.rows import Row
from paceline.schema.target_info import TargetInfo
from paceline.training.checkpoint import CheckpointStore
from paceline.training.ranks import Ranks
from paceline.training.trainer import Outputs, Trainer

HIDDEN, NUM_TOKENS, VOCAB = 16, 12, 24
CPU = torch.device("cpu")
FP32 = TrainingConfig(dtype="float32", device="cpu", log_every=1, eval_every=0, checkpoint_every=0)


class ToyDraft(DraftAlgorithm):
    """Guesses a row's own tokens from one captured state: an MLP with dropout, a norm weight and a frozen head."""

    name = "toy"
    num_drafted = 1
    first_start = 0

    def __init__(self, config: DraftConfig, context: DraftContext, width: int = 32, dropout: float = 0.1) -> None:
        self.config, self.context = config, context
        generator = torch.Generator().manual_seed(context.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            self.draft = nn.Sequential(
                nn.Linear(HIDDEN, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, HIDDEN), nn.RMSNorm(HIDDEN)
            ).to(context.device, context.dtype)
        self.head = torch.randn(VOCAB, HIDDEN, generator=generator).to(context.device, context.dtype)

    def loss(self, row: FeatureRow) -> LossTerms:
        device = self.context.device
        # The stream has them on the device already: pinned, asynchronous copies here stand for that.
        index = to_device(torch.from_numpy(row.row.supervised_index()).long(), device)
        tokens = to_device(torch.from_numpy(row.row.tokens).long(), device)
        logits = (self.draft(row.features.hidden.flatten(1)) @ self.head.T).float().index_select(0, index)
        labels = tokens.index_select(0, index)
        each = nn.functional.cross_entropy(logits, labels, reduction="none")
        count = torch.full((), len(index), device=device, dtype=torch.float32)
        right = (logits.argmax(-1) == labels).sum().float()
        metrics = {"accuracy": torch.stack([right, count])[:, None]}
        return LossTerms(total=each.sum(), weight=count, metrics=metrics)

    @classmethod
    def feature_spec(cls, config: DraftConfig, info: TargetInfo, evaluation: bool = False) -> FeatureSpec:
        return FeatureSpec(layers=(0,))

    def nothing(self) -> LossTerms:
        weight = next(self.draft.parameters())
        count = torch.zeros((), device=self.context.device)
        return LossTerms(weight.float().sum() * 0.0, count, {"accuracy": count.expand(2, 1).clone()})

    # Training asks for none of the rest: a call would be a defect of the loop.
    def propose(self, row: FeatureRow, starts: Tensor) -> Tensor:
        raise NotImplementedError

    def decoder(self) -> DraftDecoder:
        raise NotImplementedError

    def published_config(self) -> dict[str, Any]:
        raise NotImplementedError

    def published_tensors(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def load_published(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        raise NotImplementedError


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def toy_row(position: int, supervised: int = NUM_TOKENS // 2, device: torch.device = CPU) -> FeatureRow:
    """A row of one document whose numbers come from its position alone."""
    generator = np.random.default_rng(position)
    tokens = generator.integers(0, VOCAB, NUM_TOKENS, dtype=np.int32)
    spans = np.array([[0, supervised]] if supervised else np.zeros((0, 2)), np.int32)
    row = Row(
        position=position,
        epoch=0,
        row_id=position,
        tokens=tokens,
        documents=np.array([0, NUM_TOKENS], np.int32),
        spans=spans,
        span_cut=np.zeros(len(spans), bool),
        sample_ids=np.array([position]),
        pieces=np.zeros(1, np.int32),
    )
    hidden = torch.from_numpy(generator.standard_normal((NUM_TOKENS, 1, HIDDEN), dtype=np.float32))
    return FeatureRow(row, Features((0,), to_device(hidden, device), None, None, None, None, "", finite=True))


class ToyStream:
    """Rows 0, 1, 2 ...; `make_row` may be given to make some of them special."""

    def __init__(self, num_rows: int, make_row: Callable[[int], FeatureRow] = toy_row) -> None:
        self.num_rows, self.make_row, self.position = num_rows, make_row, 0

    def __iter__(self) -> Iterator[FeatureRow]:
        while self.position < self.num_rows:
            self.position += 1
            yield self.make_row(self.position - 1)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def toy_draft(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    width: int = 32,
    dropout: float = 0.1,
    **config: Any,
) -> ToyDraft:
    settings = Eagle3Config(**({"lr": 1e-2, "weight_decay": 0.1} | config))
    context = DraftContext(None, None, None, device, dtype, seed)  # type: ignore[arg-type]
    return ToyDraft(settings, context, width, dropout)


def toy_trainer(run_dir: Path, num_rows: int = 8, config: TrainingConfig = FP32, **changes: Any) -> Trainer:
    """A trainer of two drafts; `changes` replace drafts, stream, evaluate, stop, run_id."""
    torch.manual_seed(0)
    run = RunDir(run_dir)
    ranks = Ranks(changes.get("stop") or threading.Event())
    store = CheckpointStore(
        run, changes.get("run_id", "toy"), config.keep_checkpoints, asynchronous=config.async_checkpoints, ranks=ranks
    )
    return Trainer(
        config,
        changes.get("drafts") or {"a": toy_draft(seed=1), "b": toy_draft(seed=2, schedule="constant")},
        changes.get("stream") or ToyStream(num_rows),
        num_rows,
        changes.get("evaluate") or (lambda step: {name: {"acceptance_length": 1.0 + step} for name in "ab"}),
        Outputs(MetricsWriter(run.metrics), store, run.profile),
        ranks,
    )


def training_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(RunDir(run_dir).metrics) if line["kind"] == "train"]


def loss_trace(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    return [
        (line["step"], {name: draft["loss"] for name, draft in line["drafts"].items()})
        for line in training_lines(run_dir)
    ]


KILL_CONFIG = FP32.model_copy(
    update={"checkpoint_every": 3, "eval_every": 7, "rows_per_step": 2, "keep_checkpoints": 2}
)
NUM_KILL_ROWS = 59


def train_in_child(run_dir: Path) -> int:
    """Start the training that is killed in a process of its own; its id."""
    child = os.fork()
    if child == 0:
        drafts = {"a": toy_draft(seed=1, width=4096), "b": toy_draft(seed=2)}
        toy_trainer(run_dir, NUM_KILL_ROWS, KILL_CONFIG, drafts=drafts).run()
        os._exit(0)
    return child


def kill_at(child: int, condition: Callable[[], bool]) -> bool:
    """SIGKILL the child when the condition holds; False if it ended before."""
    while not condition():
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main(run_dir: Path, seed: int) -> None:
    """Kill three trainings at random steps and one while a checkpoint is being written; then let one end."""
    chance = random.Random(seed)
    run = RunDir(run_dir)

    def lines() -> int:
        return run.metrics.read_bytes().count(b'"train"') if run.metrics.exists() else 0

    def reached(goal: int) -> bool:
        return lines() >= goal

    def writing(num_lines: int) -> bool:
        """A checkpoint is half written, by a child that has trained a step, so removed what others had left."""
        return lines() > num_lines and any(run.checkpoints.glob(".writing-*/*"))

    for _ in range(3):
        goal = lines() + chance.randint(2, 8)
        killed = kill_at(train_in_child(run_dir), partial(reached, goal))
        print("killed" if killed else "ended", flush=True)
    for _ in range(20):
        if kill_at(train_in_child(run_dir), partial(writing, lines())) and any(run.checkpoints.glob(".writing-*")):
            print("killed while writing", flush=True)
            break
    status = os.waitpid(train_in_child(run_dir), 0)[1]
    print("exit", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
