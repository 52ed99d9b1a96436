"""A `prepare` that was killed leaves nothing for good, and takes nothing from one that lives"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path

import pytest
import tomli_w

from forking import Commands
from paceline.config.run_dir import RunDir
from paceline.data.publishing import publish_directory
from paceline.launch.prepare import prepare_data
from paceline.launch.target_facts import read_checkpoint_facts
from whole_run import conversation, run_config, run_table, write_data, write_lines


def hidden(cache: Path) -> set[str]:
    """Names of what is not published."""
    return {path.name for path in cache.iterdir() if path.name.startswith(".")}


def children(parent: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.add(int(stat.parent.name))
    return found


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_next_prepare_removes_what_a_killed_one_left(
    commands: Commands, tiny_target: Path, tmp_path: Path, num_workers: int
) -> None:
    data, cache = write_data(tmp_path / "data"), tmp_path / "data/prepared"
    write_lines(data / "train.jsonl", (conversation(index) for index in range(400)))
    changes = {"data__num_workers": num_workers}
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(run_table(tmp_path / "killed", tiny_target, data, **changes)))
    killed = commands.start("faults:hang_while_tokenizing", "prepare", str(file))
    assert killed.wait_until(lambda: killed.output.count("tokenizing in") == num_workers), killed.output
    workers = {int(pid) for pid in re.findall(r"tokenizing in (\d+)", killed.output)} - {killed.pid}
    assert len(workers) == (num_workers if num_workers > 1 else 0)
    left_alone = children(killed.pid)  # the workers, and the process they talk through
    assert workers <= left_alone
    (unfinished,) = (name for name in hidden(cache) if not name.endswith(".owner"))

    config = run_config(tmp_path / "run", tiny_target, data)
    run, facts = RunDir(tmp_path / "run"), read_checkpoint_facts(config)
    try:
        prepared = prepare_data(config, run, facts)
        assert len(prepared.train) == 400
        assert hidden(cache) == {unfinished, f"{unfinished}.owner"}, "what a living process writes stays"
        assert (cache / unfinished / "scratch-train").is_dir()

        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
        assert hidden(cache) == {unfinished, f"{unfinished}.owner"}, "the premise: it could not clean up"
        # Its workers, if it had any, live on and hold nothing.
        assert all(Path(f"/proc/{pid}").exists() for pid in left_alone)
        assert prepare_data(config, run, facts).directory == prepared.directory
        assert hidden(cache) == set()
    finally:
        for pid in left_alone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_one_process_writes_two_directories_at_a_time_and_leaves_neither_behind(tmp_path: Path) -> None:
    def write(work: Path) -> None:
        (work / "file").write_text("whole")
        publish_directory(tmp_path / "inner", lambda inner: (inner / "file").write_text("whole"))  # type: ignore[arg-type, return-value]
        assert (work / "file").exists(), "a process is not dead to itself"

    publish_directory(tmp_path / "outer", write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inner", "outer"]
    assert (tmp_path / "outer/file").read_text() == (tmp_path / "inner/file").read_text() == "whole"


def test_only_directories_with_an_owner_are_ever_removed(tmp_path: Path) -> None:
    (tmp_path / ".mine").mkdir()
    (tmp_path / ".gone-1").mkdir()
    (tmp_path / ".gone-1.owner").touch()
    (tmp_path / ".gone-2.owner").touch()
    publish_directory(tmp_path / "new", lambda work: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "new"]
