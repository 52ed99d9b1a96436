"""`paceline record`: the features of every row, computed once and written to disk, to be trained on many times."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from paceline.client.budget import PrefetchBudget
from paceline.client.checks import check_target
from paceline.client.pool import FeaturePool
from paceline.client.recorded_weights import write_weights
from paceline.client.recording import Recording, check_file, read_manifest
from paceline.client.stream import FeatureStream
from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.data.prepared import PreparedData
from paceline.data.rows import RowSource
from paceline.errors import ConfigError, DataError, StoppedError
from paceline.launch.assemble import feature_specs
from paceline.launch.prepare import prepare_data, reserved_tokens
from paceline.launch.recording_writer import (
    RecordingWriter,
    file_checksums,
    put_manifest,
    recording_directory,
    replace_tree,
    write_durably,
)
from paceline.launch.run import lock_run, open_run
from paceline.launch.target_facts import TargetFacts
from paceline.launch.targets import OpenTarget, open_access, open_target, target_facts
from paceline.launch.train import set_numerics
from paceline.observe.counting import RowProgress
from paceline.observe.logs import logging_for
from paceline.schema.features import FeatureSpec, merge_specs
from paceline.schema.layout import ELEMENT_BYTES
from paceline.schema.limits import RowSizes
from paceline.schema.protocol import SpecMessage
from paceline.schema.recording import (
    SPEC_NAME,
    RecordedShard,
    RecordingDir,
    RecordingManifest,
    RowSettings,
    ShardRows,
    SplitName,
)
from paceline.schema.rows import Row
from paceline.schema.target_info import TargetInfo
from paceline.target.hf.tokenizer_files import TokenizerFiles
from paceline.version import VERSION

if TYPE_CHECKING:
    from paceline.launch.signals import StopSignals

_HEAD_BYTES = 2048
"""About what stands in front of a row's tensors, gaps between them included."""
_CPU = torch.device("cpu")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """What a command line says besides the configuration."""

    output: Path | None = None
    """None is `recording.output`, else `recording/` in the run directory."""
    check: bool = False
    """Read every shard that is there first; damaged ones are recorded again."""
    token_file: Path | None = None
    """Of the run's own servers."""


@dataclass(frozen=True, slots=True)
class RecordingResult:
    """What a call of `record` left behind."""

    directory: Path
    manifest: RecordingManifest

    def text(self) -> str:
        """In a few lines."""
        manifest, spec = self.manifest, self.manifest.spec
        num_bytes = sum(shard.num_bytes for shard in manifest.shards)
        state = "complete" if manifest.complete else "not finished; run the same command again, it goes on"
        num_rows = f"{manifest.num_recorded_rows} of {manifest.num_rows} rows"
        return (
            f"{self.directory}: {num_rows}, {num_bytes / 2**30:.2f} GiB in "
            f"{len(manifest.shards)} shards; {state}\n"
            f"capture layers {', '.join(map(str, spec.layers))}; final hidden states: {spec.final_hidden}"
        )


def output_directory(config: RunConfig, output: Path | None) -> Path:
    """Where `config` is recorded to."""
    return output or Path(config.recording.output or RunDir(Path(config.run_dir)).recording)


def check_recordable(config: RunConfig) -> RunConfig:
    """The configuration to record with: features come from the target, not from a recording.

    Raises:
        ConfigError: the placement has no target.
    """
    if config.placement.target == "recorded":
        raise ConfigError(
            'placement.target = "recorded" has no target to record from: add placement.target=inline (or servers, or '
            "urls) to the command"
        )
    return config.model_copy(update={"data": config.data.model_copy(update={"recorded": None})})


def record(config: RunConfig, options: RecordOptions, signals: StopSignals, console: Console) -> RecordingResult:
    """Write what of the recording is not there yet; ends early, in order, when a signal comes.

    Raises:
        PacelineError: anything that keeps it from going on; see `errors`.
    """
    config = check_recordable(config)
    paths = RunDir(Path(config.run_dir))
    with lock_run(paths):
        open_run(config)
        return record_as_child(config, options, signals, console)


