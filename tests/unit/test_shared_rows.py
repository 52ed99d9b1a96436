"""Rows that an engine's process writes into: its side and ours, what comes late, and what is left."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from engine_processes import wait_for
from paceline.target.engines import shared_rows
from paceline.target.engines.interface import INSIDE, RowMemory
from paceline.target.engines.own_files import OwnFiles
from paceline.target.engines.shared_rows import SharedRows

Usage = namedtuple("Usage", "total used free")  # noqa: PYI024  # as shutil's
SHAPE = (10, 2, 4)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The engine's side as an engine imports it: from a folder, without paceline."""
    monkeypatch.syspath_prepend(str(INSIDE))
    import paceline_shared_rows

    monkeypatch.setattr(paceline_shared_rows, "_LOOK_EVERY_S", 0.05)
    yield paceline_shared_rows
    sys.modules.pop("paceline_shared_rows", None)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def files(directory: Path) -> Iterator[OwnFiles]:
    with contextlib.closing(OwnFiles(directory)) as files:
        yield files


@pytest.fixture
def rows(directory: Path, files: OwnFiles) -> Iterator[SharedRows]:
    with contextlib.closing(SharedRows(directory, files.prefix)) as rows:
        yield rows


@pytest.fixture
def engine(inside: ModuleType) -> object:
    return inside.SharedRows()


def reserve(rows: SharedRows, num_tokens: int = SHAPE[0]) -> RowMemory:
    return rows.reserve((num_tokens, *SHAPE[1:]), torch.float32, pinned=False)


def answer(directory: Path, files: OwnFiles, memory: RowMemory, start: int, end: int = SHAPE[0]) -> Path:
    """Of a request for the document from `start` to `end`, as vLLM would name it."""
    return directory / f"cmpl-{files.new_name(memory.place(start, end).label)}-0-1234abcd.safetensors"


def numbers(num_tokens: int, first: float = 0.0) -> torch.Tensor:
    return torch.arange(num_tokens * 8, dtype=torch.float32).view(num_tokens, *SHAPE[1:]) + first


def row_files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if "-row" in path.name)


def test_what_an_engine_puts_is_where_its_document_belongs(directory, files, rows, engine):
    memory = reserve(rows)
    memory.states.fill_(-1)
    assert engine.put(answer(directory, files, memory, 2), 0, numbers(3))
    assert engine.put(answer(directory, files, memory, 5), 2, numbers(1, 100))  # a chunk that begins at its token 2
    assert torch.equal(memory.place(2, 5).states, numbers(3))
    assert torch.equal(memory.states[7:8], numbers(1, 100))
    assert memory.states[[0, 1, 5, 6, 8, 9]].eq(-1).all()


def test_states_of_two_bytes_are_put_as_they_are(directory, files, rows, engine):
    memory = rows.reserve(SHAPE, torch.bfloat16, pinned=False)
    states = torch.randn(20, *SHAPE[1:]).bfloat16()[::2]
    assert engine.put(answer(directory, files, memory, 0), 0, states)
    assert torch.equal(memory.states, states)


def test_a_request_that_names_no_place_of_ours_is_for_a_file(directory, files, rows, engine, tmp_path):
    memory = reserve(rows)
    path = answer(directory, files, memory, 0)
    memory.states.fill_(-1)
    label = memory.label
    for name in (
        f"cmpl-{files.new_name()}-0-1234abcd.safetensors",
        path.name.replace(label, "row77"),
        path.name.replace(files.prefix, "paceline-0123456789abcdef"),
        path.name.replace(files.prefix, "another"),
    ):
        assert not engine.put(directory / name, 0, numbers(3)), name
    assert not engine.put(path, 0, numbers(11)), "more than the row has"
    assert not engine.put(answer(directory, files, memory, 2, 5), 0, numbers(4)), "the next document's"
    assert not engine.put(answer(directory, files, memory, 2, 5), 2, numbers(2)), "the next document's"
    assert not engine.put(answer(directory, files, memory, 2, 5), 0, numbers(0)), "nothing"
    assert not engine.put(answer(directory, files, memory, 4000, 4005), 0, numbers(5)), "beyond its file"
    (directory / f"{files.prefix}-row99").symlink_to(directory / f"{files.prefix}-{label}")
    assert not engine.put(path.with_name(path.name.replace(label, "row99")), 0, numbers(3)), "a link"
    assert memory.states.eq(-1).all()


