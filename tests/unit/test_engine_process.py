"""An engine's process: its options, its last words, and that nothing of it outlives whoever started it."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from engine_processes import descendants, wait_for
from own_processes import alive
from paceline.cli.serve import build_target_config, split_engine_flags
from paceline.config.target import TargetConfig
from paceline.errors import ConfigError, StoppedError, TargetError
from paceline.target.engines.flags import changes_what_is_computed, check_not_set, parse_flags, write_flags
from paceline.target.engines.interface import INSIDE, EngineAddress
from paceline.target.engines.process import EngineProcess, private_directory
from paceline.target.engines.programs import (
    EngineProgram,
    check_spread,
    child_environment,
    find_program,
    release_of,
    visible_gpus,
)
from paceline.target.engines.starting import start_engine
from paceline.target.opening import ENGINES, open_engine
from paceline.target.vllm.kind import VLLM
from paceline.target.vllm.requests import VLLMRequests
from paceline.target.vllm.server import vllm_command
from tiny import save_tiny_target

WORKERS = """
import pathlib, subprocess, sys, time
sleep = "import time; time.sleep(600)"
worker = subprocess.Popen([sys.executable, "-c", sleep])
print("the engine speaks", flush=True)
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(600)
"""
DEAF = WORKERS.replace('sleep = "', 'sleep = "import signal; signal.signal(15, signal.SIG_IGN); ')
"""Its worker does not hear SIGTERM."""


def start(script: str, *words: str) -> tuple[EngineProcess, Path]:
    root = private_directory("test")
    return EngineProcess("Engine", root, [sys.executable, "-c", script, str(root), *words], os.environ), root


def is_there(root: Path) -> Callable[[], bool]:
    return (root / "ready").exists


def test_an_engine_without_memory_says_so_before_its_last_lines() -> None:
    """As vLLM and SGLang do: a process of theirs says why, and others end after it."""
    words = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.00 GiB"
    script = f"print({words!r}); [print('line', i) for i in range(40)]; raise SystemExit(1)"
    process, _ = start(script)
    with pytest.raises(TargetError, match=r"(?s)ended with code 1 before it was ready.*Tried to allocate 3.*line 39"):
        process.wait_until(lambda: False, 30)
    process.close()


def test_options_of_an_engine_pass_through_a_table() -> None:
    words = ["--max-model-len", "4096", "--enforce-eager", "-tp=2", "--lora", "a", "b", "--offset", "-1", "--x={}"]
    table = parse_flags(words)
    assert table == {
        "max-model-len": "4096",
        "enforce-eager": True,
        "-tp": "2",
        "lora": ["a", "b"],
        "offset": "-1",
        "x": "{}",
    }
    assert write_flags(table, None) == [
        *("--max-model-len", "4096", "--enforce-eager", "-tp", "2", "--lora", "a", "b", "--offset", "-1", "--x", "{}")
    ]
    assert write_flags({"max_model_len": 4096, "b": None, "hf-overrides": {"rope": [1]}}, None) == [
        *("--max-model-len", "4096", "--hf-overrides", '{"rope": [1]}')
    ]


def test_an_option_that_is_false_is_turned_off_where_the_engine_has_a_word_for_it() -> None:
    """vLLM has --no-X for every yes or no, and may say yes by itself; SGLang says no where nothing is said."""
    table = {"enable_chunked_prefill": False, "no-async-scheduling": False, "-x": False, "compilation-config.a": False}
    assert write_flags(table, "no-") == [
        *("--no-enable-chunked-prefill", "--async-scheduling", "--compilation-config.a", "false")
    ]
    assert write_flags(table, None) == ["--compilation-config.a", "false"]


@pytest.mark.parametrize(
    "option",
    [
        *("quantization", "-q", "--quant", "dtype", "kv_cache_dtype", "hf-overrides.rope_theta", "rope-scaling"),
        *("tokenizer", "revision", "load-format", "model-impl", "enable-lora", "json-model-override-args"),
        *("flashinfer-mxfp4-moe-precision", "enable-fp32-lm-head", "modelopt-checkpoint-restore-path", "kt-method"),
    ],
)
def test_an_option_that_changes_what_is_computed_is_known_by_its_words(option: str) -> None:
    assert changes_what_is_computed(option)


@pytest.mark.parametrize(
    "option",
    [
        *("gpu-memory-utilization", "max_model_len", "max-num-batched-tokens", "enforce-eager", "mem-fraction-static"),
        *("chunked-prefill-size", "attention-backend", "load-balance-method", "compilation-config.level", "-O", "seed"),
        *("fp8-gemm-backend", "reasoning-parser", "page-size", "schedule-policy"),
    ],
)
def test_an_option_of_memory_batches_and_kernels_changes_last_bits_at_most(option: str) -> None:
    assert not changes_what_is_computed(option)


def test_words_without_an_option_are_refused() -> None:
    with pytest.raises(ConfigError, match="'4096' is no option of the engine"):
        parse_flags(["4096"])


def test_options_that_paceline_sets_are_refused_by_any_spelling() -> None:
    with pytest.raises(ConfigError, match=r"vLLM hold --kv-transfer-config, --port, which paceline sets"):
        check_not_set({"port": 1, "kv_transfer_config": "{}", "seed": 3}, ["port", "kv-transfer-config"], "vLLM")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--speculative-config.method", "eagle3"], "--speculative-config"),
        (["--kv_transfer_config.kv_role=kv_both"], "--kv-transfer-config"),
        (["-sc", "{}"], "-sc"),
        (["--api-k", "secret"], "--api-k"),
    ],
)
def test_parts_and_beginnings_of_options_that_paceline_sets_are_refused(words: list[str], named: str) -> None:
    own = ["api-key", "speculative-config", "-sc", "kv-transfer-config"]
    with pytest.raises(ConfigError, match=f"hold {named},? which paceline sets"):
        check_not_set(parse_flags(words), own, "vLLM")
    check_not_set({"api-server-count": 1, "-tp": 2, "kv-cache-dtype": "auto"}, own, "vLLM")


def test_keys_inside_an_options_value_stay_as_they_are() -> None:
    """The engine writes its options with dashes or not; keys of a model's configuration have one spelling."""
    words = ["--hf_overrides.rope_theta", "5", "--compilation-config.cudagraph_mode=NONE"]
    assert write_flags(parse_flags(words), None) == [
        *("--hf-overrides.rope_theta", "5", "--compilation-config.cudagraph_mode", "NONE")
    ]
    assert write_flags({"hf_overrides.rope_theta": 5}, None) == ["--hf-overrides.rope_theta", "5"]


