"""A Ray cluster of several raylets on this host, as `ray start` on several machines makes one; commands that join it.

Run as a program it holds the cluster: it reads requests from stdin and answers on stdout, one JSON value a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forking import Command, Commands

_STORE_BYTES = 80 << 20


class RayNodes:
    """A running cluster."""

    def __init__(self, process: subprocess.Popen[str], commands: Commands, address: str) -> None:
        self._process = process
        self.commands = commands
        """Their environment has what is needed to talk to the cluster."""
        self.address = address

    def ask(self, what: str, *arguments: Any) -> Any:
        return _ask(self._process, what, *arguments)

    def add_node(self, num_cpus: int) -> int:
        """Number of the new node."""
        return int(self.ask("add_node", num_cpus))

    def remove_node(self, number: int) -> None:
        """As a machine that loses power."""
        self.ask("remove_node", number)

    def groups(self) -> list[str]:
        """Placement groups that hold resources, or wait for some."""
        return list(self.ask("groups"))


@contextlib.contextmanager
def ray_nodes(directory: Path, num_cpus: list[int]) -> Iterator[RayNodes]:
    """A cluster with a node for each number of CPUs; Ray's own token is in a file of `directory`."""
    token = directory / "ray-token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    path = [str(Path(one).resolve()) for one in os.environ.get("PYTHONPATH", "src").split(os.pathsep)]
    needed = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(path),  # workers start elsewhere
    }
    environment = {**os.environ, **needed}
    words = [sys.executable, __file__, *map(str, num_cpus)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        address = str(_ask(process, "address"))
        # as jobs of a cluster have it
        with Commands(directory, needed | {"RAY_ADDRESS": address}) as commands:
            yield RayNodes(process, commands, address)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


def _ask(process: subprocess.Popen[str], what: str, *arguments: Any) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([what, arguments]) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def started(command: Command, name: str) -> int:
    """Process id of the last start of "server-0" or "trainer-0", as the command has told it."""
    found = re.findall(rf"{name} (?:runs|is ready).* on node [\d.]+, process (\d+)", command.output)
    assert found, command.output
    return int(found[-1])


def parent_of(pid: int) -> int:
    """Of the process of an actor's child: Ray's worker."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE)[1])  # type: ignore[index]


def kill_actor(pid: int) -> None:
    """SIGKILL to the worker that started process `pid`."""
    worker = parent_of(pid)
    assert b"ray::ChildActor" in Path(f"/proc/{worker}/cmdline").read_bytes(), "the premise: it is Ray's"
    os.kill(worker, signal.SIGKILL)


class _Holder:
    def __init__(self, num_cpus: list[int]) -> None:
        from ray.cluster_utils import Cluster

        arguments = {"num_cpus": num_cpus[0], "object_store_memory": _STORE_BYTES, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, connect=True, head_node_args=arguments)
        self._nodes: list[Any] = []
        for number in num_cpus[1:]:
            self.add_node(number)

    def address(self) -> str:
        return str(self.cluster.address)

    def add_node(self, num_cpus: int) -> int:
        self._nodes.append(self.cluster.add_node(num_cpus=num_cpus, object_store_memory=_STORE_BYTES))
        return len(self._nodes) - 1

    def remove_node(self, number: int) -> None:
        self.cluster.remove_node(self._nodes[number], allow_graceful=False)

    def groups(self) -> list[str]:
        from ray.util import placement_group_table

        return [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints
    holder = _Holder([int(word) for word in sys.argv[1:]])
    for line in sys.stdin:
        what, arguments = json.loads(line)
        print(json.dumps(getattr(holder, what)(*arguments)), file=answers, flush=True)
    import ray

    ray.shutdown()  # first, since it ends this process if its node is gone
    holder.cluster.shutdown()


if __name__ == "__main__":
    main()
