"""Evaluation during training: loss and the serving walk over held-out rows, through a stream of its own."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from paceline.drafts.interface import DraftAlgorithm
from paceline.errors import StoppedError
from paceline.evaluation.walk import WalkSums, walk_row
from paceline.schema.features import FeatureRow


class EvalStream(AbstractContextManager["EvalStream"], Protocol):
    """Held-out rows with features; closed at the end of the block."""

    def __iter__(self) -> Iterator[FeatureRow]: ...


class HeldOutEvaluation:
    """Callable that the trainer evaluates with: step -> {draft: figures}."""

    def __init__(
        self,
        drafts: Mapping[str, DraftAlgorithm],
        open_stream: Callable[[int], Any],
        num_rows: int,
        num_shares: int = 1,
        gather: Callable[[Any], list[Any]] = lambda own: [own],
        agree_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            open_stream: of n, gives a fresh stream of this rank's share of the first n held-out rows, or of its parts
                of them.
            num_shares: which there are of the rows; no rank's has more than ceil(n / num_shares).
            gather: what all ranks have, by rank.
            agree_to_stop: whether any rank was asked to end, the same answer on all of them; asked before every row.
        """
        self._gather, self._agree_to_stop = gather, agree_to_stop
        self._drafts = dict(drafts)
        self._open_stream = open_stream
        self._num_rows = num_rows
        self._num_turns = math.ceil(num_rows / num_shares)

    def __call__(self, step: int) -> dict[str, dict[str, Any]]:
        """Figures of every draft: those of `WalkSums.result`, "loss", and "accuracy" and "loss" per position.

        Where no step had room for all K tokens "acceptance_length" is that over all steps, and 1 without any step.

        Raises:
            StoppedError: on every rank, since one of them was asked to end.
        """
        del step
        everyone = self._gather(self._own_sums())
        if any(sums is None for sums in everyone):
            raise StoppedError("the evaluation was cut short by request")
        return {name: _figures(*_of_all_ranks([sums[name] for sums in everyone])) for name in self._drafts}

    def _own_sums(self) -> dict[str, tuple[WalkSums, dict[str, Tensor]]] | None:
        """By draft, over this rank's rows, on the host; None if its stream was closed, since it was asked to end."""
        walks = {name: WalkSums(draft.num_drafted) for name, draft in self._drafts.items()}
        sums: dict[str, dict[str, Tensor]] = {name: {} for name in self._drafts}
        is_closed = False
        with self._open_stream(self._num_rows) as stream:
            rows = iter(stream)
            for _ in range(self._num_turns):
                if self._agree_to_stop():
                    raise StoppedError("asked to end in an evaluation")
                try:
                    row = next(rows, None)
                except StoppedError:  # the others would wait for this rank's answers
                    row, is_closed = None, True
                if row is None:
                    continue
                for name, draft in self._drafts.items():
                    walks[name] = walks[name] + walk_row(draft, row)
                    _add_loss(sums[name], draft, row)
        return None if is_closed else {name: (walks[name], _on_host(sums[name])) for name in self._drafts}


def _add_loss(sums: dict[str, Tensor], draft: DraftAlgorithm, row: FeatureRow) -> None:
    terms = draft.loss(row)
    parts = {"total": torch.stack([terms.total.detach(), terms.weight.detach()]), **terms.metrics}
    for name, part in parts.items():
        sums[name] = sums[name] + part if name in sums else part


def _on_host(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.cpu() for name, part in sums.items()}


def _of_all_ranks(sums: list[tuple[WalkSums, dict[str, Tensor]]]) -> tuple[WalkSums, dict[str, Tensor]]:
    walks, parts = zip(*sums, strict=True)
    names = dict.fromkeys(name for part in parts for name in part)
    added = {name: torch.stack([part[name] for part in parts if name in part]).sum(0) for name in names}
    return functools.reduce(operator.add, walks), added


def _figures(walk: WalkSums, sums: dict[str, Tensor]) -> dict[str, Any]:
    figures = walk.result()
    if figures["acceptance_length"] is None:
        figures["acceptance_length"] = figures["acceptance_length_all"] or 1.0
    for name, part in sums.items():
        ratio = (part[0] / part[1]).tolist()
        figures["loss" if name == "total" else f"{name}_by_position"] = ratio
    return figures
