"""Data that changes under a run: it neither goes on with other rows, nor gives its drafts another vocabulary."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.data.conversations import read_conversations
from paceline.drafts.published import read_published
from paceline.errors import ConfigError, RunDirectoryError
from paceline.launch.evaluate import evaluate_run
from paceline.launch.export import export_run
from paceline.launch.trained import load_run_config
from whole_run import conversation, run, run_config, write_data, write_lines


@pytest.fixture
def finished(tiny_target: Path, tmp_path: Path) -> RunConfig:
    data = write_data(tmp_path / "data")
    config = run_config(
        tmp_path / "run",
        tiny_target,
        data,
        training__max_steps=1,
        evaluation__num_prompts=1,
        evaluation__max_new_tokens=4,
    )
    assert run(config).status == "finished"
    return config


def add_letters_of_their_own(config: RunConfig) -> None:
    """Conversations in other letters than the first ones: other tokens become the most frequent."""
    rows = [*(c.raw for c in read_conversations(config.data.train))]
    for index in range(200, 400):
        row = conversation(index)
        row["messages"][1]["content"] = row["messages"][1]["content"].upper()
        rows.append(row)
    write_lines(Path(config.data.train), rows)


def exported_vocabulary(config: RunConfig) -> torch.Tensor:
    return read_published(export_run(config, ["eagle3"], "latest")["eagle3"])[1]["d2t"]


def test_an_export_has_the_vocabulary_that_was_trained_also_after_the_data_changed(finished: RunConfig) -> None:
    before = exported_vocabulary(finished)
    add_letters_of_their_own(finished)
    assert torch.equal(exported_vocabulary(finished), before)
    Path(finished.data.train).unlink()
    shutil.rmtree(str(finished.data.cache_dir))
    assert torch.equal(exported_vocabulary(finished), before)


def test_an_evaluation_on_other_data_says_so_and_keeps_the_vocabulary(
    finished: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    first = evaluate_run(finished, ["eagle3"], "latest")
    assert "not the data" not in caplog.text
    add_letters_of_their_own(finished)
    second = evaluate_run(finished, ["eagle3"], "latest")
    assert "not the data" in caplog.text
    for key in ("rate", "steps", "acceptance_length_all"):
        assert first.drafts["eagle3"][key] == second.drafts["eagle3"][key]


def test_a_run_does_not_go_on_with_other_data(finished: RunConfig) -> None:
    add_letters_of_their_own(finished)
    with pytest.raises(RunDirectoryError, match="other data"):
        run(finished)


def test_a_trained_draft_cannot_be_given_other_settings_afterwards(finished: RunConfig) -> None:
    directory = RunDir(Path(finished.run_dir)).root
    assert load_run_config(directory, ["evaluation.num_prompts=2"]).evaluation.num_prompts == 2
    with pytest.raises(ConfigError, match=r"drafts\.eagle3"):
        load_run_config(directory, ["drafts.eagle3.target_layers=[0,1]"])
