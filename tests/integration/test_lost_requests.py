"""Requests to an engine's server that fail: who says that it is gone, and that their files do not stay."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine_processes import wait_for
from paceline.config.target import TargetConfig
from paceline.errors import CaptureMismatchError, EngineLostError, TargetError, TransportError
from paceline.schema.features import FeatureSpec
from paceline.target.engines.document_engine import DocumentEngine
from paceline.target.engines.interface import CapturedDocument, EngineAddress, Place, RowMemory
from paceline.target.engines.outer_parts import load_outer_parts
from paceline.target.engines.own_files import OwnFiles
from paceline.target.hf.engine import HFEngine
from paceline.target.interface import SELFTEST
from paceline.target.vllm.requests import VLLMRequests
from tiny import tiny_request

SPEC = FeatureSpec((0, 3), final_hidden="all", greedy=True)


class Documents:
    """A server of documents that answers, fails and is looked at as a test says."""

    def __init__(self, engine: HFEngine) -> None:
        self.engine = engine
        self.name, self.layers, self.max_tokens = "Server 7", (0, 3), 4096
        self.fails = 0
        """So many requests fail, from now on."""
        self.looks: list[bool] = []
        """What looks at it say, one after the other; True after those."""
        self.num_looks = 0
        self.num_lost = 0
        """States that answers lack, from now on."""
        self.swaps: dict[int, int] = {}
        """A document of so many tokens gets the states of another text: its seed."""
        self.spoiled = 0
        """Documents of so many tokens have a last state that is not finite."""
        self.says: int | None = None
        """What it says instead of its next token."""

    def reserve(self, num_tokens: int, hidden_size: int, dtype: torch.dtype, pinned: bool) -> RowMemory:
        return RowMemory("", torch.empty(num_tokens, len(self.layers), hidden_size, dtype=dtype, pin_memory=pinned))

    def capture(self, tokens: np.ndarray, place: Place | None = None) -> CapturedDocument:
        if self.fails > 0:
            self.fails -= 1
            raise TransportError("no answer")
        features = self.engine.capture(tiny_request_of(tokens), SPEC).result(60)
        assert features.greedy is not None
        hidden = features.hidden
        if len(tokens) in self.swaps:
            other = tiny_request((len(tokens),), seed=self.swaps[len(tokens)])
            hidden = self.engine.capture(other, SPEC).result(60).hidden
        says = int(features.greedy[-1]) if self.says is None else self.says
        if len(tokens) == self.spoiled:
            hidden = hidden.clone()
            hidden[0, -1] = torch.inf
        return CapturedDocument(hidden[self.num_lost :], [0, 3], says)

    def is_alive(self) -> bool:
        self.num_looks += 1
        return self.looks.pop(0) if self.looks else True

    def close(self) -> None:
        return


def tiny_request_of(tokens: np.ndarray):
    request = tiny_request((len(tokens),))
    request.tokens[:] = tokens
    return request


@pytest.fixture(scope="module")
def hf(tiny_target: Path) -> Iterator[HFEngine]:
    with contextlib.closing(HFEngine(TargetConfig(model=str(tiny_target), device="cpu"))) as engine:
        yield engine


@pytest.fixture
def documents(hf: HFEngine, monkeypatch: pytest.MonkeyPatch) -> Documents:
    monkeypatch.setattr("paceline.target.engines.document_engine._LOOK_EVERY_S", 0.05)
    return Documents(hf)


@pytest.fixture
def engine(documents: Documents, tiny_target: Path) -> Iterator[DocumentEngine]:
    config = TargetConfig(model=str(tiny_target), device="cpu", engine="vllm")
    with contextlib.closing(DocumentEngine(config, documents, load_outer_parts(config))) as engine:
        yield engine


def test_a_request_that_fails_while_the_server_rests_costs_one_row_and_not_the_server(
    engine: DocumentEngine, documents: Documents
) -> None:
    """Whether it is gone is for whoever watches it."""
    lost: list[Exception] = []
    engine.on_lost(lost.append)
    documents.fails, documents.looks = 1, [False, False]
    with pytest.raises(TransportError, match="no answer"):
        engine.capture(tiny_request((5,)), SPEC).result(30)
    assert documents.num_looks == 3
    assert engine.capture(tiny_request((5,)), SPEC).result(30).finite
    assert lost == []


def test_the_word_of_who_watches_a_server_ends_the_wait_of_its_rows(
    engine: DocumentEngine, documents: Documents
) -> None:
    documents.fails, documents.looks = 1, [False] * 10_000
    future = engine.capture(tiny_request((5,)), SPEC)
    assert wait_for(lambda: documents.num_looks > 2, 10)
    assert not future.done()
    engine.lose(TargetError("Server 7 ended with code 3"))
    with pytest.raises(EngineLostError, match="ended with code 3"):
        future.result(5)


def test_a_server_that_nobody_misses_and_that_never_is_well_again_is_given_up(
    engine: DocumentEngine, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paceline.target.engines.document_engine._VERDICT_S", 0.2)
    documents.fails, documents.looks = 1, [False] * 10_000
    with pytest.raises(EngineLostError, match="no answer"):
        engine.capture(tiny_request((5,)), SPEC).result(30)


def test_a_token_that_does_not_follow_from_the_states_beside_it_is_refused(
    engine: DocumentEngine, documents: Documents
) -> None:
    """So states of another request are noticed. The row can be asked for again."""
    rows = [tiny_request((5, 1, 7), seed=seed) for seed in range(4)]
    assert all(engine.capture(row, SPEC).result(30).finite for row in rows)
    documents.swaps = {5: 3, 1: 9}
    row = tiny_request((7, 5, 7), seed=9)
    with pytest.raises(TransportError, match=r"Server 7 answered document 1 of row 9 with token \d+ where"):
        engine.capture(row, FeatureSpec((0,))).result(30)
    documents.swaps = {}
    assert engine.capture(row, SPEC).result(30).finite
    documents.says = 1_000_000
    with pytest.raises(TransportError, match="document 0 of row 9 with token 1000000 where"):
        engine.capture(row, SPEC).result(30)


def test_what_a_self_test_asks_for_is_answered_for_it_to_judge(engine: DocumentEngine, documents: Documents) -> None:
    documents.swaps = {5: 3}
    row = replace(tiny_request((5,), seed=9), spec=SELFTEST)
    assert engine.capture(row, SPEC).result(30).finite


@pytest.mark.parametrize("spec", [FeatureSpec((0,)), FeatureSpec((0,), final_hidden="supervised")])
def test_states_that_nobody_asked_for_need_not_be_finite(
    engine: DocumentEngine, documents: Documents, spec: FeatureSpec
) -> None:
    documents.spoiled = 1
    row = replace(tiny_request((1, 5), seed=2), spans=np.array([[2, 5]], np.int32))
    features = engine.capture(row, spec).result(30)
    assert features.finite
    assert features.hidden.isfinite().all()


def test_a_row_that_failed_holds_no_memory_however_long_its_error_is_kept(
    engine: DocumentEngine, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both ways to fail: on the way, and when its states are looked at."""
    kept: list[Exception | None] = []
    leases: list[weakref.ref[torch.Tensor]] = []
    reserve = documents.reserve

    def remembering(*of: object) -> RowMemory:
        memory = reserve(*of)
        leases.append(weakref.ref(memory.states))
        return memory

    monkeypatch.setattr(documents, "reserve", remembering)
    gc.disable()
    try:
        for fails, says in ((1, None), (0, 1_000_000)):
            documents.fails, documents.says = fails, says
            kept.append(engine.capture(tiny_request((5, 7)), SPEC).exception(30))
        assert [type(error) for error in kept] == [TransportError, TransportError]
        assert wait_for(lambda: [lease() for lease in leases] == [None, None], 10)
    finally:
        gc.enable()


