"""The loop: one division, no waiting for the device, loud failure, orderly ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from paceline.config.run_dir import RunDir
from paceline.config.training import ProfileConfig, TrainingConfig
from paceline.drafts.interface import LossTerms
from paceline.errors import DataError, OutOfMemoryError, PacelineError, StoppedError
from paceline.schema.features import FeatureRow, Features
from paceline.schema.rows import Row
from paceline.training.checkpoint import latest_checkpoint
from paceline.training.trainer import Trainer
from toy_training import (
    FP32,
    NUM_TOKENS,
    ToyDraft,
    ToyStream,
    loss_trace,
    toy_draft,
    toy_row,
    toy_trainer,
    training_lines,
)


class NoHostCopies(TorchDispatchMode):
    """Fails where a tensor's value is asked for on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read on the host"
        assert "nonzero" not in str(func), "a shape depends on values"
        return func(*args, **(kwargs or {}))


def with_config(**changes: Any) -> TrainingConfig:
    return FP32.model_copy(update=changes)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        f"{draft}/{name}": tensor.clone()
        for draft, optimizer in trainer.optimizers.items()
        for name, tensor in optimizer.tensors().items()
    }


def one_row_of(rows: list[FeatureRow]) -> FeatureRow:
    """The rows' documents end to end."""
    tokens = [row.row.tokens for row in rows]
    starts = [sum(len(t) for t in tokens[:i]) for i in range(len(rows))]
    joined = Row(
        position=0,
        epoch=0,
        row_id=0,
        tokens=np.concatenate(tokens),
        documents=rows[0].row.documents,
        spans=np.concatenate([row.row.spans + start for row, start in zip(rows, starts, strict=True)]),
        span_cut=rows[0].row.span_cut,
        sample_ids=rows[0].row.sample_ids,
        pieces=rows[0].row.pieces,
    )
    hidden = torch.cat([row.features.hidden for row in rows])
    return FeatureRow(joined, Features((0,), hidden, None, None, None, None, "", finite=True))


