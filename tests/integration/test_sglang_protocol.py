"""The sglang engine against a stand-in that speaks SGLang's protocol: SGLang itself needs a GPU (tests/gpu)."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from contract.test_engine_contract import (  # noqa: F401  # collected here too, on this engine
    EVERYTHING,
    check_against,
    test_a_cancelled_row_is_skipped,
    test_a_wrong_request_fails_alone,
    test_features_equal_transformers_eager,
    test_info_is_the_same_object_every_time,
    test_room_shrinks_with_rows_in_flight_and_returns,
    test_twenty_rows_submitted_without_waiting_come_back_right,
)
from paceline.config.target import TargetConfig
from paceline.errors import (
    CaptureMismatchError,
    ConfigError,
    OutOfMemoryError,
    PacelineError,
    TargetError,
    TransportError,
)
from paceline.target.engines.document_engine import DocumentEngine
from paceline.target.engines.document_requests import states_of
from paceline.target.engines.interface import EngineAddress, Place
from paceline.target.engines.outer_parts import load_outer_parts
from paceline.target.engines.process import EngineProcess
from paceline.target.engines.programs import EngineProgram, find_program
from paceline.target.engines.starting import is_ready, start_engine
from paceline.target.opening import engine_layers, open_engine
from paceline.target.sglang.kind import SGLANG
from paceline.target.sglang.requests import SGLangRequests, _join
from tiny import save_tiny_target, tiny_request

STAND_IN = Path(__file__).parents[1] / "stand_in_sglang"
LAYERS = (0, 2)
pytestmark = pytest.mark.timeout(180)


def target_config(path: Path, **changes: Any) -> TargetConfig:
    settings = {
        "model": str(path),
        "device": "cpu",
        "dtype": "float32",
        "engine": "sglang",
        "engine_args": {"chunked-prefill-size": 64},
        "engine_documents": 16,
        "capture_layers": LAYERS,
        "vocab_chunk_tokens": 7,
    }
    return TargetConfig(**{**settings, **changes})


@contextlib.contextmanager
def stand_in_installed(directory: Path, version: str = "0.5.14", **variables: str) -> Iterator[None]:
    """The stand-in as the package of this Python."""
    package = directory / f"sglang-{version}.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
    path = [str(STAND_IN), str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@contextlib.contextmanager
def running(target: Path, directory: Path, **variables: str) -> Iterator[tuple[EngineProcess, EngineAddress]]:
    config = target_config(target)
    with stand_in_installed(directory, **variables):
        program = find_program(config, SGLANG.packages, SGLANG.install)
        process, address = start_engine(SGLANG, config, program, target, engine_layers(LAYERS, 4))
    with contextlib.closing(process):
        process.wait_until(lambda: is_ready(SGLANG, address), 120)
        yield process, address


@pytest.fixture(scope="module")
def server(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineAddress]:
    with running(tiny_target, tmp_path_factory.mktemp("sglang")) as (_, address):
        yield address


@pytest.fixture(scope="module")
def engine(tiny_target: Path, server: EngineAddress) -> Iterator[DocumentEngine]:
    config = target_config(tiny_target)
    with contextlib.closing(DocumentEngine(config, SGLANG.connect(server), load_outer_parts(config))) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(tiny_target: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_target, attn_implementation="eager").eval()


def hidden_states(server: EngineAddress) -> list[str]:
    """Files beside rows that are used again, and those that say which clients there were."""
    names = [path.name for path in server.directory.iterdir()]
    return [name for name in names if not re.search(r"\.owner$|\.left$|-row\d+$", name)]


def test_chunks_of_a_document_are_joined_and_their_files_removed(engine: DocumentEngine, reference, server):
    """Chunks of 64 tokens, together with others' in one batch."""
    rows = [tiny_request((200, 64, 1, 65), seed=1), tiny_request((500,), seed=2)]
    futures = [engine.capture(row, EVERYTHING) for row in rows]
    for row, future in zip(rows, futures, strict=True):
        features = future.result(60)
        for start, end in zip(row.documents, row.documents[1:], strict=False):
            with torch.no_grad():
                text = torch.from_numpy(row.tokens[start:end]).long()[None]
                expected = reference(text, output_hidden_states=True).hidden_states
            for slot, layer in ((0, 0), (1, 2)):
                torch.testing.assert_close(
                    features.hidden[start:end, slot], expected[layer + 1][0], rtol=1e-4, atol=1e-4
                )
    assert hidden_states(server) == []


