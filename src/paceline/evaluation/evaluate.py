"""Acceptance length and speed of drafts by really decoding prompts, with the proof that output is unchanged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from paceline.drafts.interface import DraftAlgorithm, DraftDecoder
from paceline.evaluation.decoding import GREEDY, Choice, Decoded, decode_plain, decode_with_draft
from paceline.evaluation.lookup import LookupDecoder
from paceline.evaluation.losslessness import (
    Prompt,
    Surprise,
    check_drawn,
    check_equal,
    count_ties,
    measure_surprise,
)
from paceline.evaluation.walk import Step, WalkSums, sum_walk, walk_feature_row
from paceline.schema.features import FeatureRow, Features
from paceline.schema.rows import Row
from paceline.target.hf.stepping import SteppingTarget

_WARM_UP_TOKENS = 4
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reference:
    """What the target writes alone after one prompt."""

    prompt: Prompt
    plain: Decoded
    generated: list[int] | None
    """By transformers' `generate`, a run of its own; None where output is scored instead: 16-bit numbers, or drawn."""


@dataclass(slots=True)
class DecodingResult:
    """One draft over all prompts."""

    sums: WalkSums
    choice: Choice = GREEDY
    answers: list[list[int]] = field(default_factory=list)
    """New tokens, one list a prompt."""
    steps: list[list[Step]] = field(default_factory=list)
    """Drafting steps, one list a prompt."""
    num_forwards: int = 0
    uncut_accepted: int = 0
    seconds: float = 0.0
    plain_seconds: float = 0.0
    num_ties: int = 0
    exact: bool = True
    """Compared token for token with `generate` (greedy in fp32); else every token was scored."""
    surprise: Surprise = field(default_factory=Surprise)
    """Of drawn output to the target."""
    walk: WalkSums | None = None
    """The serving walk over the same texts, where the draft has one."""
    walk_agreeing_steps: int = 0
    """Decoding steps that the walk takes, too: same start, same accepted tokens."""

    def result(self) -> dict[str, Any]:
        """All figures as plain data; those of `WalkSums.result` and:

        tokens_per_s, plain_tokens_per_s (prompt included in both times), speedup, tokens_per_forward,
        lossless ("exact", "within ties", or how far drawn output is from the target's distribution), ties, and
        `walk` with its own figures and `agreeing_steps` (greedy output only: it asks for greedy tokens).
        """
        num_tokens = sum(len(answer) for answer in self.answers)
        figures = self.sums.result()
        # The text is the target's own output: whether x is greedy says nothing here.
        del figures["greedy_match"]
        figures |= {
            "acceptance_length_uncut": 1 + self.uncut_accepted / self.sums.steps if self.sums.steps else None,
            "prompts": len(self.answers),
            "new_tokens": num_tokens,
            "seconds": self.seconds,
            "tokens_per_s": num_tokens / self.seconds if self.seconds else None,
            "plain_tokens_per_s": num_tokens / self.plain_seconds if self.plain_seconds else None,
            "speedup": self.plain_seconds / self.seconds if self.seconds else None,
            "tokens_per_forward": num_tokens / self.num_forwards if self.num_forwards else None,
            "lossless": self._lossless(),
            "ties": self.num_ties,
        }
        if self.walk is not None:
            figures["walk"] = self.walk.result() | {"agreeing_steps": self.walk_agreeing_steps}
        return figures

    def _lossless(self) -> str:
        if not self.choice.is_greedy:
            return f"as drawn at temperature {self.choice.temperature:g} ({self.surprise.deviation:+.1f} sd)"
        return "exact" if self.exact else "within ties"


def decode_references(
    target: SteppingTarget, prompts: Iterable[Prompt], max_new_tokens: int, choice: Choice = GREEDY
) -> list[Reference]:
    """The target's own answers, timed; greedy ones in fp32 are held against `generate`.

    Raises:
        LosslessnessError: stepping through a cache gave another text than `generate` (or than one plain forward).
    """
    references: list[Reference] = []
    surprise = Surprise()
    for i, prompt in enumerate(prompts):
        if not references:
            decode_plain(target, prompt.tensor(), _WARM_UP_TOKENS)
        plain = decode_plain(target, prompt.tensor(), max_new_tokens, choice.temperature, choice.generator(i))
        comparable = choice.is_greedy and target.dtype == torch.float32
        generated = target.generate(prompt.tensor(), max_new_tokens) if comparable else None
        reference = Reference(prompt, plain, generated)
        if choice.is_greedy:
            _check_lossless(target, reference, plain.tokens, max_new_tokens)
        else:
            surprise += measure_surprise(target, prompt, plain.tokens, choice.temperature)
        references.append(reference)
        logger.debug("reference for prompt %s: %d tokens", prompt.name, len(plain.tokens))
    check_drawn(surprise, choice.temperature)
    return references


