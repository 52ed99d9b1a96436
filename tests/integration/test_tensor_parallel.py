"""The hf engine over two processes: the features of one, and an end in bounded time whichever process dies"""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from paceline.config.target import TargetConfig
from paceline.errors import ConfigError, EngineLostError, OutOfMemoryError, PacelineError, StoppedError
from paceline.schema.features import FeatureSpec
from paceline.target.hf.engine import HFEngine
from tiny import save_tiny_target, tiny_request

EVERYTHING = FeatureSpec(layers=(0, 2, 3), final_hidden="all", greedy=True, logsumexp=True)
BOUND_S = 20.0
"""Far more than an orderly end takes, far less than any time-out of a collective."""


def start(path: Path, size: int = 2, num_threads: int | None = None) -> HFEngine:
    config = TargetConfig(
        model=str(path), device="cpu", vocab_chunk_tokens=7, tensor_parallel=size, num_threads=num_threads
    )
    return HFEngine(config)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float = BOUND_S) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_a_killed_follower_fails_every_row_in_bounded_time(tiny_target: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="paceline"):
        engine = start(tiny_target, num_threads=3)
    told: list[PacelineError] = []
    engine.on_lost(told.append)
    futures = [engine.capture(tiny_request((500,) * 16, seed=seed), EVERYTHING) for seed in range(30)]
    assert futures[0].result(60).finite
    os.kill(engine.follower_pids[0], signal.SIGKILL)
    failures = [error for future in futures if (error := future.exception(BOUND_S)) is not None]
    assert failures, "the premise: rows were left when the follower died"
    for error in [*failures, engine.capture(tiny_request((3,)), EVERYTHING).exception(1)]:
        assert isinstance(error, EngineLostError)
        assert error.retryable
        assert "rank 1 of 2 of the target was ended by SIGKILL" in str(error)
        assert "rank 1 of 2 on cpu, 3 threads" in str(error), "its last log lines, and its own number of threads"
    assert wait_until(lambda: len(told) == 1)
    late: list[PacelineError] = []
    engine.on_lost(late.append)
    assert late == told
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < BOUND_S
    assert not engine._followers.directory.exists()


def test_a_row_that_runs_out_of_memory_says_so_and_ends_the_others(tiny_target: Path):
    engine = start(tiny_target)

    def fill_memory(module, args, output):
        return torch.empty(1 << 60, dtype=torch.uint8)  # a real failure of the allocator, on rank 0 alone

    engine._loaded.parts.layers[1].register_forward_hook(fill_memory)
    futures = [engine.capture(tiny_request((5,), seed=seed), EVERYTHING) for seed in range(3)]
    errors = [future.exception(BOUND_S) for future in futures]
    assert isinstance(errors[0], OutOfMemoryError)
    assert "data.row_tokens" in str(errors[0])
    assert all(isinstance(error, EngineLostError) and "row 0 failed on rank 0" in str(error) for error in errors[1:])
    assert wait_until(lambda: not is_running(engine.follower_pids[0]))
    engine.close()


def children() -> set[int]:
    """Processes that the main thread has started."""
    return {int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()}


def test_a_follower_that_dies_while_it_loads_is_reported_and_not_waited_for(tiny_target: Path):
    before = children()

    def kill_it() -> None:
        assert wait_until(lambda: children() > before)
        time.sleep(1.0)  # it imports torch now
        os.kill((children() - before).pop(), signal.SIGKILL)

    killer = threading.Thread(target=kill_it)
    killer.start()
    with pytest.raises(EngineLostError, match="rank 1 of 2 of the target was ended by SIGKILL"):
        start(tiny_target)
    killer.join()
    assert children() == before


SERVER = """
    import sys
    sys.path.insert(0, sys.argv[2])
    from paceline.config.target import TargetConfig
    from paceline.schema.features import FeatureSpec
    from paceline.target.hf.engine import HFEngine
    from tiny import tiny_request

    engine = HFEngine(TargetConfig(model=sys.argv[1], device="cpu", tensor_parallel=2))
    print(*engine.follower_pids, engine._followers.directory, flush=True)
    while True:
        engine.capture(tiny_request((500,) * 16), FeatureSpec((0,), greedy=True)).result()
"""


