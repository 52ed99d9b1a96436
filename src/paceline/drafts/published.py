"""What all published layouts share: RoPE, dtype and length fields, the check of names, reading a folder back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from paceline.errors import DraftError
from paceline.schema.target_info import TargetInfo


def rope_fields(info: TargetInfo) -> dict[str, Any]:
    """The target's RoPE written three times over, and its length.

    transformers 5 writes `rope_parameters` alone; readers that know only `rope_theta` then take 10000. The length is
    the target's, not that of the training rows: engines refuse longer requests, and yarn scales by it.
    """
    scaling = None if info.rope.scaling is None else dict(info.rope.scaling)
    return {
        "rope_theta": info.rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": info.rope.theta},
        "max_position_embeddings": info.max_position_embeddings,
    }


def dtype_fields(info: TargetInfo) -> dict[str, Any]:
    """The target's dtype under both names; without `torch_dtype` SGLang loads fp16."""
    return {"torch_dtype": info.dtype, "dtype": info.dtype}


def published_theta(config: Mapping[str, Any]) -> float | None:
    """RoPE theta of a published configuration, whichever way it was written."""
    theta = config.get("rope_theta")
    if theta is None:
        theta = (config.get("rope_parameters") or {}).get("rope_theta")
    return None if theta is None else float(theta)


def published_scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """RoPE scaling of a published configuration, whichever way it was written; None is plain RoPE."""
    written = config.get("rope_scaling") or config.get("rope_parameters") or {}
    scaling = {key: value for key, value in written.items() if key not in ("rope_theta", "type")}
    scaling["rope_type"] = written.get("rope_type") or written.get("type") or "default"
    return None if scaling["rope_type"] == "default" else scaling


def check_names(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise DraftError unless both have the same names with the same shapes."""
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise DraftError(
            f"the tensors do not fit the layout: missing {_listed(missing)}, unknown {_listed(unknown)}: the draft was "
            "published by another algorithm or with other settings (number of layers, wrapped modules)"
        )
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape:
            raise DraftError(
                f"{name} is {list(tensors[name].shape)} in the published draft, {list(tensor.shape)} here: "
                "target and draft sizes do not fit; set the draft's sizes as published"
            )


def read_published(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, all tensors on the CPU) of an exported draft; safetensors only, nothing is unpickled.

    Raises:
        DraftError: a file is missing or damaged; names it.
    """
    directory = Path(directory)
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DraftError(f"cannot read {path}: {error.strerror}: name the directory of an exported draft") from error
    except ValueError as error:
        raise DraftError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise DraftError(f"{path} holds a {type(config).__name__}, not a configuration")
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise DraftError(f"{directory} has no *.safetensors file: export the draft again")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except (OSError, SafetensorError) as error:
            raise DraftError(f"cannot read {file}: {error}") from error
    return config, tensors


def _listed(names: list[str], limit: int = 6) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
