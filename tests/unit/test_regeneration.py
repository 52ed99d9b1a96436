"""Answers are rewritten turn by turn, in order, and nothing is lost when a run is cut off anywhere."""

import json
import resource
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from paceline.data.completion import Answer, Prompt
from paceline.data.conversations import Conversation, build_conversation, read_conversations
from paceline.data.regeneration import RegenerationSummary, regenerate
from paceline.errors import DataError, RunDirectoryError, StoppedError

MADE_WITH = {"target": "tiny", "temperature": 0.0}


def conversation(number: int, num_turns: int = 1, **raw: Any) -> Conversation:
    messages = []
    for turn in range(num_turns):
        messages += [
            {"role": "user", "content": f"question {number}.{turn}"},
            {"role": "assistant", "content": f"old answer {number}.{turn}", "reasoning_content": "old thoughts"},
        ]
    return build_conversation({"messages": messages, **raw})


def answer_all(prompts: Sequence[Prompt]) -> list[Answer]:
    """Says the last question and how much was said before it."""
    return [Answer(f"new: {p.messages[-1]['content']} after {len(p.messages)}", num_tokens=3) for p in prompts]


def run(
    conversations: list[Conversation], output: Path, complete: Any = answer_all, **settings: Any
) -> RegenerationSummary:
    settings = {"batch_size": 3, "made_with": MADE_WITH} | settings
    return regenerate(iter(conversations), complete, output, **settings)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_new_answer_feeds_the_next_question(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    summary = run([conversation(0, num_turns=2, source="web", text="old rendering")], output)
    (row,) = rows(output)
    assert [m["content"] for m in row["messages"]] == [
        "question 0.0",
        "new: question 0.0 after 1",
        "question 0.1",
        "new: question 0.1 after 3",
    ]
    assert "old" not in json.dumps(row)
    assert row["source"] == "web"
    assert "truncated" not in row
    assert (summary.num_read, summary.num_answered, summary.num_failed, summary.num_tokens) == (1, 1, 0, 6)


def test_output_has_the_order_of_the_input_whatever_the_lengths(tmp_path: Path) -> None:
    given = [conversation(i, num_turns=1 + (7 * i) % 5) for i in range(23)]
    sizes: list[int] = []

    def complete(prompts: Sequence[Prompt]) -> list[Answer]:
        sizes.append(len(prompts))
        return answer_all(prompts)

    run(given, tmp_path / "out.jsonl", complete, batch_size=4)
    assert [row["regenerated_from"] for row in rows(tmp_path / "out.jsonl")] == [c.sample_id for c in given]
    assert max(sizes) == 4
    assert sum(sizes) == sum(len(c.messages) // 2 for c in given)


def test_at_most_four_batches_of_conversations_are_in_memory(tmp_path: Path) -> None:
    num_taken, most_ahead = 0, 0
    output = tmp_path / "out.jsonl"

    def endless() -> Any:
        nonlocal num_taken
        for i in range(100):
            num_taken += 1
            yield conversation(i, num_turns=30 if i == 0 else 1)  # the first one holds all others back

    def complete(prompts: Sequence[Prompt]) -> list[Answer]:
        nonlocal most_ahead
        most_ahead = max(most_ahead, num_taken - len(output.read_bytes().splitlines()))
        return answer_all(prompts)

    summary = regenerate(endless(), complete, output, batch_size=2, made_with=MADE_WITH)
    assert summary.num_answered == 100
    assert most_ahead == 8


def test_failures_are_recorded_with_their_reason_and_the_rest_goes_on(tmp_path: Path) -> None:
    def complete(prompts: Sequence[Prompt]) -> list[Answer]:
        return [
            Answer("", failure="too long", detail="9 of 8") if "2.1" in p.messages[-1]["content"] else answer
            for p, answer in zip(prompts, answer_all(prompts), strict=True)
        ]

    given = [conversation(i, num_turns=2) for i in range(5)]
    given.insert(1, build_conversation({"messages": [{"role": "system", "content": "be kind"}]}))
    given.insert(3, build_conversation({"messages": [{"role": "stranger", "content": "hello"}]}))
    summary = run(given, tmp_path / "out.jsonl", complete)
    assert summary.failed == {"too long": 1, "nothing to answer": 1, "unknown role": 1}
    assert (summary.num_read, summary.num_answered, summary.num_failed) == (7, 4, 3)
    assert summary.failures == tmp_path / "out.failed.jsonl"
    assert [(row["sample_id"], row["reason"]) for row in rows(summary.failures)] == [
        (given[1].sample_id, "nothing to answer"),
        (given[3].sample_id, "unknown role"),
        (given[4].sample_id, "too long"),
    ]
    assert "old" not in (tmp_path / "out.jsonl").read_text()


def test_a_cut_answer_ends_its_conversation_and_is_marked(tmp_path: Path) -> None:
    def complete(prompts: Sequence[Prompt]) -> list[Answer]:
        return [Answer("and so on", truncated=p.turn == 1) for p in prompts]

    summary = run([conversation(0, num_turns=3), conversation(1)], tmp_path / "out.jsonl", complete)
    cut, whole = rows(tmp_path / "out.jsonl")
    assert cut["truncated"] is True
    assert [m["role"] for m in cut["messages"]] == ["user", "assistant", "user", "assistant"]
    assert "truncated" not in whole
    assert summary.num_truncated == 1


def test_tool_calls_stay_and_the_answers_after_their_results_are_new(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now", "arguments": "{}"}}]}
    messages = [
        {"role": "assistant", "content": "old greeting"},
        {"role": "user", "content": "What time is it?"},
        call,
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "old answer"},
        {"role": "user", "content": "Thanks. And then?"},
    ]
    tools = [{"type": "function", "function": {"name": "now"}}]
    offered = []

    def complete(prompts: Sequence[Prompt]) -> list[Answer]:
        offered.extend(p.tools for p in prompts)
        return answer_all(prompts)

    run([build_conversation({"messages": messages, "tools": tools})], tmp_path / "out.jsonl", complete)
    (row,) = rows(tmp_path / "out.jsonl")
    assert row["messages"][:3] == messages[1:4]
    assert [m["content"] for m in row["messages"][3:]] == [
        "new: noon after 3",
        "Thanks. And then?",
        "new: Thanks. And then? after 5",
    ]
    assert offered == [tools, tools]
    assert row["tools"] == tools


@pytest.mark.parametrize("num_kept_bytes", [0, 1, 200, 431, 432, 700, 1200])
def test_cut_off_at_any_byte_it_goes_on_to_the_same_file(tmp_path: Path, num_kept_bytes: int) -> None:
    def complete(prompts: Sequence[Prompt]) -> list[Answer]:
        return [
            Answer("", failure="odd") if "3.0" in p.messages[-1]["content"] else answer
            for p, answer in zip(prompts, answer_all(prompts), strict=True)
        ]

    given = [conversation(i, num_turns=1 + i % 2) for i in range(9)]
    given.append(given[2])  # the same sample twice is answered twice
    whole = tmp_path / "whole.jsonl"
    run(given, whole, complete)
    output = tmp_path / "out.jsonl"
    run(given, output, complete)
    with output.open("r+b") as file:
        file.truncate(num_kept_bytes)
    summary = run(given, output, complete, batch_size=2)
    assert output.read_bytes() == whole.read_bytes()
    assert (summary.num_read, summary.num_answered, summary.failed) == (10, 9, {"odd": 1})
    assert rows(summary.failures) == rows(tmp_path / "whole.failed.jsonl")


def test_a_finished_run_is_reused_whole(tmp_path: Path) -> None:
    given = [conversation(i) for i in range(5)]
    run(given, tmp_path / "out.jsonl")

    def refuse(prompts: Sequence[Prompt]) -> list[Answer]:
        raise AssertionError(f"asked again for {len(prompts)}")

    summary = run(given, tmp_path / "out.jsonl", refuse)
    assert (summary.num_reused, summary.num_answered, summary.num_tokens) == (5, 5, 0)
    longer = run([*given, conversation(5)], tmp_path / "out.jsonl")
    assert (longer.num_reused, longer.num_answered, len(rows(tmp_path / "out.jsonl"))) == (5, 6, 6)


def test_a_stop_leaves_whole_lines_and_the_next_run_goes_on(tmp_path: Path) -> None:
    given = [conversation(i) for i in range(10)]
    stop = threading.Event()

    def complete(prompts: Sequence[Prompt]) -> list[Answer]:
        if any("question 4" in p.messages[-1]["content"] for p in prompts):
            stop.set()
        return answer_all(prompts)

    stopped = run(given, tmp_path / "out.jsonl", complete, stop=stop)
    assert stopped.stopped
    assert len(rows(tmp_path / "out.jsonl")) == stopped.num_answered == 6
    summary = run(given, tmp_path / "out.jsonl")
    assert (summary.stopped, summary.num_reused, summary.num_answered) == (False, 6, 10)


def test_an_answerer_that_was_stopped_midway_ends_the_run_in_order(tmp_path: Path) -> None:
    def complete(prompts: Sequence[Prompt]) -> list[Answer]:
        raise StoppedError("asked to stop")

    assert run([conversation(0)], tmp_path / "out.jsonl", complete).stopped
    assert rows(tmp_path / "out.jsonl") == []


def test_answers_made_from_other_conversations_are_not_mixed(tmp_path: Path) -> None:
    run([conversation(0), conversation(1)], tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(DataError, match="made from other conversations"):
        run([conversation(0), conversation(7)], tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="nothing more"):
        run([conversation(0)], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_answers_made_with_other_settings_are_not_mixed(tmp_path: Path) -> None:
    run([conversation(0)], tmp_path / "out.jsonl")
    with pytest.raises(RunDirectoryError, match=r"temperature was 0\.0, is 1\.0"):
        run([conversation(0)], tmp_path / "out.jsonl", made_with=MADE_WITH | {"temperature": 1.0})


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    def complete(prompts: Sequence[Prompt]) -> list[Answer]:
        with pytest.raises(RunDirectoryError, match="another process"):
            run([conversation(0)], tmp_path / "out.jsonl")
        return answer_all(prompts)

    assert run([conversation(0)], tmp_path / "out.jsonl", complete).num_answered == 1


def test_a_foreign_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text('{"messages": []}\n{"messages": []}')  # without a newline at the end
    with pytest.raises(DataError, match="not written by regenerate"):
        run([conversation(0)], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == '{"messages": []}\n{"messages": []}'


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    given = [conversation(i) for i in range(3)]
    run(given, tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(lines[0] + b"\0" * 20 + b"\n" + lines[2])
    with pytest.raises(DataError, match=r"out\.jsonl, line 2: not written by regenerate"):
        run(given, tmp_path / "out.jsonl")


def test_the_output_is_read_as_conversations(tmp_path: Path) -> None:
    run([conversation(i, num_turns=2) for i in range(3)], tmp_path / "out.jsonl")
    read = list(read_conversations(str(tmp_path / "out.jsonl")))
    assert [len(c.messages) for c in read] == [4, 4, 4]


def test_a_disk_that_takes_no_more_is_an_error_that_names_the_file_and_the_next_run_goes_on(tmp_path: Path) -> None:
    given = [conversation(i) for i in range(40)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # a write past it fails as on a full disk
    try:
        with pytest.raises(DataError, match=r"cannot write .*out\.jsonl: File too large; run again"):
            run(given, tmp_path / "out.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    summary = run(given, tmp_path / "out.jsonl")
    assert 0 < summary.num_reused < 40
    assert [row["regenerated_from"] for row in rows(tmp_path / "out.jsonl")] == [c.sample_id for c in given]
