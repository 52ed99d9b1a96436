"""Which transport a session uses: what each side knows about its host, what a client offers, what a server takes.

A client orders its offers by what the two processes' `HostFacts` allow; the server takes the first that really works
(`OpenSender` raises `TransportRefused` for one that does not). A transport asked for by name is the only offer. "auto"
offers, fastest first: nccl between two GPUs of one host, file on one host, http. Tensors on nccl and gloo are neither
encrypted nor authenticated, so across hosts "auto" never offers them.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from paceline.errors import HandshakeError, PacelineError
from paceline.schema.protocol import (
    HostFacts,
    ServerInfo,
    SessionReply,
    StoreCall,
    StoreReply,
    TransportName,
    TransportOffer,
)
from paceline.transport.base import Reply, Sender

logger = logging.getLogger(__name__)

_SIGHT = ("/proc/self/ns/net", "/proc/self/ns/ipc", "/proc/self/ns/pid", "/dev/shm")  # noqa: S108 - looked at only
_COST = {
    "nccl": "rows go through host memory instead of straight from GPU to GPU",
    "file": "rows are copied through sockets instead of shared memory, at a core of either side",
}


class TransportRefused(PacelineError):  # noqa: N818 - an answer, not a fault: the next offer is tried
    """This offer cannot work between these two processes; the message says why."""


class Rendezvous(Protocol):
    """A session's key-value store, where the two ends of a p2p channel meet; see transport/p2p/store.py."""

    def answer(self, call: StoreCall) -> StoreReply:
        """What POST /v1/sessions/{id}/store answers; any thread, never waits.

        Raises:
            WireError: more than a rendezvous can need.
        """


@dataclass(frozen=True, slots=True)
class SenderRequest:
    """What a server knows when it opens its end of a session's channel."""

    parameters: Mapping[str, str]
    """Of the client's offer."""
    client: HostFacts
    server: HostFacts
    session: str
    """The session's public id."""
    device: torch.device
    """Where the engine leaves features."""


@dataclass(frozen=True, slots=True)
class OpenedSender:
    """A server's end of a session's channel."""

    sender: Sender[Reply]
    parameters: Mapping[str, str]
    """What the client needs to know for it: SessionReply.parameters."""
    rendezvous: Rendezvous | None = None
    """nccl, gloo: what answers the session's store calls; None refuses them."""


OpenSender = Callable[[SenderRequest], OpenedSender]
"""Opens a server's end, or raises TransportRefused. One for each transport a server has."""

Prepare = Callable[[], Mapping[str, str]]
"""Makes an offer's parameters on the client (a directory, a nonce), or raises TransportRefused."""


def host_facts(device: torch.device) -> HostFacts:
    """Where this process runs.

    `host_id` is equal for processes that can reach each other's loopback, shared memory and process ids: two containers
    of one machine that share none of it count as two hosts.
    """
    gpu_uuid = None
    if device.type == "cuda":
        gpu_uuid = str(torch.cuda.get_device_properties(device).uuid)
    return HostFacts(host_id=_host_id(), device=device.type, gpu_uuid=gpu_uuid)


