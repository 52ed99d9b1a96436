"""What SGLang loads to write hidden states to rows or files: runs in its scheduler, needs nothing else of paceline.

`--forward-hooks` puts a hook on each captured decoder layer, and one on the module around them: it ends after them, and
is given the batch. A hook raises nothing, which would end the engine, but where processes of one target would go on out
of step with each other.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from paceline_shared_rows import SharedRows
from safetensors.torch import save_file
from torch import Tensor, nn

_shared_rows = SharedRows()
_NUM_WRITERS = 4
_MAX_WAITING_BYTES = 2 << 30
"""Of states on their way into files; the model waits for the files beyond that."""
_MAX_WAIT_S = 60.0
"""SGLang ends a scheduler that stands still for some minutes."""
_WHOLE = frozenset(
    {
        *("CohereDecoderLayer", "Exaone4DecoderLayer", "Lfm2DecoderLayer", "Lfm2MoeDecoderLayer"),
        *("PhiMoEDecoderLayer", "StablelmDecoderLayer"),
        *("GraniteMoeHybridAttentionDecoderLayer", "GraniteMoeHybridMambaDecoderLayer"),
    }
)
"""Layers of SGLang 0.5.14 that return the sum, and beside it a residual that is in it already."""

Hook = Callable[[nn.Module, tuple[Any, ...], Any], None]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Part:
    """The tokens of one request in one batch."""

    rid: str
    first: int
    """Of the request's tokens."""
    start: int
    """Of the batch's."""
    end: int


