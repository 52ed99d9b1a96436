"""The self-test's reference: computed once on a host, where there is memory for it, and nothing partial is kept."""

from __future__ import annotations

import fcntl
import logging
import math
import os
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
from paceline.launch.reference_place import find_place
from paceline.launch.selftest import SelfTest, prepare_selftest
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.target.hf.fingerprint import fingerprint_weights
from paceline.target.hf.stored_tensors import read_tensor_table
from paceline.target.selftest.reference import cache_path
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
    words = r"bfloat16 needs \d GB for the self-test's reference, 0 GB are free .*--save-reference.*selftest_reference"
    with pytest.raises(TargetError, match=words):
        prepare_selftest(config)
    assert not cache.exists(), "nothing was begun"


BF16, FP32 = {"dtype": "bfloat16"}, {"dtype": "float32"}


@pytest.mark.parametrize(
    ("free", "host", "changes", "expected"),
    [
        ((9.0, 9.0), 9.0, BF16 | {"tensor_parallel": 2}, ("cuda:0", "float32", 0)),
        ((3.0, 3.0), 9.0, BF16 | {"tensor_parallel": 2}, ("cuda:0", "float32", 2)),
        (
            (3.0, 3.0),
            9.0,
            BF16 | {"engine": "vllm", "engine_args": {"tensor-parallel-size": 2}},
            ("cuda:0", "float32", 2),
        ),
        ((3.0, 3.0), 9.0, BF16 | {"engine": "sglang", "tensor_parallel": 2}, ("cuda:0", "float32", 2)),
        ((3.0, 3.0), 9.0, BF16, ("cuda:0", "bfloat16", 0)),
        ((3.0, 3.0), 9.0, BF16 | {"tensor_parallel": 2, "device": "cuda:1"}, ("cuda:1", "bfloat16", 0)),
        ((1.5, 1.5), 9.0, BF16 | {"tensor_parallel": 2}, ("cuda:0", "bfloat16", 2)),
        ((1.5, 1.5), 9.0, FP32 | {"tensor_parallel": 2}, ("cpu", "float32", 0)),
        ((1.0, 1.0), 9.0, BF16 | {"tensor_parallel": 2}, ("cpu", "float32", 0)),
        ((1.0, 1.0), 3.0, BF16 | {"tensor_parallel": 2}, ("cpu", "bfloat16", 0)),
    ],
)
def test_a_reference_goes_where_there_is_room_float32_and_the_engines_own_gpus_first(
    free: tuple[float, float],
    host: float,
    changes: dict[str, Any],
    expected: tuple[str, str, int],
    tiny_target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sizes in bytes for each weight; a text takes none."""
    num_weights = sum(math.prod(tensor.shape) for tensor in read_tensor_table(tiny_target).values())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free[device.index] * num_weights), 0))
    monkeypatch.setattr("paceline.launch.reference_place.free_memory", lambda: int(host * num_weights))
    config = TargetConfig.model_validate({"model": str(tiny_target), "device": "cuda:0", **changes})
    place = find_place(tiny_target, config, 0)
    assert (str(place.device), place.dtype, len(place.spread)) == expected


def test_waiting_for_another_that_computes_it_ends_with_a_stop_or_in_time(tmp_path: Path) -> None:
    kept = tmp_path / "r.safetensors"
    settings = {"fingerprint": "w", "dtype": "float32", "device": "cpu"}
    with (tmp_path / "r.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stop = threading.Event()
        threading.Timer(0.3, stop.set).start()
        begin = time.monotonic()
        with pytest.raises(StoppedError):
            find_reference(kept, TEXTS, settings, 60, stop)
        assert 0.2 < time.monotonic() - begin < 5
        with pytest.raises(TargetError, match=r"for 0 s \(target.engine_start_timeout_s\) and holds .*r\.lock"):
            find_reference(kept, TEXTS, settings, 0.3)


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
        find_reference(kept, TEXTS, {"fingerprint": "w"}, 60)
    assert asked == [kept]
    assert "it is computed again" in caplog.text
