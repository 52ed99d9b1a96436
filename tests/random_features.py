"""Features of random bits for a row, in every combination that a spec allows; for tests of what carries them."""

from __future__ import annotations

import torch

from paceline.schema.features import Features, FeatureSpec
from paceline.schema.rows import Row, request_features
from small_engine import HIDDEN_SIZE, VOCAB_SIZE

ALL_SPECS = tuple(
    FeatureSpec(layers, final_hidden, greedy, logsumexp)
    for layers in ((2,), (0, 3, 5))
    for final_hidden in ("none", "supervised", "all")
    for greedy in (False, True)
    for logsumexp in (False, True)
)


def random_features(
    row: Row, spec: FeatureSpec, dtype: str = "float32", hidden_size: int = HIDDEN_SIZE, seed: int = 0
) -> Features:
    """What a target of `dtype` might answer; every bit of the floats is drawn, but for NaN and infinity."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(getattr(torch, dtype))

    index = None
    if spec.final_hidden == "supervised":
        index = torch.from_numpy(row.supervised_index())
    elif spec.final_hidden == "all":
        index = torch.arange(row.num_tokens, dtype=torch.int32)
    greedy = torch.randint(VOCAB_SIZE, (row.num_tokens,), generator=generator, dtype=torch.int32)
    return Features(
        layers=spec.layers,
        hidden=drawn(row.num_tokens, len(spec.layers), hidden_size),
        greedy=greedy if spec.greedy else None,
        final_hidden=drawn(len(index), hidden_size) if index is not None else None,
        final_index=index,
        logsumexp=torch.randn(row.num_tokens, generator=generator) if spec.logsumexp else None,
        row_hash=request_features(row, "training").row_hash(),
        finite=True,
        queued_s=0.25,
        computed_s=0.5,
    )
