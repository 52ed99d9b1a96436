"""A proxy process between clients and servers that does to row replies what networks do.

    python fault_proxy.py HOST:PORT[,HOST:PORT...] '[{"kind": "flip", "server": 0, "at_row": 3}, ...]' [SEED]

Prints {"ports": [...]}, one for each server, when it listens, then one line of JSON for every fault it has done; these
lines have "row" besides, the position that was asked for, and "first": nobody had been asked for it before. Faults are
scheduled by the number of row requests that came through, from 0, never by time; each strikes the first from then on
that goes to `server` and asks for `position`, where these are given:

    drop        the connection is closed instead of the reply
    delay       the reply waits until `rows` more row replies have passed, or half a second went by without one
    hold        the reply waits until another server has answered the same row, then as in "delay" for one more, and
                30 ms besides, so that the other answer is most likely taken first
    duplicate   the reply is sent twice on its connection
    truncate    half of the reply, then the connection is closed
    flip        one bit of the reply's body is turned; `where` "head" takes it near the start
    flip_header one bit of the reply's HTTP header
    flip_request one bit of the request's body on its way to the server
    flip_request_header one bit of the request's HTTP header, but for its Content-Length; `bit` says which
    swap        the reply changes places with the next row's
    stall       half of the reply, then nothing more, the connection stays open
    signal      processes `pids` get signal `signum`, before the request is passed on
"""

from __future__ import annotations

import json
import os
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
_POSITION = re.compile(rb'"position": ?"(\d+)"')
_LONGEST_HOLD_S = 30.0


@dataclass
class Message:
    """One HTTP message; `head` ends with the empty line."""

    head: bytes
    body: bytes


def position_of(request: Message) -> int | None:
    """Of the row that a request asks for."""
    found = _POSITION.search(request.body)
    return int(found[1]) if found else None


class Faults:
    """The schedule, and what it counts."""

    def __init__(self, faults: list[Fault]) -> None:
        self._faults = sorted(faults, key=lambda fault: int(fault["at_row"]))
        self._changed = threading.Condition()
        self._num_requests = 0
        self._num_replies = 0
        self._to_swap: list[tuple[Message, threading.Event, list[Message]]] = []
        self._answered_by: dict[bytes, set[int]] = {}
        self._asked: set[bytes] = set()

    def next(self, server: int, request: Message) -> Fault | None:
        """What happens to the row request that has just come."""
        row = position_of(request)
        with self._changed:
            number = self._num_requests
            self._num_requests += 1
            is_first = request.body not in self._asked
            self._asked.add(request.body)
            for fault in self._faults:
                is_due = fault["at_row"] <= number and fault.get("position", row) == row
                if is_due and fault.get("server", server) == server:
                    self._faults.remove(fault)
                    return {**fault, "first": is_first}
            return None

    def told(self, fault: Fault, request: Message) -> None:
        with self._changed:  # one line after the other
            print(json.dumps({**fault, "row": position_of(request)}), flush=True)

    def answered(self, server: int, request: bytes) -> None:
        """`server` has answered this row, and the answer has left."""
        with self._changed:
            self._answered_by.setdefault(request, set()).add(server)
            self._changed.notify_all()

    def wait_for_another(self, server: int, request: bytes) -> bool:
        """Whether another server has answered the same row."""
        with self._changed:
            return self._changed.wait_for(
                lambda: bool(self._answered_by.get(request, set()) - {server}), _LONGEST_HOLD_S
            )

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
        arrived = threading.Event()
        other: list[Message] = []
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


