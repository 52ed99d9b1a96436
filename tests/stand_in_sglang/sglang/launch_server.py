"""Speaks as SGLang 0.5.14 does: its options, its HTTP, its way with forward hooks; the states are transformers'.

`tests/gpu/test_gpu_engines.py` runs SGLang itself. STAND_IN_FAULT makes it wrong on purpose; STAND_IN_STREAM lets its
layers return what comes to the residual alone, as those of 0.5.22 do: "plain", "named" (the batch is),
"owed" or "gated".
"""

import argparse
import fnmatch
import importlib
import json
import os
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

FAULT = os.environ.get("STAND_IN_FAULT", "")
STREAM = os.environ.get("STAND_IN_STREAM", "")
MAX_PREFILL_TOKENS = 600


class Layer(nn.Module):
    """Returns states that are known already, as (hidden, residual)."""

    def forward(self, positions: Tensor, hidden: Tensor, batch: SimpleNamespace, residual: Tensor | None) -> object:
        if residual is not None:  # as the norm of a real layer, which adds in place
            hidden.fill_(torch.nan)
            residual.fill_(torch.nan)
        noise = torch.round(self.state * 0 + 1.0)
        if FAULT == "not summed":
            noise._sglang_needs_allreduce_fusion = True
        return noise, self.state - noise


class Stream:
    """The residual of a batch, and what the last layer adds to it."""

    def __init__(self) -> None:
        self.residual, self.pending = None, None

    def snapshot(self, hidden: SimpleNamespace) -> Tensor:
        """The sum over all processes, of which each has half of the last part."""
        assert hidden.contribution is self.pending
        return 2 * self.pending.value + self.residual


class StreamLayer(nn.Module):
    """Returns what comes to the residual of the batch; one in three adds it itself, one names experts beside it."""

    def forward(self, positions: Tensor, hidden: object, batch: SimpleNamespace) -> object:
        stream = batch.residual_stream
        if stream.pending is not None:  # as the norm of a real layer, which adds in place
            stream.residual.fill_(torch.nan)
            if stream.pending.value is not None:
                stream.pending.value.fill_(torch.nan)
        noise = torch.round(self.state * 0 + 1.0)
        if self.index % 3 == 2 and STREAM in ("plain", "named"):
            stream.residual, stream.pending = self.state, None
            return self.state
        stream.residual = self.state - noise
        stream.pending = SimpleNamespace(value=noise, update=SimpleNamespace(is_plain_add=STREAM != "gated"))
        if STREAM in ("owed", "finalize"):
            stream.pending.value = noise / 2 if STREAM == "owed" else None
            return SimpleNamespace(contribution=stream.pending)
        return (noise, torch.zeros(len(noise), 2)) if self.index % 3 == 1 else noise


class Body(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(StreamLayer() if STREAM else Layer() for _ in range(num_layers))
        for index, layer in enumerate(self.layers):
            layer.index = index

    def forward(self, input_ids: Tensor, positions: Tensor, batch: SimpleNamespace) -> Tensor | None:
        hidden, residual = torch.zeros(0), None
        if STREAM:
            batch.residual_stream = Stream()
            for layer in self.layers:
                if STREAM == "named":
                    hidden = layer(positions=positions, hidden=hidden, batch=batch)
                else:
                    hidden = layer(positions, hidden, batch)
            batch.residual_stream = None
            return None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, batch, residual)
        return hidden + residual