class _Capture:
    """The hidden states of the batch that is computed now, and those on their way into files."""

    def __init__(self, layers: tuple[int, ...], directory: Path, prefix: str, keeps: bool) -> None:
        """Start the writers.

        Args:
            keeps: False in processes whose states another one has, too: they only take part in its sums.
        """
        self._slots = {layer: slot for slot, layer in enumerate(layers)}
        self._layer_ids = torch.tensor(layers, dtype=torch.int64)
        self._directory, self._prefix, self._keeps = directory, prefix, keeps
        self._states: Tensor | None = None
        self._taken: list[int] = []
        """In the order they came in this batch."""
        self._batch: Any = None
        """The one that is computed now, where the module around the layers has told of it before."""
        self._fault = ""
        self._attempts = itertools.count()
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._writers = ThreadPoolExecutor(_NUM_WRITERS, "paceline-writer")
        self._room = threading.Condition()
        self._waiting_bytes = 0

    def begin(self, arguments: Iterable[Any]) -> None:
        """Layers are about to be computed; `arguments` are those of the module around them."""
        self._batch = _find_batch(arguments) or self._batch

    def take(self, layer: int, arguments: Iterable[Any], output: Any, whole: bool) -> None:
        """One layer's output: (hidden, residual), of which the next layer would compute the sum, or the sum itself.

        Args:
            arguments: those of the layer that are not named, the batch among them for most.
            whole: the sum is there already, whatever is beside it.

        Raises:
            Exception: a sum over all processes failed in this one, and the others may have it: the engine must end.
        """
        try:
            batch = self._batch or _find_batch(arguments)
            if batch is not None and not batch.forward_mode.is_extend():
                return
            stream = getattr(batch, "residual_stream", None)
            problem = "" if stream is None else _unreadable(stream, output)
        except Exception as error:  # a stream with other parts: in every process alike, and before any sum over them
            logger.exception("the output of layer %d is not understood", layer)
            problem = f"is not understood: {type(error).__name__}: {error}"
        if problem:
            self._fault = f"layer {layer}'s output {problem}"
            return
        if stream is not None:
            output, whole = _read(stream, _head(output)), False
        if not self._keeps:
            return
        try:
            self._take(layer, output, whole)
        except Exception as error:  # no memory: those who wait for the states must hear of it
            logger.exception("the hidden states of layer %d cannot be kept", layer)
            self._fault = f"layer {layer}'s output cannot be kept: {type(error).__name__}: {error}"

    def _take(self, layer: int, output: Any, whole: bool) -> None:
        hidden, residual, *_ = (*output, None) if isinstance(output, tuple) else (output, None)
        hidden, residual = _by_token(hidden), _by_token(residual)
        if getattr(hidden, "_sglang_needs_allreduce_fusion", False):
            self._fault = (
                f"layer {layer}'s output is not summed over GPUs when it ends: start SGLang with "
                "--enforce-disable-flashinfer-allreduce-fusion"
            )
        # A layer whose weights are on the host is called by itself, and ends twice.
        if self._states is None or layer in self._taken[:1]:
            self._taken.clear()
            self._states = hidden.new_empty(hidden.shape[0], len(self._slots), hidden.shape[-1])
        slot = self._states[:, self._slots[layer]]
        if hidden.shape != slot.shape or not (residual is None or whole or residual.shape == hidden.shape):
            beside = "" if residual is None else f" beside {list(residual.shape)}"
            self._fault = (
                f"layer {layer}'s output is {list(hidden.shape)}{beside}, where {list(slot.shape)} were expected: "
                "options of SGLang that spread tokens over GPUs (--moe-a2a-backend, --moe-dense-tp-size), or a model "
                "with other states, for which there is no capture"
            )
            return
        # Now: the next layer's norm writes into both.
        if residual is None or whole:
            slot.copy_(hidden)
        else:
            torch.add(hidden, residual, out=slot)
        self._taken.append(layer)

    def finish(self, arguments: Iterable[Any]) -> None:
        """All layers of a batch were computed; `arguments` are those of the module around them."""
        batch = _find_batch(arguments)
        if batch is None:  # a module further out may be given it
            return
        self._batch = None
        states, self._states = self._states, None
        taken, self._taken = set(self._taken), []
        fault, self._fault = self._fault, ""
        if not self._keeps:
            return
        if (states is None and not fault) or not batch.forward_mode.is_extend():
            return
        parts = list(_parts(batch, self._prefix))
        if not parts:
            return
        if not fault and (missing := sorted(set(self._slots) - taken)):
            fault = f"layers {missing} were not computed by modules of their names"
        if not fault and states is not None:
            fault = self._give(parts, states, batch.input_ids)
        if fault:
            for part in parts:
                self._tell(part, fault)

    def _give(self, parts: list[_Part], states: Tensor, tokens: Tensor) -> str:
        """To the writers, once they have room; or what is wrong."""
        if len(states) < parts[-1].end:
            return (
                f"layers end with {len(states)} states for a batch of {parts[-1].end} tokens or more: options of "
                "SGLang spread tokens over GPUs (--moe-a2a-backend, --moe-dense-tp-size)"
            )
        num_bytes = states.numel() * states.element_size()
        with self._room:
            if not self._room.wait_for(
                lambda: self._waiting_bytes + num_bytes <= _MAX_WAITING_BYTES or not self._waiting_bytes, _MAX_WAIT_S
            ):
                return f"no file was written for {_MAX_WAIT_S:.0f} s: is {self._directory} slow or gone?"
            self._waiting_bytes += num_bytes
        try:
            self._hand_over(parts, states, tokens, num_bytes)
        except Exception as error:  # no pinned memory
            logger.exception("hidden states of a batch cannot be copied to the host")
            self._written(num_bytes)
            return f"hidden states cannot be copied to the host: {type(error).__name__}: {error}"
        return ""

    def _written(self, num_bytes: int) -> None:
        with self._room:
            self._waiting_bytes -= num_bytes
            self._room.notify_all()

    def _hand_over(self, parts: list[_Part], states: Tensor, tokens: Tensor, num_bytes: int) -> None:
        left = len(parts)
        lock = threading.Lock()

        def over(_: Any) -> None:
            nonlocal left
            with lock:
                left -= 1
                last = left == 0
            if last:
                self._written(num_bytes)

        tokens = tokens.to(torch.int64, copy=True)  # SGLang writes the next batch's into the same place
        kept, copied = self._to_host([states, tokens])
        for part in parts:
            self._writers.submit(self._write, part, kept, copied).add_done_callback(over)

    def _to_host(self, tensors: list[Tensor]) -> tuple[list[Tensor], torch.cuda.Event | None]:
        """Copies that are there when the event has happened; the model's stream does not wait for them."""
        if self._stream is None or not tensors[0].is_cuda:
            return tensors, None
        self._stream.wait_stream(torch.cuda.current_stream())
        kept = []
        with torch.cuda.stream(self._stream):
            for tensor in tensors:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                kept.append(host.copy_(tensor, non_blocking=True))
                tensor.record_stream(self._stream)
            copied = torch.cuda.Event(blocking=True)  # the scheduler needs the core that waiting would take
            copied.record()
        return kept, copied

    def _write(self, part: _Part, kept: list[Tensor], copied: torch.cuda.Event | None) -> None:
        states, tokens = kept
        path = self._directory / f"{part.rid}.{part.first}.safetensors"
        # A request that SGLang took back is computed once more, maybe while its first files are being written.
        partial = path.with_name(f".{path.name}.{next(self._attempts)}")
        try:
            if copied is not None:
                copied.synchronize()
            own, ids = states[part.start : part.end], tokens[part.start : part.end]
            stored = {"placed": own[:0]} if _shared_rows.put(path, part.first, own) else {"hidden_states": own}
            save_file({**stored, "token_ids": ids, "layer_ids": self._layer_ids}, partial)
            partial.replace(path)
        except Exception as error:  # a full disk: a writer's errors are seen by nobody, and the request waits
            logger.exception("hidden states of %s cannot be written", part.rid)
            partial.unlink(missing_ok=True)
            self._tell(part, f"hidden states cannot be written to {path}: {error}")

    def _tell(self, part: _Part, fault: str) -> None:
        """A file that says why there is no other."""
        path = self._directory / f"{part.rid}.error"
        unseen = path.with_name(f".{path.name}")  # whoever waits for it reads it at once
        try:
            unseen.write_text(fault, encoding="utf-8")
            unseen.replace(path)
        except OSError:
            logger.exception("%s; nor can this be written", fault)


