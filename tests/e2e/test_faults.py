"""Faults of a network between trainer and servers: each is noticed and counted, and no loss changes by a bit."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from proxied import Fault, fault_proxy
from served import Served
from whole_run import lines, losses, run, run_config, same_weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SETTINGS = {"training__num_epochs": 2, "training__eval_every": 8, "training__rows_per_step": 2}
EVERY_KIND = (
    {"kind": "drop"},
    {"kind": "flip"},
    {"kind": "delay", "rows": 2},
    {"kind": "duplicate"},
    {"kind": "truncate"},
    {"kind": "flip", "where": "head"},
    {"kind": "swap"},
    {"kind": "flip_request"},
    {"kind": "stall"},
)
HARMLESS = ("delay", "duplicate")
"""The row arrives at the first try."""


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, data: Path) -> RunConfig:
    torch.set_num_threads(1)
    config = run_config(tmp_path_factory.mktemp("inline") / "run", tiny_target, data, **SETTINGS)
    assert run(config).status == "finished"
    return config


def train_over(inline: RunConfig, run_dir: Path, urls: list[str], **changes: Any) -> RunConfig:
    """A run over servers at `urls`, which ends as the inline run did."""
    settings = SETTINGS | {
        "placement__target": "urls",
        "placement__urls": urls,
        "transport__kind": "http",
        "transport__stall_timeout_s": 1.0,
    }
    config = run_config(run_dir, Path(inline.target.model), Path(inline.data.train).parent, **settings | changes)
    assert run(config).status == "finished"
    assert losses(config) == losses(inline)
    assert [line["rows"] for line in lines(config)] == [line["rows"] for line in lines(inline)]
    assert same_weights(config, inline)
    return config


def figures(config: RunConfig) -> dict[str, float]:
    """What the stream and its pool counted up to the last step."""
    counted: dict[str, float] = lines(config)[-1]["stream"]
    return counted


def log(config: RunConfig) -> str:
    return RunDir(Path(config.run_dir)).log("trainer", 0).read_text()


def spread(faults: tuple[Fault, ...], first: int = 3, every: int = 7) -> list[Fault]:
    return [{**fault, "at_row": first + every * i} for i, fault in enumerate(faults)]


@pytest.mark.parametrize("transport", ["http", "file", "gloo"])
def test_no_fault_of_a_reply_changes_a_bit(
    inline: RunConfig, target_servers: list[Served], tmp_path: Path, transport: str
) -> None:
    """The proxy sees the HTTP part of each reply; over file and gloo the features come beside it."""
    shared = tmp_path / "shared"
    shared.mkdir()
    changes = {"transport__kind": transport, "transport__directory": str(shared)}
    with fault_proxy([target_servers[0].url], spread(EVERY_KIND)) as proxy:
        config = train_over(inline, tmp_path / "run", proxy.urls, **changes)
        assert proxy.all_happened(), proxy.done
    assert list(shared.iterdir()) == []
    harmful = [fault for fault in proxy.done if fault["kind"] not in HARMLESS]
    text = log(config)
    for fault in harmful:
        assert re.search(rf"row {fault['row']} was lost by {proxy.urls[0]} and is asked for again", text), fault
    counted = figures(config)
    assert counted["rows_retried"] >= len(harmful)
    assert counted["damaged_replies"] >= len([fault for fault in harmful if fault["kind"] not in ("drop", "stall")])
    assert counted["server_deaths"] == 0, "a connection that breaks is no server that dies"


@pytest.mark.parametrize(
    ("transport", "seed"),
    [
        ("http", 0),
        *(pytest.param(kind, seed, marks=pytest.mark.long) for kind in ("http", "file", "gloo") for seed in (1, 2, 3)),
    ],
)
def test_a_bit_of_an_http_header_may_turn_anywhere(
    inline: RunConfig, target_servers: list[Served], tmp_path: Path, transport: str, seed: int
) -> None:
    bit = 8 * len("POST /v1/sessions") + 4
    to_another_call = {"kind": "flip_request_header", "bit": bit}  # the slash becomes a question mark
    kinds = ({"kind": "flip_header"}, {"kind": "flip_request_header"})
    # Every second request meets a fault: one row may have more of them than a run would put up with.
    changes = {"transport__kind": transport, "transport__stall_timeout_s": 0.5, "pool__row_retries": 30}
    with fault_proxy([target_servers[0].url], spread((to_another_call, *kinds * 18), every=2), seed) as proxy:
        config = train_over(inline, tmp_path / "run", proxy.urls, **changes)
        assert proxy.all_happened(), proxy.done
    assert figures(config)["rows_retried"] > 0
    assert figures(config)["damaged_replies"] > 0


def test_a_slow_server_among_fast_ones_holds_up_nobody(
    inline: RunConfig, target_servers: list[Served], tmp_path: Path
) -> None:
    """For six rows, the slow one answers only what another has answered."""
    slow = [{"kind": "hold", "server": 0, "at_row": row} for row in range(12, 18)]
    with fault_proxy([server.url for server in target_servers], slow) as proxy:
        config = train_over(inline, tmp_path / "run", proxy.urls, pool__hedge_after_rows=8)
        assert proxy.all_happened(), f"each was asked for elsewhere: {proxy.done}"
    counted = figures(config)
    # what the slow one was asked as the second server is answered by the first, and then no hedge is won
    asked_first = sum(fault["first"] for fault in proxy.done)
    assert counted["hedges_won"] >= asked_first > 0
    assert counted["rows_hedged"] >= len(slow)
    assert counted["late_replies"] >= len(slow)
    assert counted["server_deaths"] == 0, "a slow server is not a dead one"
    assert "is asked as well" in log(config)
