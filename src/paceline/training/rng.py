"""The state of every global random number generator a draft may draw from."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RngState:
    """Generators of one process at one moment. Taking it costs microseconds and does not wait for a GPU."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    torch_cpu: Tensor
    torch_cuda: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> RngState:
        """The state now; of CUDA generators only the one of `device`."""
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(legacy=True),  # type: ignore[arg-type]
            torch_cpu=torch.get_rng_state(),
            torch_cuda=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        )

    def restore(self, device: torch.device) -> None:
        """Put every generator back; a CUDA state is left out on a device that has none."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.torch_cuda, device)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, numbers and hexadecimal strings."""
        version, words, gauss = self.python
        kind, keys, place, has_gauss, cached = self.numpy
        return {
            "python": [version, list(words), gauss],
            "numpy": [kind, [int(key) for key in keys], int(place), int(has_gauss), float(cached)],
            "torch_cpu": self.torch_cpu.numpy().tobytes().hex(),
            "torch_cuda": None if self.torch_cuda is None else self.torch_cuda.numpy().tobytes().hex(),
        }

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> RngState:
        """The inverse of `to_json`."""
        version, words, gauss = state["python"]
        kind, keys, place, has_gauss, cached = state["numpy"]
        return cls(
            python=(version, tuple(words), gauss),
            numpy=(kind, np.array(keys, np.uint32), place, has_gauss, cached),
            torch_cpu=_bytes_tensor(state["torch_cpu"]),
            torch_cuda=None if state["torch_cuda"] is None else _bytes_tensor(state["torch_cuda"]),
        )


def _bytes_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
