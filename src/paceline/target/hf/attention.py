"""Attention in which each document of a packed row sees only itself, without a mask of the row's square.

Registered with transformers beside its own implementations. A call without `documents` is transformers' sdpa, so
that the same model generates as usual.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from paceline.errors import TargetError

DOCUMENT_ATTENTION = "paceline_documents"
_MAX_FLASH_HEAD_DIM = 256


# Not frozen: torch.compile looks into every field of a frozen dataclass that compiled code hands on, and would compile
# anew for each other number of documents.
@dataclass(slots=True, eq=False)
class RowDocuments:
    """Where the documents of a packed row lie."""

    lengths: tuple[int, ...]
    boundaries: Tensor
    """int32[D+1], on the model's device."""
    longest: int


def register_document_attention() -> None:
    """Make DOCUMENT_ATTENTION known to transformers; again is harmless."""
    AttentionInterface.register(DOCUMENT_ATTENTION, document_attention)
    AttentionMaskInterface.register(DOCUMENT_ATTENTION, sdpa_mask)


def packed_arguments(documents: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Arguments of a model's forward that make `document_attention` see the documents (int32[D+1])."""
    lengths = tuple(np.diff(documents).tolist())
    boundaries = torch.from_numpy(np.ascontiguousarray(documents, dtype=np.int32))
    if device.type == "cuda":
        boundaries = boundaries.pin_memory().to(device, non_blocking=True)
    return {
        "documents": RowDocuments(lengths, boundaries, max(lengths)),
        # transformers takes a mask of four dimensions as ready and builds none; a built one would be T x T.
        "attention_mask": torch.empty(1, 1, 1, 0, device=device),
    }


# Traced, every other set of document lengths would be compiled anew.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: RowDocuments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[1, T, heads, head_dim]: causal attention inside each document; transformers' sdpa where `documents` is None.

    Args:
        query: [1, heads, T, head_dim]; `key`, `value` [1, kv_heads, T, head_dim].
        kwargs: as transformers passes them; `scaling` and `sliding_window` are used.

    Raises:
        TargetError: attention with features this function lacks, or a model that does not hand `documents` on.
    """
    if documents is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise TargetError(f"{type(module).__name__} does not hand keyword arguments to its attention function")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    _check_supported(module, kwargs)
    scale, window = kwargs.get("scaling"), kwargs.get("sliding_window")
    if _can_use_varlen(query, value):
        return _varlen(query, key, value, documents, scale, window), None
    return _each_document(query, key, value, documents, scale, window), None


def _check_supported(module: nn.Module, kwargs: dict[str, Any]) -> None:
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown:
        raise TargetError(f"{type(module).__name__} uses {unknown[0]}, which packed documents do not support")
    if not getattr(module, "is_causal", True):
        raise TargetError(f"{type(module).__name__} is not causal")
    window = getattr(getattr(module, "config", None), "sliding_window", None)
    if window is not None and "sliding_window" not in kwargs:
        raise TargetError(f"{type(module).__name__} has a sliding window of {window} but does not pass it on")


def _each_document(
    query: Tensor, key: Tensor, value: Tensor, documents: RowDocuments, scale: float | None, window: int | None
) -> Tensor:
    parts = []
    sizes = list(documents.lengths)
    for q, k, v in zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True):
        n = q.shape[2]
        mask = None
        if window is not None and n > window:
            mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        parts.append(
            scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(parts, 2).transpose(1, 2).contiguous()


@cache
def _varlen_parameters() -> frozenset[str]:
    """Parameters of torch's variable-length attention, which grew from release to release; empty without it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _can_use_varlen(query: Tensor, value: Tensor) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= _MAX_FLASH_HEAD_DIM
        and "window_size" in _varlen_parameters()
    )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, documents: RowDocuments, scale: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in _varlen_parameters():  # torch 2.11 groups heads without being told
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    bounds, longest = documents.boundaries, documents.longest
    packed = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, **options)
    assert isinstance(packed, Tensor)
    return packed.unsqueeze(0)
