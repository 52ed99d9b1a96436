"""Answers rewritten by the target: turn by turn, in the order of the input, resumable at any line."""

from __future__ import annotations

import fcntl
import json
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any

from paceline.data.completion import Answer, Complete, Prompt
from paceline.data.conversations import Conversation, UnusableSampleError, check_roles
from paceline.errors import DataError, RunDirectoryError, StoppedError

_REPLACED_KEYS = frozenset(
    {"messages", "conversations", "system", "tools", "text", "input_ids", "loss_mask", "truncated", "regenerated_from"}
)


@dataclass
class RegenerationSummary:
    """What became of the conversations: `num_read == num_answered + num_failed` unless `stopped`."""

    output: Path
    """The answered conversations, one a line, in the order of the input."""
    failures: Path
    """The others, one a line: sample_id, reason, detail."""
    num_read: int = 0
    num_answered: int = 0
    num_reused: int = 0
    """Of those read, how many had been answered, or had failed, in an earlier run."""
    num_truncated: int = 0
    """Of those answered, how many end in an answer that was cut by the length limit."""
    num_tokens: int = 0
    """Generated in this run."""
    failed: Counter[str] = field(default_factory=Counter)
    """How many failed for each reason."""
    stopped: bool = False
    """Ended by request; the same call goes on."""

    @property
    def num_failed(self) -> int:
        """Conversations in `failures`."""
        return self.failed.total()


def regenerate(
    conversations: Iterable[Conversation],
    complete: Complete,
    output: Path,
    *,
    batch_size: int,
    made_with: Mapping[str, Any],
    stop: threading.Event | None = None,
    on_progress: Callable[[RegenerationSummary], None] | None = None,
) -> RegenerationSummary:
    """Rewrite every answer; lines go to `output` in the order of the input, and to `OUTPUT.failed.jsonl`.

    A conversation is rewritten turn by turn, each answer feeding the next prompt; it ends at an answer that the
    length limit cut (`"truncated": true`). A question at the end gets an answer. Tool calls stay as they are, since
    their results follow; what the assistant says before the first user turn is dropped. What was written before is
    kept: the call goes on behind it. At most 4 x `batch_size` conversations are in memory.

    Args:
        batch_size: prompts in one call of `complete`.
        made_with: what the answers depend on (target, temperature, ...), plain data, kept beside `output`.
        stop: once set, the call returns after the batch it is at; `complete` may end sooner with StoppedError.

    Raises:
        DataError: `output` does not belong to these conversations, is damaged, or cannot be written.
        RunDirectoryError: `output` was made with something else, or another process writes it.
    """
    summary = RegenerationSummary(output, output.with_name(output.stem + ".failed.jsonl"))
    with _open_for_appending(output) as answered, _open_for_appending(summary.failures) as failed:
        _check_made_with(output, made_with)
        _cut_torn_line(answered)
        _cut_torn_line(failed)
        remaining = _skip_done(iter(conversations), summary)
        try:
            _answer_all(remaining, complete, _Writer(answered, failed, summary), batch_size, stop, on_progress)
        except StoppedError:
            summary.stopped = True
    return summary


