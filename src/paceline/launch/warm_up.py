"""Compiling drafts before the first row: a target that compiles or runs on its own thread must not see it happen."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import torch

from paceline.drafts.fixed_row import fixed_row
from paceline.drafts.interface import DraftAlgorithm
from paceline.schema.parts import WHOLE

_ROW_TOKENS = (512, 1100)
"""Two sizes: after the second torch.compile knows that rows differ in length, and compiles no more.

Far enough apart that DFlash's lists of anchors, padded to multiples of 64, differ too: 128 and 192, one every 6 tokens.
"""
logger = logging.getLogger(__name__)


def compile_drafts(drafts: Mapping[str, DraftAlgorithm], row_tokens: int) -> None:
    """Run everything that training and evaluation will run once, on rows that need no target; changes no weight.

    torch.compile refuses a compiled function that is called while another thread traces one. Whatever is still
    traced later (a row of a rare shape) then runs uncompiled that once.

    Args:
        row_tokens: length of the rows that will be trained; the last one tried, so that memory is as it will be.
            Ranks that train each row together compile at the same time: they exchange parts of these rows, too.
    """
    torch._dynamo.config.error_on_nested_fx_trace = False  # noqa: SLF001 - there is no public name for it
    for name, algorithm in drafts.items():
        begin = time.monotonic()
        for num_tokens in (*_ROW_TOKENS, max(row_tokens, *_ROW_TOKENS)):
            sequence = algorithm.context.sequence
            row = fixed_row(algorithm, num_tokens, WHOLE if sequence is None else sequence.part)
            algorithm.loss(row).total.backward()
            algorithm.draft.zero_grad(set_to_none=True)
            with torch.no_grad():
                algorithm.loss(row)
                first, end = row.token_range
                starts = torch.arange(
                    max(1, first + algorithm.first_start), min(num_tokens, end + algorithm.first_start)
                )
                algorithm.propose(row, starts.to(algorithm.context.device))
        logger.info("draft %s: compiled in %.0f s", name, time.monotonic() - begin)
