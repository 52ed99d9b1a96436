"""vLLM and SGLang themselves on a GPU: the self-test, documents in chunks, the features of the hf engine.

Each is tested whose Python is named: PACELINE_TEST_VLLM=/opt/vllm/bin/python, PACELINE_TEST_SGLANG=... At least one is.
PACELINE_TEST_ENGINE_ARGS is a JSON table of options for both, by engine: {"sglang": {"attention-backend": "triton"}}.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from engine_processes import descendants, wait_for
from paceline.config.target import TargetConfig
from paceline.errors import TargetError
from paceline.launch.engines import engine_command
from paceline.launch.selftest import prepare_selftest
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.target.engines.interface import EngineAddress, RowMemory
from paceline.target.engines.programs import free_port
from paceline.target.engines.starting import is_ready
from paceline.target.hf.engine import HFEngine
from paceline.target.opening import ENGINES, ServedEngine, open_engine
from tiny import save_tiny_target, tiny_request

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]
PYTHONS = {name: os.environ.get(f"PACELINE_TEST_{name.upper()}") for name in ("vllm", "sglang")}
NAMED = [name for name, python in PYTHONS.items() if python] or ["no engine is named"]
SPEC = FeatureSpec((1, 4, 7), final_hidden="all", greedy=True, logsumexp=True)
CHUNK = 512
ARGS: dict[str, dict[str, Any]] = {
    "vllm": {
        "enforce-eager": True,
        "max-model-len": 4096,
        "max-num-batched-tokens": CHUNK,
        "gpu-memory-utilization": 0.2,
        "kv-cache-memory-bytes": "2G",
        "max-num-seqs": 64,
    },
    "sglang": {"chunked-prefill-size": CHUNK, "mem-fraction-static": 0.3},
}
LIMIT = 3e-2
"""Of bf16: engines are 0.9 to 1.6 % from fp32 at 36 layers, transformers' own bf16 is no nearer."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 layers; weights of a size at which transformers' own bf16 is 1.7 % off after them."""
    shapes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    more = {"head_dim": 64, "num_hidden_layers": 8, "dtype": "bfloat16"}
    path = save_tiny_target(tmp_path_factory.mktemp("target") / "qwen3", **shapes, **more)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)
    model.save_pretrained(path)
    return path


def config_of(name: str, target: Path, **changes: Any) -> TargetConfig:
    given = json.loads(os.environ.get("PACELINE_TEST_ENGINE_ARGS", "{}")).get(name, {})
    settings = {
        "model": str(target),
        "dtype": "bfloat16",
        "device": "cuda:0",
        "engine": name,
        "engine_python": PYTHONS[name],
        "engine_args": ARGS[name] | given,
        "capture_layers": SPEC.layers,
        "engine_start_timeout_s": 300,
    }
    return TargetConfig(**{**settings, **changes})


@pytest.fixture(scope="module", params=NAMED)
def config(request: pytest.FixtureRequest, target: Path) -> TargetConfig:
    assert request.param in PYTHONS, "set PACELINE_TEST_VLLM or PACELINE_TEST_SGLANG to the Python that has it"
    return config_of(request.param, target)


@pytest.fixture(scope="module")
def engine(config: TargetConfig) -> Iterator[ServedEngine]:
    with open_engine(config) as engine:
        yield engine


@pytest.fixture(scope="module")
def hf(target: Path) -> Iterator[HFEngine]:
    with contextlib.closing(HFEngine(TargetConfig(model=str(target), dtype="float32", device="cuda:0"))) as engine:
        yield engine


def distance(received: torch.Tensor, expected: torch.Tensor) -> float:
    """Of tokens, relative, root mean square."""
    errors = (received.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    return float(errors.square().mean().sqrt())


def check_near(features: Features, expected: Features) -> None:
    assert features.layers == expected.layers
    assert features.finite
    for slot, layer in enumerate(features.layers):
        assert distance(features.hidden[:, slot], expected.hidden[:, slot]) < LIMIT, f"layer {layer}"
    assert distance(features.final_hidden, expected.final_hidden) < LIMIT
    torch.testing.assert_close(features.logsumexp, expected.logsumexp, rtol=2e-2, atol=2e-2)
    assert (features.greedy == expected.greedy).float().mean() > 0.9


def shifted(engine: ServedEngine) -> Any:
    """What the engine says of layer 4 is passed off as layer 5's."""

    class Shifted:
        info, tokenizer = engine.info, engine.tokenizer

        @staticmethod
        def capture(row: RowRequest, spec: FeatureSpec) -> Future[Features]:
            answer: Future[Features] = Future()
            features = engine.capture(row, replace(spec, layers=SPEC.layers)).result(60)
            answer.set_result(replace(features, layers=spec.layers))
            return answer

    return Shifted()


