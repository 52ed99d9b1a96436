"""Results as tables and progress bars."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from paceline.config.run import RunConfig
    from paceline.data.prepared import PreparedData
    from paceline.data.regeneration import RegenerationSummary
    from paceline.launch.doctor import Finding
    from paceline.launch.evaluate import Evaluation
    from paceline.launch.plan import PlannedProcess
    from paceline.target.selftest.run import SelfTestResult


class RegenerationProgress:
    """A line that counts answers while they are written."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("regenerating")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, summary: RegenerationSummary) -> None:
        """Show the counts so far."""
        done = summary.num_answered + summary.num_failed
        self._progress.update(self._task, description=f"regenerating: {done:,} answered, {summary.num_tokens:,} tokens")


def regeneration_table(summary: RegenerationSummary) -> Table:
    """in = out + failed, and where both lie."""
    table = _table("regenerated", "")
    table.add_row("conversations read", f"{summary.num_read:,}")
    table.add_row("answered", f"{summary.num_answered:,}")
    table.add_row("  of them before", f"{summary.num_reused:,}")
    table.add_row("  cut by the length limit", f"{summary.num_truncated:,}")
    for reason, count in sorted(summary.failed.items()):
        table.add_row(f"failed: {reason}", f"{count:,}")
    table.add_row("output", str(summary.output))
    return table


def prepare_table(prepared: PreparedData, config: RunConfig, num_target: int) -> list[Table]:
    """Samples, tokens, fill and skips of both splits; coverage of each draft's vocabulary out of `num_target`."""
    from paceline.data.summary import prepare_table as prepare_rows
    from paceline.drafts.vocabulary import build_vocabulary

    header, *rows = prepare_rows(prepared.summary, prepared.train_plan, prepared.eval_plan)
    samples = _table(*(header[0] or "prepared", *header[1:]))
    for row in rows:
        samples.add_row(*row)
    drafts = _table("draft", "vocabulary", "coverage of supervised tokens")
    for name, draft in config.drafts.items():
        vocabulary = build_vocabulary(prepared.token_counts, getattr(draft, "vocab_size", 0), num_target)
        coverage = vocabulary.coverage(prepared.token_counts)
        drafts.add_row(name, f"{vocabulary.size:,} of {num_target:,}", f"{coverage:.2%}")
    return [samples, drafts]


def evaluation_tables(evaluation: Evaluation) -> list[Table]:
    """Acceptance length, speed and losslessness of every draft."""
    table = _table("decoded", "acceptance length", "all steps", "greedy walk", "tokens/s", "speed-up", "lossless")
    for name, figures in evaluation.drafts.items():
        table.add_row(name, *_decoding_cells(figures))
        for baseline in ("untrained", "lookup"):
            if baseline in figures:
                table.add_row(f"  {baseline}", *_decoding_cells(figures[baseline]))
    rates = _table("right at position, if reached", *(str(k + 1) for k in range(_most_positions(evaluation))))
    for name, figures in evaluation.drafts.items():
        rates.add_row(name, *(_number(rate, 2) for rate in figures["rate"]))
    return [table, rates]


def doctor_table(findings: list[Finding]) -> Table:
    """What works, what does not, and what to do."""
    table = _table("", "", "")
    for finding in findings:
        table.add_row(Text("ok", "green") if finding.works else Text("no", "yellow"), finding.what, finding.detail)
    return table


def selftest_table(result: SelfTestResult) -> Table:
    """Layer by layer, how far an engine is from transformers."""
    table = _table("", "compared", "relative error", "cosine", "the worst of")
    for line in result.lines:
        mark = Text("ok", "green") if line.works else Text("no", "red")
        table.add_row(mark, line.name, f"{line.relative:.2e}", f"{line.cosine:.6f}", line.text)
    wrong = f"{result.num_wrong_tokens} of {result.num_judged_tokens} wrong"
    table.add_row(Text("no", "red") if result.num_wrong_tokens else Text("ok", "green"), "greedy tokens", wrong, "", "")
    table.caption = f"{result.tolerance}; transformers in {result.reference_dtype}"
    return table


def _decoding_cells(figures: dict[str, Any]) -> list[str]:
    walk = figures.get("walk")
    return [
        _number(figures["acceptance_length"], 2),
        _number(figures["acceptance_length_all"], 2),
        _number(walk["acceptance_length"], 2) if walk else "-",
        _number(figures["tokens_per_s"], 0),
        _number(figures["speedup"], 2),
        figures["lossless"] + (f", {figures['ties']} ties" if figures["ties"] else ""),
    ]


def _most_positions(evaluation: Evaluation) -> int:
    return max((len(figures["rate"]) for figures in evaluation.drafts.values()), default=0)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(Text(first))
    for name in others:
        table.add_column(Text(name), justify="right" if first else "left")
    return table


def plan_table(processes: list[PlannedProcess]) -> Table:
    """The processes of a run."""
    table = Table("process", "devices", "address", "started by", "work", title="Processes")
    for one in processes:
        table.add_row(one.name, "+".join(one.devices), one.address, one.started_by, one.work)
    return table
