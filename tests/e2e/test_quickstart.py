"""The quickstart, shortened: every part runs, nothing is done twice, and an interruption costs nothing."""

import json
import signal
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from forking import Commands
from paceline.config.loading import load_config

PARTS = ["conversations", "regenerate", "prepare", "train", "evaluate", "export", "report"]


@pytest.fixture(scope="module")
def finished(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("quickstart") / "run"
    command = commands.start("quickstart", "--short", "--directory", str(directory))
    assert command.wait(280) == 0, command.output
    return directory, command.output


def test_every_part_runs_and_output_is_identical_to_generate(finished: tuple[Path, str]) -> None:
    directory, output = finished
    assert json.loads((directory / "quickstart.json").read_text())["done"] == PARTS
    results = json.loads((directory / "evaluation.json").read_text())
    assert set(results["drafts"]) == {"eagle3", "dflash"}
    for figures in results["drafts"].values():
        assert figures["lossless"] == "exact"
        assert figures["walk"]["agreeing_steps"] == figures["steps"]
        assert 1.0 <= figures["untrained"]["acceptance_length"] <= figures["acceptance_length"]
    assert 0.0 < results["repeated_4grams"] < 0.3
    assert len(results["samples"]) == 2
    assert all(sample["answer"] and sample["answer"][:20] in output for sample in results["samples"])
    for name in ("eagle3", "dflash"):
        assert {file.name for file in (directory / "export" / name).iterdir()} == {"config.json", "model.safetensors"}
    report = (directory / "report.html").read_text()
    assert "<svg" in report
    target = AutoModelForCausalLM.from_pretrained(load_config(directory / "quickstart.toml").target.model)
    assert f"{target.num_parameters() / 1e6:.1f} million weights" in report
    load_config(directory / "quickstart.toml")  # can be trained from by hand


def test_held_out_prompts_are_about_modules_that_drafts_are_not_trained_on(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    modules = [
        {json.loads(line)["module"] for line in (directory / name).read_text().splitlines()}
        for name in ("conversations.jsonl", "held-out.jsonl")
    ]
    assert all(len(group) > 3 for group in modules)
    assert not modules[0] & modules[1]


def test_run_again_it_reuses_everything(commands: Commands, finished: tuple[Path, str]) -> None:
    directory, _ = finished
    metrics = (directory / "metrics.jsonl").read_bytes()
    command = commands.start("quickstart", "--short", "--directory", str(directory))
    assert command.wait(60) == 0, command.output
    assert command.output.count("done before") == len(PARTS) - 1
    assert (directory / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.long
def test_interrupted_in_every_part_it_goes_on(commands: Commands, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    interrupted = []
    for part in PARTS[:-1]:
        command = commands.start("quickstart", "--short", "--directory", str(directory))
        began = command.wait_until(lambda command=command, part=part: f"\n{part}: " in "\n" + command.output, 280)  # type: ignore[misc]
        if began:
            command.send_signal(signal.SIGINT)
        if command.wait(280) == 130:
            interrupted.append(part)
    assert len(interrupted) >= 3, interrupted
    command = commands.start("quickstart", "--short", "--directory", str(directory))
    assert command.wait(280) == 0, command.output
    assert json.loads((directory / "evaluation.json").read_text())["drafts"]["eagle3"]["lossless"] == "exact"
