"""What every engine must do; each engine gives a factory and passes the same tests."""

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.config.target import TargetConfig
from paceline.errors import CaptureMismatchError, ConfigError, PacelineError, StoppedError, TargetError
from paceline.schema.features import FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.target.hf.engine import HFEngine
from paceline.target.interface import Engine
from tiny import tiny_request

EVERYTHING = FeatureSpec(layers=(0, 2, 3), final_hidden="all", greedy=True, logsumexp=True)
FACTORIES: dict[str, Callable[[Path], Engine]] = {
    "hf": lambda path: HFEngine(TargetConfig(model=str(path), device="cpu", vocab_chunk_tokens=7)),
    "hf padded": lambda path: HFEngine(TargetConfig(model=str(path), device="cpu", documents="padded")),
    "hf on two processes": lambda path: HFEngine(
        TargetConfig(model=str(path), device="cpu", vocab_chunk_tokens=7, tensor_parallel=2)
    ),
}
ONE_PROCESS = [name for name in FACTORIES if name != "hf on two processes"]
"""Those of which there may be several at a time."""


@pytest.fixture(params=FACTORIES, scope="module")
def engine(request: pytest.FixtureRequest, tiny_target: Path) -> Iterator[Engine]:
    engine = FACTORIES[request.param](tiny_target)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(tiny_target: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_target, attn_implementation="eager").eval()


