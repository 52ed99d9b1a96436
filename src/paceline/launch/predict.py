"""What a run will be held up by, told beforehand from the shapes of its models and a table of devices; starts nothing.

Tokens a second are operations a token (`work`) divided into what a device reaches of its peak. Those shares, one for
each kind of work, are fitted to what was measured at 8B shapes on H100 and H200 with compiled models (docs/log.md); on
other devices they are assumed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.data.prepared import PreparedData, load_prepared
from paceline.errors import DataError, TargetError
from paceline.launch.devices import Device, find_device, named_device
from paceline.launch.plan import PlannedProcess, count_gpus, gpu_name
from paceline.launch.target_facts import bytes_per_token, outline_target, training_spec
from paceline.launch.work import DraftWork, TargetWork, Workload, draft_work, target_work
from paceline.observe.balance import Balance, BalanceWindow, judge

ACHIEVED: Mapping[str, float] = {"target": 0.58, "eagle3": 0.48, "dflash": 0.51}
"""Shares of the vendor's peak."""
_NOT_COMPILED = 0.77
"""The target's speed without torch.compile, of that with it."""
_ASSUMED_SUPERVISED = 0.6
_ASSUMED_DOCUMENT_TOKENS = 1024
_SERVER_ROWS = 4
"""Rows of features a server keeps a session at most."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one run."""

    workload: Workload
    device: Device
    target: TargetWork | None
    """None where the target does not run: rows from disk."""
    drafts: dict[str, DraftWork]
    demand: float
    """Tokens/s of one trainer with rows at hand."""
    supply: float | None
    """Tokens/s of one server."""
    balance: Balance
    step_s: float
    """A step of full rows."""
    bytes_per_s: float
    """Between all servers and all trainers."""
    memory_bytes: dict[str, float]
    """By role; what is in flight included."""
    notes: tuple[str, ...]
    """What was assumed, and what is not known."""


def find_workload(config: RunConfig) -> tuple[Workload, list[str]]:
    """The rows of a run, from its prepared data where it has some; and what was assumed."""
    rows = {"row_tokens": config.data.row_tokens, "rows_per_step": config.training.rows_per_step}
    prepared = _find_prepared(config)
    if prepared is None:
        length = min(_ASSUMED_DOCUMENT_TOKENS, config.data.row_tokens)
        why = "a recording is not looked into" if config.placement.target == "recorded" else "nothing is prepared yet"
        share = f"{_ASSUMED_SUPERVISED:.0%}".replace("%", " %")
        assumed = f"assumed: {share} of tokens supervised, documents of {length:,} tokens ({why})"
        return Workload(**rows, supervised=_ASSUMED_SUPERVISED, document_tokens=length), [assumed]
    lengths = np.asarray(prepared.train.lengths, dtype=np.float64).clip(max=config.data.row_tokens)
    mean = float((lengths**2).sum() / max(lengths.sum(), 1.0))
    return Workload(**rows, supervised=prepared.summary.train.supervised_share, document_tokens=mean), []


