"""Whether drafts learn the same through another engine as through `hf`: two runs on the same rows, loss by loss.

    python benchmarks/engine_losses.py src/paceline/quickstart_target /tmp/losses --python /opt/vllm/bin/python \\
        -- --enforce-eager --max-model-len 2048
    python benchmarks/engine_losses.py /tmp/target-8b /tmp/losses-8b --large --server-device cuda:0 \\
        --trainer-device cuda:1 --python /opt/vllm/bin/python -- --max-model-len 8192

Trains an EAGLE-3 and a DFlash draft twice at the same time on one device: with the target inline in transformers, and
with a server that starts the engine. Exits with 1 where the mean losses of the last quarter differ by more than
--tolerance: features of two engines in bf16 differ by 1 to 2 %. A run whose directory is there is not made again, and
`--only` makes one of the two: so several engines are compared with one run of `hf`.

With --large drafts have their default shapes, rows 8,192 tokens, layers are compiled; the runs follow each other, both
with a server and a trainer on the devices named, and their tokens/s and bytes/s are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from paceline.data.stdlib_conversations import write_conversations
from paceline.observe.metrics import read_metrics
from paceline.target.engines.flags import parse_flags
from paceline.target.opening import ENGINES

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
run_dir = "{work}/run"
[target]
model = "{target}"
dtype = "{dtype}"
device = "{device}"
[data]
train = "{work}/conversations.jsonl"
row_tokens = {row_tokens}
min_supervised_tokens = 8
max_skipped_fraction = 0.9
cache_dir = "{work}/prepared"
[drafts.eagle3]
algorithm = "eagle3"
{eagle3}
[drafts.dflash]
algorithm = "dflash"
{dflash}
[training]
num_epochs = 100
max_steps = {steps}
dtype = "{dtype}"
device = "{device}"
log_every = {log_every}
eval_every = 0
checkpoint_every = 0
max_eval_rows = 2
"""
SMALL = {
    "row_tokens": 1024,
    "log_every": 1,
    "eagle3": "num_depths = 3\nvocab_size = 1024\nlr = 2e-3",
    "dflash": "num_layers = 1\ntarget_layers = [1, 3, 5, 6]\nblock_size = 4\nanchor_every = 4\nlr = 3e-3",
}
LARGE = {"row_tokens": 8192, "log_every": 10, "eagle3": "", "dflash": ""}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "paceline.cli", *words]


def words_of_placement(arguments: argparse.Namespace) -> list[str]:
    return [
        *("placement.target=servers", f'placement.server_devices=["{arguments.server_device or arguments.device}"]'),
        f'placement.trainer_devices=["{arguments.trainer_device or arguments.device}"]',
        "transport.kind=http",
    ]


def words_of_runs(arguments: argparse.Namespace, flags: list[str]) -> dict[str, list[str]]:
    """What each engine's run is told."""
    table = ", ".join(f"{json.dumps(name)} = {json.dumps(value)}" for name, value in parse_flags(flags).items())
    python = [f"target.engine_python={arguments.python}"] if arguments.python else []
    engine = [f"target.engine={arguments.engine}", *python, f"target.engine_args={{{table}}}"]
    placement = words_of_placement(arguments)
    compiled = arguments.large and not arguments.eager
    drafts = ["training.compile=true"] if compiled else []
    hf = [*(placement if arguments.large else []), *(["target.compile=true"] if compiled else [])]
    return {"hf": [*drafts, *hf], arguments.engine: [*drafts, *engine, *placement]}


def run_directory(arguments: argparse.Namespace, engine: str) -> Path:
    return Path(arguments.work / engine)


def losses(run_dir: Path) -> dict[str, list[float]]:
    """Of every step, by draft."""
    found: dict[str, list[float]] = {}
    for line in read_metrics(run_dir / "metrics.jsonl"):
        if line["kind"] == "train":
            for draft, figures in line["drafts"].items():
                found.setdefault(draft, []).append(figures["loss"])
    return found


def prepare(arguments: argparse.Namespace) -> Path:
    """The configuration of all runs, with their data prepared once."""
    data, config = arguments.work / "conversations.jsonl", Path(arguments.work / "config.toml")
    if not data.exists():
        write_conversations(data, "draft")
        config.write_text(CONFIG.format(**vars(arguments), **(LARGE if arguments.large else SMALL)))
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
        subprocess.run(command("prepare", str(config)), env=environment, check=True, stdout=subprocess.DEVNULL)
    return config


