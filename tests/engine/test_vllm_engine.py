"""The vllm engine on a real vLLM server: what the hf engine computes, asynchronously, a document at a time."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from contract.test_engine_contract import (  # noqa: F401  # collected here too, on this engine
    EVERYTHING,
    test_a_cancelled_row_is_skipped,
    test_a_wrong_request_fails_alone,
    test_features_equal_transformers_eager,
    test_info_is_the_same_object_every_time,
    test_room_shrinks_with_rows_in_flight_and_returns,
    test_times_of_rows_in_flight_together_do_not_overlap,
    test_twenty_rows_submitted_without_waiting_come_back_right,
)
from engine_processes import descendants, wait_for
from paceline.config.target import TargetConfig
from paceline.errors import (
    CaptureMismatchError,
    ConfigError,
    EngineLostError,
    PacelineError,
    StoppedError,
    TargetError,
    TransportError,
)
from paceline.schema.features import Features, FeatureSpec
from paceline.target.engines.document_engine import DocumentEngine
from paceline.target.engines.interface import EngineAddress
from paceline.target.engines.outer_parts import load_outer_parts
from paceline.target.engines.process import EngineProcess
from paceline.target.engines.programs import find_program
from paceline.target.engines.starting import is_ready, start_engine
from paceline.target.hf.engine import HFEngine
from paceline.target.opening import engine_layers, open_engine
from paceline.target.selftest.reference import observe
from paceline.target.selftest.run import run_selftest
from paceline.target.selftest.texts import build_texts
from paceline.target.selftest.tolerance import choose_tolerance
from paceline.target.vllm.kind import VLLM
from tiny import save_tiny_target, tiny_request

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
PYTHON = Path(os.environ.get("PACELINE_TEST_VLLM") or Path(__file__).parents[2] / ".venv-engine" / "bin" / "python")
LAYERS = (0, 2)
"""With which the server is started; the last layer is captured in any case."""
ARGS = {
    "enforce-eager": True,
    "max-model-len": 4096,
    "max-num-seqs": 8,
    "gpu-memory-utilization": 0.2,  # of a CPU's, too, and nobody may need the memory of a small model
    "max-num-batched-tokens": 1024,
    "long-prefill-token-threshold": 256,  # long documents take several steps: short ones overtake them
}


def target_config(path: Path, **changes: Any) -> TargetConfig:
    settings = {
        "model": str(path),
        "device": "cpu",
        "dtype": "float32",
        "vocab_chunk_tokens": 7,
        "engine": "vllm",
        "engine_python": str(PYTHON),
        "engine_args": ARGS,
        "engine_documents": 16,
        "capture_layers": LAYERS,
    }
    return TargetConfig(**{**settings, **changes})


def hf_config(path: Path) -> TargetConfig:
    return TargetConfig(model=str(path), device="cpu", dtype="float32", vocab_chunk_tokens=7)


@dataclass
class Server:
    """A vLLM of these tests."""

    target: Path
    process: EngineProcess
    address: EngineAddress

    def engine(self, target: Path | None = None, **changes: Any) -> DocumentEngine:
        config = target_config(target or self.target)
        return DocumentEngine(config, VLLM.connect(replace(self.address, **changes)), load_outer_parts(config))


@pytest.fixture(scope="module", params=["qwen3", "llama", "qwen3_moe"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # vLLM's attention on CPUs knows no heads under 32.
    return save_tiny_target(tmp_path_factory.mktemp("target") / request.param, request.param, head_dim=32)


@pytest.fixture(scope="module")
def server(target: Path) -> Iterator[Server]:
    assert PYTHON.exists(), "make engine-test installs vLLM"
    config = target_config(target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        process, address = start_engine(
            VLLM, config, find_program(config, VLLM.packages, VLLM.install), target, engine_layers(LAYERS, 4)
        )
    with contextlib.closing(process):
        process.wait_until(lambda: is_ready(VLLM, address), 600)
        yield Server(target, process, address)


@pytest.fixture(scope="module")
def engine(server: Server) -> Iterator[DocumentEngine]:
    with contextlib.closing(server.engine()) as engine:
        yield engine


@pytest.fixture(scope="module")
def hf(target: Path) -> Iterator[HFEngine]:
    with contextlib.closing(HFEngine(hf_config(target))) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(target: Path):
    return AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager").eval()


def check_equal(features: Features, expected: Features) -> None:
    assert features.layers == expected.layers
    assert features.row_hash == expected.row_hash
    assert features.finite
    assert features.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        received = features.tensors()[name]
        assert (received.dtype, received.shape) == (tensor.dtype, tensor.shape), name
        if tensor.is_floating_point():
            assert (received - tensor).norm() <= 1e-4 * tensor.norm(), name
        else:
            assert torch.equal(received, tensor), name


def test_two_packed_rows_in_flight_equal_those_of_the_hf_engine(engine: DocumentEngine, hf: HFEngine):
    requests = [
        tiny_request((300, 1, 17, 64, 5), seed=1, spans=[(10, 40), (301, 318)]),
        tiny_request((33, 700, 2), seed=2, spans=[(0, 33)]),
    ]
    supervised = replace(EVERYTHING, final_hidden="supervised", logsumexp=False)
    futures = [engine.capture(request, supervised) for request in requests]
    for request, future in zip(requests, futures, strict=True):
        check_equal(future.result(120), hf.capture(request, supervised).result(60))


@pytest.mark.parametrize("shared", [True, False])
def test_states_go_to_their_row_or_come_in_files(
    server: Server, hf: HFEngine, monkeypatch: pytest.MonkeyPatch, shared: bool
):
    """In files where the directory is on a disk."""
    monkeypatch.setattr("paceline.target.engines.shared_rows._is_memory", lambda directory: shared)
    seen: list[frozenset[str]] = []
    monkeypatch.setattr(
        "paceline.target.vllm.requests.load_file",
        lambda path: seen.append(frozenset(stored := load_file(path))) or stored,
    )
    rows = [tiny_request((300, 1, 77, 20), seed=seed) for seed in range(4)]
    with contextlib.closing(server.engine()) as engine:
        seen.clear()  # the first document proves the checkpoint
        for _ in range(2):
            futures = [engine.capture(row, EVERYTHING) for row in rows]
            for row, future in zip(rows, futures, strict=True):
                check_equal(future.result(120), hf.capture(row, EVERYTHING).result(60))
    assert len(seen) == 32
    assert set(seen) == {frozenset({"placed" if shared else "hidden_states", "token_ids", "layer_ids"})}


def test_every_spec_that_the_captured_layers_serve_is_answered(engine: DocumentEngine, hf: HFEngine):
    request = tiny_request((20, 9), seed=4)
    for spec in (FeatureSpec((2,)), FeatureSpec((), greedy=True), FeatureSpec((0, 2, 3), final_hidden="all")):
        check_equal(engine.capture(request, spec).result(60), hf.capture(request, spec).result(60))


def test_the_facts_about_the_target_are_those_of_the_hf_engine(engine: DocumentEngine, hf: HFEngine):
    assert hf.info().deterministic
    assert engine.info() == hf.info().model_copy(update={"deterministic": False})


def test_a_short_row_overtakes_a_long_one(engine: DocumentEngine, hf: HFEngine):
    long, short = tiny_request((4000, 3000), seed=1), tiny_request((4, 3), seed=2)
    futures: dict[Future[Features], str] = {
        engine.capture(long, EVERYTHING): "long",
        engine.capture(short, EVERYTHING): "short",
    }
    assert [futures[future] for future in as_completed(futures, 240)] == ["short", "long"]
    for future, request in zip(futures, (long, short), strict=True):
        check_equal(future.result(), hf.capture(request, EVERYTHING).result(120))


def test_documents_do_not_see_each_other(engine: DocumentEngine):
    request = tiny_request((40, 30, 20), seed=5)
    tokens = request.tokens.copy()
    tokens[:40] = (tokens[:40] + 1) % 300
    first, second = (engine.capture(one, EVERYTHING).result(60) for one in (request, replace(request, tokens=tokens)))
    assert not torch.allclose(first.hidden[:40], second.hidden[:40], rtol=0.1)
    torch.testing.assert_close(first.hidden[40:], second.hidden[40:], rtol=1e-5, atol=1e-5)


def test_a_layer_that_the_server_does_not_capture_is_refused(engine: DocumentEngine):
    with pytest.raises(ConfigError, match=r"capture layers \[1\].*started for \[0, 2, 3\]"):
        engine.capture(tiny_request((5,)), FeatureSpec((0, 1))).result(5)


def test_a_document_longer_than_the_server_takes_is_refused(engine: DocumentEngine):
    with pytest.raises(ConfigError, match=r"4096 tokens for vLLM at .*, which takes 4095"):
        engine.capture(tiny_request((5, 4096)), EVERYTHING).result(5)


def test_nothing_is_left_in_the_directory(engine: DocumentEngine, server: Server):
    assert engine.capture(tiny_request((5, 6)), EVERYTHING).result(60).finite
    assert hidden_states(server) == []


def test_what_vllm_writes_for_requests_that_were_given_up_goes_when_the_next_client_starts(server: Server):
    other = server.engine()
    futures = [other.capture(tiny_request((4000,), seed=seed), EVERYTHING) for seed in range(16)]
    assert wait_for(lambda: bool(hidden_states(server)), 30), f"the premise: vLLM is at it, or was: {futures}"
    other.close()
    assert any(future.exception(5) for future in futures)

    def nothing_is_left() -> bool:
        server.engine().close()
        return not hidden_states(server)

    assert wait_for(nothing_is_left, 60)


def hidden_states(server: Server) -> list[str]:
    """Files beside rows that are used again, and those that say which clients there were."""
    names = [path.name for path in server.address.directory.iterdir()]
    return [name for name in names if not re.search(r"\.owner$|\.left$|-row\d+$", name)]


def test_prefills_in_chunks_pass_the_self_test_with_its_long_text(engine: DocumentEngine, reference: PreTrainedModel):
    """Of 2,304 tokens vLLM computes 256 at once here."""
    texts = build_texts(engine.info().num_tokenizer_tokens, engine.info().max_position_embeddings)
    expected = observe(reference, texts, "")
    result = run_selftest(engine, texts, expected, LAYERS, choose_tolerance("float32"), num_far=2)
    assert (result.problem, result.unproven) == (None, None)
    assert result.num_judged_tokens > 4 * 792


def test_this_version_is_among_those_that_the_documents_call_tried(target: Path):
    program = find_program(target_config(target), VLLM.packages, VLLM.install)
    assert program.version in VLLM.tried
    assert program.version in (Path(__file__).parents[2] / "docs" / "engines.md").read_text(encoding="utf-8")


def test_rows_are_taken_until_their_tokens_are_as_many_as_the_setting(server: Server):
    """With documents to spare: two are out, of 32 that could be."""
    config = target_config(server.target, engine_tokens=1000)
    core = descendants(server.process.pid)[-1]
    with contextlib.closing(
        DocumentEngine(config, VLLM.connect(server.address), load_outer_parts(config))
    ) as one_engine:
        assert one_engine.room() == 2 * config.engine_documents
        os.kill(core, signal.SIGSTOP)
        try:
            rooms = []
            futures = []
            for seed in range(2):
                futures.append(one_engine.capture(tiny_request((600,), seed=seed), EVERYTHING))
                rooms.append(one_engine.room())
        finally:
            os.kill(core, signal.SIGCONT)
        assert rooms == [1, 0]
        assert all(future.result(60).finite for future in futures)
        assert one_engine.room() == 2 * config.engine_documents


def test_a_server_that_captures_other_layers_is_refused(server: Server):
    with pytest.raises(CaptureMismatchError, match=r"captured layers \[0, 2, 3\].*expected \[0, 1, 3\]"):
        server.engine(layers=(0, 1, 3))


def test_a_server_that_runs_another_checkpoint_is_refused(server: Server, tmp_path: Path):
    other = save_tiny_target(tmp_path / "other", server.target.name, seed=1, head_dim=32)
    with pytest.raises(TargetError, match="does it run another checkpoint"):
        server.engine(other)


def test_a_server_with_another_key_refuses(server: Server):
    with pytest.raises(TargetError, match="401"):
        server.engine(key="wrong")


def test_a_server_that_runs_already_is_reached_by_its_url(
    server: Server, hf: HFEngine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PACELINE_ENGINE_KEY", server.address.key)
    where = {"engine_url": server.address.url, "engine_directory": str(server.address.directory)}
    request = tiny_request((20, 9), seed=4)
    with open_engine(target_config(server.target, **where)) as engine:
        check_equal(engine.capture(request, EVERYTHING).result(60), hf.capture(request, EVERYTHING).result(60))


def test_close_ends_what_waits_and_leaves_the_server_to_others(server: Server, engine: DocumentEngine):
    closing = server.engine()
    futures = [closing.capture(tiny_request((300,) * 8, seed=seed), EVERYTHING) for seed in range(10)]
    begin = time.monotonic()
    closing.close()
    closing.close()
    assert time.monotonic() - begin < 10
    assert all(isinstance(future.exception(0), StoppedError) for future in futures if future.exception(0))
    assert futures[-1].exception(0) is not None
    with pytest.raises(StoppedError):
        closing.capture(tiny_request((3,)), EVERYTHING).result(5)
    assert engine.capture(tiny_request((3,)), EVERYTHING).result(60).finite


def test_rows_of_a_server_that_dies_can_be_asked_for_elsewhere(server: Server, engine: DocumentEngine):
    """The last test on its server."""
    told: list[PacelineError] = []
    engine.on_lost(told.append)
    server.process.on_end(engine.lose)
    futures = [engine.capture(tiny_request((400,) * 8, seed=seed), EVERYTHING) for seed in range(4)]
    os.kill(descendants(server.process.pid)[-1], signal.SIGKILL)  # the core, a child of the API server
    errors = [future.exception(60) for future in futures]
    assert isinstance(errors[-1], TransportError | EngineLostError)
    assert all(error is None or error.retryable for error in errors)
    assert wait_for(lambda: bool(told), 60)
    assert "the last lines of its log" in str(told[0])
    assert isinstance(engine.capture(tiny_request((3,)), EVERYTHING).exception(5), EngineLostError)
