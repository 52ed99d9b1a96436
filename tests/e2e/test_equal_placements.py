"""The same training run wherever the target is: losses of every step and final weights, bit by bit (N2)."""

import io
import itertools
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from rich.console import Console

from forking import Commands
from paceline.config.run import RunConfig
from paceline.launch.record import RecordOptions, record
from served import Served, start_servers
from whole_run import QuietSignals, StopsAfter, lines, losses, run, run_config, same_weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
EPOCHS = {"training__num_epochs": 2, "training__eval_every": 4, "training__rows_per_step": 2}
IN_CI = [("http", 1, 1), ("http", 4, 3), ("file", 4, 3), ("gloo", 4, 3)]
EVERY_ONE = list(itertools.product(["http", "file", "gloo"], [1, 4], [1, 3]))
"""Transport, rows asked for ahead, servers."""


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, data: Path) -> RunConfig:
    """Both drafts, two epochs, evaluated on the way: what every other placement has to repeat."""
    torch.set_num_threads(1)
    config = run_config(tmp_path_factory.mktemp("inline") / "run", tiny_target, data, **EPOCHS)
    assert run(config).status == "finished"
    assert len(losses(config)) >= 8
    return config


def remote_config(inline: RunConfig, run_dir: Path, urls: list[str], **changes: Any) -> RunConfig:
    return run_config(
        run_dir,
        Path(inline.target.model),
        Path(inline.data.train).parent,
        **{**EPOCHS, "placement__target": "urls", "placement__urls": urls, **changes},
    )


def assert_equal_runs(one: RunConfig, other: RunConfig) -> None:
    assert losses(one) == losses(other)
    assert evaluations(one) == evaluations(other)
    assert same_weights(one, other)


def evaluations(config: RunConfig) -> list[Any]:
    return [(line["step"], line["drafts"]) for line in lines(config, "eval")]


@pytest.mark.parametrize(
    ("transport", "prefetch_rows", "num_servers"),
    [pytest.param(*one, marks=[] if one in IN_CI else [pytest.mark.long]) for one in EVERY_ONE],
)
def test_servers_elsewhere_change_nothing_but_the_speed(
    inline: RunConfig,
    target_servers: list[Served],
    tmp_path: Path,
    transport: str,
    prefetch_rows: int,
    num_servers: int,
) -> None:
    urls = [server.url for server in target_servers[:num_servers]]
    config = remote_config(
        inline, tmp_path / "run", urls, transport__kind=transport, transport__prefetch_rows=prefetch_rows
    )
    assert run(config).status == "finished"
    assert_equal_runs(inline, config)
    if prefetch_rows > 1:
        assert share_asked_ahead(config) >= 0.95


def share_asked_ahead(config: RunConfig) -> float:
    """Of the steps: those in which each row was handed out when the next one had been asked for."""
    not_ahead = [0, *(line["stream"]["rows_not_asked_ahead"] for line in lines(config))]
    return sum(now == before for before, now in itertools.pairwise(not_ahead)) / (len(not_ahead) - 1)


@pytest.mark.long
@pytest.mark.parametrize(("transport", "prefetch_rows", "num_servers"), EVERY_ONE)
def test_interrupted_in_the_middle_every_combination_ends_the_same(
    inline: RunConfig,
    target_servers: list[Served],
    tmp_path: Path,
    transport: str,
    prefetch_rows: int,
    num_servers: int,
) -> None:
    urls = [server.url for server in target_servers[:num_servers]]
    changes = {"transport__kind": transport, "transport__prefetch_rows": prefetch_rows}
    config = remote_config(inline, tmp_path / "run", urls, **changes)
    assert run(config, StopsAfter(29)).status == "stopped"
    assert 0 < len(losses(config)) < len(losses(inline))
    assert run(config).status == "finished"
    assert_equal_runs(inline, config)


@pytest.mark.long
def test_the_target_in_the_same_process_may_be_asked_for_one_row_at_a_time(inline: RunConfig, tmp_path: Path) -> None:
    data = Path(inline.data.train).parent
    config = run_config(tmp_path / "run", Path(inline.target.model), data, **EPOCHS, transport__prefetch_rows=1)
    assert inline.transport.prefetch_rows == 4
    assert run(config).status == "finished"
    assert_equal_runs(inline, config)


