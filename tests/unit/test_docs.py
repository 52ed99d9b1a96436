"""Documentation that cannot go stale unnoticed: commands, settings, links, messages and files it names are real."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from paceline.cli.main import app
from paceline.cli.serve import split_engine_flags
from paceline.config.drafts import DFlashConfig, DraftConfig, Eagle3Config
from paceline.config.loading import apply_overrides, build_config, load_config
from paceline.config.run import RunConfig
from paceline.data.conversations import build_conversation, check_roles
from paceline.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *(ROOT / name / "README.md" for name in ("benchmarks", "recipes")),
    *sorted((ROOT / "docs").glob("*.md")),
]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
SECTIONS: dict[str, Any] = {
    name: field.annotation for name, field in RunConfig.model_fields.items() if name not in ("run_dir", "seed")
}
MINIMAL: dict[str, Any] = {
    "run_dir": "runs/x",
    "target": {"model": "m"},
    "data": {"train": "t.jsonl"},
    "drafts": {"NAME": {"algorithm": "eagle3"}},
}
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""What the command line raises for any argument it does not know."""


def fenced(text: str, *languages: str) -> list[str]:
    """Blocks in one of `languages`, indentation removed."""
    blocks = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", text, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{indent}", "", body, flags=re.MULTILINE) for indent, name, body in blocks if name in languages]


def inline(text: str) -> list[str]:
    """Code inside sentences."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))


def shown_commands(text: str) -> list[tuple[str, bool]]:
    """Every `paceline ...` of a page, and whether it stands in a block, where it must be complete."""
    lines = [line.partition(" #")[0].strip() for block in fenced(text, "bash") for line in block.splitlines()]
    in_blocks = [re.sub(r"^\.venv/bin/", "", line) for line in lines]
    return [(line, True) for line in in_blocks if line.startswith("paceline ")] + [
        (code, False) for code in inline(text) if re.match(r"paceline [a-z]", code)
    ]


def check_command(line: str, complete: bool) -> None:
    """Raise unless the verb and its options exist, and every override names a setting."""
    group: Any = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    while words and words[0] in getattr(group, "commands", {}):
        group = group.commands[words.pop(0)]
    assert not hasattr(group, "commands"), f"{line}: no such verb"
    if not words and not complete:
        return
    context = group.make_context(group.name, [word for word in words if word != "..."])
    for override in split_engine_flags(context.params.get("overrides") or [])[0]:
        check_setting(override.partition("=")[0])


def check_setting(name: str) -> None:
    """Raise ValueError unless `section.field` is in the schema; drafts are `drafts.NAME.field`."""
    section, *fields = name.split(".")
    if not fields:
        known = section in RunConfig.model_fields
    elif section == "drafts":
        rest = fields[1:]
        models: list[type[BaseModel]] = [DraftConfig, Eagle3Config, DFlashConfig]
        known = not rest or (len(rest) == 1 and any(rest[0] in model.model_fields for model in models))
    else:
        known = section in SECTIONS and fields[0] in SECTIONS[section].model_fields
    if not known:
        raise ValueError(f"{name} is not a setting")


def named_settings(text: str) -> Iterator[str]:
    """`section.field` in sentences; names of files and of tensors are none."""
    sections = "|".join(SECTIONS)
    for code in inline(text):
        found = re.match(rf"((?:{sections})\.[A-Za-z_][\w.]*)(?=$|[ =])", code)
        if found and not re.search(r"\.(json|jsonl|md|py|toml|html|hf)$", found[1]):
            yield found[1]


def slugs(path: Path) -> set[str]:
    """Anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@cache
