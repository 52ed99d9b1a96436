"""Faults that a child of `forking` has before it runs its command: `Commands.start("faults:NAME", "train", ...)`."""

from __future__ import annotations

import os
import resource
import signal
import time
from typing import Any

from paceline.data.samples import SampleTokenizer
from paceline.drafts.dflash.algorithm import DFlash
from paceline.drafts.interface import LossTerms
from paceline.schema.features import FeatureRow, FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.target.hf.capture import RowCapture
from paceline.training import checkpoint_files


def break_loss() -> None:
    """A DFlash draft's loss of row 3 is a bug."""
    compute = DFlash.loss

    def loss(self: DFlash, row: FeatureRow) -> LossTerms:
        if row.row.position == 3:
            raise ZeroDivisionError("the loss is broken")
        return compute(self, row)

    DFlash.loss = loss  # type: ignore[method-assign]


def break_engine() -> None:
    """The engine's row 3 is a bug, on the engine's own thread."""
    compute = RowCapture.__call__

    def capture(self: RowCapture, request: RowRequest, spec: FeatureSpec) -> Any:
        if request.position == 3 and request.spec == "training":
            raise ZeroDivisionError("the engine is broken")
        return compute(self, request, spec)

    RowCapture.__call__ = capture  # type: ignore[method-assign]


def exhaust_memory() -> None:
    """The loss of row 3 asks for more memory than there is."""
    compute = DFlash.loss

    def loss(self: DFlash, row: FeatureRow) -> LossTerms:
        if row.row.position == 3:
            row.features.hidden.new_empty(1 << 60)
        return compute(self, row)

    DFlash.loss = loss  # type: ignore[method-assign]


def fill_disk() -> None:
    """No file grows beyond 20 kB, as on a full disk; the kernel does it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def fill_disk_later() -> None:
    """No file grows beyond 250 kB: enough for everything but features."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000))


def record_slowly() -> None:
    """Each row takes the engine long enough for a test to see what is on the disk meanwhile."""
    compute = RowCapture.__call__

    def capture(self: RowCapture, request: RowRequest, spec: FeatureSpec) -> Any:
        time.sleep(0.05)
        return compute(self, request, spec)

    RowCapture.__call__ = capture  # type: ignore[method-assign]


def hang_while_tokenizing() -> None:
    """Whoever tokenizes, the command or a worker of it, says its process id and goes no further."""

    def hang(*_: Any, **__: Any) -> None:
        print(f"tokenizing in {os.getpid()}", flush=True)
        time.sleep(600)

    SampleTokenizer.__call__ = hang  # type: ignore[method-assign, assignment]


def die_while_publishing() -> None:
    """Killed between writing the second checkpoint's files and renaming it into place."""
    publish, calls = checkpoint_files.publish, []

    def published(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        publish(*paths)

    checkpoint_files.publish = published
