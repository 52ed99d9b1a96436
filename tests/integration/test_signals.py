"""SIGINT and SIGTERM end a process in bounded time, whatever it is doing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

START = """
import os, sys, time
from paceline.launch.signals import catch_stop_signals, signals_for_children
assert "torch" not in sys.modules
signals = catch_stop_signals({grace_s})
"""
READY = "print('ready', flush=True)\n"
SLEEPS = START + READY + "while True: time.sleep(1000)\n"
# one C call of many seconds that gives up the interpreter lock
COMPUTES = START + READY + "import hashlib; hashlib.pbkdf2_hmac('sha256', b'a', b'b', 500_000_000)\n"
ENDS_IN_ORDER = START + READY + "signals.stop.wait(); print('saved', flush=True); sys.exit(signals.exit_code)\n"
POLLS = START + READY + "while not signals.stop.is_set(): sum(range(10_000))\nsys.exit(signals.exit_code)\n"
MULTIPLIES = (
    START
    + "import torch; torch.set_num_threads(2); a = torch.randn(600, 600)\n"
    + READY
    + "while True: a = torch.tanh(a @ a)\n"
)


def start(program: str, grace_s: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program.format(grace_s=grace_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def seconds_to_end(process: subprocess.Popen[str], timeout_s: float = 20.0) -> float:
    started = time.monotonic()
    try:
        process.wait(timeout_s)
    finally:
        process.kill()
    return time.monotonic() - started


@pytest.mark.parametrize("program", [SLEEPS, COMPUTES], ids=["sleeping", "in one long C call"])
def test_a_process_that_cannot_end_in_order_is_ended_at_the_deadline_every_time(program: str) -> None:
    for _ in range(5):
        process = start(program, grace_s=0.3)
        process.send_signal(signal.SIGTERM)
        assert 0.2 < seconds_to_end(process) < 3
        assert process.returncode == 128 + signal.SIGTERM
        assert process.stderr is not None
        assert "still busy 0.3 s after SIGTERM" in process.stderr.read()


def test_a_process_that_multiplies_matrices_is_ended_at_the_deadline() -> None:
    process = start(MULTIPLIES, grace_s=0.3)
    process.send_signal(signal.SIGTERM)
    assert seconds_to_end(process) < 5
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_an_orderly_end_is_over_before_the_deadline_and_tells_the_signal(signum: signal.Signals) -> None:
    process = start(ENDS_IN_ORDER, grace_s=15.0)
    process.send_signal(signum)
    assert seconds_to_end(process) < 5
    assert process.stdout is not None
    assert process.stdout.read() == "saved\n"
    assert process.returncode == 128 + signum


def test_a_long_loop_can_poll_for_the_stop() -> None:
    process = start(POLLS, grace_s=15.0)
    process.send_signal(signal.SIGTERM)
    assert seconds_to_end(process) < 5
    assert process.returncode == 128 + signal.SIGTERM


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    process = start(START + "signals.on_stop(lambda: print('asked', flush=True))\n" + READY + "time.sleep(1000)", 30.0)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "asked\n"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert seconds_to_end(process) < 3
    assert process.returncode == 128 + signal.SIGINT


def test_a_second_sigterm_does_not_cut_the_grace_short() -> None:
    process = start(SLEEPS, grace_s=1.0)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert 0.6 < seconds_to_end(process) < 4


def test_the_grace_can_be_set_after_the_signal() -> None:
    program = START + READY + "signals.stop.wait(); signals.grace_s = 0.2; time.sleep(1000)"
    process = start(program, grace_s=60.0)
    process.send_signal(signal.SIGTERM)
    assert seconds_to_end(process) < 3
    assert process.returncode == 128 + signal.SIGTERM


def test_a_callback_unblocks_a_wait_and_an_error_in_one_changes_nothing() -> None:
    program = START + (
        "import threading; waiting = threading.Event()\n"
        "signals.on_stop(lambda: 1 / 0); signals.on_stop(waiting.set)\n"
        + READY
        + "waiting.wait(); signals.on_stop(lambda: sys.exit(7))\n"
    )
    process = start(program, grace_s=15.0)
    process.send_signal(signal.SIGTERM)
    assert seconds_to_end(process) < 5
    assert process.returncode == 7  # registered after the signal: called at once, where it was registered


CHILD = "import time; print('child', flush=True); time.sleep(1000)"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_children_can_be_ended_by_signals(signum: signal.Signals) -> None:
    program = START + (
        "import subprocess\n"
        "with signals_for_children():\n"
        f"    child = subprocess.Popen([sys.executable, '-c', {CHILD!r}], stdout=subprocess.PIPE, stderr=2)\n"
        "assert child.stdout.readline() == b'child\\n'\n"
        f"child.send_signal({int(signum)})\n"
        "code = child.wait(5)\n" + READY + f"sys.exit(code != -{int(signum)})\n"
    )
    process = start(program, grace_s=30.0)
    seconds_to_end(process)
    assert process.returncode == 0


def test_a_child_started_outside_the_block_would_keep_the_mask() -> None:
    """The premise of the test above: children do inherit blocked signals."""
    program = START + (
        "import subprocess, signal\n"
        "ask = 'import signal; print(len(signal.pthread_sigmask(signal.SIG_BLOCK, [])))'\n"
        "blocked = subprocess.check_output([sys.executable, '-c', ask])\n"
        "with signals_for_children():\n"
        "    free = subprocess.check_output([sys.executable, '-c', ask])\n" + READY + "print(int(blocked), int(free))\n"
    )
    process = start(program, grace_s=30.0)
    seconds_to_end(process)
    assert process.stdout is not None
    assert process.stdout.read() == "2 0\n"


def test_a_pool_of_forked_workers_can_be_terminated() -> None:
    program = START + (
        "import multiprocessing\n"
        "pool = multiprocessing.get_context('fork').Pool(2)\n"
        "pool.apply_async(time.sleep, (1000,)); time.sleep(0.2)\n" + READY + "pool.terminate(); pool.join()\n"
    )
    process = start(program, grace_s=30.0)
    assert seconds_to_end(process, 10) < 5
    assert process.returncode == 0


def test_a_signal_that_the_main_thread_gets_is_passed_on() -> None:
    """Libraries lift the mask (multiprocessing's resource tracker does); the signal must not be lost."""
    program = START + (
        "import signal\nsignal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT])\n"
        + READY
        + "signals.stop.wait(); sys.exit(signals.exit_code)\n"
    )
    for signum in (signal.SIGTERM, signal.SIGINT):
        process = start(program, grace_s=15.0)
        process.send_signal(signum)
        assert seconds_to_end(process) < 5
        assert process.returncode == 128 + signum
