"""`placement.launcher = "ray"`: servers and trainers as actors of a Ray cluster, started and awaited by one command.

Ray places, starts and ends processes; it is never in the step path. Trainers find servers in servers.json of the run
directory, which all nodes see, and rows travel between the processes themselves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from paceline.client.server_list import write_servers
from paceline.config.files import write_whole
from paceline.config.loading import dump_config
from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.errors import StoppedError
from paceline.launch.child_words import draw_token, rank_words, server_target
from paceline.launch.local import remove_feature_leftovers
from paceline.launch.plan import config_on
from paceline.launch.ray.actors import THREADS_VARIABLE, ServerOrder, Whereabouts, WorkerOrder, find_address
from paceline.launch.ray.bundles import Bundle, describe, total
from paceline.launch.ray.cluster import Cluster, check_ray, open_cluster, reserve
from paceline.launch.ray.followed import FollowedServer, FollowedWorker, start_actor
from paceline.launch.restarts import HURRIED_END_S, SERVER_END_S, ServerLife, check_any_left
from paceline.launch.run import lock_run, open_run
from paceline.launch.tokens import take_token
from paceline.launch.workers import Worker, Workers
from paceline.observe.logs import logging_for
from paceline.version import VERSION

if TYPE_CHECKING:
    from paceline.launch.signals import StopSignals

_LOOK_EVERY_S = 0.1
_RAY_END_S = 6.0
"""Seconds Ray gets to end what is left, and its own processes where it runs for this run alone."""
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _OnRay:
    """The processes of a run."""

    config: RunConfig
    paths: RunDir
    private: Path
    """0700, on this machine: why workers failed."""
    words: Sequence[str]
    """The verb of those that do the work, and options of its own."""
    console: Console
    """Where rank 0's output is shown."""
    workers: Workers
    servers: list[FollowedServer] = field(default_factory=list)


def run_on_ray(config: RunConfig, signals: StopSignals, console: Console, words: Sequence[str]) -> int:
    """Run the processes that do the work, and the servers they use if the placement has some; the exit code.

    Args:
        words: the verb of the former ("trainer", one for each rank, or "recorder"), and options that this verb has
            besides the configuration.

    Raises:
        TargetError: a server never became ready, or the last one died too often; shows its last log lines.
        TrainerFailedError: a trainer rank failed; shows its own message.
        ConfigError: Ray is missing, has no room, or a node does not see the run directory.
        PacelineError: the run directory cannot be used.
    """
    check_ray(config.placement.ray)
    paths, training = RunDir(Path(config.run_dir)), config.training
    signals.grace_s = training.shutdown_grace_s + SERVER_END_S + _RAY_END_S
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_run(paths))
        open_run(config)
        stack.enter_context(logging_for("supervisor", 0, paths.log("supervisor", 0), console))
        if config.placement.target == "servers":
            write_servers(paths.servers, [])
            stack.callback(write_servers, paths.servers, [])
        stack.callback(remove_feature_leftovers, config)
        try:
            token = _token(config)
            cluster = stack.enter_context(open_cluster(config))
            name = f"paceline-{paths.root.resolve().name}-{secrets.token_hex(4)}"
            limit_s = config.placement.start_timeout_s
            group = stack.enter_context(reserve(cluster, name, limit_s, signals.stop))
            nonce = stack.enter_context(_nonce(paths))
            private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="paceline-")))
            workers = Workers(training.shutdown_grace_s + 0.5, training.dist_timeout_s)
            run = _OnRay(config, paths, private, words, console, workers)
            try:
                _start_all(run, cluster, group, nonce, token)
                _supervise(run, signals)
                code = workers.result()
            finally:
                _end_all(run)
        except StoppedError as error:
            logger.info("%s", error)
            signals.stop.wait(1.0)  # the signal may still be on its way to the thread that takes it
            code = 0
        return signals.exit_code or code


def _token(config: RunConfig) -> str | None:
    """Of the run's own servers; or of somebody's, since their token's file may be on this machine alone."""
    if config.placement.target == "urls":
        return take_token(config.placement.token_file)
    return draw_token() if config.placement.target == "servers" else None


@contextlib.contextmanager
def _nonce(paths: RunDir) -> Iterator[str]:
    """Random words in a file of the run directory, by which a process elsewhere knows that it sees the same one."""
    nonce = secrets.token_hex(16)
    write_whole(paths.nonce, nonce)
    try:
        yield nonce
    finally:
        paths.nonce.unlink(missing_ok=True)


