"""The target's embedding and lm_head, as a recording holds them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paceline.drafts.interface import TargetWeights
from paceline.errors import DataError

_EMBEDDING, _LM_HEAD, _LM_HEAD_BIAS = "embedding", "lm_head", "lm_head_bias"


class RecordedWeights:
    """The weights a draft needs (`drafts.interface.TargetWeights`), each read once for a device and dtype."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        """Read names alone.

        Raises:
            DataError: the file cannot be read.
        """
        self._path = path
        self._device = device
        self._dtype = dtype
        self._cache: dict[tuple[str, bytes | None], Tensor] = {}
        try:
            with safe_open(path, framework="pt") as file:
                self._names = frozenset(file.keys())
        except (OSError, SafetensorError) as error:
            raise DataError(f"cannot read {path}: {error}; copy it anew, or record again") from error

    def embedding(self) -> Tensor:
        """[V, H]: the raw table, without any embedding multiplier."""
        return self._read(_EMBEDDING, None)

    def lm_head(self, rows: Tensor | None = None) -> Tensor:
        """[V, H], or [len(rows), H] for int64 `rows`; the embedding's storage where the target ties them."""
        return self._read(_LM_HEAD if _LM_HEAD in self._names else _EMBEDDING, rows)

    def lm_head_bias(self, rows: Tensor | None = None) -> Tensor | None:
        """[V] or [len(rows)], or None when the lm_head has none."""
        return self._read(_LM_HEAD_BIAS, rows) if _LM_HEAD_BIAS in self._names else None

    def _read(self, name: str, rows: Tensor | None) -> Tensor:
        wanted = None if rows is None else rows.detach().to("cpu", torch.int64)
        key = (name, None if wanted is None else wanted.numpy().tobytes())
        if key not in self._cache:
            with safe_open(self._path, framework="pt") as file:
                whole: Tensor = file.get_tensor(name)
            self._cache[key] = (whole if wanted is None else whole[wanted]).to(self._device, self._dtype)
        return self._cache[key]


def write_weights(weights: TargetWeights, path: Path) -> None:
    """Write what a draft needs, in the smallest dtype that holds every number exactly.

    Args:
        weights: on the CPU, in float32.
    """
    embedding, lm_head, bias = weights.embedding(), weights.lm_head(), weights.lm_head_bias()
    tables = {_EMBEDDING: embedding}
    if lm_head.data_ptr() != embedding.data_ptr():
        tables[_LM_HEAD] = lm_head
    if bias is not None:
        tables[_LM_HEAD_BIAS] = bias
    save_file({name: _without_loss(table) for name, table in tables.items()}, path)


def _without_loss(table: Tensor) -> Tensor:
    for dtype in (torch.bfloat16, torch.float16):
        smaller = table.to(dtype)
        if torch.equal(smaller.to(table.dtype), table):
            return smaller.contiguous()
    return table.contiguous()
