"""A real target server around a small engine, in this process; its sockets, threads and transports are real."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import numpy as np
import torch

from paceline.client.remote import RemoteConnection
from paceline.config.placement import PoolConfig, TransportConfig
from paceline.schema.protocol import TransportName
from paceline.target.admission import Admission
from paceline.target.interface import Engine
from paceline.target.server.server import ServedTarget, TargetServer
from paceline.target.server.settings import ServerSettings
from paceline.target.server.weights import Table
from paceline.transport.buffers import HostBuffers
from paceline.transport.file import FileSenders
from paceline.transport.http import HttpSender
from paceline.transport.negotiation import OpenedSender, OpenSender, host_facts
from paceline.transport.p2p.opening import P2PSenders

CPU = torch.device("cpu")


class SmallTable:
    """A weight that lies in memory."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self.shape = tuple(weight.shape)

    def read(self, rows: slice | np.ndarray) -> torch.Tensor:
        return self._weight[rows]


class SmallTables:
    """The weights of a target of 50 tokens: what stands in them says where it stood."""

    def __init__(self) -> None:
        self.tensors = {"embedding": torch.arange(400.0).view(50, 8), "lm_head": -torch.arange(400.0).view(50, 8)}

    def table(self, name: str) -> Table | None:
        return SmallTable(self.tensors[name]) if name in self.tensors else None


def all_senders() -> dict[TransportName, OpenSender]:
    buffers = HostBuffers(1 << 24)
    return {
        "http": lambda request: OpenedSender(HttpSender(buffers), {}),
        "file": FileSenders(buffers),
        "gloo": P2PSenders("gloo", buffers),
    }


@contextmanager
def serve(
    engine: Engine,
    *,
    senders: Mapping[TransportName, OpenSender] | None = None,
    tokenizer: Callable[[], Mapping[str, str]] = lambda: {"tokenizer.json": "{}"},
    **settings: object,
) -> Iterator[TargetServer]:
    """A server of `engine`, which is closed with it."""
    admission = Admission(engine)
    target = ServedTarget(
        admission=admission,
        device=CPU,
        weights=SmallTables(),
        tokenizer=tokenizer,
        host=host_facts(CPU),
        senders=senders or all_senders(),
    )
    server = TargetServer(target, ServerSettings(**settings))  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.stop()
        admission.close()
        with suppress(AttributeError):
            engine.close()


def connect(
    url: str,
    *,
    transport: Mapping[str, object] | None = None,
    pool: Mapping[str, object] | None = None,
    token: str | None = None,
    buffers: HostBuffers | None = None,
) -> RemoteConnection:
    """An unopened connection for a trainer on the CPU; over http unless `transport` says otherwise."""
    return RemoteConnection(
        url,
        TransportConfig.model_validate({"kind": "http", **(transport or {})}),
        PoolConfig.model_validate(pool or {}),
        CPU,
        token=token,
        label="tests",
        buffers=buffers,
    )
