"""What the trainer asks of its surroundings: a stream of rows, and a callable that evaluates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from paceline.schema.features import FeatureRow

Evaluate = Callable[[int], dict[str, dict[str, Any]]]
"""evaluate(step) -> {draft name: figures}; figures hold at least "acceptance_length" and are numbers or lists of
numbers. Called between two steps, under no_grad, with the drafts in eval mode; may raise StoppedError,
then on every rank."""

StreamFigures = Callable[[], dict[str, float]]
"""What a stream holds at this moment, by name with unit: rows_in_flight, bytes_in_flight, transfer_s ..."""


class RowStream(Protocol):
    """Rows in training order. A row is valid until the next one is asked for."""

    def __iter__(self) -> Iterator[FeatureRow]:
        """Rows from the current position on; ends behind the last row of the last epoch."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to `state["position"]`, the next position to train."""

    def state_dict(self) -> dict[str, int]:
        """{"position": next position to train}."""