def test_the_self_test_passes(config: TargetConfig, engine: ServedEngine):
    result = prepare_selftest(config).run(config, engine)
    print("\n".join(result.describe()))
    result.check(config.engine)


def test_rows_in_flight_are_those_of_the_hf_engine(engine: ServedEngine, hf: HFEngine):
    rows = [tiny_request((300, 1, 77 + seed, 646), seed=seed) for seed in range(8)]
    futures = [engine.capture(row, SPEC) for row in rows]
    for row, future in zip(rows, futures, strict=True):
        check_near(future.result(120), hf.capture(row, SPEC).result(60))


def test_engines_write_into_rows_that_this_gpu_reads(
    config: TargetConfig, engine: ServedEngine, hf: HFEngine, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is in files but that it is done, and rows' memory is pinned."""
    seen: list[frozenset[str]] = []
    monkeypatch.setattr(
        f"paceline.target.{config.engine}.requests.load_file",
        lambda path: seen.append(frozenset(stored := load_file(path))) or stored,
    )
    memories: list[RowMemory] = []
    reserve = engine._server.reserve
    monkeypatch.setattr(engine._server, "reserve", lambda *of: memories.append(reserve(*of)) or memories[-1])
    rows = [tiny_request((300, 1, 777), seed=seed) for seed in range(4)]
    futures = [engine.capture(row, SPEC) for row in rows]
    for row, future in zip(rows, futures, strict=True):
        check_near(future.result(120), hf.capture(row, SPEC).result(60))
    assert set(seen) == {frozenset({"placed", "token_ids", "layer_ids"})}
    assert len({memory.label for memory in memories} - {""}) == 4
    assert all(memory.states.is_pinned() for memory in memories)


def test_documents_in_chunks_are_right_to_their_last_token(engine: ServedEngine, hf: HFEngine):
    """Of 512 tokens a step: a document is several chunks, and shares steps with others."""
    row = tiny_request((3000, 700, 1500, 513, 512), seed=11)
    features, expected = engine.capture(row, SPEC).result(120), hf.capture(row, SPEC).result(60)
    check_near(features, expected)
    for end in row.documents[1:]:
        tail = slice(end - 64, end)
        assert distance(features.hidden[tail, 2], expected.hidden[tail, 2]) < LIMIT
    for start in range(0, 3000, CHUNK):  # the first tokens of every chunk
        assert distance(features.hidden[start : start + 8, 2], expected.hidden[start : start + 8, 2]) < 2 * LIMIT


def test_documents_do_not_see_each_other(engine: ServedEngine):
    row = tiny_request((400, 300, 200), seed=5)
    tokens = row.tokens.copy()
    tokens[:400] = (tokens[:400] + 1) % 300
    first, second = (engine.capture(one, SPEC).result(60) for one in (row, replace(row, tokens=tokens)))
    assert distance(first.hidden[:400, 2], second.hidden[:400, 2]) > 0.1
    assert distance(first.hidden[400:, 2], second.hidden[400:, 2]) < LIMIT


def test_nothing_is_left_behind(config: TargetConfig, engine: ServedEngine):
    """In the directory of this engine: others may run on this host."""
    assert engine.capture(tiny_request((50, 60)), SPEC).result(60).finite
    commands = ""
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):  # a compiler's, perhaps, that has ended
            commands += Path(f"/proc/{pid}/cmdline").read_text()
    roots = set(re.findall(rf"/[^\0]*/paceline-{config.engine}-\w+(?=\0)", commands))
    assert len(roots) == 1, roots
    left = list(Path(roots.pop(), "hidden").glob("*.safetensors*"))
    assert left == [], left


