"""Trainer ranks as one job: all are awaited, the first failure ends them, and is the first that the message shows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.errors import TrainerFailedError
from paceline.launch.failures import describe_failure, read_failure
from paceline.launch.workers import Worker, Workers

FAILING = """
import sys, time
from pathlib import Path
from paceline.errors import DataError, TargetError
from paceline.launch.failures import failures_reported
with failures_reported(Path(sys.argv[1])):
    {body}
"""


class Process:
    """A real process with the interface of `Child`, running a few lines of Python or shell."""

    def __init__(self, name: str, *command: str) -> None:
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def ask_to_end(self) -> None:
        if self.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        if self.poll() is None:
            self._process.kill()


class Job:
    """Ranks of a test, each with a log and a place for its failure."""

    def __init__(self, directory: Path, grace_s: float = 5.0, stragglers_s: float = 60.0) -> None:
        self.directory = directory
        self.workers = Workers(grace_s, stragglers_s)
        self.processes: list[Process] = []

    def shell(self, script: str) -> Process:
        """A rank that writes no failure."""
        return self._add("sh", "-c", script)

    def failing(self, body: str, *words: str) -> Process:
        """A rank that runs `body` with `words` as sys.argv[2:]; an error in it is reported as a trainer's is."""
        failure_file = str(self._failure_file(len(self.processes)))
        return self._add(sys.executable, "-c", FAILING.format(body=body), failure_file, *words)

    def run(self, timeout_s: float = 30.0) -> int:
        deadline = time.monotonic() + timeout_s
        while not self.workers.look():
            assert time.monotonic() < deadline, "the job goes on and on"
            time.sleep(0.01)
        return self.workers.result()

    def log(self, rank: int) -> Path:
        return self.directory / f"trainer-{rank}.log"

    def _failure_file(self, rank: int) -> Path:
        return self.directory / f"trainer-{rank}.failure.json"

    def _add(self, *command: str) -> Process:
        rank = len(self.processes)
        process = Process(f"trainer-{rank}", *command)
        self.processes.append(process)
        self.log(rank).write_text(f"rank {rank} has begun\n")
        self.workers.add(Worker(process, self.log(rank), self._failure_file(rank)))  # type: ignore[arg-type]
        return process


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    for process in job.processes:
        process.kill()


def test_a_job_ends_when_all_its_ranks_have(job: Job) -> None:
    job.shell("exit 0")
    job.shell("sleep 0.5")
    started = time.monotonic()
    assert job.run() == 0
    assert time.monotonic() - started > 0.4


def test_a_killed_rank_is_named_and_the_others_are_ended(job: Job) -> None:
    job.shell("exec sleep 100")
    victim = job.shell("exec sleep 100")
    assert not job.workers.look()
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(TrainerFailedError) as caught:
        job.run(10)
    assert str(caught.value).startswith("trainer-1 failed first: killed by signal 9; the last lines of ")
    assert "| rank 1 has begun" in str(caught.value)
    assert "trainer-0" not in str(caught.value), "it ended as it was told to"


def test_the_rank_that_failed_is_shown_before_those_that_noticed_first(job: Job) -> None:
    lost = "raise RuntimeError('[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1')"
    job.failing(lost)
    job.failing("time.sleep(1); raise DataError('line 7 is broken')")
    with pytest.raises(TrainerFailedError) as caught:
        job.run()
    first, second = str(caught.value).splitlines()
    assert first == "trainer-1 failed first: line 7 is broken"
    assert second.startswith("trainer-0 after it: RuntimeError: [gloo/transport")
    assert "Traceback" in job.log(0).read_text(), "nothing is lost: it stands in the log of its rank"
    assert "line 7 is broken" in job.log(1).read_text()


def test_a_killed_rank_is_shown_before_those_that_lost_it(job: Job) -> None:
    job.failing("time.sleep(0.2); raise RuntimeError('Connection reset by peer')")
    job.shell("sleep 1.5; kill -9 $$")
    with pytest.raises(TrainerFailedError, match=r"^trainer-1 failed first: killed by signal 9"):
        job.run()


def test_of_two_errors_the_earlier_is_shown_first_with_its_traceback(job: Job) -> None:
    job.failing("time.sleep(0.6); raise ValueError('late')")
    job.failing("raise KeyError('early')")
    with pytest.raises(TrainerFailedError) as caught:
        job.run()
    text = str(caught.value)
    assert text.startswith("trainer-1 failed first: Traceback (most recent call last)")
    assert text.index("KeyError: 'early'") < text.index("trainer-0 after it: ValueError: late")