def test_memory_is_used_again_when_nothing_refers_to_it_and_under_another_name(directory, files, rows, engine):
    first = reserve(rows)
    late, address, states = answer(directory, files, first, 0), first.states.data_ptr(), first.states[3:4]
    del first
    gc.collect()
    other = reserve(rows)
    assert other.states.data_ptr() != address, "a part of it is in use"
    del states
    gc.collect()
    again = reserve(rows)
    assert again.states.data_ptr() == address
    again.states.fill_(-1)
    assert not engine.put(late, 0, numbers(3)), "of the row before"
    assert again.states.eq(-1).all()
    assert engine.put(answer(directory, files, again, 0), 0, numbers(3))
    assert torch.equal(again.states[:3], numbers(3))
    assert len(row_files(directory)) == 2


def test_no_row_gets_memory_that_is_being_written(directory, files, rows, engine, inside, monkeypatch):
    """For a row that was given up meanwhile."""
    begun, go = threading.Event(), threading.Event()
    copyto = np.copyto

    def slow(*given: object) -> None:
        begun.set()
        assert go.wait(30)
        copyto(*given)

    monkeypatch.setattr(inside.np, "copyto", slow)
    first = reserve(rows)
    address, path = first.states.data_ptr(), answer(directory, files, first, 0)
    with ThreadPoolExecutor() as pool:
        late = pool.submit(engine.put, path, 0, numbers(3))
        assert begun.wait(30)
        del first
        gc.collect()
        second = reserve(rows)
        assert second.states.data_ptr() != address
        second.states.fill_(-1)
        go.set()
        assert late.result(30)
    assert second.states.eq(-1).all()
    third = reserve(rows)
    assert third.states.data_ptr() == address, "once the writer is done"


def test_rows_that_are_given_up_at_any_moment_never_touch_others(directory, files, rows, engine):
    """Some thousand rows; of one in three the engine is late."""
    draw = random.Random(0)
    wrong: list[str] = []

    def row_of(number: int) -> None:
        memory = reserve(rows)
        paths = [answer(directory, files, memory, 5 * document) for document in range(2)]
        states = numbers(5, 1000.0 * number)
        if number % 3 == 0:
            laters.append(writers.submit(engine.put, paths[0], 0, states))
            return
        for document, path in enumerate(paths):
            if not writers.submit(engine.put, path, 0, states + document).result(30):
                wrong.append(f"row {number} has no place")
        time.sleep(draw.random() / 2000)
        if not torch.equal(memory.states, torch.cat([states, states + 1])):
            wrong.append(f"row {number} has other states")

    laters = []
    with ThreadPoolExecutor(4) as writers, ThreadPoolExecutor(6) as readers:
        list(readers.map(row_of, range(3000)))
    assert wrong == []
    assert len(laters) == 1000
    assert {later.result() for later in laters} == {True, False}, "the premise: some come too late"
    assert len(row_files(directory)) < 40


def test_memory_that_is_too_small_makes_way(directory, files, rows):
    reserve(rows, 10)
    large = reserve(rows, 4000)
    assert row_files(directory) == [f"{files.prefix}-{large.label}"]
    address = large.states.data_ptr()
    del large
    assert reserve(rows, 3000).states.data_ptr() == address
    assert reserve(rows, 0).states.shape == (0, 2, 4)


