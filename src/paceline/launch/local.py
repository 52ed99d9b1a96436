"""`placement.target = "servers"`: servers and trainer as children of one process that computes nothing itself.

The supervisor starts them, keeps servers.json true, starts anew what died, and ends everything on any end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from paceline.client.server_list import write_servers
from paceline.config.loading import dump_config
from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.errors import TargetError
from paceline.launch.children import Child, describe_exit
from paceline.launch.plan import PlannedProcess, count_gpus, plan_processes
from paceline.launch.run import lock_run, open_run
from paceline.observe.logs import logging_for

if TYPE_CHECKING:
    from paceline.launch.signals import StopSignals

_LOOK_EVERY_S = 0.1
_SERVER_END_S = 6.0
"""Seconds servers get to end in order; they hold nothing that could be lost."""
_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 30.0
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Server:
    """One server over all its starts."""

    planned: PlannedProcess
    ready_file: Path
    child: Child
    started: float
    url: str | None = None
    """Known once it is ready."""
    was_ready: bool = False
    num_restarts: int = 0
    start_at: float | None = None
    """When it is to be started anew; None while it runs, or is given up."""
    given_up: bool = False


@dataclass(slots=True)
class _Supervised:
    """The processes of a run."""

    config: RunConfig
    paths: RunDir
    private: Path
    """0700: the token and the configuration handed to children; gone at the end."""
    token_file: Path
    words: Sequence[str]
    """The verb of the process that uses the servers, and options of its own."""
    servers: list[_Server] = field(default_factory=list)
    trainer: Child | None = None


def train_with_servers(config: RunConfig, signals: StopSignals, console: Console) -> int:
    """Run a training with servers of its own; the trainer's exit code.

    Raises:
        PacelineError: as `run_with_servers`.
    """
    return run_with_servers(config, signals, console, ["trainer"])


def run_with_servers(config: RunConfig, signals: StopSignals, console: Console, words: Sequence[str]) -> int:
    """Run a process that uses servers of its own; its exit code.

    Args:
        words: its verb ("trainer", "recorder"), and options that this verb has besides the configuration.

    Raises:
        TargetError: a server never became ready, or the last one died too often; shows its last log lines.
        PacelineError: the run directory or the devices cannot be used.
    """
    paths = RunDir(Path(config.run_dir))
    signals.grace_s = config.training.shutdown_grace_s + _SERVER_END_S + 1.0
    processes = plan_processes(config, count_gpus())
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_run(paths))
        open_run(config)
        stack.enter_context(logging_for("supervisor", 0, paths.log("supervisor", 0), console))
        private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="paceline-")))
        run = _Supervised(config, paths, private, _write_token(private), words)
        write_servers(paths.servers, [])
        stack.callback(write_servers, paths.servers, [])
        try:
            _start_all(run, processes)
            return _supervise(run, signals)
        finally:
            _end_all(run)


def _write_token(private: Path) -> Path:
    path = private / "token"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


def _start_all(run: _Supervised, processes: list[PlannedProcess]) -> None:
    for planned in processes:
        if planned.role == "server":
            ready_file = run.private / f"{planned.name}.json"
            child = _start_server(run, planned, ready_file)
            run.servers.append(_Server(planned, ready_file, child, time.monotonic()))
    (trainer,) = (planned for planned in processes if planned.role == "trainer")
    config_file = run.private / "config.toml"
    training = run.config.training.model_copy(update={"device": trainer.devices[0]})
    config_file.write_text(dump_config(run.config.model_copy(update={"training": training})), encoding="utf-8")
    # It prepares the data while the servers load, and writes on this terminal.
    verb, *options = run.words
    run.trainer = Child(f"{verb}-0", [verb, str(config_file), "--token-file", str(run.token_file), *options])
    logger.info(
        "started %d servers on %s and a %s on %s; logs in %s",
        len(run.servers),
        ", ".join("+".join(server.planned.devices) for server in run.servers),
        verb,
        trainer.devices[0],
        run.paths.logs,
    )


def _start_server(run: _Supervised, planned: PlannedProcess, ready_file: Path) -> Child:
    ready_file.unlink(missing_ok=True)
    target = run.config.target.model_copy(update={"device": planned.devices[0]})
    if target.num_threads is None:
        target = target.model_copy(update={"num_threads": run.config.training.num_threads})
    target_file = run.private / f"{planned.name}.toml"
    target_file.write_text(dump_config(target), encoding="utf-8")
    arguments = [
        *("serve", target.model, "--target-config", str(target_file), "--port", "0"),
        *("--token-file", str(run.token_file), "--ready-file", str(ready_file)),
    ]
    return Child(planned.name, arguments, run.paths.log(planned.role, planned.rank))


def _supervise(run: _Supervised, signals: StopSignals) -> int:
    """Until the trainer has ended; its exit code."""
    assert run.trainer is not None
    asked = False
    while (code := run.trainer.poll()) is None:
        if signals.stop.is_set() and not asked:
            asked = True
            run.trainer.ask_to_end()
        changed = [_look_after(run, server, stopping=asked) for server in run.servers]
        if any(changed):
            write_servers(run.paths.servers, [server.url for server in run.servers if server.url])
        if all(server.given_up for server in run.servers):
            last = run.servers[-1]
            raise TargetError(
                f"all servers died more than placement.max_restarts = {run.config.placement.max_restarts} times; the "
                f"last lines of {last.child.log}:\n{last.child.last_lines()}"
            )
        signals.stop.wait(_LOOK_EVERY_S) if not asked else time.sleep(_LOOK_EVERY_S)
    if code < 0:
        logger.error("the trainer was %s", describe_exit(code))
        return 128 - code
    return code


def _look_after(run: _Supervised, server: _Server, stopping: bool) -> bool:
    """Whether the list of servers has changed."""
    now = time.monotonic()
    if server.given_up:
        return False
    if server.start_at is not None:
        if now >= server.start_at and not stopping:
            server.start_at, server.started = None, now
            server.child = _start_server(run, server.planned, server.ready_file)
        return False
    code = server.child.poll()
    if code is not None:
        return not stopping and _on_death(run, server, code)
    if server.url is None and server.ready_file.exists():
        server.url = str(json.loads(server.ready_file.read_text(encoding="utf-8"))["url"])
        server.was_ready = True
        logger.info("%s is ready at %s after %.0f s", server.planned.name, server.url, now - server.started)
        return True
    limit_s = run.config.placement.start_timeout_s
    if server.url is None and now - server.started > limit_s:
        raise TargetError(
            f"{server.planned.name} is not ready after {limit_s:.0f} s (placement.start_timeout_s); the last lines of "
            f"{server.child.log}:\n{server.child.last_lines()}"
        )
    return False


def _on_death(run: _Supervised, server: _Server, code: int) -> bool:
    """A server ended by itself: at its first start that is an error of the user's, later it is started anew."""
    name, last_lines = server.planned.name, server.child.last_lines()
    if not server.was_ready:
        raise TargetError(
            f"{name} ended while it was starting ({describe_exit(code)}); the last lines of {server.child.log}:\n"
            f"{last_lines}"
        )
    limit = run.config.placement.max_restarts
    server.url = None
    if server.num_restarts >= limit:
        server.given_up = True
        logger.error(
            "%s ended again (%s) and is given up after %d restarts:\n%s", name, describe_exit(code), limit, last_lines
        )
        return True
    backoff_s = min(_FIRST_BACKOFF_S * 2.0**server.num_restarts, _LONGEST_BACKOFF_S)
    server.num_restarts += 1
    server.start_at = time.monotonic() + backoff_s
    logger.warning(
        "%s ended (%s) and is started anew (%d of %d); its last lines:\n%s",
        name,
        describe_exit(code),
        server.num_restarts,
        limit,
        last_lines,
    )
    return True


def _end_all(run: _Supervised) -> None:
    """The trainer first: it saves; then the servers."""
    if run.trainer is not None:
        run.trainer.ask_to_end()
        run.trainer.end(time.monotonic() + run.config.training.shutdown_grace_s + 1.0)
    for server in run.servers:
        server.child.ask_to_end()
    deadline = time.monotonic() + _SERVER_END_S
    for server in run.servers:
        server.child.end(deadline)
