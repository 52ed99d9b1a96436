"""Proof that speculative decoding left the target's greedy output alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.errors import LosslessnessError
from paceline.target.hf.stepping import SteppingTarget

_TIE_SHARE = 0.05
"""Logits this close, in standard deviations of their position, are a tie in 16-bit numbers (ALGORITHMS)."""
_SCORED_POSITIONS = 64
"""Positions whose fp32 logits exist at one time."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to go on from."""

    name: str
    """For messages, e.g. the sample's id."""
    tokens: tuple[int, ...]

    def tensor(self) -> Tensor:
        """int64[n]."""
        return torch.tensor(self.tokens, dtype=torch.int64)


def check_equal(prompt: Prompt, tokens: Sequence[int], reference: Sequence[int]) -> None:
    """Raise unless `tokens` equal what `generate` wrote, token for token (fp32).

    Raises:
        LosslessnessError: names the prompt and the first position that differs.
    """
    if list(tokens) == list(reference):
        return
    shared = min(len(tokens), len(reference))
    at = next((i for i in range(shared) if tokens[i] != reference[i]), shared)
    ours = tokens[at] if at < len(tokens) else "nothing"
    theirs = reference[at] if at < len(reference) else "nothing"
    raise LosslessnessError(
        f"prompt {prompt.name}, new token {at}: speculative decoding wrote {ours}, generate without a draft {theirs}"
    )


def count_ties(target: SteppingTarget, prompt: Prompt, tokens: Sequence[int], max_new_tokens: int) -> int:
    """Tokens that are not the argmax of one plain forward, but as good as it (16-bit numbers).

    Each token must be the argmax after what precedes it or within 5 % of that position's logit standard deviation
    of it; the text must end with its first end token or at `max_new_tokens`.

    Raises:
        LosslessnessError: names the prompt and the position of a token the target would not have written.
    """
    ends = [i for i, token in enumerate(tokens) if token in target.eos_token_ids]
    if ends[:1] != [len(tokens) - 1] and (ends or len(tokens) != max_new_tokens):
        raise LosslessnessError(
            f"prompt {prompt.name}: the text of {len(tokens)} tokens (limit {max_new_tokens}) has end tokens at {ends}"
            ": it must stop at the first one, or at the limit"
        )
    written = torch.tensor(tokens, dtype=torch.int64, device=target.device)
    text = torch.cat([prompt.tensor().to(target.device), written])
    logits = target.score(text, num_logits=len(tokens))
    num_ties = 0
    for first in range(0, len(tokens), _SCORED_POSITIONS):
        part = logits[first : first + _SCORED_POSITIONS].float()
        chosen = written[first : first + _SCORED_POSITIONS]
        behind = part.max(dim=-1).values - part.gather(1, chosen[:, None])[:, 0]
        wrong = behind > _TIE_SHARE * part.std(dim=-1)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise LosslessnessError(
                f"prompt {prompt.name}, new token {first + at}: speculative decoding wrote {int(chosen[at])}, "
                f"the target prefers {int(part[at].argmax())} by {float(behind[at]):.4f} logits (a tie is at most "
                f"{_TIE_SHARE * float(part[at].std()):.4f})"
            )
        num_ties += int((part.argmax(dim=-1) != chosen).sum())
    return num_ties
