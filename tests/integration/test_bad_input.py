"""Bad input to a whole run gets one clear error, and nothing is lost.

Shown elsewhere, through the same functions:
    a file that is missing, empty, not JSON on line n: test_prepare, unit/test_data_conversations
    a sample without assistant turn, of an unknown role, too long: test_prepare, unit/test_data_chat
    a tokenizer without a chat template: test_prepare, unit/test_data_chat, unit/test_generation
    a vocabulary larger than the lm_head: test_prepare, unit/test_target_info
    capture layers out of range: unit/test_dflash_settings, unit/test_client_checks
    a full disk: test_checkpoints, test_prepare, test_export, and the command in e2e/test_commands
    out of memory: unit/test_training_loop, contract/test_engine_contract, and the command in e2e/test_commands
"""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from paceline.config.loading import build_config
from paceline.config.run import RunConfig
from paceline.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DraftError,
    HandshakeError,
    RunDirectoryError,
    TargetError,
)
from paceline.launch.evaluate import evaluate_run
from paceline.launch.export import export_run
from paceline.launch.record import RecordOptions, record
from paceline.launch.run import open_run
from paceline.launch.trained import load_run_config
from tiny import save_tiny_target
from whole_run import QuietSignals, losses, run, run_config, run_table, write_data, write_lines


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_train=8, num_eval=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A directory with a target and a run of two steps, both drafts exported; copied by whoever damages it."""
    directory = tmp_path_factory.mktemp("finished")
    target = save_tiny_target(directory / "target")
    config = run_config(directory / "run", target, data, training__max_steps=2, training__checkpoint_every=1)
    run(config)
    export_run(config, [])
    return directory


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished / "run", tmp_path / "run")


def config_of(run_dir: Path, finished: Path, data: Path, **changes: Any) -> RunConfig:
    """The configuration of `finished`, with changes."""
    settings = {"training__max_steps": 2, "training__checkpoint_every": 1} | changes
    return run_config(run_dir, finished / "target", data, **settings)


def content(directory: Path) -> dict[str, bytes]:
    """All files but the log and the lock."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.suffix != ".log" and path.name != "lock"
    }


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("trainig__max_steps", "trainig: unknown key; did you mean 'training'"),
        ("training__max_step", "training.max_step: unknown key; did you mean 'max_steps'"),
        ("drafts__dflash__blocksize", "drafts.dflash.blocksize: unknown key; did you mean 'block_size'"),
        ("drafts__eagle3__block_size", "drafts.eagle3.block_size: unknown key; "),
        ("training__profile__stop", "training.profile.stop: unknown key; did you mean 'steps'"),
        ("data__qqq", "data.qqq: unknown key; known keys: assistant_end, "),
    ],
)
def test_an_unknown_key_names_the_nearest_real_one(tmp_path: Path, key: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_config(tmp_path, tmp_path, tmp_path, **{key: 1})
    assert message in str(caught.value)


def test_all_mistakes_of_a_configuration_are_told_at_once(tmp_path: Path) -> None:
    table = run_table(
        tmp_path, tmp_path, tmp_path, data__row_tokens=3, training__lr=1, drafts__dflash__algorithm="medusa"
    )
    del table["target"]["model"]
    with pytest.raises(ConfigError) as caught:
        build_config(table, source="my.toml")
    told = str(caught.value)
    assert told.startswith("my.toml:")
    for mistake in (
        "data.row_tokens = 3: Input should be greater than or equal to 16",
        "training.lr: unknown key",
        "target.model: is required",
        "drafts.dflash.algorithm = 'medusa': unknown; one of eagle3, dflash",
    ):
        assert mistake in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, 'sequence_parallel = 2 with placement.target = "inline": .* "servers" or "urls"'),
        ({"placement__target": "servers", "placement__num_trainers": 3}, "= 2 does not divide .*num_trainers = 3"),
        ({"placement__target": "servers", "placement__launcher": "ray"}, "= 2 does not divide .*num_trainers = 1"),
    ],
)
def test_groups_of_ranks_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_config(tmp_path, tmp_path, tmp_path, training__sequence_parallel=2, **changes)
    servers = {"training__sequence_parallel": 2, "placement__target": "servers", "placement__num_trainers": 4}
    assert run_config(tmp_path, tmp_path, tmp_path, **servers).training.sequence_parallel == 2
    elsewhere = {**servers, "placement__launcher": "external", "placement__num_trainers": 1}
    assert run_config(tmp_path, tmp_path, tmp_path, **elsewhere).placement.num_trainers == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data__train": "/no/file.jsonl"}, DataError, r"/no/file\.jsonl does not exist"),
        ({"target__model": "/no/target"}, TargetError, "/no/target"),
        ({"drafts__eagle3__target_layers": [0, 1, 9]}, ConfigError, r"\[0, 1, 9\] are out of range.*has 4 layers"),
        ({"drafts__dflash__target_layers": [2, 1]}, ConfigError, r"\[2, 1\] are not strictly ascending"),
        ({"drafts__eagle3__num_heads": 3, "drafts__eagle3__num_kv_heads": 2}, ConfigError, "num_heads = 3 .* = 2"),
        ({"drafts__eagle3__vocab_size": 301}, (ConfigError, DraftError), "301.*300|300.*301"),
        ({"drafts__dflash__mask_token_id": 300}, (ConfigError, DraftError), "300"),
        ({"data__min_supervised_tokens": 10_000}, DataError, "too few supervised tokens: 8"),
        ({"data__eval": None, "data__eval_fraction": 0.0}, DataError, "data.eval"),
    ],
)
def test_a_setting_that_cannot_work_ends_the_run_before_its_first_step(
    finished: Path, data: Path, tmp_path: Path, changes: dict[str, Any], error: Any, message: str
) -> None:
    config = config_of(tmp_path / "run", finished, data, **changes)
    with pytest.raises(error, match=message):
        run(config)
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_line_that_is_not_json_ends_the_run_and_names_it(finished: Path, data: Path, tmp_path: Path) -> None:
    lines = (data / "train.jsonl").read_text().splitlines()
    bad = write_lines(tmp_path / "bad.jsonl", [*lines[:3], '{"messages": [', *lines[3:]])
    config = config_of(tmp_path / "run", finished, data, data__train=str(bad), data__cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"bad\.jsonl line 4 is not JSON"):
        run(config)
    bad.write_text((data / "train.jsonl").read_text())
    assert run(config).status == "finished", "mended, the same command goes on"


