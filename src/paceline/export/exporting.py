"""Writing a trained draft in its published layout, and proving that what was written is what was trained."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from paceline.drafts.fixed_row import fixed_row
from paceline.drafts.interface import DraftAlgorithm
from paceline.drafts.published import read_published
from paceline.errors import DraftError, ExportError
from paceline.export.layouts import DraftFacts, Table, differing_tensors, find_layout

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_EMBEDDING = "embed_tokens.weight"
_ROW_TOKENS = 96
_TOLERANCE = {torch.float32: 1e-5}
"""Relative difference of losses; where the compute dtype is 16 bits, or not the published one, rounding shows."""
_ROUNDED_TOLERANCE = 0.05
logger = logging.getLogger(__name__)


def export_draft(algorithm: DraftAlgorithm, directory: Path, include_embedding: bool = False) -> None:
    """Write `config.json` and `model.safetensors`; `directory` appears, or is replaced, only when all checks passed.

    Checked: names, shapes and dtypes against the layout; the configuration's conventions; every tensor after reading
    it back; loss and proposals of a fresh draft that loaded the files, on fixed rows.

    Args:
        include_embedding: also write the target's embedding (EAGLE-3).

    Raises:
        ExportError: any difference, by name; or `directory` holds files that are not an export's.
    """
    directory = directory.absolute()
    _check_replaceable(directory)
    config, tensors = algorithm.published_config(), algorithm.published_tensors()
    if include_embedding and _takes_embedding(config):
        dtype = getattr(torch, algorithm.context.info.dtype)
        tensors[_EMBEDDING] = algorithm.context.weights.embedding().detach().to("cpu", dtype).clone()
    written = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    try:
        _write(written, config, tensors)
        check_export(algorithm, written)
        _publish(written, directory)
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"cannot write the export to {directory}: {error}: free space or set export.output"
        ) from error
    finally:
        shutil.rmtree(written, ignore_errors=True)
    logger.info("exported %s draft to %s: %d tensors, checked", algorithm.name, directory, len(tensors))


def check_export(algorithm: DraftAlgorithm, directory: Path) -> None:
    """Raise unless the files in `directory` are the draft `algorithm` holds.

    Raises:
        ExportError: names what differs.
    """
    try:
        config, tensors = read_published(directory)
    except DraftError as error:
        raise ExportError(f"the export cannot be read back: {error}") from error
    _check_layout(algorithm, config, tensors)
    _check_equal("written", algorithm.published_tensors(), tensors)
    fresh = _load_fresh(algorithm, config, tensors)
    _check_equal("loaded again", algorithm.published_tensors(), fresh.published_tensors())
    _check_behaviour(algorithm, fresh)


def _check_layout(algorithm: DraftAlgorithm, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    layout = find_layout(config)
    if layout is None:
        logger.warning(
            "no table of the layout %s: names and shapes are compared with the draft's own only",
            config.get("architectures"),
        )
        return
    info = algorithm.context.info
    facts = DraftFacts(
        config=algorithm.config,
        info=info,
        layers=type(algorithm).feature_spec(algorithm.config, info).layers,
        draft_vocab_size=algorithm.context.vocabulary.size,
        include_embedding=_EMBEDDING in tensors,
    )
    problems = layout.wrong_config(config, facts)
    problems += differing_tensors(layout.tensors(facts), _table(tensors))
    if problems:
        raise ExportError("the export does not follow its layout:\n  " + "\n  ".join(problems))


def _check_equal(what: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    found = {name: tensor for name, tensor in found.items() if name != _EMBEDDING or name in expected}
    problems = differing_tensors(_table(expected), _table(found))
    problems += [
        f"{name} has other values"
        for name in sorted(expected.keys() & found.keys())
        if expected[name].shape == found[name].shape and not torch.equal(expected[name], found[name])
    ]
    if problems:
        raise ExportError(f"tensors {what} are not the trained ones:\n  " + "\n  ".join(problems))


def _load_fresh(algorithm: DraftAlgorithm, config: dict[str, Any], tensors: dict[str, Tensor]) -> DraftAlgorithm:
    """A draft of random weights that loaded the export: what it did not load shows."""
    fresh = type(algorithm)(
        algorithm.config.model_copy(update={"init_from": None}), replace(algorithm.context, compile=False)
    )
    noise = torch.Generator(algorithm.context.device).manual_seed(1)
    with torch.no_grad():
        for tensor in fresh.draft.parameters():
            tensor.normal_(generator=noise)
    try:
        fresh.load_published(config, tensors)
    except DraftError as error:
        raise ExportError(f"the export cannot be loaded: {error}") from error
    return fresh


@torch.no_grad()
def _check_behaviour(algorithm: DraftAlgorithm, fresh: DraftAlgorithm) -> None:
    """Compare losses (every logit of the row goes into them) and proposals on a fixed row."""
    row = fixed_row(algorithm, _ROW_TOKENS)
    ours, theirs = (draft.loss(row) for draft in (algorithm, fresh))
    if not ours.weight > 0:
        raise ExportError(
            "the fixed row that drafts are compared on counts nothing for this one: its spans are too short"
        )
    difference = float((ours.total - theirs.total).abs() / ours.total.abs().clamp(min=1e-6))
    context = algorithm.context
    # A compiled draft is held against an eager one: that, too, rounds differently.
    same_numbers = getattr(torch, context.info.dtype) == context.dtype and not context.compile
    tolerance = _TOLERANCE.get(context.dtype, _ROUNDED_TOLERANCE) if same_numbers else _ROUNDED_TOLERANCE
    if not difference <= tolerance:
        raise ExportError(
            f"the export, read back, has a loss of {float(theirs.total):.6g} on a fixed row, the trained draft "
            f"{float(ours.total):.6g}: they do not compute the same"
        )
    if same_numbers:
        starts = torch.arange(algorithm.first_start, _ROW_TOKENS - 1, device=context.device)
        ours_says, theirs_says = (draft.propose(row, starts) for draft in (algorithm, fresh))
        if not torch.equal(ours_says, theirs_says):
            at = int((ours_says != theirs_says).any(dim=1).nonzero()[0])
            raise ExportError(
                f"the export, read back, proposes {theirs_says[at].tolist()} at position {int(starts[at])} of a fixed "
                f"row, the trained draft {ours_says[at].tolist()}"
            )


def _takes_embedding(config: Mapping[str, Any]) -> bool:
    return config.get("architectures") == ["LlamaForCausalLMEagle3"]


def _table(tensors: Mapping[str, Tensor]) -> Table:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _check_replaceable(directory: Path) -> None:
    """Only what an export wrote is ever replaced."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ExportError(f"{directory} is a file: name a directory to export to")
    others = sorted({path.name for path in directory.iterdir()} - {CONFIG_FILE, WEIGHTS_FILE})
    if others:
        raise ExportError(f"{directory} holds other files ({', '.join(others[:5])}): name an empty or new directory")


def _write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    directory.mkdir(parents=True)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # transformers refuses files that do not say which framework wrote them.
    save_file(dict(tensors), directory / WEIGHTS_FILE, metadata={"format": "pt"})
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())


def _publish(written: Path, directory: Path) -> None:
    if directory.exists():
        replaced = written.with_name(written.name + ".old")
        directory.rename(replaced)
        written.rename(directory)
        shutil.rmtree(replaced)
    else:
        written.rename(directory)
