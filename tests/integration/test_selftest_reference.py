"""The self-test's reference: computed once on a host, where there is memory for it, and nothing partial is kept."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.config.target import TargetConfig
from paceline.errors import StoppedError, TargetError
from paceline.launch.memory import free_memory
from paceline.launch.reference import find_reference
from paceline.launch.reference_place import find_place, free_on_gpus
from paceline.launch.selftest import SelfTest, prepare_selftest
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.target.hf.fingerprint import fingerprint_weights
from paceline.target.hf.stored_tensors import read_tensor_table
from paceline.target.selftest.reference import Reference, cache_path
from paceline.target.selftest.run import run_selftest
from paceline.target.selftest.texts import build_texts
from rows import tiny_info

TEXTS = build_texts(261)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "paceline" / "selftest"


def test_servers_that_start_together_compute_the_reference_once_and_clear_away_what_a_killed_one_left(
    tiny_target: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = TargetConfig(model=str(tiny_target), device="cpu", engine="vllm")
    kept = cache_path(fingerprint_weights(tiny_target), "float32", None, build_texts(261, 4096))
    cache.mkdir(parents=True)
    left, young = kept.with_name(f"{kept.name}.12345678.77"), kept.with_name(f"{kept.name}.87654321")
    for path in (left, young):
        path.write_bytes(b"half of")
    os.utime(left, (0, 0))
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(2) as threads:
        found: list[SelfTest] = list(threads.map(lambda _: prepare_selftest(config), range(2)))
    assert caplog.text.count("computing what transformers says") == 1
    assert "another process computes what transformers says" in caplog.text
    assert found[0].reference.final_hidden.equal(found[1].reference.final_hidden)
    assert set(cache.iterdir()) == {kept, kept.with_suffix(".lock"), young}, "the young one may be of another host"


NOWHERE = r"needs 0\.\d+ GB for the self-test's reference, 1e-09 GB are free .*--save-reference.*selftest_reference"


@pytest.mark.parametrize(
    "changes",
    [{"engine": "vllm"}, {"engine": "sglang"}, {"tensor_parallel": 2}],
    ids=["vllm", "sglang", "hf over two processes"],
)
def test_a_reference_that_fits_nowhere_is_refused_with_what_to_do(
    changes: dict[str, Any], tiny_target: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paceline.launch.reference_place.free_memory", lambda: 1)
    config = TargetConfig(model=str(tiny_target), device="cpu", dtype="bfloat16", **changes)
    with pytest.raises(TargetError, match=f"bfloat16 {NOWHERE}"):
        prepare_selftest(config)
    assert [path.suffix for path in cache.iterdir()] == [".lock"], "nothing was computed"


def test_a_reference_of_an_earlier_time_needs_no_room(
    tiny_target: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that starts anew may find the memory of the one before still taken."""
    config = TargetConfig(model=str(tiny_target), device="cpu", dtype="bfloat16", tensor_parallel=2)
    texts = build_texts(261, 4096)
    fingerprint = fingerprint_weights(tiny_target)
    least = cache_path(fingerprint, "bfloat16", None, texts)
    num_weights = sum(math.prod(tensor.shape) for tensor in read_tensor_table(tiny_target).values())
    monkeypatch.setattr("paceline.launch.selftest.bytes_of_text", lambda *_: 0)
    monkeypatch.setattr("paceline.launch.reference_place.free_memory", lambda: 3 * num_weights)
    with caplog.at_level(logging.INFO):
        assert prepare_selftest(config).reference.dtype == "bfloat16"
        assert least.exists()
        monkeypatch.setattr("paceline.launch.reference_place.free_memory", lambda: 1)
        assert prepare_selftest(config).reference.dtype == "bfloat16"
        with pytest.raises(TargetError, match=f"float32 {NOWHERE}"):
            prepare_selftest(config, exact=True)
        monkeypatch.setattr("paceline.launch.reference_place.free_memory", lambda: 9 * num_weights)
        best = prepare_selftest(config).reference
        assert (best.dtype, best.rounded_dtype) == ("float32", "bfloat16"), "there is room again"
        monkeypatch.setattr("paceline.launch.reference_place.free_memory", lambda: 1)
        assert prepare_selftest(config).reference.final_hidden.equal(best.final_hidden)
    assert caplog.text.count("computing what transformers says") == 2


def test_where_nothing_better_can_be_computed_one_of_an_earlier_time_is_taken_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best, least = tmp_path / "best.safetensors", tmp_path / "least.safetensors"
    state = torch.ones(2, 4, dtype=torch.bfloat16)
    kept = Reference(
        layers=torch.ones(2, 1, 4, dtype=torch.bfloat16),
        final_hidden=state,
        before_norm=None,
        top_ids=torch.zeros(2, 1, dtype=torch.int64),
        top_logits=torch.zeros(2, 1),
        logit_spread=torch.ones(2),
        rounding=None,
        model="m",
        fingerprint="w",
        text_hash=TEXTS.text_hash(),
        dtype="bfloat16",
    )
    kept.save(least)
    settings = {"dtype": "float32", "device": "cpu", "spread": {}, "quantised": False, "model": str(tmp_path / "none")}
    assert find_reference([best, least], TEXTS, "w", lambda: (best, settings), 60).final_hidden.equal(state)
    assert (
        "takes what transformers said in bfloat16 at an earlier time: the self-test's reference cannot" in caplog.text
    )
    with pytest.raises(TargetError, match="cannot be computed here"):
        find_reference([best, least], TEXTS, "w", lambda: (best, settings), 60, anew=True)


