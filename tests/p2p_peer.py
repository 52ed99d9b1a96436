"""A server's end of p2p channels as a process of its own, without HTTP: calls travel over a Unix socket."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch

from paceline.errors import ServerLostError, TransportError
from paceline.schema.features import Features
from paceline.schema.layout import TensorLayout, layout_bytes
from paceline.schema.protocol import ReplyHeader, StoreCall, StoreReply
from paceline.transport.base import Incoming, RowBuffer
from paceline.transport.buffers import HostBuffers
from paceline.transport.feature_bytes import describe
from paceline.transport.negotiation import OpenedSender, SenderRequest, host_facts
from paceline.transport.p2p.opening import P2PSenders, offer_p2p, open_p2p_receiver
from paceline.transport.p2p.receiver import P2PReceiver

NUM_LAYERS = 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def features_of(position: int, num_tokens: int = 64, hidden_size: int = 32, device: str = "cpu") -> Features:
    """Random bits that are a function of the position: any copying mistake shows."""
    generator = torch.Generator().manual_seed(position)
    dtype = DTYPES[position % len(DTYPES)]

    def bits(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    return Features(
        layers=tuple(range(NUM_LAYERS)),
        hidden=bits(num_tokens, NUM_LAYERS, hidden_size),
        greedy=torch.randint(0, 1 << 20, (num_tokens,), dtype=torch.int32, generator=generator).to(device),
        final_hidden=bits(num_tokens // 2, hidden_size),
        final_index=torch.arange(num_tokens // 2, dtype=torch.int32).to(device),
        logsumexp=torch.randn(num_tokens, generator=generator).to(device),
        row_hash=f"{position:064x}",
        finite=True,
    )


def is_equal(ours: Features, theirs: Features) -> bool:
    """Bit by bit, on whatever device."""
    expected, received = ours.tensors(), theirs.tensors()
    return expected.keys() == received.keys() and all(
        tensor.dtype == received[name].dtype
        and torch.equal(tensor.cpu().view(torch.uint8), received[name].cpu().view(torch.uint8))
        for name, tensor in expected.items()
    )


def serve(address: str, kind: str, device: str) -> None:
    """Answer calls until the process is killed: one thread a connection, as a server of HTTP does."""
    if device != "cpu":
        torch.cuda.set_device(device)
    sessions: dict[str, OpenedSender] = {}
    open_sender = P2PSenders(kind, HostBuffers(64 << 20))
    with Listener(address, "AF_UNIX") as listener:
        while True:
            arguments = (listener.accept(), sessions, open_sender, torch.device(device))
            threading.Thread(target=_answer, args=arguments, daemon=True).start()


def _answer(
    connection: Connection, sessions: dict[str, OpenedSender], open_sender: P2PSenders, device: torch.device
) -> None:
    while True:
        try:
            op, session, what = connection.recv()
        except (EOFError, OSError):
            return
        if op == "facts":
            connection.send(host_facts(device))
        elif op == "open":
            parameters, client = what
            sessions[session] = open_sender(SenderRequest(parameters, client, host_facts(device), session, device))
            connection.send(None)
        elif op == "close":
            sessions.pop(session).sender.close()
            connection.send(None)
        elif op == "store":
            connection.send(sessions[session].rendezvous.answer(what))
        elif op == "threads":
            connection.send([thread.name for thread in threading.enumerate()])
        else:
            _send_row(connection, sessions[session], op == "row that cannot be sent", device, **what)


def _send_row(connection: Connection, opened: OpenedSender, is_lost: bool, device: torch.device, **shape: int) -> None:
    try:
        reply = opened.sender.send(shape["position"], features_of(**shape, device=str(device)))
    except TransportError as error:
        connection.send(error)
        return
    connection.send(b"".join(bytes(part) for part in reply.body))
    reply.sent(not is_lost)


class Peer:
    """The process, and calls to it from any thread."""

    def __init__(self, folder: Path, kind: str = "gloo", device: str = "cpu") -> None:
        self.kind = kind
        self._address = str(folder / f"peer-{os.urandom(4).hex()}")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["p2p_peer"])
        self._process = context.Process(target=serve, args=(self._address, kind, device), daemon=True)
        self._process.start()
        self._own = threading.local()
        while not self._is_listening():
            self._process.join(0.01)
            assert self._process.is_alive()

    def _is_listening(self) -> bool:
        try:
            self.call("facts")
        except ServerLostError:
            return False
        return True

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def call(self, op: str, session: str = "", what: Any = None) -> Any:
        """The peer's answer; a connection for each thread."""
        try:
            if not hasattr(self._own, "connection"):
                self._own.connection = Client(self._address, "AF_UNIX")
            self._own.connection.send((op, session, what))
            answer = self._own.connection.recv()
        except (OSError, EOFError) as error:
            raise ServerLostError("the peer is gone") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def open(self, session: str, stall_timeout_s: float, device: str = "cpu") -> Session:
        client, server = host_facts(torch.device(device)), self.call("facts")
        parameters = offer_p2p(self.kind, client, server, "localhost", stall_timeout_s)
        self.call("open", session, (parameters, client))

        def ask(call: StoreCall) -> StoreReply:
            return self.call("store", session, call)

        receiver = open_p2p_receiver(self.kind, parameters, ask, HostBuffers(64 << 20), torch.device(device))
        return Session(self, session, receiver)

    def kill(self, by: int = signal.SIGKILL) -> None:
        if self.is_alive():
            os.kill(self.pid, by)
        if by == signal.SIGKILL:
            self._process.join(10)


class Session:
    """A client's session on a peer."""

    def __init__(self, peer: Peer, name: str, receiver: P2PReceiver) -> None:
        self.peer, self.name, self.receiver = peer, name, receiver

    def header(self, position: int, op: str = "row", **shape: int) -> ReplyHeader:
        """Ask for a row, and get no further than its header."""
        return ReplyHeader.model_validate_json(self.peer.call(op, self.name, {"position": position, **shape}))

    def buffer(self, position: int, **shape: int) -> tuple[dict[str, TensorLayout], RowBuffer]:
        """The layout of a row and memory for it."""
        _, layout = describe(position, features_of(position, **shape))
        return layout, self.receiver.reserve(layout_bytes(layout))

    def receive(self, header: ReplyHeader, **shape: int) -> Features:
        """The features that belong to the header, in memory of their own."""
        return self._receive(header, *self.buffer(header.position, **shape))

    def _receive(self, header: ReplyHeader, layout: dict[str, TensorLayout], buffer: RowBuffer) -> Features:
        try:
            delivery = self.receiver.receive(Incoming(header, layout, buffer, None))
        except BaseException:
            buffer.give_back()
            raise
        features = delivery.take()
        copies = {name: tensor.clone() for name, tensor in features.tensors().items()}
        copy = Features(features.layers, row_hash=features.row_hash, finite=features.finite, **_all_names(copies))
        delivery.release()
        return copy

    def row(self, position: int, **shape: int) -> Features:
        """As a client does it: memory first."""
        layout, buffer = self.buffer(position, **shape)
        return self._receive(self.header(position, **shape), layout, buffer)

    def close(self) -> None:
        self.receiver.close()
        if self.peer.is_alive():
            self.peer.call("close", self.name)


def _all_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    return {name: tensors.get(name) for name in ("hidden", "greedy", "final_hidden", "final_index", "logsumexp")}


@contextmanager
def session_on(peer: Peer, name: str, stall_timeout_s: float = 20.0, device: str = "cpu") -> Iterator[Session]:
    """Open for the length of the block."""
    session = peer.open(name, stall_timeout_s, device)
    try:
        yield session
    finally:
        session.close()
