"""GB/s of a p2p channel between two processes: `python benchmarks/p2p.py [--kind nccl] [--mib 16 64 256 1024]`.

Rows whose features are ready are packed, announced, sent, received and released as in a run, `--in-flight` at a time;
headers travel through pipes, so that HTTP is not measured. Beside each stands raw `torch.distributed` send and recv of
as many bytes, between the same two processes; both take turns in one run. nccl needs two GPUs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection as Pipe
from threading import Lock, Thread

import torch
from torch import distributed

from paceline.schema.features import Features
from paceline.schema.layout import layout_bytes
from paceline.schema.protocol import ReplyHeader, StoreCall, StoreReply
from paceline.transport.base import Incoming, Reply, Sender
from paceline.transport.buffers import HostBuffers
from paceline.transport.feature_bytes import describe
from paceline.transport.negotiation import SenderRequest, host_facts
from paceline.transport.p2p.communicator import P2PName
from paceline.transport.p2p.opening import P2PSenders, offer_p2p, open_p2p_receiver
from paceline.transport.p2p.receiver import P2PReceiver

HIDDEN_SIZE, NUM_LAYERS = 4096, 4
STALL_TIMEOUT_S = 60.0
SERVER, CLIENT = 0, 1


def ready_features(num_bytes: int, device: torch.device) -> Features:
    num_tokens = num_bytes // (2 * NUM_LAYERS * HIDDEN_SIZE)
    return Features(
        layers=tuple(range(NUM_LAYERS)),
        hidden=torch.ones((num_tokens, NUM_LAYERS, HIDDEN_SIZE), dtype=torch.bfloat16, device=device),
        greedy=None,
        final_hidden=None,
        final_index=None,
        logsumexp=None,
        row_hash="0" * 64,
        finite=True,
    )


def device_of(kind: P2PName, rank: int) -> torch.device:
    if kind == "gloo":
        return torch.device("cpu")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def join_group(kind: P2PName, rank: int, port: int) -> None:
    """The raw side: torch's own group of the two."""
    store = distributed.TCPStore("127.0.0.1", port, 2, is_master=rank == SERVER)  # type: ignore[attr-defined]
    distributed.init_process_group(kind, store=store, rank=rank, world_size=2)


def serve(kind: P2PName, port: int, pipes: list[Pipe]) -> None:
    """The server's process: pipe 0 takes orders, the others ask for rows."""
    torch.set_num_threads(1)
    device = device_of(kind, SERVER)
    join_group(kind, SERVER, port)
    buffers = HostBuffers(8 << 30, pinned=device.type == "cuda")
    parameters, client = pipes[0].recv()
    opened = P2PSenders(kind, buffers)(SenderRequest(parameters, client, host_facts(device), "benchmark", device))
    kept: dict[int, Features] = {}
    one_at_a_time = Lock()
    for pipe in pipes[1:]:
        Thread(target=answer_rows, args=(pipe, opened.sender, kept, one_at_a_time), daemon=True).start()
    pipes[0].send(host_facts(device))
    while (order := pipes[0].recv()) is not None:
        if isinstance(order, StoreCall):
            assert opened.rendezvous is not None
            pipes[0].send(opened.rendezvous.answer(order))
            continue
        num_bytes, num_rows = order
        if num_bytes not in kept:
            kept.clear()
            kept[num_bytes] = ready_features(num_bytes, device)
        memory = kept[num_bytes].hidden.view(-1)
        pipes[0].send(None)
        for _ in range(num_rows):
            distributed.send(memory, CLIENT)
        wait_for(device)
    opened.sender.close()


