"""Opening a run directory: what is written first, and whether a second start continues the same run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import secrets
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from paceline.config.files import write_whole
from paceline.config.loading import dump_config
from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.errors import ConfigError, RunDirectoryError
from paceline.target.engines.flags import changes_what_is_computed
from paceline.version import VERSION

_MAY_CHANGE = (
    "run_dir",
    "evaluation",
    "export",
    "placement",
    "pool",
    "recording",
    "regeneration",
    "target.capture_layers",
    "target.compile",
    "target.device",
    "target.device_map",
    "target.engine_directory",
    "target.engine_documents",
    "target.engine_python",
    "target.engine_start_timeout_s",
    "target.engine_tokens",
    "target.engine_url",
    "target.selftest",
    "target.selftest_reference",
    "tracking",
    "training.activation_checkpointing",
    "training.async_checkpoints",
    "training.checkpoint_every",
    "training.compile",
    "training.device",
    "training.dist_timeout_s",
    "training.eval_every",
    "training.keep_checkpoints",
    "training.log_every",
    "training.max_eval_rows",
    "training.num_threads",
    "training.profile",
    "training.sequence_exchange",
    "training.sequence_parallel",
    "training.sharding",
    "training.shutdown_grace_s",
    "transport",
    "data.num_workers",
    "data.cache_dir",
    "data.recorded",
)
"""Settings that do not change what is trained on: a run may go on with other values of them."""
_ENGINE_ARGS = "target.engine_args."
_MAY_DIFFER = (
    "run_dir",
    "data.cache_dir",
    "data.num_workers",
    "data.recorded",
    "placement.trainer_devices",
    "target.device",
    "target.device_map",
    "target.engine_python",
    "target.selftest_reference",
    "training.device",
    "training.num_threads",
    "transport.directory",
)
"""Settings that are of one host, or of one rank: hosts may mount a file system at different places."""
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "pydantic")


@dataclass(frozen=True, slots=True)
class Run:
    """An opened run directory."""

    paths: RunDir
    run_id: str
    """Drawn when the directory was first used; marks what this run wrote."""


@contextlib.contextmanager
def lock_run(paths: RunDir) -> Iterator[None]:
    """Hold the run directory for this process: two trainers would write into each other's checkpoints and metrics.

    The operating system lets go of it when the process ends, however it ends.

    Raises:
        RunDirectoryError: another process holds it (names its id), or the directory cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            paths.root.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(paths.lock.open("a+", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RunDirectoryError(
                f"{paths.root} is in use by process {file.read().strip() or 'unknown'}: wait until it ends, or choose "
                "another run_dir"
            ) from error
        except OSError as error:
            raise RunDirectoryError(f"cannot use run directory {paths.root}: {error.strerror or error}") from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        # A worker forked later would hold the lock for as long as it lives, also after this process is gone.
        os.register_at_fork(after_in_child=file.close)
        yield


def open_run(config: RunConfig) -> Run:
    """Create the run directory, or go on in one that holds the same run.

    Raises:
        RunDirectoryError: it was made with another configuration (names what differs), or cannot be written.
    """
    paths = RunDir(Path(config.run_dir))
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        if paths.resolved_config.exists() and paths.versions.exists():
            check_same_run(paths, config)
            run_id = str(json.loads(paths.versions.read_text(encoding="utf-8"))["run_id"])
        else:
            run_id = secrets.token_hex(8)
            facts = {"run_id": run_id, **_versions()}
            write_whole(paths.versions, json.dumps(facts, indent=1) + "\n")
        write_whole(paths.resolved_config, dump_config(config))
    except OSError as error:
        raise RunDirectoryError(f"cannot use run directory {paths.root}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{paths.versions} is damaged ({error}): choose another run_dir") from error
    return Run(paths, run_id)


def recall_run(paths: RunDir) -> Run:
    """The run of a directory that another process of it has opened.

    Raises:
        RunDirectoryError: this process does not see it.
    """
    try:
        return Run(paths, str(json.loads(paths.versions.read_text(encoding="utf-8"))["run_id"]))
    except (OSError, ValueError, KeyError) as error:
        raise RunDirectoryError(
            f"cannot read {paths.versions}, written when the run was opened ({error}): all ranks need the same "
            "run_dir, on a file system that they share"
        ) from error


def facts_of_rank(run: Run, config: RunConfig) -> dict[str, Any]:
    """What all ranks of a run must have alike, by setting; for `check_ranks_alike`."""
    flat = _flat(tomllib.loads(dump_config(config)))
    return {"run": run.run_id} | {key: value for key, value in flat.items() if not _is_within(key, _MAY_DIFFER)}


def check_ranks_alike(facts: Sequence[dict[str, Any]]) -> None:
    """Raise unless all ranks, in order, have one run and one configuration: they would train on different things.

    Raises:
        RunDirectoryError: another run, seen in the run directory of another host; names the rank.
        ConfigError: names the first rank that differs, and the settings.
    """
    first = facts[0]
    for rank, own in enumerate(facts):
        if own["run"] != first["run"]:
            raise RunDirectoryError(
                f"rank 0 has opened run {first['run']}, rank {rank} sees run {own['run']} in its run_dir: all ranks "
                "need the same run_dir, on a file system that they share"
            )
        differing = [
            f"  {key}: {first.get(key, 'not set')!r} on rank 0, {own.get(key, 'not set')!r} on rank {rank}"
            for key in sorted(first.keys() | own.keys())
            if first.get(key) != own.get(key)
        ]
        if differing:
            raise ConfigError(
                "the ranks were started with different configurations:\n"
                + "\n".join(differing)
                + "\nstart all of them with the same file and overrides"
            )


def check_same_run(paths: RunDir, config: RunConfig) -> None:
    """Raise RunDirectoryError if what is trained would differ from what the directory holds."""
    before = _flat(load_resolved(paths))
    now = _flat(tomllib.loads(dump_config(config)))
    differing = [
        f"  {key}: was {before.get(key, 'not set')!r}, is {now.get(key, 'not set')!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _may_change(key)
    ]
    if differing:
        raise RunDirectoryError(
            f"{paths.root} holds a run with another configuration:\n"
            + "\n".join(differing)
            + "\nchoose another run_dir, or set these back"
        )


def load_resolved(paths: RunDir) -> dict[str, Any]:
    """The configuration a run directory was made with, as plain tables.

    Raises:
        OSError: it cannot be read.
        RunDirectoryError: it is damaged.
    """
    try:
        return tomllib.loads(paths.resolved_config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirectoryError(f"{paths.resolved_config} is damaged ({error}): choose another run_dir") from error


def _may_change(key: str) -> bool:
    """An engine's options may change by their names: cache sizes and batches, not formats of weights."""
    if key.startswith(_ENGINE_ARGS):
        return not changes_what_is_computed(key.removeprefix(_ENGINE_ARGS))
    return _is_within(key, _MAY_CHANGE)


def _is_within(key: str, settings: Sequence[str]) -> bool:
    return any(key == setting or key.startswith(setting + ".") for setting in settings)


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _versions() -> dict[str, Any]:
    packages: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "paceline": VERSION,
        "git": _git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
    }


def _git_state() -> str | None:
    """Commit of the source tree (with "-dirty"), or None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603 - fixed words
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