def record_as_child(
    config: RunConfig, options: RecordOptions, signals: StopSignals, console: Console
) -> RecordingResult:
    """The same for a process whose parent holds the run directory and has started the servers.

    Raises:
        PacelineError: as `record`.
    """
    signals.grace_s = config.training.shutdown_grace_s
    run = RunDir(Path(config.run_dir))
    output = RecordingDir(output_directory(config, options.output))
    with logging_for("recorder", 0, run.log("recorder", 0), console), recording_directory(output):
        set_numerics(config)
        access = open_access(config, signals.stop, options.token_file)
        facts = target_facts(config, access)
        prepared = prepare_data(config, run, facts)
        with open_target(config, _CPU, torch.float32, access) as target:
            manifest = _begin(config, output, prepared, facts, target, options.check)
            _report_space(output, manifest, prepared, target.info)
            writer = RecordingWriter(output, manifest, config.recording.shard_bytes)
            try:
                _record_rows(config, prepared, target, writer, signals, console)
            finally:
                writer.close()
    return RecordingResult(output.root, writer.manifest)


def _begin(
    config: RunConfig,
    output: RecordingDir,
    prepared: PreparedData,
    facts: TargetFacts,
    target: OpenTarget,
    check: bool,
) -> RecordingManifest:
    """The manifest to go on with; the first time, everything but the shards is written before it."""
    # Whole rows are recorded, which parts with any halo can be taken of.
    spec = replace(merge_specs(feature_specs(config, target.info).values()), halo=0)
    if output.manifest.exists():
        manifest = read_manifest(output)
        _check_same(output, manifest, spec, prepared, target.info)
        return _without_damaged(output, manifest, check)
    replace_tree(prepared.directory, output.rows(prepared.fingerprint))
    samples = prepared.train.path.parent
    replace_tree(samples, output.prepared / samples.name)
    output.tokenizer.mkdir(exist_ok=True)
    for name, text in TokenizerFiles(facts.tokenizer)().items():
        (output.tokenizer / name).write_text(text, encoding="utf-8")
    write_weights(target.weights, output.weights)
    write_durably(output.target_info, target.info.model_dump_json(indent=1).encode() + b"\n")
    data = config.data
    manifest = RecordingManifest(
        paceline=VERSION,
        weight_fingerprint=target.info.weight_fingerprint,
        tokenizer_fingerprint=target.info.tokenizer_fingerprint,
        files=file_checksums(output),
        spec=SpecMessage.of(spec),
        data_fingerprint=prepared.fingerprint,
        rows=RowSettings(
            row_tokens=data.row_tokens,
            packing_window=data.packing_window,
            seed=config.seed,
            train_on=data.train_on,
            max_sample_tokens=data.max_sample_tokens,
            min_supervised_tokens=config.min_supervised_tokens,
            reserved_tokens=tuple(sorted(reserved_tokens(config, facts))),
        ),
        num_train_rows=prepared.train_plan.num_rows,
        num_eval_rows=prepared.eval_plan.num_rows,
    )
    put_manifest(output, manifest)
    return manifest


def _check_same(
    output: RecordingDir, manifest: RecordingManifest, spec: FeatureSpec, prepared: PreparedData, info: TargetInfo
) -> None:
    recording = Recording(output.root)
    check_target(recording.name, recording.info, info)
    differing = []
    if manifest.data_fingerprint != prepared.fingerprint:
        differing.append(f"rows: {manifest.data_fingerprint}, now {prepared.fingerprint}")
    if recording.spec != spec:
        differing.append(f"features: {recording.spec}, now {spec}")
    if differing:
        raise DataError(
            f"{output.root} was begun with other data, settings or drafts:\n  "
            + "\n  ".join(differing)
            + "\nchoose another directory with --output, or set them back"
        )


def _without_damaged(output: RecordingDir, manifest: RecordingManifest, check: bool) -> RecordingManifest:
    """`manifest` without shards that are missing or too short or, where all are read, otherwise damaged."""
    whole = []
    for shard in manifest.shards:
        problem = _damage(output, shard, check)
        if problem:
            logger.warning("%s; its %d rows are recorded again", problem, shard.num_rows)
        else:
            whole.append(shard)
    if len(whole) < len(manifest.shards):
        manifest = manifest.model_copy(update={"shards": tuple(whole), "complete": False})
        put_manifest(output, manifest)
    return manifest