@contextlib.contextmanager
def busy_server(target: Path) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    """Rank 0 in a process of its own, always in the middle of a row; its follower, and where they met."""
    command = [sys.executable, "-c", textwrap.dedent(SERVER), str(target), str(Path(__file__).parents[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as rank_0:
        try:
            assert rank_0.stdout is not None
            follower, directory = rank_0.stdout.readline().split()
            yield rank_0, int(follower), Path(directory)
        finally:
            rank_0.kill()


def test_followers_end_with_a_rank_0_that_is_killed_in_the_middle_of_a_row(tiny_target: Path):
    with busy_server(tiny_target) as (rank_0, follower, directory):
        assert is_running(follower)
        assert directory.stat().st_mode & 0o777 == 0o700
        rank_0.kill()
        assert wait_until(lambda: not is_running(follower), 10.0)
        assert not directory.exists()


@pytest.mark.long
def test_a_follower_that_is_asked_to_end_while_rank_0_hangs_does(tiny_target: Path):
    with busy_server(tiny_target) as (rank_0, follower, directory):
        rank_0.send_signal(signal.SIGSTOP)
        os.kill(follower, signal.SIGTERM)
        time.sleep(1.0)
        assert is_running(follower), "rank 0 decides, as long as it can"
        assert wait_until(lambda: not is_running(follower), 9.0)
    shutil.rmtree(directory)  # rank 0 clears it away, or followers after it: here neither could


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_target(tmp_path_factory.mktemp("target"), "llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def pair(llama: Path) -> Iterator[HFEngine]:
    """Two processes; one such engine fits into a process, so what ends its own comes before, in this file."""
    engine = start(llama)
    yield engine
    engine.close()


def test_features_and_facts_equal_those_of_one_process(pair: HFEngine, llama: Path):
    alone = start(llama, size=1)
    assert pair.info() == alone.info()
    for lengths in ((9, 1, 30), (1,), (200, 300)):
        request = tiny_request(lengths, seed=len(lengths))
        one = alone.capture(request, EVERYTHING).result(30)
        two = pair.capture(request, EVERYTHING).result(30)
        assert torch.equal(one.greedy, two.greedy)
        for name in ("hidden", "final_hidden", "logsumexp"):
            torch.testing.assert_close(getattr(two, name), getattr(one, name), rtol=1e-5, atol=1e-5)
    alone.close()


def test_repeats_are_bit_equal_whatever_is_asked_for_between(pair: HFEngine):
    request = tiny_request((40, 3, 77), seed=1)
    first = pair.capture(request, EVERYTHING).result(30)
    others = [FeatureSpec((1,)), FeatureSpec((), final_hidden="all"), FeatureSpec((0, 1), logsumexp=True)]
    between = [pair.capture(tiny_request((11, 5), seed=seed), spec) for seed, spec in enumerate(others)]
    again = pair.capture(request, EVERYTHING).result(30)
    assert all(future.result(30).finite for future in between)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name


def test_decoding_with_one_rank_alone_is_refused(pair: HFEngine):
    with pytest.raises(ConfigError, match=r"target\.tensor_parallel = 2.*target\.tensor_parallel = 1"):
        pair.model  # noqa: B018


def test_a_second_parallel_target_in_the_process_is_refused(pair: HFEngine, llama: Path):
    with pytest.raises(ConfigError, match="rank 0 of another group of 2"):
        start(llama)
    assert pair.capture(tiny_request((5,)), EVERYTHING).result(30).finite


def test_a_follower_leaves_signals_to_its_parent_and_close_leaves_no_process(pair: HFEngine):
    follower = pair.follower_pids[0]
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        os.kill(follower, signum)
    time.sleep(0.2)
    assert pair.capture(tiny_request((5,)), EVERYTHING).result(30).finite
    assert is_running(follower)
    began = time.monotonic()
    futures = [pair.capture(tiny_request((300,) * 8, seed=seed), EVERYTHING) for seed in range(10)]
    pair.close()
    assert time.monotonic() - began < 10.0
    assert not is_running(follower)
    failures = [error for future in futures if (error := future.exception(0)) is not None]
    assert failures  # ten large rows do not fit into the time it takes to close
    assert all(isinstance(error, StoppedError) for error in failures)
