"""Ranks of sequence-parallel groups as processes of their own: each computes a draft's loss of its part of a row."""

from __future__ import annotations

import math
import multiprocessing
import os
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from paceline.config.drafts import DraftConfig, Eagle3Config
from paceline.drafts.dflash.algorithm import DFlash
from paceline.drafts.eagle3.algorithm import Eagle3
from paceline.drafts.fixed_row import fixed_row
from paceline.drafts.interface import DraftAlgorithm
from paceline.drafts.sequence import SequenceGroup, SharedItems, gather_tokens
from paceline.evaluation.walk import WalkSums, walk_row
from paceline.schema.features import FeatureRow, Features, merge_specs
from paceline.schema.parts import WHOLE, Part, part_range, slice_features
from paceline.schema.target_info import TargetInfo
from paceline.training.sharded import SharedDraft
from rows import RandomWeights, Span, make_context, make_row, random_features, tiny_info

INFO = tiny_info(num_heads=8, num_kv_heads=4)


@dataclass(frozen=True)
class Case:
    """A draft and a row."""

    config: DraftConfig
    lengths: Sequence[int]
    spans: Sequence[Sequence[Span]]
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the draft's context."""
    info: TargetInfo = INFO
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    exchange: Literal["keys", "heads"] = "keys"


@dataclass(frozen=True)
class Result:
    """What one rank computed."""

    total: float
    weight: float
    metrics: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray | None]


@dataclass(frozen=True)
class Watched:
    """What one rank needed."""

    peak_bytes: int
    """Of the features and all that operations returned, as long as it was alive."""
    shapes: set[tuple[int, ...]]
    """Of everything any operation returned."""


def build(case: Case, sequence: SequenceGroup | None) -> DraftAlgorithm:
    """A draft of random weights, the same in every process."""
    kind = Eagle3 if isinstance(case.config, Eagle3Config) else DFlash
    if sequence is not None:
        sequence = replace(sequence, exchange=case.exchange)
    context = make_context(
        case.info,
        device=torch.device(case.device),
        dtype=case.dtype,
        weights=RandomWeights(case.info, dtype=case.dtype, device=case.device),
        sequence=sequence,
        **case.changes,
    )
    algorithm = kind(case.config, context)
    with torch.no_grad():  # weights of 0.02 would leave attention nearly uniform
        for parameter in algorithm.draft.parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            scale = 1.0 / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 0.3
            parameter.add_((torch.randn(parameter.shape, generator=generator) * scale).to(parameter))
    return algorithm


def part_of_row(case: Case, algorithm: DraftAlgorithm, part: Part, evaluation: bool = False) -> FeatureRow:
    """The row with the features of one part, in memory of their own."""
    row = make_row(case.lengths, case.spans, vocab=case.info.num_tokenizer_tokens)
    kind = type(algorithm)
    specs = [kind.feature_spec(case.config, case.info, evaluation=held_out) for held_out in {False, evaluation}]
    spec = merge_specs(specs)
    whole = random_features(row, spec, case.info, case.dtype).features
    if evaluation:  # the target would have written most of the text itself
        text = np.append(row.tokens[1:], 0)
        whole.greedy = torch.from_numpy(np.where(np.arange(len(text)) % 9 == 7, -1, text).astype(np.int32))
    sliced = slice_features(whole, row.num_tokens, part, spec.halo)
    own = {name: tensor.clone().to(case.device) for name, tensor in sliced.tensors().items()}
    named = {name: own.get(name) for name in ("greedy", "final_hidden", "final_index", "logsumexp")}
    return FeatureRow(row, Features(whole.layers, own["hidden"], **named, row_hash="", finite=True, part=part))


@dataclass(frozen=True)
class Walked:
    """What one rank found in an evaluation."""

    starts: np.ndarray
    proposals: np.ndarray
    """Of the draft itself, at each start."""
    sums: WalkSums
    loss: float


