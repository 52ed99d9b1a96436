"""Target servers as users start them: `paceline serve` in processes of their own, on ports the system chooses."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from forking import Command, Commands
from talk import Talk


@dataclass(frozen=True, slots=True)
class Served:
    """A running server."""

    url: str
    command: Command

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.command.send_signal(signal.SIGKILL)
        self.command.wait()


def start_server(commands: Commands, target: Path, directory: Path, *options: str) -> Command:
    """Start a server of `target`, with one thread as tests train; see `ready`."""
    directory.mkdir(parents=True, exist_ok=True)
    return commands.start(
        *("serve", str(target), "--port", "0", "--device", "cpu", "--dtype", "float32", "--num-threads", "1"),
        *("--ready-file", str(directory / "ready.json"), *options),
    )


def ready(command: Command, directory: Path) -> Served:
    """The server, once it is ready."""
    file = directory / "ready.json"
    assert command.wait_until(file.exists), f"the server ended:\n{command.output}"
    return Served(json.loads(file.read_text())["url"], command)


def start_servers(commands: Commands, target: Path, directory: Path, num: int, *options: str) -> list[Served]:
    """`num` servers, loading at the same time."""
    places = [directory / f"server-{number}" for number in range(num)]
    started = [start_server(commands, target, place, *options) for place in places]
    return [ready(command, place) for command, place in zip(started, places, strict=True)]


def num_forwards(server: Served) -> int:
    """Rows that its engine has computed since it was started."""
    return _counted(server, "paceline_row_forward_seconds_count")


def num_parts_sent(server: Served) -> int:
    """Parts of rows that were sent, each to a rank of a group, since it was started."""
    return _counted(server, "paceline_row_parts_total")


def _counted(server: Served, name: str) -> int:
    page = Talk(server.url).ask("GET", "/metrics").body.decode()
    count = re.search(rf"^{name} ([\d.e+]+)$", page, re.MULTILINE)
    assert count, page
    return round(float(count[1]))
