"""Rows as read -> tokenized samples, or the reason why a row gives none. Runs inside `datasets.Dataset.map`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from paceline.config.data import FEWEST_SUPERVISED_TOKENS, DataConfig
from paceline.data.chat import ChatSamples, ChatTokenizer
from paceline.data.conversations import Conversation, UnusableSampleError, build_conversation, content_id
from paceline.data.masks import spans_between, spans_of_mask
from paceline.data.sources import RawRow, decode_batch
from paceline.errors import DataError

SAMPLE_FEATURES = datasets.Features(
    {
        "tokens": datasets.List(datasets.Value("int32")),
        "spans": datasets.List(datasets.Value("int32")),
        "sample_id": datasets.Value("int64"),
        "content": datasets.Value("int64"),
        "tokens_hash": datasets.Value("int64"),
        "origin": datasets.Value("string"),
        "reason": datasets.Value("string"),
        "detail": datasets.Value("string"),
    }
)
"""One entry is a sample, or (with a `reason`) something skipped. `content` is what the train/eval split is made by:
samples of one conversation share it. `spans` is [start, end) pairs, flat."""
_MAX_TOKEN_ID = 2**31 - 1
_NO_TOKENS = np.zeros(0, np.int32)


@dataclass(slots=True)
class _Columns:
    """The entries of one batch, column by column."""

    values: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in SAMPLE_FEATURES})

    def add(self, **entry: Any) -> None:
        for name, column in self.values.items():
            column.append(entry.get(name))

    def skip(self, row: RawRow, error: UnusableSampleError) -> None:
        self.add(tokens=_NO_TOKENS, spans=_NO_TOKENS, origin=row.origin, reason=error.reason, detail=error.detail)


class SampleTokenizer:
    """Tokenizes rows with `input_ids` and `loss_mask`, with `messages` or `conversations`, or with `text`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        reserved_tokens: frozenset[int] = frozenset(),
    ) -> None:
        """Read the chat template, if one is set.

        Args:
            reserved_tokens: ids that mean something else to a draft than text; samples with one are skipped.

        Raises:
            DataError: the template's file cannot be read, or a marker has no tokens.
        """
        self._tokenizer = tokenizer
        self._config = config
        self._reserved_tokens = np.array(sorted(reserved_tokens), np.int32)
        least = config.min_supervised_tokens
        self.min_supervised_tokens = FEWEST_SUPERVISED_TOKENS if least is None else least
        self.template = read_chat_template(config.chat_template)
        self._start_ids = self._marker_ids("assistant_start", config.assistant_start)
        self._end_ids = self._marker_ids("assistant_end", config.assistant_end)

    @cached_property
    def _chat(self) -> ChatTokenizer:
        # Built by the first conversation: data without any needs no chat template.
        return ChatTokenizer(self._tokenizer, self.template, self._config.chat_template_args, self._config.train_on)

    def __call__(self, batch: dict[str, list[Any]], indices: list[int], part_name: str) -> dict[str, list[Any]]:
        """Columns of SAMPLE_FEATURES for a batch of rows.

        Raises:
            DataError: a row that is not JSON; a tokenizer without a chat template.
        """
        columns = _Columns()
        conversations: list[tuple[RawRow, Conversation]] = []
        for row in decode_batch(part_name, batch, indices):
            try:
                if "input_ids" in row.values:
                    self._add_tokenized(columns, row)
                elif "text" in row.values and not (row.values.get("messages") or row.values.get("conversations")):
                    self._add_text(columns, row)
                else:
                    conversations.append((row, build_conversation(row.values)))
            except UnusableSampleError as error:
                columns.skip(row, error)
        if conversations:
            results = self._chat.tokenize(conversation for _, conversation in conversations)
            for (row, conversation), result in zip(conversations, results, strict=True):
                self._add_conversation(columns, row, conversation, result)
        return columns.values

    def _add_conversation(
        self, columns: _Columns, row: RawRow, conversation: Conversation, result: ChatSamples | UnusableSampleError
    ) -> None:
        if isinstance(result, UnusableSampleError):
            columns.skip(row, result)
            return
        if result.unstable_turns:
            detail = "; ".join(f"message {index}: {how}" for index, how in result.unstable_turns.items())
            columns.skip(row, UnusableSampleError("unstable turn boundary", detail))
        for part, sample in enumerate(result.samples):
            sample_id = conversation.sample_id if part == 0 else content_id([conversation.sample_id, part])
            tokens = np.array(sample.tokens, np.int32)
            self._add_sample(columns, row, tokens, np.array(sample.spans), sample_id, conversation.sample_id)

    def _add_text(self, columns: _Columns, row: RawRow) -> None:
        text = row.values["text"]
        if not isinstance(text, str):
            raise UnusableSampleError("malformed row", f"text is {type(text).__name__}, not a string")
        tokens = self._encode(text)
        if len(self._start_ids):
            spans = spans_between(tokens, self._start_ids, self._end_ids)
            if not len(spans):
                raise UnusableSampleError("no assistant turn", f"{self._config.assistant_start!r} is not in the text")
        else:
            spans = np.array([[0, len(tokens)]])
        content = content_id(text)
        self._add_sample(columns, row, tokens, spans, content, content)

    def _add_tokenized(self, columns: _Columns, row: RawRow) -> None:
        tokens, mask = (_integers(row.values.get(name), name) for name in ("input_ids", "loss_mask"))
        if len(tokens) != len(mask):
            raise UnusableSampleError("malformed row", f"{len(tokens)} input_ids with {len(mask)} of loss_mask")
        if not np.isin(mask, (0, 1)).all():
            raise UnusableSampleError("malformed row", "loss_mask holds something else than 0 and 1")
        content = xxhash.xxh3_64_intdigest(tokens.tobytes() + mask.tobytes()) >> 1
        self._add_sample(columns, row, tokens.astype(np.int32), spans_of_mask(mask == 1), content, content)

    def _add_sample(
        self, columns: _Columns, row: RawRow, tokens: np.ndarray, spans: np.ndarray, sample_id: int, content: int
    ) -> None:
        limit, least = self._config.max_sample_tokens, self.min_supervised_tokens
        num_supervised = int((spans[:, 1] - spans[:, 0]).sum()) if len(spans) else 0
        if not len(tokens):
            columns.skip(row, UnusableSampleError("no tokens"))
        elif np.isin(tokens, self._reserved_tokens).any():
            index = int(np.flatnonzero(np.isin(tokens, self._reserved_tokens))[0])
            detail = f"token {tokens[index]} at index {index} is the mask token of a draft: it may not be text"
            columns.skip(row, UnusableSampleError("mask token in the data", detail))
        elif limit is not None and len(tokens) > limit:
            detail = f"{len(tokens)} tokens, data.max_sample_tokens = {limit}"
            columns.skip(row, UnusableSampleError("too long", detail))
        elif num_supervised < least:
            detail = f"{num_supervised} supervised tokens, data.min_supervised_tokens = {least}"
            columns.skip(row, UnusableSampleError("too few supervised tokens", detail))
        else:
            columns.add(
                tokens=tokens,
                spans=spans.reshape(-1).astype(np.int32),
                sample_id=sample_id,
                content=content,
                tokens_hash=xxhash.xxh3_64_intdigest(tokens.tobytes()) >> 1,
                origin=row.origin,
            )

    def _encode(self, text: str) -> np.ndarray:
        batch = self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return np.array(batch["input_ids"], np.int32)

    def _marker_ids(self, name: str, marker: str | None) -> np.ndarray:
        ids = self._encode(marker) if marker else np.zeros(0, np.int32)
        if marker and not len(ids):
            raise DataError(f"data.{name} = {marker!r} has no tokens")
        return ids


def read_chat_template(path: str | None) -> str | None:
    """The template in a file; None without one.

    Raises:
        DataError: the file cannot be read.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template = {path!r} cannot be read: {error}") from error


def _integers(values: Any, name: str) -> np.ndarray:
    """int64[n] of a row's list of token ids or mask values."""
    if values is None:
        raise UnusableSampleError("malformed row", f"input_ids come with loss_mask, {name} is missing")
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.zeros((), object)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iub"):
        raise UnusableSampleError("malformed row", f"{name} is not a list of integers")
    if len(array) and not 0 <= array.min() <= array.max() <= _MAX_TOKEN_ID:
        raise UnusableSampleError("malformed row", f"{name} holds {array.min()} .. {array.max()}")
    return array.astype(np.int64)