@pytest.mark.parametrize("shared", [True, False])
def test_states_go_to_their_row_or_come_in_files(
    tiny_target: Path, server: EngineAddress, reference, monkeypatch: pytest.MonkeyPatch, shared: bool
):
    """In files where the directory is on a disk. Documents have up to four chunks."""
    monkeypatch.setattr("paceline.target.engines.shared_rows._is_memory", lambda directory: shared)
    seen: list[frozenset[str]] = []
    monkeypatch.setattr(
        "paceline.target.sglang.requests.load_file",
        lambda path: seen.append(frozenset(stored := load_file(path))) or stored,
    )
    config = target_config(tiny_target)
    rows = [tiny_request((200, 64, 1, 65), seed=seed) for seed in range(4)]
    with contextlib.closing(DocumentEngine(config, SGLANG.connect(server), load_outer_parts(config))) as engine:
        seen.clear()  # the first document proves the checkpoint
        for _ in range(2):
            futures = [engine.capture(row, EVERYTHING) for row in rows]
            for row, future in zip(rows, futures, strict=True):
                check_against(reference, row, future.result(60))
    assert len(seen) == 8 * (4 + 1 + 1 + 2)
    assert set(seen) == {frozenset({"placed" if shared else "hidden_states", "token_ids", "layer_ids"})}


def test_chunks_of_which_one_has_no_place_are_put_together(tmp_path: Path):
    """A row's file is not there for a moment, or for good: what it would have got comes in a file."""
    requests = SGLangRequests.__new__(SGLangRequests)
    requests._directory = tmp_path
    states, ids = torch.arange(40.0).view(5, 2, 4), torch.arange(5)
    place = Place("row1.0.5", torch.full((5, 2, 4), -1.0))
    place.states[:3] = states[:3]
    save_file({"placed": states[:0], "token_ids": ids[:3]}, tmp_path / "r.0.safetensors")
    save_file({"hidden_states": states[3:], "token_ids": ids[3:]}, tmp_path / "r.3.safetensors")
    parts = requests._read_parts("r", 5, place)
    assert torch.equal(_join([part["hidden_states"] for part in parts], place), states)


@pytest.mark.parametrize("other", [torch.zeros(0, 3, 4), torch.zeros(0, 2, 4, dtype=torch.bfloat16)])
def test_states_of_another_shape_or_type_in_a_place_are_refused(other: torch.Tensor):
    stored = {"placed": other, "token_ids": torch.arange(5)}
    for place in (Place("row1.0.5", torch.zeros(5, 2, 4)), Place("", torch.zeros(5, *other.shape[1:])), None):
        with pytest.raises(
            CaptureMismatchError, match=r"the engine has written 5 states of \[\d, 4\] as .* to a place for"
        ):
            states_of(stored, place)
    with pytest.raises(CaptureMismatchError, match=r"for \[2, 2, 4\]"):
        states_of({"placed": torch.zeros(0, 2, 4), "token_ids": torch.arange(3)}, Place("r", torch.zeros(5, 2, 4)), 3)