class ForCausalLM(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.model = Body(num_layers)


def register(model: nn.Module, specs: list[dict]) -> None:
    """As sglang.srt.model_executor.hook_manager does."""
    for spec in specs:
        module, _, name = spec["hook_factory"].partition(":")
        hook = getattr(importlib.import_module(module), name)(spec["config"])
        for path, child in model.named_modules():
            if hook and any(fnmatch.fnmatch(path, pattern) for pattern in spec["target_modules"]):
                child.register_forward_hook(hook)


class Mode:
    def is_extend(self) -> bool:
        return True


class Scheduler:
    """Puts waiting requests into batches, chunk by chunk."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.reference = AutoModelForCausalLM.from_pretrained(arguments.model_path, dtype=torch.float32).eval()
        norm = self.reference.model.norm
        norm.register_forward_hook(lambda module, given, output: setattr(self, "before_norm", given[0]))
        self.model = ForCausalLM(self.reference.config.num_hidden_layers)
        register(self.model, arguments.forward_hooks or [])
        self.chunk = arguments.chunked_prefill_size
        self.waiting: deque[SimpleNamespace] = deque()
        self.lock = threading.Lock()
        self.num_computed = 0

    @torch.inference_mode()
    def run(self, rid: str, tokens: list[int]) -> int:
        with self.lock:
            output = self.reference(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
            states = [*output.hidden_states[1:-1], self.before_norm]
            request = SimpleNamespace(rid=rid, tokens=tokens, states=[state[0] for state in states], done=0)
            self.waiting.append(request)
        while request.done < len(tokens):
            with self.lock:
                if self.waiting:
                    self.step()
        self.num_computed += 1
        return int(output.logits[0, -1].argmax())

    def step(self) -> None:
        chunks, left = [], MAX_PREFILL_TOKENS
        limit = self.chunk if self.chunk > 0 else 1 << 30
        for request in list(self.waiting):
            length = min(len(request.tokens) - request.done, limit)
            if chunks and length > left:
                break
            chunks.append((request, request.done, length))
            left -= length
        batch = SimpleNamespace(
            forward_mode=Mode(),
            input_ids=torch.tensor([t for one, start, n in chunks for t in one.tokens[start : start + n]]),
            rids=[one.rid for one, _, _ in chunks],
            extend_prefix_lens_cpu=[start for _, start, _ in chunks],
            extend_seq_lens_cpu=[n for _, _, n in chunks],
            residual_stream=None,
        )
        for index, layer in enumerate(self.model.model.layers):
            layer.state = torch.cat([one.states[index][start : start + n] for one, start, n in chunks])
        self.model.model(batch.input_ids, batch.input_ids, batch)
        batch.input_ids.fill_(0)  # the next batch's
        for request, start, length in chunks:
            request.done = start + length
            if request.done == len(request.tokens):
                self.waiting.remove(request)


def serve(arguments: argparse.Namespace) -> None:
    scheduler = Scheduler(arguments)
    scheduler.run("warm-up", [1, 2, 3])
    scheduler.num_computed = 0
    key = arguments.api_key

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: object) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def allowed(self) -> bool:
            if self.path.startswith("/health") or not key or self.headers.get("Authorization") == f"Bearer {key}":
                return True
            self.answer(401, {"error": "Unauthorized"})
            return False

        def do_GET(self) -> None:
            if FAULT == "busy" and self.path == "/health" and scheduler.num_computed:
                self.answer(503, {})
            elif self.allowed():
                given = {name: value for name, value in vars(arguments).items() if name != "model_path"}
                self.answer(200, {**given, "max_req_input_len": arguments.context_length})

        def do_POST(self) -> None:
            if not self.allowed():
                return
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if FAULT == "abort":
                reason = {"type": "abort", "message": "out of memory"}
                self.answer(200, {"output_ids": [], "meta_info": {"finish_reason": reason}})
                return
            token = scheduler.run(body.get("rid", "unnamed"), body["input_ids"])
            meta = {"finish_reason": {"type": "length", "length": 1}, "weight_version": "default"}
            if FAULT == "new weights" and len(body["input_ids"]) == 7:
                meta["weight_version"] = "1"
            self.answer(200, {"output_ids": [token], "meta_info": meta})

        def log_message(self, *_: object) -> None:
            return

    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer((arguments.host, arguments.port), Handler).serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model-path", "host", "dtype", "served-model-name", "config", "api-key", "log-level-http"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--port", type=int)
    parser.add_argument("--nccl-port", type=int)
    parser.add_argument("--context-length", type=int, default=4096)
    parser.add_argument("--chunked-prefill-size", type=int, default=-1)
    parser.add_argument("--forward-hooks", type=json.loads)
    for name in ("disable-radix-cache", "disable-cuda-graph", "skip-tokenizer-init", "trust-remote-code"):
        parser.add_argument(f"--{name}", action="store_true")
    arguments = parser.parse_args()
    if arguments.config:
        for name, value in json.loads(Path(arguments.config).read_text()).items():
            setattr(arguments, name.replace("-", "_"), value)
    if (port := arguments.port + 10_000) > 65_535:  # of 0.5.14
        raise SystemExit(f"ValueError: SGLANG_GRPC_PORT ({port}) must be between 1 and 65535")
    if "SGLANG_GRPC_PORT" in os.environ and arguments.api_key:  # of 0.5.16
        raise SystemExit("ValueError: the native gRPC server takes no --api-key")
    torch.set_num_threads(1)
    serve(arguments)


if __name__ == "__main__":
    main()
