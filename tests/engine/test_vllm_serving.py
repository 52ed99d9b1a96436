"""`paceline serve --engine vllm` and runs on it: losses of the hf engine, clear words for what fails, no leftovers."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import paceline
from engine_processes import descendants, wait_for
from forking import Command, Commands
from own_processes import children_of, num_steps, start, write_config
from paceline.config.run import RunConfig
from paceline.target.engines.http_calls import EngineCalls
from paceline.target.engines.interface import EngineAddress
from paceline.target.engines.programs import free_port
from paceline.target.engines.starting import is_ready
from paceline.target.vllm.kind import VLLM
from served import Served, num_forwards, ready, start_server
from tiny import save_tiny_target
from whole_run import losses, run, run_config, same_weights

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore::UserWarning")]
PYTHON = Path(__file__).parents[2] / ".venv-engine" / "bin" / "python"
ARGS = ("--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8", "--gpu-memory-utilization", "0.2")
ENGINE = {
    "target__engine": "vllm",
    "target__engine_python": str(PYTHON),
    "target__engine_args": {
        "enforce-eager": True,
        "max-model-len": 1024,
        "max-num-seqs": 8,
        "gpu-memory-utilization": 0.2,
    },
    "placement__target": "servers",
}
EPOCHS = {"training__num_epochs": 1, "training__eval_every": 8, "training__rows_per_step": 2}


@pytest.fixture(scope="module", autouse=True)
def small_cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture(scope="module")
def engine_commands(small_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Commands that have the variable, too."""
    with Commands(tmp_path_factory.mktemp("commands"), {"VLLM_CPU_KVCACHE_SPACE": "1"}) as commands:
        yield commands


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_target(tmp_path_factory.mktemp("target") / "qwen3", head_dim=32)


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory, target: Path, data: Path) -> RunConfig:
    """Both drafts with the hf engine."""
    torch.set_num_threads(1)
    config = run_config(tmp_path_factory.mktemp("inline") / "run", target, data, **EPOCHS)
    assert run(config).status == "finished"
    return config


def config_on_vllm(target: Path, data: Path, run_dir: Path, **changes: Any) -> RunConfig:
    return run_config(run_dir, target, data, **{**EPOCHS, **ENGINE, **changes})


def serve(commands: Commands, target: Path, directory: Path, *words: str, python: Path = PYTHON) -> Command:
    given = ("--engine", "vllm", "--capture-layers", "0,1,2", f"target.engine_python={python}", *words)
    return start_server(commands, target, directory, *given)


@pytest.fixture(scope="module")
def server(engine_commands: Commands, target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("server")
    command = serve(engine_commands, target, directory, "--", *ARGS)
    assert command.wait_until((directory / "ready.json").exists, 400), command.output
    yield ready(command, directory)
    pids = descendants(command.pid)
    assert len(pids) >= 3  # the guard, vLLM's server, its core
    command.send_signal(signal.SIGTERM)
    command.wait(30)
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 15)


def engine_traces() -> set[Path]:
    """Directories of engines, and sockets in the directory of temporary files, where vLLM puts them if nobody says."""
    sockets = {path for path in Path(tempfile.gettempdir()).iterdir() if path.is_socket()}
    return set(Path("/dev/shm").glob("paceline-vllm-*")) | sockets


def assert_losses_agree(one: RunConfig, other: RunConfig) -> None:
    ours, theirs = losses(one), losses(other)
    assert len(ours) == len(theirs) > 8
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(yours, rel=1e-4)


def test_drafts_trained_through_vllm_have_the_losses_of_the_hf_engine(
    server: Served, inline: RunConfig, target: Path, data: Path, tmp_path: Path
) -> None:
    where = {"placement__target": "urls", "placement__urls": [server.url]}
    config = config_on_vllm(target, data, tmp_path / "run", **where)
    assert run(config).status == "finished"
    assert_losses_agree(config, inline)
    assert num_forwards(server) > len(losses(config))
    output = server.command.output
    assert "self-test of vLLM" in output
    assert "layer 2" in output


def test_one_environment_has_paceline_and_vllm(inline: RunConfig, target: Path, data: Path, tmp_path: Path) -> None:
    """As with the extra, of its build for CPUs: `target.engine_python` is not set, and one command does it all."""
    config = config_on_vllm(target, data, tmp_path / "run", target__engine_python=None)
    words = [str(PYTHON), "-m", "paceline", "train", str(write_config(config, tmp_path))]
    variables = {**os.environ, "PYTHONPATH": str(Path(paceline.__file__).parents[1])}
    done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_losses_agree(config, inline)
    assert "self-test of vLLM" in (Path(config.run_dir) / "logs" / "server-0.log").read_text()


