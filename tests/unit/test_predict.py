"""What `paceline plan` says about speed beforehand: counted by hand at 8B shapes, and held against measured runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paceline.config.drafts import DFlashConfig, Eagle3Config
from paceline.config.loading import build_config
from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.errors import ConfigError
from paceline.launch.devices import Device, find_device, named_device
from paceline.launch.plan import num_gpus_wanted, plan_processes
from paceline.launch.predict import Prediction, describe, describe_prediction, find_workload, predict
from paceline.launch.prepare import prepare_data
from paceline.launch.target_facts import outline_target, read_checkpoint_facts, training_spec
from paceline.launch.work import Workload, draft_work, target_work
from shapes_of_targets import save_qwen3_8b, save_qwen3_30b_a3b
from whole_run import run_config, write_data

H100 = named_device("H100")
EAGLE3 = {"algorithm": "eagle3"}
DFLASH = {"algorithm": "dflash"}
ROWS = {"eagle3": Workload(8192, 1, 0.6, 1024), "dflash": Workload(6144, 1, 0.6, 3072)}
"""Those of the benchmarks: 8 x 1024, and 2 x 3072."""
GIGA = 1e9


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3_8b(tmp_path_factory.mktemp("8b"))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3_30b_a3b(tmp_path_factory.mktemp("30b"))


def run_of(model: Path, draft: dict[str, Any], **placement: Any) -> RunConfig:
    return build_config(
        {
            "run_dir": str(model / "run"),
            "target": {"model": str(model), "dtype": "bfloat16", "compile": True},
            "data": {"train": "absent.jsonl"},
            "drafts": {"draft": draft},
            "training": {"compile": True},
            "placement": placement,
        }
    )


def predicted(config: RunConfig, workload: Workload, device: Device = H100) -> Prediction:
    found = predict(config, device, workload, [])
    assert isinstance(found, Prediction), found
    return found


def test_operations_of_a_dense_target_are_those_counted_by_hand(dense: Path) -> None:
    config = run_of(dense, EAGLE3)
    info = outline_target(config)
    work = target_work(config, info, training_spec(config, info), ROWS["eagle3"])
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 12288
    attention = 4 * 512 * 4096 * 36  # 512 tokens before one of a document of 1024, on average
    assert work.flops == 2 * (36 * layer + 4096 * 151936) + attention
    assert work.flops == pytest.approx(15.4 * GIGA, rel=0.01)
    assert work.weight_bytes == pytest.approx(2 * 8.19 * GIGA, rel=0.001)
    assert not work.has_experts
    # DFlash alone asks for no greedy tokens, so no head is computed
    config = run_of(dense, DFLASH)
    without = target_work(config, info, training_spec(config, info), ROWS["eagle3"])
    assert work.flops - without.flops == 2 * 4096 * 151936


def test_of_a_target_with_experts_the_active_ones_count_and_all_are_held(sparse: Path) -> None:
    config = run_of(sparse, DFLASH)
    info = outline_target(config)
    work = target_work(config, info, training_spec(config, info), ROWS["eagle3"])
    attention = 2048 * 4096 * 2 + 2048 * 512 * 2
    layer = attention + 8 * 3 * 2048 * 768 + 2048 * 128
    assert work.flops == pytest.approx(2 * 48 * layer + 4 * 512 * 4096 * 48)
    assert work.weight_bytes == pytest.approx(2 * 30.53 * GIGA, rel=0.001)
    assert work.has_experts


def test_operations_of_eagle3_are_those_counted_by_hand(dense: Path) -> None:
    info = outline_target(run_of(dense, EAGLE3))
    work = draft_work(Eagle3Config(), info, Workload(8192, 1, 1.0, 1024))
    assert work is not None
    fuse, keys_values = 3 * 4096 * 4096, 2 * 8192 * 1024
    rest, head = 8192 * 4096 + 4096 * 4096 + 3 * 4096 * 12288, 4096 * 32000
    context = 14 * 512 * 4096
    assert work.flops == (
        4 * fuse  # of every token; its input, the target's states, needs no gradient
        + 7 * 6 * keys_values  # the row's own, and those of each slot's depths 1 to 6
        + 7 * (6 * (rest + head) + context)
        + 2 * head  # the teacher's, once
    )
    assert work.flops == pytest.approx(15 * GIGA, rel=0.03)
    assert work.num_weights == fuse + keys_values + rest + head
    # only what is supervised is unrolled
    less = draft_work(Eagle3Config(), info, Workload(8192, 1, 0.5, 1024))
    assert less is not None
    assert 0.5 < less.flops / work.flops < 0.53


def test_operations_of_dflash_are_those_counted_by_hand(dense: Path) -> None:
    info = outline_target(run_of(dense, DFLASH))
    work = draft_work(DFlashConfig(), info, Workload(6144, 1, 1.0, 3072))
    assert work is not None
    fuse, keys_values = 5 * 4096 * 4096, 2 * 4096 * 1024
    layer = 2 * 4096 * 4096 + keys_values + 3 * 4096 * 12288
    slot = 6 * 5 * layer + 5 * 14 * 1536 * 4096 + 4 * 4096 * 151936 * 15 / 16
    assert work.flops == pytest.approx(4 * fuse + 6 * 5 * keys_values + 16 / 6 * slot)
    # a document draws no more anchors than it has supervised tokens
    sparse = draft_work(DFlashConfig(), info, Workload(6144, 1, 0.05, 3072))
    assert sparse is not None
    assert sparse.flops < 0.4 * work.flops


MEASURED = [
    # draft, placement, tokens/s on H100 (benchmarks/disaggregation.py, see the log)
    ("eagle3", {"target": "servers", "num_servers": 1}, 38_087),
    ("eagle3", {"target": "servers", "num_servers": 2}, 49_519),
    ("eagle3", {}, 21_550),
    ("dflash", {"target": "servers", "num_servers": 1}, 20_209),
]
WITHIN = 0.1
"""Shares of the peak are fitted to these figures: what is shown is that one share for each kind of work explains them
in all placements."""


@pytest.mark.parametrize(("draft", "placement", "tokens_per_s"), MEASURED)
def test_runs_that_were_measured_are_predicted(
    dense: Path, draft: str, placement: dict[str, Any], tokens_per_s: float
) -> None:
    found = predicted(run_of(dense, {"algorithm": draft}, **placement), ROWS[draft])
    assert found.balance.tokens_per_s == pytest.approx(tokens_per_s, rel=WITHIN)


@pytest.mark.parametrize(
    ("draft", "supervised", "demand", "supply"),
    [("eagle3", 0.6, 48_925, 37_857), ("eagle3", 1.0, 31_991, 37_857), ("dflash", 0.6, 20_349, 37_700)],
)
def test_each_side_alone_is_predicted(dense: Path, draft: str, supervised: float, demand: float, supply: float) -> None:
    rows = ROWS[draft]
    workload = Workload(rows.row_tokens, rows.rows_per_step, supervised, rows.document_tokens)
    found = predicted(run_of(dense, {"algorithm": draft}), workload)
    assert found.demand == pytest.approx(demand, rel=WITHIN)
    assert found.supply == pytest.approx(supply, rel=WITHIN)


def test_memory_is_near_what_was_measured(dense: Path) -> None:
    """GiB: the target 17.5; EAGLE-3 10.6 and, all supervised, 14.9; DFlash 16.3, each without optimizer state."""
    info = outline_target(run_of(dense, EAGLE3))
    for draft, workload, gib in (
        (Eagle3Config(), ROWS["eagle3"], 10.6),
        (Eagle3Config(), Workload(8192, 1, 1.0, 1024), 14.9),
        (DFlashConfig(), Workload(6144, 1, 1.0, 3072), 16.3),
    ):
        work = draft_work(draft, info, workload)
        assert work is not None
        held = work.activation_bytes + work.frozen_bytes + work.weight_bytes
        assert held / 2**30 == pytest.approx(gib, rel=0.15)
    found = predicted(run_of(dense, EAGLE3, target="servers"), ROWS["eagle3"])
    assert found.memory_bytes["server"] / 2**30 == pytest.approx(17.5, rel=0.1)
    assert found.memory_bytes["trainer"] > 14 * 2**30  # optimizer state of 0.4 G weights in fp32: 6 GiB


def test_ranks_that_share_a_row_hold_the_keys_of_all_of_it_or_their_share(dense: Path) -> None:
    def trainer_bytes(draft: dict[str, Any], num_parts: int, exchange: str) -> float:
        config = run_of(dense, draft, target="servers", num_trainers=4)
        changes = {"sequence_parallel": num_parts, "sequence_exchange": exchange}
        changed = config.model_copy(update={"training": config.training.model_copy(update=changes)})
        return predicted(changed, Workload(65536, 1, 0.6, 1024)).memory_bytes["trainer"]

    keys = 65536 * 2 * 8 * 128 * 2.0 * 2  # of tokens: keys and values, heads, head_dim, bf16, and gradients
    for draft, num_layers in ((EAGLE3, 1), (DFLASH, 5)):
        for num_parts in (2, 4):
            more = trainer_bytes(draft, num_parts, "keys") - trainer_bytes(draft, num_parts, "heads")
            assert more == pytest.approx(num_layers * keys * (1 - 1 / num_parts))
        assert trainer_bytes(draft, 1, "keys") == trainer_bytes(draft, 1, "heads")


def test_the_verdict_beforehand_is_said_like_that_of_a_run(dense: Path) -> None:
    waiting = predicted(run_of(dense, EAGLE3, target="servers", num_servers=1), ROWS["eagle3"])
    assert waiting.balance.limit == "target"
    assert "1 more server would give 1.3x" in waiting.balance.text
    assert waiting.bytes_per_s == pytest.approx(waiting.balance.tokens_per_s * (24_580 + 0.6 * 8_196), rel=0.001)
    assert waiting.step_s == pytest.approx(8192 / waiting.balance.tokens_per_s)
    idle = predicted(run_of(dense, DFLASH, target="servers", num_servers=2), ROWS["dflash"])
    assert idle.balance.limit == "trainers"
    assert "1 server fewer would cost nothing" in idle.balance.text
    shared = predicted(run_of(dense, EAGLE3), ROWS["eagle3"])
    assert shared.balance.limit == "shared"
    assert shared.balance.servers_work == pytest.approx(0.57, abs=0.02)
    four = predicted(run_of(dense, EAGLE3, num_trainers=4), ROWS["eagle3"])
    assert four.balance.servers_work == pytest.approx(shared.balance.servers_work)
    assert four.balance.tokens_per_s == pytest.approx(4 * shared.balance.tokens_per_s)


def test_several_servers_that_are_missing_are_counted(dense: Path) -> None:
    many = run_of(dense, EAGLE3, target="servers", num_servers=1, num_trainers=4)
    lines = describe(predicted(many, ROWS["eagle3"]), many)
    # 4 trainers want 198,000 tokens/s, a server gives 37,000: six of them
    assert any(line.startswith("5 more servers would keep the trainers at work: 5.3x") for line in lines)


def test_what_is_assumed_is_said(dense: Path, sparse: Path, tmp_path: Path) -> None:
    config = run_of(sparse, EAGLE3, target="servers")
    workload, assumed = find_workload(config)
    assert (workload.supervised, workload.document_tokens, workload.row_tokens) == (0.6, 1024, 8192)
    assert "nothing is prepared yet" in assumed[0]
    found = predict(config, named_device("B200"), workload, assumed)
    assert isinstance(found, Prediction)
    said = " ".join(found.notes)
    for part in ("60 % of tokens supervised", "experts was not measured", "no speed was measured on B200"):
        assert part in said
    assert "hf engine" not in said
    vllm = config.model_copy(update={"target": config.target.model_copy(update={"engine": "vllm"})})
    found = predict(vllm, H100, workload, [])
    assert isinstance(found, Prediction)
    assert any("as the hf engine would compute it: vllm's speed is its own" in note for note in found.notes)
    eager = config.model_copy(update={"training": config.training.model_copy(update={"compile": False})})
    found = predict(eager, H100, workload, [])
    assert isinstance(found, Prediction)
    assert any("training.compile = true" in note for note in found.notes)


def test_prepared_data_is_used_where_there_is_some(tiny_target: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", tiny_target, write_data(tmp_path / "data"))
    prepared = prepare_data(config, RunDir(tmp_path / "run"), read_checkpoint_facts(config))
    workload, assumed = find_workload(config)
    assert assumed == []
    assert workload.supervised == prepared.summary.train.supervised_share
    lengths = [int(length) for length in prepared.train.lengths]
    assert workload.document_tokens == pytest.approx(sum(n * n for n in lengths) / sum(lengths))
    other = run_config(tmp_path / "run", tiny_target, tmp_path / "data", data__row_tokens=64)
    assert find_workload(other)[1] != [], "rows of another length are not those of this run"


def test_devices_are_known_by_what_drivers_call_them() -> None:
    found = {
        name: device.name if (device := find_device(name)) else None
        for name in (
            *("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "NVIDIA L4"),
            *("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3060", "h200"),
        )
    }
    assert list(found.values()) == ["H100", "H200", "A100", "L40S", "L4", "RTX 4090", None, "H200"]
    with pytest.raises(ConfigError, match=r"'TPU' is not in the table: choose from H100, H200"):
        named_device("TPU")


def test_where_nothing_can_be_said_the_reason_is(dense: Path) -> None:
    config = run_of(dense, EAGLE3)
    assert describe_prediction(config, plan_processes(config, 0), None) == [
        "no prediction for a CPU; for a GPU that is not here: --device H200"
    ]
    others = run_of(dense, EAGLE3, launcher="external")
    assert describe_prediction(others, plan_processes(others, 0), None)[0].startswith("no prediction for a CPU")
    assert "how many there are" in describe_prediction(others, plan_processes(others, 1), "H100")[-1]
    one_gpu = run_of(dense, EAGLE3, target="servers")
    assert "share cuda:0" in describe_prediction(one_gpu, plan_processes(one_gpu, 1), "H100")[0]
    assert num_gpus_wanted(one_gpu) == 2
    lines = describe_prediction(one_gpu, plan_processes(one_gpu, 2), "H100")
    assert lines[0].startswith("prediction for H100 (989 TFLOP/s bf16, 80 GiB), rows of 8,192 tokens, 60 % supervised")
    assert any(line.startswith("any 2 such GPUs: 42,") for line in lines)


def test_what_does_not_fit_is_said_not_to(sparse: Path) -> None:
    config = run_of(sparse, EAGLE3)
    assert "does not fit" in " ".join(describe(predicted(config, ROWS["eagle3"], named_device("L40S")), config))
    assert "does not fit" not in " ".join(describe(predicted(config, ROWS["eagle3"], named_device("H200")), config))