def test_the_update_does_not_depend_on_how_tokens_are_split_over_micro_steps(tmp_path: Path) -> None:
    rows = [toy_row(position, supervised=position + 2) for position in range(4)]
    ways = [[[*rows]], [[one_row_of(rows)]], [[one_row_of(rows[:1]), one_row_of(rows[1:])]]]
    results = []
    for number, (split,) in enumerate(ways):
        drafts = {"a": toy_draft(dropout=0.0, max_grad_norm=0.05)}
        trainer = toy_trainer(tmp_path / str(number), drafts=drafts)
        record = trainer.train_step(split)
        assert record.grad_norms["a"] > 0.05, "clipping takes part"
        results.append(weights(trainer))
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(other[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_a_step_never_waits_for_the_device(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path)
    with NoHostCopies():
        for step in range(3):
            trainer.train_step([toy_row(step, supervised=0 if step == 1 else 4)])
    with pytest.raises(AssertionError, match="read on the host"), NoHostCopies():
        torch.ones(()).item()


def test_a_bf16_step_never_waits_for_the_device_either(tmp_path: Path) -> None:
    class Bf16Draft(ToyDraft):
        def loss(self, row: FeatureRow) -> LossTerms:
            row.features.hidden = row.features.hidden.bfloat16()
            return super().loss(row)

    draft = toy_draft(dtype=torch.bfloat16)
    draft.__class__ = Bf16Draft
    trainer = toy_trainer(tmp_path, drafts={"a": draft})
    before = weights(trainer)["a/master/0.weight"]
    with NoHostCopies():
        trainer.train_step([toy_row(0)])
    assert not torch.equal(weights(trainer)["a/master/0.weight"], before)


def test_steps_without_weight_change_nothing_and_are_counted(tmp_path: Path) -> None:
    full = toy_trainer(tmp_path / "full", 4, stream=ToyStream(4), drafts={"a": toy_draft(dropout=0.0)})
    full.train_step([toy_row(0)])
    expected = weights(full)
    empty_after_first = ToyStream(4, lambda position: toy_row(position, supervised=0 if position else NUM_TOKENS // 2))
    trainer = toy_trainer(tmp_path / "empty", 4, stream=empty_after_first, drafts={"a": toy_draft(dropout=0.0)})
    trainer.run()
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, expected[name]), name
    lines = training_lines(tmp_path / "empty")
    assert [line["drafts"]["a"]["zero_weight_steps"] for line in lines] == [0, 1, 2, 3]
    assert [line["drafts"]["a"]["loss"] is None for line in lines] == [False, True, True, True]


def test_losses_and_accuracies_are_means_over_supervised_tokens(tmp_path: Path) -> None:
    draft = toy_draft(dropout=0.0)
    terms = [draft.loss(toy_row(position, supervised=position + 3)) for position in range(2)]
    toy_trainer(
        tmp_path,
        2,
        with_config(rows_per_step=2),
        drafts={"a": toy_draft(dropout=0.0)},
        stream=ToyStream(2, lambda position: toy_row(position, supervised=position + 3)),
    ).run()
    (line,) = training_lines(tmp_path)
    assert line["drafts"]["a"]["loss"] == pytest.approx(sum(t.total.item() for t in terms) / 7)
    right = sum(t.metrics["accuracy"][0, 0].item() for t in terms)
    assert line["drafts"]["a"]["per_position"]["accuracy"] == pytest.approx([right / 7])
    assert (line["rows"], line["tokens"], line["supervised_tokens"]) == (2, 2 * NUM_TOKENS, 7)
    assert set(line["seconds"]) == {"data_wait", "step", "forward", "backward", "optimizer"}


def test_the_last_step_holds_the_rows_that_are_left(tmp_path: Path) -> None:
    result = toy_trainer(tmp_path, 7, with_config(rows_per_step=3)).run()
    assert result.step == 3
    assert [line["rows"] for line in training_lines(tmp_path)] == [3, 3, 1]


def test_every_step_is_written_whatever_the_logging_interval(tmp_path: Path) -> None:
    for log_every in (1, 4):
        toy_trainer(tmp_path / str(log_every), 10, with_config(log_every=log_every)).run()
    assert [step for step, _ in loss_trace(tmp_path / "4")] == list(range(1, 11))
    assert loss_trace(tmp_path / "1") == loss_trace(tmp_path / "4")


def test_a_loss_that_is_not_finite_fails_at_the_next_interval_and_is_never_saved(tmp_path: Path) -> None:
    def make_row(position: int) -> FeatureRow:
        row = toy_row(position)
        if position == 4:
            row.features.hidden[0] = float("nan")
        return row

    trainer = toy_trainer(tmp_path, 20, with_config(log_every=3, checkpoint_every=4), stream=ToyStream(20, make_row))
    with pytest.raises(PacelineError, match=r"step 5: the loss of draft 'a' is nan"):
        trainer.run()
    assert trainer.step == 6, "found at the interval's end, not before"
    assert latest_checkpoint(RunDir(tmp_path)).name == "step-00000004"


def test_a_stream_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ended before position 3; 5 rows were planned"):
        toy_trainer(tmp_path, 5, stream=ToyStream(3)).run()


def test_exhausted_memory_names_the_settings_to_lower(tmp_path: Path) -> None:
    class Greedy(ToyDraft):
        def loss(self, row: FeatureRow) -> LossTerms:
            torch.empty(1 << 55)
            return super().loss(row)

    draft = toy_draft()
    draft.__class__ = Greedy
    with pytest.raises(OutOfMemoryError, match=r"activation_checkpointing = true.*head_chunk_tokens.*row_tokens"):
        toy_trainer(tmp_path, drafts={"a": draft}).run()


def test_other_runtime_errors_are_not_called_memory(tmp_path: Path) -> None:
    class Wrong(ToyDraft):
        def loss(self, row: FeatureRow) -> LossTerms:
            torch.ones(2) @ torch.ones(3)
            return super().loss(row)

    draft = toy_draft()
    draft.__class__ = Wrong
    with pytest.raises(RuntimeError, match=r"inconsistent tensor size|size mismatch|same length|same size"):
        toy_trainer(tmp_path, drafts={"a": draft}).run()


def test_evaluation_runs_without_gradients_in_eval_mode_and_picks_the_best(tmp_path: Path) -> None:
    seen: list[tuple[int, bool, bool]] = []
    figures = {2: 1.5, 4: 3.5, 6: 2.5, 7: 2.0}
    draft = toy_draft()

    def evaluate(step: int) -> dict[str, dict[str, Any]]:
        seen.append((step, draft.draft.training, torch.is_grad_enabled()))
        return {"a": {"acceptance_length": figures[step], "per_position": [0.5]}}

    result = toy_trainer(tmp_path, 7, with_config(eval_every=2), drafts={"a": draft}, evaluate=evaluate).run()
    assert seen == [(step, False, False) for step in figures]
    assert draft.draft.training
    assert (result.best["a"].step, result.best["a"].acceptance_length) == (4, 3.5)


def test_stopping_in_the_middle_of_a_step_keeps_the_step_before(tmp_path: Path) -> None:
    stop = threading.Event()

    def make_row(position: int) -> FeatureRow:
        if position == 7:
            stop.set()
        return toy_row(position)

    config = with_config(rows_per_step=3)
    trainer = toy_trainer(tmp_path / "stopped", 15, config, stream=ToyStream(15, make_row), stop=stop)
    result = trainer.run()
    assert (result.status, result.step) == ("stopped", 2)
    assert result.checkpoint is not None
    assert result.checkpoint.name == "step-00000002"
    resumed = toy_trainer(tmp_path / "stopped", 15, config)
    assert resumed.run().status == "finished"
    whole = toy_trainer(tmp_path / "whole", 15, config)
    whole.run()
    assert loss_trace(tmp_path / "stopped") == loss_trace(tmp_path / "whole")
    for name, tensor in weights(resumed).items():
        assert torch.equal(tensor, weights(whole)[name]), name


def test_stopping_with_too_little_time_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    stop = threading.Event()

    def make_row(position: int) -> FeatureRow:
        if position == 5:
            stop.set()
        return toy_row(position)

    config = with_config(checkpoint_every=4, shutdown_grace_s=1e-6)
    trainer = toy_trainer(tmp_path, 15, config, stream=ToyStream(15, make_row), stop=stop)
    result = trainer.run()
    assert (result.status, result.step) == ("stopped", 6)
    trainer._checkpoints.wait()
    assert latest_checkpoint(RunDir(tmp_path)).name == "step-00000004"


def test_a_stream_that_stops_by_itself_is_not_taken_for_the_users_wish(tmp_path: Path) -> None:
    class Closed(ToyStream):
        def __iter__(self) -> Iterator[FeatureRow]:
            yield toy_row(0)
            raise StoppedError("the stream was closed")

    with pytest.raises(StoppedError, match="was closed"):
        toy_trainer(tmp_path, 5, stream=Closed(5)).run()


def test_a_window_of_steps_is_profiled(tmp_path: Path) -> None:
    toy_trainer(tmp_path, 6, with_config(profile=ProfileConfig(start=2, steps=2))).run()
    trace = (tmp_path / "profile" / "steps-2-3.json").read_text()
    assert trace.count('"name": "aten::_fused_adamw_"') == 2 * 2 * 2, "two steps of two drafts, matrices and the rest"
