"""Loss masks of conversations: what is supervised is what the target would write."""

import json
from typing import Any

import pytest

from paceline.data.chat import ChatSample, ChatSamples, ChatTokenizer
from paceline.data.conversations import UnusableSampleError, build_conversation
from paceline.errors import DataError
from tiny import tiny_tokenizer

END_WITH_NEWLINE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETS_REASONING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content and loop.last %}[{{ m.reasoning_content }}]{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROMPTS_FOR_REASONING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
NO_END_TOKEN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>\n{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls %}CALL {{ call.function.name }} {{ call.function.arguments.a }}{% endfor %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TWO_TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "up"},
    {"role": "assistant", "content": "down"},
]


def tokenize(messages: list, template: str | None = None, train_on: Any = "all_turns", **row: Any) -> ChatSamples:
    chat = ChatTokenizer(tiny_tokenizer(), template, train_on=train_on)
    [result] = chat.tokenize([build_conversation({"messages": messages, **row})])
    if isinstance(result, UnusableSampleError):
        raise result
    return result


def supervised(sample: ChatSample) -> list[str]:
    return [tiny_tokenizer().decode(sample.tokens[start:end]) for start, end in sample.spans]


def text(sample: ChatSample) -> str:
    return tiny_tokenizer().decode(sample.tokens)


def test_the_mask_of_a_small_chat_is_the_one_made_by_hand():
    [sample] = tokenize(TWO_TURNS[:2], END_WITH_NEWLINE).samples
    # <|user|> h i <|end|> \n <|assistant|> | h o <|end|>
    assert len(sample.tokens) == 9
    assert sample.spans == [(6, 9)]
    assert supervised(sample) == ["ho<|end|>"]


def test_every_turn_of_a_stable_template_is_a_span_of_one_sample():
    result = tokenize(TWO_TURNS, END_WITH_NEWLINE)
    [sample] = result.samples
    assert supervised(sample) == ["ho<|end|>", "down<|end|>"]
    assert text(sample) == ("<|user|>hi<|end|>\n<|assistant|>ho<|end|>\n<|user|>up<|end|>\n<|assistant|>down<|end|>"), (
        "the newline after a turn is context of the next, and the last one is left out"
    )
    assert not result.unstable_turns


def test_what_follows_the_last_answer_is_left_out():
    [sample] = tokenize([*TWO_TURNS[:2], {"role": "user", "content": "bye"}], END_WITH_NEWLINE).samples
    assert text(sample) == "<|user|>hi<|end|>\n<|assistant|>ho<|end|>"


@pytest.mark.parametrize("template", [None, END_WITH_NEWLINE])
def test_an_answer_cut_by_a_length_limit_does_not_teach_an_end(template):
    [whole] = tokenize(TWO_TURNS, template).samples
    [cut] = tokenize(TWO_TURNS, template, truncated=True).samples
    assert supervised(whole) == ["ho<|end|>", "down<|end|>"]
    assert supervised(cut) == ["ho<|end|>", "down"]
    assert text(whole) == text(cut) + "<|end|>"


def test_last_turn_supervises_the_last_answer_alone():
    [sample] = tokenize(TWO_TURNS, END_WITH_NEWLINE, train_on="last_turn").samples
    assert supervised(sample) == ["down<|end|>"]
    assert text(sample).startswith("<|user|>hi<|end|>\n<|assistant|>ho<|end|>\n")


def test_a_template_that_drops_earlier_reasoning_gives_every_turn_its_own_context():
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "1", "reasoning_content": "why"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "2", "reasoning_content": "how"},
    ]
    result = tokenize(messages, FORGETS_REASONING)
    assert not result.unstable_turns
    assert [supervised(sample) for sample in result.samples] == [["[why]1<|end|>"], ["[how]2<|end|>"]]
    assert "why" not in text(result.samples[1]), "a server would have dropped it"


def test_turns_that_history_does_not_change_share_a_sample_again():
    messages = [
        *({"role": "user", "content": "a"}, {"role": "assistant", "content": "1", "reasoning_content": "why"}),
        *({"role": "user", "content": "b"}, {"role": "assistant", "content": "2"}),
        *({"role": "user", "content": "c"}, {"role": "assistant", "content": "3"}),
    ]
    result = tokenize(messages, FORGETS_REASONING)
    assert [supervised(s) for s in result.samples] == [["[why]1<|end|>"], ["2<|end|>", "3<|end|>"]]


