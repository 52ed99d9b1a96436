"""GB/s of each transport between two processes of one host: `python benchmarks/transport.py [--mb 64 128 256]`.

A real server in a process of its own answers rows whose features are ready, and a real connection delivers them on the
CPU, `--in-flight` rows at a time. Beside each stands a raw copy of as many bytes through a socket, without checksum,
into memory that is ready; all take turns in one run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from multiprocessing import get_context
from multiprocessing.connection import Connection as Pipe

import numpy as np
import torch

from paceline.client.remote import RemoteConnection
from paceline.config.placement import PoolConfig, TransportConfig
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.layout import layout_bytes, reply_layout
from paceline.schema.limits import Limits
from paceline.schema.protocol import TransportName
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import RopeInfo, TargetInfo
from paceline.target.admission import Admission
from paceline.target.server.server import ServedTarget, TargetServer
from paceline.target.server.settings import ServerSettings
from paceline.transport.buffers import HostBuffers
from paceline.transport.file import FileSenders
from paceline.transport.http import HttpSender
from paceline.transport.negotiation import OpenedSender, OpenSender, host_facts

HIDDEN_SIZE, NUM_LAYERS, DTYPE = 4096, 4, "bfloat16"
SPEC = FeatureSpec(tuple(range(NUM_LAYERS)))
BYTES_PER_TOKEN = HIDDEN_SIZE * NUM_LAYERS * 2
CPU = torch.device("cpu")


def target_info() -> TargetInfo:
    return TargetInfo(
        name="ready",
        model_type="ready",
        num_layers=36,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=None,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=1000,
        num_tokenizer_tokens=1000,
        norm_eps=1e-6,
        rope=RopeInfo(),
        max_position_embeddings=1 << 20,
        dtype=DTYPE,
        tied_embeddings=False,
        weight_fingerprint="w",
        tokenizer_fingerprint="t",
        deterministic=True,
    )


class ReadyEngine:
    """Has computed everything before it is asked."""

    def __init__(self) -> None:
        self._hidden: dict[int, torch.Tensor] = {}

    def info(self) -> TargetInfo:
        return target_info()

    def limits(self) -> Limits:
        return Limits()

    def room(self) -> int:
        return 2

    def capture(self, request: RowRequest, spec: FeatureSpec) -> Future[Features]:
        num_tokens = len(request.tokens)
        if num_tokens not in self._hidden:
            shape = (num_tokens, NUM_LAYERS, HIDDEN_SIZE)
            self._hidden[num_tokens] = torch.randint(1 << 14, shape, dtype=torch.int16).view(torch.bfloat16)
        answer: Future[Features] = Future()
        hidden = self._hidden[num_tokens]
        answer.set_result(Features(spec.layers, hidden, None, None, None, None, request.row_hash(), finite=True))
        return answer

    def close(self) -> None:
        self._hidden.clear()


class NoTables:
    def table(self, name: str) -> None:
        del name


def row_senders() -> dict[TransportName, OpenSender]:
    buffers = HostBuffers(1 << 30)
    return {"http": lambda request: OpenedSender(HttpSender(buffers), {}), "file": FileSenders(buffers)}


def serve(pipe: Pipe) -> None:
    """In a process of its own: the target server, and the raw sender beside it."""
    engine = ReadyEngine()
    admission = Admission(engine)
    served = ServedTarget(admission, CPU, NoTables(), dict, host_facts(CPU), row_senders())
    server = TargetServer(served, ServerSettings())
    listening = socket.create_server(("127.0.0.1", 0))
    pipe.send((server.url, listening.getsockname()[1]))
    connected, _ = listening.accept()
    content = memoryview(np.random.default_rng(0).integers(0, 255, 256 << 20, dtype=np.uint8).data)
    while wanted := connected.recv(16):
        left = int(wanted)
        for start in range(0, left, 1 << 20):
            connected.sendall(content[start : min(left, start + (1 << 20))])
    server.stop()
    admission.close()


def row_request(num_tokens: int) -> RowRequest:
    return RowRequest(
        position=0,
        spec="training",
        tokens=np.zeros(num_tokens, np.int32),
        documents=np.array([0, num_tokens], np.int32),
        spans=np.zeros((0, 2), np.int32),
        positions=np.arange(num_tokens, dtype=np.int32)[None],
    )


@contextlib.contextmanager
def over(kind: str, url: str, in_flight: int) -> Iterator[Callable[[int, int], None]]:
    """What fetches a row of so many tokens by a transport."""
    transport = TransportConfig.model_validate({"kind": kind})
    connection = RemoteConnection(url, transport, PoolConfig(), CPU)
    connection.open_session({"training": SPEC})

    def fetch(num_tokens: int, num_rows: int) -> None:
        asked = deque(connection.request(row_request(num_tokens)) for _ in range(min(in_flight, num_rows)))
        for done in range(1, num_rows + 1):
            asked.popleft().result(60).release()
            if done + len(asked) < num_rows:
                asked.append(connection.request(row_request(num_tokens)))

    yield fetch
    connection.close()


@contextlib.contextmanager
def raw(port: int) -> Iterator[Callable[[int, int], None]]:
    connected = socket.create_connection(("127.0.0.1", port))
    memory = memoryview(np.zeros(256 << 20, np.uint8).data)

    def fetch(num_tokens: int, num_rows: int) -> None:
        for _ in range(num_rows):
            fetch_one(num_tokens)

    def fetch_one(num_tokens: int) -> None:
        num_bytes = layout_bytes(reply_layout(row_request(num_tokens), SPEC, target_info()))
        connected.sendall(f"{num_bytes:16}".encode())
        done = 0
        while done < num_bytes:
            done += connected.recv_into(memory[done : min(num_bytes, done + (1 << 20))])

    yield fetch
    connected.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--in-flight", type=int, default=3)
    parser.add_argument("--rows", type=int, default=6, help="of each repeat")
    parser.add_argument("--kinds", nargs="+", default=["http", "file"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    here, there = get_context("spawn").Pipe()
    child = get_context("spawn").Process(target=serve, args=(there,))
    child.start()
    url, port = here.recv()
    with contextlib.ExitStack() as stack:
        fetches = {"raw": stack.enter_context(raw(port))}
        fetches |= {kind: stack.enter_context(over(kind, url, arguments.in_flight)) for kind in arguments.kinds}
        print(f"{'MB':>5} {'by':>5} {'GB/s':>6} {'lowest':>7} {'highest':>8} {'of raw':>7}")
        for megabytes in arguments.mb:
            measure(fetches, (megabytes << 20) // BYTES_PER_TOKEN, arguments.rows, arguments.repeats)
    child.join(10)
    sys.stdout.flush()
    os._exit(0)


def measure(fetches: dict[str, Callable[[int, int], None]], num_tokens: int, num_rows: int, repeats: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in fetches}
    for repeat in range(repeats + 1):  # one to warm up
        for name, fetch in fetches.items():
            begin = time.perf_counter()
            fetch(num_tokens, num_rows)
            if repeat >= 1:
                seconds[name].append(time.perf_counter() - begin)
    row_bytes = num_tokens * BYTES_PER_TOKEN
    for name, taken in seconds.items():
        rates = sorted(num_rows * row_bytes / 1e9 / one for one in taken)
        ratio = statistics.median(raw / one for raw, one in zip(seconds["raw"], taken, strict=True))
        print(
            f"{row_bytes >> 20:>5} {name:>5} {statistics.median(rates):>6.2f} {rates[0]:>7.2f} {rates[-1]:>8.2f} "
            f"{ratio:>7.0%}"
        )


if __name__ == "__main__":
    main()