BF16, FP32 = {"dtype": "bfloat16"}, {"dtype": "float32"}
TWO = {"tensor_parallel": 2}
VLLM, SGLANG = {"engine": "vllm", "device": "cuda"}, {"engine": "sglang", "device": "cuda"}
ATTACHED = {"engine_url": "http://127.0.0.1:1", "engine_directory": "/dev/shm"}


@pytest.mark.parametrize(
    ("free", "host", "changes", "expected"),
    [
        ((9, 9, 9, 9), 9, BF16 | TWO, ("cuda:0", "float32", {})),
        ((3, 4, 9, 9), 9, BF16 | TWO, ("cuda:0", "float32", {0: 3, 1: 4})),
        ((9, 9, 3, 4), 9, BF16 | TWO | {"device": "cuda:2"}, ("cuda:2", "float32", {2: 3, 3: 4})),
        ((3, 4, 9, 9), 9, BF16 | TWO | {"engine": "vllm"}, ("cuda:0", "float32", {0: 3, 1: 4})),
        ((3, 4, 9, 9), 9, BF16 | TWO | {"engine": "sglang"}, ("cuda:0", "float32", {0: 3, 1: 4})),
        ((3, 4, 9, 9), 9, BF16 | VLLM | {"engine_args": {"-tp": 2, "-dp": 2}}, ("cuda:0", "float32", {0: 3, 1: 4})),
        ((3, 4, 9, 9), 9, BF16 | SGLANG | {"engine_args": {"tp": 2}}, ("cuda:0", "float32", {0: 3, 1: 4})),
        ((2, 4, 9, 9), 9, BF16 | VLLM | ATTACHED | {"engine_args": {"-tp": 2}}, ("cpu", "float32", {})),
        ((3, 3, 9, 9), 9, BF16, ("cuda:0", "bfloat16", {})),
        ((2, 2, 1, 1), 9, BF16 | {"device_map": "auto"}, ("cuda:0", "float32", {0: 2, 1: 2, 2: 1, 3: 1})),
        ((2, 2, 9, 9), 9, FP32 | TWO, ("cpu", "float32", {})),
        ((2, 1, 9, 9), 9, BF16 | TWO, ("cuda:0", "bfloat16", {0: 2, 1: 1})),
        ((1, 1, 9, 9), 9, BF16 | TWO, ("cpu", "float32", {})),
        ((1, 1, 9, 9), 3, BF16 | TWO, ("cpu", "bfloat16", {})),
    ],
)
def test_a_reference_goes_where_there_is_room_float32_and_the_engines_own_gpus_first(
    free: tuple[int, ...],
    host: int,
    changes: dict[str, Any],
    expected: tuple[str, str, dict[int, int]],
    tiny_target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sizes in bytes for each weight, beside those of a text, which a GPU must have room for as well."""
    num_weights = sum(math.prod(tensor.shape) for tensor in read_tensor_table(tiny_target).values())
    text = 40 * num_weights
    config = TargetConfig.model_validate({"model": str(tiny_target), "device": "cuda:0", **changes})
    room = text if expected[1] == "float32" else text // 2

    beside = room if expected[0] != "cpu" else text // 2 if config.dtype == "bfloat16" else text
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(
        "paceline.launch.reference_place.free_on_gpus",
        lambda gpus: {gpu: free[gpu] * num_weights + beside for gpu in gpus},
    )
    monkeypatch.setattr("paceline.launch.reference_place.free_memory", lambda: host * num_weights + room)
    place = find_place(tiny_target, config, text)
    spread = {gpu: num_bytes // num_weights for gpu, num_bytes in place.spread.items()}
    assert (str(place.device), place.dtype, spread) == expected


def test_nothing_is_spread_without_accelerate_and_all_gpus_may_be_used_for_a_file_alone(
    tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_weights = sum(math.prod(tensor.shape) for tensor in read_tensor_table(tiny_target).values())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(
        "paceline.launch.reference_place.free_on_gpus",
        lambda gpus: dict.fromkeys(gpus, 2 * num_weights),
    )
    config = TargetConfig(model=str(tiny_target), device="cuda:0", dtype="bfloat16", tensor_parallel=2)
    assert len(find_place(tiny_target, config, 0).spread) == 2
    assert find_place(tiny_target, config, 0).dtype == "bfloat16"
    assert len(find_place(tiny_target, config, 0, everywhere=True).spread) == 4
    assert find_place(tiny_target, config, 0, everywhere=True).dtype == "float32"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (find_place(tiny_target, config, 0).device.type, find_place(tiny_target, config, 0).spread) == ("cpu", {})


def test_gpus_that_do_not_say_what_is_free_are_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    """This machine has none, or not so many."""
    gpus = range(torch.cuda.device_count(), torch.cuda.device_count() + 2)
    assert free_on_gpus(gpus) == dict.fromkeys(gpus, 0)
    assert not caplog.text, "each said that it is not there"


def test_packed_weights_stay_on_the_engines_gpus_whatever_there_is_room_for(
    tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may need its kernels, and what transformers unpacks of them is not known."""
    packed = Path(shutil.copytree(tiny_target, tmp_path / "packed"))
    stored = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(
        json.dumps(stored | {"quantization_config": {"quant_method": "awq", "bits": 4}})
    )
    num_bytes = sum(tensor.num_bytes for tensor in read_tensor_table(packed).values())
    free = {0: 0.0, 1: 0.0}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        "paceline.launch.reference_place.free_on_gpus",
        lambda gpus: {gpu: int(free[gpu] * num_bytes) for gpu in gpus},
    )
    config = TargetConfig(model=str(packed), device="cuda:0", dtype="bfloat16", tensor_parallel=2)
    for room, spread in (((0.1, 0.1), 0), ((0.7, 0.7), 2), ((1.4, 0.0), 0)):
        free |= dict(enumerate(room))
        place = find_place(packed, config, 0)
        assert (str(place.device), place.dtype, len(place.spread)) == ("cuda:0", "auto", spread)


