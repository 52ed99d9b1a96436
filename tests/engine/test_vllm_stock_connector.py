"""vLLM's own connector, which takes the place of ours where that does not fit; its files do not say which layers."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from engine.test_vllm_engine import EVERYTHING, PYTHON, check_equal, hf_config, target_config
from paceline.launch.selftest import prepare_selftest
from paceline.target.engines.interface import INSIDE
from paceline.target.hf.engine import HFEngine
from paceline.target.opening import open_engine
from tiny import save_tiny_target, tiny_request

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
FOLDER = Path(__file__).with_name("stock_connector")


def test_it_takes_the_place_of_ours_where_a_private_part_has_changed():
    """Itself it needs pinned memory: tests/gpu/test_gpu_engines.py runs it."""
    assert PYTHON.exists(), "make engine-test installs vLLM"
    code = "import other_parts as o; print(o.HiddenStatesConnector.__name__, o.changed_parts())"
    path = os.pathsep.join((str(FOLDER), str(INSIDE)))
    ran = subprocess.run(
        [str(PYTHON), "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    name, changed = ran.stdout.splitlines()[-1].split(maxsplit=1)
    assert name == "ExampleHiddenStatesConnector"
    assert changed.count(" takes ") == 1
    assert "_submit_async_write takes ('self', 'pending', 'stream')" in changed
    assert "paceline's connector does not fit this vLLM" in ran.stdout + ran.stderr


def test_rows_from_files_without_layers_are_those_of_the_hf_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is different in its files and its choice of requests is put into ours."""
    assert PYTHON.exists(), "make engine-test installs vLLM"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{FOLDER}:$PYTHONPATH" exec "{PYTHON}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setattr("paceline.target.vllm.server._CONNECTOR", "stock_on_cpu")
    target = save_tiny_target(tmp_path / "qwen3", "qwen3", head_dim=32)
    config = target_config(target, engine_python=str(python))
    rows = [tiny_request((300, 1, 77, 20), seed=1), tiny_request((5, 600), seed=2)]
    seen = []
    monkeypatch.setattr(
        "paceline.target.vllm.requests.load_file", lambda path: seen.append(load_file(path)) or seen[-1]
    )
    with open_engine(config) as engine, contextlib.closing(HFEngine(hf_config(target))) as hf:
        result = prepare_selftest(config).run(config, engine)
        assert (result.problem, result.unproven) == (None, None)
        futures = [engine.capture(row, EVERYTHING) for row in rows]
        for row, future in zip(rows, futures, strict=True):
            check_equal(future.result(120), hf.capture(row, EVERYTHING).result(60))
    assert {frozenset(stored) for stored in seen} == {frozenset({"hidden_states", "token_ids"})}
