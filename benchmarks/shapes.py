"""The 8B reference shapes (Qwen3-8B, random weights) that the benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from paceline.schema.features import FeatureRow, Features, FeatureSpec
from paceline.schema.rows import Row, request_features
from paceline.schema.target_info import RopeInfo, TargetInfo


def target_8b(dtype: str = "bfloat16") -> TargetInfo:
    """Qwen3-8B: hidden 4096, 36 layers, 32/8 heads of 128, MLP 12288, V 151936."""
    return TargetInfo(
        name="qwen3-8b-shapes",
        model_type="qwen3",
        num_layers=36,
        hidden_size=4096,
        intermediate_size=12288,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151936,
        num_tokenizer_tokens=151669,
        norm_eps=1e-6,
        rope=RopeInfo(theta=1e6),
        max_position_embeddings=40960,
        dtype=dtype,
        tied_embeddings=False,
        mask_token_id=151669,
        weight_fingerprint="",
        tokenizer_fingerprint="",
        deterministic=False,
    )


class RandomTargetWeights:
    """Embedding and lm_head of the target, random, on one device; like a real provider it makes what is asked for."""

    def __init__(self, info: TargetInfo, device: torch.device, dtype: torch.dtype) -> None:
        self._info, self._device, self._dtype, self._drawn_dtype = info, device, dtype, dtype
        self._made: dict[int, torch.Tensor] = {}

    def to(self, dtype: torch.dtype) -> RandomTargetWeights:
        """The same values in another dtype."""
        other = RandomTargetWeights(self._info, self._device, self._drawn_dtype)
        other._dtype = dtype
        return other

    def embedding(self) -> torch.Tensor:
        return self._random(self._info.vocab_size, seed=1)

    def lm_head(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        return self._random(self._info.vocab_size if rows is None else len(rows), seed=2)

    def lm_head_bias(self, rows: torch.Tensor | None = None) -> torch.Tensor | None:
        del rows
        return None

    def _random(self, rows: int, seed: int) -> torch.Tensor:
        if seed not in self._made:
            generator = torch.Generator(self._device).manual_seed(seed)
            table = torch.empty((rows, self._info.hidden_size), device=self._device, dtype=self._drawn_dtype)
            self._made[seed] = table.normal_(0, 0.02, generator=generator).to(self._dtype)
        return self._made[seed]


def random_row(lengths: Sequence[int], supervised_share: float, vocab: int, seed: int = 0) -> Row:
    """Documents of `lengths` tokens whose last `supervised_share` is one span."""
    generator = np.random.default_rng(seed)
    documents = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    starts = documents[1:] - np.round(np.array(lengths) * supervised_share).astype(np.int32)
    return Row(
        position=seed,
        epoch=0,
        row_id=seed,
        tokens=generator.integers(0, vocab, int(documents[-1])).astype(np.int32),
        documents=documents,
        spans=np.stack([starts, documents[1:]], 1).astype(np.int32),
        span_cut=np.zeros(len(lengths), bool),
        sample_ids=np.arange(len(lengths), dtype=np.int64) + seed * 1000,
        pieces=np.zeros(len(lengths), np.int32),
    )


def random_features(
    row: Row, spec: FeatureSpec, info: TargetInfo, device: torch.device, dtype: torch.dtype
) -> FeatureRow:
    """`row` with random features of the right sizes."""
    generator = torch.Generator(device).manual_seed(row.position)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(generator=generator)

    num_final = {"none": None, "supervised": row.num_supervised, "all": row.num_tokens}[spec.final_hidden]
    index = row.supervised_index() if spec.final_hidden == "supervised" else np.arange(row.num_tokens, dtype=np.int32)
    greedy = torch.randint(0, 32000, (row.num_tokens,), generator=generator, device=device, dtype=torch.int32)
    features = Features(
        layers=spec.layers,
        hidden=normal(row.num_tokens, len(spec.layers), info.hidden_size),
        greedy=greedy if spec.greedy else None,
        final_hidden=None if num_final is None else normal(num_final, info.hidden_size),
        final_index=None if num_final is None else torch.from_numpy(index).to(device),
        logsumexp=None,
        row_hash=request_features(row, "training").row_hash(),
        finite=True,
    )
    return FeatureRow(row, features)
