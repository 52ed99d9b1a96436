"""`paceline` commands as processes of their own that start in milliseconds: children of one that has torch imported.

Run as a program it serves `Commands`: it reads requests from stdin and answers on stdout, one JSON value a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

# torch is imported by the server alone, so that this module can be imported by it before anything else.


class Command:
    """One running command: real argv, real signals, a real end."""

    def __init__(self, server: Commands, pid: int, output: Path) -> None:
        self._server, self.pid, self._output = server, pid, output

    @property
    def output(self) -> str:
        """What it wrote to stdout and stderr so far."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def send_signal(self, signum: signal.Signals) -> None:
        os.kill(self.pid, signum)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Its exit code, negative for a signal that killed it; kills it when time is up."""
        code = self._server.ask("wait", self.pid, timeout_s)
        assert code is not None, f"still running after {timeout_s} s:\n{self.output}"
        return int(code)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
        """Whether the condition came true before the command ended."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self._server.ask("wait", self.pid, 0.0, kill=False) is not None:
                return False
            assert time.monotonic() < deadline, f"nothing came of it in {timeout_s} s:\n{self.output}"
            time.sleep(0.0005)
        return True


class Commands:
    """Starts commands; ends what is left of them with itself."""

    def __init__(self, directory: Path, variables: dict[str, str] | None = None) -> None:
        """Their output goes to `directory`; `variables` are added to their environment."""
        self._directory, self._count = directory, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def start(self, *arguments: str) -> Command:
        """Run `paceline ARGUMENTS`, or a function of the test suite: `start("module:function", ...)`."""
        self._count += 1
        output = self._directory / f"command-{self._count}.txt"
        return Command(self, int(self.ask("start", [str(word) for word in arguments], str(output))), output)

    def ask(self, what: str, *arguments: Any, **named: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, arguments, named]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class _Server:
    def __init__(self) -> None:
        self._running: set[int] = set()
        self._codes: dict[int, int] = {}

    def start(self, arguments: list[str], output: str) -> int:
        child = os.fork()
        if child == 0:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(file, 1)
            os.dup2(file, 2)
            raise _IsChild(arguments)
        self._running.add(child)
        return child

    def wait(self, pid: int, timeout_s: float, kill: bool = True) -> int | None:
        deadline = time.monotonic() + timeout_s
        while pid not in self._codes:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self._running.discard(pid)
                self._codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= deadline:
                if kill:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    self._codes[pid] = -signal.SIGKILL
                    self._running.discard(pid)
                return None
            else:
                time.sleep(0.001)
        return self._codes[pid]

    def wait_gone(self, pid: int, timeout_s: float) -> bool:
        """Whether any process of this machine, not only a child, has ended in time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            try:
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    return True
            except OSError:
                return True
            time.sleep(0.01)
        return False

    def end(self) -> None:
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)


class _IsChild(BaseException):
    """Unwinds a child out of the server's loop."""


def main() -> None:
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401 - what every child needs

    import paceline.launch.train  # noqa: F401

    server = _Server()
    try:
        for line in sys.stdin:
            what, arguments, named = json.loads(line)
            print(json.dumps(getattr(server, what)(*arguments, **named)), flush=True)
    except _IsChild as child:
        words = child.args[0]
    else:
        server.end()
        return
    run_command(words)


def run_command(words: list[str]) -> None:
    """In the child: what the console script does, after a function of the suite that sets something up."""
    from importlib import import_module

    function, words = (words[0], words[1:]) if ":" in words[0] else (None, words)
    sys.argv = ["paceline", *words]
    if function is not None:
        module, _, name = function.partition(":")
        getattr(import_module(module), name)()
    from paceline.cli.main import main as run_paceline

    run_paceline()


if __name__ == "__main__":
    main()
