"""What capture costs a production engine: tokens/s of plain prefill, and of the same prefill with hidden states taken.

    python benchmarks/make_random_target.py /tmp/target-8b
    python benchmarks/engine_capture.py /tmp/target-8b --python /opt/vllm/bin/python -- --max-model-len 4096

Starts vLLM twice with the same options, without and with capture, and sends the same documents, some at a time. Plain
requests ask for one token, as the capture's do. Then the `hf` engine on the same documents, packed into rows.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from paceline.config.target import TargetConfig
from paceline.schema.features import FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.target.engines.flags import parse_flags, write_flags
from paceline.target.engines.http_calls import EngineCalls
from paceline.target.engines.process import EngineProcess, private_directory
from paceline.target.engines.programs import EngineProgram, child_environment, find_program, free_port
from paceline.target.engines.starting import is_ready, start_engine
from paceline.target.hf.engine import HFEngine
from paceline.target.opening import engine_layers
from paceline.target.vllm.kind import VLLM

Send = Callable[[np.ndarray], object]


def documents(arguments: argparse.Namespace) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(10, arguments.vocab, arguments.tokens, dtype=np.int32) for _ in range(arguments.documents)]


def measure(name: str, send: Send, arguments: argparse.Namespace) -> float:
    """Median tokens/s of some rounds of all documents, after one that is not counted."""
    sent = documents(arguments)
    rates = []
    with ThreadPoolExecutor(arguments.in_flight) as pool:
        for _ in range(arguments.repeats + 1):
            begin = time.perf_counter()
            list(pool.map(send, sent))
            rates.append(len(sent) * arguments.tokens / (time.perf_counter() - begin))
    counted = rates[1:]
    median = statistics.median(counted)
    print(f"{name}: {median:,.0f} tokens/s ({min(counted):,.0f} to {max(counted):,.0f}, of {len(counted)})", flush=True)
    return median


def plain(config: TargetConfig, program: EngineProgram, arguments: argparse.Namespace) -> float:
    """Prefill alone, by the engine's own server."""
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        *(str(program.python), "-m", "vllm.entrypoints.openai.api_server", "--model", config.model),
        *("--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--no-enable-prefix-caching"),
        *("--dtype", config.dtype, *write_flags(config.engine_args)),
    ]
    variables = child_environment(config, program, VLLM.inside) | {"HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    with contextlib.closing(EngineProcess("vLLM", private_directory("vllm"), command, variables)) as process:
        calls = EngineCalls("vLLM", url)
        process.wait_until(calls.is_healthy, config.engine_start_timeout_s)

        def send(tokens: np.ndarray) -> object:
            body = {"model": config.model, "prompt": tokens.tolist(), "max_tokens": 1, "temperature": 0}
            return calls.call("POST", "/v1/completions", body)

        return measure(f"vLLM {program.version}, plain", send, arguments)


def captured(config: TargetConfig, program: EngineProgram, arguments: argparse.Namespace) -> float:
    layers = engine_layers(tuple(arguments.layers), arguments.num_layers)
    process, address = start_engine(VLLM, config, program, Path(config.model), layers)
    with contextlib.closing(process):
        process.wait_until(lambda: is_ready(VLLM, address), config.engine_start_timeout_s)
        requests = VLLM.connect(address)
        return measure(f"vLLM {program.version}, layers {list(layers)} captured", requests.capture, arguments)


def with_transformers(config: TargetConfig, arguments: argparse.Namespace) -> float:
    plain_config = TargetConfig(model=config.model, dtype=config.dtype, device=config.device, compile=arguments.compile)
    per_row = max(1, arguments.row_tokens // arguments.tokens)
    spec = FeatureSpec(tuple(arguments.layers), final_hidden="all", greedy=True)
    with contextlib.closing(HFEngine(plain_config)) as engine:
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

        arguments.documents = max(1, arguments.documents // per_row)
        rate = measure("hf, with final hidden and greedy", send, arguments) * per_row
        print(f"  in rows of {per_row} documents: {rate:,.0f} tokens/s", flush=True)
        return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--python", help="that has vLLM; this one without")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 17, 32])
    parser.add_argument("--num-layers", type=int, default=36, help="of the target")
    parser.add_argument("--vocab", type=int, default=150_000)
    parser.add_argument("--tokens", type=int, default=2048, help="of a document")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--row-tokens", type=int, default=8192, help="of the hf engine's rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="the hf engine's layers")
    parser.add_argument("--what", nargs="+", default=["plain", "capture", "hf"])
    words, _, flags = (" ".join(sys.argv[1:])).partition(" -- ")  # the engine's own options come after --
    arguments = parser.parse_args(words.split())
    config = TargetConfig(
        model=arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        engine="vllm",
        engine_python=arguments.python,
        engine_args=parse_flags(flags.split()),
        capture_layers=tuple(arguments.layers),
    )
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    program = find_program(config, VLLM.packages)
    rates = {}
    if "plain" in arguments.what:
        rates["plain"] = plain(config, program, arguments)
    if "capture" in arguments.what:
        rates["capture"] = captured(config, program, arguments)
    if len(rates) == 2:
        print(f"capture at {rates['capture'] / rates['plain']:.1%} of plain prefill", flush=True)
    if "hf" in arguments.what:
        with_transformers(config, arguments)


if __name__ == "__main__":
    main()
