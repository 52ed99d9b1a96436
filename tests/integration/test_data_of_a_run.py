"""What a run asks of its data besides the settings under [data]: its drafts have a say, and so has its target"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from paceline.config.run_dir import RunDir
from paceline.data.prepared import PreparedData
from paceline.errors import DataError, RunDirectoryError
from paceline.launch.prepare import prepare_data
from paceline.launch.regenerate import regenerate_data
from paceline.launch.target_facts import read_checkpoint_facts
from tiny import CHAT_TEMPLATE, tiny_tokenizer
from whole_run import DRAFTS, run_config, write_lines

DFLASH, EAGLE3 = DRAFTS["dflash"], DRAFTS["eagle3"]


def answer(num_tokens: int, *, first: int = 0) -> dict[str, Any]:
    return {"input_ids": [first, *range(1, num_tokens + 1)], "loss_mask": [0] + [1] * num_tokens}


def prepared(tmp_path: Path, target: Path, rows: list[dict[str, Any]], **changes: Any) -> PreparedData:
    write_lines(tmp_path / "train.jsonl", rows)
    changes = {"data__eval": None, "data__eval_fraction": 0.0, "data__max_skipped_fraction": 0.9} | changes
    config = run_config(tmp_path / "run", target, tmp_path, **changes)
    return prepare_data(config, RunDir(tmp_path / "run"), read_checkpoint_facts(config))


def test_a_sample_needs_two_blocks_of_the_largest_dflash_draft_unless_set(tiny_target: Path, tmp_path: Path) -> None:
    rows = [answer(num) for num in range(1, 21)]
    large = {"other": DFLASH | {"block_size": 6}}
    for drafts, least in (({"eagle3": EAGLE3}, 2), (DRAFTS, 2 * 4), (DRAFTS | large, 2 * 6)):
        data = prepared(tmp_path, tiny_target, rows, drafts=drafts)
        assert len(data.train) == 20 - (least - 1)
        assert data.train.lengths.min() == least + 1
        told = data.summary.train.examples["too few supervised tokens"]
        assert told.endswith(f"line 1: 1 supervised tokens, data.min_supervised_tokens = {least}")
        same = prepared(tmp_path, tiny_target, rows, drafts=drafts, data__min_supervised_tokens=least)
        assert same.directory == data.directory, "the number counts, not where it comes from"
    assert len(prepared(tmp_path, tiny_target, rows, drafts=DRAFTS, data__min_supervised_tokens=5).train) == 16


def test_a_sample_with_the_mask_token_is_skipped_and_named_where_a_draft_masks(
    tiny_target: Path, tmp_path: Path
) -> None:
    """The tokenizer's 261 tokens leave row 261 to be the mask."""
    rows = [*(answer(20, first=first) for first in range(10)), answer(20, first=261), answer(20, first=270)]
    data = prepared(tmp_path, tiny_target, rows)
    assert data.summary.train.skipped == {"mask token in the data": 1}
    (told,) = data.summary.train.examples.values()
    assert "train.jsonl line 11: token 261 at index 0 is the mask token of a draft" in told
    own = prepared(tmp_path, tiny_target, rows, drafts__dflash__mask_token_id=270)
    (told,) = own.summary.train.examples.values()
    assert "train.jsonl line 12: token 270" in told
    assert len(prepared(tmp_path, tiny_target, rows, drafts={"eagle3": EAGLE3}).train) == 12


def regenerated(tmp_path: Path, target: Path, name: str, **changes: Any) -> list[dict[str, Any]]:
    """Conversations of the data that the target has answered anew."""
    questions = [{"messages": [{"role": "user", "content": word}]} for word in ("ab?", "cd?", "ef?")]
    write_lines(tmp_path / "train.jsonl", questions)
    output = tmp_path / f"{name}.jsonl"
    config = run_config(tmp_path / "run", target, tmp_path, regeneration__max_new_tokens=12, **changes)
    assert regenerate_data(config, threading.Event(), output=output).num_answered == 3
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_regeneration_asks_with_the_tokenizer_that_the_data_is_prepared_with(tiny_target: Path, tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.chat_template = CHAT_TEMPLATE.replace("{{ message.content }}", "({{ message.content }})")
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "template.jinja").write_text(other.chat_template)
    tokenizer = {"data__tokenizer": str(tmp_path / "other")}
    answers = regenerated(tmp_path, tiny_target, "tokenizer", **tokenizer)
    template = str(tmp_path / "template.jinja")
    assert answers == regenerated(tmp_path, tiny_target, "template", data__chat_template=template)
    assert answers != regenerated(tmp_path, tiny_target, "plain"), "the premise: the prompts differ"
    with pytest.raises(RunDirectoryError, match="tokenizer"):
        regenerated(tmp_path, tiny_target, "plain", **tokenizer)


def test_regeneration_refuses_a_tokenizer_that_the_target_has_no_embedding_for(
    tiny_target: Path, tmp_path: Path
) -> None:
    large = tiny_tokenizer()
    large.add_tokens([f"<{index}>" for index in range(40)])
    large.save_pretrained(tmp_path / "large")
    with pytest.raises(DataError, match=r"has token 300 .*lm_head has 300 rows.*data\.tokenizer"):
        regenerated(tmp_path, tiny_target, "large", data__tokenizer=str(tmp_path / "large"))
    assert not (tmp_path / "large.jsonl").exists()
