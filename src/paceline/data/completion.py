"""What regeneration asks of whoever writes answers: a batch of prompts in, one answer each out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to where the assistant speaks."""

    sample_id: int
    """Of the conversation; with `turn` it names the draw of a sampled answer."""
    turn: int
    """How many answers of this conversation were written before, from 0."""
    messages: list[dict[str, Any]]
    """OpenAI's keys; the last one is not the assistant's."""
    tools: list[dict[str, Any]] | None = None
    """Tool definitions in OpenAI's form."""


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What the assistant says, or why it says nothing."""

    text: str
    """Without the token that ended it."""
    num_tokens: int = 0
    """Tokens generated, the ending one included."""
    truncated: bool = False
    """Cut by the length limit."""
    failure: str | None = None
    """A short reason, the same for all prompts that failed alike; None if there is an answer."""
    detail: str = ""
    """What exactly was wrong with this prompt."""


Complete = Callable[[Sequence[Prompt]], Sequence[Answer]]
"""One answer a prompt, in order. Raises StoppedError when it was asked to stop; other errors end the run."""
