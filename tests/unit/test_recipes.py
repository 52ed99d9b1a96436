"""Every recipe in every placement, and every example of the page on placements: planned, as `paceline plan` would"""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from paceline.cli.main import app
from paceline.config.loading import apply_overrides, build_config
from paceline.config.run import RunConfig
from paceline.launch.devices import named_device
from paceline.launch.plan import num_gpus_wanted, plan_processes
from paceline.launch.predict import Prediction, describe_prediction, find_workload, predict
from shapes_of_targets import save_qwen3_8b, save_qwen3_30b_a3b
from whole_run import QuietSignals

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
PAGE = (ROOT / "docs" / "choosing-a-placement.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```toml\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(
    r"^paceline (?:train|record|plan) (recipes/\S+\.toml.*)$",
    (ROOT / "recipes" / "README.md").read_text(encoding="utf-8"),
    flags=re.MULTILINE,
)
H100 = named_device("H100")


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories with the config.json of the targets of recipes, by hub id."""
    return {
        "Qwen/Qwen3-8B": str(save_qwen3_8b(tmp_path_factory.mktemp("8b"))),
        "Qwen/Qwen3-30B-A3B": str(save_qwen3_30b_a3b(tmp_path_factory.mktemp("30b"))),
    }


def planned(text: str, overrides: list[str], targets: dict[str, str]) -> Prediction | None:
    """Plan a run as a machine with enough GPUs would; None where a recording that is not there would be opened."""
    config = build_config(apply_overrides(tomllib.loads(text), overrides))
    here = config.target.model_copy(update={"model": targets[config.target.model]})
    config = config.model_copy(update={"target": here})
    check_processes(config)
    if config.placement.target == "recorded":
        return None
    prediction = predict(config, H100, *find_workload(config))
    assert isinstance(prediction, Prediction)
    lines = describe_prediction(config, plan_processes(config, num_gpus_wanted(config)), "H100")
    assert any(line.startswith("the run: ") for line in lines)
    return prediction


def check_processes(config: RunConfig) -> None:
    """Each process the run starts has GPUs of its own, and all that were thought to be wanted are used."""
    processes = plan_processes(config, num_gpus_wanted(config))
    used = [device for process in processes if process.started_by == "this command" for device in process.devices]
    assert len(set(used)) == len(used)
    if config.placement.launcher == "local":
        assert sorted(used) == [f"cuda:{index}" for index in range(num_gpus_wanted(config))]
        assert sum(process.role == "trainer" for process in processes) == config.placement.num_trainers


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_planned_and_fits_into_80_gb(path: Path, targets: dict[str, str]) -> None:
    prediction = planned(path.read_text(encoding="utf-8"), [], targets)
    assert prediction is not None
    assert max(prediction.memory_bytes.values()) < 80 * 2**30
    assert prediction.balance.tokens_per_s > 1000


@pytest.mark.parametrize("command", COMMANDS)
def test_every_placement_of_a_recipe_is_planned(command: str, targets: dict[str, str]) -> None:
    words = shlex.split(re.sub(r" --(device|output) \S+", "", command))
    planned((ROOT / words[0]).read_text(encoding="utf-8"), words[1:], targets)


def test_both_targets_are_there_in_every_placement() -> None:
    for target in ("qwen3-8b", "qwen3-30b-a3b"):
        shown = " ".join(command for command in COMMANDS if target in command)
        for setting in ("num_trainers=", "target=urls", "target=recorded", "launcher=external"):
            assert f"placement.{setting}" in shown
    assert len(COMMANDS) > 12


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: tomllib.loads(text)["run_dir"])
def test_every_example_of_a_placement_is_planned(example: str, targets: dict[str, str]) -> None:
    planned(example, [], targets)


def test_every_situation_of_the_decision_table_has_an_example() -> None:
    table = PAGE.partition("## In short")[2].partition("\n## ")[0]
    linked = set(re.findall(r"\]\(#([\w-]+)\)", table))
    sections = re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    with_example = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title, text in sections if "```toml" in text
    }
    assert linked == with_example
    assert len(EXAMPLES) == len(with_example)


def test_the_command_says_it_too(targets: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    model = f"target.model={targets['Qwen/Qwen3-8B']}"
    arguments = ["plan", str(ROOT / "recipes" / "qwen3-8b-eagle3.toml"), model, "placement.target=servers"]
    app([*arguments, "--device", "H100"], obj=QuietSignals(), standalone_mode=False)
    said = capsys.readouterr().out
    assert "server-0" in said
    assert "cuda:1" in said
    assert "prediction for H100" in said
    assert "1 more server would give 1.8x" in said
