"""The same training on two GPUs: target and trainer on each of them, or a server on one and a trainer on the other.

    python benchmarks/make_random_target.py /tmp/target-8b
    python benchmarks/two_gpus.py /tmp/target-8b /tmp/two-gpus

Runs `paceline train` for each draft and placement, with the same rows in a step, and reads metrics.jsonl: tokens/s over
the steps after warm-up, what the run says limits it, and beside it what `paceline plan` had predicted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from paceline.data.stdlib_conversations import write_conversations
from paceline.observe.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
DRAFTS = {
    "eagle3": ['drafts.draft.algorithm="eagle3"', "drafts.draft.vocab_size=32000"],
    "dflash": ['drafts.draft.algorithm="dflash"'],
}
PLACEMENTS = {
    "inline, 2 trainers": ["placement.num_trainers=2"],
    "1 server, 1 trainer": ["placement.target=servers"],
    "inline, 2 trainers, sharded": ["placement.num_trainers=2", "training.sharding=full"],
}
CONFIG = """
run_dir = "{work}/run"
[target]
model = "{target}"
dtype = "bfloat16"
compile = true
[data]
train = "{work}/conversations.jsonl"
row_tokens = 8192
min_supervised_tokens = 8
max_skipped_fraction = 0.9
cache_dir = "{work}/prepared"
[drafts.draft]
algorithm = "eagle3"
[training]
num_epochs = 100
rows_per_step = 2
compile = true
log_every = 4
eval_every = 0
checkpoint_every = 0
max_eval_rows = 2
"""


def paceline(*words: str) -> str:
    """Output of a command that must succeed."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "paceline.cli", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        )
    return done.stdout


def measure(config: Path, draft: str, placement: str, arguments: argparse.Namespace) -> None:
    """Train, and print one line of the table, with the verdict below it."""
    run_dir = arguments.work / f"{draft}-{placement}".replace(" ", "-").replace(",", "")
    words = [f"run_dir={run_dir}", *DRAFTS[draft], *PLACEMENTS[placement], f"training.max_steps={arguments.steps}"]
    paceline("prepare", str(config), *words)
    plan = paceline("plan", str(config), *words).splitlines()
    predicted = [
        line for line in plan if line.startswith(("prediction", "a trainer:", "a server:", "the run:", "any "))
    ]
    begin = time.monotonic()
    paceline("train", str(config), *words)
    wall_s = time.monotonic() - begin
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train"]
    lines = [line for line in lines if line["step"] > arguments.warm_up]
    seconds = [line["seconds"]["step"] for line in lines]
    tokens = sum(line["tokens"] for line in lines) / len(lines)
    rate = statistics.median(line["tokens_per_s"] for line in lines)
    waiting = sum(line["seconds"].get("data_wait", 0.0) for line in lines) / sum(seconds)
    share = sum(line["supervised_tokens"] for line in lines) / sum(line["tokens"] for line in lines)
    spread = f"{min(line['tokens_per_s'] for line in lines):,.0f}-{max(line['tokens_per_s'] for line in lines):,.0f}"
    cells = [draft, placement, f"{rate:,.0f}", spread, f"{rate / 2:,.0f}", f"{waiting:.0%}", f"{tokens:,.0f}"]
    cells += [f"{share:.0%}", f"{wall_s:.0f}", lines[-1].get("balance", {}).get("text", "")]
    print("| " + " | ".join(cells) + " |", flush=True)
    for line in predicted:
        print("  plan:", line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--warm-up", type=int, default=8, help="steps that are not counted")
    parser.add_argument("--drafts", nargs="+", default=list(DRAFTS))
    parser.add_argument("--placements", nargs="+", default=list(PLACEMENTS)[:2])
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    write_conversations(arguments.work / "conversations.jsonl", "draft")
    config = arguments.work / "config.toml"
    config.write_text(CONFIG.format(work=arguments.work, target=arguments.target))
    headings = ["draft", "placement", "tokens/s", "spread", "tokens/s/GPU", "waits for rows", "tokens/step"]
    headings += ["supervised", "wall s", "verdict"]
    print("| " + " | ".join(headings) + " |\n|" + "---|" * len(headings))
    for draft in arguments.drafts:
        for placement in arguments.placements:
            measure(config, draft, placement, arguments)


if __name__ == "__main__":
    main()