def test_words_after_two_dashes_are_the_engines_and_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "target.toml"
    file.write_text("[engine_args]\nseed = 1\nmax-model-len = 512\n")
    words, flags = split_engine_flags(["target.num_threads=1", "--seed", "3", "--enforce-eager"])
    config = build_target_config(file, {"model": "m", "engine": "vllm", "capture_layers": "1,5"}, words, flags)
    assert config.engine_args == {"seed": "3", "max-model-len": 512, "enforce-eager": True}
    assert (config.num_threads, config.capture_layers) == (1, (1, 5))


def test_settings_of_other_engines_are_refused_for_transformers() -> None:
    with pytest.raises(ConfigError, match='capture_layers, engine_args set for engine = "hf"'):
        build_target_config(None, {"model": "m", "capture_layers": "1"}, [], ["--seed", "3"])
    with pytest.raises(ConfigError, match="needs both"):
        build_target_config(None, {"model": "m", "engine": "vllm", "engine_url": "http://127.0.0.1:1"}, [], [])


def test_settings_of_transformers_are_refused_where_another_engine_starts() -> None:
    """Not in the configuration: `paceline evaluate` of the same run uses them."""
    config = TargetConfig(model="m", engine="vllm", capture_layers=(0,), attention="sdpa", compile=True)
    with (
        pytest.raises(ConfigError, match=r"target\.attention, target\.compile set for a server.*engine_args"),
        open_engine(config),
    ):
        pass


