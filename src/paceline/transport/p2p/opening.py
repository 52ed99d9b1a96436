"""Opening a p2p channel: what a client offers, what a server makes of it, and the client's end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import distributed

from paceline.schema.protocol import HostFacts
from paceline.transport.buffers import HostBuffers
from paceline.transport.negotiation import OpenedSender, SenderRequest, TransportRefused, why_not_nccl
from paceline.transport.p2p.communicator import CLIENT, SERVER, P2PName, is_interface_given
from paceline.transport.p2p.interfaces import LOOPBACK, address_towards, interface_of, is_loopback, resolve
from paceline.transport.p2p.link import Link
from paceline.transport.p2p.memory import DeviceMemory, HostMemory, RowMemory
from paceline.transport.p2p.receiver import P2PReceiver
from paceline.transport.p2p.sender import P2PSender
from paceline.transport.p2p.store import AskStore, SessionStore

_MAX_TIMEOUT_S = 3600.0


def p2p_kinds(device: torch.device) -> tuple[P2PName, ...]:
    """The kinds of channel that a process whose rows are on `device` can have."""
    kinds: tuple[P2PName, ...] = ("nccl", "gloo") if device.type == "cuda" else ("gloo",)
    return tuple(kind for kind in kinds if _is_available(kind))


def offer_p2p(
    kind: P2PName, client: HostFacts, server: HostFacts, server_name: str, stall_timeout_s: float
) -> dict[str, str]:
    """An offer's parameters: "stall_timeout_s" and, for gloo, the server's "address" as the client reaches it.

    Args:
        server_name: host name or address in the server's URL.

    Raises:
        TransportRefused: torch has no such communicator here, or the name has no address.
    """
    _check_available(kind)
    parameters = {"stall_timeout_s": f"{stall_timeout_s:g}"}
    if kind == "gloo":
        parameters["address"] = LOOPBACK if client.host_id == server.host_id else resolve(server_name)
    return parameters


@dataclass(frozen=True, slots=True)
class P2PSenders:
    """Opens a server's ends of p2p channels (negotiation.OpenSender)."""

    kind: P2PName
    buffers: HostBuffers
    """For gloo; may be shared by all sessions. Pinned if the engine is on a GPU."""
    advertise: str | None = None
    """gloo: the address whose interface is listened on; None takes the one that the client names."""
    max_unsent_rows: int = 4
    """Per session: rows packed, whose tensors the client has not taken."""
    max_unsent_bytes: int = 8 << 30
    """Of these; a larger row is alone."""

    def __call__(self, request: SenderRequest) -> OpenedSender:
        """Raises TransportRefused where the two processes cannot be connected."""
        _check_available(self.kind)
        timeout_s = _timeout_s(request.parameters)
        interface = None
        if self.kind == "gloo":
            interface = self._interface(request)
        elif (reason := why_not_nccl(request.client, request.server)) is not None:
            raise TransportRefused(reason)
        memory = _memory(self.kind, self.buffers, request.device)
        senders: list[P2PSender] = []

        def key_was_set(key: str) -> None:
            for sender in senders:
                sender.proposals_changed(key)

        store = SessionStore(key_was_set)
        link = Link(self.kind, SERVER, store.answer, timeout_s, interface, memory.stream)
        senders.append(P2PSender(link, store, memory, self.max_unsent_rows, self.max_unsent_bytes))
        return OpenedSender(senders[0], {}, store)

    def _interface(self, request: SenderRequest) -> str | None:
        if is_interface_given():
            return None
        address = request.parameters.get("address", "")
        try:
            alone = is_loopback(address)
        except ValueError as error:
            raise TransportRefused(f"gloo's offer names the server's IP address; this one names {address!r}") from error
        if alone and request.client.host_id != request.server.host_id:
            raise TransportRefused("server and trainer are on different hosts, and the offer names the loopback")
        return interface_of(resolve(self.advertise) if self.advertise and not alone else address)


def open_p2p_receiver(
    kind: P2PName, parameters: Mapping[str, str], ask: AskStore, buffers: HostBuffers, device: torch.device
) -> P2PReceiver:
    """The client's end of a session's channel; it connects by itself, `connect` waits for it.

    Args:
        parameters: of this client's offer.
        ask: sends a call to the session's store (POST /v1/sessions/{id}/store).
        buffers: for gloo; pinned if `device` is a GPU.
        device: the trainer's.

    Raises:
        TransportRefused: no interface leads to the server.
    """
    memory = _memory(kind, buffers, device)
    interface = None
    if kind == "gloo" and not is_interface_given():
        interface = interface_of(address_towards(parameters["address"]))
    link = Link(kind, CLIENT, ask, _timeout_s(parameters), interface, memory.stream)
    return P2PReceiver(link, memory)


def _is_available(kind: P2PName) -> bool:
    if not distributed.is_available():
        return False
    return distributed.is_nccl_available() if kind == "nccl" else distributed.is_gloo_available()


def _check_available(kind: P2PName) -> None:
    if not _is_available(kind):
        raise TransportRefused(f"torch was built without {kind}")


def _timeout_s(parameters: Mapping[str, str]) -> float:
    text = parameters.get("stall_timeout_s", "")
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s <= _MAX_TIMEOUT_S:
        raise TransportRefused(f"a p2p offer says stall_timeout_s, up to {_MAX_TIMEOUT_S:g}; this one {text!r}")
    return timeout_s


def _memory(kind: P2PName, buffers: HostBuffers, device: torch.device) -> RowMemory:
    return DeviceMemory(device) if kind == "nccl" else HostMemory(buffers, device)
