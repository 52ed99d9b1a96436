"""Recordings: whole or not at all, complete in themselves, trained on like the target itself, damage named or healed"""

from __future__ import annotations

import io
import logging
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from rich.console import Console
from safetensors.torch import load as load_bytes

from forking import Commands
from paceline.client.checks import check_reply
from paceline.client.recorded import RecordedConnection
from paceline.client.recording import Recording, read_manifest
from paceline.config.loading import build_config
from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.data.prepared import load_prepared
from paceline.data.rows import RowSource
from paceline.errors import ConfigError, DataError, HandshakeError
from paceline.launch.export import export_run
from paceline.launch.record import RecordOptions, record
from paceline.schema.features import FeatureSpec, FinalHidden
from paceline.schema.parts import Part, slice_features
from paceline.schema.recording import RecordingDir, RecordingManifest, row_key
from paceline.schema.rows import Row, request_features
from paceline.transport.buffers import HostBuffer, HostBuffers
from served import Served
from tiny import save_tiny_target
from whole_run import QuietSignals, StopsAfter, lines, losses, run, run_config, run_table, same_weights, write_data

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TWO_EPOCHS = {"training__num_epochs": 2, "training__eval_every": 4}
SHARD = {"recording__shard_bytes": 100_000}
"""Two rows."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_train=24)


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, data: Path) -> RunConfig:
    """A run of both drafts against the target itself."""
    torch.set_num_threads(1)
    config = run_config(tmp_path_factory.mktemp("online") / "run", tiny_target, data, **TWO_EPOCHS)
    assert run(config).status == "finished"
    return config


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, data: Path) -> Path:
    """A recording of the same rows; tests that change it copy it."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("recorded")
    manifest = write_recording(run_config(directory / "run", tiny_target, data, **SHARD), directory / "recording")
    assert manifest.complete
    assert len(manifest.shards) > 2
    return directory / "recording"


def write_recording(
    config: RunConfig, output: Path, signals: QuietSignals | None = None, check: bool = False
) -> RecordingManifest:
    console = Console(file=io.StringIO())
    return record(config, RecordOptions(output, check), signals or QuietSignals(), console).manifest


def offline_config(run_dir: Path, recording: Path, **changes: Any) -> RunConfig:
    """Of a run that has neither the target nor the data files."""
    nowhere = {"placement__target": "recorded", "data__recorded": str(recording)}
    return run_config(run_dir, Path("no target"), Path("no data"), **{**TWO_EPOCHS, **nowhere, **changes})


def dflash_config(run_dir: Path, target: Path, data: Path) -> RunConfig:
    table = run_table(run_dir, target, data, drafts__dflash__target_layers=[1, 2])
    del table["drafts"]["eagle3"]
    return build_config(table)


def flip_a_bit(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 16]))


def evaluations(config: RunConfig) -> list[Any]:
    return [(line["step"], line["drafts"]) for line in lines(config, "eval")]


def shard_files(recording: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (recording / "shards").iterdir()}


@pytest.mark.parametrize("prefetch_rows", [1, 4])
def test_training_from_disk_needs_neither_target_nor_data_and_changes_nothing(
    online: RunConfig, recorded: Path, tmp_path: Path, prefetch_rows: int
) -> None:
    config = offline_config(tmp_path / "run", recorded, transport__prefetch_rows=prefetch_rows)
    assert run(config).status == "finished"
    assert losses(config) == losses(online)
    assert evaluations(config) == evaluations(online) != []
    if prefetch_rows == 1:
        ours, theirs = export_run(config, ["dflash"], "latest"), export_run(online, ["dflash"], "latest")
        name = "model.safetensors"
        assert (ours["dflash"] / name).read_bytes() == (theirs["dflash"] / name).read_bytes()
    assert same_weights(config, online)


def test_any_number_of_epochs_and_any_seed_can_be_trained(online: RunConfig, recorded: Path, tmp_path: Path) -> None:
    config = offline_config(tmp_path / "run", recorded, seed=5, training__num_epochs=1)
    assert run(config).status == "finished"
    assert len(losses(config)) * 2 == len(losses(online))
    assert losses(config) != losses(online)[: len(losses(config))]


def test_one_draft_of_two_takes_its_part_of_what_was_recorded(
    online: RunConfig, recorded: Path, tmp_path: Path
) -> None:
    """The layers of one draft, without what only the other asks for."""
    for name in ("dflash", "eagle3"):
        table = run_table(tmp_path / name, Path("no target"), Path("no data"), **TWO_EPOCHS)
        table["placement"], table["data"]["recorded"] = {"target": "recorded"}, str(recorded)
        del table["drafts"][next(other for other in table["drafts"] if other != name)]
        config = build_config(table)
        assert run(config).status == "finished"
        assert losses(config, name) == losses(online, name)