def answer_rows(pipe: Pipe, sender: Sender[Reply], kept: dict[int, Features], one_at_a_time: Lock) -> None:
    """One connection: rows asked for one after the other. `send` is called for one row at a time."""
    while True:
        try:
            num_bytes = pipe.recv()
        except EOFError:
            return
        with one_at_a_time:
            reply = sender.send(0, kept[num_bytes])
        pipe.send_bytes(b"".join(reply.body))
        reply.sent(True)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Client:
    """The trainer's process, which measures."""

    def __init__(self, kind: P2PName, port: int, pipes: list[Pipe]) -> None:
        self.kind = kind
        self.device = device_of(kind, CLIENT)
        self.pipes = pipes
        facts = host_facts(self.device)
        parameters = offer_p2p(kind, facts, facts, "localhost", STALL_TIMEOUT_S)
        pipes[0].send((parameters, facts))
        join_group(kind, CLIENT, port)
        pipes[0].recv()
        buffers = HostBuffers(8 << 30, pinned=self.device.type == "cuda")
        self.receiver: P2PReceiver = open_p2p_receiver(kind, parameters, self.ask, buffers, self.device)
        self.receiver.connect()

    def ask(self, call: StoreCall) -> StoreReply:
        self.pipes[0].send(call)
        reply: StoreReply = self.pipes[0].recv()
        return reply

    def rows(self, num_bytes: int, num_rows: int, in_flight: int) -> float:
        """Seconds for rows by the channel."""
        _, layout = describe(0, ready_features(num_bytes, torch.device("meta")))

        def fetch(pipe: Pipe) -> None:
            for _ in range(num_rows // in_flight):
                buffer = self.receiver.reserve(layout_bytes(layout))
                pipe.send(num_bytes)
                header = ReplyHeader.model_validate_json(pipe.recv_bytes())
                delivery = self.receiver.receive(Incoming(header, layout, buffer, None))
                del buffer
                delivery.take()
                delivery.release()

        started = time.perf_counter()
        with ThreadPoolExecutor(in_flight) as pool:
            list(pool.map(fetch, self.pipes[1 : 1 + in_flight]))
        wait_for(self.device)
        return time.perf_counter() - started

    def raw(self, num_bytes: int, num_rows: int) -> float:
        """Seconds for as many bytes by torch.distributed, into one buffer."""
        memory = ready_features(num_bytes, self.device).hidden.view(-1)
        wait_for(self.device)
        self.pipes[0].send((num_bytes, num_rows))
        self.pipes[0].recv()
        started = time.perf_counter()
        for _ in range(num_rows):
            distributed.recv(memory, SERVER)
        wait_for(self.device)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("nccl", "gloo"), default="nccl")
    parser.add_argument("--mib", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--in-flight", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gib", type=float, default=16.0, help="per size and repeat")
    options = parser.parse_args()
    if options.kind == "nccl":
        assert torch.cuda.device_count() >= 2, "nccl needs two GPUs"
    torch.set_num_threads(1)
    context = get_context("spawn")
    ends = [context.Pipe() for _ in range(1 + options.in_flight)]
    port = 20_000 + os.getpid() % 20_000
    arguments = (options.kind, port, [theirs for _, theirs in ends])
    server = context.Process(target=serve, args=arguments, daemon=True)
    server.start()
    client = Client(options.kind, port, [ours for ours, _ in ends])
    print(f"{options.kind}, {options.in_flight} rows in flight, torch {torch.__version__}")
    for mib in options.mib:
        num_bytes = mib << 20
        num_rows = max(4, int(options.gib * 1024 / mib)) // options.in_flight * options.in_flight
        client.raw(num_bytes, 4)
        client.rows(num_bytes, 2 * options.in_flight, options.in_flight)
        rows, raw = [], []
        for _ in range(options.repeats):
            raw.append(num_rows * num_bytes / client.raw(num_bytes, num_rows) / 1e9)
            rows.append(num_rows * num_bytes / client.rows(num_bytes, num_rows, options.in_flight) / 1e9)
        ours, theirs = statistics.median(rows), statistics.median(raw)
        print(
            f"{mib:5d} MiB: rows {ours:7.2f} GB/s ({min(rows):.2f}-{max(rows):.2f}), raw send and recv {theirs:7.2f} "
            f"({min(raw):.2f}-{max(raw):.2f}): {100 * ours / theirs:.0f} %"
        )
    client.receiver.close()
    client.pipes[0].send(None)
    distributed.destroy_process_group()
    server.join(20)


if __name__ == "__main__":
    main()
