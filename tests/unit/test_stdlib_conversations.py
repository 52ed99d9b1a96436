"""Conversations from the standard library: parsed, never imported; groups that share no module."""

import sys
from pathlib import Path
from typing import Any

import pytest

from paceline.data.conversations import read_conversations
from paceline.data.stdlib_conversations import (
    clean_docstring,
    group_of,
    make_conversations,
    read_definitions,
    read_sources,
    write_conversations,
)

GROUPS = ("target", "draft", "held_out")

SOURCE = '''
"""Tools for parsers.

More.
"""
raise RuntimeError("imported")  # parsing must not run this

def parse(text: str, *, strict=False) -> int:
    """Parse `text` and return how many
    tokens it has.

    >>> parse("a")
    """
    tokens = text.split()
    return len(tokens)

def write(text):
    return text

class Reader:
    """A reader of many lines of text."""
    def close(self):
        """Close the reader and forget its lines."""
    def _private(self):
        """Never asked for by anybody at all."""
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A standard library of one module per group, by the names' hashes."""
    root = tmp_path / "lib"
    root.mkdir()
    for group in GROUPS:
        name = next(f"module{i}" for i in range(1000) if group_of(f"module{i}") == group)
        (root / f"{name}.py").write_text(SOURCE)
    (root / "test").mkdir()
    (root / "test" / "test_all.py").write_text(SOURCE)
    (root / "broken.py").write_text("def (")
    return root


@pytest.fixture(scope="module")
def module_names() -> dict[str, set[str]]:
    return {group: {name for name, _ in read_sources(group)} for group in GROUPS}


@pytest.fixture(scope="module")
def held_out() -> list[dict[str, Any]]:
    return make_conversations("held_out")


def answers(conversations: list[dict]) -> dict[str, str]:
    return {c["messages"][0]["content"]: c["messages"][1]["content"] for c in conversations}


def test_a_function_is_asked_for_by_its_full_name_and_answered_with_its_documentation(library: Path) -> None:
    (module,) = (name for name, _ in read_sources("target", library) if name != "broken")
    found = answers(make_conversations("target", root=library))
    documentation = "Parse text and return how many tokens it has."
    assert documentation in {found.get(f"What does {module}.parse do?"), found.get(f"What is {module}.parse for?")}
    assert f"```python\nparse(text, *, strict=False)\n```\n{documentation}" in found.values()
    assert "The function parse takes the arguments text and strict." in found.values()
    assert f"The module {module} has the functions parse and write." in found.values()
    code = "```python\ndef parse(text, *, strict=False):\n    tokens = text.split()\n    return len(tokens)\n```"
    assert code in found.values()
    assert not any("_private" in text for text in [*found, *found.values()])


def test_modules_are_parsed_and_not_imported() -> None:
    before = set(sys.modules)
    assert len(list(read_definitions("held_out"))) > 100  # of hundreds of modules that this process never needed
    assert set(sys.modules) <= before


def test_every_module_is_in_one_group_and_the_held_out_ones_in_no_other(
    module_names: dict[str, set[str]],
) -> None:
    modules = {group: {name.partition(".")[0] for name in names} for group, names in module_names.items()}
    assert all(modules.values())
    for one in GROUPS:
        for other in GROUPS:
            assert one == other or not modules[one] & modules[other]


def test_the_split_is_the_same_on_every_python_version() -> None:
    # The shipped target was trained on these groups: a changed hash would show it held-out text.
    assert group_of("json") == group_of("json.decoder") == "target"
    assert group_of("email") == group_of("tkinter") == "target"
    assert group_of("logging") == group_of("platform") == "draft"
    assert group_of("os") == group_of("os.path") == group_of("heapq") == group_of("queue") == "held_out"
    assert group_of("_queue") == group_of("queue")


def test_a_module_that_implements_another_is_in_its_group(module_names: dict[str, set[str]]) -> None:
    names = set().union(*module_names.values())
    assert {"os.path", "decimal", "collections.abc"} <= names
    assert not {"posixpath", "_pydecimal", "_collections_abc"} & names


def test_the_order_is_fixed_and_lets_modules_take_turns(held_out: list[dict[str, Any]]) -> None:
    first = make_conversations("held_out", 40)
    assert first == held_out[:40]
    assert len({c["module"] for c in first}) >= 12
    assert any(len(c["messages"]) == 4 for c in held_out)


def test_this_librarys_answers_are_short_and_its_questions_differ(held_out: list[dict[str, Any]]) -> None:
    assert len(held_out) > 1000
    questions = [c["messages"][0]["content"] for c in held_out]
    assert len(set(questions)) == len(questions)
    assert max(len(message["content"]) for c in held_out for message in c["messages"]) < 1200


def test_a_written_file_is_read_back_as_conversations(library: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "held_out.jsonl"
    count = write_conversations(path, "held_out", root=library)
    read = list(read_conversations(str(path)))
    assert count == len(read) > 5
    assert [c.messages for c in read] == [c["messages"] for c in make_conversations("held_out", root=library)]
    assert not list(path.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    ("docstring", "cleaned"),
    [
        (None, ""),
        ("f(x) -> int\n\nReturn the number of `x` in use.", "Return the number of x in use."),
        ("Return a :class:`Path` of\n   this file", "Return a Path of this file."),
        ("Short.", ""),
        (">>> f(1)\n1", ""),
        ("First sentence of it. " + "word " * 80, "First sentence of it."),
    ],
)
def test_docstrings_become_one_line_of_whole_sentences(docstring: str | None, cleaned: str) -> None:
    assert clean_docstring(docstring) == cleaned or (cleaned and clean_docstring(docstring).startswith(cleaned))
