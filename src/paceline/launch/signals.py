"""SIGINT and SIGTERM: an orderly end is asked for, and a hard one is kept ready for the deadline.

The signals are blocked in every thread and taken by one thread in `sigwait`: a Python signal handler runs only between
two bytecodes of the main thread, which may sit in a kernel or a collective for minutes. (A call that keeps the
interpreter lock for long holds up this thread as well; torch, NCCL, sleeps and file access release it.)

Imports no torch: threads started by libraries inherit the mask only if they start after it was set.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM})


class StopSignals:
    """Takes SIGINT and SIGTERM for the whole process. One per process, made before anything starts a thread.

    consumes: signals      waits for: the next one
    unblocked by: nothing; the thread ends with the process

    The first signal sets `stop`, calls what `on_stop` registered and starts the deadline; at the deadline the process
    ends by `os._exit(128 + signal number)`. SIGINT after that ends it at once; SIGTERM changes nothing.
    """

    def __init__(self, grace_s: float = 8.0) -> None:
        """Block the signals in this thread and take them from now on; call from the main thread.

        Args:
            grace_s: seconds from the first signal to the hard end.
        """
        self.stop = threading.Event()
        """Set by the first signal; long work looks at it between its steps."""
        self._grace_s = grace_s
        self._signum: int | None = None
        self._asked_at = 0.0
        self._callbacks: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        for signum in STOP_SIGNALS:
            # for threads in which somebody lifts the mask, as multiprocessing's resource tracker does
            signal.signal(signum, self._on_delivered)
        # children forked without exec (multiprocessing) start with the mask cleared and the default actions
        os.register_at_fork(after_in_child=restore_default_signals)
        self._thread = threading.Thread(target=self._take_signals, name="signals", daemon=True)
        self._thread.start()

    @property
    def signum(self) -> int | None:
        """The first signal that came, or None."""
        return self._signum

    @property
    def exit_code(self) -> int:
        """128 + signal number after a signal, else 0: what the process should end with."""
        return 0 if self._signum is None else 128 + self._signum

    @property
    def grace_s(self) -> float:
        """Seconds from the first signal to the hard end; may be set at any time, also after the signal."""
        return self._grace_s

    @grace_s.setter
    def grace_s(self, grace_s: float) -> None:
        with self._changed:
            self._grace_s = grace_s
            self._changed.notify_all()

    def on_stop(self, call: Callable[[], None]) -> None:
        """Have `call` called once, on a thread of its own, when the first signal comes; at once if it has come.

        For unblocking waits, e.g. `stream.close`. An error in it is printed and changes nothing.
        """
        with self._changed:
            if self._signum is None:
                self._callbacks.append(call)
                return
        call()

    def _take_signals(self) -> None:
        while True:
            self._handle(signal.sigwait(STOP_SIGNALS))

    def _on_delivered(self, signum: int, _frame: FrameType | None) -> None:
        """Pass a signal that the main thread got on to the thread that waits for it; takes no lock."""
        if self._thread.ident is not None:
            signal.pthread_kill(self._thread.ident, signum)

    def _handle(self, signum: int) -> None:
        with self._changed:
            first = self._signum is None
            if first:
                self._signum = signum
                self._asked_at = time.monotonic()
            callbacks, self._callbacks = self._callbacks, []
        if not first:
            if signum == signal.SIGINT:
                self._end_now(signum, "interrupted again, ending now")
            return
        # the deadline first: nothing that is called below can keep it from coming
        threading.Thread(target=self._keep_deadline, name="signal deadline", daemon=True).start()
        self.stop.set()
        for number, call in enumerate(callbacks):
            threading.Thread(target=call, name=f"on stop {number}", daemon=True).start()

    def _keep_deadline(self) -> None:
        with self._changed:
            while (left_s := self._asked_at + self._grace_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
        assert self._signum is not None
        name = signal.Signals(self._signum).name
        self._end_now(
            self._signum, f"still busy {self._grace_s:g} s after {name}, ending now (training.shutdown_grace_s)"
        )

    def _end_now(self, signum: int, why: str) -> None:
        with contextlib.suppress(OSError):  # stderr may be a closed pipe
            os.write(2, f"paceline: {why}\n".encode())
        os._exit(128 + signum)


def catch_stop_signals(grace_s: float = 8.0) -> StopSignals:
    """Take SIGINT and SIGTERM for this process: the first thing a command does, before it imports torch."""
    return StopSignals(grace_s)


def restore_default_signals() -> None:
    """Give this process the signals' default actions and lift the mask: for a child before it does its work.

    May be the `preexec_fn` of a Popen in a process without other threads; otherwise use `signals_for_children`.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextlib.contextmanager
def signals_for_children() -> Iterator[None]:
    """A block in which children are started that can be interrupted and terminated.

    A child inherits the mask of the thread that starts it, and gets the default actions by itself when it executes its
    program. A signal that arrives in the block reaches this process all the same, through its handlers.
    """
    previous = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