def message_parts() -> list[str]:
    """The constant texts of all strings in the package; an f-string gives one for each piece between its values."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "src" / "paceline").rglob("*.py"))
    constants = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [node.value for node in constants if isinstance(node.value, str)]


def missing_pieces(message: str) -> list[str]:
    """Pieces between the placeholders that no text in the package has."""
    pieces = [piece.strip() for piece in message.split("…")]
    return [piece for piece in pieces if len(piece) > 4 and not any(piece in part for part in message_parts())]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path):
    config = load_config(path)
    assert config.run_dir == f"runs/{path.stem}"
    for override in re.findall(r"^#   paceline .*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
        check_command(override.removeprefix("#   "), complete=True)


def test_recipes_hold_the_published_settings():
    eagle3, dflash = (load_config(ROOT / "recipes" / f"qwen3-8b-{name}.toml") for name in ("eagle3", "dflash"))
    both = load_config(ROOT / "recipes" / "qwen3-8b-both.toml")
    assert both.drafts == eagle3.drafts | dflash.drafts
    one = eagle3.drafts["eagle3"]
    assert isinstance(one, Eagle3Config)
    assert (one.num_depths, one.vocab_size, one.betas, one.max_grad_norm) == (7, 32000, (0.9, 0.95), 0.5)
    assert eagle3.data.row_tokens == 2048
    other = dflash.drafts["dflash"]
    assert isinstance(other, DFlashConfig)
    assert (other.num_layers, other.block_size, other.lr, other.max_grad_norm) == (5, 16, 6e-4, 1.0)
    assert dflash.data.row_tokens // other.anchor_every == 512
    assert dflash.training.num_epochs == 6


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_command_shown_exists(page: Path):
    for line, complete in shown_commands(page.read_text(encoding="utf-8")):
        check_command(line, complete)


def test_commands_are_found_and_wrong_ones_are_refused():
    text = "`paceline train` and\n```bash\n.venv/bin/paceline doctor   # looks\npaceline evaluate RUN --draft a\n```\n"
    assert shown_commands(text) == [
        ("paceline doctor", True),
        ("paceline evaluate RUN --draft a", True),
        ("paceline train", False),
    ]
    check_command("paceline config show run.toml training.max_steps=3", complete=True)
    with pytest.raises(AssertionError, match="no such verb"):
        check_command("paceline launch MODEL", complete=False)
    for wrong in ("paceline train run.toml --fast", "paceline train", "paceline serve MODEL --open"):
        with pytest.raises(USAGE_ERROR):
            check_command(wrong, complete=True)
    with pytest.raises(ValueError, match=r"training\.steps is not a setting"):
        check_command("paceline train run.toml training.steps=3", complete=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_setting_named_exists(page: Path):
    for name in named_settings(page.read_text(encoding="utf-8")):
        check_setting(name)


def test_every_setting_and_option_of_the_remote_target_is_explained():
    """With its reason, on the page about it; defaults are in the reference."""
    text = (ROOT / "docs" / "disaggregated-training.md").read_text(encoding="utf-8")
    settings = text.partition("\n## Settings\n")[2].partition("\n## ")[0]
    explained = re.findall(r"^\| `([a-z]+\.[a-z_]+)` \| \S", settings, flags=re.MULTILINE)
    sections = ("placement", "transport", "pool")
    assert explained == [f"{section}.{field}" for section in sections for field in SECTIONS[section].model_fields]
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    options = {parameter.opts[0] for parameter in serve.params if not parameter.hidden and parameter.opts[0][0] == "-"}
    rows = re.findall(r"^\| (`--.*?) \|", settings, flags=re.MULTILINE)
    assert {option for row in rows for option in inline(row)} == options - {"--help"}


def test_settings_are_found_and_wrong_ones_are_refused():
    text = '`data.train` `target.json` `drafts.NAME.lr` `training.dtype = "float32"` `training.fast` `x.data.y`'
    found = list(named_settings(text))
    assert found == ["data.train", "drafts.NAME.lr", "training.dtype", "training.fast"]
    with pytest.raises(ValueError, match=r"training\.fast"):
        check_setting("training.fast")
    with pytest.raises(ValueError, match=r"drafts\.NAME\.fast"):
        check_setting("drafts.NAME.fast")
    every_page = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len(set(named_settings(every_page))) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_relative_link_resolves(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in slugs(linked), f"{page.name}: {link} has no such heading"


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"({page.relative_to(ROOT)})" in readme


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_toml_block_is_a_configuration_or_a_part_of_one(page: Path):
    for block in fenced(page.read_text(encoding="utf-8"), "toml"):
        table = tomllib.loads(block)
        build_config(table if "run_dir" in table else _merge(MINIMAL, table))


def test_a_wrong_toml_block_would_be_refused():
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        build_config(_merge(MINIMAL, {"data": {"trian": "x"}}))


def test_every_json_line_shown_is_data_that_is_read():
    examples = fenced((ROOT / "docs" / "data.md").read_text(encoding="utf-8"), "jsonl")
    rows = [json.loads(line) for block in examples for line in block.splitlines()]
    forms = {key for row in rows for key in ("messages", "conversations", "text", "input_ids", "tools") if key in row}
    assert forms == {"messages", "conversations", "text", "input_ids", "tools"}
    for row in rows:
        if "messages" in row or "conversations" in row:
            conversation = build_conversation(row)
            check_roles(conversation.messages)
            assert any(message["role"] == "assistant" for message in conversation.messages)
        elif "input_ids" in row:
            assert len(row["input_ids"]) == len(row["loss_mask"])


def test_every_message_explained_is_raised_somewhere():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"\*\*`([^`]+)`\*\*", text)
    assert len(messages) > 100
    assert {message: missing for message in messages if (missing := missing_pieces(message))} == {}
    assert missing_pieces("… is damaged: checksum …, … was written; call a doctor")


def test_every_reason_to_skip_a_sample_is_explained():
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src/paceline/data").glob("*.py"))
    reasons = set(re.findall(r'UnusableSampleError\(\s*"([^"]+)"', source))
    assert {"no assistant turn", "unknown role", "too long"} <= reasons
    for reason in reasons:
        assert f"| {reason} |" in text, reason


def test_the_configuration_reference_is_what_the_schema_says():
    script = ROOT / "benchmarks" / "make_config_reference.py"
    made = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=60)
    assert made.stdout == (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8"), "run make docs"


def test_the_source_tree_of_the_readme_is_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = next(block for block in fenced(readme, "text") if block.startswith("src/paceline/"))
    folder = Path()
    named: set[Path] = set()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        words = line.split("   ")[0].split() if depth == 0 else line.strip().split("    ")[0].split()
        paths = [word for word in words if word.endswith(("/", ".py"))]
        for name in paths:
            path = Path(name) if depth == 0 else (Path("src/paceline") if depth == 1 else folder) / name
            assert (ROOT / path).exists(), path
            named.add(path)
            if depth == 1:
                folder = path
    packages = {path.parent for path in (ROOT / "src/paceline").glob("*/__init__.py")}
    assert {package.relative_to(ROOT) for package in packages} <= {
        path if path.suffix == "" else path.parent for path in named
    }


def test_every_benchmark_is_listed():
    listed = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for script in (ROOT / "benchmarks").glob("*.py"):
        assert f"| `{script.name}` |" in listed, script.name


def test_a_wrong_key_of_a_draft_is_named_with_the_draft():
    """Also where the draft is called like its algorithm."""
    table = _merge(MINIMAL, {"drafts": {"eagle3": {"algorithm": "eagle3", "learning_rate": 1.0}}})
    with pytest.raises(ConfigError, match=r"drafts\.eagle3\.learning_rate: unknown key"):
        build_config(table)
    assert apply_overrides({"drafts": {"eagle3": {}}}, ["drafts.eagle3=none"]) == {"drafts": {}}


def _merge(base: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in table.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
