"""What a target's engine takes, and what rows will ask of it: compared before the first row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What is taken, besides what follows from facts about the target; None is no limit."""

    layers: tuple[int, ...] | None = None
    """Capture layers that may be asked for, ascending."""
    max_document_tokens: int | None = None
    max_row_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class RowSizes:
    """The largest of some rows, in tokens; 0 where nobody knows them beforehand."""

    longest_document: int = 0
    longest_row: int = 0

    def __or__(self, other: RowSizes) -> RowSizes:
        """Of these rows and others together."""
        longest = max(self.longest_document, other.longest_document)
        return RowSizes(longest, max(self.longest_row, other.longest_row))
