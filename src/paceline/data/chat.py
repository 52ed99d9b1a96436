"""Conversations -> tokens and loss masks, by rendering the tokenizer's own chat template at turn boundaries.

An assistant turn is rendered twice: the prompt the target would be given (all messages before it, with the
generation prompt), and the conversation through the turn. If the tokens of the first are a prefix of the second's,
what follows is the text the target would have to write: that is supervised, and nothing else.

A turn ends with the token that ends it for a server: the first special token of what the template puts after an
assistant's text (`<|im_end|>` of `<|im_end|>\\n`), found by rendering two turns that differ in their text alone.
What comes after it is written by the template, never by the target, and is not supervised. A template that ends a
turn with no special token leaves the whole rendered turn supervised.

A template may render history differently once it is history (Qwen3 drops earlier reasoning). So each turn is
compared with what came before: if its prompt goes on from the tokens already collected it joins that sample, else
it begins a sample of its own. Either way every turn is supervised once, after the very tokens a server would see.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from paceline.data.conversations import Conversation, UnusableSampleError, check_roles
from paceline.errors import DataError


@dataclass(slots=True)
class ChatSample:
    """One sequence with its supervised spans."""

    tokens: list[int]
    spans: list[tuple[int, int]]
    """Maximal runs [start, end), ascending; the last one ends the sample."""


@dataclass(slots=True)
class ChatSamples:
    """What became of one conversation."""

    samples: list[ChatSample] = field(default_factory=list)
    unstable_turns: dict[int, str] = field(default_factory=dict)
    """Assistant messages (by index) whose prompt is not a token prefix of the turn, and how it differs: left out."""


@dataclass(frozen=True, slots=True)
class _Turn:
    message: int
    prompt: str
    through: str
    """The prompt's conversation and the turn itself."""


