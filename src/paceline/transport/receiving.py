"""The client's side of opening a session's channel: what is offered, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import torch

from paceline.config.placement import TransportConfig
from paceline.schema.protocol import HostFacts, StoreCall, StoreReply, TransportName
from paceline.transport.base import RemoteReceiver
from paceline.transport.buffers import HostBuffers
from paceline.transport.file import SHARED_MEMORY, FileOffer
from paceline.transport.http import HttpReceiver
from paceline.transport.p2p.communicator import P2PName
from paceline.transport.p2p.opening import offer_p2p, open_p2p_receiver

CallStore = Callable[[StoreCall], StoreReply]
"""Makes one store call of the session."""


class ReceiverOffer(Protocol):
    """One way to receive that is offered for one session, and either opened or withdrawn."""

    def prepare(self) -> Mapping[str, str]:
        """The parameters of the offer; called once, first.

        Raises:
            TransportRefused: it cannot work in this process.
        """

    def open(self, parameters: Mapping[str, str], call_store: CallStore) -> RemoteReceiver:
        """The client's end; `parameters` are what the server said about its own (SessionReply.parameters).

        Raises:
            TransportRefused, TransportError: the channel could not be made.
        """

    def withdraw(self) -> None:
        """It was not taken: nothing of it is left. Safe to call twice, and after a failed `open`."""


@dataclass(frozen=True, slots=True)
class ClientSide:
    """What a trainer's process knows when it offers ways to receive."""

    config: TransportConfig
    device: torch.device
    """The trainer's."""
    buffers: HostBuffers
    """Host memory for rows (pinned for a trainer on a GPU), shared by all connections of the trainer."""
    client: HostFacts
    server: HostFacts
    url: str
    """The server's."""


class _HttpOffer:
    """Always works: the features come in the bodies of replies."""

    def __init__(self, side: ClientSide) -> None:
        self._side = side

    def prepare(self) -> Mapping[str, str]:
        return {}

    def open(self, parameters: Mapping[str, str], call_store: CallStore) -> RemoteReceiver:
        del parameters, call_store
        return HttpReceiver(self._side.buffers, self._side.device)

    def withdraw(self) -> None:
        """Nothing was prepared."""


class _P2POffer:
    """A channel of its own, gloo or nccl; the two ends meet in the session's store."""

    def __init__(self, kind: P2PName, side: ClientSide) -> None:
        self._kind: P2PName = kind
        self._side = side
        self._offered: dict[str, str] = {}

    def prepare(self) -> Mapping[str, str]:
        side = self._side
        name = urlsplit(side.url).hostname or ""
        self._offered = offer_p2p(self._kind, side.client, side.server, name, side.config.stall_timeout_s)
        return self._offered

    def open(self, parameters: Mapping[str, str], call_store: CallStore) -> RemoteReceiver:
        del parameters
        receiver = open_p2p_receiver(self._kind, self._offered, call_store, self._side.buffers, self._side.device)
        try:
            receiver.connect()
        except BaseException:
            receiver.close()
            raise
        return receiver

    def withdraw(self) -> None:
        """Nothing was prepared."""


def receiver_offers(side: ClientSide) -> dict[TransportName, ReceiverOffer]:
    """Every way to receive that this process has, for one session."""
    directory = Path(side.config.directory) if side.config.directory is not None else SHARED_MEMORY
    return {
        "http": _HttpOffer(side),
        "file": FileOffer(side.buffers, side.device, directory, side.client, side.config.stall_timeout_s),
        "nccl": _P2POffer("nccl", side),
        "gloo": _P2POffer("gloo", side),
    }
