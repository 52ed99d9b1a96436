"""The file that names a pool's servers: read when it changes, and never believed when it is damaged."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from paceline.client.connection import Connection
from paceline.client.server_list import ServersFile, write_servers


def connect(url: str) -> Connection:
    raise AssertionError("nothing is connected by reading a list")


def replace(path: Path, content: str) -> None:
    """As a manager of servers does it."""
    written = path.with_suffix(".new")
    written.write_text(content)
    written.replace(path)


def entries(*servers: dict[str, object]) -> str:
    return json.dumps({"servers": servers})


def test_a_list_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "servers.json"
    write_servers(path, ["http://a:1", "https://b:2"])
    servers = ServersFile(path, connect)
    assert list(servers.read()) == ["http://a:1", "https://b:2"]
    write_servers(path, ["https://b:2", "http://c:3"])
    assert list(servers.read()) == ["https://b:2", "http://c:3"]
    write_servers(path, [])
    assert list(servers.read()) == []


def test_an_entry_that_stays_keeps_its_connector_and_one_that_changes_gets_another(tmp_path: Path) -> None:
    path = tmp_path / "servers.json"
    replace(path, entries({"url": "http://a:1"}, {"url": "http://b:2", "started": 1}))
    servers = ServersFile(path, connect)
    before = dict(servers.read())
    assert dict(servers.read()) == before
    replace(path, entries({"url": "http://b:2", "started": 2}, {"url": "http://a:1"}))
    after = servers.read()
    assert after["http://a:1"] is before["http://a:1"]
    assert after["http://b:2"] is not before["http://b:2"]


@pytest.mark.parametrize(
    "damaged",
    [
        '{"servers": [{"url": "http',
        "[]",
        '{"servers": {"url": "http://a:1"}}',
        '{"servers": [{"port": 1}]}',
        '{"servers": [{"url": "a:1"}]}',
        '{"servers": [{"url": 5}]}',
        "\x00\xff",
        "",
    ],
)
def test_a_damaged_file_keeps_the_last_good_list_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: str
) -> None:
    path = tmp_path / "servers.json"
    write_servers(path, ["http://a:1"])
    servers = ServersFile(path, connect)
    servers.read()
    replace(path, damaged)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert list(servers.read()) == ["http://a:1"]
    assert len(caplog.records) == 1
    assert "the 1 servers of its last good version stay" in caplog.text
    write_servers(path, ["http://b:2"])
    assert list(servers.read()) == ["http://b:2"]


def test_a_file_that_is_missing_names_no_server_and_once_there_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "servers.json"
    servers = ServersFile(path, connect)
    with caplog.at_level(logging.WARNING):
        assert servers.read() == servers.read() == {}
    assert len(caplog.records) == 1
    write_servers(path, ["http://a:1"])
    assert list(servers.read()) == ["http://a:1"]
    path.unlink()
    assert list(servers.read()) == ["http://a:1"]
