"""`paceline train`: one run from start, or from its newest checkpoint, to its end."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.config.training import TrainingConfig
from paceline.errors import RunDirectoryError
from paceline.launch.assemble import TrainerParts, assemble_trainer
from paceline.launch.prepare import prepare_data
from paceline.launch.rendezvous import ALONE, Rendezvous
from paceline.launch.run import Run, check_ranks_alike, facts_of_rank, lock_run, open_run, recall_run
from paceline.launch.targets import open_access, publish_urls, target_facts
from paceline.observe.balance_lines import BalanceLines
from paceline.observe.logs import logging_for
from paceline.observe.metrics import MetricsWriter, SilentMetrics, View
from paceline.observe.progress import build_progress
from paceline.observe.trackers import build_trackers
from paceline.target.hf.loading import resolve_device
from paceline.training.checkpoint import CheckpointStore
from paceline.training.ranks import Ranks, open_ranks
from paceline.training.schedule import num_planned_steps
from paceline.training.trainer import Outputs, Trainer, TrainingResult

if TYPE_CHECKING:
    from paceline.launch.signals import StopSignals

logger = logging.getLogger(__name__)


def train(config: RunConfig, signals: StopSignals, console: Console, rendezvous: Rendezvous = ALONE) -> TrainingResult:
    """Train to the end or until a signal; run again, it goes on from the newest checkpoint.

    Args:
        rendezvous: this process's place among the trainer ranks that somebody has started; the first one holds the run
            directory for all.

    Raises:
        PacelineError: anything that keeps the run from going on; see `errors`.
    """
    paths = RunDir(Path(config.run_dir))
    with contextlib.ExitStack() as stack:
        if rendezvous.rank == 0:
            stack.enter_context(lock_run(paths))
            open_run(config)
        return train_as_child(config, signals, console, rendezvous=rendezvous)


def train_as_child(
    config: RunConfig,
    signals: StopSignals,
    console: Console,
    token_file: Path | None = None,
    rendezvous: Rendezvous = ALONE,
) -> TrainingResult:
    """The same for a process whose parent holds and has opened the run directory, and has started servers, if any.

    Raises:
        PacelineError: as `train`.
    """
    signals.grace_s = config.training.shutdown_grace_s
    paths, rank = RunDir(Path(config.run_dir)), rendezvous.rank
    with contextlib.ExitStack() as stack:
        stack.enter_context(_full_disk_named(paths))
        log = paths.log("trainer", rank)
        stack.enter_context(logging_for("trainer", rank, log, console if rank == 0 else None))
        set_numerics(config, rank)
        ranks = stack.enter_context(_meet(config, signals, rendezvous))
        if config.placement.target == "urls" and ranks.is_first:
            publish_urls(config)
        ranks.gather(None)  # the others find what the first has written
        run = recall_run(paths)
        check_ranks_alike(ranks.gather(facts_of_rank(run, config)))
        if ranks.is_first:
            warn_of_idle_ranks(config.training, ranks.num_ranks)
        access = open_access(config, signals.stop, token_file, rank)
        prepared = ranks.first_then_others(lambda: prepare_data(config, paths, target_facts(config, access)))
        parts = stack.enter_context(assemble_trainer(config, prepared, access, ranks))
        _let_go_on_stop(parts, signals, ranks)
        return _run_trainer(config, run, parts, ranks, console)


def warn_of_idle_ranks(training: TrainingConfig, num_ranks: int) -> None:
    """Say so if a step has too few rows for every rank to have one."""
    num_busy = training.rows_per_step * training.sequence_parallel
    if num_busy < num_ranks:
        groups = f" in groups of {training.sequence_parallel}" if training.sequence_parallel > 1 else ""
        logger.warning(
            "training.rows_per_step = %d for %d trainer ranks%s: %d of them train nothing; set it to a multiple of %d, "
            "or start at most %d ranks",
            training.rows_per_step,
            num_ranks,
            groups,
            num_ranks - num_busy,
            num_ranks // training.sequence_parallel,
            num_busy,
        )


def _meet(config: RunConfig, signals: StopSignals, rendezvous: Rendezvous) -> AbstractContextManager[Ranks]:
    device = resolve_device(config.training.device, "training.device")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return open_ranks(
        signals.stop,
        rendezvous.rank,
        rendezvous.num_ranks,
        rendezvous.address,
        hosted=rendezvous.hosted,
        device=device,
        sequence_parallel=config.training.sequence_parallel,
        timeout_s=config.training.dist_timeout_s,
    )


def _let_go_on_stop(parts: TrainerParts, signals: StopSignals, ranks: Ranks) -> None:
    """Whoever waits for a row, in training or in an evaluation, is let go by a signal.

    One of several ranks is not at once: they end together, and what the others wait for may still come.
    """

    def close() -> None:
        parts.stream.close()
        parts.pool.close()

    def close_later() -> None:
        timer = threading.Timer(0.7 * signals.grace_s, close)
        timer.daemon = True
        timer.start()

    signals.on_stop(close if ranks.num_ranks == 1 else close_later)


def _run_trainer(config: RunConfig, run: Run, parts: TrainerParts, ranks: Ranks, console: Console) -> TrainingResult:
    training = config.training
    num_steps = num_planned_steps(parts.num_rows, training.rows_per_step, training.max_steps)
    with contextlib.ExitStack() as stack:
        metrics = _open_metrics(config, run, ranks, num_steps, console)
        stack.callback(metrics.close)
        checkpoints = CheckpointStore(
            run.paths, run.run_id, training.keep_checkpoints, asynchronous=training.async_checkpoints, ranks=ranks
        )
        trainer = Trainer(
            training,
            parts.drafts,
            parts.stream,
            parts.num_rows,
            parts.evaluate,
            Outputs(metrics, checkpoints, run.paths.profile),
            ranks,
            lambda: _stream_figures(parts, config),
        )
        return trainer.run()


def _open_metrics(config: RunConfig, run: Run, ranks: Ranks, num_steps: int, console: Console) -> MetricsWriter:
    """metrics.jsonl and its views; rank 0 has them, for all."""
    metrics = None
    if ranks.is_first:
        views: list[View] = [build_progress(num_steps, console), BalanceLines()]
        views += build_trackers(config.tracking, run.paths)
        metrics = MetricsWriter(run.paths.metrics, views)
    attempt = ranks.gather(metrics.attempt if metrics else 0)[0]
    return metrics or SilentMetrics(attempt)


def set_numerics(config: RunConfig, rank: int = 0) -> None:
    """Threads, seed and determinism, for the whole process, before any model is built.

    What ranks draw from global generators differs; weights are drawn by generators of their own, alike on all of them.
    """
    torch.manual_seed(config.seed + rank)
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


def _stream_figures(parts: TrainerParts, config: RunConfig) -> dict[str, float]:
    stats, pool = parts.stream.stats, parts.pool.stats
    elsewhere = config.placement.target in ("servers", "urls")
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
        "target_tokens": sum(server.totals.tokens for server in pool.servers.values()),
        "sessions": pool.servers_up if elsewhere else 0,
        "transfer_s": pool.transfer_s,
    }