def test_fewer_states_than_tokens_are_refused(engine: DocumentEngine, documents: Documents) -> None:
    documents.num_lost = 1
    with pytest.raises(CaptureMismatchError, match=r"float32\[4, 2, 32\], expected .*\[5, 2, 32\]"):
        engine.capture(tiny_request((5, 5)), SPEC).result(30)


class LossyVLLM(BaseHTTPRequestHandler):
    """Speaks as vLLM does; ends each second request without an answer, and writes its file all the same, later."""

    directory: Path
    written: list[str]

    def do_GET(self) -> None:
        self.answer({"version": "0.32.0", "data": [{"id": "m", "max_model_len": 100}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path = self.directory / f"cmpl-{body['request_id']}-0-1234abcd.safetensors"
        path.with_name(path.name + ".lock").touch()
        self.written.append(path.name)
        if len(self.written) % 2 == 0:
            self.close_connection = True
            time.sleep(0.2)
            self.write(path, body["prompt"])
            return
        self.write(path, body["prompt"])
        self.answer({"kv_transfer_params": {"hidden_states_path": str(path)}, "choices": [{"token_ids": [3]}]})

    def write(self, path: Path, tokens: list[int]) -> None:
        save_file({"hidden_states": torch.zeros(len(tokens), 1, 2), "token_ids": torch.tensor(tokens)}, path)

    def answer(self, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[EngineAddress]:
    handler = type("Handler", (LossyVLLM,), {"directory": tmp_path, "written": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield EngineAddress(f"http://127.0.0.1:{server.server_port}", tmp_path, (0,))
        server.shutdown()


def hidden_states(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if ".safetensors" in path.name}


def test_files_of_requests_that_were_never_answered_go_and_those_of_others_stay(
    address: EngineAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paceline.target.engines.own_files._SWEEP_EVERY_S", 0.0)
    others = {"cmpl-0123-0-5678.safetensors", "cmpl-paceline-0123456789abcdef-0-0-5678.safetensors"}
    for name in others:
        (address.directory / name).touch()
    tokens = np.arange(4, dtype=np.int32)
    with contextlib.closing(VLLMRequests(address)) as requests:
        assert requests.capture(tokens).next_token == 3
        assert hidden_states(address.directory) == others
        with pytest.raises(TransportError):
            requests.capture(tokens)
        assert wait_for(lambda: len(hidden_states(address.directory)) == 4, 10), "the premise"
        requests.capture(tokens)
        assert hidden_states(address.directory) == others
        with pytest.raises(TransportError):
            requests.capture(tokens)
        assert wait_for(lambda: len(hidden_states(address.directory)) == 4, 10)
    assert hidden_states(address.directory) == others


def test_what_a_client_that_was_killed_has_left_goes_when_the_next_one_starts(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from paceline.target.engines.own_files import OwnFiles;"
        "files = OwnFiles(Path(sys.argv[1]));"
        "Path(sys.argv[1], f'cmpl-{files.new_name()}-0-1234abcd.safetensors').touch(); time.sleep(600)"
    )
    killed, alive = (subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=os.environ) for _ in range(2))
    try:
        assert wait_for(lambda: len(hidden_states(tmp_path)) == 2, 60)
        OwnFiles(tmp_path).close()
        assert len(hidden_states(tmp_path)) == 2
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        OwnFiles(tmp_path).close()
        assert len(hidden_states(tmp_path)) == 1
    finally:
        for process in (killed, alive):
            process.kill()
            process.wait()
    OwnFiles(tmp_path).close()
    assert hidden_states(tmp_path) == set()


def test_what_a_server_writes_after_its_client_has_ended_goes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paceline.target.engines.own_files._SWEEP_EVERY_S", 0.0)
    OwnFiles(tmp_path).close()
    assert not list(tmp_path.iterdir()), "it asked for nothing, so nothing will come"
    ended = OwnFiles(tmp_path)
    name_of_ended = ended.new_name()
    ended.close()
    with contextlib.closing(OwnFiles(tmp_path)) as other:
        late = tmp_path / f"cmpl-{name_of_ended}-0-1234abcd.safetensors"
        late.touch()
        name = other.new_name()
        own = tmp_path / f"cmpl-{name}-0-1234abcd.safetensors"
        own.touch()
        other.sweep()
        assert hidden_states(tmp_path) == {own.name}
        other.finish(name)  # this one may have been computed twice
        other.sweep()
        assert hidden_states(tmp_path) == set()
    (first, second) = tmp_path.glob("*.left")
    os.utime(first, (0, 0))
    OwnFiles(tmp_path).close()
    assert second in set(tmp_path.glob("*.left")), "for a while, since the server may write yet"
    assert not first.exists()


def test_a_directory_that_nobody_may_write_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"nowhere, where the engine writes hidden states"):
        OwnFiles(tmp_path / "nowhere")


def test_a_directory_that_is_gone_with_its_engine_costs_rows_that_can_be_asked_for_elsewhere(
    address: EngineAddress, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever started the engine removes it, at whatever moment of a request."""
    with contextlib.closing(VLLMRequests(address)) as requests:
        shutil.rmtree(address.directory)
        with pytest.raises(TransportError, match=r"vLLM at http.*No such file or directory"):
            requests.capture(np.arange(4, dtype=np.int32))
        assert requests.reserve(100, 2, torch.float32, pinned=False).label == ""
    assert "room" not in caplog.text
