"""Rows with random features, a TargetInfo and target weights, made without a target; for tests of drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paceline.drafts.interface import DraftContext
from paceline.drafts.vocabulary import DraftVocabulary
from paceline.schema.features import FeatureRow, Features, FeatureSpec
from paceline.schema.rows import Row, request_features
from paceline.schema.target_info import RopeInfo, TargetInfo

Span = tuple[int, int]


def tiny_info(**changes: Any) -> TargetInfo:
    """A target with 8 layers, hidden 32, 4 heads of 8, V 64 of which 60 are tokens, fp32."""
    facts: dict[str, Any] = {
        "name": "tiny",
        "model_type": "qwen3",
        "num_layers": 8,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "num_tokenizer_tokens": 60,
        "norm_eps": 1e-6,
        "rope": RopeInfo(theta=10000.0),
        "max_position_embeddings": 4096,
        "dtype": "float32",
        "tied_embeddings": False,
        "mask_token_id": 60,
        "weight_fingerprint": "0" * 16,
        "tokenizer_fingerprint": "0" * 16,
        "deterministic": True,
    }
    return TargetInfo(**(facts | changes))


def make_row(
    lengths: Sequence[int],
    spans: Sequence[Sequence[Span]],
    vocab: int = 60,
    sample_ids: Sequence[int] | None = None,
    pieces: Sequence[int] | None = None,
    epoch: int = 0,
    position: int = 0,
    cut: Sequence[bool] | None = None,
) -> Row:
    """Documents of `lengths` tokens packed end to end.

    Args:
        spans: for each document its spans [start, end), in the document's own coordinates.
        vocab: tokens are drawn below it, from (sample id, piece) alone: packing does not change a document.
        sample_ids: 0, 1, 2 ... when not given. pieces: 0 when not given.
        cut: one a span; False when not given.
    """
    sample_ids = list(range(len(lengths)) if sample_ids is None else sample_ids)
    pieces = [0] * len(lengths) if pieces is None else list(pieces)
    documents = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = [
        np.random.default_rng([sample, piece, 7]).integers(0, vocab, length)
        for sample, piece, length in zip(sample_ids, pieces, lengths, strict=True)
    ]
    placed = [
        (int(start) + s, int(start) + e) for start, chosen in zip(documents[:-1], spans, strict=True) for s, e in chosen
    ]
    return Row(
        position=position,
        epoch=epoch,
        row_id=0,
        tokens=np.concatenate([*tokens, np.zeros(0)]).astype(np.int32),
        documents=documents,
        spans=np.array(placed, dtype=np.int32).reshape(-1, 2),
        span_cut=np.array([False] * len(placed) if cut is None else cut, dtype=bool),
        sample_ids=np.array(sample_ids, dtype=np.int64),
        pieces=np.array(pieces, dtype=np.int32),
    )


def random_features(row: Row, spec: FeatureSpec, info: TargetInfo, dtype: torch.dtype = torch.float32) -> FeatureRow:
    """`row` with the features `spec` asks for, random but fixed by (sample id, piece): packing changes nothing."""
    parts = []
    for sample, piece, length in zip(row.sample_ids, row.pieces, np.diff(row.documents), strict=True):
        generator = torch.Generator().manual_seed(int(sample) * 1000 + int(piece) + 1)
        # Drawn for all layers, so that a smaller spec sees the same states.
        parts.append(torch.randn(int(length), info.num_layers + 1, info.hidden_size, generator=generator))
    states = torch.cat([*parts, torch.zeros(0, info.num_layers + 1, info.hidden_size)]).to(dtype)
    supervised = torch.from_numpy(row.supervised_index())
    index = {
        "none": None,
        "supervised": supervised,
        "all": torch.arange(row.num_tokens, dtype=torch.int32),
    }[spec.final_hidden]
    final = states[:, -1]
    logits = final.float() @ RandomWeights(info).lm_head().T
    features = Features(
        layers=spec.layers,
        hidden=states[:, list(spec.layers)].contiguous(),
        greedy=logits.argmax(-1).int() if spec.greedy else None,
        final_hidden=None if index is None else final[index.long()].contiguous(),
        final_index=index,
        logsumexp=logits.logsumexp(-1) if spec.logsumexp else None,
        row_hash=request_features(row, "training").row_hash(),
        finite=True,
    )
    return FeatureRow(row, features)


class RandomWeights:
    """TargetWeights drawn from a seed; keeps one storage for all callers."""

    def __init__(
        self,
        info: TargetInfo,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        bias: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (info.vocab_size, info.hidden_size)
        self._embedding = torch.randn(shape, generator=generator).to(device, dtype)
        self._lm_head = (torch.randn(shape, generator=generator) * 0.3).to(device, dtype)
        self._bias = torch.randn(info.vocab_size, generator=generator).to(device, dtype) if bias else None

    def embedding(self) -> Tensor:
        return self._embedding

    def lm_head(self, rows: Tensor | None = None) -> Tensor:
        return self._lm_head if rows is None else self._lm_head[rows]

    def lm_head_bias(self, rows: Tensor | None = None) -> Tensor | None:
        return self._bias if self._bias is None or rows is None else self._bias[rows]


def make_context(info: TargetInfo, **changes: Any) -> DraftContext:
    """A CPU fp32 context with random target weights and the whole vocabulary."""
    parts: dict[str, Any] = {
        "info": info,
        "weights": RandomWeights(info),
        "vocabulary": DraftVocabulary(np.arange(info.vocab_size, dtype=np.int64), info.vocab_size),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "seed": 0,
    }
    return DraftContext(**(parts | changes))