class _Unfinished:
    """A conversation on its way: what is already said, and the next prompt, if any."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.failure: Answer | None = None
        self.truncated = False
        self._said: list[dict[str, Any]] = []
        self._ahead = deque(conversation.messages)
        self._turn = 0
        try:
            check_roles(conversation.messages)
        except UnusableSampleError as error:
            self.failure = Answer("", failure=error.reason, detail=error.detail)
        self.prompt = self._next_prompt()
        if self.prompt is None and self.failure is None:
            self.failure = Answer("", failure="nothing to answer", detail="no user turn")

    @property
    def num_chars(self) -> int:
        """Length of what is said so far, a measure of the prompt's."""
        return sum(len(message["content"]) for message in self._said)

    def accept(self, answer: Answer) -> None:
        """Take the answer to `prompt`."""
        if answer.failure is not None:
            self.failure = answer
        else:
            self._said.append({"role": "assistant", "content": answer.text})
            self._turn += 1
            self.truncated = answer.truncated
        self.prompt = None if self.truncated else self._next_prompt()

    def line(self) -> dict[str, Any]:
        """The row to write: the old one with the new messages."""
        conversation = self.conversation
        kept = {key: value for key, value in conversation.raw.items() if key not in _REPLACED_KEYS}
        tools = {"tools": conversation.tools} if conversation.tools else {}
        cut = {"truncated": True} if self.truncated else {}
        return {"messages": self._said, **tools, **cut, "regenerated_from": conversation.sample_id, **kept}

    def _next_prompt(self) -> Prompt | None:
        if self.failure is not None:
            return None
        while self._ahead:
            message = self._ahead.popleft()
            if message["role"] != "assistant" or message.get("tool_calls"):
                self._said.append(message)
            elif self._waits_for_answer():
                return self._ask()
        return self._ask() if self._waits_for_answer() else None

    def _waits_for_answer(self) -> bool:
        return bool(self._said) and self._said[-1]["role"] in {"user", "tool"}

    def _ask(self) -> Prompt:
        return Prompt(self.conversation.sample_id, self._turn, list(self._said), self.conversation.tools)


class _Writer:
    """Appends finished conversations to the two files."""

    def __init__(self, answered: FileIO, failed: FileIO, summary: RegenerationSummary) -> None:
        self._answered = answered
        self._failed = failed
        self.summary = summary

    def write(self, finished: list[_Unfinished]) -> None:
        """Append in order. Failures are written first: a resumed run counts on them for what is missing."""
        for one in finished:
            self.summary.num_read += 1
            if one.failure is not None:
                self.summary.failed[str(one.failure.failure)] += 1
            else:
                self.summary.num_answered += 1
                self.summary.num_truncated += one.truncated
        failures = [(one.conversation.sample_id, one.failure) for one in finished if one.failure is not None]
        rows = [{"sample_id": id_, "reason": why.failure, "detail": why.detail} for id_, why in failures]
        self._append(self._failed, self.summary.failures, rows)
        self._append(self._answered, self.summary.output, [one.line() for one in finished if one.failure is None])

    def _append(self, file: FileIO, path: Path, rows: list[dict[str, Any]]) -> None:
        rest = memoryview(b"".join(map(_encode, rows)))
        try:
            while rest:
                rest = rest[file.write(rest) :]  # a disk may take a part
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}; run again to go on") from error


def _answer_all(
    conversations: Iterator[Conversation],
    complete: Complete,
    writer: _Writer,
    batch_size: int,
    stop: threading.Event | None,
    on_progress: Callable[[RegenerationSummary], None] | None,
) -> None:
    summary = writer.summary
    window: deque[_Unfinished] = deque()  # in the order of the input
    while True:
        for conversation in islice(conversations, 4 * batch_size - len(window)):
            window.append(_Unfinished(conversation))
        if stop is not None and stop.is_set():
            raise StoppedError("regeneration was asked to stop")
        active = [one for one in window if one.prompt is not None]
        if active:
            # Prompts like the first one's: little padding, and what holds back the output is always at work.
            first = active[0].num_chars
            active = sorted(active, key=lambda one: abs(one.num_chars - first))[:batch_size]
            prompts = [one.prompt for one in active if one.prompt is not None]
            for one, answer in zip(active, complete(prompts), strict=True):
                summary.num_tokens += answer.num_tokens
                one.accept(answer)
        finished = []
        while window and window[0].prompt is None:
            finished.append(window.popleft())
        writer.write(finished)
        if on_progress is not None:
            on_progress(summary)
        if not window and not finished:
            return


# ---------------------------------------------------------------- going on behind what is there


