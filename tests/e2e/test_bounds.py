"""Bounds of real servers and their clients: memory after many rows and before a slow reader, calls beside features."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch

from forking import Commands
from paceline.client.budget import PrefetchBudget
from paceline.client.calls import ServerCalls
from paceline.client.pool import FeaturePool
from paceline.client.remote import RemoteConnection
from paceline.client.server_list import FixedServers
from paceline.client.stream import FeatureStream
from paceline.config.placement import PoolConfig, TransportConfig
from paceline.config.run import RunConfig
from paceline.schema.features import FeatureSpec
from paceline.schema.protocol import SessionReply
from paceline.schema.rows import Row
from served import Served, start_servers
from talk import Talk
from tiny import VOCAB_SIZE, save_tiny_target
from whole_run import lines, losses, run, run_config, same_weights, write_data

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.long]
CPU = torch.device("cpu")
SPEC = FeatureSpec((1, 3), final_hidden="all", greedy=True)


def random_row(num_tokens: int, position: int) -> Row:
    """One document of random tokens, half of them supervised."""
    return Row(
        position=position,
        epoch=0,
        row_id=position,
        tokens=np.random.default_rng(position).integers(0, VOCAB_SIZE, num_tokens, dtype=np.int32),
        documents=np.array([0, num_tokens], np.int32),
        spans=np.array([[num_tokens // 2, num_tokens]], np.int32),
        span_cut=np.zeros(1, bool),
        sample_ids=np.array([position]),
        pieces=np.zeros(1, np.int32),
    )


@contextmanager
def stream_over(url: str, num_rows: int, num_tokens: int, **transport: Any) -> Iterator[FeatureStream]:
    """Rows of `num_tokens` from the server at `url`."""
    settings, pool_settings = TransportConfig(**transport), PoolConfig()
    servers = FixedServers({url: lambda: RemoteConnection(url, settings, pool_settings, CPU)})
    pool = FeaturePool(servers, {"training": SPEC}, pool_settings)
    budget = PrefetchBudget(settings.prefetch_rows, settings.prefetch_bytes)
    stream = FeatureStream(partial(random_row, num_tokens), pool, budget, "training", range(num_rows))
    try:
        yield stream
    finally:
        stream.close()
        pool.close()


def resident_bytes(pid: int | str) -> int:
    """RSS of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS:"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["http", "file", "gloo"])
def test_memory_after_ten_thousand_rows_is_that_after_one_thousand(
    target_servers: list[Served], kind: str, record_property: Any
) -> None:
    server = target_servers[0]
    after: dict[int, tuple[int, int]] = {}
    with stream_over(server.url, 10_000, 32, kind=kind, stall_timeout_s=300.0) as stream:
        for number, row in enumerate(stream, start=1):
            assert row.row.position == number - 1
            if number in (1000, 10_000):
                after[number] = (resident_bytes(server.command.pid), resident_bytes("self"))
    record_property("resident bytes of server and client", after)
    for early, late in zip(after[1000], after[10_000], strict=True):
        assert late <= 1.05 * early, after


WIDE = {"hidden_size": 512, "intermediate_size": 256}
UNSENT_BYTES, PREFETCH_BYTES = 40 << 20, 60 << 20
SLACK_BYTES = 48 << 20
"""What a forward needs besides, and what uvicorn and the allocator keep; the kernel's buffers do not count."""


@pytest.fixture(scope="module")
def wide_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_target(tmp_path_factory.mktemp("wide") / "qwen3", **WIDE)