def check_against(reference, request: RowRequest, features) -> None:
    """Each document equals itself run alone by transformers."""
    for start, end in zip(request.documents, request.documents[1:], strict=False):
        with torch.no_grad():
            alone = reference(
                torch.from_numpy(request.tokens[start:end]).long()[None], output_hidden_states=True, use_cache=False
            )
        for slot, layer in enumerate(features.layers):
            if layer < 3:  # transformers' last entry is after the norm
                torch.testing.assert_close(
                    features.hidden[start:end, slot], alone.hidden_states[layer + 1][0], rtol=1e-5, atol=1e-5
                )
        torch.testing.assert_close(features.final_hidden[start:end], alone.hidden_states[-1][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features.logsumexp[start:end], alone.logits[0].logsumexp(-1), rtol=1e-5, atol=1e-5)
        assert torch.equal(features.greedy[start:end], alone.logits[0].argmax(-1).int())


def test_features_equal_transformers_eager(engine: Engine, reference):
    request = tiny_request((9, 1, 30), seed=3)
    features = engine.capture(request, EVERYTHING).result(30)
    assert features.hidden.shape == (40, 3, 32)
    assert features.hidden.dtype is features.final_hidden.dtype is torch.float32
    assert (features.greedy.dtype, features.final_index.dtype) == (torch.int32, torch.int32)
    assert features.logsumexp.dtype is torch.float32
    assert features.finite is True
    check_against(reference, request, features)


def test_twenty_rows_submitted_without_waiting_come_back_right(engine: Engine, reference):
    requests = [tiny_request((5 + seed % 7, 3, 11), seed=seed) for seed in range(20)]
    futures = [engine.capture(request, EVERYTHING) for request in requests]
    for request, future in zip(requests, futures, strict=True):
        features = future.result(30)
        assert features.row_hash == request.row_hash()
        check_against(reference, request, features)


def test_times_of_rows_in_flight_together_do_not_overlap(engine: Engine):
    """Their sums tell how busy an engine is: never more than all of the time."""
    engine.capture(tiny_request((5,)), EVERYTHING).result(30)
    asked_s = [time.monotonic()]
    """Row i was asked for between the i-th and the next."""
    futures, done = [], []
    for seed in range(8):
        futures.append(engine.capture(tiny_request((100,) * 4, seed=seed), EVERYTHING))
        asked_s.append(time.monotonic())
        futures[-1].add_done_callback(lambda _, index=seed: done.append(index))
    rows = [future.result(60) for future in futures]
    wall_s = time.monotonic() - asked_s[0]
    assert sum(row.computed_s for row in rows) <= wall_s
    assert all(row.computed_s > 0 and row.queued_s + row.computed_s <= wall_s for row in rows)
    for before, after in itertools.pairwise(done):
        ended_s = asked_s[before] + rows[before].queued_s + rows[before].computed_s
        assert ended_s <= asked_s[after + 1] + rows[after].queued_s, "it waits until the row before it is over"


def test_the_same_row_has_the_same_bits_whatever_runs_beside_it(engine: Engine):
    assert engine.info().deterministic
    request = tiny_request((6, 20), seed=1)
    alone = engine.capture(request, EVERYTHING).result(30)
    futures = [engine.capture(tiny_request((4, 9), seed=seed), EVERYTHING) for seed in range(2, 6)]
    again = engine.capture(request, EVERYTHING).result(30)
    assert all(future.result(30).finite for future in futures)
    for name, tensor in alone.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name


def wrong_requests() -> dict[str, tuple[RowRequest, FeatureSpec, type[PacelineError], str]]:
    good = tiny_request((5, 6))
    spans = np.array([[3, 3]], np.int32)
    five = np.array([0, 5], np.int32)
    backwards = good.positions[:, ::-1]
    outside = np.array([[8, 12]], np.int32)
    many = good.tokens.copy()
    many[4] = 300
    negative = good.tokens.copy()
    negative[0] = -1
    return {
        "id too large": (replace(good, tokens=many), EVERYTHING, CaptureMismatchError, r"300 outside 0\.\.299"),
        "id below zero": (replace(good, tokens=negative), EVERYTHING, CaptureMismatchError, r"-1 outside 0\.\.299"),
        "no tokens": (replace(good, tokens=good.tokens[:0]), EVERYTHING, CaptureMismatchError, "T > 0"),
        "documents": (
            replace(good, documents=five),
            EVERYTHING,
            CaptureMismatchError,
            "11 tokens",
        ),
        "empty span": (replace(good, spans=spans), EVERYTHING, CaptureMismatchError, "empty"),
        "span outside": (replace(good, spans=outside), EVERYTHING, CaptureMismatchError, "11 tokens"),
        "positions": (
            replace(good, positions=backwards),
            EVERYTHING,
            CaptureMismatchError,
            "count from 0",
        ),
        "axes": (tiny_request((5, 6), num_position_axes=3), EVERYTHING, CaptureMismatchError, r"\(3, 11\)"),
        "layer": (good, FeatureSpec((0, 4)), ConfigError, r"\[0, 4\].*0\.\.3"),
        "layer below": (good, FeatureSpec((-1, 2)), ConfigError, r"\[-1, 2\].*0\.\.3"),
        "too long": (tiny_request((4097,)), EVERYTHING, ConfigError, "4097 tokens.*4096"),
    }


@pytest.mark.parametrize("name", wrong_requests())
def test_a_wrong_request_fails_alone(engine: Engine, reference, name: str):
    wrong, spec, error, message = wrong_requests()[name]
    good = tiny_request((5, 6))
    futures: list[Future] = [
        engine.capture(good, EVERYTHING),
        engine.capture(wrong, spec),
        engine.capture(good, EVERYTHING),
    ]
    with pytest.raises(error, match=message):
        futures[1].result(30)
    for future in (futures[0], futures[2]):
        check_against(reference, good, future.result(30))


def test_room_shrinks_with_rows_in_flight_and_returns(engine: Engine):
    room = engine.room()
    assert room > 0
    futures = [engine.capture(tiny_request((400,) * 8, seed=seed), EVERYTHING) for seed in range(3)]
    assert engine.room() < room
    assert all(future.result(60).finite for future in futures)
    assert engine.room() == room


def test_info_is_the_same_object_every_time(engine: Engine):
    assert engine.info() is engine.info()


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_close_ends_what_waits_and_is_safe_twice(name: str, tiny_target: Path):
    engine = FACTORIES[name](tiny_target)
    futures = [engine.capture(tiny_request((300,) * 8, seed=seed), EVERYTHING) for seed in range(10)]
    engine.close()
    engine.close()
    assert all(future.done() for future in futures)
    failures = [error for future in futures if (error := future.exception()) is not None]
    assert failures  # ten large rows do not fit into the time it takes to close
    assert all(isinstance(error, StoppedError) for error in failures)
    with pytest.raises(StoppedError):
        engine.capture(tiny_request((3,)), EVERYTHING).result(5)


def test_a_cancelled_row_is_skipped(engine: Engine):
    requests = [tiny_request((200,) * 4, seed=seed) for seed in range(30)]
    futures = [engine.capture(request, EVERYTHING) for request in requests]
    cancelled = futures[-1].cancel()
    assert all(future.result(60).finite for future in futures[:-1])
    assert cancelled
    assert engine.capture(tiny_request((3,)), EVERYTHING).result(30).finite


def test_a_target_that_cannot_be_loaded_fails_where_it_is_asked_for(tmp_path: Path):
    with pytest.raises(TargetError, match="no such directory"):
        HFEngine(TargetConfig(model=str(tmp_path / "absent")))


def test_out_of_memory_names_the_settings_to_lower(tiny_target: Path, monkeypatch: pytest.MonkeyPatch):
    from paceline.errors import OutOfMemoryError

    engine = HFEngine(TargetConfig(model=str(tiny_target), device="cpu"))

    def fill_memory(module, args, output):
        return torch.empty(1 << 60, dtype=torch.uint8)  # a real failure of the allocator

    handle = engine.model.get_decoder().layers[1].register_forward_hook(fill_memory)
    with pytest.raises(OutOfMemoryError, match=r"data\.row_tokens.*target\.vocab_chunk_tokens"):
        engine.capture(tiny_request((5,)), EVERYTHING).result(30)
    handle.remove()
    assert engine.capture(tiny_request((5,)), EVERYTHING).result(30).finite
    engine.close()