def test_a_server_that_runs_already_is_reached_by_its_url(tiny_target: Path, server: EngineAddress, reference):
    where = {"engine_url": server.url, "engine_directory": str(server.directory), "engine_args": {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACELINE_ENGINE_KEY", server.key)
        with open_engine(target_config(tiny_target, **where)) as engine:
            row = tiny_request((20, 9), seed=4)
            check_against(reference, row, engine.capture(row, EVERYTHING).result(60))
    assert is_ready(SGLANG, server), "it is somebody else's"


def test_no_memory_to_pack_a_row_fails_it_alone_and_names_the_settings(
    engine: DocumentEngine, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    row = tiny_request((9, 5))
    with monkeypatch.context() as patch:
        patch.setattr(engine._outer.capture, "complete", full)
        with pytest.raises(OutOfMemoryError, match=r"no memory to pack row .* of 14 tokens: lower data\.row_tokens or"):
            engine.capture(row, EVERYTHING).result(60)
    assert engine.capture(row, EVERYTHING).result(60).finite


def test_requests_of_others_are_not_written(server: EngineAddress):
    requests = SGLANG.connect(server)
    body = {"input_ids": [1, 2, 3], "rid": "somebody", "sampling_params": {}}
    assert len(requests._calls.call("POST", "/generate", body)["output_ids"]) == 1
    assert hidden_states(server) == []


def test_a_server_of_other_layers_is_refused(tiny_target: Path, server: EngineAddress):
    config = target_config(tiny_target)
    with pytest.raises(CaptureMismatchError, match=r"captured layers \[0, 2, 3\].*expected \[0, 1, 3\]"):
        DocumentEngine(config, SGLANG.connect(replace(server, layers=(0, 1, 3))), load_outer_parts(config))


def test_a_server_of_another_checkpoint_is_refused(tiny_target: Path, server: EngineAddress, tmp_path: Path):
    other = target_config(save_tiny_target(tmp_path / "other", seed=1))
    with pytest.raises(TargetError, match="does it run another checkpoint"):
        DocumentEngine(other, SGLANG.connect(server), load_outer_parts(other))


def test_a_server_with_another_key_refuses(server: EngineAddress):
    with pytest.raises(TargetError, match="401"):
        SGLANG.connect(replace(server, key="wrong"))


def test_the_key_is_on_no_command_line(server: EngineAddress):
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert any(b"sglang.launch_server" in line for line in lines)
    assert not any(server.key.encode() in line for line in lines)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("not summed", TransportError, "is not summed over GPUs.*enforce-disable-flashinfer-allreduce-fusion"),
        ("abort", TransportError, "ended a request: out of memory"),
    ],
)
def test_what_goes_wrong_inside_is_said(tiny_target: Path, tmp_path: Path, fault: str, error: type, message: str):
    with running(tiny_target, tmp_path / "package", STAND_IN_FAULT=fault) as (_, address):
        requests = SGLANG.connect(address)
        for _ in range(2):
            with pytest.raises(error, match=message):
                requests.capture(tiny_request((5,)).tokens)
        requests.close()
        assert hidden_states(address) == []


@pytest.mark.parametrize("stream", ["plain", "named", "owed"])
def test_layers_that_return_what_comes_to_the_residual_alone(tiny_target: Path, tmp_path: Path, reference, stream: str):
    """As those of SGLang 0.5.22: the residual lies in the batch, and over several GPUs a layer returns no sum yet."""
    config = target_config(tiny_target)
    with (
        running(tiny_target, tmp_path / "package", STAND_IN_STREAM=stream) as (_, address),
        contextlib.closing(DocumentEngine(config, SGLANG.connect(address), load_outer_parts(config))) as engine,
    ):
        row = tiny_request((200, 64, 1, 65), seed=1)
        check_against(reference, row, engine.capture(row, EVERYTHING).result(60))


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ("finalize", "is computed to its end by the next layer only"),
        ("gated", "is added to the residual in the next layer's own way"),
    ],
)
def test_a_residual_that_cannot_be_added_here_is_said(tiny_target: Path, tmp_path: Path, stream: str, message: str):
    with running(tiny_target, tmp_path / "package", STAND_IN_STREAM=stream) as (_, address):
        requests = SGLANG.connect(address)
        with pytest.raises(TransportError, match=message):
            requests.capture(tiny_request((5,)).tokens)
        requests.close()


