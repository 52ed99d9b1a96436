"""From files to rows: what `prepare` keeps, skips, caches and refuses."""

import errno
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from paceline.config.data import DataConfig
from paceline.data import prepared as prepared_module
from paceline.data.packing import RowPlan
from paceline.data.prepared import PreparedData, load_prepared, prepare, tokenizer_fingerprint
from paceline.data.rows import RowSource
from paceline.data.split import PreparedSplit
from paceline.data.summary import HELD_OUT, prepare_table
from paceline.errors import DataError
from paceline.schema.limits import RowSizes
from tiny import tiny_tokenizer

FORGETS_REASONING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content and loop.last %}[{{ m.reasoning_content }}]{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat(question: str, answer: str, **more: Any) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


def chats(num: int) -> list[dict]:
    return [chat(f"question {i}", f"answer {i} " * (1 + i % 7)) for i in range(num)]


def write(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def run(
    tmp_path: Path,
    train: str,
    tokenizer: Any = None,
    seed: int = 0,
    vocab: int = 300,
    reserved_tokens: frozenset[int] = frozenset(),
    **config: Any,
):
    settings = {"row_tokens": 128, "eval_fraction": 0.0} | config
    return prepare(
        DataConfig(train=train, **settings),
        tokenizer or tiny_tokenizer(),
        target_vocab_size=vocab,
        cache_root=tmp_path / "prepared",
        seed=seed,
        reserved_tokens=reserved_tokens,
    )


def samples(split: PreparedSplit) -> list[tuple[list[int], list[list[int]]]]:
    return [(s.tokens.tolist(), s.spans.tolist()) for s in map(split.sample, range(len(split)))]


def source(data: PreparedData) -> RowSource:
    return RowSource(data.train, data.train_plan, data.train_plan.seed)


def test_samples_keep_their_order_and_counts_are_those_of_the_masks(tmp_path: Path):
    data = run(tmp_path, write(tmp_path / "d.jsonl", chats(40)))
    tokenizer = tiny_tokenizer()
    texts = [tokenizer.decode(tokens) for tokens, _ in samples(data.train)]
    assert texts[:2] == [
        "<|user|>question 0<|end|><|assistant|>answer 0 <|end|>",
        "<|user|>question 1<|end|><|assistant|>answer 1 answer 1 <|end|>",
    ]
    supervised = np.concatenate([np.array(t)[s:e] for t, spans in samples(data.train) for s, e in spans])
    assert np.array_equal(data.token_counts, np.bincount(supervised))
    assert data.summary.train.num_samples == len(data.train) == 40
    assert data.summary.train.num_tokens == data.train.lengths.sum() == sum(len(t) for t, _ in samples(data.train))
    assert data.summary.train.num_supervised == len(supervised)
    assert len(data.eval) == 0


def test_the_largest_rows_of_the_beginning_and_of_all_epochs_are_known_beforehand(tmp_path: Path):
    data = run(tmp_path, write(tmp_path / "d.jsonl", [*chats(60), chat("longer", "word " * 150)]))
    stream = source(data)
    rows = [stream.row(position) for position in range(stream.num_rows)]
    assert len({len(row.tokens) for row in rows}) > 1
    for num in (1, 2, len(rows) - 1, len(rows), 3 * len(rows)):
        longest = max(int(np.diff(row.documents).max()) for row in rows[:num])
        assert stream.sizes(num) == RowSizes(longest, max(row.num_tokens for row in rows[:num]))
    assert stream.sizes(0) == RowSizes()


def test_rows_of_an_epoch_hold_every_token_of_every_sample_once(tmp_path: Path):
    rows = [*chats(60), chat("long", "word " * 80), chat("longer", "word " * 150)]
    data = run(tmp_path, write(tmp_path / "d.jsonl", rows))
    stream = source(data)
    plan = data.train_plan
    assert plan.num_cut == 2
    order = {int(data.train.sample_ids[i]): i for i in range(len(data.train))}
    seen: dict[tuple[int, int], tuple[list[int], list[bool]]] = {}
    for position in range(stream.num_rows):
        row = stream.row(position)
        assert row.num_tokens <= 128
        mask = np.zeros(row.num_tokens, bool)
        mask[row.supervised_index()] = True
        for d, (sample_id, piece) in enumerate(zip(row.sample_ids.tolist(), row.pieces.tolist(), strict=True)):
            at = slice(row.documents[d], row.documents[d + 1])
            assert (order[sample_id], piece) not in seen
            seen[order[sample_id], piece] = (row.tokens[at].tolist(), mask[at].tolist())
    for index, (tokens, spans) in enumerate(samples(data.train)):
        pieces = [seen[key] for key in sorted(seen) if key[0] == index]
        mask = np.zeros(len(tokens), bool)
        for start, end in spans:
            mask[start:end] = True
        assert [token for piece in pieces for token in piece[0]] == tokens
        assert [on for piece in pieces for on in piece[1]] == mask.tolist()


def test_two_epochs_hold_the_same_rows_in_two_orders(tmp_path: Path):
    stream = source(run(tmp_path, write(tmp_path / "d.jsonl", chats(80))))
    n = stream.num_rows
    epochs = [[stream.row(p) for p in range(e * n, (e + 1) * n)] for e in (0, 1)]
    assert n > 10
    assert [row.position for row in epochs[1]] == list(range(n, 2 * n))
    assert {row.epoch for row in epochs[1]} == {1}
    content = [{row.row_id: row.tokens.tolist() for row in epoch} for epoch in epochs]
    assert content[0] == content[1]
    assert [row.row_id for row in epochs[0]] != [row.row_id for row in epochs[1]]
    again = stream.row(3)
    assert (again.row_id, again.tokens.tolist()) == (epochs[0][3].row_id, epochs[0][3].tokens.tolist())


def test_pieces_of_a_cut_sample_say_where_the_supervised_run_goes_on(tmp_path: Path):
    tokens = list(range(40))
    mask = [0] * 10 + [1] * 22 + [0] * 2 + [1] * 4 + [0] * 2  # spans [10, 32) and [34, 38)
    data = run(tmp_path, write(tmp_path / "d.jsonl", [{"input_ids": tokens, "loss_mask": mask}]), row_tokens=16)
    rows = {int(row.pieces[0]): row for row in (source(data).row(p) for p in range(3))}
    assert [rows[i].tokens.tolist() for i in range(3)] == [tokens[:16], tokens[16:32], tokens[32:]]
    assert [rows[i].spans.tolist() for i in range(3)] == [[[10, 16]], [[0, 16]], [[2, 6]]]
    assert [rows[i].span_cut.tolist() for i in range(3)] == [[True], [False], [False]]
    assert {rows[i].tokens.dtype for i in range(3)} == {np.dtype(np.int32)}
    assert (rows[1].spans.dtype, rows[1].span_cut.dtype) == (np.dtype(np.int32), np.dtype(bool))


def test_a_second_call_reuses_everything_and_a_loaded_directory_is_the_same(tmp_path: Path, monkeypatch):
    path = write(tmp_path / "d.jsonl", chats(20))
    first = run(tmp_path, path)
    monkeypatch.setattr(prepared_module, "_write_samples", None)
    monkeypatch.setattr(prepared_module, "_write_rows", None)
    second = run(tmp_path, path)
    loaded = load_prepared(first.directory)
    for other in (second, loaded):
        assert (other.directory, other.fingerprint) == (first.directory, first.fingerprint)
        assert samples(other.train) == samples(first.train)
        assert np.array_equal(other.token_counts, first.token_counts)
        assert other.summary == first.summary
        assert np.array_equal(other.train_plan.samples, first.train_plan.samples)


def test_the_cache_changes_with_data_template_tokenizer_and_settings_and_not_with_packing(tmp_path: Path):
    path = write(tmp_path / "d.jsonl", chats(20))
    template = tmp_path / "template.jinja"
    template.write_text(FORGETS_REASONING)
    data = [run(tmp_path, path), run(tmp_path, path, chat_template=str(template))]
    template.write_text("{# other #}" + FORGETS_REASONING)
    other_tokenizer = tiny_tokenizer()
    other_tokenizer.add_tokens(["<new>"])
    data.append(run(tmp_path, path, chat_template=str(template)))
    data.append(run(tmp_path, path, tokenizer=other_tokenizer))
    data.append(run(tmp_path, path, train_on="last_turn"))
    data.append(run(tmp_path, path, chat_template_args={"x": 1}))
    write(tmp_path / "d.jsonl", chats(19))
    data.append(run(tmp_path, path))
    tokenized = {json.loads((d.directory / "prepared.json").read_text())["samples"] for d in data}
    assert len(tokenized) == len({d.fingerprint for d in data}) == 7

    packed = [run(tmp_path, path), run(tmp_path, path, seed=1), run(tmp_path, path, row_tokens=64)]
    assert len({json.loads((d.directory / "prepared.json").read_text())["samples"] for d in packed}) == 1
    assert len({d.fingerprint for d in packed}) == 3


def test_a_tokenizer_fingerprint_does_not_remember_the_last_call():
    tokenizer = tiny_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.chat_template += " "
    assert tokenizer_fingerprint(tokenizer) != before


def test_several_workers_give_what_one_gives(tmp_path: Path):
    path = write(tmp_path / "d.jsonl", chats(600))
    one = run(tmp_path / "one", path)
    two = run(tmp_path / "two", path, num_workers=2)
    assert one.fingerprint == two.fingerprint
    assert samples(one.train) == samples(two.train)


def test_held_out_samples_share_no_content_with_the_training_ones_and_duplicates_stay(tmp_path: Path):
    rows = chats(200)
    data = run(tmp_path, write(tmp_path / "d.jsonl", rows + rows[:100]), eval_fraction=0.2)
    train = [tuple(t) for t, _ in samples(data.train)]
    held_out = [tuple(t) for t, _ in samples(data.eval)]
    assert len(train) + len(held_out) == 300
    assert not set(train) & set(held_out)
    assert 20 <= len(set(held_out)) <= 60
    assert len(train) > len(set(train))
    assert len(held_out) > len(set(held_out))


def test_adding_data_moves_no_sample_from_one_split_to_the_other(tmp_path: Path):
    small = run(tmp_path, write(tmp_path / "d.jsonl", chats(100)), eval_fraction=0.2)
    large = run(tmp_path, write(tmp_path / "e.jsonl", chats(200)), eval_fraction=0.2)
    assert len(small.eval) > 0
    assert set(small.eval.sample_ids) <= set(large.eval.sample_ids)
    assert set(small.train.sample_ids) <= set(large.train.sample_ids)


def test_a_small_data_set_still_has_something_held_out(tmp_path: Path):
    data = run(tmp_path, write(tmp_path / "d.jsonl", chats(5)), eval_fraction=0.0001)
    assert (len(data.train), len(data.eval)) == (4, 1)


def test_a_held_out_file_wins_over_the_same_content_in_training(tmp_path: Path):
    rows = chats(30)
    eval_path = write(tmp_path / "e.jsonl", [*rows[:5], chat("only", "here")])
    data = run(tmp_path, write(tmp_path / "d.jsonl", rows), eval=eval_path, eval_fraction=0.5)
    assert (len(data.train), len(data.eval)) == (25, 6)
    assert data.summary.train.skipped == {HELD_OUT: 5}


def test_one_text_made_of_two_contents_is_not_in_both_splits(tmp_path: Path):
    first, second = chat("a", "b", reasoning_content="unused by the template"), chat("a", "b")
    data = run(tmp_path, write(tmp_path / "d.jsonl", [first, *chats(3)]), eval=write(tmp_path / "e.jsonl", [second]))
    assert len(data.train) == 3
    assert data.summary.train.skipped == {HELD_OUT: 1}


def test_turns_of_a_rewriting_template_become_samples_with_ids_of_their_own(tmp_path: Path):
    turns = [m for q in "abc" for m in chat(q, q * 3, reasoning_content="why " + q)["messages"]]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = FORGETS_REASONING
    data = run(tmp_path, write(tmp_path / "d.jsonl", [{"messages": turns}]), tokenizer=tokenizer)
    assert len(data.train) == 3
    assert len(set(data.train.sample_ids.tolist())) == 3
    last, [[start, end]] = samples(data.train)[2]
    assert tokenizer.decode(last[start:end]) == "[why c]ccc<|end|>"


def test_text_is_supervised_whole_or_between_markers(tmp_path: Path):
    text = "<|user|>hi<|end|><|assistant|>ho<|end|><|user|>x<|end|><|assistant|>y"
    path = write(tmp_path / "d.jsonl", [{"text": text}])
    [(tokens, spans)] = samples(run(tmp_path, path).train)
    assert spans == [[0, len(tokens)]]
    [(tokens, spans)] = samples(run(tmp_path, path, assistant_start="<|assistant|>", assistant_end="<|end|>").train)
    assert [tiny_tokenizer().decode(tokens[s:e]) for s, e in spans] == ["ho<|end|>", "y"]


def test_sharegpt_parquet_and_lines_in_one_directory_become_one_data_set(tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "ans"}]}])
    datasets.Dataset.from_list(chats(2)).to_parquet(folder / "b.parquet")
    data = run(tmp_path, str(folder))
    assert [tiny_tokenizer().decode(t) for t, _ in samples(data.train)][:2] == [
        "<|user|>q<|end|><|assistant|>ans<|end|>",
        "<|user|>question 0<|end|><|assistant|>answer 0 <|end|>",
    ]
    assert data.train.sample(1).origin.endswith("b.parquet row 0")
    assert len(data.train) == 3


