"""Which transport two processes agree on, and what is said about it."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing

import pytest
import torch

from paceline.errors import HandshakeError
from paceline.schema.protocol import PROTOCOL_VERSION, HostFacts, ServerInfo, SessionReply, StoreCall, StoreReply
from paceline.transport.negotiation import Offers, TransportRefused, client_offers, host_facts
from rows import tiny_info

HERE = HostFacts(host_id="a", device="cuda", gpu_uuid="1")
NEXT_GPU = HostFacts(host_id="a", device="cuda", gpu_uuid="2")
THERE = HostFacts(host_id="b", device="cuda", gpu_uuid="3")
CPU = HostFacts(host_id="a", device="cpu")
CLONE_NEWNET = 0x40000000
EVERYTHING = {name: lambda name=name: {"nonce": name} for name in ("http", "file", "nccl", "gloo")}


def server(host: HostFacts, transports=("http", "file", "nccl", "gloo")) -> ServerInfo:
    return ServerInfo(
        protocol=PROTOCOL_VERSION,
        server_id="00",
        paceline="0",
        target=tiny_info(),
        host=host,
        transports=transports,
        max_row_tokens=64,
    )


def names(offers: Offers) -> list[str]:
    return [offer.name for offer in offers.offers]


def refuse() -> dict[str, str]:
    raise TransportRefused("/dev/shm is full")


def opened(transport: str, **refused: str) -> SessionReply:
    return SessionReply(session="0", key="0", lease_s=1, server_id="0", transport=transport, refused=refused)


@pytest.mark.parametrize(
    ("client", "host", "expected"),
    [
        (HERE, NEXT_GPU, ["nccl", "file", "http"]),
        (HERE, HERE, ["file", "http"]),  # NCCL refuses two ends on one GPU
        (HERE, CPU, ["file", "http"]),
        (CPU, CPU, ["file", "http"]),
        (HERE, THERE, ["http"]),
    ],
    ids=["two GPUs", "one GPU", "one GPU and the CPU", "CPU", "two hosts"],
)
def test_auto_offers_what_the_hosts_allow_fastest_first(client, host, expected):
    assert names(client_offers("auto", client, server(host), EVERYTHING)) == expected


@pytest.mark.parametrize("kind", ["http", "file", "nccl", "gloo"])
def test_a_transport_asked_for_by_name_is_the_only_offer_even_across_hosts(kind):
    offers = client_offers(kind, HERE, server(THERE), EVERYTHING)
    assert names(offers) == [kind]
    assert offers.offers[0].parameters == {"nonce": kind}


@pytest.mark.parametrize(
    ("kind", "host", "transports", "prepare", "message"),
    [
        ("nccl", HERE, ("http", "nccl"), EVERYTHING, "two ends on one GPU"),
        ("nccl", CPU, ("http", "nccl"), EVERYTHING, "trainer is on cuda, the server on cpu"),
        ("gloo", CPU, ("http", "file"), EVERYTHING, "server sends by http, file only"),
        ("file", CPU, ("http", "file"), {**EVERYTHING, "file": refuse}, "/dev/shm is full"),
    ],
)
def test_a_transport_asked_for_by_name_never_falls_back(kind, host, transports, prepare, message):
    with pytest.raises(HandshakeError, match=message):
        client_offers(kind, HERE, server(host, transports), prepare)


def test_auto_says_in_one_line_what_it_picked(caplog):
    caplog.set_level(logging.INFO)
    client_offers("auto", CPU, server(CPU), EVERYTHING).report("the server", opened("file"))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "rows of the server travel by file: server and trainer are on one host")
    ]


@pytest.mark.parametrize(
    ("offers", "reply", "reason"),
    [
        (client_offers("auto", HERE, server(NEXT_GPU, ("http", "file")), EVERYTHING), opened("file"), "nccl: the serv"),
        (client_offers("auto", CPU, server(CPU), {**EVERYTHING, "file": refuse}), opened("http"), "file: /dev/shm is"),
        (client_offers("auto", CPU, server(CPU), EVERYTHING), opened("http", file="unseen"), "file: unseen"),
    ],
    ids=["not offered by the server", "fails on the client", "refused by the server"],
)
def test_falling_back_is_one_warning_with_the_reason_and_the_cost(caplog, offers, reply, reason):
    caplog.set_level(logging.INFO)
    offers.report("the server", reply)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert reason in record.getMessage()
    assert "instead of" in record.getMessage()
    assert "rows " in record.getMessage().split(";")[1]  # what it costs


def test_auto_without_any_transport_is_an_error_with_the_reasons():
    with pytest.raises(HandshakeError, match="/dev/shm is full"):
        client_offers("auto", CPU, server(CPU, ("file",)), {**EVERYTHING, "file": refuse})


def in_a_child(flags: int) -> str | None:
    """The host id of a process with namespaces of its own as in `flags`; None if an ordinary user may not make them."""

    def child(answers) -> None:
        refused = flags and ctypes.CDLL(None).unshare(flags)
        answers.put(None if refused else host_facts(torch.device("cpu")).host_id)

    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=child, args=(answers,))
    process.start()
    answer = answers.get()
    process.join()
    return answer


def test_processes_of_one_host_have_one_id():
    facts = host_facts(torch.device("cpu"))
    assert (facts.device, facts.gpu_uuid) == ("cpu", None)
    assert in_a_child(0) == facts.host_id


def test_a_container_that_sees_no_loopback_of_ours_is_another_host():
    apart = in_a_child(CLONE_NEWNET)
    if apart is None:
        pytest.skip("an ordinary user may not make namespaces here")
    assert apart != in_a_child(0)


def test_store_messages_survive_json_whatever_the_bytes():
    call = StoreCall(op="set", keys=("a",), values=(bytes(range(256)),))
    reply = StoreReply(values=(None, b"\xff\x00"), number=-3)
    assert StoreCall.model_validate_json(call.model_dump_json()) == call
    assert StoreReply.model_validate_json(reply.model_dump_json()) == reply