def test_half_of_what_is_free_is_left_to_others(directory, rows, monkeypatch, caplog):
    free = 100_000
    monkeypatch.setattr(shared_rows.shutil, "disk_usage", lambda path: Usage(free, 0, free))
    shared = reserve(rows, 1000)
    own = reserve(rows, 2000)
    assert (bool(shared.label), own.label) == (True, "")
    assert own.place(0, 5).label == ""
    assert own.states.shape == (2000, 2, 4)
    reserve(rows, 2000)
    assert caplog.text.count("has no room for rows") == 1
    assert row_files(directory) == [f"{rows._prefix}-{shared.label}"]
    address = shared.states.data_ptr()
    del shared
    gc.collect()
    assert reserve(rows, 1000).states.data_ptr() == address, "what is there is used all the same"
    free = 1_000_000
    assert reserve(rows, 2000).label, "there is room again"


def test_rows_are_shared_in_memory_alone(directory):
    assert shared_rows._is_memory(directory)
    assert not shared_rows._is_memory(Path("/proc"))
    assert reserve(SharedRows(Path("/proc"), "paceline-0")).label == ""


def test_a_file_that_somebody_has_removed_is_replaced(directory, files, rows, engine):
    reserve(rows)
    for name in row_files(directory):
        (directory / name).unlink()
    memory = reserve(rows)
    assert engine.put(answer(directory, files, memory, 0), 0, numbers(3))
    assert torch.equal(memory.states[:3], numbers(3))


def test_an_engine_that_cannot_map_a_row_writes_a_file_and_keeps_nothing_open(
    directory, files, rows, engine, inside, monkeypatch, caplog
):
    memory = reserve(rows)
    path = answer(directory, files, memory, 0)
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    for error in (OSError(12, "Cannot allocate memory"), ValueError("a bug")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(inside.mmap, "mmap", fail)
            assert not engine.put(path, 0, numbers(3))
    assert "a bug" in caplog.text
    assert len(list(Path("/proc/self/fd").iterdir())) == num_open
    assert engine.put(path, 0, numbers(3))


def test_a_client_that_ends_leaves_nothing_here_and_in_the_engine(directory, inside, engine):
    files = OwnFiles(directory)
    rows = SharedRows(directory, files.prefix)
    kept, given_back = reserve(rows), reserve(rows)
    for memory in (kept, given_back):
        assert engine.put(answer(directory, files, memory, 0), 0, numbers(3))
    assert engine.num_mapped() == 2
    del given_back, memory
    rows.close()
    rows.close()
    assert row_files(directory) == []
    assert torch.equal(kept.states[:3], numbers(3)), "whoever has it may read it"
    assert not engine.put(answer(directory, files, kept, 5), 0, numbers(3))
    assert wait_for(lambda: engine.num_mapped() == 0, 10)
    assert reserve(rows).label == ""
    files.close()


def test_a_client_that_is_killed_leaves_nothing_in_memory(directory, inside, engine):
    """Though no other client comes: the engine looks after it."""
    script = (
        "import sys, time, torch; from pathlib import Path; from paceline.target.engines.own_files import OwnFiles;"
        "from paceline.target.engines.shared_rows import SharedRows; directory = Path(sys.argv[1]);"
        "files = OwnFiles(directory); rows = SharedRows(directory, files.prefix);"
        "memory = [rows.reserve((10, 2, 4), torch.float32, False) for _ in range(3)];"
        "name = files.new_name(memory[1].place(0, 3).label); print(name, flush=True); time.sleep(600)"
    )
    client = subprocess.Popen(
        [sys.executable, "-c", script, str(directory)], env=os.environ, stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    try:
        name = client.stdout.readline().strip()
        assert engine.put(directory / f"{name}-0.0.safetensors", 0, numbers(3))
        time.sleep(0.3)
        assert (len(row_files(directory)), engine.num_mapped()) == (3, 1), "it lives"
        client.send_signal(signal.SIGKILL)
        client.wait()
        assert wait_for(lambda: not row_files(directory) and not engine.num_mapped(), 10)
        with contextlib.closing(OwnFiles(directory)) as files:
            rows = SharedRows(directory, files.prefix)
            memory = reserve(rows)
            assert engine.put(answer(directory, files, memory, 0), 0, numbers(3)), "the next client's"
            rows.close()
    finally:
        client.kill()
        client.wait()
        client.stdout.close()