UNUSABLE = {
    "no assistant turn": {"messages": [{"role": "user", "content": "x"}]},
    "unknown role": {"messages": [{"role": "narrator", "content": "x"}, *chat("a", "b")["messages"]]},
    "too long": chat("a", "b" * 200),
    "too few supervised tokens": chat("a", ""),
    "no conversation": {"prompt": "x"},
    "malformed row": {"input_ids": [1, 2], "loss_mask": [1]},
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_a_sample_that_cannot_be_used_is_counted_with_its_reason_and_place(tmp_path: Path, reason: str):
    path = write(tmp_path / "d.jsonl", [*chats(20), UNUSABLE[reason]])
    data = run(tmp_path, path, max_sample_tokens=100, max_skipped_fraction=0.05)
    assert data.summary.train.skipped == {reason: 1}
    assert data.summary.train.examples[reason].startswith(f"{path} line 21")
    assert len(data.train) == 20


def test_an_unstable_boundary_is_counted_and_its_other_turns_are_kept(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>[{% endif %}"
    )
    turns = chat("a", "bbb")["messages"] + chat("c", "ddd", reasoning_content="e")["messages"]
    path = write(tmp_path / "d.jsonl", [{"messages": turns}])
    data = run(tmp_path, path, tokenizer=tokenizer, max_skipped_fraction=0.5)
    assert data.summary.train.skipped == {"unstable turn boundary": 1}
    assert (
        "message 1: after '<|user|>a<|end|><|assistant|>' the prompt has '['"
        in data.summary.train.examples["unstable turn boundary"]
    )
    [(tokens, [[start, end]])] = samples(data.train)
    assert tokenizer.decode(tokens[start:end]) == "e]ddd<|end|>"


def test_more_skipped_samples_than_allowed_end_the_run_with_reasons_and_examples(tmp_path: Path):
    path = write(tmp_path / "d.jsonl", [*chats(8), *UNUSABLE.values()])
    with pytest.raises(DataError) as caught:
        run(tmp_path, path, max_sample_tokens=100)
    message = str(caught.value)
    assert "6 of 14 samples (42.9%) cannot be used, data.max_skipped_fraction allows 5.0%" in message
    assert f"unknown role: 1, e.g. {path} line 10: 'narrator'" in message
    assert all(reason in message for reason in UNUSABLE)
    with pytest.raises(DataError, match=r"42\.9%"):
        run(tmp_path, path, max_sample_tokens=100)  # the cache does not hide it
    assert len(run(tmp_path, path, max_sample_tokens=100, max_skipped_fraction=0.5).train) == 8


def test_data_without_a_usable_sample_is_an_error_whatever_may_be_skipped(tmp_path: Path):
    path = write(tmp_path / "d.jsonl", [UNUSABLE["no assistant turn"]])
    with pytest.raises(DataError, match=r"no sample that can be trained on\n.*no assistant turn: 1"):
        run(tmp_path, path, max_skipped_fraction=1.0)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_line_that_is_not_json_ends_the_run_and_leaves_nothing_behind(tmp_path: Path, num_workers: int):
    path = write(tmp_path / "d.jsonl", [*chats(3), "{oops}", *chats(3)])
    with pytest.raises(DataError, match=r"d\.jsonl line 4 is not JSON"):
        run(tmp_path, path, num_workers=num_workers)
    assert list((tmp_path / "prepared").iterdir()) == []


@pytest.mark.parametrize(("name", "text"), [("gone.jsonl", None), ("e.jsonl", ""), ("e.jsonl", "\n"), ("e.json", "[]")])
def test_a_missing_or_empty_file_is_named(tmp_path: Path, name: str, text: str | None):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"{name} (does not exist|is empty)"):
        run(tmp_path, str(tmp_path / name))


def test_a_tokenizer_without_a_chat_template_names_the_remedy_unless_none_is_needed(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template.*data\.chat_template"):
        run(tmp_path, write(tmp_path / "d.jsonl", chats(2)), tokenizer=tokenizer)
    assert len(run(tmp_path, write(tmp_path / "t.jsonl", [{"text": "some text"}]), tokenizer=tokenizer).train) == 1
    with pytest.raises(DataError, match=r"data\.chat_template = '/no/file' cannot be read"):
        run(tmp_path, str(tmp_path / "d.jsonl"), chat_template="/no/file")


def test_a_vocabulary_larger_than_the_lm_head_is_an_error(tmp_path: Path):
    path = write(tmp_path / "d.jsonl", chats(2))
    assert len(run(tmp_path, path, vocab=261).train) == 2
    with pytest.raises(DataError, match=r"has token 260 .*lm_head has 260 rows"):
        run(tmp_path, path, vocab=260)


def test_a_token_the_target_has_no_embedding_for_names_its_sample_also_from_the_cache(tmp_path: Path):
    rows = [{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}, {"input_ids": [4, 290, 5], "loss_mask": [0, 1, 1]}]
    path = write(tmp_path / "d.jsonl", rows)
    assert len(run(tmp_path, path, vocab=291).train) == 2
    for root in (tmp_path, tmp_path / "fresh"):
        with pytest.raises(DataError, match=r"d\.jsonl line 2 has token 290, the target's embedding has 290 rows"):
            run(root, path, vocab=290)
    huge = write(tmp_path / "h.jsonl", [{"input_ids": [2**31 - 1, 1], "loss_mask": [1, 1]}])
    with pytest.raises(DataError, match="has token 2147483647"):
        run(tmp_path, huge)


def test_a_sample_with_a_reserved_token_is_skipped_and_named_with_it(tmp_path: Path):
    rows = [{"input_ids": [i, 5, 6], "loss_mask": [0, 1, 1]} for i in range(20)]
    rows.append({"input_ids": [4, 261, 261], "loss_mask": [0, 1, 1]})
    path = write(tmp_path / "d.jsonl", rows)
    data = run(tmp_path, path, reserved_tokens=frozenset({261, 270}))
    assert data.summary.train.skipped == {"mask token in the data": 1}
    assert f"{path} line 21: token 261 at index 1 is the mask token" in "".join(data.summary.train.examples.values())
    assert len(data.train) == 20
    kept = run(tmp_path, path)
    assert len(kept.train) == 21, "and the cache knows which tokens were reserved"


def test_fewer_supervised_tokens_than_asked_for_skip_a_sample_and_the_default_is_the_number_two(tmp_path: Path):
    rows = [{"input_ids": [1, 2, 3, 4], "loss_mask": [0, *mask]} for mask in ([0, 0, 1], [0, 1, 1], [1, 1, 1])]
    path = write(tmp_path / "d.jsonl", rows)
    left = {least: run(tmp_path, path, min_supervised_tokens=least, max_skipped_fraction=1.0) for least in (None, 2, 3)}
    assert [len(data.train) for data in left.values()] == [2, 2, 1]
    assert left[None].fingerprint == left[2].fingerprint != left[3].fingerprint
    detail = "2 supervised tokens, data.min_supervised_tokens = 3"
    assert (
        detail
        in run(
            tmp_path, write(tmp_path / "e.jsonl", rows[1:]), min_supervised_tokens=3, max_skipped_fraction=1.0
        ).summary.train.examples["too few supervised tokens"]
    )


def test_a_full_disk_names_the_directory_and_publishes_nothing(tmp_path: Path, monkeypatch):
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    path = write(tmp_path / "d.jsonl", chats(3))
    with pytest.raises(DataError, match=r"no space left in .*prepared.*data\.cache_dir"):
        run(tmp_path, path)
    monkeypatch.undo()
    assert list((tmp_path / "prepared").iterdir()) == []
    assert len(run(tmp_path, path).train) == 3


def test_damaged_prepared_data_is_named(tmp_path: Path):
    data = run(tmp_path, write(tmp_path / "d.jsonl", chats(3)))
    data.train.path.write_bytes(b"ARROW1")
    with pytest.raises(DataError, match="delete it and prepare again"):
        load_prepared(data.directory)
    with pytest.raises(DataError, match="delete it and prepare again"):
        load_prepared(tmp_path)


def test_rows_of_another_plan_or_seed_or_of_nothing_are_refused(tmp_path: Path):
    data = run(tmp_path, write(tmp_path / "d.jsonl", chats(3)), seed=4)
    with pytest.raises(DataError, match="do not belong together"):
        RowSource(data.train, RowPlan.build(np.array([5]), 128, 4), 4)
    with pytest.raises(DataError, match="seed 4"):
        RowSource(data.train, data.train_plan, 5)
    with pytest.raises(DataError, match="no samples"):
        RowSource(data.eval, data.eval_plan, 4).row(0)


def test_the_table_shows_both_splits_and_every_reason(tmp_path: Path):
    path = write(tmp_path / "d.jsonl", [*chats(50), UNUSABLE["no assistant turn"]])
    data = run(tmp_path, path, eval_fraction=0.2)
    table = prepare_table(data.summary, data.train_plan, data.eval_plan)
    shown = {name: (first, second) for name, first, second in table}
    assert shown["samples"] == (str(len(data.train)), str(len(data.eval)))
    assert shown["rows of 128"] == (str(data.train_plan.num_rows), str(data.eval_plan.num_rows))
    assert shown["skipped: no assistant turn"] == ("1", "0")
    assert shown["fill (best possible)"][0] == f"{data.train_plan.fill:.1%} ({data.train_plan.best_fill:.1%})"
    assert shown["supervised"][0].endswith("%")