def _damage(output: RecordingDir, shard: RecordedShard, check: bool) -> str | None:
    file = output.features(shard.name)
    num_bytes = file.stat().st_size if file.exists() else 0
    if num_bytes != shard.num_bytes:
        return f"{file} has {num_bytes} bytes, {shard.num_bytes} were written"
    if check:
        try:
            check_file(file, shard.checksum)
        except DataError as error:
            return str(error)
    return None


def _report_space(output: RecordingDir, manifest: RecordingManifest, prepared: PreparedData, info: TargetInfo) -> None:
    """Say what is still to be written, and refuse to begin what cannot fit."""
    spec, splits = manifest.spec.spec(), (prepared.summary.train, prepared.summary.eval)
    num_tokens, num_final = (sum(getattr(split, name) for split in splits) for name in ("num_tokens", "num_supervised"))
    if spec.final_hidden != "supervised":
        num_final = num_tokens if spec.final_hidden == "all" else 0
    state_bytes = info.hidden_size * ELEMENT_BYTES[info.dtype]
    token_bytes = len(spec.layers) * state_bytes + 4 * (spec.greedy + spec.logsumexp)
    total = num_tokens * token_bytes + num_final * (state_bytes + 4) + manifest.num_rows * _HEAD_BYTES
    needed = max(0, total - sum(shard.num_bytes for shard in manifest.shards))
    if manifest.complete:
        return
    free = shutil.disk_usage(output.root).free
    text = f"{output.root}: {needed / 2**30:.2f} GiB are to be written, {free / 2**30:.2f} GiB are free"
    if needed > free:
        raise DataError(f"{text}: free some space, or choose a directory on another disk with --output")
    num_left = manifest.num_rows - manifest.num_recorded_rows
    logger.info("%s; %d of %d rows are left", text, num_left, manifest.num_rows)


def _record_rows(
    config: RunConfig,
    prepared: PreparedData,
    target: OpenTarget,
    writer: RecordingWriter,
    signals: StopSignals,
    console: Console,
) -> None:
    sources = {
        "train": RowSource(prepared.train, prepared.train_plan, config.seed),
        "eval": RowSource(prepared.eval, prepared.eval_plan, config.seed),
    }
    left = _rows_left(writer)
    manifest, transport = writer.manifest, config.transport

    def row(position: int) -> Row:
        split, row_id = left[position]
        return sources[split].planned_row(row_id, position)

    with contextlib.ExitStack() as stack:
        if left:
            sizes = RowSizes()
            for split, source in sources.items():
                sizes |= source.sizes_of([row_id for its_split, row_id in left if its_split == split])
            pool = FeaturePool(target.servers, {SPEC_NAME: manifest.spec.spec()}, config.pool, target.info, sizes=sizes)
            stack.callback(pool.close)
            budget = PrefetchBudget(transport.prefetch_rows, transport.prefetch_bytes)
            stream = FeatureStream(
                row, pool, budget, SPEC_NAME, range(len(left)), row_timeout_s=transport.row_timeout_s
            )
            stack.callback(stream.close)
            for close in (stream.close, pool.close):
                signals.on_stop(close)
            progress = RowProgress("recorded", manifest.num_rows, manifest.num_rows - len(left), console)
            stack.enter_context(progress)
            try:
                for features_row in stream:
                    split, row_id = left[features_row.row.position]
                    progress.add(writer.add(split, row_id, features_row.features))
            except StoppedError:
                if not signals.stop.is_set():
                    raise
                writer.publish()  # nothing that was computed is lost
                return
        writer.finish()


def _rows_left(writer: RecordingWriter) -> list[tuple[SplitName, int]]:
    """(split, row id) of every row in no shard yet."""
    manifest, paths = writer.manifest, writer.paths
    done = {
        (row.split, row.row_id)
        for shard in manifest.shards
        for row in ShardRows.model_validate_json(paths.shard_rows(shard.name).read_bytes()).rows
    }
    return [row for row in _all_rows(manifest) if row not in done]


def _all_rows(manifest: RecordingManifest) -> Iterator[tuple[SplitName, int]]:
    for row_id in range(manifest.num_train_rows):
        yield "train", row_id
    for row_id in range(manifest.num_eval_rows):
        yield "eval", row_id
