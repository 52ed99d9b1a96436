#!/usr/bin/env bash
# Trains both drafts against a Qwen3-8B-shaped random target on one GPU, with the same command a user types.
#   benchmarks/train_8b.sh WORK_DIRECTORY [STEPS]
set -euo pipefail
cd "$(dirname "$0")/.."
work=$1
steps=${2:-30}
export PYTHONPATH=src:${PYTHONPATH:-} HF_HUB_OFFLINE=1
mkdir -p "$work"
time python3 benchmarks/make_random_target.py "$work/target"
python3 - "$work/conversations.jsonl" <<'PYTHON'
import sys
from pathlib import Path

from paceline.data.stdlib_conversations import write_conversations

print(write_conversations(Path(sys.argv[1]), "draft"), "conversations")
PYTHON
time python3 -m paceline.cli train recipes/qwen3-8b-both.toml run_dir="$work/run" target.model="$work/target" \
  data.train="$work/conversations.jsonl" data.eval=none data.min_supervised_tokens=8 \
  data.max_skipped_fraction=0.9 data.row_tokens=8192 drafts.eagle3.vocab_size=32000 \
  training.max_steps="$steps" training.log_every=5 training.eval_every="$steps" training.checkpoint_every="$steps" \
  training.max_eval_rows=2 training.compile=true target.compile=true training.rows_per_step=2
tail -n 3 "$work/run/metrics.jsonl"