def _find_prepared(config: RunConfig) -> PreparedData | None:
    """The newest that was packed as this run packs."""
    if config.placement.target == "recorded":
        return None
    cache = Path(config.data.cache_dir) if config.data.cache_dir else RunDir(Path(config.run_dir)).prepared
    for path in sorted(cache.glob("rows-*/prepared.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            found = load_prepared(path.parent)
        except DataError:
            continue
        if found.train_plan.row_tokens == config.data.row_tokens:
            return found
    return None


def predict(config: RunConfig, device: Device, workload: Workload, assumed: list[str]) -> Prediction | str:
    """The prediction, or why there is none.

    Args:
        device: of every process.

    Raises:
        TargetError: the target's configuration cannot be read.
    """
    info = outline_target(config)
    spec = training_spec(config, info)
    drafts: dict[str, DraftWork] = {}
    for name, draft in config.drafts.items():
        work = draft_work(draft, info, workload)
        if work is None:
            return f"no prediction: nobody here knows what a draft of {draft.algorithm!r} computes"
        drafts[name] = work
    target = None if config.placement.target == "recorded" else target_work(config, info, spec, workload)
    demand = 1 / sum(
        1 / _tokens_per_s(device, work.algorithm, work.flops)
        + work.update_bytes / (device.memory_tb_per_s * 1e12) / (workload.row_tokens * workload.rows_per_step)
        for work in drafts.values()
    )
    supply = None
    if target is not None:
        supply = _tokens_per_s(device, "target", target.flops) * config.target.tensor_parallel
        supply *= 1.0 if config.target.compile else _NOT_COMPILED
    per_token = bytes_per_token(spec, info, workload.supervised)
    balance = _balance(config, demand, supply, per_token)
    return Prediction(
        workload=workload,
        device=device,
        target=target,
        drafts=drafts,
        demand=demand,
        supply=supply,
        balance=balance,
        step_s=workload.row_tokens * workload.rows_per_step / balance.tokens_per_s,
        bytes_per_s=balance.tokens_per_s * per_token,
        memory_bytes=_memory(config, workload, target, drafts, per_token),
        notes=(*assumed, *_notes(config, device, target)),
    )


def _tokens_per_s(device: Device, kind: str, flops: float) -> float:
    return device.bf16_tflops * 1e12 * ACHIEVED[kind] / flops


def count_servers(config: RunConfig) -> int:
    """Servers of a run; 0 where the target runs in the trainer's process, or nowhere."""
    placement = config.placement
    return {"servers": placement.num_servers, "urls": len(placement.urls)}.get(placement.target, 0)


def _balance(config: RunConfig, demand: float, supply: float | None, per_token: float) -> Balance:
    """The verdict on a second of the run."""
    num_trainers, num_servers = config.placement.num_trainers, count_servers(config)
    all_demand = demand * num_trainers
    if supply is None:
        rate, target_s = all_demand, 0.0
    elif num_servers:
        rate = min(all_demand, supply * num_servers)
        target_s = rate / supply
    else:  # the device does one after the other
        rate = num_trainers / (1 / demand + 1 / supply)
        target_s = rate / supply
    busy_s = rate / all_demand
    window = BalanceWindow(
        wall_s=1.0,
        tokens=rate,
        data_wait_s=1.0 - busy_s if num_servers else 0.0,
        busy_s=busy_s,
        num_bytes=rate * per_token,
        target_tokens=rate,
        target_s=target_s,
        server_s=num_servers,
    )
    verdict = judge(window, num_trainers)
    assert verdict is not None, "tokens are trained"
    return verdict


def _memory(
    config: RunConfig,
    workload: Workload,
    target: TargetWork | None,
    drafts: Mapping[str, DraftWork],
    per_token: float,
) -> dict[str, float]:
    row_bytes = per_token * workload.row_tokens
    transport, placement = config.transport, config.placement
    held = max(1.0, min(transport.prefetch_rows + 1.0, transport.prefetch_bytes / row_bytes)) * row_bytes
    ranks = placement.num_trainers if config.training.sharding == "full" else 1
    # Activations of several drafts never exist together: one after the other trains on a row.
    # A group of ranks that trains a row together shares it out, but for the keys that all of them have.
    training = config.training
    trainer = (held + max(work.activation_bytes for work in drafts.values())) / training.sequence_parallel
    if training.sequence_exchange == "keys":
        trainer += max(work.keys_bytes for work in drafts.values()) * (1 - 1 / training.sequence_parallel)
    trainer += sum((work.weight_bytes + work.state_bytes) / ranks + work.frozen_bytes for work in drafts.values())
    if target is None:
        return {"trainer": trainer}
    own = (target.weight_bytes + target.scratch_bytes) / config.target.tensor_parallel
    if not count_servers(config):
        return {"trainer": trainer + own}
    return {"server": own + _SERVER_ROWS * row_bytes * placement.num_trainers, "trainer": trainer}


def _notes(config: RunConfig, device: Device, target: TargetWork | None) -> list[str]:
    notes = []
    if not device.measured:
        notes.append(f"no speed was measured on {device.name}: shares of its peak are those of H100 and H200")
    if not config.training.compile:
        notes.append(
            "drafts are predicted as with training.compile = true; how much slower they are without is unknown"
        )
    if target is not None and config.target.engine != "hf":
        notes.append(
            f"the target is predicted as the hf engine would compute it: {config.target.engine}'s speed is its own, "
            "and its memory what it is given (target.engine_args)"
        )
    if target is not None and target.has_experts:
        notes.append("speed of targets with experts was not measured: theirs is at most what is said here")
    if target is not None and config.target.tensor_parallel > 1:
        notes.append(f"tensor parallelism is counted as {config.target.tensor_parallel} times the speed, at most")
    if config.placement.target == "urls":
        notes.append("servers are taken to be of the same kind, compiled as target.compile says here")
    if config.placement.launcher == "external":
        notes.append("for one trainer rank: how many there are, torchrun or Slurm says")
    if config.placement.num_trainers > 1:
        notes.append("what trainer ranks lose by adding gradients up is not counted")
    if config.data.recorded is not None and target is not None:
        notes.append("rows that are on disk are not counted: the target has less to do")
    return notes


def describe_prediction(config: RunConfig, processes: list[PlannedProcess], device: str | None) -> list[str]:
    """Lines for a user: the prediction, or why there is none.

    Args:
        device: for which GPU; None is the one of this machine.

    Raises:
        ConfigError: a device that is not in the table.
    """
    elsewhere = None if device is None else named_device(device)
    if any("cpu" in process.devices for process in processes) or (device is None and count_gpus() == 0):
        return ["no prediction for a CPU; for a GPU that is not here: --device H200"]
    found = elsewhere or find_device(gpu_name())
    if found is None:
        return [f"no prediction for {gpu_name()}: it is not in the table; for one that is: --device H200"]
    shared = _shared_device(processes)
    if shared is not None:
        return [f"no prediction: a server and a trainer share {shared}, which does one after the other"]
    try:
        prediction = predict(config, found, *find_workload(config))
    except TargetError as error:
        return [f"no prediction: {error}"]
    return [prediction] if isinstance(prediction, str) else describe(prediction, config)


def _shared_device(processes: list[PlannedProcess]) -> str | None:
    used = [device for process in processes if process.started_by == "this command" for device in process.devices]
    return next((device for device in used if used.count(device) > 1), None)


def describe(prediction: Prediction, config: RunConfig) -> list[str]:
    """The prediction in lines of text."""
    device, workload, balance = prediction.device, prediction.workload, prediction.balance
    drafts = ", ".join(f"{name} {work.flops / 1e9:.1f}" for name, work in prediction.drafts.items())
    lines = [
        f"prediction for {device.name} ({device.bf16_tflops:,.0f} TFLOP/s bf16, {device.memory_gib:,.0f} GiB), rows of "
        f"{workload.row_tokens:,} tokens, {workload.supervised:.0%} supervised".replace("%", " %"),
        f"a trainer: {drafts} GFLOP a token, {prediction.demand:,.0f} tokens/s if rows are there",
    ]
    if prediction.target is not None and prediction.supply is not None:
        who = "a server" if balance.num_servers else "the target alone"
        lines.append(f"{who}: {prediction.target.flops / 1e9:.1f} GFLOP a token, {prediction.supply:,.0f} tokens/s")
    lines.append(f"the run: {balance.tokens_per_s:,.0f} tokens/s, {prediction.step_s:.3g} s a step; {balance.text}")
    if balance.limit == "target" and prediction.supply is not None:
        enough = math.ceil(prediction.demand * balance.num_trainers / prediction.supply)
        gain = prediction.demand * balance.num_trainers / balance.tokens_per_s
        if enough - balance.num_servers > 1:
            lines.append(f"{enough - balance.num_servers} more servers would keep the trainers at work: {gain:.1f}x")
    if balance.num_servers:
        lines.append(f"between servers and trainers: {prediction.bytes_per_s / 1e9:.2f} GB/s of features")
    lines += _describe_split(prediction, config)
    memory = ", ".join(f"{role} {size / 2**30:,.1f}" for role, size in prediction.memory_bytes.items())
    lines.append(f"memory, about: {memory} GiB of {device.memory_gib:,.0f}")
    if any(size / 2**30 > device.memory_gib for size in prediction.memory_bytes.values()):
        lines[-1] += ": does not fit"
    return lines + [f"  {note}" for note in prediction.notes]


def _describe_split(prediction: Prediction, config: RunConfig) -> list[str]:
    """What the same GPUs would train if each had the target beside its drafts, and in the best split of them."""
    degree = config.target.tensor_parallel
    if prediction.supply is None or prediction.target is None or degree > 1:
        return []
    num = max(2, prediction.balance.num_servers + prediction.balance.num_trainers)
    every = num / (1 / prediction.demand + 1 / prediction.supply)
    rates = {n: min(n * prediction.supply, (num - n) * prediction.demand) for n in range(1, num)}
    best = max(rates, key=lambda n: rates[n])
    together = f"{every:,.0f} tokens/s with the target beside each of {num} trainers"
    return [f"any {num} such GPUs: {together}, {rates[best]:,.0f} with servers on {best} of them"]
