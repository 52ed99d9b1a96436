"""The trainer ranks of a run: who this process is among them, and everything they do together."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]  # public, not in its __all__
    FileStore,
    PrefixStore,
    Store,
    TCPStore,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from paceline.errors import ConfigError

T = TypeVar("T")


class _Question:
    """Whether any rank was asked to end, as each knew it when it asked; every rank asks as often."""

    def __init__(self, asked: bool) -> None:
        self._any = torch.tensor(int(asked))
        self._work = dist.all_reduce(self._any, dist.ReduceOp.MAX, async_op=True)

    def wait(self) -> bool:
        """The answer, once every rank has asked."""
        assert self._work is not None
        self._work.wait()
        return bool(self._any)


class Ranks:
    """One rank's view of all of them; complete with a single one, too, where nothing is exchanged.

    Only the thread that trains calls it (the checkpoint writer has a group of its own): every rank in the same order.
    """

    def __init__(self, stop: threading.Event, rank: int = 0, num_ranks: int = 1, sequence_parallel: int = 1) -> None:
        """With several ranks the default process group is open already.

        Args:
            stop: this process was asked to end.
            sequence_parallel: P neighbouring ranks train each row together.

        Raises:
            ConfigError: P does not divide the number of ranks.
        """
        if num_ranks % sequence_parallel:
            raise ConfigError(
                f"training.sequence_parallel = {sequence_parallel} does not divide the {num_ranks} trainer ranks"
            )
        self.rank, self.num_ranks, self.sequence_parallel = rank, num_ranks, sequence_parallel
        self.data_rank, self.part = divmod(rank, sequence_parallel)
        """Which share of the rows this rank trains, and which part of each of them."""
        self.num_data_ranks = num_ranks // sequence_parallel
        self._stop, self._agreed = stop, False
        self._question: _Question | None = None
        """Of `agree_to_stop_soon`, whose answer is not awaited yet."""
        self.checkpoint_group = dist.new_group(backend="gloo") if num_ranks > 1 else None
        """For the thread that writes checkpoints."""
        self.sequence_group = self._open_sequence_group()
        """The ranks that train the same rows as this one; None where rows are trained whole."""

    @property
    def is_first(self) -> bool:
        """Rank 0 writes metrics, states and the console."""
        return self.rank == 0

    @property
    def asked_to_stop(self) -> bool:
        """Whether this rank was asked to end; the others may not have been."""
        return self._stop.is_set()

    @property
    def stopping(self) -> bool:
        """Whether a single rank was asked to end, or several have agreed to."""
        return self._stop.is_set() if self.num_ranks == 1 else self._agreed

    def agree_to_stop(self) -> bool:
        """Whether any rank was asked to end: the same answer on all of them."""
        if self.num_ranks == 1:
            return self._stop.is_set()
        self.agree_to_stop_soon()
        last, self._question = self._question, None
        return self._heard(last)

    def agree_to_stop_soon(self) -> bool:
        """As `agree_to_stop`, but of what was so at the call before: nobody waits for the slowest rank of now."""
        if self.num_ranks == 1:
            return self._stop.is_set()
        before, self._question = self._question, _Question(self._stop.is_set())
        return self._heard(before)

    def _heard(self, question: _Question | None) -> bool:
        self._agreed = self._agreed or (question is not None and question.wait())
        return self._agreed

    def sum(self, values: Tensor) -> Tensor:
        """`values` added up over all ranks, in place; on a GPU nothing waits for it."""
        if self.num_ranks > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """What every rank has, by rank; small objects of our own processes."""
        if self.num_ranks == 1:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values

    def draw_secret(self) -> str | None:
        """32 hex digits that the ranks of this sequence-parallel group know, drawn anew; None without one."""
        if self.sequence_parallel == 1:
            return None
        return self.gather(secrets.token_hex(16))[self.data_rank * self.sequence_parallel]

    def first_then_others(self, call: Callable[[], T]) -> T:
        """`call()` on rank 0; on the others once it has returned there, so that they find what it wrote."""
        if self.is_first:
            result = call()
            self.gather(None)
            return result
        self.gather(None)
        return call()

    def mesh(self, device_type: str, sharding: Literal["none", "full"]) -> DeviceMesh:
        """What FSDP2 divides weights over: replicas of whole weights ("none"), or shards ("full")."""
        if sharding == "full":
            return init_device_mesh(device_type, (self.num_ranks,), mesh_dim_names=("shards",))
        return init_device_mesh(device_type, (self.num_ranks, 1), mesh_dim_names=("replicas", "shards"))

    def _open_sequence_group(self) -> dist.ProcessGroup | None:
        if self.sequence_parallel == 1:
            return None
        ranks = range(self.num_ranks)
        groups = [list(ranks[start : start + self.sequence_parallel]) for start in ranks[:: self.sequence_parallel]]
        own: dist.ProcessGroup | None = dist.new_subgroups_by_enumeration(groups)[0]
        return own


@contextlib.contextmanager
def open_ranks(
    stop: threading.Event,
    rank: int,
    num_ranks: int,
    address: str,
    *,
    hosted: bool = True,
    device: torch.device,
    sequence_parallel: int = 1,
    timeout_s: float = 1800.0,
) -> Iterator[Ranks]:
    """The ranks of a run, met at `address`; gloo for the host's tensors, NCCL for those of GPUs.

    Args:
        address: "file:///PATH" of a file that does not exist yet, on one host; or "tcp://HOST:PORT", or
            "tcp://HOST:PORT/NAME".
        hosted: rank 0 listens at HOST:PORT; else somebody does already (torchrun's agent).
        timeout_s: waiting longer for another rank is an error.

    Raises:
        ConfigError: an address of another kind.
    """
    if num_ranks == 1:
        yield Ranks(stop, sequence_parallel=sequence_parallel)
        return
    timeout = timedelta(seconds=timeout_s)
    store = _store(rank, num_ranks, address, hosted, timeout)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=PrefixStore("paceline/trainers", store),
        rank=rank,
        world_size=num_ranks,
        timeout=timeout,
        device_id=device if on_gpu else None,
    )
    yield Ranks(stop, rank, num_ranks, sequence_parallel)
    # Not after an error: the others may never come, and the end of the process ends its groups as well.
    dist.destroy_process_group()


def _store(rank: int, num_ranks: int, address: str, hosted: bool, timeout: timedelta) -> Store:
    if address.startswith("file://"):
        # One host: gloo would otherwise listen on whatever address the host's name stands for.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        return FileStore(address.removeprefix("file://"), num_ranks)
    place, _, name = address.removeprefix("tcp://").partition("/")
    host, separator, port = place.rpartition(":")
    if not address.startswith("tcp://") or not separator or not port.isdigit():
        raise ConfigError(f"rendezvous {address!r}: file:///PATH or tcp://HOST:PORT")
    store = TCPStore(host.strip("[]"), int(port), num_ranks, is_master=hosted and rank == 0, timeout=timeout)
    return PrefixStore(name, store) if name else store
