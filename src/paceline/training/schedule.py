"""How many optimizer steps a run takes, and the learning rate of each."""

from __future__ import annotations

import math

from paceline.config.drafts import DraftConfig


def num_planned_steps(num_rows: int, rows_per_step: int, max_steps: int | None) -> int:
    """Optimizer steps for `num_rows` rows (all epochs); the last one may hold fewer rows than the others."""
    num_steps = math.ceil(num_rows / rows_per_step)
    return num_steps if max_steps is None else min(num_steps, max_steps)


def learning_rate(config: DraftConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `num_steps`.

    With W = ceil(warmup_ratio * num_steps), step s < W has lr * (s + 1) / W. Then "constant" stays at lr, "cosine"
    falls from lr at step W towards lr * min_lr_ratio, which it would reach at step `num_steps`: no step is wasted on
    a rate of 0.
    """
    # 0.07 * 100 is 7.000000000000001: without the rounding its warm-up would take 8 steps.
    num_warmup = math.ceil(round(config.warmup_ratio * num_steps, 6))
    if step < num_warmup:
        return config.lr * (step + 1) / num_warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * share)
