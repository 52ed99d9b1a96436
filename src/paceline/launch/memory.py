"""How much memory this process may still take: of the host, and of the control groups that it is in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def free_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes; files that the system only keeps for later count as free, as checkpoints just read are.

    Args:
        proc: the system's files on itself and this process.
        cgroups: where control groups are mounted, of version 2 or 1.
    """
    return min([_of_host(proc), *_of_groups(proc, cgroups)])


def _of_host(proc: Path) -> int:
    try:
        lines = (proc / "meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """What is left in each group with a limit, from this process's own up to the root."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used, files = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            files = "total_inactive_file"
        else:
            continue
        own = top / path.strip("/")
        # In a container the path may be the host's, while the mount shows the container's own group at its top.
        for group in {own, *(parent for parent in own.parents if parent.is_relative_to(top)), top}:
            left = _left(group, limit, used, files)
            if left is not None:
                yield left


def _left(group: Path, limit: str, used: str, files: str) -> int | None:
    try:
        most, now = (group / limit).read_text().strip(), int((group / used).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return None if most == "max" else max(0, int(most) - now + int(statistics.get(files, 0)))
    except (OSError, ValueError):
        return None
