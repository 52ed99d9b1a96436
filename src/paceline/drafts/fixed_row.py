"""A row that needs no target: for comparing two drafts, and for compiling one before training begins."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from paceline.drafts.interface import DraftAlgorithm
from paceline.schema.features import FeatureRow, Features
from paceline.schema.parts import WHOLE, Part, part_range, part_reach
from paceline.schema.rows import Row


def fixed_row(algorithm: DraftAlgorithm, num_tokens: int, part: Part = WHOLE) -> FeatureRow:
    """One document of random tokens of the draft vocabulary, all supervised, with random features; always the same.

    Args:
        part: the part of the row whose features are made; they are not those that the whole row has there.
    """
    context = algorithm.context
    info, spec = context.info, type(algorithm).feature_spec(algorithm.config, context.info)
    draw = np.random.default_rng(0)
    noise = torch.Generator().manual_seed(0)
    dtype = getattr(torch, info.dtype)

    def random_states(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise).to(context.device, dtype)

    row = Row(
        position=0,
        epoch=0,
        row_id=0,
        tokens=draw.choice(context.vocabulary.ids, num_tokens).astype(np.int32),
        documents=np.array([0, num_tokens], np.int32),
        spans=np.array([[0, num_tokens]], np.int32),
        span_cut=np.zeros(1, bool),
        sample_ids=np.zeros(1, np.int64),
        pieces=np.zeros(1, np.int32),
    )
    start, end = part_range(num_tokens, part)
    _, reach = part_reach(num_tokens, part, spec.halo)
    with_final = spec.final_hidden != "none"
    greedy = torch.from_numpy(draw.choice(context.vocabulary.ids, num_tokens).astype(np.int32))
    features = Features(
        layers=spec.layers,
        hidden=random_states(end - start, len(spec.layers), info.hidden_size),
        greedy=greedy[start:reach].to(context.device),
        final_hidden=random_states(reach - start, info.hidden_size) if with_final else None,
        final_index=torch.arange(start, reach, dtype=torch.int32, device=context.device) if with_final else None,
        logsumexp=torch.full((reach - start,), 10.0, device=context.device) if spec.logsumexp else None,
        row_hash="",
        finite=True,
        part=part,
    )
    return FeatureRow(row, features)