@pytest.mark.parametrize("draft", ["eagle3", "dflash"])
def test_a_draft_made_for_another_target_is_refused(finished: Path, data: Path, tmp_path: Path, draft: str) -> None:
    wider = save_tiny_target(tmp_path / "wider", hidden_size=48)
    exported = finished / "run/export" / draft
    changes = {f"drafts__{draft}__init_from": str(exported)}
    with pytest.raises(DraftError, match=r"48.*32|32.*48"):
        run(run_config(tmp_path / "run", wider, data, **changes))
    other = "dflash" if draft == "eagle3" else "eagle3"
    with pytest.raises(DraftError):
        run(config_of(tmp_path / "kind", finished, data, **{f"drafts__{other}__init_from": str(exported)}))
    assert run(config_of(tmp_path / "same", finished, data, **changes)).status == "finished"


def test_a_run_directory_of_another_configuration_says_what_differs_and_stays_as_it_is(
    finished: Path, data: Path, copied: Path
) -> None:
    before = content(copied)
    with pytest.raises(RunDirectoryError) as caught:
        run(config_of(copied, finished, data, seed=5, drafts__eagle3__lr=1e-4))
    for line in (
        "holds a run with another configuration",
        "drafts.eagle3.lr: was 0.005, is 0.0001",
        "seed: was 0, is 5",
        "choose another run_dir",
    ):
        assert line in str(caught.value)
    table = run_table(copied, finished / "target", data, training__max_steps=2, training__checkpoint_every=1)
    del table["drafts"]["eagle3"]
    with pytest.raises(RunDirectoryError, match=r"drafts\.eagle3\.algorithm: was 'eagle3', is 'not set'"):
        run(build_config(table))
    assert content(copied) == before


def test_settings_that_do_not_change_what_is_trained_may_change(finished: Path, data: Path, copied: Path) -> None:
    changed = {"training__log_every": 7, "transport__prefetch_rows": 1, "training__keep_checkpoints": 9}
    changed |= {"target__selftest": False}
    assert run(config_of(copied, finished, data, **changed)).status == "finished"


