"""Parts of the p2p transport: the store, what of an offer is refused, interfaces, variables of the process."""

from __future__ import annotations

import gc
import os
import threading
import time
from datetime import timedelta

import pytest
import torch
from torch.distributed import DistStoreError, PrefixStore

from paceline.errors import DamagedError, WireError
from paceline.schema.protocol import HostFacts, StoreCall
from paceline.transport.buffers import HostBuffers
from paceline.transport.negotiation import SenderRequest, TransportRefused
from paceline.transport.p2p.communicator import CLIENT, SERVER
from paceline.transport.p2p.epochs import Proposal
from paceline.transport.p2p.gloo import GlooCommunicator
from paceline.transport.p2p.interfaces import LOOPBACK, address_towards, interface_of
from paceline.transport.p2p.link import Link
from paceline.transport.p2p.opening import P2PSenders
from paceline.transport.p2p.store import MAX_BYTES, MAX_KEYS, SessionStore, StoreView

HERE, THERE = HostFacts(host_id="a", device="cpu"), HostFacts(host_id="b", device="cpu")


def make_store() -> tuple[SessionStore, list[str]]:
    told: list[str] = []
    return SessionStore(told.append), told


def view(store: SessionStore, prefix: str = "1/") -> StoreView:
    return StoreView(store.answer, prefix, 0.05, lambda: False, lambda: None)


def test_a_view_does_what_torch_asks_of_a_store():
    store, told = make_store()
    ours, theirs, others = view(store), view(store), view(store, "2/")
    ours.set("key", b"\x00\xff")
    assert theirs.get("key") == b"\x00\xff"
    assert told == ["1/key"]
    assert theirs.check(["key"])
    assert not others.check(["key"])
    assert (ours.add("count", 3), theirs.add("count", -1)) == (3, 2)
    assert ours.compare_set("once", b"", b"first") == b"first"
    assert theirs.compare_set("once", b"", b"second") == b"first"
    assert theirs.compare_set("once", b"first", b"third") == b"third"
    assert ours.multi_get(["key", "once"]) == [b"\x00\xff", b"third"]
    assert (ours.delete_key("key"), ours.delete_key("key")) == (True, False)


def test_a_copy_that_torch_makes_of_a_store_lives_as_long_as_the_store():
    """torch holds the C++ half of a Python store alone: calls on it fail once the other half is gone."""
    store, _ = make_store()
    ours = view(store)
    copy = PrefixStore("a", ours).clone()
    gc.collect()
    copy.set("key", b"value")
    assert copy.get("key") == b"value"


def test_a_wait_ends_when_the_key_comes_or_time_is_up_or_it_is_over():
    store, _ = make_store()
    threading.Timer(0.02, lambda: view(store).set("late", b"1")).start()
    view(store).wait(["late"], timedelta(seconds=5))
    with pytest.raises(DistStoreError, match=r"did not set missing within 0\.05 s"):
        view(store).get("missing")
    with pytest.raises(DistStoreError, match="no longer waiting"):
        StoreView(store.answer, "", 60, lambda: True, lambda: None).get("missing")


@pytest.mark.parametrize(
    "call",
    [
        StoreCall(op="set", keys=("a", "b"), values=(b"1",)),
        StoreCall(op="compare_set", keys=("a",), values=(b"1",)),
        StoreCall(op="add", keys=("text",), number=1),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(call: StoreCall):
    store, _ = make_store()
    store.set("text", b"no number")
    with pytest.raises(WireError):
        store.answer(call)


def test_a_client_cannot_fill_the_servers_memory_through_the_store():
    store, _ = make_store()
    value = b"x" * (64 << 10)
    for number in range(15):
        store.answer(StoreCall(op="set", keys=(f"{number}",), values=(value,)))
    with pytest.raises(WireError, match=str(MAX_BYTES)):
        store.answer(StoreCall(op="set", keys=("one", "more"), values=(value, value)))
    store, _ = make_store()
    for number in range(MAX_KEYS):
        store.answer(StoreCall(op="add", keys=(f"{number}",), number=1))
    with pytest.raises(WireError, match=str(MAX_KEYS)):
        store.answer(StoreCall(op="add", keys=("one more",), number=1))


def test_a_proposal_is_read_back_and_anything_else_is_not_one():
    assert Proposal.read(Proposal(12, "ab").text()) == Proposal(12, "ab")
    for text in (b"", b"12", b":ab", b"-1:ab", b"x:ab", b"1:", b"\xff\xfe"):
        with pytest.raises(DamagedError):
            Proposal.read(text)


def test_an_interface_is_found_by_its_address_and_a_foreign_address_is_refused():
    assert interface_of(LOOPBACK).startswith("lo")
    assert address_towards(LOOPBACK) == LOOPBACK
    with pytest.raises(TransportRefused, match=r"no interface.*127\.0\.0\.1"):
        interface_of("192.0.2.7")


@pytest.mark.parametrize(
    ("kind", "client", "parameters", "message"),
    [
        ("gloo", THERE, {"stall_timeout_s": "5", "address": LOOPBACK}, "different hosts"),
        ("gloo", HERE, {"stall_timeout_s": "5", "address": "192.0.2.7"}, "no interface of this host"),
        ("gloo", HERE, {"stall_timeout_s": "5", "address": "; rm"}, "names '; rm'"),
        ("gloo", HERE, {"stall_timeout_s": "5"}, "IP address"),
        ("gloo", HERE, {"stall_timeout_s": "nan", "address": LOOPBACK}, "stall_timeout_s"),
        ("gloo", HERE, {"stall_timeout_s": "1e9", "address": LOOPBACK}, "stall_timeout_s"),
        ("gloo", HERE, {"address": LOOPBACK}, "stall_timeout_s"),
        ("nccl", HERE, {"stall_timeout_s": "5"}, "nccl"),
    ],
)
def test_a_server_refuses_an_offer_that_cannot_work_and_says_why(kind, client, parameters, message):
    request = SenderRequest(parameters, client, HERE, "session", torch.device("cpu"))
    with pytest.raises(TransportRefused, match=message):
        P2PSenders(kind, HostBuffers(0))(request)
    assert not [thread for thread in threading.enumerate() if "sender" in thread.name]


def test_the_process_has_its_variables_back_while_gloo_still_waits_for_its_peer():
    """Or a group that the trainer makes meanwhile would listen on the wrong interface."""
    before = os.environ.get("GLOO_SOCKET_IFNAME") or None
    store, _ = make_store()
    ends: dict[int, object] = {}

    def connect(rank: int) -> None:
        link = Link("gloo", rank, store.answer, 20, interface_of(LOOPBACK), None)
        ends[rank] = link.connect(1, "nonce", lambda: False)

    first = threading.Thread(target=connect, args=(CLIENT,))
    first.start()
    while not view(store).check(["0/1"]):  # its address is known, and it waits
        time.sleep(0.001)
    assert (os.environ.get("GLOO_SOCKET_IFNAME") or None) == before
    connect(SERVER)
    first.join()
    assert all(isinstance(end, GlooCommunicator) for end in ends.values())
    for end in ends.values():
        end.abort()
