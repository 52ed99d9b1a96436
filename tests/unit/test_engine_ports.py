"""Ports of an engine that listens on them a minute after they were chosen, and its sockets."""

import json
import socket
from pathlib import Path

import pytest

from paceline.config.target import TargetConfig
from paceline.target.engines import programs
from paceline.target.engines.programs import free_port
from paceline.target.sglang.kind import SGLANG
from paceline.target.vllm.kind import VLLM


def test_a_port_for_later_is_none_that_the_system_gives_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "ip_local_port_range"
    monkeypatch.setattr(programs, "_GIVEN_PORTS", said)
    said.write_text("32768\t60999\n")
    assert {20_000 <= free_port() < 30_000 for _ in range(50)} == {True}
    said.write_text("25000\t60999\n")
    assert {20_000 <= free_port() < 25_000 for _ in range(50)} == {True}


def test_a_port_that_somebody_listens_on_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))
        monkeypatch.setattr(programs, "_QUIET_PORTS", range(port, port + 1))
        monkeypatch.setattr(programs, "_first_given_port", lambda: 65_536)
        assert free_port() != port
    assert free_port() == port


@pytest.mark.parametrize("said", ["1024 65535", "", None])
def test_where_the_system_gives_all_ports_away_any_free_one_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    path = tmp_path / "ip_local_port_range"
    if said is not None:
        path.write_text(said)
    monkeypatch.setattr(programs, "_GIVEN_PORTS", path)
    for _ in range(50):
        port = free_port()
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
        assert port + 10_000 <= 65_535, "SGLang 0.5.14 takes another one there"


def test_sglang_gets_the_port_that_it_would_choose_too_early(tmp_path: Path) -> None:
    """None for its gRPC: the variable for it turns gRPC on from 0.5.16 on, which refuses keys."""
    words, variables = SGLANG.own_words(TargetConfig(model="m", engine="sglang"), "secret", tmp_path)
    config = json.loads(Path(words[-1]).read_text())
    assert config["api-key"] == "secret"
    assert variables == {}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", config["nccl-port"]))
    assert "secret" not in " ".join(words)


@pytest.mark.parametrize("name", ["dp-size", "dp", "data_parallel_size"])
def test_replicas_of_sglang_choose_ports_of_their_own(tmp_path: Path, name: str) -> None:
    config = TargetConfig(model="m", engine="sglang", engine_args={name: 2})
    words, _ = SGLANG.own_words(config, "secret", tmp_path)
    assert "nccl-port" not in json.loads(Path(words[-1]).read_text())


@pytest.mark.parametrize(
    ("directory", "there"), [("/dev/shm/paceline-vllm-abcdefgh", True), ("/scratch/" + 60 * "x", False)]
)
def test_vllms_sockets_lie_in_its_own_directory_where_their_names_have_room(directory: str, there: bool) -> None:
    _, variables = VLLM.own_words(TargetConfig(model="m", engine="vllm"), "secret", Path(directory))
    assert variables.get("VLLM_RPC_BASE_PATH") == (directory if there else None)
    assert variables["VLLM_API_KEY"] == "secret"
