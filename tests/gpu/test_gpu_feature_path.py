"""The feature path on CUDA: features computed by the engine's thread, read on a stream of the trainer's own."""

from __future__ import annotations

import pytest
import torch

from feature_path import SPECS, fixed
from paceline.client.budget import PrefetchBudget
from paceline.client.connection import LocalConnection
from paceline.client.pool import FeaturePool
from paceline.client.stream import FeatureStream
from paceline.config.placement import PoolConfig
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.rows import Row, RowRequest
from paceline.target.admission import Admission
from paceline.transport.delivery import RowDelivery
from paceline.transport.local import LocalReceiver, LocalSender
from small_engine import SmallEngine, expected_hidden, small_row

pytestmark = pytest.mark.gpu
MILLISECOND = 2_000_000  # clock cycles, about
NUM_TOKENS = 4096


class DeviceEngine(SmallEngine):
    """Computes on a stream of its own and answers when that row is done."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream()
        self.computed_bytes = 0
        super().__init__(num_slots=2)

    def _features(self, request: RowRequest, spec: FeatureSpec) -> Features:
        features: Features = super()._features(request, spec)
        if self.device.type == "cpu":
            return features
        with torch.cuda.stream(self.stream):
            for name, tensor in features.tensors().items():
                setattr(features, name, tensor.cuda() * 1)
            self.stream.synchronize()
        self.computed_bytes += features.num_bytes
        return features


class SlowCopies(LocalReceiver):
    """Its copy streams are always behind."""

    def receive(self, parcel: Features) -> RowDelivery:
        with torch.cuda.stream(self._side_stream(torch.device("cuda", torch.cuda.current_device()))):
            torch.cuda._sleep(5 * MILLISECOND)
        return super().receive(parcel)


def long_row(position: int) -> Row:
    row: Row = small_row(position, num_tokens=NUM_TOKENS + 16 * (position % 3))
    return row


def open_one(connection: LocalConnection[Features]) -> FeaturePool:
    return FeaturePool(fixed(connection), SPECS, PoolConfig())


def run(engine_device: str, trainer_device: str, budget: PrefetchBudget, num_rows: int = 150) -> DeviceEngine:
    """Train rows with work that reads them long after the host has gone on; every sum must be right."""
    engine = DeviceEngine(engine_device)
    admission = Admission(engine)
    receiver = SlowCopies(torch.device(trainer_device))
    pool = open_one(LocalConnection(admission, LocalSender(), receiver))
    stream = FeatureStream(long_row, pool, budget, "training", range(num_rows))
    # on the device beforehand: a copy from pageable memory would hold the host back in every row
    expected = {
        (row.row_id, row.num_tokens): expected_hidden(row.tokens, (1, 3)).to(trainer_device)
        for row in map(long_row, range(num_rows))
    }
    torch.cuda.synchronize()
    done: list[torch.cuda.Event] = []
    wrong = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for row in stream:
            position = row.row.position
            assert row.features.hidden.device.type == trainer_device
            if trainer_device == "cuda":
                if budget.max_rows == 1:
                    assert all(event.query() for event in done)  # strictly serial on the device, too
                torch.cuda._sleep(12 * MILLISECOND)  # longer than the engine takes for a row
            wrong.append((position, (row.features.hidden != expected[row.row.row_id, row.row.num_tokens]).any()))
            if trainer_device == "cuda":
                done.append(torch.cuda.current_stream().record_event())
    assert [position for position, _ in wrong] == list(range(num_rows))
    assert not any(bool(is_wrong) for _, is_wrong in wrong)
    pool.close()
    admission.close()
    engine.close()
    return engine


@pytest.mark.parametrize("prefetch_rows", [1, 2, 4])
def test_rows_on_the_trainers_device_are_right_and_their_memory_is_used_again(prefetch_rows: int) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held_before = torch.cuda.memory_reserved()
    engine = run("cuda", "cuda", PrefetchBudget(prefetch_rows, 1 << 30))
    # the premise: without reuse nothing could go wrong
    assert torch.cuda.max_memory_reserved() - held_before < engine.computed_bytes / 2


@pytest.mark.parametrize(("engine_device", "trainer_device"), [("cpu", "cuda"), ("cuda", "cpu"), ("cpu", "cpu")])
def test_rows_are_moved_to_the_trainers_device(engine_device: str, trainer_device: str) -> None:
    run(engine_device, trainer_device, PrefetchBudget(3, 1 << 30))


def test_the_path_never_synchronizes_the_device() -> None:
    """A trainer's stream is busy for long; rows for it keep coming all the same."""
    engine = DeviceEngine("cuda")
    admission = Admission(engine)
    pool = open_one(LocalConnection(admission, LocalSender(), LocalReceiver(torch.device("cuda"))))
    stream = FeatureStream(long_row, pool, PrefetchBudget(4, 1 << 30), "training", range(8))
    with torch.cuda.stream(torch.cuda.Stream()):
        next(stream)
        torch.cuda._sleep(1000 * MILLISECOND)
        busy = torch.cuda.current_stream().record_event()
        for _ in range(3):
            next(stream)
        assert not busy.query()
    stream.close()
    pool.close()
    admission.close()
    engine.close()
