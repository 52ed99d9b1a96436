"""Prompts of a file of conversations: rendered as the training data was."""

from __future__ import annotations

import json
from pathlib import Path

from paceline.launch.evaluate import evaluate_run
from paceline.launch.trained import load_run_config
from tiny import CHAT_TEMPLATE
from whole_run import conversation, run, run_config, write_data, write_lines


def with_a_tool_call(index: int) -> dict[str, object]:
    """Arguments are a JSON string, as in OpenAI's format."""
    arguments = json.dumps({"city": f"number {index}"})
    row = conversation(index)
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    asked = [row["messages"][0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"messages": [*asked, {"role": "tool", "content": "sun"}, row["messages"][1]]}


def test_prompts_of_a_file_are_those_of_the_same_conversations_held_out(tiny_target: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    held_out = write_lines(data / "eval.jsonl", [with_a_tool_call(index) for index in (500, 501)])
    template = tmp_path / "template.jinja"
    calls = "{{ message.content }}{% for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}"
    template.write_text(CHAT_TEMPLATE.replace("{{ message.content }}", calls + "{% endfor %}"))
    config = run_config(
        tmp_path / "run",
        tiny_target,
        data,
        data__chat_template=str(template),
        data__train_on="last_turn",
        training__max_steps=0,
        evaluation__max_new_tokens=3,
    )
    run(config)
    samples = evaluate_run(config, ["eagle3"], "latest").samples
    from_file = load_run_config(config.run_dir, [f"evaluation.prompts={held_out}"])
    assert evaluate_run(from_file, ["eagle3"], "latest").samples == samples
    assert '{"city": "number 500"}' in samples[0][0]