def _host_id() -> str:
    facts = [platform.node()]
    try:
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    except OSError:  # not Linux: the name and a network card's address
        facts.append(f"{uuid.getnode():x}")
    for place in _SIGHT:
        try:
            status = Path(place).stat()
        except OSError:
            continue
        # a namespace is its inode, a mounted file system its device
        facts.append(f"{place} {status.st_dev} {status.st_ino if place.startswith('/proc') else ''}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Offers:
    """What a client offers to one server."""

    offers: tuple[TransportOffer, ...]
    expected: TransportName
    """The fastest that the facts of both sides allow."""
    why: str
    """Why that one is expected."""
    failed: Mapping[TransportName, str]
    """Expected to work, not offered -> the reason."""
    by_name: bool

    def report(self, server: str, reply: SessionReply) -> None:
        """Log in one line what a session's rows travel by; a WARNING if it is less than was expected."""
        if self.by_name:
            return
        reasons = [*self.failed.items(), *reply.refused.items()]
        lost = [f"{name}: {reason}" for name, reason in reasons if name != reply.transport]
        if reply.transport == self.expected or not lost:
            logger.info("rows of %s travel by %s: %s", server, reply.transport, self.why)
            return
        logger.warning(
            "rows of %s travel by %s instead of %s (%s); %s. transport.kind = %r asks for what is used now, %r for "
            "what was expected and for an error where it cannot work",
            server,
            reply.transport,
            self.expected,
            "; ".join(lost),
            _COST.get(self.expected, "they travel slower"),
            reply.transport,
            self.expected,
        )


def client_offers(
    kind: Literal["auto"] | TransportName,
    client: HostFacts,
    server: ServerInfo,
    prepare: Mapping[TransportName, Prepare],
) -> Offers:
    """What to offer to `server`, most wanted first.

    Args:
        kind: transport.kind.
        client: of this process.
        server: what the server says about itself.
        prepare: for each transport that this process can receive by, what makes its offer's parameters.

    Raises:
        HandshakeError: a transport asked for by name cannot work between the two; names both sides and the remedy.
    """
    if kind == "auto":
        return _auto(client, server, prepare)
    try:
        offer = _offer(kind, client, server, prepare)
    except TransportRefused as refused:
        raise HandshakeError(
            f'transport.kind = "{kind}" cannot work here: {refused}; "auto" takes what works'
        ) from refused
    return Offers((offer,), kind, "asked for by name", {}, by_name=True)


def _auto(client: HostFacts, server: ServerInfo, prepare: Mapping[TransportName, Prepare]) -> Offers:
    one_host = client.host_id == server.host.host_id
    why, wanted = "server and trainer are on different hosts", ["http"]
    if one_host:
        why, wanted = "server and trainer are on one host", ["file", "http"]
    if one_host and _different_gpus(client, server.host):
        why, wanted = "server and trainer are on two GPUs of one host", ["nccl", "file", "http"]
    names: list[TransportName] = [name for name in prepare if name in wanted]
    names.sort(key=wanted.index)
    offers: list[TransportOffer] = []
    failed: dict[TransportName, str] = {}
    for name in names:
        try:
            offers.append(_offer(name, client, server, prepare))
        except TransportRefused as refused:
            failed[name] = str(refused)
    if not offers:
        raise HandshakeError(
            f"no transport works here: the server has {', '.join(server.transports)}, this process "
            f"{', '.join(prepare)} ({'; '.join(f'{name}: {reason}' for name, reason in failed.items())})"
        )
    return Offers(tuple(offers), names[0], why, failed, by_name=False)


def _offer(
    name: TransportName, client: HostFacts, server: ServerInfo, prepare: Mapping[TransportName, Prepare]
) -> TransportOffer:
    if name not in prepare:
        raise TransportRefused(f"this process can receive by {', '.join(prepare)} only")
    if name not in server.transports:
        raise TransportRefused(f"the server sends by {', '.join(server.transports)} only")
    if name == "nccl" and (reason := why_not_nccl(client, server.host)) is not None:
        raise TransportRefused(reason)
    return TransportOffer(name=name, parameters=dict(prepare[name]()))


def why_not_nccl(client: HostFacts, server: HostFacts) -> str | None:
    """Why NCCL cannot connect the two; None if nothing speaks against it."""
    if client.device != "cuda" or server.device != "cuda":
        return f"nccl connects two GPUs; the trainer is on {client.device}, the server on {server.device}"
    if not _different_gpus(client, server):
        return f"nccl refuses two ends on one GPU; trainer and server are both on {client.gpu_uuid}"
    return None


def _different_gpus(client: HostFacts, server: HostFacts) -> bool:
    on_gpus = client.device == server.device == "cuda"
    return on_gpus and client.gpu_uuid != server.gpu_uuid
