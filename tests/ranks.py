"""Trainer ranks of whole runs, as processes: `commands.start("ranks:train", CONFIG, RANKS, [LOOKS])`."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
import traceback
from io import StringIO
from pathlib import Path

from rich.console import Console

from forking import Commands
from paceline.config.loading import dump_config, load_config
from paceline.config.run import RunConfig
from paceline.launch.rendezvous import Rendezvous


def run_ranks(commands: Commands, config: RunConfig, num_ranks: int, stop_after_looks: int = 0) -> None:
    """Train `config` on so many ranks; the last of them may be asked to stop the n-th time that it looks."""
    file = Path(config.run_dir).with_suffix(".toml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_config(config))
    started = commands.start("ranks:train", str(file), str(num_ranks), str(stop_after_looks))
    assert started.wait(240) == 0, started.output


def train() -> None:
    """In a process without threads: fork the ranks, wait for all, and end as they did."""
    config, num_ranks, looks = load_config(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    with tempfile.TemporaryDirectory() as directory:
        places = [Rendezvous(rank, num_ranks, f"file://{directory}/rendezvous") for rank in range(num_ranks)]
        children = [_fork(config, place, looks if place.rank == num_ranks - 1 else 0) for place in places]
        codes = _wait(children)
    os._exit(max(codes))


def _fork(config: RunConfig, place: Rendezvous, looks: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        from paceline.launch.train import train as train_rank
        from whole_run import QuietSignals, StopsAfter

        stop: threading.Event | None = StopsAfter(looks) if looks else None
        train_rank(_on_own_device(config, place.rank), QuietSignals(stop), Console(file=StringIO()), place)
        code = 0
    except BaseException:
        print(f"rank {place.rank}: {traceback.format_exc()}", flush=True)
    os._exit(code)


def _on_own_device(config: RunConfig, rank: int) -> RunConfig:
    """On GPUs each rank has one of its own, for its target too."""
    if config.training.device != "cuda":
        return config
    here = {"device": f"cuda:{rank}"}
    training, target = config.training.model_copy(update=here), config.target.model_copy(update=here)
    return config.model_copy(update={"training": training, "target": target})


def _wait(children: list[int]) -> list[int]:
    """Exit codes; after the first failure the others are killed: they may wait for the one that failed."""
    left, codes = set(children), []
    while left:
        for child in list(left):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                left.discard(child)
                codes.append(abs(os.waitstatus_to_exitcode(status)))
                if codes[-1]:
                    time.sleep(1)
                    for other in left:
                        os.kill(other, 9)
        time.sleep(0.01)
    return codes
