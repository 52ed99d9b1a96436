"""Rules about the source itself that no linter of ours knows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import paceline

SOURCE = Path(paceline.__file__).parent
TESTS = Path(__file__).parents[1]


def code(*folders: str) -> Iterator[tuple[str, str]]:
    """(path in the package, text) of every module, or of those in some folders."""
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if not folders or name.split("/")[0] in folders:
            yield name, path.read_text()


def found(pattern: str, *folders: str) -> list[str]:
    """ "path:line: text" of every line that matches."""
    return [
        f"{name}:{number}: {line.strip()}"
        for name, text in code(*folders)
        for number, line in enumerate(text.splitlines(), start=1)
        if re.search(pattern, line)
    ]


def test_only_launch_and_config_know_the_word_inline():
    others = [path.name for path in SOURCE.iterdir() if path.is_dir() and path.name not in ("launch", "config")]
    known = [line for line in found(r"(?i)\binline\b", *others) if "inline SVG" not in line]
    assert known == []
    assert found(r"(?i)\binline\b|_inline_", "launch"), "the premise: the search finds it where it may be"


def test_data_draft_and_training_code_asks_for_no_process_group():
    """Degrees are arguments: few files know torch.distributed, and none asks it who it is."""
    assert found(r"get_rank|get_world_size", "data", "drafts", "client", "training") == []
    asked = found(r"torch\.distributed|import distributed", "data", "drafts", "client", "training")
    assert {line.split(":")[0] for line in asked} <= {
        "drafts/sequence.py",
        "training/checkpoint.py",
        "training/ranks.py",
        "training/sharded.py",
    }


def test_no_state_lives_in_modules():
    assert found(r"^\s*global ") == []
    for name, text in code():
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.List | ast.Set | ast.Dict):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                assert isinstance(target, ast.Name), name
                constant = target.id == target.id.upper() or target.id == "__all__"
                assert constant, f"{name}: {target.id} is a mutable module-level value"


def test_the_device_is_synchronized_by_the_doctor_alone():
    assert [line for line in found(r"cuda\.synchronize\(") if not line.startswith("launch/doctor.py")] == []


def test_private_parts_of_torch_are_left_alone():
    """But for torch._foreach_*, of which torch's own optimizers are made, and what is marked with a reason."""
    private = found(r"\btorch\.(\w+\.)*_[a-z]")
    assert [line for line in private if "torch._foreach_" not in line and "noqa: SLF001 - " not in line] == []


def test_nothing_is_unpickled():
    assert found(r"\bimport pickle|pickle\.load|torch\.load\(|allow_pickle=True") == []


@pytest.mark.parametrize("name", ["ray", "wandb", "tensorboard", "accelerate"])
def test_optional_packages_are_imported_by_what_asks_for_them(name: str):
    """At the top of no module that the package imports."""
    assert found(rf"^(import|from) {name}\b") == []


def test_engines_are_imported_by_what_they_load_themselves():
    """Theirs are other processes, of other environments perhaps; what they load there imports nothing of ours."""
    imported = found(r"\b(import|from) +(vllm|sglang)\b|import_module\(.*(vllm|sglang)")
    assert {line.split(":")[0] for line in imported} == {"target/inside/paceline_vllm_connector.py"}
    inside = "target/inside/paceline_"
    assert [line for line in found(r"\b(import|from) +paceline\b") if line.startswith(inside)] == []
    insiders = found(r"\b(import|from) +paceline(\.target\.inside|_)|import_module\(.*inside")
    assert [line for line in insiders if not line.startswith(inside)] == []


def test_brackets_are_printed_as_they_are():
    """rich would take "paceline[ray]" and paths with brackets for markup."""
    printing = found(r"\bConsole\(|\bTextColumn\((?!\"step\"\))")
    assert len(printing) > 5
    assert [line for line in printing if "markup=False" not in line] == []


def test_files_and_functions_stay_readable():
    for name, text in code():
        assert text.count("\n") < 500, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{name}: {node.name}"


def test_the_list_of_tests_names_files_and_tests_that_exist():
    text = (TESTS / "README.md").read_text()
    files = {path.relative_to(TESTS).as_posix(): path.read_text() for path in TESTS.rglob("*.py")}
    stems = {Path(name).stem: source for name, source in files.items()}
    tree = text.split("```")[1]
    listed = {line.split()[0] for line in tree.splitlines() if ".py" in line}
    assert listed == set(files)
    named = re.findall(r"`(test_\w+)::(test_\w+)`", text)
    assert len(named) > 30
    for stem, test in named:
        assert f"def {test}(" in stems[stem], f"{stem}::{test}"