def flip_request_header(head: bytes, chance: random.Random) -> bytes:
    length = _LENGTH.search(head)
    safe = range(length.start(), length.end()) if length else range(0)
    return with_flipped_bit(head, chance.choice([bit for bit in range(8 * len(head) - 32) if bit // 8 not in safe]))


class StopError(Exception):
    """The connection to the client ends here."""


@dataclass
class Link:
    """One client connection and its own connection to the server."""

    client: socket.socket
    server: int
    address: tuple[str, int]
    faults: Faults
    chance: random.Random

    def run(self) -> None:
        try:
            with self.client, socket.create_connection(self.address) as upstream:
                from_client, from_server = bytearray(), bytearray()
                while (request := read_message(self.client, from_client)) is not None:
                    is_row = _ROWS.match(request.head) is not None
                    fault = self.faults.next(self.server, request) if is_row else None
                    sent = self.change_request(request, fault)
                    upstream.sendall(sent.head + sent.body)
                    reply = read_message(upstream, from_server)
                    if reply is None:
                        return
                    if is_row:
                        self.pass_row_reply(request, reply, fault)
                        self.faults.reply_passed()
                        self.faults.answered(self.server, request.body)
                    else:
                        self.client.sendall(reply.head + reply.body)
        except (OSError, StopError):
            return

    def change_request(self, request: Message, fault: Fault | None) -> Message:
        """What goes to the server."""
        kind = fault["kind"] if fault else ""
        if kind == "flip_request":
            return Message(request.head, with_flipped_bit(request.body, self.chance.randrange(8 * len(request.body))))
        if kind == "flip_request_header":
            assert fault is not None
            if "bit" in fault:
                return Message(with_flipped_bit(request.head, fault["bit"]), request.body)
            return Message(flip_request_header(request.head, self.chance), request.body)
        if kind == "signal":
            assert fault is not None
            for pid in fault["pids"]:
                os.kill(pid, fault["signum"])
            self.faults.told(fault, request)
        return request

    def pass_row_reply(self, request: Message, reply: Message, fault: Fault | None) -> None:
        if fault is None or fault["kind"] == "signal":
            reply = self.faults.offer_for_swap(reply)
            self.client.sendall(reply.head + reply.body)
            return
        self.faults.told(fault, request)
        if fault["kind"] == "delay":
            self.faults.wait_for_replies(int(fault.get("rows", 2)))
        elif fault["kind"] == "hold":
            self.hold(request, fault)
        elif fault["kind"] == "swap":
            reply = self.faults.swap(reply)
        self.send_changed(reply, fault)

    def hold(self, request: Message, fault: Fault) -> None:
        if not self.faults.wait_for_another(self.server, request.body):
            self.faults.told({**fault, "kind": "nobody else was asked"}, request)
        self.faults.wait_for_replies(1)
        time.sleep(0.03)  # that reply may have been right behind the other answer

    def send_changed(self, reply: Message, fault: Fault) -> None:
        kind, whole = fault["kind"], reply.head + reply.body
        if kind == "drop":
            raise StopError
        if kind == "duplicate":
            whole += whole
        elif kind in ("truncate", "stall"):
            self.client.sendall(whole[: len(reply.head) + len(reply.body) // 2])
            while kind == "stall" and self.client.recv(1 << 16):  # until the client has had enough
                time.sleep(0.01)
            raise StopError
        elif kind == "flip":
            bits = 8 * len(reply.body)
            limit = min(bits, 8 * 200) if fault.get("where") == "head" else bits
            whole = reply.head + with_flipped_bit(reply.body, self.chance.randrange(limit))
        elif kind == "flip_header":
            whole = with_flipped_bit(reply.head, self.chance.randrange(8 * len(reply.head))) + reply.body
        self.client.sendall(whole)


def accept(listening: socket.socket, server: int, address: str, faults: Faults, chance: random.Random) -> None:
    host, _, port = address.partition(":")
    while True:
        client, _ = listening.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = Link(client, server, (host, int(port)), faults, random.Random(chance.random()))
        threading.Thread(target=link.run, daemon=True).start()


def main(servers: list[str], faults: list[Fault], seed: int = 0) -> None:
    schedule = Faults(faults)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in servers]
    print(json.dumps({"ports": [listening.getsockname()[1] for listening in sockets]}), flush=True)
    for number, (listening, address) in enumerate(zip(sockets, servers, strict=True)):
        arguments = (listening, number, address, schedule, random.Random(seed + number))
        threading.Thread(target=accept, args=arguments, daemon=True).start()
    sys.stdin.read()  # ends with whoever started it


if __name__ == "__main__":
    main(sys.argv[1].split(","), json.loads(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
