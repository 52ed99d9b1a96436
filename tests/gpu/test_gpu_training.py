"""The loop on a GPU: bf16, no waiting inside a step, checkpoints of GPU tensors, timings from events."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paceline.config.run_dir import RunDir
from paceline.drafts.interface import LossTerms
from paceline.errors import OutOfMemoryError
from paceline.schema.features import FeatureRow
from paceline.training.checkpoint import latest_checkpoint, load_draft_weights
from paceline.training.trainer import Trainer
from toy_training import FP32, ToyDraft, ToyStream, loss_trace, toy_draft, toy_row, toy_trainer, training_lines

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
CONFIG = FP32.model_copy(update={"dtype": "bfloat16", "device": "cuda", "log_every": 4, "checkpoint_every": 3})


def bf16_row(position: int) -> FeatureRow:
    row = toy_row(position, device=CUDA)
    row.features.hidden = row.features.hidden.bfloat16()
    return row


def bf16_trainer(run_dir: Path, num_rows: int = 8, width: int = 32) -> Trainer:
    drafts = {name: toy_draft(seed, torch.bfloat16, CUDA, width) for seed, name in enumerate("ab")}
    return toy_trainer(run_dir, num_rows, CONFIG, drafts=drafts, stream=ToyStream(num_rows, bf16_row))


def test_a_step_does_not_synchronize(tmp_path: Path) -> None:
    trainer = bf16_trainer(tmp_path)
    trainer.train_step([bf16_row(0)])
    rows = [bf16_row(1), bf16_row(2)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(rows)
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones((), device=CUDA).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_whole_run_resumes_bit_equal_from_an_asynchronous_checkpoint(tmp_path: Path) -> None:
    bf16_trainer(tmp_path / "whole").run()
    first = bf16_trainer(tmp_path / "resumed")
    for position in range(5):
        first.train_step([bf16_row(position)])
    first._work_due()
    first._save()
    for position in range(5, 8):  # must not reach the checkpoint that is being written
        first.train_step([bf16_row(position)])
    first._checkpoints.wait()
    bf16_trainer(tmp_path / "resumed").run()
    ours, theirs = (load_draft_weights(latest_checkpoint(RunDir(tmp_path / run)), "b") for run in ("whole", "resumed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loss_trace(tmp_path / "resumed")[-3:] == loss_trace(tmp_path / "whole")[-3:]


def test_times_come_from_the_device(tmp_path: Path) -> None:
    bf16_trainer(tmp_path, width=8192).run()
    for line in training_lines(tmp_path):
        assert all(0 < line["seconds"][name] < 60 for name in ("forward", "backward", "optimizer"))


def test_exhausted_gpu_memory_names_the_settings_to_lower(tmp_path: Path) -> None:
    class Greedy(ToyDraft):
        def loss(self, row: FeatureRow) -> LossTerms:
            torch.empty(1 << 42, device=CUDA)
            return super().loss(row)

    trainer = bf16_trainer(tmp_path)
    trainer.drafts["a"].__class__ = Greedy
    with pytest.raises(OutOfMemoryError, match=r"activation_checkpointing = true.*head_chunk_tokens.*row_tokens"):
        trainer.run()
