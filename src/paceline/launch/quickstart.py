"""`paceline quickstart`: the whole pipeline, small and real, on what every machine has.

Each part is the same function that its own command calls. A part that is done is noted in quickstart.json and not
done again; one that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from paceline.config.loading import build_config, dump_config
from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.data.stdlib_conversations import write_conversations
from paceline.errors import RunDirectoryError, StoppedError
from paceline.evaluation.report import DecodingRow, Report, SampleAnswer, write_report
from paceline.launch.evaluate import evaluate_run
from paceline.launch.export import export_run
from paceline.launch.prepare import prepare_data
from paceline.launch.regenerate import regenerate_data
from paceline.launch.run import open_run
from paceline.launch.signals import StopSignals
from paceline.launch.target_facts import known_facts
from paceline.launch.train import set_numerics, train
from paceline.observe.metrics import read_metrics
from paceline.target.hf.stored_tensors import read_tensor_table


@dataclass(frozen=True, slots=True)
class QuickstartSize:
    """How much is done."""

    conversations: int
    held_out: int
    max_new_tokens: int
    steps: int
    prompts: int


FULL = QuickstartSize(conversations=1200, held_out=100, max_new_tokens=96, steps=270, prompts=20)
SHORT = QuickstartSize(conversations=160, held_out=16, max_new_tokens=48, steps=12, prompts=4)
"""For tests of the pipeline: every part runs, the drafts learn little."""


@dataclass(slots=True)
class _Progress:
    """quickstart.json: seconds of every finished part, over all starts."""

    path: Path
    seconds: dict[str, float] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> _Progress:
        if not path.exists():
            return cls(path)
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, dict(facts["seconds"]), list(facts["done"]))
        except (ValueError, KeyError, TypeError) as error:
            raise RunDirectoryError(f"{path} is damaged ({error}): delete it to begin again") from error

    def add(self, part: str, seconds: float, done: bool) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        if done:
            self.done.append(part)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"seconds": self.seconds, "done": self.done}, indent=1), encoding="utf-8")
        temporary.replace(self.path)


def quickstart_config(directory: Path, target: Path, size: QuickstartSize) -> RunConfig:
    """What the quickstart runs: an EAGLE-3 and a DFlash draft in one run, from one stream."""
    return build_config(
        {
            "run_dir": str(directory),
            "target": {"model": str(target), "device": "cpu", "dtype": "float32"},
            "data": {
                "train": str(directory / "answers.jsonl"),
                "eval": str(directory / "held-out-answers.jsonl"),
                "row_tokens": 1024,
                "max_skipped_fraction": 0.5,
            },
            "regeneration": {"batch_size": 128, "max_new_tokens": size.max_new_tokens},
            "drafts": {
                "eagle3": {
                    "algorithm": "eagle3",
                    "num_depths": 3,
                    "vocab_size": 1024,
                    "lr": 2e-3,
                    "warmup_ratio": 0.05,
                },
                # Small blocks in one layer: a few minutes on a CPU teach no more.
                "dflash": {
                    "algorithm": "dflash",
                    "num_layers": 1,
                    "target_layers": [1, 3, 5, 6],
                    "block_size": 4,
                    "anchor_every": 4,
                    "lr": 3e-3,
                    "warmup_ratio": 0.05,
                },
            },
            "training": {
                "num_epochs": 100,
                "max_steps": size.steps,
                "dtype": "float32",
                "device": "cpu",
                # The target's thread and the trainer's take a core each; operations this small gain nothing from more.
                "num_threads": 1,
                "log_every": max(1, size.steps // 40),
                "eval_every": max(4, size.steps // 4),
                "checkpoint_every": max(4, size.steps // 4),
                "max_eval_rows": 4,
            },
            "evaluation": {"num_prompts": size.prompts, "max_new_tokens": size.max_new_tokens},
        },
        source="quickstart",
    )


def run_quickstart(directory: Path, signals: StopSignals, console: Console, short: bool = False) -> None:
    """Run every part that is not done yet; returns early when a signal came.

    Raises:
        PacelineError: a part failed; LosslessnessError if a draft changed the target's output.
    """
    directory.mkdir(parents=True, exist_ok=True)
    size = SHORT if short else FULL
    with as_file(files("paceline") / "quickstart_target") as target:
        config = quickstart_config(directory, target, size)
        open_run(config)
        set_numerics(config)
        (directory / "quickstart.toml").write_text(dump_config(config), encoding="utf-8")
        progress = _Progress.load(directory / "quickstart.json")
        run = RunDir(directory)
        results: dict[str, Any] = {}

        def train_part() -> bool:
            return train(config, signals, console).status == "finished"

        def evaluate_part() -> bool:
            evaluate_run(config, [], baselines=True)
            return True

        def export_part() -> bool:
            export_run(config, [])
            return True

        def report_part() -> bool:
            results["facts"] = _report(config, run, progress)
            return True

        parts: list[tuple[str, str, Callable[[], bool]]] = [
            ("conversations", "questions about your own standard library", lambda: _converse(directory, size)),
            ("regenerate", "the target writes the answers", lambda: _regenerate(config, directory, signals)),
            (
                "prepare",
                "loss masks, draft vocabulary, packed rows",
                lambda: _prepare(config, run),
            ),
            ("train", "an EAGLE-3 and a DFlash draft from one stream", train_part),
            ("evaluate", "real decoding of held-out prompts", evaluate_part),
            ("export", "published layouts, read back", export_part),
            ("report", "report.html", report_part),
        ]
        for name, what, do in parts:
            if name in progress.done and name != "report":
                console.print(f"{name}: done before ({progress.seconds[name]:.0f} s)", style="bold")
                continue
            console.print(f"{name}: {what}", style="bold")
            if not _run_part(name, do, progress, signals):
                console.print("stopped; run the same command again to go on")
                return
        _print_results(json.loads(run.evaluation.read_text(encoding="utf-8")), progress, run, console)


def _run_part(name: str, do: Callable[[], bool], progress: _Progress, signals: StopSignals) -> bool:
    """Whether the part ended by itself; its time is noted either way."""
    begin = time.monotonic()
    # Only training leaves anything to finish: the other parts resume from what is on disk.
    signals.grace_s = 8.0 if name == "train" else 1.0
    finished = False
    try:
        finished = do() and not signals.stop.is_set()
    except StoppedError:
        finished = False
    finally:
        progress.add(name, time.monotonic() - begin, finished)
    return finished


def _converse(directory: Path, size: QuickstartSize) -> bool:
    """Held-out prompts come from modules of their own, which neither target nor drafts ever see."""
    write_conversations(directory / "conversations.jsonl", "draft", size.conversations)
    write_conversations(directory / "held-out.jsonl", "held_out", size.held_out)
    return True


def _prepare(config: RunConfig, run: RunDir) -> bool:
    prepare_data(config, run, known_facts(config))
    return True


def _regenerate(config: RunConfig, directory: Path, signals: StopSignals) -> bool:
    for source, output in (("conversations", "answers"), ("held-out", "held-out-answers")):
        summary = regenerate_data(
            config, signals.stop, source=str(directory / f"{source}.jsonl"), output=directory / f"{output}.jsonl"
        )
        if summary.stopped:
            return False
    return True


def _report(config: RunConfig, run: RunDir, progress: _Progress) -> Report:
    facts = json.loads(run.evaluation.read_text(encoding="utf-8"))
    rows: list[DecodingRow] = []
    for name, figures in facts["drafts"].items():
        rows.append(DecodingRow(name, figures, trained=True))
        rows.append(DecodingRow(f"{name}, untrained", figures["untrained"]))
        rows.append(DecodingRow(f"prompt look-up (as many tokens as {name})", figures["lookup"]))
    millions = _num_weights(config) / 1e6
    report = Report(
        title="paceline quickstart",
        metrics=read_metrics(run.metrics),
        decoding=rows,
        samples=[SampleAnswer(one["prompt"], one["answer"]) for one in facts["samples"]],
        repeated_share=facts["repeated_4grams"],
        timings=progress.seconds,
        facts={
            "target": f"a Qwen3 of {millions:.1f} million weights, trained on Python's standard library",
            "run": config.run_dir,
        },
    )
    write_report(report, run.report)
    return report


def _num_weights(config: RunConfig) -> int:
    """Of the target, as stored: tied tensors once."""
    return sum(math.prod(tensor.shape) for tensor in read_tensor_table(Path(config.target.model)).values())


def _print_results(facts: dict[str, Any], progress: _Progress, run: RunDir, console: Console) -> None:
    table = Table(title="acceptance length on held-out prompts", box=None, title_justify="left")
    for heading in ("draft", "untrained", "trained", "prompt look-up", "most possible", "output"):
        table.add_column(heading, justify="left" if heading == "draft" else "right")
    for name, figures in facts["drafts"].items():
        cells = [figures["untrained"], figures, figures["lookup"]]
        table.add_row(
            name,
            *(f"{one['acceptance_length']:.2f}" if one["acceptance_length"] else "-" for one in cells),
            str(len(figures["rate"]) + 1),
            "identical to generate" if figures["lossless"] == "exact" else figures["lossless"],
        )
    console.print(table)
    console.print(f"repeated 4-grams in the target's answers: {facts['repeated_4grams']:.1%}")
    for sample in facts["samples"]:
        console.print(f"\n> {sample['prompt']}", style="dim")
        console.print(sample["answer"])
    console.print("\n" + ", ".join(f"{part} {seconds:.0f} s" for part, seconds in progress.seconds.items()))
    console.print(f"report: {run.report}")
