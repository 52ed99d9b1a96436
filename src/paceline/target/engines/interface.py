"""What a production engine must do for us: hidden states of one document, and its own next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CapturedDocument:
    """What an engine computed for one document."""

    hidden: Tensor
    """[n, L, H] on the CPU, in the engine's dtype: outputs of decoder layers, before any final norm."""
    layers: list[int]
    """0-based, L of them, ascending."""
    next_token: int
    """The engine's own greedy token after the last one."""


class DocumentServer(Protocol):
    """A running engine; any number of threads may call it at the same time."""

    name: str
    """For messages: "vLLM at http://..."."""
    layers: tuple[int, ...]
    """The capture layers that it was started for, ascending; the target's last layer is always one of them."""
    max_tokens: int
    """Of one document."""

    def capture(self, tokens: np.ndarray) -> CapturedDocument:
        """Hidden states of one document, int32[n].

        Raises:
            CaptureMismatchError: other tokens or layers than were asked for.
            TransportError: the engine, or what it sent, is gone; asking again, or another server, can help.
            TargetError: the engine refused.
        """

    def is_alive(self) -> bool:
        """Whether the engine says that it can compute; blocks for a few seconds at most."""

    def close(self) -> None:
        """End the requests that are out; their threads see a TransportError. The engine itself goes on."""
