"""Fill and seconds of the row plan for lognormal lengths: `python benchmarks/packing.py [--large]`."""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from paceline.data.packing import RowPlan


def lognormal_lengths(num_samples: int, mean: float = 1000.0, sigma: float = 1.0, seed: int = 0) -> np.ndarray:
    """int64[num_samples] lengths with the given mean, as chat data has them."""
    rng = np.random.default_rng(seed)
    return np.maximum(1, rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, num_samples).astype(np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="also 10 million samples")
    parser.add_argument("--row-tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=2048)
    arguments = parser.parse_args()
    print(f"{'samples':>10} {'rows':>9} {'fill':>7} {'best':>7} {'cut':>7} {'seconds':>8} {'peak GB':>8}")
    for num_samples in [20_000, 1_000_000] + [10_000_000] * arguments.large:
        lengths = lognormal_lengths(num_samples)
        begin = time.perf_counter()
        plan = RowPlan.build(lengths, arguments.row_tokens, seed=0, window=arguments.window)
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{num_samples:>10} {plan.num_rows:>9} {plan.fill:>7.2%} {plan.best_fill:>7.2%} {plan.num_cut:>7} "
            f"{seconds:>8.2f} {peak:>8.2f}"
        )


if __name__ == "__main__":
    main()
