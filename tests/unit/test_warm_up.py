"""Drafts are compiled before the first row: what that takes is said, and no weight is another afterwards."""

import logging
import re
import time

import pytest
import torch

from contract.test_dflash_contract import build as build_dflash
from paceline.launch.warm_up import compile_drafts
from unit.test_eagle3_loss import build as build_eagle3


def test_it_says_how_long_each_draft_took_and_changes_no_weight(caplog: pytest.LogCaptureFixture) -> None:
    drafts = {"eagle3": build_eagle3(), "dflash": build_dflash()}
    before = {name: [weight.clone() for weight in draft.draft.parameters()] for name, draft in drafts.items()}
    begin = time.monotonic()
    with caplog.at_level(logging.INFO):
        compile_drafts(drafts, 64)
    said = re.findall(r"draft (\w+): compiled in (\d+) s", caplog.text)
    assert [name for name, _ in said] == ["eagle3", "dflash"]
    assert sum(int(seconds) for _, seconds in said) <= time.monotonic() - begin + 1
    for name, draft in drafts.items():
        for weight, old in zip(draft.draft.parameters(), before[name], strict=True):
            assert torch.equal(weight, old)
            assert weight.grad is None
