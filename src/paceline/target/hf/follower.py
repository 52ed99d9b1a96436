"""A follower: rank k of a tensor-parallel target, a child process of rank 0 (`python -m paceline.target.hf.follower`).

Its standard input is a pipe from rank 0: the set-up as one line of JSON, then rows. The pipe's closing ends the
process at once, wherever it is. Standard output is a pipe to rank 0: a line of JSON each time something is known;
standard error is its log.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, BinaryIO

from paceline.target.hf.handed_rows import HandedRow, read_row

logger = logging.getLogger("paceline.target.hf.follower")  # __name__ is "__main__" here

_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM})
_GRACE_S = 8.0
"""Rank 0 decides when a follower ends. One that is asked to end by somebody else waits this long for it."""


def main() -> None:
    """Follow rank 0 until it closes the pipe, and end by `os._exit`: no thread or library may hold this process up."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # before torch starts threads, which inherit it
    threading.Thread(target=_take_signals, name="signals", daemon=True).start()
    orders, answers = _take_pipes()
    line = orders.readline()
    if not line:  # rank 0 ended before it had said anything
        os._exit(0)
    setup: dict[str, Any] = json.loads(line)
    logging.basicConfig(level=setup["log_level"], format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # Holds two rows at most: rank 0 hands out none before it is done with the one before the last.
    rows: queue.SimpleQueue[HandedRow | None] = queue.SimpleQueue()
    directory = Path(setup["directory"])
    threading.Thread(target=_read_rows, args=(orders, rows, directory), name="rows", daemon=True).start()
    try:
        _follow(setup, rows, answers)
    except BaseException as error:  # whatever it is, rank 0 must hear of it: it may be waiting for this rank
        traceback.print_exc()
        sys.stderr.flush()
        _tell(answers, {"state": "failed", "error": type(error).__name__, "message": str(error)})
        os._exit(1)
    sys.stderr.flush()
    os._exit(0)


def _follow(setup: dict[str, Any], rows: queue.SimpleQueue[HandedRow | None], answers: BinaryIO) -> None:
    import torch

    from paceline.config.target import TargetConfig
    from paceline.target.hf.loaded import load_target
    from paceline.target.hf.parallel import join_group, rank_environment

    config = TargetConfig.model_validate(setup["target"])
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device, size = torch.device(setup["device"]), config.tensor_parallel
    logger.info("rank %d of %d on %s, %d threads", setup["rank"], size, device, torch.get_num_threads())
    _tell(answers, {"state": "started"})
    with rank_environment(device):
        join_group(setup["rank"], size, Path(setup["directory"]), device)
        target = load_target(config, Path(config.model), device)
    _tell(answers, {"state": "ready", "layout": target.layout})
    next_number = 0
    while (row := rows.get()) is not None:
        if row.number != next_number:
            raise RuntimeError(f"row {row.number} came where row {next_number} was expected")
        next_number += 1
        target.capture(row.request(target.info.num_position_axes), row.spec())


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Both pipes, out of reach of libraries that print and of children of this process."""
    orders, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return os.fdopen(orders, "rb"), os.fdopen(answers, "wb", buffering=0)


def _read_rows(orders: BinaryIO, rows: queue.SimpleQueue[HandedRow | None], directory: Path) -> None:
    # Reads on after the last row: rank 0 may go while this rank is inside a collective with it.
    try:
        while True:
            rows.put(read_row(orders))
    except (EOFError, OSError):
        shutil.rmtree(directory, ignore_errors=True)
        os._exit(0)


def _tell(answers: BinaryIO, facts: dict[str, Any]) -> None:
    try:
        answers.write(json.dumps(facts).encode() + b"\n")
    except OSError:  # rank 0 is gone
        os._exit(0)


def _take_signals() -> None:
    while signal.sigwait(_SIGNALS) != signal.SIGTERM:  # SIGINT goes to a terminal's whole group: rank 0 has it too
        pass
    time.sleep(_GRACE_S)
    os.write(2, b"ended by SIGTERM, rank 0 lives on\n")
    os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
