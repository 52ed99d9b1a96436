"""The fault proxy as tests use it: a process in front of servers, its schedule, and what it has done so far."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Fault = dict[str, Any]


class FaultProxy:
    """A running proxy."""

    def __init__(self, servers: Sequence[str], faults: Sequence[Fault], seed: int = 0) -> None:
        """In front of `servers` (URLs)."""
        self.faults = list(faults)
        self.done: list[Fault] = []
        """Faults that have happened, in their order; "row" is the position that was asked for, "first" says whether
        nobody had been asked for that row before."""
        addresses = ",".join(url.removeprefix("http://") for url in servers)
        program = Path(__file__).with_name("fault_proxy.py")
        self._process = subprocess.Popen(
            [sys.executable, "-S", program, addresses, json.dumps(self.faults), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        ports = json.loads(self._process.stdout.readline())["ports"]
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        """What clients are told instead of `servers`."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def all_happened(self) -> bool:
        """Whether every fault of the schedule has happened, and nothing else; ends the proxy."""
        self.end()
        told = [{name: fault[name] for name in fault if name not in ("row", "first")} for fault in self.done]
        return sorted(map(json.dumps, told)) == sorted(map(json.dumps, self.faults))

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._reader.join(10)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.done.append(json.loads(line))


@contextmanager
def fault_proxy(servers: Sequence[str], faults: Sequence[Fault], seed: int = 0) -> Iterator[FaultProxy]:
    """A proxy until the block ends."""
    proxy = FaultProxy(servers, faults, seed)
    try:
        yield proxy
    finally:
        proxy.end()
