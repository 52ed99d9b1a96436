"""What a step leaves behind: losses that stay on the device until they are read, and times that are read with them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from paceline.drafts.interface import LossTerms
from paceline.errors import PacelineError
from paceline.observe.balance import BalanceWindow, across_ranks, judge
from paceline.observe.metrics import Line
from paceline.observe.spans import Spans
from paceline.schema.rows import Row
from paceline.training.ranks import Ranks

Mark = float | torch.cuda.Event
N = TypeVar("N", int, float)


class DeviceClock:
    """Moments on the device's own time line: recorded without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def mark(self) -> Mark:
        """The moment at which the device has done all work given to it so far."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def seconds(start: Mark, end: Mark) -> float:
        """Seconds from `start` to `end`; on a GPU only after the device has passed `end`."""
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            return float(start.elapsed_time(end)) / 1e3
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start


class LossSums:
    """One draft's loss over the rows of a step: sums and weights, added in fp32 on the device (N11)."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros((), device=device)
        self.weight = torch.zeros((), device=device)
        self.metrics: dict[str, Tensor] = {}

    def add(self, terms: LossTerms) -> None:
        """Take in one row's terms; keeps no graph."""
        self.total += terms.total.detach()
        self.weight += terms.weight
        for name, sums in terms.metrics.items():
            self.metrics[name] = self.metrics[name] + sums if name in self.metrics else sums


@dataclass(slots=True)
class StepRecord:
    """One optimizer step, as the trainer fills it in."""

    step: int
    """Optimizer steps done, this one included."""
    num_rows: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Host times: data_wait, step."""
    marks: list[tuple[str, Mark, Mark]] = field(default_factory=list)
    """Device times: forward, backward, optimizer."""
    sums: dict[str, LossSums] = field(default_factory=dict)
    """By draft."""
    grad_norms: dict[str, Tensor] = field(default_factory=dict)
    learning_rates: dict[str, float] = field(default_factory=dict)
    stream: dict[str, float] = field(default_factory=dict)
    """What the stream told at the end of the step."""

    def count(self, row: Row) -> None:
        """Take in the sizes of a row that this rank trains (the first part of it, where several train it)."""
        self.num_rows += 1
        self.num_tokens += row.num_tokens
        self.num_supervised += row.num_supervised


@dataclass(frozen=True, slots=True)
class _Read:
    """A step's figures on the host: of one rank, then of all."""

    sizes: dict[str, int]
    """Rows, tokens and supervised tokens; over ranks they add up."""
    seconds: dict[str, float]
    """Over ranks: the mean."""
    stream: dict[str, float]
    """Over ranks: the sum."""
    losses: dict[str, list[float]]
    """By draft: the total loss and every metric, end to end; over ranks they add up."""


class StepLog:
    """Records of the steps since the last reading; `read` is the one place that waits for the device."""

    def __init__(self, zero_weight_steps: dict[str, int], ranks: Ranks) -> None:
        self._ranks = ranks
        self.zero_weight_steps = dict(zero_weight_steps)
        """By draft: steps read so far that had no weight and changed nothing."""
        self._records: list[StepRecord] = []
        self._interval_start = time.perf_counter()
        self._last_streams: list[dict[str, float]] = [{} for _ in range(ranks.num_ranks)]
        """By rank: the stream's figures when the last interval ended."""

    def restart_interval(self) -> None:
        """Leave the time since the last step out of the next tokens/s (evaluation, a checkpoint)."""
        assert not self._records
        self._interval_start = time.perf_counter()

    def append(self, record: StepRecord) -> None:
        """Keep a finished step."""
        self._records.append(record)

    def read(self) -> Iterator[Line]:
        """One line of metrics for each step since the last call, ordered by step; of all ranks, on each of them.

        The last of them has the verdict on who held up whom since the last call.

        Raises:
            PacelineError: a loss or a gradient norm is not finite; names the step and the draft, after the lines of
                the steps before it.
        """
        records, self._records = self._records, []
        if not records:
            return
        shared, own = _read_numbers(records)
        everyone = self._ranks.gather(own)
        interval_s = max(time.perf_counter() - self._interval_start, 1e-9)
        steps = [_of_all_ranks([reads[number] for reads in everyone]) for number in range(len(records))]
        tokens_per_s = sum(step.sizes["tokens"] for step in steps) / interval_s
        self._interval_start = time.perf_counter()
        verdict = self._judge(everyone, interval_s)
        for record, read in zip(records, steps, strict=True):
            line = self._line(record, read, shared, tokens_per_s)
            yield line | verdict if record is records[-1] else line

    def _judge(self, everyone: list[list[_Read]], interval_s: float) -> Line:
        """`balance` of an interval, from what each rank measured; nothing where streams do not tell about servers."""
        before, self._last_streams = self._last_streams, [reads[-1].stream for reads in everyone]
        if not all("sessions" in stream for stream in self._last_streams):
            return {}
        windows = []
        for reads, old, new in zip(everyone, before, self._last_streams, strict=True):
            seconds = _sum_by_name([read.seconds for read in reads])
            windows.append(
                BalanceWindow(
                    wall_s=interval_s,
                    tokens=sum(read.sizes["tokens"] for read in reads),
                    data_wait_s=seconds.get("data_wait", 0.0),  # a rank may have had no row
                    busy_s=sum(seconds.get(span, 0.0) for span in ("forward", "backward", "optimizer")),
                    num_bytes=new["bytes_received"] - old.get("bytes_received", 0.0),
                    target_tokens=new["target_tokens"] - old.get("target_tokens", 0.0),
                    target_s=new["target_s"] - old.get("target_s", 0.0),
                    server_s=interval_s * _num_sessions([old, *(read.stream for read in reads)]),
                )
            )
        verdict = judge(across_ranks(windows), len(windows))
        return {} if verdict is None else {"balance": verdict.to_line()}

    def _line(self, record: StepRecord, read: _Read, shared: Iterator[float], tokens_per_s: float) -> Line:
        drafts = {}
        for name, sums in record.sums.items():
            weight, norm = next(shared), next(shared)
            total, *numbers = read.losses[name]
            metrics = iter(numbers)
            loss = total / weight if weight else None
            _check_finite(record.step, name, total, norm)
            self.zero_weight_steps[name] = self.zero_weight_steps.get(name, 0) + (weight == 0)
            drafts[name] = {
                "loss": loss,
                "weight": weight,
                "lr": record.learning_rates[name],
                "grad_norm": norm,
                "zero_weight_steps": self.zero_weight_steps[name],
                "per_position": {
                    metric: _ratios([next(metrics) for _ in range(vector.numel())])
                    for metric, vector in sums.metrics.items()
                },
            }
        return {
            "step": record.step,
            **read.sizes,
            "tokens_per_s": tokens_per_s,
            "seconds": read.seconds,
            "stream": read.stream,
            "drafts": drafts,
        }