@pytest.mark.parametrize(
    ("before", "after", "differs"),
    [
        ({"gpu-memory-utilization": 0.8, "max-model-len": 4096}, {"max-model-len": 512, "enforce-eager": True}, None),
        ({}, {"quantization": "fp8"}, "target.engine_args.quantization: was 'not set', is 'fp8'"),
        (
            {"hf-overrides": {"rope_theta": 1e4}},
            {"hf-overrides": {"rope_theta": 1e6}},
            "target.engine_args.hf-overrides.rope_theta: was 10000.0, is 1000000.0",
        ),
    ],
    ids=["memory and batches", "weights", "rope"],
)
def test_options_of_an_engine_may_change_unless_they_change_what_is_computed(
    tmp_path: Path, data: Path, before: dict[str, Any], after: dict[str, Any], differs: str | None
) -> None:
    engine = {"target__engine": "vllm", "placement__target": "servers"}
    first, second = (
        run_config(tmp_path / "run", tmp_path / "target", data, **engine, target__engine_args=options)
        for options in (before, after)
    )
    open_run(first)
    if differs is None:
        open_run(second)
    else:
        with pytest.raises(RunDirectoryError, match=re.escape(differs) + "(.|\n)*or set these back"):
            open_run(second)


def test_documents_longer_than_the_target_takes_are_refused_before_the_first_row(data: Path, tmp_path: Path) -> None:
    """By a run, and by a recording."""
    target = save_tiny_target(tmp_path / "target", max_position_embeddings=16)
    message = r"longest document of these rows has \d\d tokens, .* takes 16: lower data.row_tokens"
    config = run_config(tmp_path / "run", target, data)
    with pytest.raises(HandshakeError, match=message):
        run(config)
    assert not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_text()
    with pytest.raises(HandshakeError, match=message):
        record(config, RecordOptions(tmp_path / "recording", False), QuietSignals(), Console(file=io.StringIO()))


def test_another_target_under_the_same_name_is_refused_with_both_fingerprints(
    data: Path, finished: Path, copied: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(finished / "target", tmp_path / "target")
    config = run_config(tmp_path / "again", moved, data, training__max_steps=2)
    run(config)
    before = content(tmp_path / "again")
    save_tiny_target(moved, seed=1)
    for attempt in (lambda: run(config), lambda: evaluate_run(config, []), lambda: export_run(config, [])):
        with pytest.raises(
            RunDirectoryError, match=r"was trained against .*weights \w+\), the target is .*weights \w+"
        ):
            attempt()
    assert content(tmp_path / "again") == before


def test_a_damaged_checkpoint_is_named_and_never_a_fresh_start(finished: Path, data: Path, copied: Path) -> None:
    (file,) = (copied / "checkpoints/step-00000002").glob("*.distcp")
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    config = config_of(copied, finished, data)
    with pytest.raises(CheckpointError, match=f"{file}.*remove .*step-00000002 to resume from the checkpoint before"):
        run(config)
    for command in (evaluate_run, export_run):
        with pytest.raises(CheckpointError, match=str(file)):
            command(config, [], "latest")
    shutil.rmtree(file.parent)
    trace = losses(config)
    assert run(config).step == 2
    assert losses(config) == trace, "it went on from the checkpoint before, to the same end"


@pytest.mark.parametrize("name", ["versions.json", "resolved.toml", "target.json", "metrics.jsonl"])
def test_a_damaged_file_of_a_run_is_named(finished: Path, data: Path, copied: Path, name: str) -> None:
    (copied / name).write_text("{]\n")
    with pytest.raises((RunDirectoryError, DataError), match=name):
        run(config_of(copied, finished, data))


def test_prepared_data_that_is_damaged_is_named(finished: Path, data: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", finished, data, data__cache_dir=str(tmp_path / "cache"))
    run(config)
    for file in (tmp_path / "cache").glob("samples-*/train.arrow"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="delete it and prepare again"):
        run(config)


def test_a_run_directory_that_is_a_file_is_refused(finished: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    config = config_of(tmp_path / "run", finished, data)
    for attempt in (run, open_run):
        with pytest.raises(RunDirectoryError, match=r"cannot use run directory .*run: "):
            attempt(config)
    assert (tmp_path / "run").read_text() == "mine"


def test_commands_on_a_directory_without_a_run_or_a_draft_say_so(finished: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="is no run directory"):
        load_run_config(tmp_path)
    config = load_run_config(finished / "run")
    for command in (evaluate_run, export_run):
        with pytest.raises(ConfigError, match="has no draft 'medusa'; it has eagle3, dflash"):
            command(config, ["medusa"])
    untrained = config_of(tmp_path / "new", finished, data)
    with pytest.raises(RunDirectoryError, match="train the run first"):
        export_run(untrained, [])
