"""Conversations in one form: OpenAI's keys, whatever the data came with (OpenAI or ShareGPT)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import xxhash

from paceline.data.sources import read_rows
from paceline.errors import DataError

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
}
KNOWN_ROLES = frozenset(_ROLES.values())
_KEPT_KEYS = ("reasoning_content", "thinking", "tool_calls", "tool_call_id", "name")


class UnusableSampleError(DataError):
    """One sample that cannot be trained on; preparation counts it under `reason` and goes on."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation with OpenAI's keys."""

    sample_id: int
    """xxh3-64 >> 1 of messages and tools: the same for the same conversation in any file, position or key style."""
    messages: list[dict[str, Any]]
    """Each has `role` and `content` (a string), some `reasoning_content`, `tool_calls`, `tool_call_id`, `name`."""
    tools: list[dict[str, Any]] | None
    """Tool definitions the target was offered, in OpenAI's form."""
    raw: dict[str, Any]
    """The row as it was read."""


def read_conversations(source: str) -> Iterator[Conversation]:
    """Conversations of a file, a directory or a hub data set, in order. Unknown roles are left as they are.

    Raises:
        DataError: a file that is missing, empty or not JSON (with its line); a row that holds no conversation.
    """
    for row in read_rows(source):
        try:
            conversation = build_conversation(row.values)
        except UnusableSampleError as error:
            raise DataError(f"{row.origin}: {error}") from error
        yield conversation


def build_conversation(row: dict[str, Any]) -> Conversation:
    """The conversation in a row with `messages` or `conversations`.

    Raises:
        UnusableSampleError: neither key is there, or what it holds is not a list of messages with text.
    """
    listed = _decode(row.get("messages") or row.get("conversations"))
    if not isinstance(listed, list) or not listed:
        keys = ", ".join(sorted(row)) or "none"
        raise UnusableSampleError("no conversation", f"no messages or conversations in the row; its keys are {keys}")
    messages = [_build_message(message) for message in listed]
    if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    tools = _decode(row.get("tools")) or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UnusableSampleError("malformed row", "tools is not a list of objects")
    return Conversation(content_id([messages, tools]), messages, tools, row)


def content_id(content: Any) -> int:
    """xxh3-64 of plain data (as JSON with sorted keys), shifted to fit a non-negative int64."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) >> 1


def check_roles(messages: list[dict[str, Any]]) -> None:
    """Raise unless every role is known.

    Raises:
        UnusableSampleError: with the role.
    """
    for message in messages:
        if message["role"] not in KNOWN_ROLES:
            raise UnusableSampleError("unknown role", repr(message["role"]))


def _build_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UnusableSampleError("malformed row", "a message is not an object")
    named = message.get("role", message.get("from"))
    if not isinstance(named, str):
        raise UnusableSampleError("malformed row", "a message has neither role nor from")
    content = _text(message.get("content", message.get("value")))
    built: dict[str, Any] = {"role": _ROLES.get(named, named), "content": content}
    built |= {key: message[key] for key in _KEPT_KEYS if message.get(key) is not None}
    if "reasoning_content" not in built and isinstance(message.get("reasoning"), str):
        built["reasoning_content"] = message["reasoning"]
    if "tool_calls" in built and not isinstance(built["tool_calls"], list):
        raise UnusableSampleError("malformed row", "tool_calls is not a list")
    if named == "function_call" and "tool_calls" not in built:
        calls = _tool_calls(content)
        if calls:
            built |= {"content": "", "tool_calls": calls}
    return built


def _tool_calls(text: str) -> list[dict[str, Any]]:
    """ShareGPT writes a call as the turn's text: {"name": ..., "arguments": ...}, or a list of them."""
    calls = _decode(text)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return []
    built = []
    for call in calls:
        arguments = call.get("arguments", {})
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        built.append({"type": "function", "function": {"name": call["name"], "arguments": written}})
    return built


def _text(content: Any) -> str:
    """A message's content as one string; parts of text are joined."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
    raise UnusableSampleError("content that is not text", f"content of type {type(content).__name__}")


def _decode(value: Any) -> Any:
    """Nested lists are often stored as a JSON string; anything else comes back as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
