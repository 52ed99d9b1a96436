"""The training loop. With the draft's `algorithm.py` beside it, this is all of a training step."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from paceline.config.training import TrainingConfig
from paceline.drafts.interface import DraftAlgorithm, LossTerms
from paceline.errors import DataError, OutOfMemoryError, RunDirectoryError, StoppedError
from paceline.observe.metrics import MetricsWriter
from paceline.observe.spans import Spans
from paceline.schema.features import FeatureRow
from paceline.training.checkpoint import Best, CheckpointStore, TrainingState, tensor_name
from paceline.training.interface import Evaluate, RowStream, StreamFigures
from paceline.training.profiling import StepProfiler
from paceline.training.ranks import Ranks
from paceline.training.rng import RngState
from paceline.training.schedule import num_planned_steps
from paceline.training.sharded import share_drafts
from paceline.training.step_record import DeviceClock, LossSums, StepLog, StepRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a training run writes."""

    metrics: MetricsWriter
    checkpoints: CheckpointStore
    profile: Path


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """How a run ended, when nothing failed."""

    status: Literal["finished", "stopped"]
    step: int
    """Optimizer steps done, over all attempts."""
    checkpoint: Path | None
    """The newest that is published."""
    best: dict[str, Best]
    """By draft."""


class Trainer:
    """Trains every draft of a run on one stream of rows.

    consumes: rows of the stream      waits for: the next row; before a checkpoint, the writing of the last one
    unblocked by: a row, the stream's error or end, `stop`
    """

    def __init__(
        self,
        config: TrainingConfig,
        drafts: Mapping[str, DraftAlgorithm],
        stream: RowStream,
        num_rows: int,
        evaluate: Evaluate,
        outputs: Outputs,
        ranks: Ranks,
        stream_figures: StreamFigures = dict,
    ) -> None:
        """Start at step 0; `run` continues from the newest checkpoint.

        Args:
            stream: this rank's share of the rows.
            num_rows: rows of the whole training, all epochs and ranks.
            evaluate: called every `eval_every` steps and at the end.
            ranks: asked to stop, a single rank ends in order at its next row, several at the row after that.
            stream_figures: what the stream holds, recorded with each step.
        """
        self.num_steps = num_planned_steps(num_rows, config.rows_per_step, config.max_steps)
        self.step = 0
        self.drafts = dict(drafts)
        self._ranks = ranks
        self.shared, self.optimizers = share_drafts(self.drafts, ranks, config.sharding, self.num_steps)
        self._config = config
        self._stream = stream
        self._rows = iter(stream)
        self._num_rows = num_rows
        self._evaluate_drafts = evaluate
        self._metrics = outputs.metrics
        self._checkpoints = outputs.checkpoints
        self._profiler = StepProfiler(config.profile, outputs.profile, ranks.rank)
        self._stream_figures = stream_figures
        self._device = next(iter(drafts.values())).context.device
        self._clock = DeviceClock(self._device)
        self._spans = Spans()
        self._log = StepLog({}, ranks)
        self._rng = RngState.capture(self._device)
        self._best: dict[str, Best] = {}
        self._evaluated_step: int | None = None
        self._saved_step: int | None = None

    def run(self) -> TrainingResult:
        """Train to the end, from the newest checkpoint if there is one, or until `stop`.

        Raises:
            CheckpointError: the newest checkpoint is damaged, or one cannot be written.
            RunDirectoryError: the newest checkpoint was made with other rows per step or another number of steps.
            OutOfMemoryError: names the settings to lower.
            PacelineError: a loss or gradient is not finite, found before a checkpoint holds it.
        """
        self._resume()
        for draft in self.drafts.values():
            draft.draft.train()
        self._log.restart_interval()
        try:
            self._work_due()
            while self.step < self.num_steps:
                self._profiler.before_step(self.step)
                with self._spans.timed("step"), _memory_explained():
                    record = self.train_step(self._rows_of_step(), self._num_micro_steps())
                record.seconds, record.stream = self._spans.take(), self._stream_figures()
                self._log.append(record)
                self._profiler.after_step(self.step - 1)
                self._work_due()
            self._checkpoints.wait()
        except StoppedError:
            if not self._ranks.stopping:
                self._say_what_is_lost()
                raise
            self._end_early()
            return self._result("stopped")
        finally:
            self._profiler.close()
            # After a failure: what is being written may be what the next attempt starts from.
            self._checkpoints.settle(0.0 if self._ranks.stopping else self._config.shutdown_grace_s)
        return self._result("finished")

    def train_step(self, rows: Iterable[FeatureRow | None], num_micro_steps: int = 1) -> StepRecord:
        """One optimizer step of every draft on `rows`: sums over rows and ranks, one division (N11).

        Nothing in here waits for the device or copies from it; the record is read when it is logged.

        Args:
            rows: this rank's rows of the step, and None where it has none left but another rank has.
            num_micro_steps: how many they are, the same on all ranks; told beforehand since several ranks add up their
                gradients while the last backward runs.
        """
        record = StepRecord(self.step + 1, sums={name: LossSums(self._device) for name in self.drafts})
        mark = self._clock.mark
        for micro_step, row in enumerate(rows, start=1):
            for name in self.drafts:
                start = mark()
                terms = self._loss(name, row, last=micro_step == num_micro_steps)
                middle = mark()
                terms.total.backward()
                self.optimizers[name].accumulate()
                record.sums[name].add(terms)
                record.marks += [("forward", start, middle), ("backward", middle, mark())]
            if row is not None and self._ranks.part == 0:
                record.count(row.row)
        for name, optimizer in self.optimizers.items():
            start = mark()
            self._ranks.sum(record.sums[name].weight)
            record.learning_rates[name] = optimizer.learning_rate(self.step)
            record.grad_norms[name] = optimizer.step(record.sums[name].weight, self.step)
            record.marks.append(("optimizer", start, mark()))
        self.step += 1
        return record

    def _loss(self, draft: str, row: FeatureRow | None, last: bool) -> LossTerms:
        if draft in self.shared:
            return self.shared[draft].loss(row, last)
        return self.drafts[draft].nothing() if row is None else self.drafts[draft].loss(row)

    def _positions_of_step(self) -> range:
        """Of all ranks."""
        first = self.step * self._config.rows_per_step
        return range(first, min(first + self._config.rows_per_step, self._num_rows))

    def _num_micro_steps(self) -> int:
        return math.ceil(len(self._positions_of_step()) / self._ranks.num_data_ranks)

    def _rows_of_step(self) -> Iterator[FeatureRow | None]:
        """The rows of this step that are this rank's, asked for one by one: each is valid until the next."""
        positions = self._positions_of_step()[self._ranks.data_rank :: self._ranks.num_data_ranks]
        for micro_step in range(self._num_micro_steps()):
            if self._ranks.agree_to_stop_soon():
                raise StoppedError(f"stopped by request in step {self.step + 1}")
            yield self._row_at(positions[micro_step]) if micro_step < len(positions) else None

    def _row_at(self, position: int) -> FeatureRow:
        with self._spans.timed("data_wait"):
            row = next(self._rows, None)
        if row is None:
            raise DataError(f"the stream ended before position {position}; {self._num_rows} rows were planned")
        assert row.row.position == position, f"the stream gave row {row.row.position} where {position} is due"
        return row

    def _work_due(self) -> None:
        """What is due between two steps and not done yet: logging, evaluation, a checkpoint."""
        self._checkpoints.check()
        self._rng = RngState.capture(self._device)
        self._check_stop()
        at_end = self.step == self.num_steps
        if at_end or self._is_due(self._config.log_every):
            self._write_metrics()
        improved = evaluated = False
        if (at_end or self._is_due(self._config.eval_every)) and self._evaluated_step != self.step:
            improved, evaluated = self._evaluate(), True
            self._rng = RngState.capture(self._device)
        wanted = at_end or improved or self._is_due(self._config.checkpoint_every)
        if wanted and (evaluated or self._saved_step != self.step):
            self._save()

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step > 0 and self.step % every == 0

    def _check_stop(self) -> None:
        """Raise StoppedError if any rank was asked to end."""
        if self._ranks.agree_to_stop():
            raise StoppedError(f"stopped by request after step {self.step}")

    def _write_metrics(self, durable: bool = False) -> None:
        """Read the steps since the last time from the device, and write them."""
        try:
            for line in self._log.read():
                self._metrics.write("train", **line)
        finally:
            self._metrics.flush(durable)

    def _evaluate(self) -> bool:
        """Evaluate all drafts; whether one is better than ever."""
        self._write_metrics()
        for draft in self.drafts.values():
            draft.draft.eval()
        with torch.no_grad(), _memory_explained(), contextlib.ExitStack() as stack:
            for shared in self.shared.values():
                stack.enter_context(shared.gathered())
            try:
                figures = self._evaluate_drafts(self.step)
            except StoppedError:
                self._check_stop()
                raise
        for draft in self.drafts.values():
            draft.draft.train()
        improved = False
        for name in self.drafts:
            acceptance_length = float(figures[name]["acceptance_length"])
            if name not in self._best or acceptance_length > self._best[name].acceptance_length:
                self._best[name] = Best(self.step, acceptance_length)
                improved = True
        self._evaluated_step = self.step
        self._metrics.write("eval", self.step, drafts=figures)
        self._metrics.flush()
        self._log.restart_interval()
        return improved

    def _save(self) -> None:
        self._write_metrics(durable=True)
        self._checkpoints.save(self._state(), self._tensors())
        self._saved_step = self.step
        self._log.restart_interval()

    def _state(self) -> TrainingState:
        return TrainingState(
            step=self.step,
            position=min(self.step * self._config.rows_per_step, self._num_rows),
            rows_per_step=self._config.rows_per_step,
            num_steps=self.num_steps,
            attempt=self._metrics.attempt,
            evaluated_step=self._evaluated_step,
            best=dict(self._best),
            zero_weight_steps=dict(self._log.zero_weight_steps),
            rng=self._ranks.gather(self._rng.to_json()),
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {
            tensor_name(draft, name): tensor
            for draft, optimizer in self.optimizers.items()
            for name, tensor in optimizer.tensors().items()
        }

    def _resume(self) -> None:
        """Take up the newest checkpoint, if there is one."""
        self._checkpoints.remove_leftovers()
        path = self._ranks.gather(self._checkpoints.latest())[0]
        if path is None:
            return
        state = self._checkpoints.load(path, self._tensors())
        for name, ours, theirs in (
            ("training.rows_per_step", self._config.rows_per_step, state.rows_per_step),
            ("number of optimizer steps", self.num_steps, state.num_steps),
        ):
            if ours != theirs:
                raise RunDirectoryError(f"{path}: {name} was {theirs}, is {ours} now; choose another run_dir")
        for optimizer in self.optimizers.values():
            optimizer.publish_masters()
        self._stream.load_state_dict({"position": state.position})
        self._rows = iter(self._stream)
        self.step = self._saved_step = state.step
        self._best = dict(state.best)
        self._evaluated_step = state.evaluated_step
        self._log = StepLog(state.zero_weight_steps, self._ranks)
        RngState.from_json(state.rng[min(self._ranks.rank, len(state.rng) - 1)]).restore(self._device)
        logger.info("resumed from %s as attempt %d", path, self._metrics.attempt)

    def _end_early(self) -> None:
        """Leave a checkpoint of the last step boundary if it can be written in time."""
        # A fifth of the grace is left for everything else that has to end.
        deadline = time.monotonic() + 0.8 * self._config.shutdown_grace_s
        for optimizer in self.optimizers.values():
            optimizer.discard()
        self._write_metrics(durable=True)
        # Only some ranks may have been writing: what follows is decided by all, and by the clock of the first.
        written = all(self._ranks.gather(self._checkpoints.wait(max(0.0, deadline - time.monotonic()))))
        if written and self.step > 0 and self._saved_step != self.step:
            expected_s, left_s = self._ranks.gather(
                (self._checkpoints.expected_s(self._tensors()), deadline - time.monotonic())
            )[0]
            if expected_s > left_s:
                logger.warning(
                    "stopped after step %d without a checkpoint of it: writing takes about %.1f s, %.1f s are left "
                    "(training.shutdown_grace_s)",
                    self.step,
                    expected_s,
                    left_s,
                )
                return
            self._save()
            written = self._checkpoints.wait(max(0.0, deadline - time.monotonic()))
        if not written:
            logger.warning("stopped after step %d before its checkpoint was written; the last one stands", self.step)

    def _say_what_is_lost(self) -> None:
        """One of several ranks waited for a row until its time was over, and cannot tell the others."""
        if self._ranks.asked_to_stop and self.step > 0 and self._saved_step != self.step:
            logger.warning(
                "stopped in step %d, and without a checkpoint of step %d: a row did not come in time for all ranks to "
                "end together (training.shutdown_grace_s)",
                self.step + 1,
                self.step,
            )

    def _result(self, status: Literal["finished", "stopped"]) -> TrainingResult:
        return TrainingResult(status, self.step, self._checkpoints.latest(), dict(self._best))


@contextlib.contextmanager
def _memory_explained() -> Iterator[None]:
    """Turn exhausted memory into an error that names the settings to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # The CPU allocator has no class of its own.
        exhausted = (MemoryError, torch.OutOfMemoryError)
        if not isinstance(error, exhausted) and "can't allocate memory" not in str(error):
            raise
        raise OutOfMemoryError(
            f"{str(error).splitlines()[0] if str(error) else 'out of memory'}: set training.activation_checkpointing "
            "= true, or lower training.head_chunk_tokens or data.row_tokens"
        ) from error
