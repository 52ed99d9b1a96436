"""A Ray cluster of several raylets on this host, as `ray start` on several machines makes one; commands that join it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forking import Command, Commands

STORE_BYTES = 80 << 20


@dataclass(frozen=True, slots=True)
class RayNodes:
    """A running cluster."""

    cluster: Any
    address: str
    commands: Commands
    """Started with what is needed to talk to it."""

    def add_node(self, num_cpus: int) -> Any:
        return self.cluster.add_node(num_cpus=num_cpus, object_store_memory=STORE_BYTES)


@contextlib.contextmanager
def ray_nodes(directory: Path, num_cpus: list[int]) -> Iterator[RayNodes]:
    """A cluster with a node for each number of CPUs; Ray's own token is in a file of `directory`."""
    from ray.cluster_utils import Cluster

    token = directory / "ray-token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    before = dict(os.environ)
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(
            str(Path(one).resolve()) for one in os.environ.get("PYTHONPATH", "src").split(":")
        ),
    }
    try:
        first, *others = num_cpus
        arguments = {"num_cpus": first, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=arguments)
        try:
            with Commands(directory) as commands:
                nodes = RayNodes(cluster, cluster.address, commands)
                for number in others:
                    nodes.add_node(number)
                yield nodes
        finally:
            cluster.shutdown()
    finally:
        os.environ.clear()
        os.environ |= before


def started(command: Command, name: str) -> int:
    """Process id of the last start of "server-0" or "trainer-0", as the command has told it."""
    found = re.findall(rf"{name} (?:runs|is ready).* on node [\d.]+, process (\d+)", command.output)
    assert found, command.output
    return int(found[-1])


def parent_of(pid: int) -> int:
    """Of the process of an actor's child: Ray's worker."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE)[1])  # type: ignore[index]


def kill_actor(pid: int) -> int:
    """SIGKILL to the worker that started process `pid`; its own id."""
    worker = parent_of(pid)
    assert b"ray::ChildActor" in Path(f"/proc/{worker}/cmdline").read_bytes(), "the premise: it is Ray's"
    os.kill(worker, signal.SIGKILL)
    return worker
