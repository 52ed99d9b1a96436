"""Prompts of a file of conversations: rendered as the training data was. Answers greedy or drawn, as asked for."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from paceline.cli.show import evaluation_tables
from paceline.config.run_dir import RunDir
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


def test_answers_are_drawn_where_a_temperature_is_set_and_the_output_says_so(tiny_target: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    config = run_config(tmp_path / "run", tiny_target, data, training__max_steps=0, evaluation__max_new_tokens=24)
    run(config)
    greedy = evaluate_run(config, [], "latest")
    warm = load_run_config(config.run_dir, ["evaluation.temperature=0.8"])
    drawn = evaluate_run(warm, [], "latest", baselines=True)
    assert [answer for _, answer in drawn.samples] != [answer for _, answer in greedy.samples]
    facts = json.loads(RunDir(Path(config.run_dir)).evaluation.read_text())
    assert facts["temperature"] == 0.8
    for figures in facts["drafts"].values():
        for one in (figures, figures["untrained"], figures["lookup"]):
            assert one["lossless"].startswith("as drawn at temperature 0.8 (")
            assert "walk" not in one
    console = Console(file=io.StringIO(), width=200)
    console.print(*evaluation_tables(drawn))
    assert "as drawn at temperature 0.8 (" in console.file.getvalue()
