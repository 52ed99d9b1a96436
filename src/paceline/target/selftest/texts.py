"""The known texts: token ids made from the size of a vocabulary alone, and the captures that are asked for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash

from paceline.errors import TargetError

_NUM_LONG = 320
"""Tokens of the longest text: more than a block of any cache, and far enough for a wrong RoPE to show."""
_NUM_PREFIX = 192
"""Whole blocks of every prefix cache (1, 16 or 64 tokens)."""
_NUM_FORK = 56
_EDGE = 32
"""One id in so many is left out at either end of the vocabulary, where special tokens and image placeholders are."""


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """One document."""

    name: str
    tokens: np.ndarray
    """int32[n]."""
    begins_like_another: bool = False
    """Whether a long beginning of it is that of another document, so that a cache of prefixes has it."""


@dataclass(frozen=True, slots=True, eq=False)
class KnownTexts:
    """The documents of the self-test; end to end they are the rows of a reference."""

    documents: tuple[Text, ...]

    @property
    def tokens(self) -> np.ndarray:
        """int32[T] of all documents, end to end."""
        return np.concatenate([text.tokens for text in self.documents])

    @property
    def bounds(self) -> np.ndarray:
        """int32[D+1]: document d is tokens[bounds[d]:bounds[d+1]]."""
        return np.cumsum([0, *(len(text.tokens) for text in self.documents)]).astype(np.int32)

    def text_hash(self) -> str:
        """xxh3-64 (16 hex digits) of tokens and bounds."""
        return xxhash.xxh3_64_hexdigest(self.tokens.tobytes() + self.bounds.tobytes())


@dataclass(frozen=True, slots=True)
class Capture:
    """One row that is asked of the engine."""

    documents: tuple[int, ...]
    """Which of the known texts, in the row's order."""
    again: bool
    """Whether all of it was asked for before."""

    @property
    def alone(self) -> bool:
        return len(self.documents) == 1

    def __str__(self) -> str:
        return f"{'alone' if self.alone else 'packed'}, {'second' if self.again else 'first'} time"


def build_texts(num_tokenizer_tokens: int) -> KnownTexts:
    """About 800 tokens: very short documents and long ones, one the prefix of another, one that leaves it half-way.

    The same on every machine and for every version of every library. No id has a meaning here.

    Raises:
        TargetError: a vocabulary too small to tell tokens apart.
    """
    if num_tokenizer_tokens < 4:
        raise TargetError(f"a self-test needs a vocabulary of at least 4 tokens, this one has {num_tokenizer_tokens}")
    edge = num_tokenizer_tokens // _EDGE
    num_ids = num_tokenizer_tokens - 2 * edge

    def draw(name: str, num_tokens: int) -> np.ndarray:
        ids = (edge + xxhash.xxh3_64_intdigest(f"{name} {i}".encode()) % num_ids for i in range(num_tokens))
        return np.fromiter(ids, np.int32, num_tokens)

    long = draw("long", _NUM_LONG)
    fork = np.concatenate([long[:_NUM_PREFIX], draw("fork", _NUM_FORK)])
    return KnownTexts(
        (
            Text("one token", draw("one token", 1)),
            Text("long", long),
            Text("prefix of long", long[:_NUM_PREFIX], begins_like_another=True),
            Text("five tokens", draw("five tokens", 5)),
            Text("fork of long", fork, begins_like_another=True),
            Text("eight tokens", draw("eight tokens", 8)),
        )
    )


def plan_captures(texts: KnownTexts) -> list[Capture]:
    """Each document alone, then all in one row; and everything once more, when caches know it."""
    every = tuple(range(len(texts.documents)))
    return [Capture(row, again) for again in (False, True) for row in (*((d,) for d in every), every)]