def test_a_run_may_go_on_from_disk(
    online: RunConfig, recorded: Path, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    here = run_config(tmp_path / "run", tiny_target, data, **TWO_EPOCHS)
    assert run(here, StopsAfter(7)).status == "stopped"
    table = run_table(tmp_path / "run", tiny_target, data, **TWO_EPOCHS)
    table["placement"], table["data"]["recorded"] = {"target": "recorded"}, str(recorded)
    config = build_config(table)
    assert run(config).status == "finished"
    assert losses(config) == losses(online)
    assert same_weights(config, online)


class WatchedBuffers(HostBuffers):
    """Remembers how many bytes were asked for."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.asked: list[int] = []

    def reserve(self, num_bytes: int) -> HostBuffer:
        self.asked.append(num_bytes)
        return super().reserve(num_bytes)


@pytest.mark.parametrize(("first_layer", "final_hidden"), [(0, "supervised"), (1, "supervised"), (1, "none")])
def test_parts_of_a_recorded_row_are_the_row_and_no_more_than_a_part_is_kept(
    recorded: Path, first_layer: int, final_hidden: FinalHidden
) -> None:
    recording = Recording(recorded)
    row = first_row(recording)
    spec = FeatureSpec(recording.spec.layers[first_layer:], final_hidden, recording.spec.greedy, halo=3)
    buffers = WatchedBuffers()
    connection = RecordedConnection(recording, buffers, torch.device("cpu"))
    connection.open_session({"training": spec}, "ab" * 16)
    try:
        request = request_features(row, "training", recording.info.num_position_axes)
        whole = connection.request(request).result(20).take()
        of_row = max(buffers.asked)
        buffers.asked.clear()
        assert whole.num_tokens == row.num_tokens > 20
        parts = [Part(index, 3) for index in range(3)]
        for part in parts:
            asked = replace(request, part=part)
            features = connection.request(asked).result(20).take()
            check_reply("recording", asked, spec, recording.info, features)
            expected = slice_features(whole, row.num_tokens, part, 3).tensors()
            assert features.tensors().keys() == expected.keys()
            assert all(torch.equal(features.tensors()[name], tensor) for name, tensor in expected.items())
        assert max(buffers.asked) < of_row / 2
    finally:
        connection.close()


def test_damage_in_one_part_of_a_recorded_row_is_found_by_who_wants_another(recorded: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(recorded, tmp_path / "recording")
    recording = Recording(copy)
    request = request_features(first_row(recording), "training", recording.info.num_position_axes)
    place = recording.find(row_key(request))
    assert place is not None
    flip_a_bit(place.file, place.row.offset + place.row.num_bytes * 3 // 10)
    connection = RecordedConnection(recording, HostBuffers(1 << 20), torch.device("cpu"))
    connection.open_session({"training": recording.spec}, "ab" * 16)
    try:
        for index in range(3):
            with pytest.raises(DataError, match="is damaged"):
                connection.request(replace(request, part=Part(index, 3))).result(20)
    finally:
        connection.close()


def first_row(recording: Recording) -> Row:
    prepared = load_prepared(recording.paths.rows(recording.manifest.data_fingerprint))
    return RowSource(prepared.train, prepared.train_plan, 0).row(0)


def test_a_row_of_a_shard_is_a_file_that_safetensors_reads(recorded: Path) -> None:
    recording = Recording(recorded)
    (place, *_) = (recording.find(key) for key in list(recording._places))
    assert place is not None
    with place.file.open("rb") as file:
        file.seek(place.row.offset)
        tensors = load_bytes(file.read(place.row.num_bytes))
    assert tensors["hidden"].shape[1:] == (len(recording.spec.layers), 32)
    assert place.row.offset % 256 == place.row.num_bytes % 256 == 0


def test_what_was_not_recorded_is_named_before_training(tiny_target: Path, data: Path, tmp_path: Path) -> None:
    alone = write_recording(dflash_config(tmp_path / "run", tiny_target, data), tmp_path / "recording")
    assert alone.spec.layers == (1, 2)
    with pytest.raises(ConfigError) as caught:
        run(offline_config(tmp_path / "offline", tmp_path / "recording"))
    for words in (
        "'training' wants capture layers [0], recorded are [1, 2]",
        "'evaluation' wants final hidden states of supervised tokens, recorded are those of no tokens",
        "record again with these drafts",
    ):
        assert words in str(caught.value)
    assert "greedy" not in str(caught.value)


def test_settings_that_ask_for_other_rows_are_refused(recorded: Path, tmp_path: Path) -> None:
    changes = {"data__row_tokens": 64, "target__dtype": "bfloat16", "drafts__dflash__block_size": 8}
    with pytest.raises(ConfigError) as caught:
        run(offline_config(tmp_path / "run", recorded, **changes))
    for words in ("data.row_tokens = 64, recorded with 128", "recorded with 'float32'", "need 16 supervised tokens"):
        assert words in str(caught.value)


def test_a_recorded_target_needs_a_recording(tmp_path: Path, recorded: Path) -> None:
    with pytest.raises(ConfigError, match=r"without data\.recorded: set data\.recorded"):
        run_config(tmp_path, Path("t"), Path("d"), placement__target="recorded")
    with pytest.raises(DataError, match="is no recording"):
        run(offline_config(tmp_path / "a", tmp_path))
    with pytest.raises(ConfigError, match="no target to record from"):
        write_recording(offline_config(tmp_path / "b", recorded), tmp_path / "c")


def test_a_flipped_bit_is_named_with_file_and_row_and_healed_by_recording_again(
    recorded: Path, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(recorded, tmp_path / "recording")
    flip_a_bit(copy / "shards" / "00001.features", 5000)
    with pytest.raises(DataError, match=r"row \d+ of the train split, at byte \d+ of .*00001\.features is damaged"):
        run(offline_config(tmp_path / "run", copy))
    config = run_config(tmp_path / "again", tiny_target, data, **SHARD)
    write_recording(config, copy)
    assert shard_files(copy) != shard_files(recorded), "only a whole reading finds a bit"
    assert write_recording(config, copy, check=True).complete
    assert {*shard_files(copy).values()} == {*shard_files(recorded).values()}


def test_missing_and_damaged_files_end_the_start(recorded: Path, tmp_path: Path) -> None:
    shard, weights = (recorded / "shards" / "00000.features").stat().st_size, "weights.safetensors"
    copy = shutil.copytree(recorded, tmp_path / "recording")
    with (copy / "shards" / "00000.features").open("r+b") as file:
        file.truncate(shard - 1000)
    with pytest.raises(DataError, match=rf"00000\.features has {shard - 1000} bytes, {shard} were written; the first"):
        run(offline_config(tmp_path / "run", copy))
    shutil.copy(recorded / "shards" / "00000.features", copy / "shards")
    flip_a_bit(copy / weights, 4000)
    with pytest.raises(DataError, match=rf"{weights} is damaged: checksum"):
        run(offline_config(tmp_path / "run", copy))


def test_rows_that_are_not_on_disk_or_damaged_there_come_from_the_target(
    online: RunConfig,
    recorded: Path,
    tiny_target: Path,
    data: Path,
    target_servers: list[Served],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A flipped bit, a shard cut in two, and one that is gone; with servers, and with the target in this process."""
    copy = shutil.copytree(recorded, tmp_path / "recording")
    shards = copy / "shards"
    flip_a_bit(shards / "00000.features", 70_000)
    (shards / "00001.features").unlink()
    with (shards / "00002.features").open("r+b") as file:
        file.truncate(80_000)
    urls = [server.url for server in target_servers[:2]]
    for number, placement in enumerate([{"placement__target": "urls", "placement__urls": urls}, {}]):
        changes = {**TWO_EPOCHS, "data__recorded": str(copy), **placement}
        config = run_config(tmp_path / f"run-{number}", tiny_target, data, **changes)
        with caplog.at_level(logging.INFO):
            assert run(config).status == "finished"
        assert losses(config) == losses(online)
        assert same_weights(config, online)
    assert "00000.features is damaged" in caplog.text
    assert "a server is asked for it instead" in caplog.text
    assert "00002.features has 80000 bytes" in caplog.text


def test_servers_record_the_same_bytes(
    recorded: Path, tiny_target: Path, data: Path, target_servers: list[Served], tmp_path: Path
) -> None:
    urls = [server.url for server in target_servers]
    placement = {"placement__target": "urls", "placement__urls": urls}
    assert write_recording(
        run_config(tmp_path / "run", tiny_target, data, **SHARD, **placement), tmp_path / "recording"
    ).complete
    assert shard_files(tmp_path / "recording") == shard_files(recorded)
    weights = "weights.safetensors"
    assert (tmp_path / "recording" / weights).read_bytes() == (recorded / weights).read_bytes()


@pytest.mark.long
def test_servers_of_the_command_record_the_same_bytes_and_end_with_it(
    commands: Commands, recorded: Path, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    table = run_table(tmp_path / "run", tiny_target, data, **SHARD, placement__target="servers")
    (tmp_path / "run.toml").write_text(tomli_w.dumps(table))
    command = commands.start("record", str(tmp_path / "run.toml"))
    assert command.wait(180) == 0, command.output
    assert "complete" in command.output
    assert shard_files(RunDir(tmp_path / "run").recording) == shard_files(recorded)


def test_a_recording_of_other_rows_is_said_to_be_of_no_use(
    recorded: Path, tiny_target: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"data__recorded": str(recorded), "seed": 3, "training__max_steps": 2}
    with caplog.at_level(logging.WARNING):
        assert run(run_config(tmp_path / "run", tiny_target, data, **changes)).status == "finished"
    assert "has none of the first" in caplog.text


def test_a_recording_of_another_target_is_refused(
    recorded: Path, data: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = save_tiny_target(tmp_path_factory.mktemp("other") / "qwen3", seed=1)
    config = run_config(tmp_path / "run", other, data, data__recorded=str(recorded))
    with pytest.raises(HandshakeError, match=r"weight_fingerprint: the recording .* has '\w+', this run expects"):
        run(config)
    with pytest.raises(HandshakeError, match="weight_fingerprint"):
        write_recording(run_config(tmp_path / "again", other, data), recorded)


def test_a_recording_stopped_or_killed_goes_on_and_is_the_same_in_the_end(
    commands: Commands, recorded: Path, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    """A real process, killed while it writes a shard, then stopped in order while it writes another."""
    table = run_table(tmp_path / "run", tiny_target, data, **SHARD)
    (tmp_path / "run.toml").write_text(tomli_w.dumps(table))
    output = RecordingDir(tmp_path / "recording")
    arguments = ("record", str(tmp_path / "run.toml"), "--output", str(output.root))

    def num_shards() -> int:
        return len(read_manifest(output).shards) if output.manifest.exists() else 0

    for num, signum in ((1, signal.SIGKILL), (2, signal.SIGTERM)):
        command = commands.start("faults:record_slowly", *arguments)
        partial = output.shards / f".{num:05d}.partial"
        assert command.wait_until(lambda num=num, partial=partial: num_shards() == num and partial.exists())
        command.send_signal(signum)
        code = command.wait()
        if signum == signal.SIGKILL:
            assert code == -signal.SIGKILL
            assert not read_manifest(output).complete
            with pytest.raises(DataError, match=r"is not finished: \d+ of \d+ rows"):
                run(offline_config(tmp_path / "early", output.root))
        else:
            assert code == 128 + signal.SIGTERM
    command = commands.start(*arguments)
    assert command.wait() == 0, command.output
    assert "complete" in command.output
    assert not list(output.shards.glob(".*"))
    rows = [
        {row.key: row.checksum for row in (place.row for place in Recording(root)._places.values())}
        for root in (output.root, recorded)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == read_manifest(output).num_rows


def test_a_full_disk_is_named_and_too_small_a_disk_is_refused_before(
    commands: Commands, tiny_target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.toml").write_text(tomli_w.dumps(run_table(tmp_path / "run", tiny_target, data)))
    command = commands.start("faults:fill_disk_later", "record", str(tmp_path / "run.toml"))
    assert command.wait() == 1
    assert "error: no space left for" in command.output
    assert "goes on behind the last shard" in command.output
    output = RunDir(tmp_path / "run").recording
    assert not list((output / "shards").glob(".*")), "what was half written makes no disk fuller"
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(DataError, match=r"GiB are to be written, 0\.00 GiB are free"):
        write_recording(run_config(tmp_path / "run", tiny_target, data), output)


def test_only_a_recording_of_the_same_is_gone_on_with(
    recorded: Path, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    config = dflash_config(tmp_path / "run", tiny_target, data)
    with pytest.raises(DataError, match=r"begun with other data, settings or drafts:\n  features: .*layers"):
        write_recording(config, recorded)
    other_depth = run_config(tmp_path / "deeper", tiny_target, data, **SHARD, drafts__eagle3__num_depths=2)
    assert write_recording(other_depth, recorded) == read_manifest(RecordingDir(recorded)), "its features are the same"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(DataError, match=r"not empty \(thesis\.tex is in it\)"):
        write_recording(config, tmp_path / "full")