def _start_all(run: _OnRay, cluster: Cluster, group: Any, nonce: str, token: str | None) -> None:
    placement, bundles = run.config.placement, cluster.bundles
    num_threads = os.environ.get(THREADS_VARIABLE)
    whereabouts = Whereabouts(str(Path.cwd()), str(run.paths.nonce.absolute()), nonce, VERSION, num_threads)
    trainers = [index for index, bundle in enumerate(bundles) if bundle.role == "trainer"]
    meeting_place = _meeting_place(group, trainers[0], cluster.is_ours) if len(trainers) > 1 else None
    for index, bundle in enumerate(bundles):
        if bundle.role == "server":
            order = _server_order(run, bundle, cluster.is_ours)
            actor = start_actor(bundle, order, whereabouts, token, group, index, placement.max_restarts)
            life = ServerLife(bundle.name, run.paths.log("server", bundle.rank), placement)
            run.servers.append(FollowedServer(bundle.name, actor, life=life))
        else:
            rank = rank_words(bundle.rank, len(trainers), meeting_place) if meeting_place is not None else []
            worker_order = _worker_order(run, bundle, rank, token is not None)
            actor = start_actor(bundle, worker_order, whereabouts, token, group, index, 0)
            run.workers.add(_follow(run, bundle, worker_order, actor))
    what = describe(total(bundles))
    logger.info("asked Ray for %s: %s; logs in %s", what, ", ".join(map(str, bundles)), run.paths.logs)


def _server_order(run: _OnRay, bundle: Bundle, loopback: bool) -> ServerOrder:
    target = server_target(run.config, bundle.device)
    output = str(run.paths.log("server", bundle.rank).absolute())
    return ServerOrder(bundle.name, target.model, {"config.toml": dump_config(target)}, output, loopback)


def _worker_order(run: _OnRay, bundle: Bundle, rank: Sequence[str], has_token: bool) -> WorkerOrder:
    verb = run.words[0]
    name = f"{verb}-{bundle.rank}"
    # The first writes on this terminal, and its log file itself.
    output = run.paths.log(verb, bundle.rank) if bundle.rank else run.paths.output(verb, bundle.rank)
    files = {"config.toml": dump_config(config_on(run.config, bundle.device))}
    writes_failure = verb == "trainer"
    words = tuple(run.words)
    return WorkerOrder(name, words, tuple(rank), has_token, writes_failure, files, str(output.absolute()))


def _follow(run: _OnRay, bundle: Bundle, order: WorkerOrder, actor: Any) -> Worker:
    log = run.paths.log(run.words[0], bundle.rank)
    failure_file = run.private / f"{order.name}.failure" if order.writes_failure else None
    console = run.console if bundle.rank == 0 else None
    followed = FollowedWorker(order.name, actor, log=log, failure_file=failure_file, console=console)
    return Worker(followed, log, failure_file)


def _meeting_place(group: Any, index: int, loopback: bool) -> str:
    """Where trainer ranks meet: a free port of the node that has rank 0's bundle."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return str(ray.get(ray.remote(find_address).options(num_cpus=0, scheduling_strategy=place).remote(loopback)))


def _supervise(run: _OnRay, signals: StopSignals) -> None:
    """Until all that do the work have ended."""
    while not run.workers.look():
        stopping = signals.stop.is_set()
        if stopping:
            run.workers.ask_to_end()
        else:
            _look_after_servers(run)
        signals.stop.wait(_LOOK_EVERY_S) if not stopping else time.sleep(_LOOK_EVERY_S)


def _look_after_servers(run: _OnRay) -> None:
    before = [server.life.url for server in run.servers]
    for server in run.servers:
        server.look_after()
    urls = [server.life.url for server in run.servers]
    if urls != before:
        write_servers(run.paths.servers, [url for url in urls if url])
    if run.servers:
        check_any_left([server.life for server in run.servers], run.servers[-1].last_lines)


def _end_all(run: _OnRay) -> None:
    """Trainers first: they save; then the servers; what does not end in time ends with its actor."""
    run.workers.end_all()
    for server in run.servers:
        server.ask_to_end()
    deadline = time.monotonic() + (HURRIED_END_S if run.workers.num_killed else SERVER_END_S)
    while time.monotonic() < deadline and not all(server.has_ended() for server in run.servers):
        time.sleep(_LOOK_EVERY_S)
    for server in run.servers:
        server.kill()
