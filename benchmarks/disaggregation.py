"""`pipeline-8b`: target on one GPU, trainer on another: step times by transport and look-ahead, beside inline.

    python benchmarks/make_random_target.py /tmp/target-8b
    python benchmarks/disaggregation.py /tmp/target-8b --drafts eagle3 dflash --transports nccl http

Servers are processes started by `paceline serve`; the trainer takes its rows from the stream of a real run. For each
draft it measures what the trainer could do with rows at hand (demand), what the servers deliver to a trainer that only
drops them (supply), then training itself. "of bound" is training against the slower of the two.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paceline.client.budget import PrefetchBudget
from paceline.client.connection import LocalConnection
from paceline.client.pool import FeaturePool
from paceline.client.remote import RemoteConnection
from paceline.client.server_list import FixedServers, ServerList
from paceline.client.stream import FeatureStream
from paceline.config.drafts import DFlashConfig, Eagle3Config
from paceline.config.placement import PoolConfig, TransportConfig
from paceline.config.run_dir import RunDir
from paceline.config.target import TargetConfig
from paceline.config.training import TrainingConfig
from paceline.drafts.interface import DraftAlgorithm, DraftContext
from paceline.drafts.registry import load_algorithm
from paceline.drafts.vocabulary import DraftVocabulary
from paceline.launch.warm_up import compile_drafts
from paceline.observe.metrics import MetricsWriter
from paceline.schema.features import FeatureRow, FeatureSpec
from paceline.schema.rows import Row
from paceline.schema.target_info import TargetInfo
from paceline.target.admission import Admission
from paceline.target.hf.engine import HFEngine
from paceline.target.hf.weights import CheckpointWeights
from paceline.training.checkpoint import CheckpointStore
from paceline.training.ranks import Ranks
from paceline.training.step_record import DeviceClock
from paceline.training.trainer import Outputs, Trainer
from paceline.transport.local import LocalReceiver, LocalSender
from shapes import random_row

ROWS = {"eagle3": [1024] * 8, "dflash": [3072] * 2}
WARM_UP_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Fed:
    """Where a trainer's rows come from."""

    where: str
    num_servers: int
    transport: str
    prefetch: int
    num_gpus: int
    """Of servers and trainer."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One line of the table."""

    draft: str
    fed: Fed
    seconds_per_step: list[float]
    tokens_per_row: int
    trainer_busy: float
    """Share of the time the trainer's device works on the draft; it waits for the rest."""
    server_busy: float
    """Share of the time a server computes a row, from the replies' own figures; the mean over servers."""
    bytes_per_token: float
    bound: float | None

    def cells(self) -> list[str]:
        seconds = statistics.median(self.seconds_per_step)
        rate = self.tokens_per_row / seconds
        return [
            self.draft,
            self.fed.where,
            self.fed.transport,
            str(self.fed.prefetch),
            f"{seconds:.4f}",
            f"{min(self.seconds_per_step):.4f}-{max(self.seconds_per_step):.4f}",
            f"{rate:,.0f}",
            f"{rate / self.fed.num_gpus:,.0f}",
            f"{self.trainer_busy:.0%}",
            f"{self.server_busy:.0%}",
            f"{self.bytes_per_token / 1e3:.1f}",
            "" if self.bound is None else f"{rate / self.bound:.1%}",
        ]


HEADINGS = [
    *("draft", "target", "transport", "prefetch", "s/step", "spread"),
    *("tokens/s", "tokens/s/GPU", "trainer busy", "server busy", "kB/token", "of bound"),
]


def row_at(lengths: list[int], share: float, vocab: int) -> Callable[[int], Row]:
    """Rows of a stream: 64 different ones, over and over."""

    def row(position: int) -> Row:
        return dataclasses.replace(random_row(lengths, share, vocab, position % 64), position=position)

    return row


@contextlib.contextmanager
def serve(model: str, devices: list[str], words: list[str]) -> Iterator[list[str]]:
    """URLs of servers, one a device, started with these words besides, while the block runs."""
    with tempfile.TemporaryDirectory() as private:
        processes, files = [], []
        for number, device in enumerate(devices):
            file = Path(private) / f"{number}.json"
            where = ["--port", "0", "--device", device, "--ready-file", str(file)]
            command = [sys.executable, "-m", "paceline.cli", "serve", model, *where, *words]
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT))
            files.append(file)
        try:
            while not all(file.exists() for file in files):
                ended = [process.returncode for process in processes if process.poll() is not None]
                if ended:
                    raise SystemExit(f"a server ended: {ended}")
                time.sleep(0.2)
            yield [json.loads(file.read_text())["url"] for file in files]
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait(20)


