"""Trainer ranks, and servers of the run's own, as children of one process that computes nothing itself.

The supervisor starts them, keeps servers.json true, starts anew what died, and ends everything on any end.
"""

from __future__ import annotations

import contextlib
import json
import logging
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
from paceline.launch.child_words import (
    draw_token,
    rank_words,
    serve_words,
    server_target,
    worker_words,
    write_private,
)
from paceline.launch.children import Child, describe_exit
from paceline.launch.plan import PlannedProcess, config_on, count_gpus, plan_processes
from paceline.launch.restarts import HURRIED_END_S, SERVER_END_S, ServerLife, check_any_left
from paceline.launch.run import lock_run, open_run
from paceline.launch.workers import Worker, Workers
from paceline.observe.logs import logging_for
from paceline.transport.directories import remove_leftovers
from paceline.transport.file import SHARED_MEMORY
from paceline.transport.negotiation import host_facts

if TYPE_CHECKING:
    from paceline.launch.signals import StopSignals

_LOOK_EVERY_S = 0.1
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Server:
    """One server and its process of now."""

    planned: PlannedProcess
    ready_file: Path
    child: Child
    life: ServerLife


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
    signals.grace_s = training.shutdown_grace_s + SERVER_END_S + 1.5
    processes = plan_processes(config, count_gpus())
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_run(paths))
        open_run(config)
        stack.enter_context(logging_for("supervisor", 0, paths.log("supervisor", 0), console))
        private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="paceline-")))
        workers = Workers(training.shutdown_grace_s + 0.5, training.dist_timeout_s)
        run = _Supervised(config, paths, private, write_private(private / "token", draw_token()), workers)
        if config.placement.target == "servers":
            write_servers(paths.servers, [])
            stack.callback(write_servers, paths.servers, [])
        stack.callback(remove_feature_leftovers, config)
        try:
            _start_all(run, processes, words)
            _supervise(run, signals)
            code = workers.result()
            # Ranks that lost each other while they ended have codes of errors, but there was none.
            return signals.exit_code or code
        finally:
            _end_all(run)


def _start_all(run: _Supervised, processes: list[PlannedProcess], words: Sequence[str]) -> None:
    for planned in processes:
        if planned.role == "server" and run.config.placement.target == "servers":
            ready_file = run.private / f"{planned.name}.json"
            life = ServerLife(planned.name, run.paths.log(planned.role, planned.rank), run.config.placement)
            run.servers.append(_Server(planned, ready_file, _start_server(run, planned, ready_file), life))
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
    verb = words[0]
    name, log = f"{verb}-{planned.rank}", run.paths.log(verb, planned.rank)
    config_file = run.private / f"{name}.toml"
    config_file.write_text(dump_config(config_on(run.config, planned.devices[0])), encoding="utf-8")
    token_file = run.token_file if run.config.placement.target == "servers" else None
    failure_file = run.private / f"{name}.failure" if verb == "trainer" else None
    arguments = worker_words(words, config_file, token_file, failure_file)
    if num_ranks > 1:
        arguments += rank_words(planned.rank, num_ranks, f"file://{run.private / 'rendezvous'}")
    # The first writes on this terminal, and its log file itself.
    return Worker(Child(name, arguments, log if planned.rank else None), log, failure_file)


def _start_server(run: _Supervised, planned: PlannedProcess, ready_file: Path) -> Child:
    ready_file.unlink(missing_ok=True)
    target = server_target(run.config, planned.devices[0])
    target_file = run.private / f"{planned.name}.toml"
    target_file.write_text(dump_config(target), encoding="utf-8")
    arguments = serve_words(target.model, target_file, run.token_file, ready_file, "127.0.0.1")
    return Child(planned.name, arguments, run.paths.log(planned.role, planned.rank))


def _supervise(run: _Supervised, signals: StopSignals) -> None:
    """Until all that do the work have ended."""
    while not run.workers.look():
        stopping = signals.stop.is_set()
        if stopping:
            run.workers.ask_to_end()
        changed = [_look_after(run, server, stopping) for server in run.servers]
        if any(changed):
            write_servers(run.paths.servers, [server.life.url for server in run.servers if server.life.url])
        if run.servers:
            check_any_left([server.life for server in run.servers], run.servers[-1].child.last_lines())
        signals.stop.wait(_LOOK_EVERY_S) if not stopping else time.sleep(_LOOK_EVERY_S)


def _look_after(run: _Supervised, server: _Server, stopping: bool) -> bool:
    """Whether the list of servers has changed."""
    life = server.life
    if life.given_up:
        return False
    if life.start_at is not None:
        if time.monotonic() >= life.start_at and not stopping:
            life.begin()
            server.child = _start_server(run, server.planned, server.ready_file)
        return False
    code = server.child.poll()
    if code is not None:
        if not stopping:
            life.was_ready |= server.ready_file.exists()
            life.died(describe_exit(code), server.child.last_lines())
        return not stopping
    if life.url is None and server.ready_file.exists():
        life.ready(str(json.loads(server.ready_file.read_text(encoding="utf-8"))["url"]))
        return True
    if life.is_late():
        raise life.too_late(server.child.last_lines())
    return False


def _end_all(run: _Supervised) -> None:
    """Trainers first: they save; then the servers."""
    run.workers.end_all()
    for server in run.servers:
        server.child.ask_to_end()
    deadline = time.monotonic() + (HURRIED_END_S if run.workers.num_killed else SERVER_END_S)
    for server in run.servers:
        server.child.end(deadline)


def remove_feature_leftovers(config: RunConfig) -> None:
    """On this host, what killed processes could not remove themselves; the next start would, whenever that is."""
    base = Path(config.transport.directory) if config.transport.directory is not None else SHARED_MEMORY
    remove_leftovers(base, host_facts(torch.device("cpu")).host_id)
