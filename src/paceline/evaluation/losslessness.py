"""Proof that speculative decoding left the target's output alone: greedy token for token, drawn in distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.errors import LosslessnessError
from paceline.target.hf.stepping import SteppingTarget

_TIE_SHARE = 0.05
"""Logits this close, in standard deviations of their position, are a tie in 16-bit numbers (ALGORITHMS)."""
_LEAST_LOG = -1e4
"""Stands for the logarithm of 0."""
_LARGEST_DEVIATION = 5.0
"""Standard deviations that are still chance: an honest evaluation fails once in two million."""
_RARE_NATS = 30.0
"""One very rare token is chance, too, where the others are nearly certain and their standard deviation is next to 0."""
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


@dataclass(frozen=True, slots=True)
class Surprise:
    """How much more surprising to the target a text is than what the target draws itself, over all its tokens.

    A token drawn from p has the surprise -log p(token); on average over draws that is the entropy of p, with a
    variance that follows from p, too. What is left over after subtracting the entropies adds up to nothing but chance,
    whatever the text, if each token was drawn from the target's distribution given those before it.
    """

    excess: float = 0.0
    """Sum of surprise minus entropy, in nats."""
    variance: float = 0.0
    """Of `excess` over draws, in nats squared."""
    num_tokens: int = 0

    def __add__(self, other: Surprise) -> Surprise:
        return Surprise(self.excess + other.excess, self.variance + other.variance, self.num_tokens + other.num_tokens)

    @property
    def spread(self) -> float:
        """Standard deviation of `excess` over draws, in nats."""
        # Rounding in distributions that hold a single token is no surprise.
        return math.sqrt(self.variance + 1e-6 * self.num_tokens)

    @property
    def deviation(self) -> float:
        """`excess` in standard deviations: about normal for many tokens."""
        return self.excess / self.spread if self.num_tokens else 0.0


def measure_surprise(target: SteppingTarget, prompt: Prompt, tokens: Sequence[int], temperature: float) -> Surprise:
    """The surprise of `tokens` after `prompt`, by one plain forward."""
    written = torch.tensor(tokens, dtype=torch.int64, device=target.device)
    text = torch.cat([prompt.tensor().to(target.device), written])
    logits = target.score(text, num_logits=len(tokens))
    surprise = Surprise()
    for first in range(0, len(tokens), _SCORED_POSITIONS):
        log_p = torch.log_softmax(logits[first : first + _SCORED_POSITIONS].double() / temperature, dim=-1)
        chosen = written[first : first + _SCORED_POSITIONS]
        p = log_p.exp()
        cost = -log_p.clamp(min=_LEAST_LOG)
        entropy = (p * cost).sum(dim=-1)
        variance = (p * cost**2).sum(dim=-1) - entropy**2
        excess = cost.gather(1, chosen[:, None])[:, 0] - entropy
        surprise += Surprise(float(excess.sum()), float(variance.clamp(min=0).sum()), len(chosen))
    return surprise


def check_drawn(surprise: Surprise, temperature: float) -> None:
    """Raise unless texts of so much surprise, all prompts together, may have been drawn by the target.

    Raises:
        LosslessnessError: names the excess, its standard deviation and what chance allows.
    """
    allowed = _LARGEST_DEVIATION * surprise.spread + (_RARE_NATS if surprise.excess > 0 else 0.0)
    if abs(surprise.excess) > allowed:
        kind = "more" if surprise.excess > 0 else "less"
        raise LosslessnessError(
            f"{surprise.num_tokens} tokens drawn at temperature {temperature:g} are {abs(surprise.excess):.1f} nats "
            f"{kind} surprising to the target than its own draws (chance allows {allowed:.1f}, "
            f"{_LARGEST_DEVIATION:g} standard deviations): they do not follow its distribution"
        )
