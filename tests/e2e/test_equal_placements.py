"""The same training run wherever the target is: losses of every step and final weights, bit by bit (N2)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.config.run import RunConfig
from served import Served
from whole_run import StopsAfter, lines, losses, run, run_config, same_weights, write_data

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
EPOCHS = {"training__num_epochs": 2, "training__eval_every": 4, "training__rows_per_step": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_train=96)


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
    ("transport", "prefetch_rows", "num_servers"), [("http", 1, 1), ("http", 4, 3), ("file", 4, 3), ("gloo", 4, 3)]
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
