"""Where an engine's GPU time goes, from the trace that its own profiler writes: kernels, copies, and gaps between them.

python benchmarks/device_time.py TRACE.json.gz [ANOTHER.json.gz]
"""

from __future__ import annotations

import gzip
import itertools
import json
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_GAP_US = 200.0
Interval = tuple[float, float]


def record_trace(engine: str, url: str, key: str, directory: Path, work: Callable[[], object]) -> Path:
    """The trace of what the engine does for `work`; vLLM must have been started with `profiler_flags(directory)`."""
    directory.mkdir(parents=True, exist_ok=True)
    before = set(directory.rglob("*.json*"))
    options = {"output_dir": str(directory), "activities": ["CPU", "GPU"], "with_stack": False}
    _post(f"{url}/start_profile", key, options if engine == "sglang" else None)
    work()
    _post(f"{url}/stop_profile", key)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in set(directory.rglob("*.json*")) - before:
            if _has_kernels(path):  # the front end writes one, too
                return path
        time.sleep(1)
    raise TimeoutError(f"{engine} wrote no trace to {directory}: it holds {sorted(directory.rglob('*'))}")


def profiler_flags(directory: Path) -> dict[str, Any]:
    """Of `vllm serve`."""
    config = {"profiler": "torch", "torch_profiler_dir": str(directory), "torch_profiler_with_stack": False}
    return {"profiler-config": json.dumps(config, separators=(",", ":"))}


def summarise(trace: Path) -> dict[str, Any]:
    """Milliseconds of the device, and what the host did in the longest gaps."""
    events = [event for event in _read(trace)["traceEvents"] if event.get("ph") == "X"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    copies = [event for event in events if event.get("cat") == "gpu_memcpy"]
    main_stream = _busiest_stream(kernels)
    busy = _union([_interval(event) for event in kernels if event["args"].get("stream") == main_stream])
    begin, end = busy[0][0], busy[-1][1]
    gaps = [(one[1], two[0]) for one, two in itertools.pairwise(busy) if two[0] - one[1] > _GAP_US]
    gaps.sort(key=lambda gap: gap[0] - gap[1])
    host = [
        event for event in events if event.get("cat") in ("cpu_op", "cuda_runtime", "cuda_driver", "user_annotation")
    ]
    return {
        "span_ms": (end - begin) / 1e3,
        "main_stream_busy_ms": sum(high - low for low, high in busy) / 1e3,
        "gaps_over_0.2_ms": len(gaps),
        "gaps_ms": sum(high - low for low, high in gaps) / 1e3,
        "other_streams_kernels_ms": sum(k["dur"] for k in kernels if k["args"].get("stream") != main_stream) / 1e3,
        "copies": _total(copies, lambda event: event["name"]),
        "copy_gb": sum(event["args"].get("bytes", 0) for event in copies) / 1e9,
        "kernels": _total(kernels, lambda event: event["name"][:70], 14),
        "longest_gaps": [
            {"ms": (high - low) / 1e3, "at_ms": (low - begin) / 1e3, "host": _during(host, low, high)}
            for low, high in gaps[:8]
        ],
    }


def print_summary(name: str, summary: dict[str, Any]) -> None:
    """One line a figure."""
    print(f"== {name}")
    for key, value in summary.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for what, (milliseconds, number) in value.items():
                print(f"  {milliseconds:10.2f} ms {number:6d} x {what}")
        elif isinstance(value, list):
            print(f"{key}:", *(json.dumps(one) for one in value), sep="\n  ")
        else:
            print(f"{key}: {value:,.3f}" if isinstance(value, float) else f"{key}: {value}")


def _post(url: str, key: str, body: dict[str, Any] | None = None) -> None:
    request = urllib.request.Request(url, b"" if body is None else json.dumps(body).encode(), method="POST")
    request.add_header("Authorization", f"Bearer {key}")
    if body is not None:
        request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=240) as response:
        response.read()


def _has_kernels(path: Path) -> bool:
    try:
        return any(event.get("cat") == "kernel" for event in _read(path)["traceEvents"])
    except (OSError, EOFError, ValueError):  # it is not written yet
        return False


def _read(path: Path) -> Any:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return json.load(file)


def _busiest_stream(kernels: Sequence[dict[str, Any]]) -> Any:
    times: dict[Any, float] = defaultdict(float)
    for kernel in kernels:
        times[kernel["args"].get("stream")] += kernel["dur"]
    return max(times, key=lambda stream: times[stream])


def _interval(event: dict[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _union(intervals: list[Interval]) -> list[Interval]:
    joined: list[Interval] = []
    for low, high in sorted(intervals):
        if joined and low <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return joined


def _total(
    events: Sequence[dict[str, Any]], name: Callable[[dict[str, Any]], str], most: int = 8
) -> dict[str, tuple[float, int]]:
    times: dict[str, float] = defaultdict(float)
    numbers: dict[str, int] = defaultdict(int)
    for event in events:
        times[name(event)] += event["dur"] / 1e3
        numbers[name(event)] += 1
    return {key: (times[key], numbers[key]) for key in sorted(times, key=lambda key: -times[key])[:most]}


def _during(events: Sequence[dict[str, Any]], low: float, high: float) -> list[str]:
    """The operations of the host that took most of this time, and how many milliseconds of it."""
    shares: dict[str, float] = defaultdict(float)
    for event in events:
        start, end = _interval(event)
        if start < high and end > low:
            shares[event["name"][:60]] += (min(end, high) - max(start, low)) / 1e3
    return [f"{name} {shares[name]:.1f}" for name in sorted(shares, key=lambda name: -shares[name])[:6]]


if __name__ == "__main__":
    for word in sys.argv[1:]:
        print_summary(word, summarise(Path(word)))
