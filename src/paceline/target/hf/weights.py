"""The target's embedding and lm_head, read from the checkpoint's files by tensor name and row slice.

Never from an engine's module, which may be sharded, quantised or in another process.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from paceline.config.target import TargetConfig
from paceline.errors import TargetError
from paceline.target.hf.loading import load_config, resolve_checkpoint
from paceline.target.hf.stored_tensors import StoredTensor, read_tensor_table

_EMBEDDING_ENDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "embeddings.weight",
)
_LM_HEAD_ENDINGS = ("lm_head.weight", "embed_out.weight", "output.weight")
_OTHER_PARTS = ("visual", "vision", "audio", "mtp", "layers")
"""Parts of a name that say it is not the language model's own table."""
_FLOATS = ("F32", "BF16", "F16", "F64")
_READ_ROWS = 8192
"""Rows read at a time while picking some: the whole table need not fit twice."""


class CheckpointWeights:
    """The weights a draft needs (`drafts.interface.TargetWeights`), each read once for a device and dtype."""

    def __init__(self, config: TargetConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Find the tensors; read none yet.

        Raises:
            TargetError: missing files, or no embedding or lm_head found: names the candidates.
        """
        checkpoint = resolve_checkpoint(config.model, config.revision, config.trust_remote_code)
        whole = load_config(checkpoint, config.trust_remote_code)
        text = whole.get_text_config(decoder=True)
        self._table = read_tensor_table(checkpoint)
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype
        self._shape = (int(text.vocab_size), int(text.hidden_size))
        self._embedding_name = self._find("embedding", config.embedding_key, _EMBEDDING_ENDINGS)
        flags = [bool(getattr(one, "tie_word_embeddings", False)) for one in (whole, text)]
        stored = config.lm_head_key is not None or bool(self._candidates(_LM_HEAD_ENDINGS))
        # A tied target's lm_head is its embedding, whatever else the files hold.
        separate = config.lm_head_key is not None or not any(flags) or (stored and not all(flags))
        self._lm_head_name = (
            self._find("lm_head", config.lm_head_key, _LM_HEAD_ENDINGS) if separate else self._embedding_name
        )
        self._cache: dict[tuple[str, bytes | None], Tensor] = {}

    def embedding(self) -> Tensor:
        """[V, H]: the raw table, without any embedding multiplier."""
        return self._read(self._embedding_name, None)

    def lm_head(self, rows: Tensor | None = None) -> Tensor:
        """[V, H], or [len(rows), H] for int64 `rows`; the embedding's storage where the target ties them.

        Raises:
            TargetError: rows outside 0..V-1.
        """
        return self._read(self._lm_head_name, rows)

    def lm_head_bias(self, rows: Tensor | None = None) -> Tensor | None:
        """[V] or [len(rows)], or None when the lm_head has none."""
        name = self._bias_name()
        return None if name is None else self._read(name, rows)

    def stored(self, table: str) -> tuple[str, StoredTensor] | None:
        """Name and place in the checkpoint of "embedding", "lm_head" or "lm_head_bias"; None where there is none."""
        names = {
            "embedding": self._embedding_name,
            "lm_head": self._lm_head_name,
            "lm_head_bias": self._bias_name(),
        }
        name = names.get(table)
        return None if name is None else (name, self._table[name])

    def _bias_name(self) -> str | None:
        names = (self._lm_head_name.removesuffix(".weight") + ".bias", "lm_head.bias")
        return next((name for name in names if name in self._table), None)

    def _read(self, name: str, rows: Tensor | None) -> Tensor:
        wanted = None if rows is None else rows.detach().to("cpu", torch.int64)
        key = (name, None if wanted is None else wanted.numpy().tobytes())
        if key not in self._cache:
            stored = self._table[name]
            if stored.dtype not in _FLOATS:
                raise TargetError(
                    f"{name} in {stored.file} is stored as {stored.dtype}, not as floating point: "
                    "its scales are not known; use a checkpoint whose embedding and lm_head are not quantised"
                )
            self._cache[key] = _read_rows(name, stored, wanted).to(self._device, self._dtype)
        return self._cache[key]

    def _find(self, role: str, key: str | None, endings: tuple[str, ...]) -> str:
        if key is not None:
            if key not in self._table:
                near = ", ".join(self._candidates(endings)) or "none"
                raise TargetError(
                    f"target.{role}_key = {key!r} is not in {self._checkpoint}; tensors of that kind: {near}"
                )
            return key
        found = self._candidates(endings)
        if len(found) == 1:
            return found[0]
        similar = found or [name for name, tensor in self._table.items() if tensor.shape == self._shape]
        raise TargetError(
            f"{self._checkpoint} has {len(found)} tensors that may be the {role} [{self._shape[0]}, {self._shape[1]}] "
            f"(candidates: {', '.join(similar) or 'none'}): set target.{role}_key"
        )

    def _candidates(self, endings: tuple[str, ...]) -> list[str]:
        """Names that end like a table of the language model and have its hidden size."""
        return sorted(
            name
            for name, tensor in self._table.items()
            if name.endswith(endings)
            and not set(_OTHER_PARTS) & set(name.split("."))
            and len(tensor.shape) == 2
            and tensor.shape[1] == self._shape[1]
            and tensor.shape[0] >= self._shape[0]
        )


def _read_rows(name: str, stored: StoredTensor, rows: Tensor | None) -> Tensor:
    with safe_open(Path(stored.file), framework="pt") as file:
        part = file.get_slice(name)
        if rows is None:
            whole: Tensor = part[:]
            return whole
        num_rows = stored.shape[0]
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < num_rows:
            raise TargetError(f"rows {int(rows.min())}..{int(rows.max())} of {name} asked for, it has {num_rows}")
        picked: Tensor = torch.empty((len(rows), *stored.shape[1:]), dtype=part[:1].dtype)
        for start in range(0, num_rows, _READ_ROWS):
            inside = (rows >= start) & (rows < start + _READ_ROWS)
            if inside.any():
                picked[inside] = part[start : start + _READ_ROWS][rows[inside] - start]
        return picked
