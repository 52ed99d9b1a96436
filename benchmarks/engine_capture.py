"""What capture costs a production engine: tokens/s of plain prefill, and of the same prefill with hidden states taken.

    python benchmarks/make_random_target.py /tmp/target-8b
    python benchmarks/engine_capture.py /tmp/target-8b --python /opt/vllm/bin/python -- --max-model-len 4096
    python benchmarks/engine_capture.py /tmp/target-8b --engine sglang --python /opt/sglang/bin/python

Starts the engine twice with the same options, without and with capture, and sends the same documents, some at a time.
Plain requests ask for one token, as the capture's do. Then `paceline serve` is attached to the capturing engine, and
rows are fetched as a trainer fetches them. Last the `hf` engine on the same documents, packed into rows.

With --side-by-side both engines stay on one GPU and take turns: give each less than half of it
(`--gpu-memory-utilization 0.4 --kv-cache-memory-bytes 12G`). Every figure is one line of JSON in --out at once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # comes with accelerate
import torch
from safetensors.torch import load_file, save_file

from device_time import print_summary, profiler_flags, record_trace, summarise
from disaggregation import finish, remote_servers, row_at, serve, stream_from
from paceline.client.remote import RemoteConnection
from paceline.config.placement import PoolConfig, TransportConfig
from paceline.config.target import TargetConfig
from paceline.errors import PacelineError
from paceline.schema.features import FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.target.engines.flags import parse_flags, write_flags
from paceline.target.engines.http_calls import ENGINE_KEY, EngineCalls
from paceline.target.engines.interface import INSIDE, DocumentServer, EngineAddress
from paceline.target.engines.process import EngineProcess, private_directory
from paceline.target.engines.programs import EngineProgram, child_environment, find_program, free_port
from paceline.target.engines.starting import is_ready, start_engine
from paceline.target.hf.engine import HFEngine
from paceline.target.opening import ENGINES, engine_layers

Send = Callable[[np.ndarray], object]
NUM_WARM_UP_ROWS = 4


class Results:
    """Figures, printed with the time since the start and written at once."""

    def __init__(self, path: Path | None) -> None:
        self._begin_s, self._path = time.monotonic(), path

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begin_s:6.1f} s] {text}", flush=True)

    def record(self, what: str, **figures: Any) -> None:
        shown = ", ".join(
            f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
        )
        self.say(f"{what}: {shown}")
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"what": what, **figures}) + "\n")


@dataclass(frozen=True)
class Started:
    """An engine that may not be ready yet."""

    name: str
    process: EngineProcess
    is_ready: Callable[[], bool]
    connect: Callable[[], Send | AnswerTimes]
    """Once it is ready."""
    url: str
    address: EngineAddress | None = None
    """Of one that captures."""


def documents(arguments: argparse.Namespace) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(10, arguments.vocab, arguments.tokens, dtype=np.int32) for _ in range(arguments.documents)]


class AnswerTimes:
    """Of a capture: how long its answer took, beside how long all of it did; the rest is its files."""

    def __init__(self, server: DocumentServer) -> None:
        self.answered_s: list[float] = []
        self.captured_s: list[float] = []
        # The time of an answer is nobody's business but a benchmark's.
        self._server, calls = server, server._calls  # type: ignore[attr-defined]  # noqa: SLF001
        self._call, calls.call = calls.call, self._timed_call

    def capture(self, tokens: np.ndarray) -> object:
        begin = time.perf_counter()
        captured = self._server.capture(tokens)
        self.captured_s.append(time.perf_counter() - begin)
        return captured

    def record(self, results: Results) -> None:
        answered, captured = statistics.median(self.answered_s), statistics.median(self.captured_s)
        results.record("a captured document", answered_s=answered, read_s=captured - answered)
        self.answered_s.clear()
        self.captured_s.clear()

    def _timed_call(self, *words: Any) -> Any:
        begin = time.perf_counter()
        answer = self._call(*words)
        self.answered_s.append(time.perf_counter() - begin)
        return answer


def host_paths(arguments: argparse.Namespace, results: Results) -> None:
    """What the way of hidden states is limited by: from the device to pinned memory, and into files of /dev/shm."""
    num_bytes = arguments.tokens * (len(arguments.layers) + 1) * 4096 * 2
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    if torch.cuda.is_available():
        device = torch.empty(4 * num_bytes, dtype=torch.uint8, device=arguments.device)
        pinned = torch.empty(4 * num_bytes, dtype=torch.uint8, pin_memory=True)
        for _ in range(3):
            begin = time.perf_counter()
            pinned.copy_(device)
            results.record("device to host", gb_per_s=4 * num_bytes / 1e9 / (time.perf_counter() - begin))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        paths = [Path(directory) / f"{number}.safetensors" for number in range(16)]
        rows = [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(4)]

        def write(number: int) -> None:
            save_file({"hidden_states": host}, paths[number])

        def read(number: int) -> None:
            rows[number % 4].copy_(load_file(paths[number])["hidden_states"])
            paths[number].unlink()

        for num_threads in (1, 4):
            with ThreadPoolExecutor(num_threads) as pool:
                for what, work in (("files written", write), ("files read and removed", read)):
                    begin = time.perf_counter()
                    list(pool.map(work, range(16)))
                    rate = 16 * num_bytes / 1e9 / (time.perf_counter() - begin)
                    results.record(what, num_threads=num_threads, gb_per_s=rate)


def measure(ways: dict[str, Send], arguments: argparse.Namespace, results: Results, in_flight: int) -> dict[str, float]:
    """Median tokens/s of some rounds of all documents; the ways take turns, and the first round is not counted."""
    sent = documents(arguments)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with ThreadPoolExecutor(in_flight) as pool:
        for round_ in range(arguments.repeats + 1):
            for name, send in ways.items():
                ends: list[float] = []

                def send_one(document: np.ndarray, send: Send = send, ends: list[float] = ends) -> None:
                    send(document)
                    ends.append(time.perf_counter())

                begin = time.perf_counter()
                list(pool.map(send_one, sent))
                whole = len(sent) * arguments.tokens / (time.perf_counter() - begin)
                rate = steady_rate(ends, in_flight) * arguments.tokens
                results.record(f"{name}, round {round_}", tokens_per_s=rate, with_begin_and_end=whole)
                rates[name].append(rate)
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    for name, median in medians.items():
        counted = rates[name][1:]
        results.record(name, tokens_per_s=median, lowest=min(counted), highest=max(counted), num_rounds=len(counted))
    return medians


def steady_rate(ends: list[float], in_flight: int) -> float:
    """Documents a second while there were always as many in flight: the slope of a line through the times they ended.

    How long the first and the last ones take is latency, which in a stream of rows costs nothing.
    """
    middle = sorted(ends)[in_flight:-in_flight]
    if len(middle) <= in_flight:
        raise SystemExit(f"{len(ends)} documents for {in_flight} in flight: give at least {3 * in_flight + 1}")
    return float(np.polyfit(np.array(middle) - middle[0], np.arange(len(middle)), 1)[0])


def start_plain(config: TargetConfig, program: EngineProgram) -> Started:
    """Prefill alone, by the engine's own server."""
    url = f"http://127.0.0.1:{free_port()}"
    where = ["--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    if config.engine == "vllm":
        words = ["vllm.entrypoints.openai.api_server", "--model", config.model, "--no-enable-prefix-caching"]
    else:
        words = ["sglang.launch_server", "--model-path", config.model, "--disable-radix-cache", "--skip-tokenizer-init"]
        words += ["--disable-cuda-graph"]  # as with capture: what hooks cost, not what graphs gain
    flags = write_flags(config.engine_args, "no-" if config.engine == "vllm" else None)
    command = [str(program.python), "-m", *words, *where, "--dtype", config.dtype, *flags]
    kind = ENGINES[config.engine]
    variables = {**child_environment(config, program, INSIDE), **kind.variables}
    calls = EngineCalls(kind.title, url)

    def send_vllm(tokens: np.ndarray) -> object:
        body = {"model": config.model, "prompt": tokens.tolist(), "max_tokens": 1, "temperature": 0}
        return calls.call("POST", "/v1/completions", body)

    def send_sglang(tokens: np.ndarray) -> object:
        body = {"input_ids": tokens.tolist(), "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        return calls.call("POST", "/generate", body)

    process = EngineProcess(f"{kind.title}, plain", private_directory(config.engine), command, variables)
    send = send_vllm if config.engine == "vllm" else send_sglang
    return Started("plain", process, calls.is_healthy, lambda: send, url)


def start_captured(config: TargetConfig, program: EngineProgram, layers: tuple[int, ...]) -> Started:
    kind = ENGINES[config.engine]
    process, address = start_engine(kind, config, program, Path(config.model), layers)
    return Started(
        *("capture", process, lambda: is_ready(kind, address), lambda: AnswerTimes(kind.connect(address))),
        *(address.url, address),
    )


@contextlib.contextmanager
def running(
    names: list[str], config: TargetConfig, program: EngineProgram, arguments: argparse.Namespace, results: Results
) -> Iterator[list[Started]]:
    """These engines, started together and ready; their logs are kept beside --out."""
    layers = engine_layers(tuple(arguments.layers), arguments.num_layers)
    started: list[Started] = []
    try:
        for name in names:
            plain = name == "plain"
            if arguments.profile is not None and config.engine == "vllm":
                more = profiler_flags(arguments.profile / name)
                config = config.model_copy(update={"engine_args": {**config.engine_args, **more}})
            one = start_plain(config, program) if plain else start_captured(config, program, layers)
            started.append(one)
        for one in started:
            one.process.wait_until(one.is_ready, config.engine_start_timeout_s)
            results.say(f"{config.engine} {program.version}, {one.name}, is ready")
        yield started
    finally:
        for one in started:
            if arguments.out is not None:
                with contextlib.suppress(OSError):
                    shutil.copy(one.process.log, arguments.out.with_name(f"{config.engine}-{one.name}.log"))
            one.process.close()
        results.say(f"{config.engine} ended: {', '.join(names)}")


def cpu_seconds(pid: int) -> float:
    """Of a process and of those that it and they have started."""
    first = psutil.Process(pid)
    total = 0.0
    for process in [first, *first.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def own_cpu_seconds() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)


def fetch_rows(
    config: TargetConfig, engine: Started, at_once: int, arguments: argparse.Namespace, results: Results
) -> None:
    """Rows from `paceline serve`, attached to the capturing engine, to where a trainer would have them.

    Args:
        at_once: documents at the engine.
    """
    address = engine.address
    assert address is not None, "it captures"
    os.environ[ENGINE_KEY] = address.key
    words = [
        *("--engine", config.engine, "--engine-url", address.url, "--dtype", config.dtype),
        *("--capture-layers", ",".join(map(str, arguments.layers)), f"target.engine_directory={address.directory}"),
        f"target.engine_documents={at_once}",
    ]
    if arguments.out is not None:
        words += ["--log-file", str(arguments.out.with_name("serve.log"))]
    if arguments.selftest_reference is None:
        words += ["target.selftest=false"]
    else:
        words += [f"target.selftest_reference={arguments.selftest_reference}"]
    device = torch.device(arguments.device)
    specs = {
        "rows": FeatureSpec(tuple(arguments.layers), final_hidden="supervised", greedy=True),
        "rows of states alone": FeatureSpec((*arguments.layers, arguments.num_layers - 1)),  # no norm, no lm_head
    }
    with serve(config.model, [arguments.device], words) as urls:
        results.say(f"paceline serves at {urls[0]}")
        connection = RemoteConnection(urls[0], TransportConfig(kind="http"), PoolConfig(), device)
        info = connection.info()
        connection.close()
        lengths = [arguments.tokens] * max(1, arguments.row_tokens // arguments.tokens)
        rows = row_at(lengths, arguments.share, info.num_tokenizer_tokens)
        num_rows = max(1, arguments.repeats * arguments.documents // len(lengths))
        for transport, (name, spec) in itertools.product(arguments.transports, specs.items()):
            servers = remote_servers(urls, transport, arguments.prefetch, device)
            with stream_from(servers, spec, info, rows, arguments.prefetch) as (stream, _):
                for _ in range(NUM_WARM_UP_ROWS):
                    next(stream)
                begin, num_bytes = time.perf_counter(), stream.stats.bytes_received
                of_engine, of_children = cpu_seconds(engine.process.pid), cpu_seconds(os.getpid()) - own_cpu_seconds()
                for _ in range(num_rows):
                    next(stream)
                finish(device)
                seconds = time.perf_counter() - begin
                of_engine = cpu_seconds(engine.process.pid) - of_engine
                of_children = cpu_seconds(os.getpid()) - own_cpu_seconds() - of_children
                num_bytes = stream.stats.bytes_received - num_bytes
            results.record(
                f"{name} by {transport}",
                tokens_per_s=num_rows * sum(lengths) / seconds,
                bytes_per_s=num_bytes / seconds,
                num_rows=num_rows,
                engine_documents=at_once,
                engine_cpu_s_per_gb=of_engine / num_bytes * 1e9,
                serve_cpu_s_per_gb=(of_children - of_engine) / num_bytes * 1e9,
            )


def with_transformers(config: TargetConfig, arguments: argparse.Namespace, results: Results) -> float:
    """Tokens/s of the hf engine, with final hidden states and greedy tokens, which an engine's figure is without."""
    plain_config = TargetConfig(model=config.model, dtype=config.dtype, device=config.device, compile=arguments.compile)
    per_row = max(1, arguments.row_tokens // arguments.tokens)
    spec = FeatureSpec(tuple(arguments.layers), final_hidden="all", greedy=True)
    with contextlib.closing(HFEngine(plain_config)) as engine:
        results.say("the hf engine is ready")
        lengths = [arguments.tokens] * per_row

        def send(tokens: np.ndarray) -> object:
            row = RowRequest(
                position=0,
                spec="capture",
                tokens=np.tile(tokens, per_row),
                documents=np.cumsum([0, *lengths]).astype(np.int32),
                spans=np.zeros((0, 2), np.int32),
                positions=np.tile(np.arange(arguments.tokens, dtype=np.int32), per_row)[None],
            )
            return engine.capture(row, spec).result()

        fewer = argparse.Namespace(**vars(arguments) | {"documents": max(1, arguments.documents // per_row)})
        rate = measure({"hf, one document of each row": send}, fewer, results, in_flight=4).popitem()[1] * per_row
        results.record("hf", tokens_per_s=rate, documents_per_row=per_row)
        return float(rate)


def measure_servers(
    started: list[Started], arguments: argparse.Namespace, results: Results, rates: dict[tuple[str, int], float]
) -> None:
    """Each number of documents in flight; adds to `rates`, by way and number."""
    clients = {one.name: one.connect() for one in started}
    ways = {name: one.capture if isinstance(one, AnswerTimes) else one for name, one in clients.items()}
    for in_flight in arguments.in_flight:
        results.say(f"{in_flight} documents in flight")
        measured = measure(ways, arguments, results, in_flight)
        rates |= {(name, in_flight): rate for name, rate in measured.items()}
        for client in clients.values():
            if isinstance(client, AnswerTimes):
                client.record(results)
        capture, plain = (rates.get((name, in_flight)) for name in ("capture", "plain"))
        if capture and plain:
            results.record("capture against plain", in_flight=in_flight, share=capture / plain)
    if arguments.profile is not None:
        for one in started:
            profile(one, ways[one.name], arguments, results)


def profile(one: Started, send: Send, arguments: argparse.Namespace, results: Results) -> None:
    """Say what the device did for half of the documents."""
    sent = documents(arguments)[: arguments.documents // 2]

    def work() -> None:
        with ThreadPoolExecutor(arguments.in_flight[0]) as pool:
            list(pool.map(send, sent))

    try:
        key = "" if one.address is None else one.address.key
        trace = record_trace(arguments.engine, one.url, key, arguments.profile / one.name, work)
        print_summary(f"{arguments.engine}, {one.name}, {len(sent)} documents", summarise(trace))
    except (OSError, ValueError) as error:
        results.record("no profile", error=str(error))


def parse_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--engine", default="vllm", choices=list(ENGINES))
    parser.add_argument("--python", help="that has the engine; this one without")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 17, 32])
    parser.add_argument("--num-layers", type=int, default=36, help="of the target")
    parser.add_argument("--vocab", type=int, default=150_000)
    parser.add_argument("--tokens", type=int, default=2048, help="of a document")
    parser.add_argument("--documents", type=int, default=160)
    parser.add_argument("--in-flight", nargs="+", type=int, default=[16, 32])
    parser.add_argument("--engine-documents", nargs="+", type=int, default=[256], help="at once, of fetched rows")
    parser.add_argument("--row-tokens", type=int, default=8192, help="of rows")
    parser.add_argument("--share", type=float, default=0.6, help="supervised share of every document of fetched rows")
    parser.add_argument("--prefetch", type=int, default=8, help="rows asked for ahead")
    parser.add_argument("--transports", nargs="+", default=["http", "file"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="the hf engine's layers")
    parser.add_argument("--side-by-side", action="store_true", help="both servers at one time on one GPU")
    parser.add_argument(
        "--selftest-reference", help="a file of `paceline doctor --save-reference`: test the engine, too"
    )
    parser.add_argument("--profile", type=Path, help="a directory for traces of the engine's own profiler")
    parser.add_argument("--out", type=Path, help="JSON lines; logs are kept beside it")
    parser.add_argument("--what", nargs="+", default=["host", "plain", "capture", "rows", "hf"])
    return parser.parse_args(words)


def main() -> None:
    words, _, flags = (" ".join(sys.argv[1:])).partition(" -- ")  # the engine's own options come after --
    arguments = parse_arguments(words.split())
    results = Results(arguments.out)
    config = TargetConfig(
        model=arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        engine=arguments.engine,
        engine_python=arguments.python,
        engine_args=parse_flags(flags.split()),
        engine_start_timeout_s=300,
        capture_layers=tuple(arguments.layers),
    )
    kind = ENGINES[config.engine]
    program = find_program(config, kind.packages, kind.install)
    servers = [name for name in ("plain", "capture") if name in arguments.what]
    rates: dict[tuple[str, int], float] = {}
    if "host" in arguments.what:
        host_paths(arguments, results)
    for names in [servers] if arguments.side_by_side else [[name] for name in servers]:
        with running(names, config, program, arguments, results) as started:
            measure_servers(started, arguments, results, rates)
            if started[-1].address is not None and "rows" in arguments.what:
                try:
                    for at_once in arguments.engine_documents:
                        fetch_rows(config, started[-1], at_once, arguments, results)
                except (SystemExit, PacelineError) as error:  # the hf engine's figure is wanted all the same
                    results.record("rows failed", error=str(error))
    if "hf" in arguments.what:
        with_transformers(config, arguments, results)


if __name__ == "__main__":
    main()
