"""Trainer ranks, and servers of the run's own, as children of one process that computes nothing itself.

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

import torch
from rich.console import Console

from paceline.client.server_list import write_servers
from paceline.config.loading import dump_config
from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.errors import TargetError
from paceline.launch.children import Child, describe_exit
from paceline.launch.plan import PlannedProcess, config_on, count_gpus, plan_processes
from paceline.launch.run import lock_run, open_run
from paceline.launch.workers import Worker, Workers
from paceline.observe.logs import logging_for
from paceline.transport.directories import remove_leftovers
from paceline.transport.file import SHARED_MEMORY
from paceline.transport.negotiation import host_facts

if TYPE_CHECKING:
    from paceline.launch.signals import StopSignals

_LOOK_EVERY_S = 0.1
_SERVER_END_S = 6.0
"""Seconds servers get to end in order; they hold nothing that could be lost."""
_HURRIED_END_S = 1.0
"""The same, when the time for an orderly end is over."""
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
    """0700: the token, configurations and failures of children; gone at the end."""
    token_file: Path
    workers: Workers
    servers: list[_Server] = field(default_factory=list)


def needs_supervisor(config: RunConfig) -> bool:
    """Whether a training on this host has more than one process."""
    return config.placement.target == "servers" or config.placement.num_trainers > 1


def config_of_only_trainer(config: RunConfig) -> RunConfig:
    """`config` for a trainer without a supervisor: on its device of `placement.trainer_devices`, if that names one."""
    devices = config.placement.trainer_devices
    return config_on(config, devices[0]) if devices else config


def train_supervised(config: RunConfig, signals: StopSignals, console: Console) -> int:
    """Run a training of several processes; its exit code.

    Raises:
        PacelineError: as `run_supervised`.
    """
    return run_supervised(config, signals, console, ["trainer"])


def run_supervised(config: RunConfig, signals: StopSignals, console: Console, words: Sequence[str]) -> int:
    """Run the processes that do the work, and the servers they use if the placement has some; the exit code.

    Args:
        words: the verb of the former ("trainer", one for each rank, or "recorder"), and options that this verb has
            besides the configuration.

    Raises:
        TargetError: a server never became ready, or the last one died too often; shows its last log lines.
        TrainerFailedError: a trainer rank failed; shows its own message.
        PacelineError: the run directory or the devices cannot be used.
    """
    paths, training = RunDir(Path(config.run_dir)), config.training
    signals.grace_s = training.shutdown_grace_s + _SERVER_END_S + 1.5
    processes = plan_processes(config, count_gpus())
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_run(paths))
        open_run(config)
        stack.enter_context(logging_for("supervisor", 0, paths.log("supervisor", 0), console))
        private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="paceline-")))
        workers = Workers(training.shutdown_grace_s + 0.5, training.dist_timeout_s)
        run = _Supervised(config, paths, private, _write_token(private), workers)
        if config.placement.target == "servers":
            write_servers(paths.servers, [])
            stack.callback(write_servers, paths.servers, [])
        stack.callback(_remove_leftovers, config)
        try:
            _start_all(run, processes, words)
            _supervise(run, signals)
            return workers.result()
        finally:
            _end_all(run)


def _write_token(private: Path) -> Path:
    path = private / "token"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


def _start_all(run: _Supervised, processes: list[PlannedProcess], words: Sequence[str]) -> None:
    for planned in processes:
        if planned.role == "server" and run.config.placement.target == "servers":
            ready_file = run.private / f"{planned.name}.json"
            child = _start_server(run, planned, ready_file)
            run.servers.append(_Server(planned, ready_file, child, time.monotonic()))
    # They prepare the data while the servers load.
    trainers = [planned for planned in processes if planned.role == "trainer"]
    for planned in trainers:
        run.workers.add(_start_worker(run, planned, words, len(trainers)))
    started = [f"{word} on {_devices(of)}" for word, of in (("servers", run.servers), (f"{words[0]}s", trainers)) if of]
    logger.info("started %s; logs in %s", " and ".join(started), run.paths.logs)


def _devices(processes: Sequence[_Server] | Sequence[PlannedProcess]) -> str:
    planned = (one.planned if isinstance(one, _Server) else one for one in processes)
    return ", ".join("+".join(one.devices) for one in planned)


def _start_worker(run: _Supervised, planned: PlannedProcess, words: Sequence[str], num_ranks: int) -> Worker:
    verb, *options = words
    name, log = f"{verb}-{planned.rank}", run.paths.log(verb, planned.rank)
    config_file = run.private / f"{name}.toml"
    config_file.write_text(dump_config(config_on(run.config, planned.devices[0])), encoding="utf-8")
    arguments = [verb, str(config_file), *options]
    if run.config.placement.target == "servers":
        arguments += ["--token-file", str(run.token_file)]
    failure_file = None
    if verb == "trainer":
        failure_file = run.private / f"{name}.failure"
        arguments += ["--failure-file", str(failure_file)]
    if num_ranks > 1:
        meeting_place = f"file://{run.private / 'rendezvous'}"
        arguments += ["--rank", str(planned.rank), "--num-ranks", str(num_ranks), "--rendezvous", meeting_place]
    # The first writes on this terminal, and its log file itself.
    return Worker(Child(name, arguments, log if planned.rank else None), log, failure_file)


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


def _supervise(run: _Supervised, signals: StopSignals) -> None:
    """Until all that do the work have ended."""
    while not run.workers.look():
        stopping = signals.stop.is_set()
        if stopping:
            run.workers.ask_to_end()
        changed = [_look_after(run, server, stopping) for server in run.servers]
        if any(changed):
            write_servers(run.paths.servers, [server.url for server in run.servers if server.url])
        if run.servers and all(server.given_up for server in run.servers):
            last = run.servers[-1]
            raise TargetError(
                f"all servers died more than placement.max_restarts = {run.config.placement.max_restarts} times; the "
                f"last lines of {last.child.log}:\n{last.child.last_lines()}"
            )
        signals.stop.wait(_LOOK_EVERY_S) if not stopping else time.sleep(_LOOK_EVERY_S)


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
    """Trainers first: they save; then the servers."""
    run.workers.end_all()
    for server in run.servers:
        server.child.ask_to_end()
    deadline = time.monotonic() + (_HURRIED_END_S if run.workers.num_killed else _SERVER_END_S)
    for server in run.servers:
        server.child.end(deadline)


def _remove_leftovers(config: RunConfig) -> None:
    """What a killed process could not remove itself; the next start would, but it may be long in coming."""
    base = Path(config.transport.directory) if config.transport.directory is not None else SHARED_MEMORY
    remove_leftovers(base, host_facts(torch.device("cpu")).host_id)
