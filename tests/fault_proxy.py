"""A proxy process between clients and one server that does to row replies what networks do.

    python fault_proxy.py HOST:PORT '[{"kind": "flip", "at_row": 3}, ...]'

Prints {"port": N} when it listens, then one line of JSON for every fault it has done. Faults are scheduled by the
number of row requests that came through, from 0, never by time:

    drop        the connection is closed instead of the reply
    delay       the reply waits until `rows` more row replies have passed, or half a second went by without one
    duplicate   the reply is sent twice on its connection
    truncate    half of the reply, then the connection is closed
    flip        one bit of the reply's body is turned; `where` "head" takes it near the start
    flip_header one bit of the reply's HTTP header
    flip_request one bit of the request's body on its way to the server
    swap        the reply changes places with the next row's
    stall       half of the reply, then nothing more, the connection stays open
"""

from __future__ import annotations

import json
import random
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

Fault = dict[str, Any]
_ROWS = re.compile(rb"^POST /v1/sessions/[0-9a-f]+/rows ")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


@dataclass
class Message:
    """One HTTP message; `head` ends with the empty line."""

    head: bytes
    body: bytes


class Faults:
    """The schedule, and what it counts."""

    def __init__(self, faults: list[Fault]) -> None:
        self._by_row = {int(fault["at_row"]): fault for fault in faults}
        self._changed = threading.Condition()
        self._num_requests = 0
        self._num_replies = 0
        self._to_swap: list[tuple[Message, threading.Event, list[Message]]] = []

    def next(self) -> Fault | None:
        """What happens to the row request that has just come."""
        with self._changed:
            number = self._num_requests
            self._num_requests += 1
            return self._by_row.pop(number, None)

    def told(self, fault: Fault) -> None:
        print(json.dumps(fault), flush=True)

    def reply_passed(self) -> None:
        with self._changed:
            self._num_replies += 1
            self._changed.notify_all()

    def wait_for_replies(self, num: int) -> None:
        with self._changed:
            goal = self._num_replies + num
            while self._num_replies < goal:
                if not self._changed.wait(0.5):
                    return

    def swap(self, reply: Message) -> Message:
        """This reply for the next one's; its own back if no other comes within a second."""
        arrived, other = threading.Event(), []
        entry = (reply, arrived, other)
        with self._changed:
            self._to_swap.append(entry)
        if arrived.wait(1.0):
            return other[0]
        with self._changed:
            if entry in self._to_swap:
                self._to_swap.remove(entry)
                return reply
        arrived.wait()
        return other[0]

    def offer_for_swap(self, reply: Message) -> Message:
        """The reply of one that waits to swap, for this one; else this one."""
        with self._changed:
            if not self._to_swap:
                return reply
            waiting, arrived, other = self._to_swap.pop()
            other.append(reply)
            arrived.set()
        return waiting


def read_message(stream: socket.socket, rest: bytearray) -> Message | None:
    """The next message of a connection; `rest` keeps what was read beyond it. None at its end."""
    while (end := rest.find(b"\r\n\r\n")) < 0:
        if not (data := stream.recv(1 << 16)):
            return None
        rest += data
    head = bytes(rest[: end + 4])
    found = _LENGTH.search(head)
    length = int(found[1]) if found else 0
    while len(rest) < end + 4 + length:
        if not (data := stream.recv(1 << 20)):
            return None
        rest += data
    body = bytes(rest[end + 4 : end + 4 + length])
    del rest[: end + 4 + length]
    return Message(head, body)


def with_flipped_bit(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


class StopError(Exception):
    """The connection to the client ends here."""


class Link:
    """One client connection and its own connection to the server."""

    def __init__(self, client: socket.socket, server: tuple[str, int], faults: Faults, chance: random.Random) -> None:
        self.client, self.server, self.faults, self.chance = client, server, faults, chance

    def run(self) -> None:
        try:
            with self.client, socket.create_connection(self.server) as upstream:
                from_client, from_server = bytearray(), bytearray()
                while (request := read_message(self.client, from_client)) is not None:
                    is_row = _ROWS.match(request.head) is not None
                    fault = self.faults.next() if is_row else None
                    if fault and fault["kind"] == "flip_request":
                        request.body = with_flipped_bit(request.body, self.chance.randrange(8 * len(request.body)))
                        self.faults.told(fault)
                        fault = None
                    upstream.sendall(request.head + request.body)
                    reply = read_message(upstream, from_server)
                    if reply is None:
                        return
                    if is_row:
                        self.pass_row_reply(reply, fault)
                        self.faults.reply_passed()
                    else:
                        self.client.sendall(reply.head + reply.body)
        except (OSError, StopError):
            return

    def pass_row_reply(self, reply: Message, fault: Fault | None) -> None:
        if fault is None:
            reply = self.faults.offer_for_swap(reply)
            self.client.sendall(reply.head + reply.body)
            return
        self.faults.told(fault)
        kind, whole = fault["kind"], reply.head + reply.body
        if kind == "drop":
            raise StopError
        if kind == "delay":
            self.faults.wait_for_replies(int(fault.get("rows", 2)))
        elif kind == "duplicate":
            whole += whole
        elif kind == "truncate":
            self.client.sendall(whole[: len(reply.head) + len(reply.body) // 2])
            raise StopError
        elif kind == "stall":
            self.client.sendall(whole[: len(reply.head) + len(reply.body) // 2])
            while self.client.recv(1 << 16):  # until the client has had enough
                time.sleep(0.01)
            raise StopError
        elif kind == "flip":
            bits = 8 * len(reply.body)
            limit = min(bits, 8 * 200) if fault.get("where") == "head" else bits
            whole = reply.head + with_flipped_bit(reply.body, self.chance.randrange(limit))
        elif kind == "flip_header":
            whole = with_flipped_bit(reply.head, self.chance.randrange(8 * len(reply.head))) + reply.body
        elif kind == "swap":
            other = self.faults.swap(reply)
            whole = other.head + other.body
        else:
            raise ValueError(f"unknown fault {kind!r}")
        self.client.sendall(whole)


def main(server: str, faults: list[Fault], seed: int = 0) -> None:
    host, _, port = server.partition(":")
    schedule, chance = Faults(faults), random.Random(seed)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(json.dumps({"port": listening.getsockname()[1]}), flush=True)
        while True:
            client, _ = listening.accept()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = Link(client, (host, int(port)), schedule, random.Random(chance.random()))
            threading.Thread(target=link.run, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
