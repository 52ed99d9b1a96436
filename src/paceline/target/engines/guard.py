"""Runs a command in a process group of its own, and ends the group with the command or with whoever started this.

    python guard.py DESCRIPTOR DIRECTORY COMMAND...

DESCRIPTOR is the reading end of a pipe whose writing end the starter holds: it closes when the starter ends, whatever
ended it. DIRECTORY is removed then: a starter that was killed cannot. Only the standard library is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time

_GRACE_S = 5.0
_HURRIED_S = 1.5
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Exit with the command's code; 128 + n where signal n ended it."""
    descriptor, directory, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the pipe says when to end
    process = subprocess.Popen(  # noqa: S603  # the starter's command
        command,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        preexec_fn=_die_with_guard,  # noqa: PLW1509  # there are no threads yet
    )
    asked = threading.Thread(target=_end_with_starter, args=(descriptor, process.pid, directory), daemon=True)
    asked.start()
    code = process.wait()
    end_group(process.pid)
    if select.select([descriptor], [], [], 0)[0]:  # the starter has ended: its directory is being removed
        asked.join()
    sys.exit(code if code >= 0 else 128 - code)


def end_group(group: int) -> None:
    """End a process group whose leader has its number: in order if it can, and whoever is left by force."""
    for send, number, grace_s in (
        (os.kill, signal.SIGTERM, _GRACE_S),  # an engine that ends its workers itself leaves nothing behind
        (os.killpg, signal.SIGTERM, _HURRIED_S),
        (os.killpg, signal.SIGKILL, _HURRIED_S),
    ):
        with contextlib.suppress(ProcessLookupError):
            send(group, number)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            if not _is_there(group):
                return
            time.sleep(0.05)


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _end_with_starter(descriptor: int, group: int, directory: str) -> None:
    while os.read(descriptor, 1):
        pass
    end_group(group)
    shutil.rmtree(directory, ignore_errors=True)


def _die_with_guard() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the starter takes signals on a thread, blocked everywhere else
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
