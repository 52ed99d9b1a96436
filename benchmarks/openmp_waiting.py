"""What OpenMP's waiting policy costs beside another busy program: seconds to generate with the quickstart's target.

    python benchmarks/openmp_waiting.py

Each figure is a process of its own (the policy is read when torch is imported), with one busy process beside it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "src" / "paceline" / "quickstart_target"
GENERATE = f"""
import time, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(TARGET)!r}, dtype=torch.float32).eval()
prompts = torch.randint(3, 3000, (32, 20))
begin = time.perf_counter()
with torch.no_grad():
    model.generate(prompts, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0)
print(time.perf_counter() - begin)
"""


def seconds(settings: dict[str, str]) -> float:
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **settings}
    done = subprocess.run([sys.executable, "-c", GENERATE], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    cases = {"unset": {}, "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}, "one thread": {"OMP_NUM_THREADS": "1"}}
    for beside in (0, 1):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
        try:
            for name, settings in cases.items():
                taken = sorted(seconds(settings) for _ in range(3))
                print(
                    f"{beside} busy beside, {name}: {statistics.median(taken):.2f} s ({taken[0]:.2f}-{taken[-1]:.2f})"
                )
        finally:
            for process in busy:
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
