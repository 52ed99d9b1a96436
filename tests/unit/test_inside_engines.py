"""SGLang's hooks, without SGLang: which tokens of a batch are written, and what is said instead."""

import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from paceline.target.engines.interface import INSIDE

LAYERS = [0, 2]


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module as SGLang imports it: from a folder, without paceline."""
    monkeypatch.syspath_prepend(str(INSIDE))
    import paceline_sglang_hooks

    yield paceline_sglang_hooks
    sys.modules.pop("paceline_sglang_hooks", None)


class Batch(SimpleNamespace):
    """Of two requests, one of them ours."""

    def __init__(self, extend: bool = True, lengths: tuple[int, ...] = (2, 3)) -> None:
        super().__init__(
            forward_mode=SimpleNamespace(is_extend=lambda: extend),
            rids=["another", "paceline-1"],
            extend_prefix_lens_cpu=[0, 7],
            extend_seq_lens_cpu=list(lengths),
            input_ids=torch.arange(sum(lengths), dtype=torch.int32),
        )


def forward(hooks: ModuleType, directory: Path, given: tuple[object, ...], layers: list[int] = LAYERS) -> None:
    config = {"directory": str(directory), "layers": LAYERS, "prefix": "paceline-"}
    for layer in layers:
        hook = hooks.build_hook({**config, "layer": layer})
        hook(nn.Identity(), (), (torch.full((5, 4), float(layer)), torch.ones(5, 4)))
    hooks.build_hook({**config, "layer": None})(nn.Identity(), given, None)


def settle(hooks: ModuleType, directory: Path) -> list[str]:
    """Names of the files once the writers are done."""
    hooks._capture(str(directory), (0, 2), "paceline-", True)._writers.shutdown()
    return sorted(path.name for path in directory.iterdir())


def test_tokens_of_our_requests_are_written_with_their_place(hooks: ModuleType, tmp_path: Path) -> None:
    forward(hooks, tmp_path, (1, 2, Batch()))
    assert settle(hooks, tmp_path) == ["paceline-1.7.safetensors"]
    read = load_file(tmp_path / "paceline-1.7.safetensors")
    assert read["token_ids"].tolist() == [2, 3, 4]
    assert read["layer_ids"].tolist() == LAYERS
    assert read["hidden_states"][:, :, 0].tolist() == [[1.0, 3.0]] * 3


def test_a_batch_that_only_a_module_further_out_is_given_is_written_there(hooks: ModuleType, tmp_path: Path) -> None:
    forward(hooks, tmp_path, ("no batch",))
    hook = hooks.build_hook({"directory": str(tmp_path), "layers": LAYERS, "prefix": "paceline-", "layer": None})
    hook(nn.Identity(), (Batch(),), None)
    assert settle(hooks, tmp_path) == ["paceline-1.7.safetensors"]


def test_a_batch_that_is_handed_over_by_name_is_written_from_the_second_on(hooks: ModuleType, tmp_path: Path) -> None:
    """SGLang's first is its own, of its warm-up."""

    class Body(nn.Module):
        def forward(self, forward_batch: Batch) -> None:
            for layer in LAYERS:
                hook = hooks.build_hook({**config, "layer": layer})
                hook(nn.Identity(), (), (torch.full((5, 4), float(layer)), torch.ones(5, 4)))

    config = {"directory": str(tmp_path), "layers": LAYERS, "prefix": "paceline-"}
    body = Body()
    body.register_forward_hook(hooks.build_hook({**config, "layer": None}))
    body(forward_batch=Batch())
    later = Batch()
    later.rids = ["paceline-2", "another"]
    body(forward_batch=later)
    assert settle(hooks, tmp_path) == ["paceline-2.0.safetensors"]
    body = load_file(tmp_path / "paceline-2.0.safetensors")
    assert body["hidden_states"][:, :, 0].tolist() == [[1.0, 3.0]] * 2


def test_a_sum_beside_an_older_residual_is_taken_alone(hooks: ModuleType, tmp_path: Path) -> None:
    class CohereDecoderLayer(nn.Module):
        pass

    config = {"directory": str(tmp_path), "layers": LAYERS, "prefix": "paceline-"}
    for layer in LAYERS:
        output = (torch.full((5, 4), float(layer)), torch.ones(5, 4))
        hooks.build_hook({**config, "layer": layer})(CohereDecoderLayer(), (), output)
    hooks.build_hook({**config, "layer": None})(nn.Identity(), (Batch(),), None)
    assert settle(hooks, tmp_path) == ["paceline-1.7.safetensors"]
    assert load_file(tmp_path / "paceline-1.7.safetensors")["hidden_states"][:, :, 0].tolist() == [[0.0, 2.0]] * 3


