"""Whether drafts learn the same through another engine as through `hf`: two runs on the same rows, loss by loss.

    python benchmarks/engine_losses.py src/paceline/quickstart_target /tmp/losses --python /opt/vllm/bin/python \\
        -- --enforce-eager --max-model-len 2048

Trains an EAGLE-3 and a DFlash draft twice at the same time on one device: with the target inline in transformers, and
with a server that starts the engine. Exits with 1 where the mean losses of the last quarter differ by more than
--tolerance: features of two engines in bf16 differ by 1 to 2 %.
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
row_tokens = 1024
min_supervised_tokens = 8
max_skipped_fraction = 0.9
cache_dir = "{work}/prepared"
[drafts.eagle3]
algorithm = "eagle3"
num_depths = 3
vocab_size = 1024
lr = 2e-3
[drafts.dflash]
algorithm = "dflash"
num_layers = 1
target_layers = [1, 3, 5, 6]
block_size = 4
anchor_every = 4
lr = 3e-3
[training]
num_epochs = 100
max_steps = {steps}
dtype = "{dtype}"
device = "{device}"
log_every = 1
eval_every = 0
checkpoint_every = 0
max_eval_rows = 2
"""


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "paceline.cli", *words]


def words_of_engine(arguments: argparse.Namespace, flags: list[str]) -> list[str]:
    table = ", ".join(f"{json.dumps(name)} = {json.dumps(value)}" for name, value in parse_flags(flags).items())
    python = [f"target.engine_python={arguments.python}"] if arguments.python else []
    return [
        *(f"target.engine={arguments.engine}", *python, f"target.engine_args={{{table}}}"),
        *("placement.target=servers", f'placement.server_devices=["{arguments.device}"]'),
        *(f'placement.trainer_devices=["{arguments.device}"]', "transport.kind=http"),
    ]


def losses(run_dir: Path) -> dict[str, list[float]]:
    """Of every step, by draft."""
    found: dict[str, list[float]] = {}
    for line in read_metrics(run_dir / "metrics.jsonl"):
        if line["kind"] == "train":
            for draft, figures in line["drafts"].items():
                found.setdefault(draft, []).append(figures["loss"])
    return found


def train_both(arguments: argparse.Namespace, flags: list[str]) -> dict[str, dict[str, list[float]]]:
    """Losses by engine and draft; what the runs print is kept in the work directory."""
    config = str(arguments.work / "config.toml")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run(command("prepare", config), env=environment, check=True, stdout=subprocess.DEVNULL)
    begin = time.monotonic()
    runs = {}
    for engine, engine_words in (("hf", []), (arguments.engine, words_of_engine(arguments, flags))):
        with (arguments.work / f"{engine}.log").open("wb") as log:
            words = [config, f"run_dir={arguments.work / engine}", *engine_words]
            runs[engine] = subprocess.Popen(
                command("train", *words), env=environment, stdout=log, stderr=subprocess.STDOUT
            )
    for engine, process in runs.items():
        code = process.wait()
        print(f"{engine}: exit code {code} after {time.monotonic() - begin:.0f} s", flush=True)
        if code:
            print((arguments.work / f"{engine}.log").read_text(errors="replace")[-6000:], flush=True)
    if any(process.returncode for process in runs.values()):
        raise SystemExit("a run failed")
    return {engine: losses(arguments.work / engine) for engine in runs}


def compare(found: dict[str, dict[str, list[float]]], arguments: argparse.Namespace) -> bool:
    """Whether all drafts agree; prints a line of JSON for each."""
    agree = True
    for draft, ours in found["hf"].items():
        theirs = found[arguments.engine][draft]
        assert len(ours) == len(theirs) == arguments.steps, (draft, len(ours), len(theirs))
        differences = [abs(one - other) / abs(one) for one, other in zip(ours, theirs, strict=True)]
        quarter = -max(1, len(ours) // 4)
        ends = [statistics.fmean(values[quarter:]) for values in (ours, theirs)]
        apart = abs(ends[0] - ends[1]) / abs(ends[0])
        agree &= apart <= arguments.tolerance
        line = {
            "draft": draft,
            "steps": len(ours),
            "first_loss": [ours[0], theirs[0]],
            "last_quarter": ends,
            "last_quarter_differs_by": apart,
            "step_differs_by_mean": statistics.fmean(differences),
            "step_differs_by_at_most": max(differences),
            "tolerance": arguments.tolerance,
        }
        print(json.dumps(line), flush=True)
        if arguments.out is not None:
            with arguments.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
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
    parser.add_argument("--tolerance", type=float, default=0.03, help="of the last quarter's mean loss, relative")
    parser.add_argument("--out", type=Path, help="JSON lines")
    words, _, flags = (" ".join(sys.argv[1:])).partition(" -- ")  # the engine's own options come after --
    arguments = parser.parse_args(words.split())
    arguments.work.mkdir(parents=True, exist_ok=True)
    write_conversations(arguments.work / "conversations.jsonl", "draft")
    (arguments.work / "config.toml").write_text(CONFIG.format(**vars(arguments)))
    if not compare(train_both(arguments, flags.split()), arguments):
        raise SystemExit("the losses differ by more than the tolerance")


if __name__ == "__main__":
    main()