def test_a_rank_that_ignores_its_end_is_killed_at_the_deadline(tmp_path: Path) -> None:
    job = Job(tmp_path, grace_s=1.0)
    stubborn = job.shell("trap '' TERM; while :; do sleep 0.1; done")
    job.shell("exit 3")
    started = time.monotonic()
    with pytest.raises(TrainerFailedError, match=r"^trainer-1 failed first: exit code 3"):
        job.run(15)
    assert 3.0 <= time.monotonic() - started < 8.0
    assert stubborn.poll() == -signal.SIGKILL
    assert job.workers.num_killed == 1


def test_a_rank_that_others_waited_for_in_vain_is_named_with_its_log(tmp_path: Path) -> None:
    job = Job(tmp_path, grace_s=1.0)
    job.failing("raise RuntimeError('[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 10000ms')")
    hanging = job.shell("exec sleep 100")
    os.kill(hanging.pid, signal.SIGSTOP)
    with pytest.raises(TrainerFailedError) as caught:
        job.run(15)
    text = str(caught.value)
    assert text.startswith("trainer-0 failed first: Traceback")
    assert "trainer-1 had to be killed, and may be the one that others waited for" in text
    assert "| rank 1 has begun" in text


def test_ranks_that_waited_too_long_name_the_setting(job: Job) -> None:
    job.failing("raise RuntimeError('Application timeout caused pair closure')")
    job.failing("time.sleep(0.5); raise RuntimeError('Connection closed by peer')")
    with pytest.raises(TrainerFailedError, match=r"training\.dist_timeout_s says: raise it") as caught:
        job.run()
    assert str(caught.value).startswith("trainer-0 failed first: Traceback")


def test_a_rank_that_somebody_else_asked_to_end_is_named(job: Job) -> None:
    job.shell("sleep 0.5")
    job.shell("exit 143")
    with pytest.raises(TrainerFailedError, match=r"^trainer-1 failed first: SIGTERM from elsewhere asked it to end"):
        job.run()


def test_a_rank_that_is_left_behind_by_the_others_does_not_run_for_ever(tmp_path: Path) -> None:
    job = Job(tmp_path, stragglers_s=1.0)
    job.shell("exit 0")
    job.shell("exec sleep 100")
    with pytest.raises(TrainerFailedError, match=r"trainer-1 still ran 1 s \(training.dist_timeout_s\)"):
        job.run(10)


def test_an_end_that_was_asked_for_is_no_failure(job: Job) -> None:
    job.shell("trap 'exit 143' TERM; while :; do sleep 0.05; done")
    job.shell("trap 'exit 143' TERM; while :; do sleep 0.05; done")
    time.sleep(0.3)
    job.workers.ask_to_end()
    assert job.run(5) == 143


def ends_by(job: Job, error: str) -> None:
    """Run a rank that raises `error` when it is asked to end, and ask it."""
    up = job.directory / "up"
    job.failing(
        "import signal; signal.signal(15, lambda *_: exec('raise ' + sys.argv[2]));"
        f" Path({str(up)!r}).touch(); time.sleep(20)",
        error,
    )
    while not up.exists():
        time.sleep(0.01)
    job.workers.ask_to_end()


def test_a_real_error_while_ending_is_told(job: Job) -> None:
    ends_by(job, "TargetError('disk full')")
    with pytest.raises(TrainerFailedError, match="disk full"):
        job.run()


def test_a_peer_lost_while_ending_is_no_news(job: Job) -> None:
    ends_by(job, "RuntimeError('Connection closed by peer')")
    assert job.run() == 1
    assert "closed by peer" in job.log(0).read_text()


def test_a_single_trainer_says_what_it_would_say_without_a_parent(job: Job) -> None:
    job.failing("error = DataError('line 7 is broken'); error.add_note('in row 3'); raise error")
    with pytest.raises(TrainerFailedError) as caught:
        job.run()
    assert str(caught.value) == "line 7 is broken"
    assert caught.value.__notes__ == ["in row 3"]


def test_all_that_is_left_is_ended_when_the_job_is(job: Job) -> None:
    one, two = job.shell("exec sleep 100"), job.shell("exec sleep 100")
    job.workers.end_all()
    assert [one.poll(), two.poll()] == [-signal.SIGTERM] * 2


def test_a_failure_file_that_is_cut_off_is_no_failure(tmp_path: Path) -> None:
    path = tmp_path / "failure.json"
    assert read_failure(path) is None
    path.write_text('{"time": 1.0, "mess')
    assert read_failure(path) is None
    path.write_text("[]")
    assert read_failure(path) is None


def test_an_error_raised_for_a_lost_peer_follows_from_another() -> None:
    error = ValueError("cannot go on")
    assert not describe_failure(error).follows
    error.__cause__ = RuntimeError("Connection closed by peer [127.0.0.1]:22")
    assert describe_failure(error).follows