def _skip_done(conversations: Iterator[Conversation], summary: RegenerationSummary) -> Iterator[Conversation]:
    """What is left of `conversations`; both files are subsequences of the input, so one walk over the three will do."""
    answered_lines = _lines(summary.output, "regenerated_from")
    failed_lines = _lines(summary.failures, "reason")
    next_answered, next_failed = next(answered_lines, None), next(failed_lines, None)
    while next_answered is not None:
        conversation = next(conversations, None)
        if conversation is not None and next_answered["regenerated_from"] == conversation.sample_id:
            summary.num_answered += 1
            summary.num_truncated += bool(next_answered.get("truncated"))
            next_answered = next(answered_lines, None)
        elif (
            conversation is not None and next_failed is not None and next_failed["sample_id"] == conversation.sample_id
        ):
            summary.failed[next_failed["reason"]] += 1
            next_failed = next(failed_lines, None)
        else:
            raise DataError(
                f"{summary.output} holds an answer to sample {next_answered['regenerated_from']} where the input has "
                f"{'nothing more' if conversation is None else f'sample {conversation.sample_id}'}: it was made from "
                "other conversations; set regeneration.output to another file, or remove this one"
            )
        summary.num_read += 1
        summary.num_reused += 1
    return _without_failed(conversations, next_failed, failed_lines, summary)


def _without_failed(
    conversations: Iterator[Conversation],
    next_failed: dict[str, Any] | None,
    failed_lines: Iterator[dict[str, Any]],
    summary: RegenerationSummary,
) -> Iterator[Conversation]:
    """Leave out what failed in an earlier run, behind its last answer."""
    ahead = [] if next_failed is None else [next_failed, *failed_lines]  # at most what one batch had written
    for conversation in conversations:
        if ahead and ahead[0]["sample_id"] == conversation.sample_id:
            summary.failed[ahead.pop(0)["reason"]] += 1
            summary.num_read += 1
            summary.num_reused += 1
        else:
            yield conversation


def _lines(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """Rows of a file of ours."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or key not in row:
                raise DataError(f"{path}, line {number}: not written by regenerate; move the file away")
            yield row


def _open_for_appending(path: Path) -> FileIO:
    """`path` for this process alone, without a buffer.

    Raises:
        DataError: it cannot be opened.
        RunDirectoryError: another process has it open.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise RunDirectoryError(f"{path} is being written by another process") from error
    return file


def _cut_torn_line(file: FileIO, chunk_bytes: int = 1 << 16) -> None:
    """A killed process may have left the last line unfinished."""
    end = file.seek(0, 2)
    start = end
    while start > 0:
        size = min(chunk_bytes, start)
        file.seek(start - size)
        newline = file.read(size).rfind(b"\n")
        if newline >= 0:
            start = start - size + newline + 1
            break
        start -= size
    if start < end:
        file.truncate(start)


def _check_made_with(output: Path, made_with: Mapping[str, Any]) -> None:
    path = output.with_name(output.stem + ".made_with.json")
    wanted = json.loads(json.dumps(dict(made_with)))
    if path.exists():
        try:
            existing = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not JSON; remove it together with the answers beside it") from error
        differing = [key for key in sorted({*existing, *wanted}) if existing.get(key) != wanted.get(key)]
        if differing:
            changes = "; ".join(f"{key} was {existing.get(key)!r}, is {wanted.get(key)!r}" for key in differing)
            raise RunDirectoryError(
                f"the answers beside {path} were made with other settings ({changes}): "
                "set regeneration.output to another file, or remove them"
            )
        return
    if output.stat().st_size > 0:
        raise DataError(f"{output} was not written by regenerate ({path.name} is missing beside it); move it away")
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
    unfinished.replace(path)


def _encode(row: dict[str, Any]) -> bytes:
    """One line; dates and the like, which Parquet rows may hold, become text."""
    return (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode("utf-8", "surrogatepass")