def evaluate_decoder(
    target: SteppingTarget,
    references: Sequence[Reference],
    build_decoder: Callable[[], DraftDecoder],
    layers: tuple[int, ...],
    max_new_tokens: int,
    choice: Choice = GREEDY,
) -> DecodingResult:
    """Decode every prompt with a fresh decoder that reads the states of `layers`.

    Raises:
        LosslessnessError: names the prompt and the position where greedy output is not the target's, or says how far
            drawn output is from the target's distribution.
    """
    result = DecodingResult(WalkSums(_decoder_of(build_decoder).num_drafted), choice)
    for i, reference in enumerate(references):
        prompt = reference.prompt.tensor()
        if i == 0:
            decode_with_draft(target, _decoder_of(build_decoder), layers, prompt, _WARM_UP_TOKENS)
        decoded = decode_with_draft(
            target,
            _decoder_of(build_decoder),
            layers,
            prompt,
            max_new_tokens,
            choice.temperature,
            choice.generator(i),
        )
        if choice.is_greedy:
            result.num_ties += _check_lossless(target, reference, decoded.tokens, max_new_tokens)
        else:
            result.surprise += measure_surprise(target, reference.prompt, decoded.tokens, choice.temperature)
        result.exact = result.exact and reference.generated is not None
        result.sums.add_steps(decoded.steps)
        result.answers.append(decoded.tokens)
        result.steps.append(decoded.steps)
        result.num_forwards += decoded.num_forwards
        result.uncut_accepted += decoded.uncut_accepted
        result.seconds += decoded.seconds
        result.plain_seconds += reference.plain.seconds * len(decoded.tokens) / len(reference.plain.tokens)
    check_drawn(result.surprise, choice.temperature)
    return result


def evaluate_lookup(
    target: SteppingTarget,
    references: Sequence[Reference],
    num_drafted: int,
    max_new_tokens: int,
    choice: Choice = GREEDY,
) -> DecodingResult:
    """The baseline without training: prompt look-up."""
    return evaluate_decoder(target, references, lambda: LookupDecoder(num_drafted), (), max_new_tokens, choice)


def evaluate_algorithm(
    target: SteppingTarget,
    references: Sequence[Reference],
    algorithm: DraftAlgorithm,
    max_new_tokens: int,
    choice: Choice = GREEDY,
) -> DecodingResult:
    """A draft by real decoding, and the serving walk over the texts it wrote if they are greedy.

    Raises:
        LosslessnessError: see `evaluate_decoder`.
    """
    layers = type(algorithm).feature_spec(algorithm.config, algorithm.context.info, evaluation=True).layers
    result = evaluate_decoder(target, references, algorithm.decoder, layers, max_new_tokens, choice)
    if not choice.is_greedy:
        return result
    result.walk = WalkSums(algorithm.num_drafted)
    for reference, answer, decoded in zip(references, result.answers, result.steps, strict=True):
        row = text_features(target, layers, reference.prompt, answer)
        walked = walk_feature_row(algorithm, row)
        result.walk = result.walk + sum_walk(algorithm, row, walked)
        result.walk_agreeing_steps += len(set(decoded).intersection(*walked))
    return result


def text_features(target: SteppingTarget, layers: tuple[int, ...], prompt: Prompt, answer: Sequence[int]) -> FeatureRow:
    """A row of one document, the prompt and its answer, the answer supervised, with the target's features.

    `greedy` is computed from the prompt's last token on and -1 before.
    """
    tokens = torch.tensor([*prompt.tokens, *answer], dtype=torch.int64, device=target.device)
    read = target.sequence(layers).advance(tokens, num_logits=len(answer) + 1)
    greedy = torch.full((len(tokens),), -1, dtype=torch.int32, device=target.device)
    greedy[len(prompt.tokens) - 1 :] = read.logits.argmax(dim=-1).int()
    row = Row(
        position=0,
        epoch=0,
        row_id=0,
        tokens=tokens.cpu().numpy().astype(np.int32),
        documents=np.array([0, len(tokens)], np.int32),
        spans=np.array([[len(prompt.tokens), len(tokens)]], np.int32),
        span_cut=np.zeros(1, bool),
        sample_ids=np.zeros(1, np.int64),
        pieces=np.zeros(1, np.int32),
    )
    features = Features(
        layers=layers,
        hidden=read.hidden.unflatten(1, (len(layers), -1)),
        greedy=greedy,
        final_hidden=None,
        final_index=None,
        logsumexp=None,
        row_hash="",
        finite=bool(read.hidden.isfinite().all()),
    )
    return FeatureRow(row, features)


def repeated_share(texts: Iterable[Sequence[int]], n: int = 4) -> float:
    """Share of n-grams, in [0, 1], that occurred before in the same text: how much an answer loops."""
    total = repeated = 0
    for text in texts:
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0


def _decoder_of(build_decoder: Callable[[], DraftDecoder]) -> DraftDecoder:
    with torch.no_grad():
        return build_decoder()


def _check_lossless(target: SteppingTarget, reference: Reference, tokens: Sequence[int], max_new_tokens: int) -> int:
    """Ties counted (16-bit numbers); 0 where output was compared exactly."""
    if reference.generated is not None:
        check_equal(reference.prompt, tokens, reference.generated)
        return 0
    return count_ties(target, reference.prompt, tokens, max_new_tokens)
