"""Whole runs of both drafts against a tiny target in the same process: the rules that hold in every mode, inline."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.client.budget import PrefetchBudget, Reservation
from paceline.client.pool import FeaturePool
from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.launch.assemble import feature_specs
from paceline.launch.targets import open_target
from paceline.launch.trained import recall_target
from paceline.training.checkpoint import load_state
from tiny import save_nested_tiny_target, save_tiny_target, tiny_request
from whole_run import StopsAfter, lines, losses, run, run_config, same_weights, weights, write_data, write_lines

CONSTANT = {
    f"drafts__{name}__{field}": value
    for name in ("eagle3", "dflash")
    for field, value in (("schedule", "constant"), ("warmup_ratio", 0.0))
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, data: Path) -> RunConfig:
    """Two epochs, strictly serial, with evaluations and checkpoints; finished."""
    config = run_config(
        tmp_path_factory.mktemp("base"),
        tiny_target,
        data,
        training__num_epochs=2,
        training__rows_per_step=2,
        training__eval_every=3,
        training__checkpoint_every=3,
        transport__prefetch_rows=1,
    )
    result = run(config)
    assert (result.status, result.step) == ("finished", 8)
    return config


def another(base: RunConfig, run_dir: Path, **changes: Any) -> RunConfig:
    """The base's configuration in another directory; "section.field" is written with "__"."""
    table = base.model_dump(mode="json") | {"run_dir": str(run_dir)}
    for key, value in changes.items():
        *sections, field = key.split("__")
        place = table
        for section in sections:
            place = place[section]
        place[field] = value
    return RunConfig.model_validate(table)


def test_every_logging_interval_says_what_share_of_the_work_is_the_targets(base: RunConfig) -> None:
    """Both are at work on one device: no server can be added. Its tokens are counted once."""
    every = lines(base)
    balances = [line["balance"] for line in every if "balance" in line]
    assert len(balances) == len(every)  # strictly serial: a row was computed in each step
    assert {one["limit"] for one in balances} == {"shared"}
    assert all(0 < one["servers_work"] < 1 and one["one_more_server"] is None for one in balances)
    assert sum(one["window"]["tokens"] for one in balances) == sum(line["tokens"] for line in every)
    assert "share the trainer's device" in balances[-1]["text"]
    log = (Path(base.run_dir) / "logs" / "trainer-0.log").read_text()
    assert log.count("balance over the whole run: target and drafts share the trainer's device") == 1


def test_look_ahead_changes_no_bit(base: RunConfig, tmp_path: Path) -> None:
    config = another(base, tmp_path, transport__prefetch_rows=4)
    run(config)
    assert losses(config) == losses(base)
    assert same_weights(config, base)


def test_evaluations_and_checkpoints_change_no_bit(base: RunConfig, tmp_path: Path) -> None:
    config = another(
        base, tmp_path, training__eval_every=0, training__checkpoint_every=0, training__async_checkpoints=False
    )
    run(config)
    assert [line["step"] for line in lines(config, "eval")] == [8]
    assert [line["step"] for line in lines(base, "eval")] == [3, 6, 8]
    assert losses(config) == losses(base)
    assert same_weights(config, base)


def test_the_logging_interval_changes_no_bit(base: RunConfig, tmp_path: Path) -> None:
    config = another(base, tmp_path, training__log_every=100)
    run(config)
    assert losses(config) == losses(base)


def test_another_seed_gives_another_run(base: RunConfig, tmp_path: Path) -> None:
    """The premise of every equality here: the numbers can differ."""
    config = another(base, tmp_path, seed=1, training__max_steps=2)
    run(config)
    assert losses(config)[:2] != losses(base)[:2]


def test_a_run_of_one_epoch_is_the_first_half_of_a_run_of_two(tiny_target: Path, data: Path, tmp_path: Path) -> None:
    one = run_config(tmp_path / "one", tiny_target, data, training__num_epochs=1, **CONSTANT)
    two = run_config(tmp_path / "two", tiny_target, data, training__num_epochs=2, **CONSTANT)
    run(one)
    run(two)
    first = losses(one)
    assert len(losses(two)) == 2 * len(first)
    assert losses(two)[: len(first)] == first
    assert losses(two)[len(first) :] != first