@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://h", "http://me:secret@h:1", "http://h:1/v1", "http://[::1"])
def test_an_address_that_is_no_servers_is_refused(url: str) -> None:
    settings = {"model": "m", "engine": "vllm", "engine_url": url}
    with pytest.raises(ConfigError, match=r"engine_url must be http\(s\)://HOST:PORT"):
        build_target_config(None, settings, ["target.engine_directory=/d"], [])
    for right in ("http://127.0.0.1:8100", "https://a-b.example:1/", "http://[::1]:8100"):
        TargetConfig(model="m", engine="vllm", engine_url=right, engine_directory="/d")


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, b"{}", r"refused the key \(401\): set PACELINE_ENGINE_KEY"),
        (200, b'{"version": "0.24.0", "data": [{"id": "m"}]}', "'max_model_len'.*is it vLLM"),
        (
            200,
            b'{"version": "0.23.0", "data": [{"id": "m", "max_model_len": 9}]}',
            "is version 0.23.0, and vLLM before 0.24 gives a document",
        ),
        (200, b'{"data": []}', "is it vLLM"),
        (200, b'{"data": [{"id": "m", "max_model_len": 9}]}', "does not say its version.*vLLM's own address"),
        (200, b"[]", "is it vLLM"),
    ],
)
def test_a_server_that_is_no_vllm_or_wants_a_key_is_named(status: int, body: bytes, says: str) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(TargetError, match=says):
            VLLMRequests(EngineAddress(f"http://127.0.0.1:{server.server_port}", Path("/d"), (0,)))
        server.shutdown()


def test_an_engine_that_is_not_installed_is_named_with_its_python() -> None:
    config = TargetConfig(model="m", engine="vllm")
    with pytest.raises(ConfigError, match=r"has no package no-such-engine: pip install it, or set target\.engine_p"):
        find_program(config, ["no-such-engine"], "pip install it")
    assert release_of(find_program(config, ["no-such-engine", "numpy"], "").version)[0] >= 1
    missing = TargetConfig(model="m", engine="vllm", engine_python="/nowhere/python")
    with pytest.raises(ConfigError, match=r"'/nowhere/python' cannot be run"):
        find_program(missing, ["numpy"], "")


def test_another_python_gets_none_of_our_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    config = TargetConfig(model="m", engine="vllm", device="cpu")
    other = child_environment(config, EngineProgram(Path("/other/python"), "1"), Path("/code"))
    own = child_environment(config, EngineProgram(Path(sys.executable), "1"), Path("/code"))
    assert (other["PYTHONPATH"], own["PYTHONPATH"]) == ("/code", "/code:/ours")


def test_an_engine_starts_without_our_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PACELINE_TOKEN", "PACELINE_ENGINE_KEY", "SGLANG_GRPC_PORT"):
        monkeypatch.setenv(name, "hush")
    config = TargetConfig(model="m", engine="vllm", device="cpu")
    environment = child_environment(config, EngineProgram(Path("/other/python"), "1"), Path("/code"))
    assert "hush" not in environment.values()
    assert environment["PATH"] == os.environ["PATH"]


def test_an_engine_sees_the_gpus_of_its_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    two = TargetConfig(model="m", engine="vllm", device="cuda:1", tensor_parallel=2)
    assert visible_gpus(two, {}) == {"CUDA_VISIBLE_DEVICES": "1,2"}
    assert visible_gpus(two, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}) == {"CUDA_VISIBLE_DEVICES": "5,6"}
    assert visible_gpus(TargetConfig(model="m", device="cpu"), {}) == {}
    assert visible_gpus(TargetConfig(model="m", device="cuda"), {}) == {}


