"""What a request must be, whichever engine computes it."""

from __future__ import annotations

import numpy as np

from paceline.errors import CaptureMismatchError, ConfigError
from paceline.schema.features import FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo


def check_request(request: RowRequest, spec: FeatureSpec, info: TargetInfo) -> None:
    """Raise unless a request can be right for this target; both values are named.

    Raises:
        CaptureMismatchError: token ids, documents, spans or positions that cannot be.
        ConfigError: capture layers out of range, documents longer than the target's positions.
    """
    if spec.layers and not 0 <= spec.layers[0] <= spec.layers[-1] < info.num_layers:
        raise ConfigError(
            f"capture layers {list(spec.layers)} of a target with {info.num_layers} layers: "
            f"choose from 0..{info.num_layers - 1}"
        )
    if request.extras:
        raise ConfigError(f"engines take tokens only, row {request.position} has {sorted(request.extras)}")
    num_tokens = len(request.tokens)
    if request.tokens.ndim != 1 or num_tokens == 0:
        raise _mismatch(request, f"tokens of shape {request.tokens.shape}, expected [T] with T > 0")
    low, high = int(request.tokens.min()), int(request.tokens.max())
    if low < 0 or high >= info.vocab_size:
        wrong = low if low < 0 else high
        raise _mismatch(
            request,
            f"token id {wrong} outside 0..{info.vocab_size - 1}: "
            "target and trainer tokenize differently; compare target.model with data.tokenizer",
        )
    bounds = request.documents
    if bounds.ndim != 1 or len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != num_tokens or (np.diff(bounds) < 1).any():
        raise _mismatch(request, f"documents {bounds.tolist()[:8]} do not divide its {num_tokens} tokens")
    if int(np.diff(bounds).max()) > info.max_position_embeddings:
        raise ConfigError(
            f"a document of {int(np.diff(bounds).max())} tokens for a target of {info.max_position_embeddings} "
            "positions: lower data.row_tokens"
        )
    _check_positions(request, info)
    _check_spans(request)


def _check_positions(request: RowRequest, info: TargetInfo) -> None:
    expected = (info.num_position_axes, len(request.tokens))
    if request.positions.shape != expected:
        raise _mismatch(request, f"positions of shape {request.positions.shape}, expected {expected}")
    starts = np.repeat(request.documents[:-1], np.diff(request.documents))
    if (request.positions != np.arange(expected[1]) - starts).any():
        raise _mismatch(request, "positions that do not count from 0 in every document")


def _check_spans(request: RowRequest) -> None:
    spans = request.spans
    if spans.ndim != 2 or spans.shape[1] != 2:
        raise _mismatch(request, f"spans of shape {spans.shape}, expected [S, 2]")
    flat = spans.reshape(-1)
    if len(flat) and (
        flat[0] < 0 or flat[-1] > len(request.tokens) or (np.diff(flat) < 0).any() or (np.diff(spans) < 1).any()
    ):
        raise _mismatch(
            request, f"spans {spans.tolist()[:4]} that are empty, overlap or leave {len(request.tokens)} tokens"
        )


def _mismatch(request: RowRequest, what: str) -> CaptureMismatchError:
    return CaptureMismatchError(f"row {request.position} has {what}")
