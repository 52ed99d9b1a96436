"""An algorithm that another package brings: found by its entry point, with settings of its own."""

import textwrap
from pathlib import Path

import pytest

from paceline.config.loading import build_config, dump_config, load_config
from paceline.drafts.registry import build_algorithm, load_algorithm
from paceline.drafts.sequence import SequenceGroup
from paceline.errors import ConfigError
from rows import make_context, tiny_info

MODULE = """
from typing import Literal
from pydantic import Field
from paceline.config.drafts import Eagle3Config
from paceline.drafts.eagle3.algorithm import Eagle3


class OtherConfig(Eagle3Config):
    \"\"\"EAGLE-3 under another name.\"\"\"

    algorithm: Literal["other"] = "other"
    patience: int = Field(3, ge=1)
    \"\"\"A setting of its own.\"\"\"


class Other(Eagle3):
    name = "other"
    config_class = OtherConfig


class Unfinished(Eagle3):
    config_class = None


class AloneConfig(Eagle3Config):
    \"\"\"EAGLE-3 that knows nothing of other ranks.\"\"\"

    algorithm: Literal["alone"] = "alone"


class Alone(Eagle3):
    name = "alone"
    config_class = AloneConfig
    shares_rows = False
"""
TABLE = {
    "run_dir": "run",
    "target": {"model": "m"},
    "data": {"train": "d"},
    "drafts": {"one": {"algorithm": "other", "patience": 5}, "two": {"algorithm": "dflash"}},
}


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other_algorithm.py").write_text(textwrap.dedent(MODULE))
    facts = tmp_path / "other_algorithm-0.1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: other-algorithm\nVersion: 0.1\n")
    (facts / "entry_points.txt").write_text(
        "[paceline.algorithms]\nother = other_algorithm:Other\nunfinished = other_algorithm:Unfinished\n"
        "alone = other_algorithm:Alone\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


def test_its_settings_are_checked_and_survive_a_round_trip(tmp_path: Path):
    config = build_config(TABLE)
    assert config.drafts["one"].patience == 5
    assert config.drafts["one"].num_depths == 7
    (tmp_path / "run.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.toml") == config
    assert load_algorithm("other").config_class is type(config.drafts["one"])


def test_a_misspelt_setting_of_it_is_named_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"drafts.one.patients: unknown key; did you mean 'patience'"):
        build_config(TABLE | {"drafts": {"one": {"algorithm": "other", "patients": 5}}})


def test_a_class_without_settings_is_refused():
    with pytest.raises(ConfigError, match=r"'unfinished'.*config_class = None"):
        build_config(TABLE | {"drafts": {"one": {"algorithm": "unfinished"}}})


def test_an_algorithm_nobody_brings_is_refused_with_those_that_are_there():
    with pytest.raises(ConfigError, match=r"algorithm = 'nothing': unknown; one of eagle3, dflash"):
        build_config(TABLE | {"drafts": {"one": {"algorithm": "nothing"}}})


def test_one_that_trains_whole_rows_only_is_refused_where_ranks_share_them():
    drafts = build_config(TABLE | {"drafts": {"alone": {"algorithm": "alone"}, "other": {"algorithm": "other"}}}).drafts
    shared = make_context(tiny_info(), sequence=SequenceGroup(None, 0, 2))  # type: ignore[arg-type]
    assert build_algorithm(drafts["other"], shared).shares_rows
    with pytest.raises(ConfigError, match=r"'alone' trains whole rows only, training.sequence_parallel = 2"):
        build_algorithm(drafts["alone"], shared)
    assert build_algorithm(drafts["alone"], make_context(tiny_info())).name == "alone"