@pytest.mark.parametrize(
    ("outputs", "fault"),
    [
        ([(torch.ones(3, 4), torch.ones(3, 4))] * 2, "layers end with 3 states for a batch of 5 tokens"),
        ([(torch.ones(5, 4), torch.ones(2, 4))] * 2, r"layer 2's output is \[5, 4\] beside \[2, 4\]"),
        ([(torch.ones(5, 4), torch.ones(5, 4)), (torch.ones(3, 4), None)], r"layer 2's output is \[3, 4\], where"),
    ],
)
def test_states_that_are_spread_over_gpus_are_refused_in_words(
    hooks: ModuleType, tmp_path: Path, outputs: list[tuple[torch.Tensor, torch.Tensor | None]], fault: str
) -> None:
    config = {"directory": str(tmp_path), "layers": LAYERS, "prefix": "paceline-"}
    for layer, output in zip(LAYERS, outputs, strict=True):
        hooks.build_hook({**config, "layer": layer})(nn.Identity(), (), output)
    hooks.build_hook({**config, "layer": None})(nn.Identity(), (Batch(),), None)
    assert settle(hooks, tmp_path) == ["paceline-1.error"]
    assert re.search(fault, (tmp_path / "paceline-1.error").read_text())


def test_batches_that_decode_are_not_written(hooks: ModuleType, tmp_path: Path) -> None:
    forward(hooks, tmp_path, (Batch(extend=False),))
    assert settle(hooks, tmp_path) == []


def test_a_layer_that_was_not_seen_is_named_instead(hooks: ModuleType, tmp_path: Path) -> None:
    forward(hooks, tmp_path, (Batch(),), layers=[0])
    assert settle(hooks, tmp_path) == ["paceline-1.error"]
    assert "layers [2] were not computed" in (tmp_path / "paceline-1.error").read_text()