def test_a_server_whose_weights_are_replaced_is_refused(tiny_target: Path, tmp_path: Path):
    with running(tiny_target, tmp_path / "package", STAND_IN_FAULT="new weights") as (_, address):
        requests = SGLANG.connect(address)
        assert requests.capture(tiny_request((5,)).tokens).hidden.shape[0] == 5
        with pytest.raises(TargetError, match="other weights than before: version '1', it was 'default'"):
            requests.capture(tiny_request((7,)).tokens)
        requests.close()


def test_a_server_whose_scheduler_is_busy_for_long_is_alive(tiny_target: Path, tmp_path: Path):
    with running(tiny_target, tmp_path / "package", STAND_IN_FAULT="busy") as (process, address):
        requests = SGLANG.connect(address)
        requests.capture(tiny_request((5,)).tokens)
        assert not is_ready(SGLANG, address), "the premise: /health fails"
        assert requests.is_alive()
        process.close()
        assert not requests.is_alive()
        requests.close()


def test_a_document_leaves_room_for_its_token(monkeypatch: pytest.MonkeyPatch):
    requests = SGLangRequests.__new__(SGLangRequests)
    served = {"max_req_input_len": 4096, "max_total_num_tokens": 4000, "page_size": 64}
    requests._calls = SimpleNamespace(call=lambda *_: served)  # type: ignore[assignment]
    monkeypatch.setattr(requests, "_check_options", lambda _: None)
    assert requests._ask_max_tokens() == 4000 - 130
    served["max_total_num_tokens"] = 1 << 20
    assert requests._ask_max_tokens() == 4095


def test_a_server_that_was_started_otherwise_is_refused():
    requests = SGLangRequests.__new__(SGLangRequests)
    requests.name = "SGLang at x"
    hooks = [{"hook_factory": "paceline_sglang_hooks:build_hook"}]
    right = {
        "forward_hooks": hooks,
        "disable_radix_cache": True,
        "cuda_graph_config": {"prefill": {"backend": "disabled"}},
        "pp_size": 1,
        "attn_cp_size": 1,
        "disaggregation_mode": "null",
        "speculative_algorithm": None,
    }
    requests._check_options(right)
    for served, problem in (
        ({"forward_hooks": None, "disable_radix_cache": True}, "writes no hidden states"),
        ({"forward_hooks": [{"hook_factory": "other:hook"}], "disable_radix_cache": True}, "writes no hidden states"),
        ({"forward_hooks": hooks, "disable_radix_cache": False}, "has its radix cache on"),
        ({**right, "cuda_graph_config": {"prefill": {"backend": "tc_piecewise"}}}, '"tc_piecewise".*run no hooks'),
        ({**right, "enable_dp_attention": True}, "runs with enable_dp_attention"),
        ({**right, "speculative_algorithm": "EAGLE", "pp_size": 2}, "runs with pp_size, speculative_algorithm"),
        ({**right, "disaggregation_mode": "prefill"}, "runs with disaggregation_mode"),
    ):
        with pytest.raises(TargetError, match=problem):
            requests._check_options(served)


@pytest.mark.parametrize(
    "option",
    [
        *("forward-hooks", "disable-radix-cache", "speculative-algorithm", "allow-auto", "pp-size"),
        *("cuda-graph-backend-prefill", "enforce-piecewise-cuda-graph", "enable-pdmux", "ssl-certfile"),
        *("enable-attn-tp-input-scattered", "enable-layernorm-sp", "grpc-port"),
    ],
)
def test_options_that_are_set_here_are_refused(tiny_target: Path, tmp_path: Path, option: str):
    config = target_config(tiny_target, engine_args={option: "1"})
    with (
        stand_in_installed(tmp_path / "package"),
        pytest.raises(ConfigError, match=f"target.engine_args of SGLang hold --{option}"),
        open_engine(config),
    ):
        pass