def test_one_document_at_a_time_gives_the_same_bits_in_every_run(
    engine_commands: Commands, target: Path, data: Path, tmp_path: Path
) -> None:
    """Which documents vLLM computes together is what differs from run to run."""
    command = serve(engine_commands, target, tmp_path, "target.engine_documents=1", "--", *ARGS)
    assert command.wait_until((tmp_path / "ready.json").exists, 400), command.output
    where = {"placement__target": "urls", "placement__urls": [ready(command, tmp_path).url]}
    configs = [config_on_vllm(target, data, tmp_path / name / "run", **where) for name in ("one", "other")]
    assert [run(config).status for config in configs] == ["finished", "finished"]
    assert losses(configs[0]) == losses(configs[1])
    assert same_weights(*configs)
    command.send_signal(signal.SIGTERM)
    assert command.wait(30) == 143


def test_one_command_starts_vllm_and_ends_it_and_a_core_that_dies_costs_only_time(
    engine_commands: Commands, inline: RunConfig, target: Path, data: Path, tmp_path: Path
) -> None:
    before = engine_traces()
    config = config_on_vllm(target, data, tmp_path / "run", placement__start_timeout_s=600)
    running = start(engine_commands, config, tmp_path)
    assert running.wait_until(lambda: num_steps(config) >= 2, 400), running.output
    core = descendants(children_of(running.pid)["server-0"])[-1]
    os.kill(core, signal.SIGKILL)
    assert running.wait(500) == 0, running.output
    assert_losses_agree(config, inline)
    log = (Path(config.run_dir) / "logs" / "server-0.log").read_text()
    assert "ending, since the target engine is dead: EngineLostError: vLLM" in log
    assert "the last lines of its log" in log
    assert log.count("self-test of vLLM") == 2
    assert wait_for(lambda: engine_traces() == before, 15)


def test_a_server_that_is_killed_takes_its_vllm_with_it(
    engine_commands: Commands, target: Path, tmp_path: Path
) -> None:
    before = engine_traces()
    command = serve(engine_commands, target, tmp_path, "--", *ARGS)
    assert command.wait_until((tmp_path / "ready.json").exists, 400), command.output
    pids = descendants(command.pid)
    assert len(pids) >= 3  # the guard, vLLM's server, its core
    command.send_signal(signal.SIGKILL)
    command.wait()
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 15)
    assert wait_for(lambda: engine_traces() == before, 5)


@pytest.mark.parametrize(
    ("words", "python", "message"),
    [
        (("--", "--no-such-option", "3"), PYTHON, "unrecognized arguments: --no-such-option"),
        (("--", "--port", "3"), PYTHON, "hold --port, which paceline sets itself"),
        (("--", "--max-model-len", "10000000"), PYTHON, "max_model_len"),
        (("--", *ARGS, "--num-gpu-blocks-override", "2"), PYTHON, "KV cache is needed, which is larger than"),
        ((), Path(sys.executable), "has no package vllm or vllm-cpu"),
        (("target.capture_layers=[0, 7]",), PYTHON, "target.capture_layers has [7], the target has layers 0..3"),
    ],
    ids=["refused option", "own option", "impossible setting", "no memory", "not installed", "no such layer"],
)
def test_what_cannot_start_says_why(
    engine_commands: Commands, target: Path, tmp_path: Path, words: tuple[str, ...], python: Path, message: str
) -> None:
    command = serve(engine_commands, target, tmp_path, *words, python=python)
    assert command.wait(200) == 1, command.output
    assert message in command.output
    assert "Traceback" not in command.output.partition("error: ")[0]


def test_an_engine_that_computes_something_else_is_not_served(
    engine_commands: Commands, target: Path, tmp_path: Path
) -> None:
    """An option that passes through changes the target's RoPE: nothing fails but the self-test."""
    rope = '{"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}'
    command = serve(engine_commands, target, tmp_path, "--", *ARGS, "--hf-overrides", rope)
    assert command.wait(400) == 1, command.output
    assert "another RoPE" in command.output
    assert not (tmp_path / "ready.json").exists()