@pytest.mark.long
@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("prefetch_rows", [1, 4])
def test_features_from_disk_change_nothing_either(
    inline: RunConfig, tmp_path: Path, prefetch_rows: int, interrupted: bool
) -> None:
    options = RecordOptions(tmp_path / "recording", False)
    assert record(inline, options, QuietSignals(), Console(file=io.StringIO())).manifest.complete
    config = run_config(
        tmp_path / "run",
        Path("no target"),
        Path("no data"),
        **EPOCHS,
        placement__target="recorded",
        data__recorded=str(tmp_path / "recording"),
        transport__prefetch_rows=prefetch_rows,
    )
    if interrupted:
        assert run(config, StopsAfter(29)).status == "stopped"
    assert run(config).status == "finished"
    assert_equal_runs(inline, config)
    balances = [line["balance"] for line in lines(config) if "balance" in line]
    assert balances
    assert all(one["limit"] in ("disk", "trainers") and "rows from disk" in one["text"] for one in balances)


@pytest.mark.long
def test_two_jobs_share_a_pool_and_know_nothing_of_each_other(
    inline: RunConfig, target_servers: list[Served], commands: Commands, tmp_path: Path
) -> None:
    """One asks for one row at a time, the other for eight, by another transport and with another seed."""
    data, target = Path(inline.data.train).parent, Path(inline.target.model)
    alone = run_config(tmp_path / "alone", target, data, **EPOCHS, seed=7)
    assert run(alone).status == "finished"
    urls = [server.url for server in target_servers]
    one = remote_config(inline, tmp_path / "one", urls, transport__kind="http", transport__prefetch_rows=1)
    other = remote_config(inline, tmp_path / "other", urls, transport__kind="gloo", transport__prefetch_rows=8, seed=7)
    started = [start(commands, config) for config in (one, other)]
    for command in started:
        assert command.wait() == 0, command.output
    times = [[line["time"] for line in lines(config)] for config in (one, other)]
    assert max(times[0][0], times[1][0]) < min(times[0][-1], times[1][-1]), "the premise: they ran at the same time"
    assert_equal_runs(one, inline)
    assert_equal_runs(other, alone)


def start(commands: Commands, config: RunConfig) -> Any:
    file = Path(config.run_dir).with_suffix(".toml")
    file.write_text(tomli_w.dumps(json.loads(config.model_dump_json(exclude_none=True))))
    return commands.start("train", str(file))


@pytest.mark.long
def test_a_target_over_two_processes_is_the_same_in_every_placement_and_nearly_that_of_one(
    inline: RunConfig, commands: Commands, tiny_target: Path, tmp_path: Path
) -> None:
    servers = start_servers(commands, tiny_target, tmp_path, 2, "--tensor-parallel", "2")
    urls = [server.url for server in servers]
    runs = [
        remote_config(
            inline,
            tmp_path / f"{transport}-{prefetch_rows}",
            urls[:num_servers],
            transport__kind=transport,
            transport__prefetch_rows=prefetch_rows,
            target__tensor_parallel=2,
        )
        for transport, prefetch_rows, num_servers in (("http", 1, 1), ("http", 4, 2), ("file", 4, 2), ("gloo", 4, 2))
    ]
    for config in runs:
        assert run(config).status == "finished"
        assert_equal_runs(runs[0], config)
    for here, there in zip(losses(inline), losses(runs[0]), strict=True):
        for draft, loss in here.items():
            assert there[draft] == pytest.approx(loss, rel=1e-5)
    for server in servers:
        server.command.send_signal(signal.SIGTERM)
        assert server.command.wait(10) in (0, 128 + signal.SIGTERM)


def test_a_run_interrupted_in_the_middle_goes_on_as_if_nothing_had_been(
    inline: RunConfig, target_servers: list[Served], tmp_path: Path
) -> None:
    config = remote_config(inline, tmp_path / "run", [server.url for server in target_servers])
    first = run(config, StopsAfter(7))
    assert first.status == "stopped"
    assert 0 < first.step < len(losses(inline))
    assert run(config).status == "finished"
    assert_equal_runs(inline, config)


def test_a_run_may_move_from_one_placement_to_another(
    inline: RunConfig, target_servers: list[Served], tmp_path: Path
) -> None:
    config = remote_config(inline, tmp_path / "run", [target_servers[0].url])
    assert run(config, StopsAfter(7)).status == "stopped"
    here = run_config(tmp_path / "run", Path(inline.target.model), Path(inline.data.train).parent, **EPOCHS)
    assert run(here).status == "finished"
    assert_equal_runs(inline, here)