def train(arguments: argparse.Namespace, flags: list[str]) -> None:
    """Make the runs that are not there yet; what they print is kept in the work directory."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    begin, runs = time.monotonic(), {}
    for engine, words in words_of_runs(arguments, flags).items():
        if run_directory(arguments, engine).exists() or arguments.only not in (None, engine):
            continue
        all_words = [str(arguments.config), f"run_dir={run_directory(arguments, engine)}", *words]
        with (arguments.work / f"{engine}.log").open("wb") as log:
            runs[engine] = subprocess.Popen(
                command("train", *all_words), env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        if arguments.large:
            runs[engine].wait()
    for engine, process in runs.items():
        code = process.wait()
        print(f"{engine}: exit code {code}, all {time.monotonic() - begin:.0f} s", flush=True)
        if code:
            print((arguments.work / f"{engine}.log").read_text(errors="replace")[-6000:], flush=True)
        else:
            describe(arguments, engine)
    if any(process.returncode for process in runs.values()):
        raise SystemExit("a run failed")


def describe(arguments: argparse.Namespace, engine: str) -> None:
    """Print a run's speed after its first third, in which layers are compiled."""
    lines = [
        line for line in read_metrics(run_directory(arguments, engine) / "metrics.jsonl") if line["kind"] == "train"
    ]
    counted = lines[len(lines) // 3 :]
    tokens = sum(line["tokens"] for line in counted[1:])
    received = [line["stream"].get("bytes_received", 0.0) for line in counted]
    rate = statistics.median(line["tokens_per_s"] for line in counted)
    per_token = (received[-1] - received[0]) / max(1, tokens)
    figures = {
        "engine": engine,
        "tokens_per_s": rate,
        "lowest": min(line["tokens_per_s"] for line in counted),
        "highest": max(line["tokens_per_s"] for line in counted),
        "tokens_per_step": tokens / max(1, len(counted) - 1),
        "bytes_per_token": per_token,
        "bytes_per_s": per_token * rate,
        "balance": next((line["balance"]["text"] for line in reversed(lines) if "balance" in line), None),
    }
    write(arguments, figures)


def write(arguments: argparse.Namespace, figures: dict[str, object]) -> None:
    """One line of JSON, on the screen and in --out."""
    print(json.dumps(figures), flush=True)
    if arguments.out is not None:
        with arguments.out.open("a") as file:
            file.write(json.dumps(figures) + "\n")


def compare(found: dict[str, dict[str, list[float]]], arguments: argparse.Namespace) -> bool:
    """Whether all drafts agree; prints a line of JSON for each."""
    agree = True
    for draft in found["hf"]:
        both = [found[engine][draft] for engine in ("hf", arguments.engine)]
        steps = min(map(len, both))
        assert steps == arguments.steps or arguments.partial, (draft, *map(len, both), "of runs cut off: --partial")
        ours, theirs = (one[:steps] for one in both)
        differences = [abs(one - other) / abs(one) for one, other in zip(ours, theirs, strict=True)]
        quarter = -max(1, len(ours) // 4)
        ends = [statistics.fmean(values[quarter:]) for values in (ours, theirs)]
        apart = abs(ends[0] - ends[1]) / abs(ends[0])
        agree &= apart <= arguments.tolerance
        line: dict[str, object] = {
            "engine": arguments.engine,
            "draft": draft,
            "steps": len(ours),
            "first_loss": [ours[0], theirs[0]],
            "last_quarter": ends,
            "last_quarter_differs_by": apart,
            "step_differs_by_mean": statistics.fmean(differences),
            "step_differs_by_at_most": max(differences),
            "tolerance": arguments.tolerance,
        }
        write(arguments, line)
    return agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="of at least 8 layers")
    parser.add_argument("work", type=Path)
    parser.add_argument("--engine", default="vllm", choices=list(ENGINES))
    parser.add_argument("--python", help="that has the engine; this one without")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--large", action="store_true", help="drafts of their default shapes: for a target of 8B")
    parser.add_argument("--eager", action="store_true", help="compile nothing, with --large")
    parser.add_argument("--server-device", help="of the engine's server; --device without")
    parser.add_argument("--trainer-device", help="of the trainer that it serves; --device without")
    parser.add_argument("--only", help="make this run alone, hf or the engine's; compare when both are there")
    parser.add_argument("--partial", action="store_true", help="compare the steps that both made, of runs cut off")
    parser.add_argument("--tolerance", type=float, default=0.03, help="of the last quarter's mean loss, relative")
    parser.add_argument("--out", type=Path, help="JSON lines")
    words, _, flags = (" ".join(sys.argv[1:])).partition(" -- ")  # the engine's own options come after --
    arguments = parser.parse_args(words.split())
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.config = prepare(arguments)
    train(arguments, flags.split())
    if not all(run_directory(arguments, engine).exists() for engine in ("hf", arguments.engine)):
        return
    if not compare(
        {engine: losses(run_directory(arguments, engine)) for engine in ("hf", arguments.engine)}, arguments
    ):
        raise SystemExit("the losses differ by more than the tolerance")


if __name__ == "__main__":
    main()
