"""What preparation found: counts of both splits, what was skipped and why, and the table that shows them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from paceline.data.packing import RowPlan
from paceline.errors import DataError

HELD_OUT = "content held out for evaluation"
"""A training sample dropped because the same content is in the held-out split; meant, so it is not limited."""


@dataclass(slots=True)
class SplitSummary:
    """Counts of one split."""

    num_samples: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_read: int = 0
    """Samples of the split's own source, skipped ones included; 0 for a held-out split made from `data.train`."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason -> samples."""
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> where the first such sample is, and what is wrong with it."""

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    @property
    def supervised_share(self) -> float:
        return self.num_supervised / self.num_tokens if self.num_tokens else 0.0


@dataclass(slots=True)
class PrepareSummary:
    """Counts of both splits."""

    train: SplitSummary
    eval: SplitSummary
    max_token_id: int
    """-1 without tokens."""
    max_token_origin: str
    """Where a sample with that token is."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrepareSummary:
        """What `to_dict` wrote."""
        return cls(**(values | {name: SplitSummary(**values[name]) for name in ("train", "eval")}))


def check_summary(summary: PrepareSummary, max_skipped_fraction: float, target_vocab_size: int) -> None:
    """Raise unless the prepared data can be trained on.

    Raises:
        DataError: a token the target has no embedding for, too much was skipped, or nothing is left.
    """
    if summary.max_token_id >= target_vocab_size:
        raise DataError(
            f"{summary.max_token_origin} has token {summary.max_token_id}, the target's embedding has "
            f"{target_vocab_size} rows: the data was tokenized with another tokenizer"
        )
    for name, split in (("train", summary.train), ("eval", summary.eval)):
        num_faulty = split.num_skipped - split.skipped.get(HELD_OUT, 0)
        if num_faulty > max_skipped_fraction * split.num_read:
            raise DataError(
                f"data.{name}: {num_faulty} of {split.num_read} samples ({num_faulty / split.num_read:.1%}) cannot be "
                f"used, data.max_skipped_fraction allows {max_skipped_fraction:.1%}:\n{explain_skipped(split)}"
            )
    if not summary.train.num_samples:
        raise DataError(f"data.train has no sample that can be trained on\n{explain_skipped(summary.train)}".rstrip())


def explain_skipped(split: SplitSummary) -> str:
    """A line for every reason: its count and an example."""
    falling = sorted(split.skipped.items(), key=lambda item: (-item[1], item[0]))
    return "\n".join(f"  {reason}: {count}, e.g. {split.examples[reason]}" for reason, count in falling)


def prepare_table(summary: PrepareSummary, train: RowPlan, held_out: RowPlan) -> list[tuple[str, str, str]]:
    """What `prepare` prints, as plain text: a header, then one (name, training, held out) a line."""
    splits, plans = (summary.train, summary.eval), (train, held_out)
    rows = [
        ("", "train", "held out"),
        ("samples", *(f"{split.num_samples:,}" for split in splits)),
        ("tokens", *(f"{split.num_tokens:,}" for split in splits)),
        ("supervised", *(f"{split.supervised_share:.1%}" for split in splits)),
        (f"rows of {train.row_tokens:,}", *(f"{plan.num_rows:,}" for plan in plans)),
        ("fill (best possible)", *(f"{plan.fill:.1%} ({plan.best_fill:.1%})" for plan in plans)),
        ("cut at the end of a row", *(f"{plan.num_cut:,}" for plan in plans)),
    ]
    reasons = sorted({*summary.train.skipped, *summary.eval.skipped})
    rows += [(f"skipped: {reason}", *(f"{split.skipped.get(reason, 0):,}" for split in splits)) for reason in reasons]
    return [(name, first, second) for name, first, second in rows]
