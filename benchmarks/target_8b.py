"""`target-8b`: capture forwards of the hf engine, three layers + final hidden + greedy, on one GPU.

    python benchmarks/make_random_target.py /tmp/target-8b
    python benchmarks/target_8b.py /tmp/target-8b --compile

Rows of 8 documents of 1,024 tokens, all final states asked for, submitted without waiting as a stream does.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from paceline.config.target import TargetConfig
from paceline.schema.features import FeatureSpec
from paceline.schema.rows import request_features
from paceline.target.hf.engine import HFEngine
from shapes import random_row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    engine = HFEngine(TargetConfig(model=arguments.model, compile=arguments.compile))
    info = engine.info()
    spec = FeatureSpec(
        layers=(1, info.num_layers // 2 - 1, info.num_layers - 4), final_hidden="supervised", greedy=True
    )
    requests = [
        request_features(random_row([1024] * 8, 1.0, info.num_tokenizer_tokens, seed), "training")
        for seed in range(arguments.rows)
    ]
    for request in requests[:2]:
        engine.capture(request, spec).result()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    rates = []
    for _ in range(arguments.repeats):
        begin = time.perf_counter()
        for future in [engine.capture(request, spec) for request in requests]:
            future.result()
        rates.append(sum(len(request.tokens) for request in requests) / (time.perf_counter() - begin))
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")
    print(
        f"target-8b, compile {arguments.compile}: {statistics.median(rates):,.0f} tokens/s "
        f"({min(rates):,.0f}-{max(rates):,.0f}), peak {peak:.1f} GiB, {np.prod(requests[0].tokens.shape)} tokens a row"
    )
    engine.close()


if __name__ == "__main__":
    main()