def test_a_hook_never_raises(hooks: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    forward(hooks, tmp_path / "missing", (Batch(),))
    hooks._capture(str(tmp_path / "missing"), (0, 2), "paceline-", True)._writers.shutdown()
    hooks.build_hook({"directory": str(tmp_path), "layers": LAYERS, "prefix": "", "layer": 0})(nn.Identity(), (), None)
    assert "cannot be written" in caplog.text
    assert "the hidden states of layer 0 cannot be kept" in caplog.text


@pytest.mark.parametrize(
    ("residual", "pending", "fault"),
    [
        (None, SimpleNamespace(value=torch.ones(5, 4), update=None), "is not what comes to the residual of its batch"),
        (torch.ones(5, 4), None, "is not the residual of its batch"),
        (torch.ones(5, 4), SimpleNamespace(), "is not understood: AttributeError"),
    ],
)
def test_an_output_that_is_not_of_its_batch_is_said(
    hooks: ModuleType, tmp_path: Path, residual: torch.Tensor | None, pending: object, fault: str
) -> None:
    """Of SGLang from 0.5.21 on, whose batch holds the residual."""
    batch = Batch()
    batch.residual_stream = SimpleNamespace(residual=residual, pending=pending)
    config = {"directory": str(tmp_path), "layers": LAYERS, "prefix": "paceline-"}
    for layer in LAYERS:
        hooks.build_hook({**config, "layer": layer})(nn.Identity(), (1, batch), torch.full((5, 4), 2.0))
    hooks.build_hook({**config, "layer": None})(nn.Identity(), (batch,), None)
    assert settle(hooks, tmp_path) == ["paceline-1.error"]
    assert fault in (tmp_path / "paceline-1.error").read_text()


def test_the_model_waits_for_files_that_are_slower(
    hooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, gate = hooks.save_file, threading.Event()
    monkeypatch.setattr(hooks, "save_file", lambda *words: gate.wait(30) and write(*words))
    monkeypatch.setattr(hooks, "_MAX_WAITING_BYTES", 300)  # a batch has 160
    forward(hooks, tmp_path, (Batch(),))
    capture = hooks._capture(str(tmp_path), (0, 2), "paceline-", True)
    assert capture._waiting_bytes == 160
    second = threading.Thread(target=forward, args=(hooks, tmp_path, (Batch(),)))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert capture._waiting_bytes == 160
    gate.set()
    second.join(30)
    assert not second.is_alive()
    settle(hooks, tmp_path)
    assert capture._waiting_bytes == 0


def test_a_batch_that_cannot_be_copied_leaves_room_for_the_next(
    hooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the model would wait for ever after some batches of a host short of memory."""

    def no_memory(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(hooks._Capture, "_to_host", no_memory)
        forward(hooks, tmp_path, (Batch(),))
    assert hooks._capture(str(tmp_path), (0, 2), "paceline-", True)._waiting_bytes == 0
    assert "cannot be copied to the host" in (tmp_path / "paceline-1.error").read_text()
    forward(hooks, tmp_path, (Batch(),))
    assert "paceline-1.7.safetensors" in settle(hooks, tmp_path)


def test_a_layer_that_ends_twice_is_taken_once(hooks: ModuleType, tmp_path: Path) -> None:
    """As one whose weights are on the host does."""
    forward(hooks, tmp_path, (Batch(),), layers=[0, 0, 2, 2])
    assert settle(hooks, tmp_path) == ["paceline-1.7.safetensors"]
    assert load_file(tmp_path / "paceline-1.7.safetensors")["hidden_states"][:, :, 0].tolist() == [[1.0, 3.0]] * 3


def test_a_batch_that_failed_half_way_leaves_nothing_to_the_next(hooks: ModuleType, tmp_path: Path) -> None:
    hooks.build_hook({"directory": str(tmp_path), "layers": LAYERS, "prefix": "paceline-", "layer": 0})(
        nn.Identity(), (), (torch.full((9, 4), 9.0), torch.ones(9, 4))
    )
    forward(hooks, tmp_path, (Batch(),))
    assert settle(hooks, tmp_path) == ["paceline-1.7.safetensors"]
    assert load_file(tmp_path / "paceline-1.7.safetensors")["hidden_states"][:, :, 0].tolist() == [[1.0, 3.0]] * 3


def test_states_with_a_dimension_for_texts_are_taken_without_it(hooks: ModuleType, tmp_path: Path) -> None:
    config = {"directory": str(tmp_path), "layers": LAYERS, "prefix": "paceline-"}
    for layer in LAYERS:
        hooks.build_hook({**config, "layer": layer})(nn.Identity(), (), torch.full((1, 5, 4), float(layer)))
    hooks.build_hook({**config, "layer": None})(nn.Identity(), (Batch(),), None)
    assert settle(hooks, tmp_path) == ["paceline-1.7.safetensors"]
    assert load_file(tmp_path / "paceline-1.7.safetensors")["hidden_states"][:, :, 0].tolist() == [[0.0, 2.0]] * 3


def test_files_that_are_never_written_do_not_hold_the_model_for_ever(
    hooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "_MAX_WAIT_S", 0.1)
    hooks._capture(str(tmp_path), (0, 2), "paceline-", True)._waiting_bytes = hooks._MAX_WAITING_BYTES
    forward(hooks, tmp_path, (Batch(),))
    assert settle(hooks, tmp_path) == ["paceline-1.error"]
    assert "no file was written for 0 s: is " in (tmp_path / "paceline-1.error").read_text()


class OwedStream(SimpleNamespace):
    """Of SGLang from 0.5.21 on over two GPUs: each has half of what comes to the residual."""

    def snapshot(self, hidden: SimpleNamespace) -> torch.Tensor:
        assert hidden.contribution is self.pending
        self.calls.append(self.layer)
        return self.residual + 2 * self.pending.value


def test_a_sum_that_fails_in_one_process_ends_its_engine(hooks: ModuleType, tmp_path: Path) -> None:
    """Others may have theirs, and would go on one collective ahead: states of the next batches would be wrong."""

    class Full(SimpleNamespace):
        def snapshot(self, hidden: SimpleNamespace) -> torch.Tensor:
            raise torch.OutOfMemoryError("no room for the copy")

    hook = hooks.build_hook({"directory": str(tmp_path), "layers": LAYERS, "prefix": "paceline-", "layer": 0})
    pending = SimpleNamespace(value=torch.ones(5, 4), update=SimpleNamespace(is_plain_add=True))
    batch = Batch()
    batch.residual_stream = Full(residual=torch.ones(5, 4), pending=pending)
    with pytest.raises(torch.OutOfMemoryError, match="no room for the copy"):
        hook(nn.Identity(), (batch,), SimpleNamespace(contribution=pending))


def test_steps_that_decode_take_part_in_nothing(hooks: ModuleType, tmp_path: Path) -> None:
    """They are other clients', and a sum more for each of their tokens would slow them down."""
    hook = hooks.build_hook({"directory": str(tmp_path), "layers": LAYERS, "prefix": "paceline-", "layer": 0})
    calls: list[int] = []
    pending = SimpleNamespace(value=torch.ones(5, 4), update=SimpleNamespace(is_plain_add=True))
    for extend in (True, False):
        batch = Batch(extend=extend)
        batch.residual_stream = OwedStream(residual=torch.ones(5, 4), pending=pending, calls=calls, layer=0)
        hook(nn.Identity(), (batch,), SimpleNamespace(contribution=pending))
        assert calls == [0]


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_takes_part_in_the_sums_and_the_first_one_keeps_them(
    hooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """One that did not would leave the others waiting."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    config = {"directory": str(tmp_path), "layers": LAYERS, "prefix": "paceline-"}
    calls: list[int] = []
    batch = Batch()
    for layer in LAYERS:
        pending = SimpleNamespace(value=torch.full((5, 4), 0.5), update=SimpleNamespace(is_plain_add=True))
        residual = torch.full((5, 4), float(layer))
        batch.residual_stream = OwedStream(residual=residual, pending=pending, calls=calls, layer=layer)
        output = SimpleNamespace(contribution=pending)
        hooks.build_hook({**config, "layer": layer})(nn.Identity(), (None, batch), output)
        assert pending.value.eq(0.5).all()
    batch.residual_stream = None
    hooks.build_hook({**config, "layer": None})(nn.Identity(), (batch,), None)
    assert calls == LAYERS
    hooks._capture(str(tmp_path), (0, 2), "paceline-", rank == 0)._writers.shutdown()
    assert len(list(tmp_path.iterdir())) == (1 if rank == 0 else 0)
    if rank == 0:
        hidden = load_file(tmp_path / "paceline-1.7.safetensors")["hidden_states"]
        assert hidden.eq(torch.tensor([1.0, 3.0])[:, None]).all()