@pytest.mark.parametrize(
    ("device", "degree", "seen", "needed", "there"),
    [("cuda:1", 4, "", 5, 4), ("cuda:1", 2, "6,7", 3, 2), ("auto", 5, "", 5, 4)],
)
def test_an_engine_on_more_gpus_than_are_visible_is_refused_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch, device: str, degree: int, seen: str, needed: int, there: int
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    config = TargetConfig(model="m", engine="vllm", device=device, tensor_parallel=degree)
    with pytest.raises(ConfigError, match=rf"tensor_parallel = {degree} .*needs {needed} GPUs, {there} are visible"):
        visible_gpus(config, {"CUDA_VISIBLE_DEVICES": seen})


@pytest.mark.parametrize("option", ["-tp", "tensor_parallel_size", "pipeline-parallel-size", "data-parallel"])
def test_options_that_spread_a_target_over_gpus_it_is_not_shown_are_refused(
    tiny_target: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    config = TargetConfig(model=str(tiny_target), engine="vllm", device="cuda:1", engine_args={option: 2})
    with pytest.raises(
        ConfigError, match=r"hold --?[a-z-]+, but target\.device = 'cuda:1'.*set target\.tensor_parallel"
    ):
        start_engine(VLLM, config, EngineProgram(Path(sys.executable), "0.32.0"), tiny_target, (0,))
    check_spread(config.model_copy(update={"device": "cuda"}), [option], "vLLM")


def test_what_the_environment_says_to_vllm_stays_and_threads_are_those_of_the_target(
    tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_HOST_IP", "10.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("VLLM_API_KEY", "the user's")
    given: list[dict[str, str]] = []
    monkeypatch.setattr(
        "paceline.target.engines.starting.EngineProcess", lambda name, root, command, env: given.append(env)
    )
    config = TargetConfig(model=str(tiny_target), engine="vllm", device="cpu", num_threads=2)
    for one in (config, config.model_copy(update={"num_threads": None})):
        _, address = start_engine(VLLM, one, EngineProgram(Path(sys.executable), "0.32.0"), tiny_target, (0,))
        shutil.rmtree(address.directory.parent)
        assert given[-1]["VLLM_API_KEY"] == address.key
    assert [(env["VLLM_HOST_IP"], env["HF_HUB_OFFLINE"]) for env in given] == [("10.0.0.1", "1")] * 2
    assert [env["OMP_NUM_THREADS"] for env in given] == ["2", "7"]
    assert [env.get("VLLM_CPU_OMP_THREADS_BIND") for env in given] == ["nobind", None]


@pytest.mark.parametrize("option", ["uds", "config"])
def test_options_that_move_the_server_or_bring_others_along_are_refused(tiny_target: Path, option: str) -> None:
    config = TargetConfig(model=str(tiny_target), engine="vllm", engine_args={option: "/x"})
    address = EngineAddress("http://127.0.0.1:1", Path("/d"), (0,))
    with pytest.raises(ConfigError, match=f"hold --{option}, which paceline sets itself"):
        vllm_command(config, EngineProgram(Path("/python"), "0.32.0"), tiny_target, address)


@pytest.mark.parametrize("version", ["0.24.0", "0.32.0", "0.26.0+cpu", "0.1.dev7+gabc", "0.0.0", "dev", "v0.26.0"])
def test_vllm_gets_our_connector(tiny_target: Path, version: str) -> None:
    program, address = EngineProgram(Path("/python"), version), EngineAddress("http://127.0.0.1:1", Path("/d"), (1, 3))
    words = vllm_command(TargetConfig(model="m", engine="vllm"), program, tiny_target, address)
    transfer = json.loads(words[words.index("--kv-transfer-config") + 1])
    module = INSIDE / f"{transfer['kv_connector_module_path']}.py"
    assert f"\n{transfer['kv_connector']}: type[" in module.read_text(encoding="utf-8")


@pytest.mark.parametrize("version", ["0.23.0", "0.22.1rc1.dev300+g12", "0.9.2"])
def test_a_vllm_that_mixes_up_documents_is_refused_before_it_starts(tiny_target: Path, version: str) -> None:
    program, address = EngineProgram(Path("/python"), version), EngineAddress("http://127.0.0.1:1", Path("/d"), (0,))
    with pytest.raises(TargetError, match=rf"/python is version {re.escape(version)}.*install vLLM 0\.24 or later"):
        vllm_command(TargetConfig(model="m", engine="vllm"), program, tiny_target, address)


@pytest.mark.parametrize("stated", [True, False], ids=["config.json says it", "only the weights say it"])
def test_vllm_computes_in_the_data_type_that_transformers_would(tmp_path: Path, stated: bool) -> None:
    """It would take float32 for bfloat16 by itself, and be refused for it."""
    checkpoint = save_tiny_target(tmp_path / "t")
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    assert {config.pop("dtype", None), config.pop("torch_dtype", None)} <= {None, "float32"}
    file.write_text(json.dumps(config | ({"dtype": "float32"} if stated else {})))
    address = EngineAddress("http://127.0.0.1:1", Path("/d"), (0,))
    for settings, dtype in (({}, "float32"), ({"dtype": "bfloat16"}, "bfloat16")):
        target = TargetConfig.model_validate({"model": str(checkpoint), "engine": "vllm", **settings})
        command = vllm_command(target, EngineProgram(Path("/python"), "0.32.0"), checkpoint, address)
        assert command[command.index("--dtype") + 1] == dtype
    own = target.model_copy(update={"engine_args": {"dtype": "half"}})
    assert vllm_command(own, EngineProgram(Path("/python"), "0.32.0"), checkpoint, address).count("--dtype") == 1


def test_close_ends_an_engine_that_is_deaf_with_its_workers_and_its_directory() -> None:
    process, root = start(DEAF)
    process.wait_until(is_there(root), 30)
    assert root.stat().st_mode & 0o77 == 0
    pids = [process.pid, *descendants(process.pid)]
    assert len(pids) == 3  # the guard, the engine, its worker
    process.close()
    process.close()
    assert not root.exists()
    assert wait_for(lambda: not any(map(alive, pids)), 5)


def test_an_engine_hears_sigterm_though_its_starter_has_signals_blocked(tmp_path: Path) -> None:
    """As every verb of ours has: an engine that never hears it is killed, and cannot end its workers in order."""
    script = (
        "import pathlib, signal, sys, time; root = pathlib.Path(sys.argv[1]); heard = pathlib.Path(sys.argv[2]);"
        "signal.signal(15, lambda *_: (heard.touch(), sys.exit(7)));"
        "(root / 'ready').touch(); time.sleep(600)"
    )
    heard = tmp_path / "heard"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        process, root = start(script, str(heard))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    process.wait_until(is_there(root), 30)
    begin = time.monotonic()
    process.close()
    assert time.monotonic() - begin < 4  # force is used after 5 s
    assert heard.exists()


def test_options_that_are_refused_leave_no_directory(tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr(
        "paceline.target.engines.starting.private_directory",
        lambda name: made.append(private_directory(name)) or made[0],
    )
    config = TargetConfig(model=str(tiny_target), engine="vllm", device="cpu", engine_args={"port": 1})
    with pytest.raises(ConfigError, match="--port"):
        start_engine(VLLM, config, EngineProgram(Path(sys.executable), "0.32.0"), tiny_target, (0,))
    assert made
    assert not made[0].exists()


def test_an_engine_ends_with_its_starter_whatever_ended_that(tmp_path: Path) -> None:
    script = (
        "import sys, os, time; from pathlib import Path; from paceline.target.engines.process import *;"
        "root = private_directory('test'); Path(sys.argv[1]).write_text(str(root));"
        "p = EngineProcess('Engine', root, [sys.executable, '-c', sys.argv[2], str(root)], os.environ); time.sleep(600)"
    )
    starter = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "root"), WORKERS])
    assert wait_for(lambda: (tmp_path / "root").exists() and is_there(Path((tmp_path / "root").read_text()))(), 60)
    pids = descendants(starter.pid)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 20)
    assert not Path((tmp_path / "root").read_text()).exists()


