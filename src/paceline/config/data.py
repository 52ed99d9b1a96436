"""`[data]` and `[regeneration]`: where conversations come from and how they become rows."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from paceline.config.base import Config

FEWEST_SUPERVISED_TOKENS = 2
"""What a sample must have for any draft to learn from it: a token to start at, and one to predict."""


class DataConfig(Config):
    """Conversations or documents, their loss masks, and how they are packed."""

    train: str = Field(min_length=1)
    """JSONL, JSON or Parquet file, a directory of them, or a datasets hub id (OWNER/NAME or OWNER/NAME:SPLIT)."""
    eval: str | None = None
    """Held-out data of the same form; None splits `eval_fraction` off `train`."""
    eval_fraction: float = Field(0.01, ge=0.0, lt=1.0)
    """Share of `train` held out when `eval` is not set (whole samples, chosen by a hash of each)."""
    tokenizer: str | None = None
    """Path or hub id; None uses the target's own."""
    chat_template: str | None = None
    """A file with a Jinja chat template that replaces the tokenizer's own."""
    chat_template_args: dict[str, Any] = Field(default_factory=dict)
    """Variables handed to the chat template, e.g. `{ enable_thinking = false }`; give the server the same."""
    train_on: Literal["all_turns", "last_turn"] = "all_turns"
    """Which assistant turns are supervised."""
    assistant_start: str | None = None
    """For rows with `text`: the marker after which tokens are supervised (matched on token ids)."""
    assistant_end: str | None = None
    """For rows with `text`: the marker that ends supervision; it is itself supervised."""
    row_tokens: int = Field(8192, ge=16)
    """Tokens in a packed row: the unit of request, transport and training."""
    max_sample_tokens: int | None = Field(None, ge=16)
    """Longer samples are skipped and counted; None cuts those longer than a row into pieces."""
    min_supervised_tokens: int | None = Field(None, ge=0)
    """Samples with fewer are skipped and counted; None is 2 * block_size of the largest DFlash draft, without one 2."""
    max_skipped_fraction: float = Field(0.05, ge=0.0, le=1.0)
    """The run ends if a larger share of samples had to be skipped."""
    packing_window: int = Field(2048, ge=1)
    """Documents packed together by best fit; larger fills better and mixes less."""
    num_workers: int = Field(1, ge=1)
    """Processes that tokenize."""
    cache_dir: str | None = None
    """Where tokenized data is kept; None is `prepared/` in the run directory."""
    recorded: str | None = None
    """A directory written by `paceline record`. Rows found in it are read from there, the others asked of the target;
    with placement "recorded" there is no other source, and the rows of training are those of the recording."""

    @model_validator(mode="after")
    def _an_end_marker_has_a_start(self) -> Self:
        if self.assistant_end and not self.assistant_start:
            raise ValueError("assistant_end is set without assistant_start: set both, or neither")
        return self


class RegenerationConfig(Config):
    """Rewriting the answers with the target itself, which DFlash's hard labels want."""

    batch_size: int = Field(16, ge=1)
    """Conversations generated together."""
    max_new_tokens: int = Field(1024, ge=1)
    """Longer answers are cut and marked `"truncated": true`."""
    temperature: float = Field(0.0, ge=0.0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus sampling; only with a temperature above 0."""
    seed: int = 0
    """Each answer is drawn from (seed, sample id): order and batch size do not matter to the draw."""
    output: str | None = None
    """JSONL to write; None is `regenerated.jsonl` in the run directory."""
