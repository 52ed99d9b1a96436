"""`placement.launcher = "ray"`: servers and trainers as actors of a Ray cluster, started and awaited by one command.

Ray places, starts and ends processes; it is never in the step path. Trainers find servers in servers.json of the run
directory, which all nodes see, and rows travel between the processes themselves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
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
from paceline.launch.child_words import draw_token, server_target, trainer_config
from paceline.launch.children import describe_exit, last_lines
from paceline.launch.ray.actors import ServerOrder, TrainerOrder, Whereabouts, find_address
from paceline.launch.ray.bundles import Bundle, describe, total
from paceline.launch.ray.cluster import Cluster, check_ray, open_cluster, reserve
from paceline.launch.ray.followed import Followed, FollowedServer, start_actor
from paceline.launch.restarts import ServerLife, check_any_left
from paceline.launch.run import lock_run, open_run
from paceline.observe.logs import logging_for
from paceline.version import VERSION

if TYPE_CHECKING:
    from paceline.launch.signals import StopSignals

_LOOK_EVERY_S = 0.2
_SERVER_END_S = 6.0
"""Seconds servers get to end in order; they hold nothing that could be lost."""
_RAY_END_S = 6.0
"""Seconds Ray gets to end what is left, and its own processes where it runs for this run alone."""
_THREADS_VARIABLE = "OMP_NUM_THREADS"
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _OnRay:
    """The processes of a run."""

    config: RunConfig
    paths: RunDir
    verb: str
    """Of the processes that use servers, or have a target of their own."""
    options: Sequence[str]
    """Of that verb, besides the configuration."""
    console: Console
    """Where rank 0's output is shown."""
    servers: list[FollowedServer] = field(default_factory=list)
    trainers: list[Followed] = field(default_factory=list)

    @property
    def all(self) -> list[Followed]:
        return [*self.trainers, *self.servers]


def run_on_ray(config: RunConfig, signals: StopSignals, console: Console, words: Sequence[str]) -> int:
    """Run trainers, or a recorder, and their servers on a Ray cluster; the exit code of the one that failed first.

    Args:
        words: their verb ("trainer", "recorder"), and options that this verb has besides the configuration.

    Raises:
        TargetError: a server never became ready, or the last one died too often; shows its last log lines.
        ConfigError: Ray is missing, has no room, or a node does not see the run directory.
        PacelineError: the run directory cannot be used.
    """
    check_ray(config.placement.ray)
    paths = RunDir(Path(config.run_dir))
    signals.grace_s = config.training.shutdown_grace_s + _SERVER_END_S + _RAY_END_S
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_run(paths))
        open_run(config)
        stack.enter_context(logging_for("supervisor", 0, paths.log("supervisor", 0), console))
        if config.placement.target == "servers":
            write_servers(paths.servers, [])
            stack.callback(write_servers, paths.servers, [])
        try:
            cluster = stack.enter_context(open_cluster(config))
            name = f"paceline-{paths.root.resolve().name}-{secrets.token_hex(4)}"
            limit_s = config.placement.start_timeout_s
            group = stack.enter_context(reserve(cluster, name, limit_s, signals.stop))
            nonce = stack.enter_context(_nonce(paths))
            run = _OnRay(config, paths, words[0], words[1:], console)
            try:
                _start_all(run, cluster, group, nonce)
                return _supervise(run, signals)
            finally:
                _end_all(run)
        except StoppedError as error:
            logger.info("%s", error)
            signals.stop.wait(1.0)  # the signal may still be on its way to the thread that takes it
            return signals.exit_code


@contextlib.contextmanager
def _nonce(paths: RunDir) -> Iterator[str]:
    """Random words in a file of the run directory, by which a process elsewhere knows that it sees the same one."""
    nonce = secrets.token_hex(16)
    write_whole(paths.nonce, nonce)
    try:
        yield nonce
    finally:
        paths.nonce.unlink(missing_ok=True)


def _start_all(run: _OnRay, cluster: Cluster, group: Any, nonce: str) -> None:
    token, placement = draw_token(), run.config.placement
    whereabouts = Whereabouts(
        str(Path.cwd()), str(run.paths.nonce.absolute()), nonce, VERSION, os.environ.get(_THREADS_VARIABLE)
    )
    trainers = [bundle for bundle in cluster.bundles if bundle.role == "trainer"]
    where = None
    if len(trainers) > 1:
        where = _rendezvous(group, cluster.bundles.index(trainers[0]), cluster.is_ours)
    for index, bundle in enumerate(cluster.bundles):
        if bundle.role == "server":
            order = _server_order(run, bundle, cluster.is_ours)
            actor = start_actor(bundle, order, whereabouts, token, group, index, placement.max_restarts)
            life = ServerLife(bundle.name, run.paths.log("server", bundle.rank), placement)
            run.servers.append(FollowedServer(bundle, actor, life=life))
        else:
            actor = start_actor(
                bundle, _trainer_order(run, bundle, len(trainers), where), whereabouts, token, group, index, 0
            )
            run.trainers.append(Followed(bundle, actor, run.console if bundle.rank == 0 else None))
    logger.info(
        "asked Ray for %d servers and %d x %s in %s; logs in %s",
        len(run.servers),
        len(run.trainers),
        run.verb,
        describe(total(cluster.bundles)),
        run.paths.logs,
    )