def test_an_engine_that_ends_before_it_is_ready_says_its_last_words() -> None:
    process, _ = start("print('no such option: --x', flush=True); raise SystemExit(3)")
    with pytest.raises(TargetError, match=r"(?s)ended with code 3 before it was ready.*no such option: --x"):
        process.wait_until(lambda: False, 30)
    process.close()


def test_a_code_that_is_no_signals_is_shown_as_it_is() -> None:
    """255 is what many a program ends with that fails."""
    process, _ = start("raise SystemExit(255)")
    with pytest.raises(TargetError, match="ended with code 255 before"):
        process.wait_until(lambda: False, 30)
    process.close()


def test_an_engine_that_never_is_ready_is_given_up_with_the_setting_named() -> None:
    process, root = start(WORKERS)
    assert wait_for(is_there(root), 30)
    with pytest.raises(TargetError, match=r"(?s)not ready after 0 s \(target.engine_start_timeout_s\).*engine speaks"):
        process.wait_until(lambda: False, 0.3)
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        process.wait_until(lambda: False, 30, stop)
    process.close()


def test_whoever_asks_hears_of_an_engine_that_ends_while_it_serves() -> None:
    told: list[TargetError] = []
    process, root = start(
        "import os, pathlib, sys; pathlib.Path(sys.argv[1], 'ready').touch(); os.kill(os.getpid(), 11)"
    )
    process.on_end(told.append)
    assert wait_for(lambda: bool(told), 30)
    assert "ended with signal 11 while it served" in str(told[0])
    process.close()
    assert not root.exists()
    begin = time.monotonic()
    process.close()
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize("engine", ENGINES)
def test_versions_that_count_as_tried_are_in_the_table_of_tried_versions(engine: str) -> None:
    kind = ENGINES[engine]
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith(f"| {kind.title} |")]
    assert {row.split("|")[2].split()[0] for row in rows} == set(kind.tried)


