"""`paceline export`: a run's drafts in the layouts that engines load, read back and compared."""

from __future__ import annotations

from pathlib import Path

import torch

from paceline.client.recorded_weights import RecordedWeights
from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.drafts.interface import TargetWeights
from paceline.export.exporting import export_draft
from paceline.launch.target_facts import open_recording
from paceline.launch.trained import (
    Which,
    build_draft,
    check_same_target,
    choose_drafts,
    load_trained,
    recall_target,
    recall_token_counts,
)
from paceline.schema.target_info import TargetInfo
from paceline.target.hf.fingerprint import fingerprint_weights
from paceline.target.hf.loading import resolve_checkpoint
from paceline.target.hf.weights import CheckpointWeights


def export_run(config: RunConfig, names: list[str], which: Which = "best") -> dict[str, Path]:
    """Export drafts of the run; the directory of each.

    Raises:
        ExportError: what was written, read back, is not what was trained.
        RunDirectoryError: the run was trained against another target than the one the files hold now.
    """
    run, names = RunDir(Path(config.run_dir)), choose_drafts(config, names)
    info = recall_target(run)
    # An embedding that is written comes from there, and the check computes with it.
    check_same_target(run, _target_now(config, info))
    return {name: export_one(config, name, info, which) for name in names}


def export_one(config: RunConfig, name: str, info: TargetInfo, which: Which) -> Path:
    """Export one draft, from the CPU in fp32 (the published tensors have the target's dtype)."""
    run, cpu = RunDir(Path(config.run_dir)), torch.device("cpu")
    weights = _open_weights(config, cpu)
    # Compiling takes longer than the few forwards of the check.
    eager = config.model_copy(update={"training": config.training.model_copy(update={"compile": False})})
    algorithm = build_draft(eager, name, info, weights, recall_token_counts(run), cpu, torch.float32)
    load_trained(algorithm, run, name, which)
    directory = Path(config.export.output) / name if config.export.output else run.export(name)
    export_draft(algorithm, directory, config.export.include_embedding)
    return directory


def _target_now(config: RunConfig, before: TargetInfo) -> TargetInfo:
    """The facts `before` with the name and fingerprint of what the weights are read from."""
    if config.placement.target == "recorded":
        return open_recording(config).info
    target = config.target
    files = resolve_checkpoint(target.model, target.revision, target.trust_remote_code)
    return before.model_copy(update={"name": target.model, "weight_fingerprint": fingerprint_weights(files)})


def _open_weights(config: RunConfig, device: torch.device) -> TargetWeights:
    if config.placement.target == "recorded":
        return RecordedWeights(open_recording(config).paths.weights, device, torch.float32)
    return CheckpointWeights(config.target, device, torch.float32)
