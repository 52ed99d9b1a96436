"""Conversations and their sources."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paceline.data.conversations import UnusableSampleError, build_conversation, check_roles, read_conversations
from paceline.errors import DataError

OPENAI = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "id": 7}


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_sharegpt_keys_become_openai_keys_and_the_same_content_has_the_same_id():
    first, second = build_conversation(OPENAI), build_conversation(SHAREGPT)
    assert second.messages == OPENAI["messages"]
    assert first.sample_id == second.sample_id >= 0
    assert second.raw == SHAREGPT
    other = build_conversation({"messages": [*OPENAI["messages"], {"role": "user", "content": "!"}]})
    assert other.sample_id != first.sample_id


def test_sharegpt_calls_system_and_tools_are_understood():
    row = {
        "system": "be brief",
        "tools": json.dumps([{"type": "function", "function": {"name": "add"}}]),
        "conversations": [
            {"from": "human", "value": "1+1"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "2"},
        ],
    }
    conversation = build_conversation(row)
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant", "tool", "assistant"]
    call = conversation.messages[2]["tool_calls"][0]["function"]
    assert (call["name"], json.loads(call["arguments"])) == ("add", {"a": 1})
    assert conversation.tools == [{"type": "function", "function": {"name": "add"}}]


def test_parts_of_text_are_joined_and_other_parts_are_refused():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert build_conversation({"messages": [{"role": "user", "content": parts}]}).messages[0]["content"] == "ab"
    with pytest.raises(UnusableSampleError, match="content that is not text"):
        build_conversation({"messages": [{"role": "user", "content": [{"type": "image"}]}]})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x"}, "its keys are prompt"),
        ({"messages": []}, "no conversation"),
        ({"messages": ["hi"]}, "a message is not an object"),
        ({"messages": [{"content": "x"}]}, "neither role nor from"),
        ({**OPENAI, "tools": "not json"}, "tools is not a list"),
    ],
)
def test_a_row_that_is_no_conversation_says_why(row, reason):
    with pytest.raises(UnusableSampleError, match=reason):
        build_conversation(row)


def test_an_unknown_role_is_named():
    with pytest.raises(UnusableSampleError, match="unknown role: 'narrator'"):
        check_roles([{"role": "narrator", "content": ""}])


def test_lines_arrays_parquet_and_a_directory_of_them_give_the_same_conversations(tmp_path: Path):
    rows = [OPENAI, {"messages": [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c"}]}]
    write_lines(tmp_path / "a.jsonl", [json.dumps(row, ensure_ascii=False) for row in rows])
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    write_lines(tmp_path / "c.json", rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    expected = [build_conversation(row).sample_id for row in rows]
    for name in ("a.jsonl", "b.json", "c.json", "d.parquet"):
        assert [c.sample_id for c in read_conversations(str(tmp_path / name))] == expected, name
    assert [c.sample_id for c in read_conversations(str(tmp_path))] == expected * 4


def test_nulls_that_a_column_format_adds_are_not_content(tmp_path: Path):
    rows = [OPENAI | {"tools": [{"name": "add"}]}, OPENAI | {"tools": [{"strict": True}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert pq.read_table(tmp_path / "d.parquet").to_pylist()[0]["tools"] == [{"name": "add", "strict": None}]
    assert [c.tools for c in read_conversations(str(tmp_path / "d.parquet"))] == [row["tools"] for row in rows]


def test_the_order_of_keys_does_not_change_the_id():
    tools = [{"name": "add", "strict": True}]
    first = build_conversation(OPENAI | {"tools": tools})
    second = build_conversation(OPENAI | {"tools": [dict(reversed(tools[0].items()))]})
    assert first.sample_id == second.sample_id != build_conversation(OPENAI).sample_id


def read_all(path: Path) -> list:
    return list(read_conversations(str(path)))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"gone\.jsonl does not exist"):
        read_all(tmp_path / "gone.jsonl")


@pytest.mark.parametrize(("name", "text"), [("e.jsonl", ""), ("e.jsonl", "\n\n"), ("e.json", "[]"), ("e.json", "")])
def test_an_empty_file_is_named(tmp_path: Path, name: str, text: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"{name} is empty"):
        read_all(tmp_path / name)


def test_an_empty_parquet_file_is_named(tmp_path: Path):
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "e.parquet")
    with pytest.raises(DataError, match=r"e\.parquet is empty"):
        read_all(tmp_path / "e.parquet")


def test_a_line_that_is_not_json_is_named_with_its_number(tmp_path: Path):
    path = write_lines(tmp_path / "bad.jsonl", [OPENAI, "", '{"messages": [', OPENAI])
    with pytest.raises(DataError, match=r"bad\.jsonl line 3 is not JSON"):
        read_all(path)


def test_a_json_file_names_the_line_that_is_not_json(tmp_path: Path):
    (tmp_path / "bad.json").write_text('[\n{"messages": []},\n{oops}\n]')
    with pytest.raises(DataError, match=r"bad\.json is not JSON on line 3"):
        read_all(tmp_path / "bad.json")


def test_a_line_that_is_not_an_object_or_not_utf8_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"list\.jsonl line 1 is not a JSON object but list"):
        read_all(write_lines(tmp_path / "list.jsonl", ["[1]"]))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl line 1 is not UTF-8"):
        read_all(tmp_path / "latin.jsonl")


def test_a_file_that_is_not_parquet_or_of_an_unknown_kind_is_named(tmp_path: Path):
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(DataError, match=r"x\.parquet is not a Parquet file"):
        read_all(tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("no")
    with pytest.raises(DataError, match=r"cannot read \.csv"):
        read_all(tmp_path / "x.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data in this directory"):
        read_all(tmp_path / "empty")


def test_a_row_without_a_conversation_is_named_with_its_line(tmp_path: Path):
    path = write_lines(tmp_path / "t.jsonl", [OPENAI, {"text": "x"}])
    with pytest.raises(DataError, match=r"t\.jsonl line 2: no conversation"):
        read_all(path)