class ChatTokenizer:
    """Renders and tokenizes conversations with one chat template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        template_args: dict[str, Any] | None = None,
        train_on: Literal["all_turns", "last_turn"] = "all_turns",
    ) -> None:
        """Check the template and find out how it ends a turn.

        Args:
            tokenizer: of the target.
            template: a Jinja chat template used instead of the tokenizer's own.
            template_args: variables handed to the template.
            train_on: which assistant turns are supervised.

        Raises:
            DataError: there is no template, or it is not valid Jinja.
        """
        if template is None and not tokenizer.chat_template:
            raise DataError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template, so conversations cannot be rendered: "
                "set data.chat_template to a file with the template the target is served with"
            )
        self._tokenizer = tokenizer
        self._template = template
        self._template_args = template_args or {}
        self._train_on = train_on
        added = {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
        self._special_ids = frozenset(tokenizer.all_special_ids) | added
        self._tail, self._num_unwritten = self._probe_tail()

    def tokenize(self, conversations: Iterable[Conversation]) -> list[ChatSamples | UnusableSampleError]:
        """Samples of each conversation, or why it has none."""
        conversations = list(conversations)
        planned = [self._plan_turns(conversation) for conversation in conversations]
        # One call for all texts: the tokenizer spreads a batch over the cores.
        texts = [text for turns in planned if isinstance(turns, list) for t in turns for text in (t.prompt, t.through)]
        encoded = iter(self.encode(texts))
        results: list[ChatSamples | UnusableSampleError] = []
        for conversation, turns in zip(conversations, planned, strict=True):
            if isinstance(turns, UnusableSampleError):
                results.append(turns)
                continue
            result = self._assemble([(turn.message, next(encoded), next(encoded)) for turn in turns])
            if conversation.raw.get("truncated"):
                self._take_off_end(result)
            results.append(result)
        return results

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text as it stands: no special token is added."""
        if not texts:
            return []
        batch = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        input_ids: list[list[int]] = batch["input_ids"]
        return input_ids

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, add_generation_prompt: bool
    ) -> str:
        """The template's text.

        Raises:
            UnusableSampleError: the template refuses these messages.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                [_with_parsed_arguments(message) for message in messages],
                tools=list(tools) if tools else None,
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self._template_args,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UnusableSampleError("refused by the chat template", str(error)) from error
        assert isinstance(text, str)
        return text

    def _plan_turns(self, conversation: Conversation) -> list[_Turn] | UnusableSampleError:
        messages, tools = conversation.messages, conversation.tools
        # A turn with nothing before it answers no prompt: it is context for the turns after it.
        indices = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
        if self._train_on == "last_turn":
            indices = indices[-1:]
        try:
            check_roles(messages)
            if not indices:
                raise UnusableSampleError("no assistant turn", f"{len(messages)} messages, none answers another")
            return [
                _Turn(i, self.render(messages[:i], tools, True), self.render(messages[: i + 1], tools, False))
                for i in indices
            ]
        except UnusableSampleError as error:
            return error

    def _assemble(self, turns: list[tuple[int, list[int], list[int]]]) -> ChatSamples:
        """Join turns into samples as long as each prompt goes on from the tokens of the turn before."""
        result = ChatSamples()
        for message, prompt, through in turns:
            begin = len(prompt)
            if len(through) <= begin or through[:begin] != prompt:
                result.unstable_turns[message] = self._explain_difference(prompt, through)
                continue
            end = self._end_of_turn(through, begin)
            sample = result.samples[-1] if result.samples else None
            if sample is None or prompt[: len(sample.tokens)] != sample.tokens:
                result.samples.append(ChatSample(through[:end], [(begin, end)]))
                continue
            if sample.spans[-1][1] == begin:
                sample.spans[-1] = (sample.spans[-1][0], end)
            else:
                sample.spans.append((begin, end))
            sample.tokens = through[:end]
        return result

    def _take_off_end(self, result: ChatSamples) -> None:
        """The last answer was cut by a length limit: the end that the template gives it is not the target's."""
        written = self._tail[: len(self._tail) - self._num_unwritten]
        sample = result.samples[-1] if result.samples else None
        if sample is None or not written or sample.tokens[-len(written) :] != written:
            return
        sample.tokens = sample.tokens[: -len(written)]
        begin, end = sample.spans.pop()
        if end - len(written) > begin:
            sample.spans.append((begin, end - len(written)))

    def _explain_difference(self, prompt: list[int], through: list[int]) -> str:
        same = 0
        while same < min(len(prompt), len(through)) and prompt[same] == through[same]:
            same += 1
        before, asked, written = (
            self._tokenizer.decode(tokens)
            for tokens in (prompt[max(0, same - 8) : same], prompt[same : same + 8], through[same : same + 8])
        )
        return f"after {before!r} the prompt has {asked!r}, the turn {written!r}"

    def _end_of_turn(self, through: list[int], begin: int) -> int:
        """Index after the last token of the turn [begin, ...) that the target writes itself."""
        num_tail = len(self._tail)
        if num_tail and len(through) - num_tail >= begin and through[-num_tail:] == self._tail:
            return len(through) - self._num_unwritten
        # This turn ends in another way than the plain one did (a tool call has its own end token in some templates):
        # only white space after its last special token is certainly the template's.
        for index in range(len(through) - 1, begin - 1, -1):
            if through[index] in self._special_ids:
                rest = str(self._tokenizer.decode(through[index + 1 :]))
                return len(through) if rest.strip() else index + 1
        return len(through)

    def _probe_tail(self) -> tuple[list[int], int]:
        """(tokens the template puts after an assistant's text, how many of them the target does not write).

        No tail is reported if it holds no special token.
        """
        try:
            rendered = [
                self.render([{"role": "user", "content": "2"}, {"role": "assistant", "content": text}], None, False)
                for text in ("0", "1")
            ]
        except UnusableSampleError as error:
            if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
                raise DataError(f"the chat template is not valid Jinja: {error.detail}") from error
            return [], 0
        first, second = self.encode(rendered)
        num_same = 0
        while num_same < min(len(first), len(second)) and first[-1 - num_same] == second[-1 - num_same]:
            num_same += 1
        tail = first[len(first) - num_same :]
        ends = [index for index, token in enumerate(tail) if token in self._special_ids]
        if first == second or not ends:
            return [], 0
        return tail, len(tail) - ends[0] - 1


def _with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """OpenAI sends a tool call's arguments as a JSON string; chat templates expect the object itself."""
    if "tool_calls" not in message:
        return message
    return message | {"tool_calls": [_with_parsed_call(call) for call in message["tool_calls"]]}


def _with_parsed_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call