def build_draft(name: str, model: str, info: TargetInfo, device: torch.device, eager: bool) -> DraftAlgorithm:
    config = Eagle3Config(vocab_size=32000) if name == "eagle3" else DFlashConfig()
    size = min(32000, info.vocab_size) if name == "eagle3" else info.vocab_size
    context = DraftContext(
        info=info,
        weights=CheckpointWeights(TargetConfig(model=model), device, torch.bfloat16),
        vocabulary=DraftVocabulary(np.arange(size, dtype=np.int64), info.vocab_size),
        device=device,
        dtype=torch.bfloat16,
        seed=0,
        compile=not eager,
    )
    algorithm = load_algorithm(name)(config, context)
    if not eager:
        compile_drafts({name: algorithm}, sum(ROWS[name]))
    return algorithm


def steps_of(stream: Iterator[FeatureRow], trainer: Trainer, num_steps: int) -> tuple[float, float]:
    """(wall seconds, seconds the device worked for the draft) of `num_steps` steps of one row."""
    begin = time.perf_counter()
    records = [trainer.train_step([next(stream)]) for _ in range(num_steps)]
    finish(next(iter(trainer.drafts.values())).context.device)
    wall = time.perf_counter() - begin
    return wall, sum(DeviceClock.seconds(start, end) for record in records for _, start, end in record.marks)


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build_trainer(name: str, draft: DraftAlgorithm, directory: Path) -> Trainer:
    run = RunDir(directory)
    ranks = Ranks(threading.Event())
    store = CheckpointStore(run, "benchmark", 1, asynchronous=False, ranks=ranks)
    outputs = Outputs(MetricsWriter(run.metrics), store, run.profile)
    config = TrainingConfig(compile=True, max_steps=100_000)
    stream: Any = _Nothing()
    return Trainer(config, {name: draft}, stream, 100_000, lambda step: {}, outputs, ranks)


