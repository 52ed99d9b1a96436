"""Ports of an engine that listens on them a minute after they were chosen."""

import json
import socket
from pathlib import Path

import pytest

from paceline.target.engines import programs
from paceline.target.engines.programs import free_port
from paceline.target.sglang.kind import SGLANG


def test_a_port_for_later_is_none_that_the_system_gives_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "ip_local_port_range"
    monkeypatch.setattr(programs, "_GIVEN_PORTS", said)
    said.write_text("32768\t60999\n")
    assert {20_000 <= free_port() < 30_000 for _ in range(50)} == {True}
    said.write_text("20010\t60999\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 20_003))
        ports = {free_port() for _ in range(100)}
    assert ports <= set(range(20_000, 20_010)) - {20_003}
    assert len(ports) > 1


@pytest.mark.parametrize("said", ["1024 65535", "", None])
def test_where_the_system_gives_all_ports_away_any_free_one_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    path = tmp_path / "ip_local_port_range"
    if said is not None:
        path.write_text(said)
    monkeypatch.setattr(programs, "_GIVEN_PORTS", path)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))


def test_sglang_gets_the_ports_that_it_would_choose_too_early_or_wrong(tmp_path: Path) -> None:
    words, variables = SGLANG.own_words("secret", tmp_path)
    config = json.loads(Path(words[-1]).read_text())
    assert config["api-key"] == "secret"
    assert 0 < config["nccl-port"] < 65_536
    assert 0 < int(variables["SGLANG_GRPC_PORT"]) < 65_536
    assert "secret" not in " ".join(words)
