"""Buffers of rows: used again, but never while anybody can still see what is in them."""

from __future__ import annotations

import random
import threading

import torch

from paceline.schema.features import FeatureSpec
from paceline.schema.layout import ALIGNMENT, layout_bytes
from paceline.transport.base import Incoming
from paceline.transport.buffers import HostBuffers
from paceline.transport.delivery import HostToTrainer
from paceline.transport.feature_bytes import describe, pack
from random_features import random_features
from small_engine import small_row

MIB = 1 << 20


def test_memory_given_back_is_used_again() -> None:
    buffers = HostBuffers(max_bytes=8 * MIB)
    first = buffers.reserve(MIB)
    address = first.memory.data_ptr()
    assert first.memory.shape == (MIB,)
    assert address % ALIGNMENT == 0
    other = buffers.reserve(MIB)
    assert other.memory.data_ptr() != address
    first.give_back()
    first.give_back()
    assert buffers.reserve(MIB - 300).memory.data_ptr() == address


def test_memory_that_a_tensor_still_shows_holds_no_other_row() -> None:
    buffers = HostBuffers(max_bytes=8 * MIB)
    buffer = buffers.reserve(MIB)
    kept = buffer.memory[ALIGNMENT : 2 * ALIGNMENT].view(torch.float32)  # as autograd might
    kept.fill_(3.0)
    address = buffer.memory.data_ptr()
    buffer.give_back()
    another = buffers.reserve(MIB)
    another.memory.fill_(7)
    assert another.memory.data_ptr() != address
    assert kept.eq(3.0).all()
    del kept
    assert buffers.reserve(MIB).memory.data_ptr() == address


def test_free_memory_is_bounded_and_nothing_leaks_over_many_rows() -> None:
    buffers = HostBuffers(max_bytes=6 * MIB)
    draw = random.Random(0)
    held = []
    for _ in range(500):
        held.append(buffers.reserve(draw.randrange(1, 2 * MIB)))
        if len(held) > 3:
            held.pop(draw.randrange(len(held))).give_back()
        in_use = buffers.num_bytes - buffers.num_free_bytes
        assert buffers.num_bytes <= max(6 * MIB, in_use)
    for buffer in held:
        buffer.give_back()
    held.clear()
    del buffer
    assert buffers.num_bytes == buffers.num_free_bytes <= 6 * MIB


def test_a_row_larger_than_the_bound_gets_memory_that_is_not_kept() -> None:
    buffers = HostBuffers(max_bytes=MIB)
    buffer = buffers.reserve(3 * MIB)
    assert buffers.num_bytes >= 3 * MIB
    buffer.give_back()
    assert buffers.num_bytes == 0


def test_threads_never_share_a_buffer() -> None:
    buffers = HostBuffers(max_bytes=2 * MIB)
    wrong = []

    def work(number: int) -> None:
        draw = random.Random(number)
        for _ in range(300):
            buffer = buffers.reserve(draw.randrange(1000, 9000))
            buffer.memory.fill_(number)
            if not buffer.memory.eq(number).all():
                wrong.append(number)
            buffer.give_back()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert buffers.num_bytes == buffers.num_free_bytes


def test_a_delivery_gives_its_buffer_back_when_it_is_released_whether_taken_or_not() -> None:
    features = random_features(small_row(1, num_tokens=9), FeatureSpec((1, 3), "supervised", greedy=True))
    header, layout = describe(1, features)
    buffers = HostBuffers(max_bytes=MIB)
    to_trainer = HostToTrainer(torch.device("cpu"))
    for taken in (True, False):
        buffer = buffers.reserve(layout_bytes(layout))
        pack(features, layout, buffer.memory)
        delivery = to_trainer.deliver(Incoming(header, layout, buffer, None))
        with delivery.inspect():
            assert delivery.features.hidden.equal(features.hidden)
        if taken:
            assert delivery.take().hidden.equal(features.hidden)
        assert buffers.num_free_bytes < buffers.num_bytes
        delivery.release()
        delivery.release()
        assert delivery.is_free()
        assert delivery.features.num_tokens == 0
        assert buffers.num_free_bytes == buffers.num_bytes