@pytest.mark.parametrize("tokens", [[], [1, 2], None])
def test_another_number_of_tokens_than_asked_for_can_be_asked_for_again(tokens: list[int] | None):
    requests = SGLangRequests.__new__(SGLangRequests)
    requests.name = "SGLang at x"
    with pytest.raises(TransportError, match="one was asked for"):
        requests._next_token({"output_ids": tokens, "meta_info": {"finish_reason": {"type": "length"}}})


def test_states_of_fewer_tokens_than_a_file_names_are_refused(tmp_path: Path):
    requests = SGLangRequests.__new__(SGLangRequests)
    requests._directory = tmp_path
    save_file({"hidden_states": torch.ones(2, 1, 4), "token_ids": torch.arange(3)}, tmp_path / "r.0.safetensors")
    with pytest.raises(CaptureMismatchError, match="2 states of 3 tokens"):
        requests._read_parts("r", 3, None)


def test_options_for_several_gpus_end_with_sums_and_names_have_no_colon(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    program, address = EngineProgram(Path("python"), "0.5.14"), EngineAddress("http://127.0.0.1:1", tmp_path, (0,))
    for changes in ({"tensor_parallel": 2}, {"engine_args": {"tp-size": 2}}):
        config = target_config(Path("runs/12:30"), **changes)
        words = SGLANG.command(config, program, tmp_path, address)
        assert "--enforce-disable-flashinfer-allreduce-fusion" in words
        assert words[words.index("--served-model-name") + 1] == "runs/12-30"


def run_command(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "paceline.cli", *words], capture_output=True, text=True, timeout=170, check=False
    )


@pytest.mark.long
def test_the_whole_way_from_doctor_to_verdict(tiny_target: Path, tmp_path: Path):
    """`paceline doctor` starts it, tests it, and ends it."""
    with stand_in_installed(tmp_path / "package"):
        words = ["doctor", str(tiny_target), "--engine", "sglang", "target.device=cpu"]
        result = run_command(words)
    assert result.returncode == 0, result.stderr
    assert "self-test of SGLang" in result.stdout + result.stderr


def test_the_command_for_an_engine_of_ones_own_names_hooks_and_key(tiny_target: Path, tmp_path: Path):
    where = ["--engine-url", "http://127.0.0.1:1", f"target.engine_directory={tmp_path}"]
    with stand_in_installed(tmp_path / "package"):
        words = ["doctor", str(tiny_target), "--engine", "sglang", "--show-command", *where]
        result = run_command(words)
    assert result.returncode == 0, result.stderr
    line = result.stdout.strip().splitlines()[-1]
    assert '--api-key "$PACELINE_ENGINE_KEY"' in line
    words = shlex.split(line)
    hooks = json.loads(words[words.index("--forward-hooks") + 1])
    assert {hook["config"]["directory"] for hook in hooks} == {str(tmp_path)}


def test_what_a_self_test_runs_into_comes_with_the_log(
    tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("paceline.target.engines.process._LAST_WORDS_S", 0.1)
    with (
        stand_in_installed(tmp_path / "package"),
        pytest.raises(TargetError, match=r"(?s)no states came\nThe last lines of the log of SGLang 0.5.14:\n.*\w"),
        open_engine(target_config(tiny_target)),
    ):
        raise TransportError("no states came")


def test_errors_are_ours(tiny_target: Path, tmp_path: Path):
    with (
        stand_in_installed(tmp_path / "package"),
        pytest.raises(PacelineError, match="unrecognized arguments: --no-such-option"),
        open_engine(target_config(tiny_target, engine_args={"no-such-option": 1})),
    ):
        pass
