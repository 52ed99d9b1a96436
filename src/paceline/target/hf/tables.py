"""Embedding and lm_head for clients: read from the checkpoint's files in slices, never as a whole."""

from __future__ import annotations

import numpy as np
import torch

from paceline.errors import ConfigError, TargetError
from paceline.target.hf.stored_tensors import StoredTensor
from paceline.target.hf.weights import CheckpointWeights

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class StoredTable:
    """One tensor of a checkpoint, mapped into memory while it is read (`target.server.weights.Table`)."""

    def __init__(self, name: str, stored: StoredTensor) -> None:
        """Raises ConfigError for numbers that are not floating point."""
        if stored.dtype not in _DTYPES:
            raise ConfigError(
                f"{name} in {stored.file} is stored as {stored.dtype}, not as floating point: its scales are not "
                "known; serve a checkpoint whose embedding and lm_head are not quantised"
            )
        self._name = name
        self._stored = stored

    @property
    def shape(self) -> tuple[int, ...]:
        return self._stored.shape

    def read(self, rows: slice | np.ndarray) -> torch.Tensor:
        stored = self._stored
        num_rows = stored.shape[0]
        try:
            whole = np.memmap(
                stored.file, np.uint8, "r", stored.start, (num_rows, stored.num_bytes // max(num_rows, 1))
            )
        except (OSError, ValueError) as error:
            raise TargetError(f"{self._name} cannot be read from {stored.file}: {error}") from error
        picked = torch.from_numpy(np.array(whole[rows]))
        return picked.view(_DTYPES[stored.dtype]).view(-1, *stored.shape[1:])


class CheckpointTables:
    """The tables of a target (`target.server.weights.WeightTables`)."""

    def __init__(self, weights: CheckpointWeights) -> None:
        self._weights = weights

    def table(self, name: str) -> StoredTable | None:
        """ "embedding", "lm_head" or "lm_head_bias"; None where the target has no such tensor."""
        found = self._weights.stored(name)
        return None if found is None else StoredTable(*found)