@pytest.mark.parametrize("looks", [1, 5, 10, 17])
def test_stopped_anywhere_and_run_again_it_ends_the_same(base: RunConfig, tmp_path: Path, looks: int) -> None:
    """In each step the trainer looks at the stop once for every row and once between steps."""
    config = another(base, tmp_path, transport__prefetch_rows=4)
    stopped = run(config, StopsAfter(looks))
    assert stopped.status == "stopped"
    assert stopped.step == (looks - 1) // 3
    assert run(config).status == "finished"
    assert losses(config) == losses(base)
    assert same_weights(config, base)
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = [line["step"] for line in kept if line["kind"] == "train"]
    assert trained == list(range(1, 9)), "a step was trained twice or left out"


def test_a_run_that_is_finished_changes_nothing_when_run_again(base: RunConfig, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base.run_dir, copy)
    config = another(base, copy)
    before = sorted((path, path.stat().st_mtime_ns) for path in (copy / "checkpoints").rglob("*"))
    assert run(config).step == 8
    assert sorted((path, path.stat().st_mtime_ns) for path in (copy / "checkpoints").rglob("*")) == before
    assert losses(config) == losses(base)


def test_zero_steps_leave_a_checkpoint_of_the_untrained_drafts(base: RunConfig, tmp_path: Path) -> None:
    config = another(base, tmp_path, training__max_steps=0)
    for _ in range(2):
        result = run(config)
        assert (result.status, result.step) == ("finished", 0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000000"]
    assert not same_weights(config, base)


def test_the_update_does_not_depend_on_how_documents_are_split_over_rows(tiny_target: Path, tmp_path: Path) -> None:
    """Four rows of one document each, or one row of all four: the same step, up to the order of sums in fp32."""
    words = ["abcd " * 14, "fade " * 16, "bead cafe " * 8, "face " * 18]
    documents = [
        {"messages": [{"role": "user", "content": f"{index}?"}, {"role": "assistant", "content": word}]}
        for index, word in enumerate(words)
    ]
    write_lines(tmp_path / "train.jsonl", documents)
    write_data(tmp_path / "held-out")
    runs = []
    for rows_per_step, row_tokens in ((4, 104), (2, 208), (1, 416)):
        config = run_config(
            tmp_path / str(rows_per_step),
            tiny_target,
            tmp_path,
            data__eval=str(tmp_path / "held-out/eval.jsonl"),
            data__row_tokens=row_tokens,
            training__rows_per_step=rows_per_step,
            training__num_epochs=3,
            # Adam divides by the size of a gradient: one that is nothing but rounding must not become a step.
            drafts__eagle3__eps=1e-3,
            drafts__dflash__eps=1e-3,
        )
        run(config)
        assert [line["rows"] for line in lines(config)] == [rows_per_step] * 3
        runs.append(config)
    whole = runs[-1]
    for split in runs[:-1]:
        for ours, theirs in zip(lines(split), lines(whole), strict=True):
            for draft in ("eagle3", "dflash"):
                one, other = ours["drafts"][draft], theirs["drafts"][draft]
                assert one["weight"] == pytest.approx(other["weight"], rel=1e-6)
                assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
                assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        expected = weights(whole)
        for name, tensor in weights(split).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prefetch_rows", [1, 3])
def test_rows_in_flight_never_exceed_the_bound_but_for_one_of_evaluation(
    base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefetch_rows: int
) -> None:
    shared, all_rows = [], []
    reserve = PrefetchBudget.reserve

    def watched(self: PrefetchBudget, *arguments: Any) -> Reservation | None:
        reservation = reserve(self, *arguments)
        shared.append(self._shared_rows)
        all_rows.append(self.rows_in_flight)
        return reservation

    monkeypatch.setattr(PrefetchBudget, "reserve", watched)
    config = another(base, tmp_path, transport__prefetch_rows=prefetch_rows)
    run(config)
    assert max(shared) == prefetch_rows, "the bound is kept, and used"
    assert max(all_rows) == prefetch_rows + 1
    assert max(line["stream"]["rows_in_flight"] for line in lines(config)) <= prefetch_rows


def test_a_look_ahead_deeper_than_the_usual_queue_is_queued_whole(base: RunConfig, tmp_path: Path) -> None:
    """A refused row is only asked for later, so nothing but its count and the time lost would show it."""
    config = another(base, tmp_path, transport__prefetch_rows=160)
    with open_target(config, torch.device("cpu"), torch.float32, None) as target:
        specs = feature_specs(config, target.info)
        pool = FeaturePool(target.servers, specs, config.pool, target.info)
        try:
            # Long rows: they are all asked for before the target is done with the first few.
            rows = [dataclasses.replace(tiny_request((512,), seed), spec="training") for seed in range(160)]
            answers = [pool.submit(row) for row in rows]
            pending = sum(not answer.done() for answer in answers)
            answers[-1].result(timeout=120)
        finally:
            pool.close()
    assert pending > 64 + 2, "the premise: more rows wait than the usual queue and the engine hold"
    assert pool.stats.busy_replies == 0


def test_every_step_records_where_its_time_and_its_bytes_went(base: RunConfig) -> None:
    received = 0
    for line in lines(base):
        seconds, stream = line["seconds"], line["stream"]
        assert seconds.keys() == {"data_wait", "forward", "backward", "optimizer", "step"}
        assert all(value > 0 for value in seconds.values())
        assert sum(seconds.values()) <= 2 * seconds["step"] * 1.001
        assert stream.keys() >= {"rows_in_flight", "bytes_in_flight", "rows_retried", "queued_s", "target_s"}
        assert stream["bytes_received"] > received
        received = stream["bytes_received"]
        assert (line["attempt"], line["rows"]) == (1, 2)
        assert 0 < line["supervised_tokens"] < line["tokens"]
        assert line["tokens_per_s"] > 0
        for draft, num_positions in (("eagle3", 3), ("dflash", 3)):
            figures = line["drafts"][draft]
            assert len(figures["per_position"]["accuracy"]) == num_positions
            assert figures["grad_norm"] > 0
            assert figures["weight"] > 0


def test_every_evaluation_has_loss_and_acceptance_per_position_of_every_draft(base: RunConfig) -> None:
    for line in lines(base, "eval"):
        for figures in line["drafts"].values():
            assert 1 <= figures["acceptance_length"] <= 4
            assert len(figures["rate"]) == len(figures["loss_by_position"]) == 3
            assert figures["loss"] > 0
    state = load_state(RunDir(Path(base.run_dir)).checkpoint(8))
    assert state.best.keys() == {"eagle3", "dflash"}
    assert (state.step, state.position) == (8, len(lines(base)) * 2)


def test_the_run_directory_says_what_was_run(base: RunConfig) -> None:
    paths = RunDir(Path(base.run_dir))
    versions = json.loads(paths.versions.read_text())
    assert versions["packages"]["torch"] == torch.__version__
    target = recall_target(paths)
    assert target.num_layers == 4
    assert target.model_dump_json(indent=1) + "\n" == paths.target_info.read_text()
    assert "checkpoint" in paths.log("trainer", 0).read_text()


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "qwen3_5", "nested"])
def test_every_architecture_trains_each_draft(architecture: str, tmp_path: Path) -> None:
    target, data = tmp_path / "target", write_data(tmp_path, num_train=8, num_eval=1)
    if architecture == "nested":
        save_nested_tiny_target(target)
    else:
        save_tiny_target(target, architecture)
    config = run_config(
        tmp_path / "run",
        target,
        data,
        training__num_epochs=7,
        training__rows_per_step=4,
        drafts__dflash__anchor_every=1,
        drafts__eagle3__vocab_size=0,
    )
    run(config)
    for draft in config.drafts:
        trace = losses(config, draft)
        assert len(trace) >= 6
        # A nested target's random weights are small: its distribution is nearly flat, and little is to be learned.
        assert trace[-1] < trace[0] - (0.01 if architecture == "nested" else 0.05), trace


def test_one_draft_alone_learns_what_it_learns_beside_another(base: RunConfig, tmp_path: Path) -> None:
    """Drafts share rows and one capture of each, nothing else."""
    bytes_alone = 0
    for draft in ("eagle3", "dflash"):
        table = base.model_dump(mode="json") | {"run_dir": str(tmp_path / draft)}
        table["drafts"] = {draft: table["drafts"][draft]}
        config = RunConfig.model_validate(table)
        run(config)
        together = [figures for line in losses(base) for name, figures in line.items() if name == draft]
        assert losses(config, draft) == pytest.approx(together, rel=1e-6)
        bytes_alone += lines(config)[-1]["stream"]["bytes_received"]
    assert lines(base)[-1]["stream"]["bytes_received"] < 0.8 * bytes_alone
