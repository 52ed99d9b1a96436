"""`paceline serve` as users run it: what it prints and writes, what it refuses at once, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Phi3Config

from engine_processes import wait_for
from forking import Command, Commands
from paceline.cli.main import app
from paceline.errors import ConfigError, TransportError
from served import Served, ready, start_server, start_servers
from talk import Talk
from tiny import save_tiny_target, tiny_request, tiny_tokenizer
from whole_run import QuietSignals


def run_in_process(*arguments: object) -> None:
    app([str(argument) for argument in arguments], obj=QuietSignals(), standalone_mode=False)


def test_a_server_says_where_it_is_and_gives_all_that_a_trainer_needs(
    target_servers: list[Served], tiny_target: Path, tmp_path: Path
) -> None:
    server = target_servers[0]
    before, served, _ = server.command.output.partition(f"{tiny_target} is served at {server.url}\n")
    assert served
    assert "self-test of transformers" in before
    talk = Talk(server.url)
    stored = load_file(tiny_target / "model.safetensors")
    for table, name in (("embedding", "model.embed_tokens.weight"), ("lm_head", "lm_head.weight")):
        sent = safetensors.torch.load(talk.ask("GET", f"/v1/weights/{table}").body)[table]
        assert torch.equal(sent, stored[name])
    some = talk.ask("POST", "/v1/weights/lm_head?dtype=float16", json.dumps({"rows": [299, 0, 7]}).encode())
    sent = safetensors.torch.load(some.body)["lm_head"]
    assert torch.equal(sent, stored["lm_head.weight"][[299, 0, 7]].half())
    for name, text in talk.ask("GET", "/v1/tokenizer").json().items():
        (tmp_path / name).write_text(text)
    loaded, words = AutoTokenizer.from_pretrained(tmp_path), "<|user|>Zürich?<|end|>"
    assert loaded(words).input_ids == tiny_tokenizer()(words).input_ids
    assert loaded.chat_template == tiny_tokenizer().chat_template


def test_a_target_over_two_processes_is_compared_before_it_serves_and_one_with_a_wrong_plan_is_refused(
    commands: Commands, tmp_path: Path
) -> None:
    """Gate and up projection of Phi-3 are one matrix: halved as if it were two, no shape is wrong and each value is."""
    right = save_tiny_target(tmp_path / "right", "phi3", seed=11)
    wrong = Path(shutil.copytree(right, tmp_path / "wrong"))
    file = wrong / "config.json"
    plan = dict(Phi3Config.base_model_tp_plan)
    plan |= {"layers.*.mlp.gate_up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_tp_plan": plan}))

    (server,) = start_servers(commands, right, tmp_path / "a", 1, "--tensor-parallel", "2")
    before, served, _ = server.command.output.partition(f"{right} is served at {server.url}\n")
    assert served
    assert "computing what transformers says to the self-test, in float32 on cpu" in before
    assert "self-test of transformers (hf) on 2 processes on" in before
    assert "greedy tokens: 0 of 3456 wrong" in before
    server.command.send_signal(signal.SIGTERM)
    assert server.command.wait(20) in (0, 128 + signal.SIGTERM)

    refused = start_server(commands, wrong, tmp_path / "b", "--tensor-parallel", "2")
    assert refused.wait(60) not in (0, None)
    assert f"{wrong} is served" not in refused.output
    assert "transformers (hf) on 2 processes does not compute this target" in refused.output


def test_what_cannot_work_is_said_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o640)
    empty = tmp_path / "empty"
    empty.touch(0o600)
    monkeypatch.delenv("PACELINE_TOKEN", raising=False)
    cases = {
        r"chmod 600": ("--token-file", token),
        r"empty is empty": ("--token-file", empty),
        r"cannot read token file": ("--token-file", tmp_path / "none"),
        r"--token-file": ("--host", "0.0.0.0"),
        r"both or neither": ("--tls-cert", token),
        r"target.dtype": ("--dtype", "int8"),
        r"target.engine": ("--engine", "abacus"),
        r"--rows-per-forward 2 for target.engine = .vllm": ("--engine", "vllm", "--rows-per-forward", "2"),
        r"engine_documents, engine_tokens set for": ("target.engine_tokens=5", "target.engine_documents=3"),
        r"target.atention: unknown": ("target.atention=eager",),
        r"not of training": ("training.lr=1",),
        r"cannot read .*none.toml": ("--target-config", tmp_path / "none.toml"),
    }
    for words, options in cases.items():
        with pytest.raises(ConfigError, match=words):
            run_in_process("serve", tmp_path / "no-model", *options)
    monkeypatch.setenv("PACELINE_TOKEN", "two words")
    with pytest.raises(ConfigError, match="PACELINE_TOKEN"):
        run_in_process("serve", tmp_path / "no-model")
    assert "PACELINE_TOKEN" not in os.environ


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--tensor-parallel", "3"), r"tensor_parallel = 3 does not divide the 4 num_attention_heads"),
        (("--engine", "vllm", "target.engine_python=/no/python"), "cannot be run"),
        (("--engine", "vllm", f"target.engine_python={sys.executable}"), "has no package vllm"),
        (("--engine", "sglang", "--capture-layers", "9"), r"capture_layers has \[9\]"),
        (("--engine", "vllm", "--engine-url", "http://127.0.0.1:1", "target.engine_directory=/no"), "is no directory"),
        (("--engine", "vllm", "--engine-url", "http://127.0.0.1:1", "target.engine_directory=/tmp"), "127.0.0.1:1"),
    ],
)
def test_settings_that_cannot_work_are_named_before_the_self_test_computes_anything(
    words: tuple[str, ...], problem: str, tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paceline.launch.serve.prepare_selftest", lambda *_: pytest.fail("it computes"))
    with pytest.raises((ConfigError, TransportError), match=problem):
        run_in_process("serve", tiny_target, "--device", "cpu", *words)


def test_a_server_without_sessions_ends_when_it_is_told_to(
    commands: Commands, tiny_target: Path, tmp_path: Path
) -> None:
    command = start_server(commands, tiny_target, tmp_path, "--auto-exit-s", "1")
    talk = Talk(ready(command, tmp_path).url)
    session = talk.session(lease_s=2)
    time.sleep(1.5)
    assert talk.of_session("POST", session, "/renew").status == 200
    assert command.wait(30) == 0
    assert "--auto-exit-s" in command.output


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_server_with_rows_in_flight(
    commands: Commands, tiny_target: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    (server,) = start_servers(commands, tiny_target, tmp_path, 1)
    ends: list[str] = []

    def ask(number: int) -> None:
        talk = Talk(server.url)
        session = talk.session()
        for position in range(10_000):
            try:
                answer = talk.row(session, tiny_request((2000, 2000), seed=position))
            except OSError:
                ends.append("broken")
                return
            if answer.status != 200:
                ends.append(answer.error().error)
                return

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for client in clients:
        client.start()
    time.sleep(1.0)
    begin = time.monotonic()
    server.command.send_signal(signum)
    assert server.command.wait(30) == 128 + signum
    assert time.monotonic() - begin < 10
    for client in clients:
        client.join(30)
    assert len(ends) == 4
    assert set(ends) <= {"stopping", "broken"}
    assert "Traceback" not in server.command.output


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own by now."""
    caught = int(Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (number - 1) & 1)


