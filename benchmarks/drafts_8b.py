"""`eagle3-8b` and `dflash-8b`: forward + backward of a draft's loss from ready features, on one GPU.

    python benchmarks/drafts_8b.py eagle3 dflash

Prints a table: tokens/s, anchors/s, peak memory, the difference to an fp32 reference; medians of --repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from paceline.config.drafts import DFlashConfig, Eagle3Config
from paceline.drafts.interface import DraftAlgorithm, DraftContext, TargetWeights
from paceline.drafts.registry import load_algorithm
from paceline.drafts.vocabulary import DraftVocabulary
from paceline.schema.features import FeatureRow
from paceline.schema.target_info import TargetInfo
from shapes import RandomTargetWeights, random_features, random_row, target_8b

GIB = 2**30


def build(
    name: str,
    info: TargetInfo,
    device: torch.device,
    dtype: torch.dtype,
    arguments: argparse.Namespace,
    weights: TargetWeights | None = None,
) -> DraftAlgorithm:
    """The draft with the sizes of PERFORMANCE: D 32000 and K 7, or 5 layers of blocks of 16."""
    config = Eagle3Config(vocab_size=32000) if name == "eagle3" else DFlashConfig()
    size = 32000 if name == "eagle3" else info.vocab_size
    context = DraftContext(
        info=info,
        weights=weights or RandomTargetWeights(info, device, dtype),
        vocabulary=DraftVocabulary(np.arange(size, dtype=np.int64), info.vocab_size),
        device=device,
        dtype=dtype,
        seed=0,
        head_chunk_tokens=arguments.chunk,
        compile=dtype == torch.bfloat16 and not arguments.eager,
        activation_checkpointing=arguments.checkpointing,
    )
    return load_algorithm(name)(config, context)


def rows_of(algorithm: DraftAlgorithm, lengths: list[int], share: float, count: int) -> list[FeatureRow]:
    context = algorithm.context
    spec = algorithm.feature_spec(algorithm.config, context.info)
    rows = [random_row(lengths, share, 32000, seed) for seed in range(count)]
    return [random_features(row, spec, context.info, context.device, context.dtype) for row in rows]


def time_steps(
    step: Callable[[FeatureRow], None], rows: list[FeatureRow], repeats: int, device: torch.device
) -> list[float]:
    """Seconds of one row, per repeat (each a pass over all rows, after three warm-up passes)."""
    for _ in range(3):
        for row in rows:
            step(row)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for row in rows:
            step(row)
        torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - begin) / len(rows))
    return seconds


def gradient_difference(name: str, info: TargetInfo, arguments: argparse.Namespace) -> str:
    """bf16 as timed against fp32 without compilation, on one short row, same weights."""
    device = torch.device("cuda")
    weights = RandomTargetWeights(info, device, torch.bfloat16)
    fast = build(name, info, device, torch.bfloat16, arguments, weights)
    slow = build(name, info, device, torch.float32, arguments, weights.to(torch.float32))
    slow.draft.load_state_dict(fast.draft.state_dict())
    row = rows_of(fast, [512, 512], 1.0, 1)[0]
    gradients = []
    losses = []
    for algorithm in (fast, slow):
        terms = algorithm.loss(row)
        terms.total.backward()
        losses.append((terms.total / terms.weight).item())
        gradients.append(
            torch.cat([p.grad.float().flatten() for p in algorithm.draft.parameters() if p.grad is not None])
        )
    cosine = torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0).item()
    return f"loss {losses[0]:.4f} / {losses[1]:.4f} fp32, gradient cosine {cosine:.5f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", nargs="+", choices=["eagle3", "dflash"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--trace", help="write a profiler table of one step to this file")
    arguments = parser.parse_args()
    info, device = target_8b(), torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {vars(arguments)}")
    cases = {
        "eagle3": [([1024] * 8, 1.0), ([1024] * 8, 0.6)],
        "dflash": [([3072] * 2, 1.0)],
    }
    for name in arguments.which:
        algorithm = build(name, info, device, torch.bfloat16, arguments)

        def step(row: FeatureRow, algorithm: DraftAlgorithm = algorithm) -> None:
            for parameter in algorithm.draft.parameters():
                parameter.grad = None
            algorithm.loss(row).total.backward()

        for lengths, share in cases[name]:
            rows = rows_of(algorithm, lengths, share, arguments.rows)
            begin = time.perf_counter()
            seconds = time_steps(step, rows, arguments.repeats, device)
            median, tokens = statistics.median(seconds), sum(lengths)
            anchors = sum(length // 6 for length in lengths)
            print(
                f"{name}-8b {len(lengths)} x {lengths[0]}, {share:.0%} supervised: {median * 1e3:.1f} ms "
                f"({min(seconds) * 1e3:.1f}-{max(seconds) * 1e3:.1f}), {tokens / median:,.0f} tokens/s"
                + (f", {anchors / median:,.0f} anchors/s" if name == "dflash" else "")
                + f", peak {torch.cuda.max_memory_allocated() / GIB:.1f} GiB"
                + f" (all measured in {time.perf_counter() - begin:.0f} s)",
                flush=True,
            )
        if arguments.trace:
            with torch.profiler.profile() as profile:
                step(rows[0])
                torch.cuda.synchronize()
            with open(f"{arguments.trace}-{name}.txt", "w") as file:  # noqa: PTH123
                file.write(
                    profile.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=90)
                )
        del algorithm, rows, step
        torch.cuda.empty_cache()
        if not arguments.no_check:
            print(f"{name}: {gradient_difference(name, info, arguments)}", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
