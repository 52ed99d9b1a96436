"""The client's side of opening a session's channel: what is offered, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from paceline.config.placement import TransportConfig
from paceline.schema.protocol import StoreCall, StoreReply, TransportName
from paceline.transport.base import RemoteReceiver
from paceline.transport.buffers import HostBuffers
from paceline.transport.http import HttpReceiver

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
            TransportError: the channel could not be made; the session is ended.
        """

    def withdraw(self) -> None:
        """It was not taken: nothing of it is left. Safe to call twice, and after a failed `open`."""


class HttpOffer:
    """Always works: the features come in the bodies of replies."""

    def __init__(self, buffers: HostBuffers, device: torch.device) -> None:
        self._buffers = buffers
        self._device = device

    def prepare(self) -> Mapping[str, str]:
        return {}

    def open(self, parameters: Mapping[str, str], call_store: CallStore) -> RemoteReceiver:
        del parameters, call_store
        return HttpReceiver(self._buffers, self._device)

    def withdraw(self) -> None:
        """Nothing was prepared."""


def receiver_offers(
    config: TransportConfig, device: torch.device, buffers: HostBuffers
) -> dict[TransportName, ReceiverOffer]:
    """Every way to receive that this process has, for one session.

    Args:
        device: the trainer's.
        buffers: host memory for rows (pinned for a trainer on a GPU), shared by all connections of the trainer.
    """
    del config
    return {"http": HttpOffer(buffers, device)}