def test_a_turn_whose_prompt_is_not_its_prefix_is_left_out_and_named():
    messages = [*TWO_TURNS[:3], {"role": "assistant", "content": "down", "reasoning_content": "why"}]
    result = tokenize(messages, PROMPTS_FOR_REASONING)
    assert list(result.unstable_turns) == [1], "a prompt ends in <think>, the turn has none"
    assert "the prompt has '<think>', the turn 'ho<|end|>'" in result.unstable_turns[1]
    [sample] = result.samples
    assert supervised(sample) == ["why</think>down<|end|>"]


def test_a_template_without_an_end_token_supervises_the_whole_turn():
    [sample] = tokenize(TWO_TURNS, NO_END_TOKEN).samples
    assert supervised(sample) == ["ho\n", "down\n"]


def test_only_the_first_end_token_is_the_targets_own():
    template = END_WITH_NEWLINE.replace("{% if add", "{% if not add_generation_prompt %}<|system|>{% endif %}{% if add")
    result = tokenize(TWO_TURNS, template)
    assert [supervised(s) for s in result.samples] == [["ho<|end|>", "down<|end|>"]]


def test_white_space_the_target_writes_before_its_end_token_is_supervised():
    [sample] = tokenize([TWO_TURNS[0], {"role": "assistant", "content": "ho\n \n"}], END_WITH_NEWLINE).samples
    assert supervised(sample) == ["ho\n \n<|end|>"]


def test_tools_reach_the_template_and_calls_are_supervised_and_results_are_not():
    messages = [
        {"role": "user", "content": "1+1"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": json.dumps({"a": 7})}}],
        },
        {"role": "tool", "content": "two"},
        {"role": "assistant", "content": "2"},
    ]
    [sample] = tokenize(messages, WITH_TOOLS, tools=[{"name": "add"}]).samples
    assert supervised(sample) == ["CALL add 7<|end|>", "2<|end|>"]
    assert text(sample).startswith('<|system|>[{"name": "add"}]<|end|>')


def test_an_answer_to_nothing_is_context_only():
    [sample] = tokenize([{"role": "assistant", "content": "welcome"}, *TWO_TURNS[:2]], END_WITH_NEWLINE).samples
    assert supervised(sample) == ["ho<|end|>"]
    assert text(sample).startswith("<|assistant|>welcome")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": "hi"}], "no assistant turn"),
        ([{"role": "narrator", "content": "x"}, *TWO_TURNS], "unknown role: 'narrator'"),
    ],
)
def test_a_conversation_that_cannot_be_used_says_why(messages, reason):
    with pytest.raises(UnusableSampleError, match=reason):
        tokenize(messages)


def test_a_template_that_refuses_messages_is_a_reason():
    template = "{{ raise_exception('no system please') }}"
    with pytest.raises(UnusableSampleError, match="refused by the chat template: no system please"):
        tokenize(TWO_TURNS, template)


def test_a_tokenizer_without_a_chat_template_names_the_remedy():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template.*data\.chat_template"):
        ChatTokenizer(tokenizer)
    assert ChatTokenizer(tokenizer, END_WITH_NEWLINE).tokenize([]) == []


def test_a_template_that_is_not_jinja_is_an_error_at_once():
    with pytest.raises(DataError, match="not valid Jinja"):
        ChatTokenizer(tiny_tokenizer(), "{% for %}")


def test_template_arguments_reach_the_template():
    template = END_WITH_NEWLINE + "{% if add_generation_prompt and quiet %}[{% endif %}"
    chat = ChatTokenizer(tiny_tokenizer(), template, {"quiet": True})
    assert chat.render(TWO_TURNS[:1], None, True).endswith("<|assistant|>[")


def test_a_batch_gives_each_conversation_what_it_gives_alone():
    rows = [TWO_TURNS, TWO_TURNS[:1], TWO_TURNS[:2]]
    chat = ChatTokenizer(tiny_tokenizer(), END_WITH_NEWLINE)
    results = chat.tokenize(build_conversation({"messages": row}) for row in rows)
    assert isinstance(results[1], UnusableSampleError)
    for row, result in ((TWO_TURNS, results[0]), (TWO_TURNS[:2], results[2])):
        assert isinstance(result, ChatSamples)
        assert result.samples == tokenize(row, END_WITH_NEWLINE).samples