def _find_batch(arguments: Iterable[Any]) -> Any:
    return next((one for one in arguments if hasattr(one, "extend_seq_lens_cpu")), None)


def _head(output: Any) -> Any:
    """What a layer gives the next one; some give the routing of experts beside it."""
    return output[0] if isinstance(output, tuple) else output


def _unreadable(stream: Any, output: Any) -> str:
    """Why a layer's output cannot be added to what SGLang from 0.5.21 on keeps in the batch; empty where it can.

    Args:
        stream: of the batch: `residual`, what layers have added up so far, and `pending`, the last one's contribution,
            which the next one adds; without `pending` the layer has added it itself.
    """
    hidden, pending = _head(output), stream.pending
    if pending is None:
        return "" if stream.residual is None or hidden is stream.residual else "is not the residual of its batch"
    if getattr(hidden, "contribution", hidden) is not (pending.value if isinstance(hidden, Tensor) else pending):
        return "is not what comes to the residual of its batch"
    if not isinstance(hidden, Tensor) and not hasattr(stream, "snapshot"):
        return "is not summed over GPUs when it ends, and this SGLang gives no copy of the sum"
    if pending.value is None:  # known to what computes experts
        return "is computed to its end by the next layer only, for which there is no capture"
    update = pending.update
    if not getattr(update, "is_plain_add", getattr(update, "adds_plainly", False)):  # of 0.5.22, of 0.5.21
        return "is added to the residual in the next layer's own way, for which there is no capture"
    return ""


def _read(stream: Any, hidden: Any) -> tuple[Tensor, Tensor | None]:
    """A layer's output as (hidden, residual) or (sum, None), of what `_unreadable` has let pass.

    Where the sum over GPUs is left to the next layer, this is a collective: SGLang sums up a copy.
    """
    if not isinstance(hidden, Tensor):
        return stream.snapshot(hidden), None
    return hidden, stream.residual if stream.pending is not None else None


def _by_token(states: Any) -> Any:
    """[n, H] of [1, n, H], as SGLang's models from transformers have them."""
    return states[0] if isinstance(states, Tensor) and states.dim() == 3 and len(states) == 1 else states


def _parts(batch: Any, prefix: str) -> Iterator[_Part]:
    """Those of our requests, in a batch whose requests lie end to end."""
    start = 0
    for rid, first, length in zip(batch.rids, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, strict=False):
        end = start + int(length)
        if str(rid).startswith(prefix):
            yield _Part(str(rid), int(first), start, end)
        start = end


@functools.cache
def _capture(directory: str, layers: tuple[int, ...], prefix: str, keeps: bool) -> _Capture:
    """The one of all hooks."""
    return _Capture(layers, Path(directory), prefix, keeps)


def build_hook(config: Mapping[str, Any]) -> Hook:
    """A hook for `--forward-hooks`.

    Args:
        config: "directory"; "prefix" of the ids of requests that are written, others are other clients'; "layers", all
            that are captured, 0-based and ascending; "layer", the one this hook is for, or None for the module around
            them.
    """
    distributed = torch.distributed
    first = not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0)
    layer = config["layer"]
    capture = _capture(str(config["directory"]), tuple(config["layers"]), str(config["prefix"]), first)
    followed: set[nn.Module] = set()

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if layer is not None:
            capture.take(layer, arguments, output, type(module).__name__ in _WHOLE)
            return
        try:
            if module not in followed:
                # SGLang registers hooks that are given no keywords, by which some models hand over the batch. The
                # first one is its own, of its warm-up.
                followed.add(module)
                module.register_forward_pre_hook(begin, with_kwargs=True)
                module.register_forward_hook(finish, with_kwargs=True)
                capture.finish(arguments)
        except Exception:  # one that left here would end SGLang
            logger.exception("hidden states of a batch are lost")

    def begin(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        try:
            capture.begin((*arguments, *keywords.values()))
        except Exception:  # one that left here would end SGLang
            logger.exception("the batch that begins is not seen")

    def finish(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        try:
            capture.finish((*arguments, *keywords.values()))
        except Exception:  # one that left here would end SGLang
            logger.exception("hidden states of a batch are lost")

    return hook