def walk_held_out(sequence: SequenceGroup | None, case: Case) -> Walked:
    """Evaluate this rank's part of the row, or the whole row, as if the draft were right two times of three."""
    algorithm = build(case, sequence)
    row = part_of_row(case, algorithm, part_of(sequence), evaluation=True)
    propose, num_drafted, given = algorithm.propose, algorithm.num_drafted, []
    text = np.append(row.row.tokens, np.full(num_drafted, -1))

    def propose_text(row: FeatureRow, starts: torch.Tensor) -> torch.Tensor:
        given.append((starts.cpu().numpy(), propose(row, starts).cpu().numpy()))
        right = np.array([text[p + 1 : p + 1 + num_drafted] for p in starts.tolist()], np.int64)
        right = right.reshape(-1, num_drafted)
        right[given[-1][0] % 3 == 0, num_drafted // 2] = -1
        return torch.from_numpy(right)

    algorithm.propose = propose_text
    with torch.no_grad():
        sums, loss = walk_row(algorithm, row), algorithm.loss(row).total.item()
    starts, proposals = zip(*given, strict=True)
    return Walked(np.concatenate(starts), np.concatenate(proposals), sums, loss)


def part_of(sequence: SequenceGroup | None) -> Part:
    return WHOLE if sequence is None else sequence.part


def compute_loss(sequence: SequenceGroup | None, case: Case) -> Result:
    """Loss and gradients of this rank's part of the row, or of the whole row."""
    algorithm = build(case, sequence)
    terms = algorithm.loss(part_of_row(case, algorithm, part_of(sequence)))
    terms.total.backward()
    return Result(
        terms.total.item(),
        terms.weight.item(),
        {name: value.cpu().numpy() for name, value in terms.metrics.items()},
        {n: None if p.grad is None else p.grad.float().cpu().numpy() for n, p in algorithm.draft.named_parameters()},
    )


def watch_loss(sequence: SequenceGroup | None, case: Case) -> Watched:
    """What `compute_loss` makes on its way, on a CPU."""
    algorithm = build(case, sequence)
    row = part_of_row(case, algorithm, part_of(sequence))
    with Watch() as seen:
        algorithm.loss(row).total.backward()
    return Watched(row.features.num_bytes + seen.peak_bytes, seen.shapes)


def measure_peak(sequence: SequenceGroup | None, case: Case) -> int:
    """Bytes of this process's GPU that draft, features, loss and gradients took at one time."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    algorithm = build(case, sequence)
    algorithm.loss(part_of_row(case, algorithm, part_of(sequence))).total.backward()
    return torch.cuda.max_memory_allocated() - before


def compute_without_waiting(sequence: SequenceGroup | None, case: Case) -> float:
    """The loss, twice: the second time any wait for the GPU is an error."""
    algorithm = build(case, sequence)
    row = part_of_row(case, algorithm, part_of(sequence))
    algorithm.loss(row).total.backward()  # compiles attention, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = algorithm.loss(row).total
        total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return total.item()


def weigh_fixed_row(sequence: SequenceGroup | None, case: Case, num_tokens: int) -> float:
    """The weight of this rank's part of a row that needs no target."""
    algorithm = build(case, sequence)
    terms = algorithm.loss(fixed_row(algorithm, num_tokens, part_of(sequence)))
    terms.total.backward()
    return terms.weight.item()


def add_up_gradients(
    sequence: SequenceGroup, cases: Sequence[Case], sharding: Literal["none", "full"]
) -> dict[str, np.ndarray]:
    """What FSDP2 makes of the ranks' gradients of several rows, over all ranks of the world."""
    ranks = dist.get_world_size()
    shape, names = ((ranks,), ("shards",)) if sharding == "full" else ((ranks, 1), ("replicas", "shards"))
    algorithm = build(cases[0], sequence)
    shared = SharedDraft(algorithm, init_device_mesh("cpu", shape, mesh_dim_names=names))
    for number, case in enumerate(cases, start=1):
        row = part_of_row(case, algorithm, sequence.part)
        shared.loss(row, last=number == len(cases)).total.backward()
    return {name: p.grad.full_tensor().numpy() for name, p in algorithm.draft.named_parameters()}


def exchange_numbers(sequence: SequenceGroup, counts: tuple[int, ...], dtype: torch.dtype) -> list[Any]:
    """This rank's share of a table after one exchange and after the way back, and the gradient of a weighted sum."""
    table = torch.arange(sum(counts) * 4 * 3, dtype=dtype).view(-1, 4, 3)
    items, begin = SharedItems(sequence, counts), sum(counts[: sequence.rank])
    own = table[begin : begin + counts[sequence.rank]].clone().requires_grad_()
    heads = items.to_heads(own)
    (items.to_items(heads * heads) * (sequence.rank + 1)).sum().backward()
    back = items.to_items(heads)
    return [value.detach().float().numpy() for value in (heads, back, own.grad)]


def gather_numbers(sequence: SequenceGroup, num_tokens: int, dtype: torch.dtype) -> list[Any]:
    """What this rank gathers of a table of tokens, and the gradient that its own share of it is given."""
    table = torch.arange(num_tokens * 4, dtype=dtype).view(num_tokens, 2, 2)
    own = table[slice(*part_range(num_tokens, sequence.part))].clone().requires_grad_()
    gathered = gather_tokens(own, num_tokens, sequence)
    (gathered * gathered * (sequence.rank + 1)).sum().backward()
    return [value.detach().float().numpy() for value in (gathered, own.grad)]


class Watch(TorchDispatchMode):
    """Records the shape of everything any operation returns, and how many bytes of it were alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.peak_bytes = self._alive_bytes = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if torch.is_tensor(t)}
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if torch.is_tensor(tensor):
                self.shapes.add(tuple(tensor.shape))
                if tensor.untyped_storage().data_ptr() not in given:
                    self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage.data_ptr() not in self._alive:
            self._alive.add(storage.data_ptr())
            self._alive_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self._alive_bytes)
            weakref.finalize(storage, self._forget, storage.data_ptr(), storage.nbytes())

    def _forget(self, address: int, num_bytes: int) -> None:
        self._alive.remove(address)
        self._alive_bytes -= num_bytes


class Ranks:
    """A world of processes in which a group of two and one of all do as they are told."""

    def __init__(self, folder: Path, size: int, backend: str = "gloo") -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["sequence_ranks"])
        self._processes, self._pipes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (theirs, str(folder / "store"), rank, size, backend)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def call(
        self, num_ranks: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0
    ) -> list[Any]:
        """function(group, *arguments) on each of the first ranks, which form the group; what each returned."""
        for pipe in self._pipes[:num_ranks]:
            pipe.send((num_ranks, function, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes[:num_ranks]):
            assert pipe.poll(timeout_s), f"rank {rank} has not answered after {timeout_s} s"
            answers.append(pipe.recv())
        for answer in answers:
            assert not isinstance(answer, str), answer
        return answers

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join(10)


@contextmanager
def running_ranks(folder: Path, size: int, backend: str = "gloo") -> Iterator[Ranks]:
    """Until the end of the block."""
    ranks = Ranks(folder, size, backend)
    try:
        yield ranks
    finally:
        ranks.close()


def _serve(pipe: Connection, store: str, rank: int, size: int, backend: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    # Not the group of all, as in a run of several sequence-parallel groups.
    groups = {count: dist.new_group(list(range(count))) for count in {2, size}}
    while True:
        try:
            count, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = function(SequenceGroup(groups[count], rank, count), *arguments)
        except Exception:  # the test that waits for this rank shows it
            answer = traceback.format_exc()
        pipe.send(answer)
