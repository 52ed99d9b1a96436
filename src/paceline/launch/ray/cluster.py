"""A Ray cluster for one run: somebody's by address, or one of its own on this host; and waiting for room in it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.config.placement import RayConfig
from paceline.config.run import RunConfig
from paceline.errors import ConfigError, StoppedError
from paceline.launch.child_words import write_private
from paceline.launch.plan import count_gpus
from paceline.launch.ray.bundles import Bundle, ClusterResources, describe, plan_bundles, total
from paceline.launch.signals import STOP_SIGNALS, signals_for_children

if TYPE_CHECKING:
    import threading

_LOOK_EVERY_S = 0.5
_LOG_EVERY_S = 30.0
_CONNECT_S = 10.0
_OBJECT_STORE_BYTES = 80 << 20
"""Ray's least is 75 MB; no feature ever passes through it."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that this process is connected to."""

    bundles: Sequence[Bundle]
    """What the run asks of it."""
    is_ours: bool
    """Whether it runs on this host alone, and for this run."""


def check_ray(config: RayConfig) -> None:
    """Raise ConfigError if Ray is not installed, or the address cannot work."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            'placement.launcher = "ray" needs Ray, which is not installed: pip install "paceline[ray]" (in a checkout: '
            'pip install -c constraints.txt -e ".[ray]"), on every node of the cluster'
        )
    address = config.address
    if address is None and "RAY_ADDRESS" in os.environ:
        raise ConfigError(
            'RAY_ADDRESS names a Ray cluster, but placement.ray.address is not set: set it to "auto" to run there, or '
            "remove the variable to start a cluster on this host"
        )
    if address is not None and "://" in address:
        raise ConfigError(
            f"placement.ray.address = {address!r}: the command has to run on a node of the cluster, since it holds the "
            "run directory; submit it with `ray job submit -- paceline train ... placement.ray.address=auto`"
        )


def _check_reached(address: str) -> None:
    """Raise OSError if nobody listens there; Ray itself would try for minutes, and then end this process."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()


@contextlib.contextmanager
def open_cluster(config: RunConfig) -> Iterator[Cluster]:
    """Connect, or start a cluster, until the block ends; then nothing of the run is left in it.

    Raises:
        ConfigError: Ray is missing, no cluster is at the address, or one of our own could not hold the run.
    """
    settings = config.placement.ray
    check_ray(settings)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with contextlib.ExitStack() as stack:
        if settings.address is None:
            num_gpus = count_gpus() if settings.num_gpus is None else settings.num_gpus
            bundles = plan_bundles(config, has_gpus=num_gpus > 0)
            if total(bundles).get("GPU", 0) > num_gpus:
                raise ConfigError(
                    f"the run asks for {describe(total(bundles))}, this host has {num_gpus} GPU: lower "
                    "placement.num_servers, num_trainers or target.tensor_parallel, or name a larger cluster in "
                    "placement.ray.address"
                )
            stack.enter_context(_own_token())
            # Ray only counts them; a run on CPUs may have more processes than there are cores, as it may without Ray
            num_cpus = max(os.cpu_count() or 1, int(total(bundles)["CPU"]))
            _init(
                stack,
                address="local",
                namespace=settings.namespace,
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
            )
        else:
            try:
                _check_reached(settings.address)
                _init(stack, address=settings.address, namespace=settings.namespace)
            except (OSError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"cannot connect to the Ray cluster at placement.ray.address = {settings.address!r}; the command "
                    f"has to run on one of its nodes (`ray start` there, or `ray job submit`): {error}"
                ) from error
            bundles = plan_bundles(config, has_gpus=resources_now().total["GPU"] > 0)
        yield Cluster(bundles, settings.address is None)


def _init(stack: contextlib.ExitStack, **settings: Any) -> None:
    """ray.init, with this process's signals as they were; its own processes start with none blocked."""
    import ray

    handlers = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    try:
        with signals_for_children():
            try:
                ray.init(logging_level=logging.WARNING, log_to_driver=False, **settings)
            finally:
                for signum, handler in handlers.items():
                    signal.signal(signum, handler)
    except SystemExit:  # Ray's handler of a SIGTERM that came meanwhile
        os.kill(os.getpid(), signal.SIGTERM)
        raise StoppedError("the run was asked to stop while Ray was starting") from None
    stack.callback(ray.shutdown)


@contextlib.contextmanager
def _own_token() -> Iterator[None]:
    """Ray's own processes ask each other for a token that nobody else on this host can read."""
    with tempfile.TemporaryDirectory(prefix="paceline-ray-") as directory:
        path = write_private(Path(directory) / "token", secrets.token_hex(32))
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(path))
        yield


def resources_now() -> ClusterResources:
    """Of the cluster that this process is connected to."""
    import ray

    return ClusterResources(ray.available_resources(), [node["Resources"] for node in ray.nodes() if node["Alive"]])


@contextlib.contextmanager
def reserve(cluster: Cluster, name: str, timeout_s: float, stop: threading.Event) -> Iterator[Any]:
    """A placement group with a bundle for each process, once there is room; removed at the end of the block.

    What is missing is logged at once if it can never come unless nodes are added, and then every 30 s.

    Raises:
        ConfigError: there was no room within `timeout_s`; says what is missing.
        StoppedError: `stop` was set first.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    bundles = cluster.bundles
    group = placement_group([bundle.resources for bundle in bundles], strategy="PACK", name=name)
    try:
        begin = time.monotonic()
        next_log = begin + _LOG_EVERY_S
        if (now := resources_now()).can_never_hold(bundles):
            logger.warning(
                "the Ray cluster is too small (%s): waiting for nodes to be added, for %.0f s at most "
                "(placement.start_timeout_s)",
                now.missing(bundles),
                timeout_s,
            )
        while not group.wait(_LOOK_EVERY_S):
            waited_s = time.monotonic() - begin
            if stop.is_set():
                raise StoppedError("the run was asked to stop while it waited for resources")
            if waited_s > timeout_s:
                raise ConfigError(
                    f"no room in the Ray cluster within {timeout_s:.0f} s (placement.start_timeout_s): "
                    f"{resources_now().missing(bundles)}; `ray status` shows who has it"
                )
            if time.monotonic() >= next_log:
                logger.warning("waiting %.0f s for resources: %s", waited_s, resources_now().missing(bundles))
                next_log += _LOG_EVERY_S
        yield group
    finally:
        remove_placement_group(group)