@pytest.fixture(scope="module")
def wide_server(commands: Commands, wide_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("wide-server")
    (server,) = start_servers(commands, wide_target, directory, 1, "--max-unsent-bytes", str(UNSENT_BYTES))
    yield server
    server.kill()


@pytest.mark.parametrize("kind", ["http", "gloo", "file"])
def test_a_reader_that_stops_reading_makes_nobody_grow_beyond_what_is_configured(
    wide_server: Served, tmp_path: Path, kind: str
) -> None:
    """Fifty rows of 25 MB may be asked for ahead, if it were only for their number."""
    settings = {"kind": kind, "prefetch_rows": 50, "prefetch_bytes": PREFETCH_BYTES, "directory": str(tmp_path)}
    with stream_over(wide_server.url, 100, 4096, **settings) as stream:
        for _ in range(6):
            next(stream)
        before = resident_bytes(wide_server.command.pid), resident_bytes("self")
        wait_until_settled(lambda: resident_bytes("self"), seconds=2.0)
        assert stream.stats.bytes_in_flight <= PREFETCH_BYTES
        grown = [
            resident_bytes(wide_server.command.pid) - before[0],
            resident_bytes("self") - before[1],
        ]
    assert grown[0] <= UNSENT_BYTES + SLACK_BYTES, grown
    assert grown[1] <= PREFETCH_BYTES + SLACK_BYTES, grown


@pytest.mark.parametrize("kind", ["http", "gloo", "file"])
def test_a_trainer_that_is_stopped_and_goes_on_grows_no_server_and_loses_nothing(
    commands: Commands, wide_target: Path, wide_server: Served, tmp_path: Path, kind: str
) -> None:
    """The server is stopped until every row is asked for; when it goes on, nobody takes what it computes."""
    data = write_data(tmp_path / "data", num_train=2000)
    draft = {"algorithm": "dflash", "num_layers": 1, "block_size": 4, "anchor_every": 64, "target_layers": [0, 1, 2]}
    changes = {"data__row_tokens": 4096, "training__max_steps": 28, "drafts": {"dflash": draft}}
    undisturbed = run_config(tmp_path / "undisturbed", wide_target, data, **changes)
    torch.set_num_threads(1)
    assert run(undisturbed).status == "finished"
    config = run_config(
        tmp_path / "run",
        wide_target,
        data,
        **changes,
        placement__target="urls",
        placement__urls=[wide_server.url],
        pool__health_timeout_s=120.0,
        transport__kind=kind,
        transport__prefetch_rows=16,
        transport__stall_timeout_s=120.0,
        transport__directory=str(tmp_path),
    )
    trainer = start(commands, config)
    assert trainer.wait_until(lambda: num_trained(config) >= 2, 120), trainer.output
    before = resident_bytes(wide_server.command.pid)
    wide_server.command.send_signal(signal.SIGSTOP)
    wait_until_settled(lambda: num_trained(config), seconds=8.0)
    trainer.send_signal(signal.SIGSTOP)
    wide_server.command.send_signal(signal.SIGCONT)
    most = max(resident_after(0.2, wide_server.command.pid) for _ in range(40))
    queued = Talk(wide_server.url).ask("GET", "/healthz").json()["queued_rows"]
    trainer.send_signal(signal.SIGCONT)
    assert trainer.wait(180) == 0, trainer.output
    limit = (2 if kind == "gloo" else 1) * UNSENT_BYTES + SLACK_BYTES
    stream = lines(config)[-1]["stream"]
    assert 16 * stream["bytes_received"] / 28 > 2 * limit, "the premise: what was asked for is far more"
    assert most - before <= limit
    if kind != "file":  # a row in a file has left the server
        assert queued > 0, "the premise: it has computed as much as it may, and more was asked for"
    assert losses(config) == losses(undisturbed)
    assert same_weights(config, undisturbed)


def wait_until_settled(value: Callable[[], int], seconds: float) -> None:
    """Return when `value()` has stayed the same for so long."""
    last, since = value(), time.monotonic()
    while time.monotonic() < since + seconds:
        time.sleep(0.2)
        if (now := value()) != last:
            last, since = now, time.monotonic()


def resident_after(seconds: float, pid: int) -> int:
    time.sleep(seconds)
    return resident_bytes(pid)


def start(commands: Commands, config: RunConfig) -> Any:
    file = Path(config.run_dir).with_suffix(".toml")
    file.write_text(tomli_w.dumps(json.loads(config.model_dump_json(exclude_none=True))))
    return commands.start("train", str(file))


def num_trained(config: RunConfig) -> int:
    return len(lines(config)) if (Path(config.run_dir) / "metrics.jsonl").exists() else 0


def test_a_hundred_control_calls_at_once_beside_features_of_a_target_over_two_processes(
    commands: Commands, tiny_target: Path, tmp_path: Path
) -> None:
    (server,) = start_servers(commands, tiny_target, tmp_path, 1, "--tensor-parallel", "2")
    calls = ServerCalls(server.url, TransportConfig(), PoolConfig())
    info, embedding = calls.info(), calls.weights("embedding")
    with stream_over(server.url, 200, 128, kind="http") as stream:
        alone = [row.features.hidden.clone() for row in stream]
    computing, beside = threading.Event(), []

    def compute() -> None:
        with stream_over(server.url, 200, 128, kind="http") as stream:
            for row in stream:
                beside.append(row.features.hidden.clone())
                computing.set()

    def control(number: int) -> None:
        own = ServerCalls(server.url, TransportConfig(), PoolConfig())
        talk = Talk(server.url)
        assert own.info() == info
        while (answer := talk.open(label=f"client {number}")).status == 429:  # 64 at a time
            time.sleep(0.05)
        session = SessionReply.model_validate_json(answer.body)
        rows = [number % VOCAB_SIZE, 3]
        assert torch.equal(own.weights("embedding", rows), embedding[rows])
        own.check_health()
        own.renew(session)
        assert b"paceline_sessions" in talk.ask("GET", "/metrics").body
        own.end(session)
        own.close()
        talk.close()

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        assert computing.wait(60)
        with ThreadPoolExecutor(100) as clients:
            for done in [clients.submit(control, number) for number in range(100)]:
                done.result(120)
    finally:
        thread.join(120)
    assert len(beside) == len(alone) == 200
    assert all(torch.equal(here, there) for here, there in zip(alone, beside, strict=True))
    server.command.send_signal(signal.SIGTERM)
    assert server.command.wait(10) in (0, 128 + signal.SIGTERM)
