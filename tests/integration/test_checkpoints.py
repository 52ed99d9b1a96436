"""Checkpoints under real conditions: killed processes, full disks, flipped bits."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

import toy_training
from paceline.config.run_dir import RunDir
from paceline.errors import CheckpointError, RunDirectoryError, StoppedError
from paceline.observe.metrics import read_metrics
from paceline.training.checkpoint import (
    ShardWriter,
    best_checkpoint,
    latest_checkpoint,
    load_draft_weights,
    load_state,
)
from toy_training import (
    FP32,
    KILL_CONFIG,
    NUM_KILL_ROWS,
    loss_trace,
    toy_draft,
    toy_row,
    toy_trainer,
)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def train(run_dir: Path, num_rows: int = 8, **changes: Any) -> Any:
    """A trainer that has run, on the toy's configuration with `changes`."""
    fields = {name: changes.pop(name) for name in list(changes) if name in type(FP32).model_fields}
    trainer = toy_trainer(run_dir, num_rows, FP32.model_copy(update=fields), **changes)
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def killed_and_whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A run killed again and again, the same run left alone, and what the killer said."""
    killed, whole = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("whole")
    command = [sys.executable, str(toy_training.__file__)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run([*command, str(killed), "7"], capture_output=True, text=True, env=environment, check=False)
    assert said.returncode == 0, said.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    drafts = {"a": toy_draft(seed=1, width=4096), "b": toy_draft(seed=2)}
    toy_trainer(whole, NUM_KILL_ROWS, KILL_CONFIG, drafts=drafts).run()
    torch.set_num_threads(threads)
    return killed, whole, said.stdout


def test_killed_at_any_step_the_run_goes_on_bit_equal(killed_and_whole: tuple[Path, Path, str]) -> None:
    killed, whole, said = killed_and_whole
    assert said.split("\n")[:3] == ["killed"] * 3
    assert "exit 0" in said
    assert max(line["attempt"] for line in read_metrics(RunDir(killed).metrics)) >= 5
    assert loss_trace(killed) == loss_trace(whole)
    for draft in "ab":
        ours, theirs = (load_draft_weights(latest_checkpoint(RunDir(run)), draft) for run in (killed, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_killed_in_the_middle_of_a_write_leaves_nothing_that_is_taken_for_a_checkpoint(
    killed_and_whole: tuple[Path, Path, str],
) -> None:
    killed, whole, said = killed_and_whole
    assert "killed while writing" in said, "no kill fell into a write: the premise does not hold"
    assert names(killed) == names(whole)


def test_resume_is_the_same_whichever_step_the_checkpoint_fell_on(tmp_path: Path) -> None:
    train(tmp_path / "whole", 10, checkpoint_every=1, keep_checkpoints=20)
    whole = loss_trace(tmp_path / "whole")
    for step in (0, 1, 4, 9):
        copy = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole", copy)
        (copy / "metrics.jsonl").unlink()
        for name in names(copy):
            if int(name.removeprefix("step-")) > step:
                shutil.rmtree(copy / "checkpoints" / name)
        train(copy, 10)
        assert loss_trace(copy) == whole[step:]


def test_the_final_checkpoint_is_written_exactly_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "paceline.training.checkpoint")
    for checkpoint_every in (0, 4, 3):
        caplog.clear()
        train(tmp_path / str(checkpoint_every), 8, checkpoint_every=checkpoint_every)
        finals = [record for record in caplog.records if "step-00000008 written" in record.getMessage()]
        assert len(finals) == 1
    assert names(tmp_path / "0") == ["step-00000008"]


def test_zero_steps_leave_one_checkpoint_and_running_again_changes_nothing(tmp_path: Path) -> None:
    evaluated: list[int] = []

    def evaluate(step: int) -> dict[str, dict[str, Any]]:
        evaluated.append(step)
        return {name: {"acceptance_length": 1.0} for name in "ab"}

    for _ in range(2):
        train(tmp_path, 8, max_steps=0, evaluate=evaluate)
        assert names(tmp_path) == ["step-00000000"]
    assert evaluated == [0]
    state = load_state(latest_checkpoint(RunDir(tmp_path)))
    assert (state.step, state.position, state.attempt) == (0, 0, 1)


def test_resume_at_the_end_writes_nothing_again(tmp_path: Path) -> None:
    train(tmp_path, 4)
    before = (tmp_path / "checkpoints/step-00000004/manifest.json").stat().st_mtime_ns
    result = toy_trainer(tmp_path, 4).run()
    assert (result.status, result.step) == ("finished", 4)
    assert (tmp_path / "checkpoints/step-00000004/manifest.json").stat().st_mtime_ns == before
    assert [line["attempt"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1] * 5


def test_a_final_evaluation_that_was_interrupted_is_made_up_for(tmp_path: Path) -> None:
    stop = threading.Event()

    def interrupted(step: int) -> dict[str, dict[str, Any]]:
        stop.set()
        raise StoppedError("the evaluation was stopped")

    result = toy_trainer(tmp_path, 4, evaluate=interrupted, stop=stop).run()
    assert (result.status, result.step) == ("stopped", 4)
    assert load_state(latest_checkpoint(RunDir(tmp_path))).evaluated_step is None
    train(tmp_path, 4)
    state = load_state(latest_checkpoint(RunDir(tmp_path)))
    assert (state.step, state.evaluated_step, state.best["a"].acceptance_length) == (4, 4, 5.0)
    assert names(tmp_path) == ["step-00000004"]


def test_rotation_keeps_the_newest_and_each_drafts_best_and_what_is_not_ours(tmp_path: Path) -> None:
    lengths = {"a": [1.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0], "b": [1.0, 1.0, 1.0, 4.0, 1.0, 1.0, 1.0, 1.0]}
    stranger = tmp_path / "checkpoints" / "step-00000001"
    train(tmp_path / "other", 1, run_id="another")
    shutil.copytree(tmp_path / "other/checkpoints/step-00000001", stranger)
    (tmp_path / "checkpoints/notes").mkdir()

    trainer = toy_trainer(
        tmp_path,
        8,
        FP32.model_copy(update={"eval_every": 1, "checkpoint_every": 1, "keep_checkpoints": 2}),
        evaluate=lambda step: {name: {"acceptance_length": lengths[name][step - 1]} for name in "ab"},
    )
    with pytest.raises(RunDirectoryError, match="belongs to run another, this is run toy"):
        trainer.run()
    stranger.rename(tmp_path / "checkpoints/step-00000001-of-another")
    trainer.run()
    assert names(tmp_path) == [
        "notes",
        "step-00000001-of-another",
        "step-00000002",
        "step-00000004",
        "step-00000007",
        "step-00000008",
    ]
    assert best_checkpoint(RunDir(tmp_path), "a").name == "step-00000002"
    assert best_checkpoint(RunDir(tmp_path), "b").name == "step-00000004"


def test_rotation_never_removes_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    train(tmp_path / "other", 1, run_id="another")

    def evaluate(step: int) -> dict[str, dict[str, Any]]:
        if step == 3:  # put there while the run goes on
            shutil.copytree(tmp_path / "other/checkpoints/step-00000001", tmp_path / "checkpoints/step-00000001")
        return {name: {"acceptance_length": 1.0 + step} for name in "ab"}

    train(tmp_path, 6, eval_every=3, keep_checkpoints=1, checkpoint_every=2, evaluate=evaluate)
    assert names(tmp_path) == ["step-00000001", "step-00000006"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path: Path, damage: str) -> None:
    train(tmp_path, 6, checkpoint_every=3)
    (data,) = (tmp_path / "checkpoints/step-00000006").glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        data.unlink()
    else:
        data.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(CheckpointError, match=rf"{data}.*remove .*step-00000006 to resume from the checkpoint before"):
        toy_trainer(tmp_path, 6).run()
    with pytest.raises(CheckpointError, match=str(data)):
        load_draft_weights(latest_checkpoint(RunDir(tmp_path)), "a")
    shutil.rmtree(tmp_path / "checkpoints/step-00000006")
    train(tmp_path, 6)
    assert loss_trace(tmp_path)[-1][0] == 6


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_a_damaged_description_is_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    train(tmp_path, 2)
    (tmp_path / "checkpoints/step-00000002" / name).write_text("{")
    with pytest.raises(CheckpointError, match=name):
        toy_trainer(tmp_path, 2).run()


def test_weights_of_a_draft_can_be_read_alone(tmp_path: Path) -> None:
    trainer = train(tmp_path, 3)
    loaded = load_draft_weights(latest_checkpoint(RunDir(tmp_path)), "b")
    assert loaded.keys() == dict(trainer.drafts["b"].draft.named_parameters()).keys()
    for name, parameter in trainer.drafts["b"].draft.named_parameters():
        assert torch.equal(loaded[name], parameter)
    with pytest.raises(CheckpointError, match="no draft 'c'; it has a, b"):
        load_draft_weights(latest_checkpoint(RunDir(tmp_path)), "c")


def test_weights_that_change_during_an_asynchronous_write_are_saved_as_they_were(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, 3)
    first_layer = trainer.drafts["a"].draft.get_submodule("0")
    assert isinstance(first_layer, torch.nn.Linear)
    trainer.train_step([toy_row(0)])
    expected = first_layer.weight.detach().clone()
    trainer._save()
    with torch.no_grad():
        first_layer.weight.zero_()
    assert trainer._checkpoints.wait()
    assert torch.equal(load_draft_weights(latest_checkpoint(RunDir(tmp_path)), "a")["0.weight"], expected)


def test_a_checkpoint_of_other_drafts_or_another_plan_is_refused(tmp_path: Path) -> None:
    train(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"drafts/a/\S+ has shape"):
        train(tmp_path, 4, drafts={"a": toy_draft(width=8)})
    with pytest.raises(CheckpointError, match="no tensor drafts/z/"):
        train(tmp_path, 4, drafts={"z": toy_draft()})
    with pytest.raises(RunDirectoryError, match="rows_per_step was 1, is 2 now"):
        train(tmp_path, 8, rows_per_step=2)
    with pytest.raises(RunDirectoryError, match="optimizer steps was 4, is 5 now"):
        train(tmp_path, 5)


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writing past `num_bytes` in any file fails, as on a full disk; the kernel does it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_write_that_fails_ends_the_run_and_the_last_checkpoint_stands(tmp_path: Path, asynchronous: bool) -> None:
    wide = {"a": toy_draft(width=1024)}
    train(tmp_path / "whole", 6, drafts={"a": toy_draft(width=1024)}, checkpoint_every=3)

    def evaluate(step: int) -> dict[str, dict[str, Any]]:
        while names(tmp_path / "run") != ["step-00000003"]:
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return {"a": {"acceptance_length": 1.0}}

    with file_size_limit(resource.RLIM_INFINITY), pytest.raises(CheckpointError, match=r"too large.*step-00000003"):
        train(
            tmp_path / "run",
            6,
            drafts=wide,
            checkpoint_every=3,
            async_checkpoints=asynchronous,
            evaluate=evaluate,
        )
    assert names(tmp_path / "run") == ["step-00000003"]
    train(tmp_path / "run", 6, drafts={"a": toy_draft(width=1024)}, checkpoint_every=3)
    assert loss_trace(tmp_path / "run") == loss_trace(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_why_a_rank_could_not_write_its_shards_reaches_the_others(tmp_path: Path) -> None:
    """Ranks tell each other by pickled errors, which have lost what they came from."""
    with file_size_limit(1000), pytest.raises(CheckpointException) as caught:
        save({"weights": torch.zeros(10_000)}, storage_writer=ShardWriter(tmp_path), no_dist=True)
    error = pickle.loads(pickle.dumps(caught.value.failures[0][0]))
    assert str(error) == "File too large"
    assert error.__cause__ is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here; RLIMIT_FSIZE covers the same code")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(small_disk: Path) -> None:
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(small_disk, 4, checkpoint_every=2, keep_checkpoints=20, drafts={"a": toy_draft(width=350)})
    (kept,) = names(small_disk)
    assert load_state(small_disk / "checkpoints" / kept).step == 2


def test_leftovers_of_a_crash_are_cleaned_and_a_replaced_checkpoint_comes_back(tmp_path: Path) -> None:
    train(tmp_path, 4, checkpoint_every=2)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-00000004").rename(checkpoints / ".replaced-step-00000004")
    shutil.copytree(checkpoints / "step-00000002", checkpoints / ".writing-step-00000004")
    (checkpoints / ".removing-step-00000001").mkdir()
    (checkpoints / ".writing-notes").mkdir()
    train(tmp_path, 4)
    assert names(tmp_path) == [".writing-notes", "step-00000002", "step-00000004"]


def test_metrics_are_on_the_disk_before_their_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, 6, log_every=100, checkpoint_every=2, keep_checkpoints=9)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for step in (2, 4, 6):
        published = (tmp_path / f"checkpoints/step-{step:08d}/manifest.json").stat().st_mtime
        assert all(line["time"] <= published + 0.01 for line in lines if line["step"] <= step)
