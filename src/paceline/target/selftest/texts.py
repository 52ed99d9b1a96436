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
_NUM_FAR = 2304
"""More than vLLM computes at once on a CPU (2,048), and than most sliding windows; see `num_far_captures`."""
_FAR_EVERY, _FAR_WINDOW, _FAR_TAIL = 256, 32, 16
"""Of the far text the last 32 of each 256 tokens are compared: its states in whole would be most of a reference. The
last 16 are judged by themselves: a chunk that ends the text may be short."""
_MOST_FAR_COPIES = 32
"""Together they are 73,728 tokens."""
_SHORT_TEXTS = {"one token": (1, 6), "five tokens": (5, 2), "eight tokens": (8, 2)}
"""Tokens, and how many such texts: one alone may be sent to other experts (`Tolerance.routed`)."""
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
    windows: tuple[tuple[int, int], ...] = ()
    """(first token, end) of what is compared, each judged by itself; empty is all of it, judged as one."""

    @property
    def places(self) -> np.ndarray:
        """int64[m]: which tokens are compared."""
        windows = self.windows or ((0, len(self.tokens)),)
        return np.concatenate([np.arange(start, end) for start, end in windows])

    @property
    def is_short(self) -> bool:
        """So short that a single token is much of it."""
        return len(self.tokens) < _FAR_WINDOW


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
        """int32[D+1]: what is compared of document d are rows bounds[d]:bounds[d+1] of a reference."""
        return np.cumsum([0, *(len(text.places) for text in self.documents)]).astype(np.int32)

    @property
    def main(self) -> int:
        """The longest document that is compared in whole."""
        return max((d for d, text in enumerate(self.documents) if not text.windows), key=self._length)

    def text_hash(self) -> str:
        """xxh3-64 (16 hex digits) of the tokens of each document and of which are compared."""
        parts = [part.tobytes() for text in self.documents for part in (text.tokens, text.places.astype(np.int32))]
        return xxhash.xxh3_64_hexdigest(self.bounds.tobytes() + b"".join(parts))

    def _length(self, document: int) -> int:
        return len(self.documents[document].tokens)


@dataclass(frozen=True, slots=True)
class Capture:
    """One row that is asked of the engine."""

    documents: tuple[int, ...]
    """Which of the known texts, in the row's order."""
    again: bool
    """Whether all of it was asked for before."""
    copy: int = 0
    """Of the same row, asked for at the same time."""

    @property
    def alone(self) -> bool:
        return len(self.documents) == 1

    def __str__(self) -> str:
        return f"{'alone' if self.alone else 'packed'}, {'second' if self.again else 'first'} time"


def build_texts(num_tokenizer_tokens: int, num_positions: int = 0) -> KnownTexts:
    """About 800 tokens: very short documents and long ones, one the prefix of another, one that leaves it half-way.

    The same on every machine and for every version of every library. No id has a meaning here.

    Args:
        num_positions: that the target has; with more than 2,304 there is a text of so many tokens, too.

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
    short = [
        Text(f"{name} ({number})", draw(f"{name} {number}", num_tokens))
        for name, (num_tokens, num_texts) in _SHORT_TEXTS.items()
        for number in range(num_texts)
    ]
    far = [Text("far", draw("far", _NUM_FAR), windows=_far_windows())] if has_room_for_far(num_positions) else []
    return KnownTexts(
        (
            *short[:3],
            Text("long", long),
            Text("prefix of long", long[:_NUM_PREFIX], begins_like_another=True),
            *short[3:],
            Text("fork of long", fork, begins_like_another=True),
            *far,
        )
    )


def _far_windows() -> tuple[tuple[int, int], ...]:
    """The last one in two."""
    ends = range(_FAR_EVERY, _NUM_FAR + 1, _FAR_EVERY)
    *windows, (start, end) = [(end - _FAR_WINDOW, end) for end in ends]
    return (*windows, (start, end - _FAR_TAIL), (end - _FAR_TAIL, end))


def plan_captures(texts: KnownTexts, num_far: int) -> list[Capture]:
    """Each document alone, then all in one row; and everything once more, when caches know it.

    The far text is asked for once, alone, in `num_far` copies: beside the others, and not again.
    """
    far = [d for d, text in enumerate(texts.documents) if text.windows]
    every = tuple(d for d in range(len(texts.documents)) if d not in far)
    copies = [Capture((d,), False, copy) for d in far for copy in range(num_far)]
    return [*copies, *(Capture(row, again) for again in (False, True) for row in (*((d,) for d in every), every))]


def has_room_for_far(num_positions: int) -> bool:
    """Whether a target of so many positions takes the far text, and one token more, which some engines add."""
    return num_positions > _NUM_FAR


def num_far_captures(step_tokens: int) -> tuple[int, bool]:
    """How often the far text is asked for at one time, and whether that is more than the engine computes at once.

    Args:
        step_tokens: which that is.
    """
    wanted = step_tokens // _NUM_FAR + 1
    return min(wanted, _MOST_FAR_COPIES), wanted <= _MOST_FAR_COPIES
