"""Real speculative decoding in torch, batch 1, with a key/value cache on both sides."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paceline.drafts.interface import DraftDecoder
from paceline.evaluation.walk import Step
from paceline.target.hf.stepping import SteppingTarget


@dataclass(frozen=True, slots=True)
class Choice:
    """How the target chooses its next token."""

    temperature: float = 0.0
    """0 is greedy; above, tokens are drawn from the target's distribution at this temperature."""
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def generator(self, number: int) -> torch.Generator:
        """For the draws of prompt `number`, whatever is decoded before it."""
        words = np.random.SeedSequence([self.seed % 2**64, number]).generate_state(2, np.uint32)
        return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))


GREEDY = Choice()


@dataclass(frozen=True, slots=True)
class Decoded:
    """One finished text."""

    tokens: list[int]
    """New tokens; the last is an end token unless `max_new_tokens` came first."""
    steps: list[Step]
    """Drafting steps in text coordinates (prompt included), cut where the text ends; none without a draft."""
    num_forwards: int
    """Target forwards, the prompt's included."""
    uncut_accepted: int
    """Drafted tokens the target agreed with, also past the end of the text (vLLM's counter)."""
    seconds: float
    """From the prompt to the last token."""


def decode_with_draft(
    target: SteppingTarget,
    decoder: DraftDecoder,
    layers: tuple[int, ...],
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Decoded:
    """What the target writes after int64[n] `prompt`, a draft proposing; greedy output is the target's own.

    Args:
        decoder: fresh; reads the states of `layers`.
        temperature: 0 is greedy; above, output is drawn from the target's distribution (CPU `generator`).
    """
    began = time.perf_counter()
    sequence = target.sequence(layers)
    device = target.device
    prompt = prompt.to(device)
    read = sequence.advance(prompt, num_logits=1)
    new = verify(torch.zeros(0, dtype=torch.int64, device=device), read.logits, temperature, generator)
    with torch.no_grad():
        decoder.extend(read.hidden, torch.cat([prompt[1:], new]))
    tokens = new.tolist()
    taken: list[tuple[int, int]] = []
    num_forwards = 1
    while not _is_finished(tokens, target.eos_token_ids, max_new_tokens):
        with torch.no_grad():
            drafts = decoder.propose().to(device)
        read = sequence.advance(torch.cat([new[-1:], drafts]))
        new = verify(drafts, read.logits, temperature, generator)
        sequence.crop(len(drafts) + 1 - len(new))
        with torch.no_grad():
            decoder.extend(read.hidden[: len(new)], new)
        taken.append((len(prompt) + len(tokens) - 1, len(new) - 1))
        tokens += new.tolist()
        num_forwards += 1
    tokens = _cut(tokens, target.eos_token_ids, max_new_tokens)
    return Decoded(
        tokens=tokens,
        steps=_finished_steps(taken, len(prompt) + len(tokens), decoder.num_drafted),
        num_forwards=num_forwards,
        uncut_accepted=sum(accepted for _, accepted in taken),
        seconds=time.perf_counter() - began,
    )


def decode_plain(
    target: SteppingTarget,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Decoded:
    """The same loop without a draft: one token a forward."""
    return decode_with_draft(target, _NoDraft(), (), prompt, max_new_tokens, temperature, generator)


def verify(drafts: Tensor, logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """int64[a + 1]: the accepted drafted tokens and the target's own next one.

    Args:
        drafts: int64[k].
        logits: float32[k + 1, V], the target's after the newest token and after each drafted one.
    """
    if temperature > 0:
        return accept_by_rejection(drafts, torch.softmax(logits / temperature, dim=-1), generator)
    greedy = logits.argmax(dim=-1)
    num_accepted = (drafts == greedy[:-1]).long().cumprod(dim=0).sum()
    return greedy[: int(num_accepted) + 1]


def accept_by_rejection(drafts: Tensor, probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """int64[a + 1]: tokens distributed as if the target had drawn each itself.

    A drafted token x is certain of its draft (q(x) = 1), so it stands with probability p(x); one that falls is
    replaced by a draw from p without x, and ends the step.

    Args:
        drafts: int64[k].
        probabilities: float32[k + 1, V], the target's.

    Source: Leviathan et al., arXiv 2211.17192, section 2.3.
    """
    probabilities = probabilities.cpu()
    chances = torch.rand(len(drafts), generator=generator)
    for i, token in enumerate(drafts.tolist()):
        residual = probabilities[i].clone()
        residual[token] = 0
        # A residual of nothing at all is rounding in a distribution that holds only this token.
        if chances[i] >= probabilities[i, token] and residual.sum() > 0:
            last = torch.multinomial(residual, 1, generator=generator)
            return torch.cat([drafts[:i], last.to(drafts.device)])
    last = torch.multinomial(probabilities[len(drafts)], 1, generator=generator)
    return torch.cat([drafts, last.to(drafts.device)])


def _is_finished(tokens: Sequence[int], eos: Sequence[int], max_new_tokens: int) -> bool:
    return len(tokens) >= max_new_tokens or any(token in eos for token in tokens)


def _cut(tokens: list[int], eos: Sequence[int], max_new_tokens: int) -> list[int]:
    tokens = tokens[:max_new_tokens]
    for i, token in enumerate(tokens):
        if token in eos:
            return tokens[: i + 1]
    return tokens


def _finished_steps(taken: list[tuple[int, int]], text_length: int, num_drafted: int) -> list[Step]:
    steps = []
    for start, accepted in taken:
        remaining = text_length - 1 - start
        steps.append(Step(start, min(accepted, remaining), remaining, remaining >= num_drafted))
    return steps if num_drafted else []


class _NoDraft(DraftDecoder):
    num_drafted = 0

    def extend(self, hidden: Tensor, next_tokens: Tensor) -> None:
        """Nothing to take in."""

    def propose(self) -> Tensor:
        return torch.zeros(0, dtype=torch.int64)
