"""Configuration -> objects. The only place that wires target, client, drafts and trainer together."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from paceline.client.budget import PrefetchBudget
from paceline.client.pool import FeaturePool
from paceline.client.positions import DealtPositions
from paceline.client.stream import FeatureStream
from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.data.prepared import PreparedData
from paceline.data.rows import RowSource
from paceline.drafts.interface import DraftAlgorithm
from paceline.drafts.registry import load_algorithm
from paceline.drafts.sequence import SequenceGroup
from paceline.errors import DataError
from paceline.evaluation.held_out import HeldOutEvaluation
from paceline.launch.recorded import check_recording
from paceline.launch.targets import OpenTarget, RemoteAccess, open_target
from paceline.launch.trained import build_draft, remember_data, remember_target
from paceline.launch.warm_up import compile_drafts
from paceline.schema.features import FeatureSpec, merge_specs
from paceline.schema.parts import Part
from paceline.schema.target_info import TargetInfo
from paceline.target.hf.loading import resolve_device
from paceline.training.ranks import Ranks

logger = logging.getLogger(__name__)

TRAINING, EVALUATION = "training", "evaluation"
"""Names of the feature specs a trainer registers."""


@dataclass(frozen=True, slots=True)
class TrainerParts:
    """What one trainer rank runs on."""

    drafts: dict[str, DraftAlgorithm]
    stream: FeatureStream
    num_rows: int
    """Rows of the whole training, all epochs."""
    evaluate: HeldOutEvaluation
    pool: FeaturePool


def feature_specs(config: RunConfig, info: TargetInfo) -> dict[str, FeatureSpec]:
    """One spec for training and one for evaluation, each the union over all drafts (one capture feeds them all).

    Raises:
        ConfigError: a draft asks for layers the target does not have.
    """
    algorithms = [(load_algorithm(draft.algorithm), draft) for draft in config.drafts.values()]
    training = [algorithm.feature_spec(draft, info) for algorithm, draft in algorithms]
    evaluation = [algorithm.feature_spec(draft, info, evaluation=True) for algorithm, draft in algorithms]
    # The held-out loss is the training loss: evaluation needs what training needs, besides its own.
    return {TRAINING: merge_specs(training), EVALUATION: merge_specs(training + evaluation)}


@contextlib.contextmanager
def assemble_trainer(
    config: RunConfig, prepared: PreparedData, access: RemoteAccess | None, ranks: Ranks
) -> Iterator[TrainerParts]:
    """Everything a trainer rank needs; closed again, in order, at the end of the block.

    Args:
        access: to servers elsewhere; None for placements without any.

    Raises:
        ConfigError: sizes or layers that do not fit the target.
        DataError: nothing to train on, or nothing held out.
        RunDirectoryError: the run was trained against another target, or on other data.
    """
    device = resolve_device(config.training.device, "training.device")
    train_rows = RowSource(prepared.train, prepared.train_plan, config.seed)
    eval_rows = RowSource(prepared.eval, prepared.eval_plan, config.seed)
    _check_rows(train_rows, eval_rows)
    with contextlib.ExitStack() as stack:
        dtype = getattr(torch, config.training.dtype)
        target = stack.enter_context(open_target(config, device, dtype, access))
        info = target.info
        if ranks.is_first:
            run = RunDir(Path(config.run_dir))
            remember_target(run, info)
            remember_data(run, prepared)
        specs = feature_specs(config, info)
        if target.recording is not None:
            check_recording(target.recording, specs, train_rows)
        drafts = _build_drafts(config, target, prepared, device, ranks)
        num_rows = config.training.num_epochs * train_rows.num_rows
        num_eval_rows = min(config.training.max_eval_rows or eval_rows.num_rows, eval_rows.num_rows)
        sizes = None
        if target.recording is None:  # otherwise servers are asked for what it lacks
            sizes = train_rows.sizes(_num_trained_rows(config, num_rows)) | eval_rows.sizes(num_eval_rows)
        pool = FeaturePool(target.servers, specs, config.pool, info, sizes=sizes, group=ranks.draw_secret())
        stack.callback(pool.close)
        transport = config.transport
        open_stream = partial(
            FeatureStream,
            pool=pool,
            budget=PrefetchBudget(transport.prefetch_rows, transport.prefetch_bytes),
            row_timeout_s=transport.row_timeout_s,
        )
        positions = DealtPositions(num_rows, config.training.rows_per_step, ranks.data_rank, ranks.num_data_ranks)
        part = Part(ranks.part, ranks.sequence_parallel)
        stream = open_stream(train_rows.row, spec=TRAINING, positions=positions, part=part)
        stack.callback(stream.close)

        def open_eval_stream(num: int) -> FeatureStream:
            own = range(ranks.data_rank, num, ranks.num_data_ranks)
            return open_stream(eval_rows.row, spec=EVALUATION, positions=own, part=part, own_rows=1)

        evaluate = HeldOutEvaluation(
            drafts, open_eval_stream, num_eval_rows, ranks.num_data_ranks, ranks.gather, ranks.agree_to_stop
        )
        yield TrainerParts(drafts, stream, num_rows, evaluate, pool)


def _build_drafts(
    config: RunConfig, target: OpenTarget, prepared: PreparedData, device: torch.device, ranks: Ranks
) -> dict[str, DraftAlgorithm]:
    dtype = getattr(torch, config.training.dtype)
    sequence = None
    if ranks.sequence_group is not None:
        exchange = config.training.sequence_exchange
        sequence = SequenceGroup(ranks.sequence_group, ranks.part, ranks.sequence_parallel, exchange)
    counts, weights = prepared.token_counts, target.weights
    drafts = {
        name: build_draft(config, name, target.info, weights, counts, device, dtype, sequence) for name in config.drafts
    }
    if config.training.compile:
        compile_drafts(drafts, config.data.row_tokens)
    return drafts


def _num_trained_rows(config: RunConfig, num_rows: int) -> int:
    """Of the rows of all epochs."""
    max_steps = config.training.max_steps
    return num_rows if max_steps is None else min(num_rows, max_steps * config.training.rows_per_step)


def _check_rows(train: RowSource, evaluation: RowSource) -> None:
    if not train.num_rows:
        raise DataError("there is no sample to train on: see the table of `paceline prepare` for what was skipped")
    if not evaluation.num_rows:
        raise DataError("no sample is held out: set data.eval, or raise data.eval_fraction")
