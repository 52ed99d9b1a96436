"""The target's embedding and lm_head, fetched from a server: the trainer needs no copy of the target."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from paceline.client.calls import ServerCalls
from paceline.errors import TargetError
from paceline.schema.target_info import TargetInfo


class RemoteWeights:
    """The weights a draft needs (`drafts.interface.TargetWeights`), each fetched once for a device and dtype."""

    def __init__(
        self, calls: Callable[[], ServerCalls], info: TargetInfo, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Fetch nothing yet; `calls` gives a server that answers now."""
        self._calls = calls
        self._info = info
        self._device = device
        self._dtype = dtype
        self._cache: dict[tuple[str, bytes | None], Tensor] = {}

    def embedding(self) -> Tensor:
        """[V, H]: the raw table, without any embedding multiplier."""
        return self._fetch("embedding", None, self._info.hidden_size)

    def lm_head(self, rows: Tensor | None = None) -> Tensor:
        """[V, H], or [len(rows), H] for int64 `rows`; the embedding's storage where the target ties them."""
        name = "embedding" if self._info.tied_embeddings else "lm_head"
        return self._fetch(name, rows, self._info.hidden_size)

    def lm_head_bias(self, rows: Tensor | None = None) -> Tensor | None:
        """[V] or [len(rows)], or None when the lm_head has none."""
        return self._fetch("lm_head_bias", rows) if self._info.logit_transform.has_bias else None

    def _fetch(self, name: str, rows: Tensor | None, *columns: int) -> Tensor:
        wanted = None if rows is None else rows.detach().to("cpu", torch.int64)
        key = (name, None if wanted is None else wanted.numpy().tobytes())
        if key not in self._cache:
            calls = self._calls()
            try:
                weight = calls.weights(name, None if wanted is None else wanted.tolist())
            finally:
                calls.close()
            expected = (self._info.vocab_size if wanted is None else len(wanted), *columns)
            if tuple(weight.shape) != expected:
                raise TargetError(
                    f"{calls.url} sent the weight {name!r} of shape {list(weight.shape)}, expected {list(expected)}"
                )
            self._cache[key] = weight.to(self._device, self._dtype)
        return self._cache[key]
