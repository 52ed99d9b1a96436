"""`paceline train`: one run from start, or from its newest checkpoint, to its end."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.errors import RunDirectoryError
from paceline.launch.assemble import TrainerParts, assemble_trainer
from paceline.launch.prepare import prepare_data
from paceline.launch.run import Run, lock_run, open_run
from paceline.launch.targets import open_access, publish_urls, target_facts
from paceline.observe.logs import logging_for
from paceline.observe.metrics import MetricsWriter, View
from paceline.observe.progress import build_progress
from paceline.observe.trackers import build_trackers
from paceline.training.checkpoint import CheckpointStore
from paceline.training.schedule import num_planned_steps
from paceline.training.trainer import Outputs, Trainer, TrainingResult

if TYPE_CHECKING:
    from paceline.launch.signals import StopSignals

logger = logging.getLogger(__name__)


def train(config: RunConfig, signals: StopSignals, console: Console) -> TrainingResult:
    """Train to the end or until a signal; run again, it goes on from the newest checkpoint.

    Raises:
        PacelineError: anything that keeps the run from going on; see `errors`.
    """
    paths = RunDir(Path(config.run_dir))
    with lock_run(paths), _full_disk_named(paths):
        return _train(config, signals, console)


def train_as_child(config: RunConfig, signals: StopSignals, console: Console, token_file: Path) -> TrainingResult:
    """The same for a process whose parent holds the run directory and has started the servers.

    Raises:
        PacelineError: as `train`.
    """
    with _full_disk_named(RunDir(Path(config.run_dir))):
        return _train(config, signals, console, token_file)


def _train(config: RunConfig, signals: StopSignals, console: Console, token_file: Path | None = None) -> TrainingResult:
    signals.grace_s = config.training.shutdown_grace_s
    paths = RunDir(Path(config.run_dir))
    run = open_run(config)
    with logging_for("trainer", 0, paths.log("trainer", 0), console):
        set_numerics(config)
        if config.placement.target == "urls":
            publish_urls(config)
        access = open_access(config, signals.stop, token_file)
        prepared = prepare_data(config, paths, target_facts(config, access))
        with assemble_trainer(config, prepared, access) as parts:
            # Whoever waits for a row, in training or in an evaluation, is let go.
            signals.on_stop(parts.stream.close)
            signals.on_stop(parts.pool.close)
            return _run_trainer(config, run, parts, signals, console)


def _run_trainer(
    config: RunConfig, run: Run, parts: TrainerParts, signals: StopSignals, console: Console
) -> TrainingResult:
    training = config.training
    num_steps = num_planned_steps(parts.num_rows, training.rows_per_step, training.max_steps)
    with contextlib.ExitStack() as stack:
        views: list[View] = [build_progress(num_steps, console), *build_trackers(config.tracking, run.paths)]
        metrics = MetricsWriter(run.paths.metrics, views)
        stack.callback(metrics.close)
        checkpoints = CheckpointStore(
            run.paths, run.run_id, training.keep_checkpoints, asynchronous=training.async_checkpoints
        )
        trainer = Trainer(
            training,
            parts.drafts,
            parts.stream,
            parts.num_rows,
            parts.evaluate,
            Outputs(metrics, checkpoints, run.paths.profile),
            signals.stop,
            lambda: _stream_figures(parts),
        )
        return trainer.run()


def set_numerics(config: RunConfig) -> None:
    """Threads, seed and determinism, for the whole process, before any model is built."""
    torch.manual_seed(config.seed)
    if config.training.num_threads is not None:
        torch.set_num_threads(config.training.num_threads)
    if config.training.deterministic:
        # cuBLAS reads it when it is first used; without it torch refuses deterministic matrix products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)


@contextlib.contextmanager
def _full_disk_named(paths: RunDir) -> Iterator[None]:
    """Metrics and logs have no error of their own for a disk that is full; checkpoints and prepared data do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunDirectoryError(
            f"cannot write to {paths.root}: {error.strerror}; free some space and run the same command again: it goes "
            "on from the newest checkpoint"
        ) from error


def _stream_figures(parts: TrainerParts) -> dict[str, float]:
    stats, pool = parts.stream.stats, parts.pool.stats
    return {
        "rows_in_flight": stats.rows_in_flight,
        "bytes_in_flight": stats.bytes_in_flight,
        "bytes_received": stats.bytes_received,
        "rows_asked_ahead": stats.rows_asked_ahead,
        "rows_not_asked_ahead": stats.rows_not_asked_ahead,
        "rows_retried": stats.rows_retried,
        "damaged_replies": pool.damaged_replies,
        "late_replies": pool.late_replies,
        "rows_moved": pool.rows_moved,
        "rows_hedged": pool.rows_hedged,
        "hedges_won": pool.hedges_won,
        "server_deaths": pool.server_deaths,
        "queued_s": pool.queued_s,
        "target_s": pool.computed_s,
        "transfer_s": pool.transfer_s,
    }
