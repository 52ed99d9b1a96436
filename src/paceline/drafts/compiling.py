"""torch.compile, for functions that see rows of every length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_MAX_VARIANTS = 64
"""Of one function: by sizes that are alike by chance, data type, heads, and whether gradients are wanted."""


def compile_rows(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """torch.compile(function, **options), for as many variants as a long run of several drafts may need.

    After eight of them torch would run whatever it has not compiled yet as it is: flex_attention with the scores of all
    pairs of queries and keys in memory, and no word of it but a warning.
    """
    config = torch._dynamo.config  # noqa: SLF001 - where torch's documentation sends one for the limit
    config.recompile_limit = max(config.recompile_limit, _MAX_VARIANTS)
    compiled: Callable[..., Any] = torch.compile(function, **options)
    return compiled
