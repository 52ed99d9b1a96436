"""Whether an engine's own next token follows from the hidden states that came with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.target.engines.outer_parts import OuterParts
from paceline.target.hf.capture import apply_logit_transform

_TOLERANCE = 5e-2
"""Of the largest logit: engine and torch round differently, and a tie may go either way."""


@dataclass(frozen=True, slots=True)
class OtherToken:
    """A document whose states lead elsewhere."""

    document: int
    says: int
    """The engine."""
    states_say: int
    """Through our norm and lm_head."""
    missed_by: float
    """Difference of the two logits."""
    allowed: float

    def __str__(self) -> str:
        return (
            f"token {self.says} where its own hidden states say {self.states_say} (logits differ by "
            f"{self.missed_by:.3g}, rounding explains {self.allowed:.3g})"
        )


@torch.no_grad()
def find_other_token(outer: OuterParts, last: Tensor, next_tokens: list[int], at_once: int) -> OtherToken | None:
    """The first document whose next token its last state does not explain; None if all agree.

    The engine chose each token from the very state it handed out. So this notices states of another request, those of
    another layer or before another norm, and an lm_head that is not the checkpoint's. States that are not finite say
    nothing here: whether they were asked for decides what becomes of them.

    Args:
        last: [D, H] outputs of the last decoder layer at the last token of each document.
        next_tokens: D of them, the engine's.
        at_once: rows of logits in memory.
    """
    for document, (says, states_say, missed_by, largest) in enumerate(_logits(outer, last, next_tokens, at_once)):
        allowed = _TOLERANCE * max(1.0, largest)
        if not missed_by <= allowed:
            return OtherToken(document, says, states_say, missed_by, allowed)
    return None


def _logits(
    outer: OuterParts, last: Tensor, next_tokens: list[int], at_once: int
) -> Iterator[tuple[int, int, float, float]]:
    """Of each document: token of the engine, token of the states, distance of their logits, the largest magnitude."""
    for begin in range(0, len(last), at_once):
        final = outer.norm(last[begin : begin + at_once].to(outer.device))
        logits = apply_logit_transform(outer.lm_head(final), outer.info.logit_transform).float()
        logits = logits.where(logits.isfinite().all(-1, keepdim=True), 0.0)
        says = torch.tensor(next_tokens[begin : begin + at_once], device=logits.device)
        known = (says >= 0) & (says < logits.shape[-1])
        best, states_say = logits.max(-1)
        theirs = logits.gather(-1, (says * known)[:, None])[:, 0]
        missed_by = (best - theirs).where(known, torch.inf)
        yield from zip(
            says.tolist(), states_say.tolist(), missed_by.tolist(), logits.abs().amax(-1).tolist(), strict=True
        )