def _server_order(run: _OnRay, bundle: Bundle, loopback: bool) -> ServerOrder:
    target = server_target(run.config, bundle.device)
    output = str(run.paths.log("server", bundle.rank).absolute())
    return ServerOrder(bundle.name, target.model, {"config.toml": dump_config(target)}, output, loopback)


def _trainer_order(run: _OnRay, bundle: Bundle, num_ranks: int, rendezvous: str | None) -> TrainerOrder:
    options = list(run.options)
    if rendezvous is not None:
        options += ["--rank", str(bundle.rank), "--num-ranks", str(num_ranks), "--rendezvous", rendezvous]
    files = {"config.toml": dump_config(trainer_config(run.config, bundle.device))}
    output = str(run.paths.output("trainer", bundle.rank).absolute())
    return TrainerOrder(bundle.name, run.verb, tuple(options), files, output)


def _rendezvous(group: Any, index: int, loopback: bool) -> str:
    """Where trainer ranks meet: a free port of the node that has rank 0's bundle."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return str(ray.get(ray.remote(find_address).options(num_cpus=0, scheduling_strategy=place).remote(loopback)))


def _supervise(run: _OnRay, signals: StopSignals) -> int:
    """Until every trainer has ended; the exit code of the first that failed, or 0."""
    asked, first = False, 0
    while not all(trainer.has_ended for trainer in run.trainers):
        if signals.stop.is_set() and not asked:
            asked = True
            for trainer in run.trainers:
                trainer.ask_to_end()
        heard = _hear(run.all)
        if not asked:
            _look_after_servers(run, heard)
        failed = next((trainer for trainer in run.trainers if _code(trainer)), None)
        if failed is not None and not first:
            first = _code(failed)
            if not asked:
                _report(run, failed)
                break  # the others are ended, and awaited, with everything else
    return signals.exit_code if asked else first


def _hear(processes: Sequence[Followed], timeout_s: float = _LOOK_EVERY_S) -> dict[str, bool]:
    """Wait a moment for answers and take them; name of each process that is heard of -> whether its actor answered."""
    import ray

    for one in processes:
        if not one.has_ended or isinstance(one, FollowedServer):
            one.listen()
    waiting = {one.watch: one for one in processes if one.watch is not None}
    if not waiting:
        time.sleep(timeout_s)
        return {}
    there, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=timeout_s)
    return {waiting[watch].name: waiting[watch].hear() for watch in there}


def _look_after_servers(run: _OnRay, heard: dict[str, bool]) -> None:
    before = [server.life.url for server in run.servers]
    for server in run.servers:
        if server.name in heard:
            server.look_after(heard[server.name])
        server.go_on()
    urls = [server.life.url for server in run.servers]
    if urls != before:
        write_servers(run.paths.servers, [url for url in urls if url])
    if run.servers:
        check_any_left([server.life for server in run.servers], run.servers[-1].last_lines)


def _code(trainer: Followed) -> int:
    """What the command ends with for this trainer's end; 0 while it runs."""
    if trainer.lost is not None:
        return 1
    if not trainer.has_ended:
        return 0
    assert trainer.state is not None
    code = trainer.state.code or 0
    return 128 - code if code < 0 else code


def _report(run: _OnRay, trainer: Followed) -> None:
    """Say why the run ends, with the last lines of the one that failed first unless they were shown as they came."""
    state = trainer.state
    where = "" if state is None else f", on node {state.node}"
    if trainer.lost is not None or state is None or state.code is None:
        how = f"Ray has lost its actor: {trainer.lost}"
        lines = last_lines(run.paths.output(trainer.bundle.role, trainer.bundle.rank))
    else:
        how, lines = describe_exit(state.code), state.last_lines
    logger.error("%s failed first%s: %s", trainer.name, where, how)
    if trainer.console is None:
        run.console.file.write(f"the last lines of {trainer.name}:\n{lines}\n")
        run.console.file.flush()


def _end_all(run: _OnRay) -> None:
    """Trainers first: they save; then the servers; what does not end in time ends with its actor."""
    grace_s = run.config.training.shutdown_grace_s
    for processes, limit_s in ((run.trainers, grace_s + 1.0), (run.servers, _SERVER_END_S)):
        deadline = time.monotonic() + limit_s
        for one in processes:
            one.ask_to_end()
        while time.monotonic() < deadline and not all(one.has_ended for one in processes):
            _hear(processes)
        for one in processes:
            one.end()
