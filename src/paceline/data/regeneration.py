"""Answers rewritten by the target: turn by turn, in the order of the input, resumable at any line."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation up to the point where the assistant speaks."""

    sample_id: int
    turn: int
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    text: str
    num_tokens: int = 0
    truncated: bool = False
    failure: str | None = None