def _num_sessions(streams: Sequence[Mapping[str, float]]) -> float:
    """The last number that is not 0: a run that is stopped closes its sessions before its last step is told of."""
    return next((told for stream in reversed(streams) if (told := stream.get("sessions", 0.0))), 0.0)


def _read_numbers(records: list[StepRecord]) -> tuple[Iterator[float], list[_Read]]:
    """All device numbers of all records in one copy: per draft weight and norm, the same on all ranks; this rank's."""
    shared = [
        vector
        for record in records
        for name in record.sums
        for vector in (record.sums[name].weight, record.grad_norms[name])
    ]
    own = [
        vector.reshape(-1).float()
        for record in records
        for sums in record.sums.values()
        for vector in (sums.total, *sums.metrics.values())
    ]
    numbers: list[float] = torch.cat([torch.stack(shared).float(), *own]).tolist()
    rest = iter(numbers[len(shared) :])
    return iter(numbers[: len(shared)]), [_read_record(record, rest) for record in records]


def _read_record(record: StepRecord, numbers: Iterator[float]) -> _Read:
    spans = Spans()
    for name, start, end in record.marks:
        spans.add(name, DeviceClock.seconds(start, end))
    sizes = {"rows": record.num_rows, "tokens": record.num_tokens, "supervised_tokens": record.num_supervised}
    losses = {
        name: [next(numbers) for _ in range(1 + sum(vector.numel() for vector in sums.metrics.values()))]
        for name, sums in record.sums.items()
    }
    return _Read(sizes, record.seconds | spans.take(), record.stream, losses)


def _of_all_ranks(reads: list[_Read]) -> _Read:
    if len(reads) == 1:
        return reads[0]
    seconds = _sum_by_name([read.seconds for read in reads])
    losses = [read.losses for read in reads]
    return _Read(
        _sum_by_name([read.sizes for read in reads]),
        {name: total / len(reads) for name, total in seconds.items()},
        _sum_by_name([read.stream for read in reads]),
        {name: [sum(column) for column in zip(*(loss[name] for loss in losses), strict=True)] for name in losses[0]},
    )


def _sum_by_name(tables: list[dict[str, N]]) -> dict[str, N]:
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: sum(table[name] for table in tables if name in table) for name in names}


def _ratios(sums_and_counts: list[float]) -> list[float | None]:
    half = len(sums_and_counts) // 2
    return [
        total / count if count else None
        for total, count in zip(sums_and_counts[:half], sums_and_counts[half:], strict=True)
    ]


def _check_finite(step: int, draft: str, loss: float, norm: float) -> None:
    for what, value in (("loss", loss), ("gradient norm", norm)):
        if not abs(value) < float("inf"):
            raise PacelineError(
                f"step {step}: the {what} of draft {draft!r} is {value}. The step was not applied and no checkpoint "
                f"was written since: lower drafts.{draft}.lr, or look at the rows of this step"
            )
