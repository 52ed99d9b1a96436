"""Recordings: names and documents of a directory with features that were computed once and are trained on many times.

manifest.json               what was recorded, and which shards there are; replaced as a whole, written last
target.json                 TargetInfo
weights.safetensors         embedding, lm_head (unless it is the embedding), lm_head_bias (if there is one)
tokenizer/                  the target's
prepared/                   the rows of both splits, as `paceline prepare` makes them
shards/00000.features       rows one behind the other, each as the body of a server's reply (schema.wire)
shards/00000.json           where each row lies in it
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from paceline.schema.protocol import HexDigits, Message, SpecMessage
from paceline.schema.rows import RowRequest

SPEC_NAME = "recorded"
"""What the recorded features are called in requests, and so in the hash that a row is found by."""
SplitName = Literal["train", "eval"]
ShardName = Annotated[str, Field(pattern=r"^[0-9]{5}$")]


class RecordedRow(Message):
    """One row of a shard."""

    split: SplitName
    row_id: int = Field(ge=0)
    """In the plan of its split."""
    key: HexDigits
    """See `row_key`."""
    offset: int = Field(ge=0)
    """Bytes from the start of the shard; a multiple of ALIGNMENT."""
    num_bytes: int = Field(gt=0)
    """Of head and buffer together."""
    checksum: HexDigits
    """xxh3-64 of these bytes."""


class ShardRows(Message):
    """shards/NNNNN.json."""

    rows: tuple[RecordedRow, ...]


class RecordedShard(Message):
    """A shard that is whole."""

    name: ShardName
    num_rows: int = Field(gt=0)
    num_bytes: int = Field(gt=0)
    checksum: HexDigits
    """xxh3-64 of the .features file."""
    rows_checksum: HexDigits
    """xxh3-64 of the .json file."""


class RowSettings(Message):
    """How the rows were made, as far as another run may ask for it in its own configuration."""

    row_tokens: int
    packing_window: int
    seed: int
    """Of packing."""
    train_on: str
    max_sample_tokens: int | None
    min_supervised_tokens: int
    reserved_tokens: tuple[int, ...]
    """No sample has one of these."""


class RecordingManifest(Message):
    """manifest.json."""

    format: Literal[1] = 1
    paceline: str
    """The version that wrote it."""
    weight_fingerprint: str
    tokenizer_fingerprint: str
    """Of the target, as in target.json."""
    files: dict[str, HexDigits]
    """Everything but the shards, by path in the directory: xxh3-64."""
    spec: SpecMessage
    data_fingerprint: str
    """Of the rows: equal fingerprints mean equal rows."""
    rows: RowSettings
    num_train_rows: int
    num_eval_rows: int
    shards: tuple[RecordedShard, ...] = ()
    complete: bool = False
    """Whether every row of both splits is in a shard."""

    @property
    def num_rows(self) -> int:
        """Rows of both splits."""
        return self.num_train_rows + self.num_eval_rows

    @property
    def num_recorded_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)


@dataclass(frozen=True, slots=True)
class RecordingDir:
    """Paths inside a recording; creates nothing."""

    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def lock(self) -> Path:
        """Held while somebody records."""
        return self.root / "lock"

    @property
    def target_info(self) -> Path:
        return self.root / "target.json"

    @property
    def weights(self) -> Path:
        return self.root / "weights.safetensors"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def prepared(self) -> Path:
        return self.root / "prepared"

    def rows(self, data_fingerprint: str) -> Path:
        """What `data.prepared.load_prepared` opens."""
        return self.prepared / f"rows-{data_fingerprint}"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    def features(self, shard: str) -> Path:
        return self.shards / f"{shard}.features"

    def shard_rows(self, shard: str) -> Path:
        return self.shards / f"{shard}.json"


def row_key(request: RowRequest) -> str:
    """16 hex digits of what a row's features depend on: not its position, nor what the features are called."""
    return dataclasses.replace(request, spec=SPEC_NAME).row_hash()