def test_the_self_test_names_a_shifted_layer(config: TargetConfig, engine: ServedEngine):
    asked = config.model_copy(update={"capture_layers": (1, 5, 7)})
    result = prepare_selftest(asked).run(asked, shifted(engine))
    with pytest.raises(TargetError, match="layer 5 asked, layer 4's output received"):
        result.check(config.engine)


@pytest.mark.skipif(PYTHONS["vllm"] is None, reason="PACELINE_TEST_VLLM names no Python with vLLM")
def test_vllms_own_connector_takes_the_place_of_ours_where_that_does_not_fit(
    target: Path, hf: HFEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its files do not say which layers they hold: the self-test does."""
    folder = Path(__file__).parents[1] / "engine" / "stock_connector"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}:$PYTHONPATH" exec "{PYTHONS["vllm"]}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr("paceline.target.vllm.server._CONNECTOR", "other_parts")
    seen: list[frozenset[str]] = []

    def load(path: Path) -> dict[str, torch.Tensor]:
        stored = load_file(path)
        seen.append(frozenset(stored))
        return stored

    monkeypatch.setattr("paceline.target.vllm.requests.load_file", load)
    rows = [tiny_request((300, 1, 77, 646), seed=seed) for seed in range(6)]
    rows.append(tiny_request((3000, 700, 513, 512), seed=11))
    config = config_of("vllm", target, engine_python=str(python))
    with open_engine(config) as engine:
        prepare_selftest(config).run(config, engine).check(config.engine)
        futures = [engine.capture(row, SPEC) for row in rows]
        for row, future in zip(rows, futures, strict=True):
            check_near(future.result(120), hf.capture(row, SPEC).result(60))
        wrong = config.model_copy(update={"capture_layers": (1, 5, 7)})
        with pytest.raises(TargetError, match="layer 5 asked, layer 4's output received"):
            prepare_selftest(wrong).run(wrong, shifted(engine)).check(config.engine)
    assert set(seen) == {frozenset({"hidden_states", "token_ids"})}


@pytest.mark.parametrize("name", NAMED)
def test_an_engine_that_is_started_by_the_shown_command_is_attached_to(
    name: str, target: Path, hf: HFEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PACELINE_ENGINE_KEY", "a key of ours")
    url, hidden = f"http://127.0.0.1:{free_port()}", tmp_path / "hidden"
    config = config_of(name, target, engine_url=url, engine_directory=str(hidden), engine_args={})
    command = engine_command(config.model_copy(update={"engine_args": config_of(name, target).engine_args}))
    with (tmp_path / "log").open("wb") as log:
        started = subprocess.Popen(["/bin/sh", "-c", command], stdout=log, stderr=log, start_new_session=True)
    try:
        address = EngineAddress(url, hidden, (), key="a key of ours")
        over = wait_for(lambda: is_ready(ENGINES[name], address) or started.poll() is not None, 300)
        assert over, (tmp_path / "log").read_text()[-4000:]
        assert started.poll() is None, (tmp_path / "log").read_text()[-4000:]
        with open_engine(config) as engine:
            prepare_selftest(config).run(config, engine).check(name)
            row = tiny_request((300, 1, 777), seed=3)
            check_near(engine.capture(row, SPEC).result(60), hf.capture(row, SPEC).result(60))
        assert started.poll() is None, "it is somebody else's"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


@pytest.mark.parametrize("name", NAMED)
def test_an_engine_for_which_there_is_no_memory_says_so(name: str, target: Path):
    too_much = {"vllm": {"kv-cache-memory-bytes": "900G"}, "sglang": {"mem-fraction-static": 0.0001}}[name]
    config = config_of(name, target)
    without = config.model_copy(update={"engine_args": config.engine_args | too_much})
    with pytest.raises(TargetError, match=r"(?is)ended with .*the last lines of its log.*memory"), open_engine(without):
        pass