@pytest.mark.parametrize(("engine", "elsewhere"), [("vllm", set()), ("sglang", {"0.5.14"})])
def test_an_extra_takes_the_tried_versions(engine: str, elsewhere: set[str]) -> None:
    """But those that ask for another transformers than ours, and need an environment of their own."""
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    (extra,) = map(Requirement, pyproject["project"]["optional-dependencies"][engine])
    assert extra.name == engine
    assert {version for version in ENGINES[engine].tried if version not in extra.specifier} == elsewhere


def test_a_version_that_was_never_tried_is_named_before_it_starts(
    tiny_target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a package that is installed, and is no engine: what it says when it is started is shown, too."""
    monkeypatch.setitem(ENGINES, "vllm", replace(VLLM, packages=("numpy",)))
    config = TargetConfig(
        model=str(tiny_target), engine="vllm", device="cpu", capture_layers=(0,), engine_python=sys.executable
    )
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(TargetError, match=r"(?s)ended with code 1 before it was ready.*No module named 'vllm'"),
        open_engine(config),
    ):
        pass
    assert (
        f"vLLM {np.__version__} was not tried with this version of paceline (tried: 0.25.1, 0.26.0, 0.32.0)"
        in caplog.text
    )


def test_the_core_of_an_engine_says_why_before_its_server_ends() -> None:
    script = "print('ValueError: no room for 3 blocks'); print('frame ' * 3 + chr(10) * 20); raise SystemExit(1)"
    process, _ = start(script)
    with pytest.raises(TargetError, match="ValueError: no room for 3 blocks"):
        process.wait_until(lambda: False, 30)
    process.close()