def test_waiting_for_another_that_computes_it_ends_with_a_stop_or_in_time(tmp_path: Path) -> None:
    kept = tmp_path / "r.safetensors"

    def plan() -> tuple[Path, dict[str, Any]]:
        raise AssertionError("the other one computes it")

    with (tmp_path / "r.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stop = threading.Event()
        threading.Timer(0.3, stop.set).start()
        begin = time.monotonic()
        with pytest.raises(StoppedError):
            find_reference([kept], TEXTS, "w", plan, 60, stop)
        assert 0.2 < time.monotonic() - begin < 5
        with pytest.raises(TargetError, match=r"for 0 s \(target.engine_start_timeout_s\) and holds .*r\.lock"):
            find_reference([kept], TEXTS, "w", plan, 0.3)


def test_a_stop_ends_a_self_test_whose_engine_does_not_answer() -> None:
    class Silent:
        def info(self) -> object:
            return tiny_info()

        def capture(self, request: RowRequest, spec: FeatureSpec) -> Future[Features]:
            return Future()

    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    begin = time.monotonic()
    with pytest.raises(StoppedError, match="stopped during the self-test"):
        run_selftest(Silent(), TEXTS, None, (0,), None, stop=stop)  # type: ignore[arg-type]
    assert time.monotonic() - begin < 5


def write_group(path: Path, most: str, used: int, cached: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("memory.max", most),
        ("memory.current", str(used)),
        ("memory.stat", f"anon 1\ninactive_file {cached}"),
    ):
        (path / name).write_text(text + "\n")


def write_proc(path: Path, cgroup: str, available_kib: int = 1 << 20) -> Path:
    (path / "self").mkdir(parents=True)
    (path / "meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable: {available_kib} kB\n")
    (path / "self" / "cgroup").write_text(cgroup)
    return path


def test_free_memory_is_what_every_control_group_above_leaves(tmp_path: Path) -> None:
    proc, mount = write_proc(tmp_path / "proc", "0::/slice/job\n"), tmp_path / "cgroup"
    assert free_memory(proc, mount) == 1 << 30, "no group is seen"
    write_group(mount / "slice" / "job", "max", 500, 0)
    assert free_memory(proc, mount) == 1 << 30
    write_group(mount / "slice", str(800 << 20), 300 << 20, 100 << 20)
    assert free_memory(proc, mount) == 600 << 20, "files that are only kept for later are free"
    write_group(mount, str(100 << 20), 200 << 20, 0)
    assert free_memory(proc, mount) == 0, "a container's own group is at the top of its mount"
    assert free_memory() > 0


def test_free_memory_is_found_in_groups_of_version_1(tmp_path: Path) -> None:
    proc = write_proc(tmp_path / "proc", "3:cpu,cpuacct:/a\n2:memory:/docker/b\n1:name=systemd:/c\n")
    group = tmp_path / "cgroup" / "memory"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(str(512 << 20))
    (group / "memory.usage_in_bytes").write_text(str(512 << 20))
    (group / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {64 << 20}\n")
    assert free_memory(proc, tmp_path / "cgroup") == 64 << 20


def test_a_reference_that_is_damaged_is_computed_again_and_not_trusted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "r.safetensors"
    kept.write_bytes(b"half of")
    asked: list[Path] = []
    monkeypatch.setattr("paceline.launch.reference._compute", lambda settings, path, *rest: asked.append(path))
    with pytest.raises(TargetError, match="cannot be read"):
        find_reference([kept], TEXTS, "w", lambda: (kept, {}), 60)
    assert asked == [kept]
    assert "it is computed again" in caplog.text
