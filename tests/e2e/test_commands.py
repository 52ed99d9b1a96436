"""The commands as a user runs them: processes with arguments, signals, exit codes, and what they leave on disk."""

from __future__ import annotations

import importlib.util
import random
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import tomli_w
from safetensors.torch import load_file

from forking import Commands
from paceline.cli.main import app
from paceline.config.loading import build_config, load_config
from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.errors import ConfigError
from paceline.launch.doctor import examine_extras
from paceline.observe.metrics import read_metrics
from whole_run import QuietSignals, losses, run_config, run_table, same_weights, write_data

LONG = {"training__num_epochs": 500, "training__checkpoint_every": 5}
"""Hours of it; to be ended by somebody."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def write_config(run_dir: Path, target: Path, data: Path, **changes: object) -> Path:
    """run.toml beside `run_dir`."""
    path = run_dir.with_suffix(".toml")
    path.write_text(tomli_w.dumps(run_table(run_dir, target, data, **changes)))
    return path


def num_trained(run_dir: Path) -> int:
    metrics = RunDir(run_dir).metrics
    return metrics.read_bytes().count(b'"kind":"train"') if metrics.exists() else 0


def run_in_process(*arguments: object) -> None:
    """A command in this process; errors come through."""
    app([str(argument) for argument in arguments], obj=QuietSignals(), standalone_mode=False)


def test_help_is_there_before_torch_would_be(tmp_path: Path) -> None:
    program = (
        "import sys, paceline.cli.main as cli\n"
        "sys.argv = ['paceline', *sys.argv[1:]]\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 5  # about half a second alone; importing torch takes ten times as long
    for verb in ("quickstart", "regenerate", "prepare", "train", "evaluate", "export", "doctor", "config"):
        assert verb in done.stdout


def test_the_commands_of_a_run_one_after_the_other(
    tiny_target: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    config = write_config(
        run_dir,
        tiny_target,
        data,
        training__max_steps=4,
        evaluation__num_prompts=2,
        evaluation__max_new_tokens=12,
    )

    run_in_process("prepare", config)
    table = capsys.readouterr().out
    for word in ("samples", "24", "supervised", "fill", "eagle3", "64 of 300", "%"):
        assert word in table

    run_in_process("train", config)
    assert "finished after step 4" in capsys.readouterr().out

    run_in_process("evaluate", run_dir, "--baselines")
    table = capsys.readouterr().out
    assert (table.count("untrained"), table.count("lookup")) == (2, 2)
    assert table.count("exact") == 6
    assert RunDir(run_dir).evaluation.exists()

    run_in_process("export", run_dir, "--draft", "dflash", "--checkpoint", "latest")
    assert "dflash" in capsys.readouterr().out
    exported = RunDir(run_dir).export("dflash")
    assert load_file(exported / "model.safetensors")
    assert not RunDir(run_dir).export("eagle3").exists()

    again = run_config(
        tmp_path / "warm", tiny_target, data, drafts__dflash__init_from=str(exported), training__max_steps=0
    )
    started_from = write_config(tmp_path / "warm", tiny_target, data, drafts__dflash__init_from=str(exported))
    run_in_process("train", started_from, "training.max_steps=0")
    assert losses(again) == []


def test_a_configuration_shown_is_the_one_that_was_read(
    tiny_target: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "run", tiny_target, data)
    run_in_process("config", "show", config, "drafts.eagle3.num_depths=5", "training.device=cpu", "seed=7")
    shown = capsys.readouterr().out
    expected = load_config(config, ["drafts.eagle3.num_depths=5", "seed=7"])
    assert build_config(tomllib.loads(shown)) == expected
    assert expected.drafts["eagle3"].num_depths == 5
    run_in_process("config", "check", config)
    assert "correct; drafts: eagle3, dflash" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"drafts.eagle3.nm_depths: unknown key; did you mean 'num_depths'"):
        run_in_process("config", "check", config, "drafts.eagle3.nm_depths=5")


def test_doctor_says_what_works_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "vllm" else find(name, *more))
    run_in_process("doctor")
    said = capsys.readouterr().out
    for word in ("paceline", "torch", "CPU", "CUDA", "free space"):
        assert word in said
    assert 'pip install "paceline[vllm]"' in " ".join(said.split())


def test_doctor_names_the_extra_that_brings_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    missing = {finding.what: finding.detail for finding in examine_extras() if not finding.works}
    assert (
        {"tensorboard", "wandb", "vllm", "sglang"}
        <= missing.keys()
        <= pyproject["project"]["optional-dependencies"].keys()
    )
    for name, detail in missing.items():
        assert f'pip install "paceline[{name}]"' in detail


def test_a_mistake_is_one_message_and_exit_code_1(commands: Commands, tmp_path: Path) -> None:
    command = commands.start("config", "check", str(tmp_path / "nothing.toml"))
    assert command.wait() == 1
    assert command.output.strip() == (
        f"error: cannot read configuration {tmp_path / 'nothing.toml'}: No such file or directory"
    )


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_training_in_order_with_a_checkpoint(
    commands: Commands, tiny_target: Path, data: Path, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    run_dir = tmp_path / "run"
    config = write_config(run_dir, tiny_target, data, **(LONG | {"training__checkpoint_every": 0}))
    command = commands.start("train", str(config))
    assert command.wait_until(lambda: num_trained(run_dir) >= 3)
    command.send_signal(signum)
    asked = time.monotonic()
    assert command.wait(20) == code, command.output
    assert time.monotonic() - asked < 10
    assert "stopped after step" in command.output
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{num_trained(run_dir):08d}"


def test_a_signal_before_the_first_step_ends_the_command_too(
    commands: Commands, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run", tiny_target, data, **LONG)
    command = commands.start("train", str(config))
    assert command.wait_until(RunDir(tmp_path / "run").lock.exists)
    command.send_signal(signal.SIGTERM)
    assert command.wait(20) == 143, command.output


def test_a_second_trainer_in_a_run_directory_is_refused(
    commands: Commands, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    config = write_config(run_dir, tiny_target, data, **LONG)
    first = commands.start("train", str(config))
    assert first.wait_until(lambda: num_trained(run_dir) >= 1)
    second = commands.start("train", str(config))
    assert second.wait() == 1
    assert f"{run_dir} is in use by process {first.pid}" in second.output
    first.send_signal(signal.SIGKILL)
    first.wait()
    third = commands.start("train", str(config), "training.checkpoint_every=1")
    before = num_trained(run_dir)
    assert third.wait_until(lambda: num_trained(run_dir) > before), third.output
    third.send_signal(signal.SIGKILL)
    third.wait()


@pytest.mark.parametrize(
    ("fault", "said"), [("break_loss", "the loss is broken"), ("break_engine", "the engine is broken")]
)
def test_a_bug_ends_the_command_with_its_traceback(
    commands: Commands, tiny_target: Path, data: Path, tmp_path: Path, fault: str, said: str
) -> None:
    config = write_config(tmp_path / "run", tiny_target, data, **(LONG | {"training__checkpoint_every": 2}))
    command = commands.start(f"faults:{fault}", "train", str(config))
    assert command.wait(30) == 1
    assert f"ZeroDivisionError: {said}" in command.output
    assert "faults.py" in command.output, "the traceback tells the line"
    assert (tmp_path / "run/checkpoints/step-00000002/manifest.json").exists()


def test_exhausted_memory_names_the_settings_to_lower(
    commands: Commands, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run", tiny_target, data, **LONG)
    command = commands.start("faults:exhaust_memory", "train", str(config))
    assert command.wait(30) == 1
    assert "lower training.head_chunk_tokens or data.row_tokens" in command.output
    assert "Traceback" not in command.output


@pytest.mark.parametrize("async_checkpoints", [True, False])
def test_a_full_disk_ends_the_command_and_says_so(
    commands: Commands, tiny_target: Path, data: Path, tmp_path: Path, async_checkpoints: bool
) -> None:
    changes = LONG | {"training__async_checkpoints": async_checkpoints}
    config = write_config(tmp_path / "run", tiny_target, data, **changes)
    command = commands.start("faults:fill_disk", "train", str(config))
    assert command.wait(30) == 1
    assert "error: cannot write checkpoint" in command.output
    assert "File too large" in command.output
    assert "Traceback" not in command.output
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_metrics_that_cannot_be_written_end_the_command_and_say_so(
    commands: Commands, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run", tiny_target, data, **(LONG | {"training__checkpoint_every": 0}))
    command = commands.start("faults:fill_disk", "train", str(config))
    assert command.wait(60) == 1
    assert "error: cannot write to" in command.output.splitlines()[-1]
    assert "goes on from the newest checkpoint" in command.output


KILLED = {"training__num_epochs": 5, "training__rows_per_step": 2, "training__checkpoint_every": 3}


@pytest.fixture(scope="module")
def whole(commands: Commands, tiny_target: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The run that nobody killed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert commands.start("train", str(write_config(run_dir, tiny_target, data, **KILLED))).wait(120) == 0
    return run_config(run_dir, tiny_target, data, **KILLED)


def check_killed(commands: Commands, whole: RunConfig, target: Path, data: Path, run_dir: Path, kills: int) -> None:
    """Kill a run at random steps, let it end, and compare it with the whole one."""
    config = write_config(run_dir, target, data, **KILLED)
    chance, killed = random.Random(kills), 0
    while killed < kills:
        goal = num_trained(run_dir) + chance.randint(1, 6)

        def reached(goal: int = goal) -> bool:
            return num_trained(run_dir) >= goal

        command = commands.start("train", str(config))
        if not command.wait_until(reached):
            break
        time.sleep(chance.uniform(0, 0.05))
        command.send_signal(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        killed += 1
    assert killed, "the premise: it was killed"
    last = commands.start("train", str(config))
    assert last.wait(120) == 0, last.output
    again = run_config(run_dir, target, data, **KILLED)
    assert losses(again) == losses(whole)
    assert same_weights(again, whole)
    assert max(line["attempt"] for line in read_metrics(RunDir(run_dir).metrics)) > killed


def test_a_run_killed_at_a_random_step_goes_on_bit_equal(
    commands: Commands, whole: RunConfig, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    check_killed(commands, whole, tiny_target, data, tmp_path / "run", kills=1)


@pytest.mark.long
def test_a_run_killed_ten_times_goes_on_bit_equal(
    commands: Commands, whole: RunConfig, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    check_killed(commands, whole, tiny_target, data, tmp_path / "run", kills=10)


def test_a_run_killed_while_it_publishes_a_checkpoint_goes_on_from_the_one_before(
    commands: Commands, whole: RunConfig, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run", tiny_target, data, **KILLED)
    command = commands.start("faults:die_while_publishing", "train", str(config))
    assert command.wait() == -signal.SIGKILL
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {"step-00000003", ".writing-step-00000006"}
    last = commands.start("train", str(config))
    assert last.wait(120) == 0, last.output
    again = run_config(tmp_path / "run", tiny_target, data, **KILLED)
    assert losses(again) == losses(whole)
    assert same_weights(again, whole)
