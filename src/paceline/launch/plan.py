"""Which processes a run consists of, where each runs and what it listens on; starts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PlannedProcess:
    """One process of a run."""

    role: str
    """"trainer" or "server"."""
    rank: int
    devices: tuple[str, ...]
    """One, or one each of a tensor-parallel target."""
    address: str
    """What it listens on, or how it is reached."""
    started_by: str
    """"this command", or who else."""
    work: str
    """What it does, in a few words."""

    @property
    def name(self) -> str:
        return f"{self.role}-{self.rank}"


def count_gpus() -> int:
    """GPUs this process may use; imports torch only where there is a driver."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return 0
    import torch

    return torch.cuda.device_count()


def gpu_name() -> str:
    """What the driver calls the first GPU."""
    import torch

    return torch.cuda.get_device_name(0)


def num_gpus_wanted(config: RunConfig) -> int:
    """GPUs of a machine on which every process of the run has its own: to plan for one that is not here."""
    placement = config.placement
    servers = placement.num_servers if placement.target == "servers" else 0
    return servers * config.target.tensor_parallel + placement.num_trainers


def plan_processes(config: RunConfig, num_gpus: int) -> list[PlannedProcess]:
    """The processes of a run on this host, servers first.

    Raises:
        ConfigError: more GPUs are needed than there are; names both numbers.
    """
    placement, degree = config.placement, config.target.tensor_parallel
    if placement.target != "servers":
        device = _auto(config.training.device, 0, num_gpus)
        return [*_servers_elsewhere(config), _trainer(config, (device,))]
    groups = [
        _group(start, degree) if start != "auto" else ("auto",) * degree
        for start in placement.server_devices or _default_devices(config, num_gpus)
    ]
    used = {device for group in groups for device in group}
    free = [f"cuda:{index}" for index in range(num_gpus) if f"cuda:{index}" not in used]
    trainer = config.training.device
    if trainer == "auto":
        trainer = free[0] if free else ("cuda:0" if num_gpus else "cpu")
    servers = [
        PlannedProcess(
            "server",
            rank,
            group,
            "http://127.0.0.1, a port the system chooses",
            "this command",
            f"target {config.target.model}" + (f", tensor parallel {degree}" if degree > 1 else ""),
        )
        for rank, group in enumerate(groups)
    ]
    return [*servers, _trainer(config, (trainer,))]


def _default_devices(config: RunConfig, num_gpus: int) -> tuple[str, ...]:
    """The first GPUs, and one left for the trainer; one server and a trainer may share a single GPU."""
    num, degree, wanted = config.placement.num_servers, config.target.tensor_parallel, config.target.device
    if wanted != "auto":
        if num > 1 and wanted.startswith("cuda"):
            raise ConfigError(
                f"target.device = {wanted!r} for {num} servers: name one each in placement.server_devices instead"
            )
        return (wanted,) * num
    if num_gpus == 0:
        return ("cpu",) * num
    needed = num * degree
    if needed > num_gpus:
        raise ConfigError(
            f"{num} servers of {degree} GPUs need {needed}, this host has {num_gpus}: lower placement.num_servers or "
            "target.tensor_parallel, or name devices in placement.server_devices"
        )
    return tuple(f"cuda:{rank * degree}" for rank in range(num))


def _group(start: str, degree: int) -> tuple[str, ...]:
    if degree == 1 or not start.startswith("cuda"):
        return (start,) * degree
    first = int(start.partition(":")[2] or 0)
    return tuple(f"cuda:{first + offset}" for offset in range(degree))


def _auto(device: str, index: int, num_gpus: int) -> str:
    if device != "auto":
        return device
    return f"cuda:{index}" if num_gpus else "cpu"


def _servers_elsewhere(config: RunConfig) -> list[PlannedProcess]:
    return [
        PlannedProcess("server", rank, ("its own",), url, "somebody else", f"target {config.target.model}")
        for rank, url in enumerate(config.placement.urls)
    ]


def _trainer(config: RunConfig, devices: tuple[str, ...]) -> PlannedProcess:
    drafts = ", ".join(f"{name} ({draft.algorithm})" for name, draft in config.drafts.items())
    work = f"drafts {drafts}"
    if config.placement.target == "inline":
        work += f"; target {config.target.model} on a thread of its own"
    elif config.placement.target == "recorded":
        work += f"; features from {config.data.recorded}"
    else:
        work += f"; servers named in {RunDir(Path(config.run_dir)).servers}"
    return PlannedProcess("trainer", 0, devices, "nothing", "this command", work)


def describe_rows(config: RunConfig) -> list[str]:
    """What travels for a full row, and the most that lies in memory; the target's sizes come from its config.json."""
    from paceline.launch.target_facts import feature_bytes_per_token

    per_token, layers = feature_bytes_per_token(config)
    tokens, transport = config.data.row_tokens, config.transport
    row_bytes = per_token * tokens
    rows = max(1, min(transport.prefetch_rows, transport.prefetch_bytes // row_bytes))
    travelling = (
        f"features: layers {', '.join(map(str, layers))}; {per_token / 1024:.1f} KiB a token, "
        f"{row_bytes / 2**20:,.1f} MiB a row of {tokens:,} tokens (final hidden states of every token)"
    )
    held = (
        f"in flight: {rows} rows, {rows * row_bytes / 2**30:.2f} GiB at most (transport.prefetch_rows "
        f"{transport.prefetch_rows}, prefetch_bytes {transport.prefetch_bytes:,})"
    )
    return [travelling, held]