def test_a_signal_ends_a_server_that_is_still_loading(commands: Commands, tiny_target: Path, tmp_path: Path) -> None:
    command = start_server(commands, tiny_target, tmp_path)
    assert wait_for(lambda: catches(command.pid, signal.SIGTERM), 10)
    begin = time.monotonic()
    command.send_signal(signal.SIGTERM)
    assert command.wait(30) == 128 + signal.SIGTERM
    assert time.monotonic() - begin < 10


@pytest.mark.long
def test_memory_stays_flat_over_ten_thousand_rows(target_servers: list[Served]) -> None:
    talk = Talk(target_servers[0].url)
    session, sizes = talk.session(), []
    for position in range(10_000):
        assert talk.row(session, tiny_request((30, 20, 50), seed=position)).status == 200
        if position in (999, 9_999):
            status = Path(f"/proc/{target_servers[0].command.pid}/status").read_text()
            sizes.append(int(status.partition("VmRSS:")[2].split()[0]))
    assert sizes[1] < 1.05 * sizes[0]


@pytest.fixture(scope="module")
def parallel(commands: Commands, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A server of two tensor-parallel processes."""
    (server,) = start_servers(commands, tiny_target, tmp_path_factory.mktemp("parallel"), 1, "--tensor-parallel", "2")
    return server


def children(command: Command) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [pid for pid in pids if parent(pid) == command.pid]


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_control_calls_are_answered_while_two_processes_compute(parallel: Served) -> None:
    stop, rows, statuses = threading.Event(), [], []

    def compute() -> None:
        talk = Talk(parallel.url)
        session = talk.session()
        while not stop.is_set():
            rows.append(talk.row(session, tiny_request((300, 200), seed=len(rows))).status)

    def ask(path: str) -> None:
        statuses.append(Talk(parallel.url).ask("GET", path).status)

    computing = threading.Thread(target=compute)
    computing.start()
    paths = ["/healthz", "/v1/info", "/metrics", "/v1/tokenizer", "/v1/weights/lm_head"]
    asking = [threading.Thread(target=ask, args=(paths[number % len(paths)],)) for number in range(100)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(60)
    stop.set()
    computing.join(60)
    assert statuses == [200] * 100
    assert rows
    assert set(rows) == {200}


def test_a_server_whose_engine_died_says_so_and_ends(parallel: Served) -> None:
    """The last test of its fixture."""
    talk = Talk(parallel.url)
    session = talk.session()
    assert talk.row(session, tiny_request((5, 7))).status == 200
    (follower,) = children(parallel.command)
    os.kill(follower, signal.SIGKILL)
    try:
        answer = talk.row(session, tiny_request((5, 7)))
    except (OSError, TransportError):
        answer = None  # it had ended already
    if answer is not None:
        assert (answer.status, answer.error().error) == (500, "engine")
    assert parallel.command.wait(30) == 1
    last = parallel.command.output.rstrip().splitlines()[-1]
    assert "ending, since the target engine is dead" in last
    assert not Path(f"/proc/{follower}").exists()