def test_a_run_goes_on_with_one_vllm_less(
    server: Served, engine_commands: Commands, inline: RunConfig, target: Path, data: Path, tmp_path: Path
) -> None:
    """Of two; of the other the core is killed while it computes rows."""
    doomed = serve(engine_commands, target, tmp_path / "doomed", "--", *ARGS)
    assert doomed.wait_until((tmp_path / "doomed" / "ready.json").exists, 400), doomed.output
    lost = ready(doomed, tmp_path / "doomed")
    where = {"placement__target": "urls", "placement__urls": [server.url, lost.url]}
    config = config_on_vllm(target, data, tmp_path / "run", **where)
    running = start(engine_commands, config, tmp_path)
    assert running.wait_until(lambda: num_steps(config) >= 2 and num_forwards(lost) > 0, 100), running.output
    os.kill(descendants(doomed.pid)[-1], signal.SIGKILL)
    assert num_steps(config) < len(losses(inline)) - 1, "the premise: it is needed"
    assert running.wait(200) == 0, running.output
    assert doomed.wait(60) == 1
    assert f"{lost.url} is lost with" in running.output
    assert_losses_agree(config, inline)


@contextlib.contextmanager
def somebody_elses(
    commands: Commands, target: Path, directory: Path, **other_words: str
) -> Iterator[tuple[str, subprocess.Popen[bytes], tuple[str, ...]]]:
    """A vLLM started by hand, ready: its URL, its shell, the words that attach to it.

    Args:
        other_words: in the place of options of the command that `paceline doctor` shows, without their dashes.
    """
    url, hidden = f"http://127.0.0.1:{free_port()}", directory / "hidden"
    where = ("--engine-url", url, f"target.engine_directory={hidden}", f"target.engine_python={PYTHON}")
    shown = commands.start(
        *("doctor", str(target), "--engine", "vllm", "--capture-layers", "0,1,2", "--show-command", *where),
        *("target.device=cpu", "target.dtype=float32", "--", *ARGS),
    )
    assert shown.wait() == 0, shown.output
    command_line = shown.output.strip().splitlines()[-1]
    for option, other in other_words.items():
        word = "--" + option.replace("_", "-")
        assert word in command_line
        command_line = command_line.replace(word, other)
    variables = {**os.environ, "PACELINE_ENGINE_KEY": "secret", "VLLM_HOST_IP": "127.0.0.1"}
    log = directory / "vllm.log"
    with log.open("wb") as file:
        engine = subprocess.Popen(
            ["/bin/sh", "-c", command_line], env=variables, stdout=file, stderr=file, start_new_session=True
        )
    try:
        address = EngineAddress(url, hidden, ())
        assert wait_for(lambda: is_ready(VLLM, address) or engine.poll() is not None, 400), log.read_text()
        assert engine.poll() is None, log.read_text()
        yield url, engine, where
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(engine.pid, signal.SIGKILL)
        engine.wait()


def test_an_engine_that_somebody_else_starts_is_attached_to_and_missed_when_it_goes(
    engine_commands: Commands, target: Path, tmp_path: Path
) -> None:
    with (
        somebody_elses(engine_commands, target, tmp_path) as (url, engine, where),
        Commands(tmp_path, {"PACELINE_ENGINE_KEY": "secret"}) as commands,
    ):
        command = serve(commands, target, tmp_path / "server", *where)
        ready(command, tmp_path / "server")
        others = {"model": str(target), "prompt": [1, 2, 3], "max_tokens": 2}
        assert EngineCalls("vLLM", url, "secret").call("POST", "/v1/completions", others)["choices"]
        left = [path.suffix for path in (tmp_path / "hidden").iterdir()]
        assert left == [".owner"], "of others' requests nothing is written"
        os.killpg(engine.pid, signal.SIGKILL)
        assert command.wait(60) == 1
        assert f"vLLM at {url} does not answer any more" in command.output


def test_a_prefix_cache_of_an_attached_vllm_is_proven_harmless(
    engine_commands: Commands, target: Path, tmp_path: Path
) -> None:
    """Hidden states of a cached prefix are cached with it: the self-test, which asks everything twice, gets them."""
    with (
        somebody_elses(engine_commands, target, tmp_path, no_enable_prefix_caching="--enable-prefix-caching") as (
            url,
            _,
            where,
        ),
        Commands(tmp_path, {"PACELINE_ENGINE_KEY": "secret"}) as commands,
    ):
        done = commands.start("doctor", str(target), "--engine", "vllm", "--capture-layers", "0,1,2", *where)
        assert done.wait(200) == 0, done.output
        assert "as transformers does" in done.output
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
    (hits,) = re.findall(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", metrics, re.MULTILINE)
    assert float(hits) > 100, "the premise"
