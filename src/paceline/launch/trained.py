"""Drafts of a finished (or running) run, loaded from its checkpoints for evaluation and export."""

from __future__ import annotations

import logging
import typing
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from paceline.config.loading import apply_overrides, build_config
from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.data.prepared import PreparedData
from paceline.drafts.interface import DraftAlgorithm, DraftContext, TargetWeights
from paceline.drafts.registry import build_algorithm
from paceline.drafts.sequence import SequenceGroup
from paceline.drafts.vocabulary import build_vocabulary
from paceline.errors import ConfigError, RunDirectoryError
from paceline.launch.run import load_resolved
from paceline.schema.target_info import TargetInfo
from paceline.training.checkpoint import best_checkpoint, latest_checkpoint, load_draft_weights

logger = logging.getLogger(__name__)

Which = Literal["best", "latest", "untrained"]


def load_run_config(directory: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The resolved configuration of a run directory, with `overrides`; `run_dir` is where it lies now.

    Raises:
        ConfigError: an override changes a draft: its weights were trained with the settings it had.
        RunDirectoryError: there is no run in `directory`, or its configuration is damaged.
    """
    paths = RunDir(Path(directory))
    path = paths.resolved_config
    try:
        table = load_resolved(paths)
    except OSError as error:
        raise RunDirectoryError(f"{directory} is no run directory (cannot read {path}: {error.strerror})") from error
    table["run_dir"] = str(directory)
    trained = build_config(table, source=str(path))
    config = build_config(apply_overrides(table, overrides), source=str(path))
    for name, draft in config.drafts.items():
        if draft != trained.drafts.get(name):
            raise ConfigError(f"drafts.{name} cannot be set here: {directory} holds the draft as it was trained")
    return config


def remember_target(run: RunDir, info: TargetInfo) -> None:
    """Keep the target's facts in the run directory: later commands need not load it, and another one is refused.

    Raises:
        RunDirectoryError: the run was trained against another target; names both fingerprints.
    """
    check_same_target(run, info)
    run.target_info.write_text(info.model_dump_json(indent=1) + "\n", encoding="utf-8")


def check_same_target(run: RunDir, info: TargetInfo) -> None:
    """Raise RunDirectoryError if the run's drafts belong to another target; names both fingerprints."""
    if not run.target_info.exists():
        return
    before = recall_target(run)
    if before.weight_fingerprint != info.weight_fingerprint:
        raise RunDirectoryError(
            f"{run.root} was trained against {before.name} (weights {before.weight_fingerprint}), the target is "
            f"{info.name} (weights {info.weight_fingerprint}) now: choose another run_dir"
        )


def recall_target(run: RunDir) -> TargetInfo:
    """The facts about the target that the run was trained against.

    Raises:
        RunDirectoryError: nothing was trained in this directory yet.
    """
    try:
        return TargetInfo.model_validate_json(run.target_info.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"cannot read {run.target_info} ({error}): train the run first") from error


def remember_data(run: RunDir, prepared: PreparedData) -> None:
    """Keep what the run trains on: its fingerprint, and the counts that draft vocabularies are made of.

    Raises:
        RunDirectoryError: the run has been training on other data.
    """
    if not run.trained_data.exists():
        written = run.trained_data.with_name(f".{run.trained_data.name}")
        with written.open("wb") as file:
            np.savez(file, fingerprint=np.array(prepared.fingerprint), token_counts=prepared.token_counts)
        written.replace(run.trained_data)
    elif not is_trained_data(run, prepared):
        raise RunDirectoryError(
            f"{run.root} was trained on other data: files, tokenizer or chat template have changed since; choose "
            "another run_dir, or put them back"
        )


def is_trained_data(run: RunDir, prepared: PreparedData) -> bool:
    """Whether `prepared` is the very data, rendered and packed in the very way, that the run was trained on."""
    return str(_read_trained_data(run, "fingerprint")) == prepared.fingerprint


def recall_token_counts(run: RunDir) -> np.ndarray:
    """int64: how often each token was supervised in the data of the run; its drafts' vocabularies follow from it.

    Raises:
        RunDirectoryError: nothing was trained in this directory yet.
    """
    return _read_trained_data(run, "token_counts")


def _read_trained_data(run: RunDir, name: str) -> np.ndarray:
    try:
        with np.load(run.trained_data, allow_pickle=False) as arrays:
            array: np.ndarray = arrays[name]
            return array
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RunDirectoryError(f"cannot read {run.trained_data} ({error}): train the run first") from error


def build_draft(
    config: RunConfig,
    name: str,
    info: TargetInfo,
    weights: TargetWeights,
    token_counts: np.ndarray,
    device: torch.device,
    dtype: torch.dtype,
    sequence: SequenceGroup | None = None,
) -> DraftAlgorithm:
    """One draft of the run, initialised and on `device`.

    Args:
        token_counts: of the data the run is trained on, whatever the configuration names now.
        sequence: the ranks that train each row together with this one; None where it trains whole rows.
    """
    draft, training = config.drafts[name], config.training
    vocabulary = build_vocabulary(token_counts, getattr(draft, "vocab_size", 0), info.vocab_size)
    context = DraftContext(
        info=info,
        weights=weights,
        vocabulary=vocabulary,
        device=device,
        dtype=dtype,
        seed=config.seed,
        head_chunk_tokens=training.head_chunk_tokens,
        compile=training.compile,
        activation_checkpointing=training.activation_checkpointing,
        sequence=sequence,
    )
    algorithm = build_algorithm(draft, context)
    num_weights = sum(parameter.numel() for parameter in algorithm.draft.parameters())
    logger.info("draft %s: %s, %s weights, vocabulary %d", name, draft.algorithm, f"{num_weights:,}", vocabulary.size)
    return algorithm


def choose_drafts(config: RunConfig, names: list[str]) -> list[str]:
    """`names`, or all drafts of the run when there are none.

    Raises:
        ConfigError: the run has no draft of such a name.
    """
    for name in names:
        if name not in config.drafts:
            raise ConfigError(f"{config.run_dir} has no draft {name!r}; it has {', '.join(config.drafts)}")
    return names or list(config.drafts)


def check_which(name: str) -> Which:
    """`name`, if it is one that `load_trained` takes.

    Raises:
        ConfigError: it is not.
    """
    if name not in typing.get_args(Which):
        raise ConfigError(f"checkpoint {name!r}: one of {', '.join(typing.get_args(Which))}")
    return typing.cast("Which", name)


def load_trained(algorithm: DraftAlgorithm, run: RunDir, name: str, which: Which) -> Path | None:
    """Put weights of a checkpoint into a draft; the checkpoint's path, None for "untrained".

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or has no such draft.
    """
    if which == "untrained":
        return None
    path = best_checkpoint(run, name) if which == "best" else latest_checkpoint(run)
    saved = load_draft_weights(path, name)
    with torch.no_grad():
        for parameter_name, parameter in algorithm.draft.named_parameters():
            parameter.copy_(saved[parameter_name])
    return path