class _Nothing:
    """The trainer's own stream, which the benchmark does not use."""

    def __iter__(self) -> Iterator[FeatureRow]:
        return iter(())

    def state_dict(self) -> dict[str, int]:
        return {"position": 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise NotImplementedError


@contextlib.contextmanager
def stream_from(
    servers: ServerList, spec: FeatureSpec, info: TargetInfo, rows: Callable[[int], Row], prefetch: int
) -> Iterator[tuple[FeatureStream, FeaturePool]]:
    pool = FeaturePool(servers, {"training": spec}, PoolConfig(), info)
    stream = FeatureStream(rows, pool, PrefetchBudget(prefetch, 64 << 30), "training", range(1_000_000))
    try:
        yield stream, pool
    finally:
        stream.close()
        pool.close()


def remote_servers(urls: list[str], transport: str, prefetch: int, device: torch.device) -> FixedServers:
    settings = TransportConfig(kind=transport, prefetch_rows=prefetch)
    return FixedServers({url: lambda url=url: RemoteConnection(url, settings, PoolConfig(), device) for url in urls})  # type: ignore[misc]


class Bench:
    """One draft: its trainer, and every way to feed it."""

    def __init__(self, name: str, arguments: argparse.Namespace, info: TargetInfo, device: torch.device) -> None:
        self.name, self.arguments, self.info, self.device = name, arguments, info, device
        self.draft = build_draft(name, arguments.model, info, device, arguments.eager)
        self.spec = type(self.draft).feature_spec(self.draft.config, info)
        self.lengths = ROWS[name]
        self.rows = row_at(self.lengths, arguments.share, min(32000, info.num_tokenizer_tokens))
        self.trainer = build_trainer(name, self.draft, Path(tempfile.mkdtemp()))

    def demand(self, servers: ServerList) -> float:
        """Tokens/s of training on rows that are there already."""
        with stream_from(servers, self.spec, self.info, self.rows, 3) as (stream, _):
            kept = [_own(next(stream)) for _ in range(2)]
        again = (kept[number % 2] for number in range(1_000_000))
        steps_of(again, self.trainer, WARM_UP_STEPS)
        seconds = [steps_of(again, self.trainer, 10)[0] / 10 for _ in range(3)]
        return sum(self.lengths) / statistics.median(seconds)

    def supply(self, servers: ServerList, prefetch: int) -> float:
        """Tokens/s that arrive on the trainer's device when nobody trains."""
        with stream_from(servers, self.spec, self.info, self.rows, prefetch) as (stream, _):
            for _ in range(WARM_UP_STEPS):
                next(stream)
            begin = time.perf_counter()
            for _ in range(self.arguments.steps):
                next(stream)
            finish(self.device)
            return float(self.arguments.steps * sum(self.lengths) / (time.perf_counter() - begin))

    def remote(self, urls: list[str]) -> None:
        """Every combination of transport, number of servers and look-ahead; then the long run."""
        arguments, device = self.arguments, self.device
        demand = self.demand(remote_servers(urls[:1], "http", 3, device))
        print(f"{self.name}: demand {demand:,.0f} tokens/s", flush=True)
        bounds = {}
        for transport in arguments.transports:
            for num in arguments.num_servers:
                supply = self.supply(remote_servers(urls[:num], transport, 4, device), 4)
                print(f"{self.name}, {transport}, {num} servers: supply {supply:,.0f} tokens/s", flush=True)
                bounds[transport, num] = min(demand, supply)
                for prefetch in arguments.prefetch:
                    servers = remote_servers(urls[:num], transport, prefetch, device)
                    fed = Fed(f"{num} server(s)", num, transport, prefetch, 1 + num)
                    self.train(fed, servers, arguments.steps, bounds[transport, num])
        if arguments.long_steps:
            transport, num, prefetch = arguments.transports[0], arguments.num_servers[0], max(arguments.prefetch)
            fed = Fed(f"{num} server(s), long", num, transport, prefetch, 1 + num)
            servers = remote_servers(urls[:num], transport, prefetch, device)
            self.train(fed, servers, arguments.long_steps, bounds[transport, num])

    def train(self, fed: Fed, servers: ServerList, num_steps: int, bound: float | None = None) -> None:
        """Time `repeats` times `num_steps` steps and print their line."""
        with stream_from(servers, self.spec, self.info, self.rows, fed.prefetch) as (stream, pool):
            steps_of(stream, self.trainer, WARM_UP_STEPS)
            computed_s, num_bytes = pool.stats.computed_s, stream.stats.bytes_received
            timed = [steps_of(stream, self.trainer, num_steps) for _ in range(self.arguments.repeats)]
            computed_s, num_bytes = pool.stats.computed_s - computed_s, stream.stats.bytes_received - num_bytes
        wall = sum(seconds for seconds, _ in timed)
        num_tokens = sum(self.lengths) * num_steps * len(timed)
        measured = Measured(
            self.name,
            fed,
            [seconds / num_steps for seconds, _ in timed],
            sum(self.lengths),
            sum(device for _, device in timed) / wall,
            computed_s / wall / fed.num_servers,
            num_bytes / num_tokens,
            bound,
        )
        print("| " + " | ".join(measured.cells()) + " |", flush=True)


def _own(row: FeatureRow) -> FeatureRow:
    """A copy that outlives the stream."""
    kept: dict[str, Any] = {name: tensor.clone() for name, tensor in row.features.tensors().items()}
    features = dataclasses.replace(row.features, **kept)
    return FeatureRow(row.row, features)


def build_benches(arguments: argparse.Namespace, info: TargetInfo, device: torch.device) -> list[Bench]:
    return [Bench(name, arguments, info, device) for name in arguments.drafts]


@contextlib.contextmanager
def inline_servers(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[FixedServers, TargetInfo]]:
    engine = HFEngine(TargetConfig(model=arguments.model, device=str(device), compile=not arguments.eager))
    admission = Admission(engine)
    try:
        inline = FixedServers({"inline": lambda: LocalConnection(admission, LocalSender(), LocalReceiver(device))})
        yield inline, engine.info()
    finally:
        admission.close()
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--drafts", nargs="+", default=["eagle3", "dflash"])
    parser.add_argument("--transports", nargs="+", default=["nccl", "http"])
    parser.add_argument("--prefetch", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--server-devices", nargs="+", default=["cuda:0"])
    parser.add_argument("--num-servers", nargs="+", type=int, default=[1], help="how many of them serve at once")
    parser.add_argument("--trainer-device", default="cuda:1")
    parser.add_argument("--share", type=float, default=0.6, help="supervised share of every document")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long-steps", type=int, default=0, help="steps of one more measurement with most look-ahead")
    parser.add_argument("--eager", action="store_true", help="compile neither target nor drafts")
    parser.add_argument("--server-words", help='of `paceline serve` instead of --compile: "--engine vllm -- --seed 1"')
    parser.add_argument("--placements", nargs="+", default=["remote", "inline"])
    arguments = parser.parse_args()
    device = torch.device(arguments.trainer_device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    benches: list[Bench] = []
    print("| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS), flush=True)
    if "remote" in arguments.placements:
        words = shlex.split(arguments.server_words) if arguments.server_words else []
        words = words or ([] if arguments.eager else ["--compile"])
        with serve(arguments.model, arguments.server_devices, words) as urls:
            connection = RemoteConnection(urls[0], TransportConfig(kind="http"), PoolConfig(), device)
            benches = build_benches(arguments, connection.info(), device)
            connection.close()
            for bench in benches:
                bench.remote(urls)
    if "inline" in arguments.placements:
        with inline_servers(arguments, device) as (servers, info):
            for bench in benches or build_benches(arguments, info, device):
                for prefetch in arguments.prefetch:
                    bench.train(Fed("inline", 1, "local", prefetch, 1), servers, arguments.steps)
    if device.type == "cuda":
        print(f"peak of the trainer's GPU {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
