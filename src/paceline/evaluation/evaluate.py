"""Acceptance length and speed of drafts by really decoding prompts, with the proof that output is unchanged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from paceline.drafts.interface import DraftAlgorithm, DraftDecoder
from paceline.evaluation.decoding import Decoded, decode_plain, decode_with_draft
from paceline.evaluation.lookup import LookupDecoder
from paceline.evaluation.losslessness import Prompt, check_equal, count_ties
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
    """By transformers' `generate`, a run of its own; None where numerics are 16-bit and output is scored instead."""


@dataclass(slots=True)
class DecodingResult:
    """One draft over all prompts."""

    sums: WalkSums
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
    """Compared token for token with `generate` (fp32); else every token was scored and ties counted."""
    walk: WalkSums | None = None
    """The serving walk over the same texts, where the draft has one."""
    walk_agreeing_steps: int = 0
    """Decoding steps that the walk takes, too: same start, same accepted tokens."""

    def result(self) -> dict[str, Any]:
        """All figures as plain data; those of `WalkSums.result` and:

        tokens_per_s, plain_tokens_per_s (prompt included in both times), speedup, tokens_per_forward,
        lossless ("exact" or "within ties"), ties, and `walk` with its own figures and `agreeing_steps`.
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
            "lossless": "exact" if self.exact else "within ties",
            "ties": self.num_ties,
        }
        if self.walk is not None:
            figures["walk"] = self.walk.result() | {"agreeing_steps": self.walk_agreeing_steps}
        return figures


def decode_references(target: SteppingTarget, prompts: Iterable[Prompt], max_new_tokens: int) -> list[Reference]:
    """The target's own greedy answers, timed; in fp32 they are held against `generate`.

    Raises:
        LosslessnessError: stepping through a cache gave another text than `generate` (or than one plain forward).
    """
    references: list[Reference] = []
    for prompt in prompts:
        if not references:
            decode_plain(target, prompt.tensor(), _WARM_UP_TOKENS)
        plain = decode_plain(target, prompt.tensor(), max_new_tokens)
        generated = target.generate(prompt.tensor(), max_new_tokens) if target.dtype == torch.float32 else None
        reference = Reference(prompt, plain, generated)
        _check_lossless(target, reference, plain.tokens, max_new_tokens)
        references.append(reference)
        logger.debug("reference for prompt %s: %d tokens", prompt.name, len(plain.tokens))
    return references


def evaluate_decoder(
    target: SteppingTarget,
    references: Sequence[Reference],
    build_decoder: Callable[[], DraftDecoder],
    layers: tuple[int, ...],
    max_new_tokens: int,
) -> DecodingResult:
    """Decode every prompt with a fresh decoder that reads the states of `layers`.

    Raises:
        LosslessnessError: names the prompt and the position where the output is not the target's.
    """
    result = DecodingResult(WalkSums(_decoder_of(build_decoder).num_drafted))
    for i, reference in enumerate(references):
        prompt = reference.prompt.tensor()
        if i == 0:
            decode_with_draft(target, _decoder_of(build_decoder), layers, prompt, _WARM_UP_TOKENS)
        decoded = decode_with_draft(target, _decoder_of(build_decoder), layers, prompt, max_new_tokens)
        result.num_ties += _check_lossless(target, reference, decoded.tokens, max_new_tokens)
        result.exact = result.exact and reference.generated is not None
        result.sums.add_steps(decoded.steps)
        result.answers.append(decoded.tokens)
        result.steps.append(decoded.steps)
        result.num_forwards += decoded.num_forwards
        result.uncut_accepted += decoded.uncut_accepted
        result.seconds += decoded.seconds
        result.plain_seconds += reference.plain.seconds * len(decoded.tokens) / len(reference.plain.tokens)
    return result


def evaluate_lookup(
    target: SteppingTarget, references: Sequence[Reference], num_drafted: int, max_new_tokens: int
) -> DecodingResult:
    """The baseline without training: prompt look-up."""
    return evaluate_decoder(target, references, lambda: LookupDecoder(num_drafted), (), max_new_tokens)


def evaluate_algorithm(
    target: SteppingTarget, references: Sequence[Reference], algorithm: DraftAlgorithm, max_new_tokens: int
) -> DecodingResult:
    """A draft by real decoding, and the serving walk over the texts it wrote.

    Raises:
        LosslessnessError: see `evaluate_decoder`.
    """
    layers = type(algorithm).feature_spec(algorithm.config, algorithm.context.info, evaluation=True).layers
    result = evaluate_decoder(target, references, algorithm.decoder, layers, max_new_tokens)
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
