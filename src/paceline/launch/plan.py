"""Which processes a run consists of, where each runs and what it listens on; starts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paceline.config.base import Config
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
    targets = {"servers": placement.num_servers, "inline": placement.num_trainers}.get(placement.target, 0)
    trainers = 0 if placement.target == "inline" else placement.num_trainers
    return targets * config.target.tensor_parallel + trainers


def plan_processes(config: RunConfig, num_gpus: int) -> list[PlannedProcess]:
    """The processes of a run on this host, servers first.

    Raises:
        ConfigError: more GPUs are needed than there are; names both numbers.
    """
    if config.placement.launcher == "ray":
        from paceline.launch.ray.planned import plan_on_ray

        return plan_on_ray(config, num_gpus)
    if config.placement.launcher == "external":
        return [*servers_elsewhere(config), _trainer_of_others(config)]
    groups = _server_groups(config, num_gpus) if config.placement.target == "servers" else []
    servers = [_server(config, rank, group) for rank, group in enumerate(groups)]
    used = {"cuda:0" if device == "cuda" else device for group in groups for device in group}
    devices = _trainer_devices(config, num_gpus, used)
    trainers = [_trainer(config, rank, group) for rank, group in enumerate(devices)]
    return [*servers, *servers_elsewhere(config), *trainers]


def config_on(config: RunConfig, device: str) -> RunConfig:
    """`config` for a trainer on `device`, and for the target beside it unless that has a device of its own."""
    changed: dict[str, Config] = {"training": config.training.model_copy(update={"device": device})}
    follows = config.target.device == "auto" or (config.target.device == "cuda" and device.startswith("cuda"))
    if config.placement.target == "inline" and follows:
        changed["target"] = config.target.model_copy(update={"device": device})
    return config.model_copy(update=changed)


def _server_groups(config: RunConfig, num_gpus: int) -> list[tuple[str, ...]]:
    degree = config.target.tensor_parallel
    return [
        _group(start, degree) if start != "auto" else ("auto",) * degree
        for start in config.placement.server_devices or _default_devices(config, num_gpus)
    ]


def _trainer_devices(config: RunConfig, num_gpus: int, used: set[str]) -> list[tuple[str, ...]]:
    """Of each rank: one device, or as many as its own target is spread over."""
    num, wanted = config.placement.num_trainers, config.training.device
    degree = config.target.tensor_parallel if config.placement.target == "inline" else 1
    if config.placement.trainer_devices:
        return [_group(start, degree) for start in config.placement.trainer_devices]
    free = [f"cuda:{index}" for index in range(num_gpus) if f"cuda:{index}" not in used]
    if num == 1:
        return [_group(_only_trainer(wanted, free, num_gpus), degree)]
    _check_one_device_each(config)
    if wanted == "cpu" or (wanted == "auto" and num_gpus == 0):
        return [("cpu",) * degree] * num
    if num * degree > len(free):
        taken = num_gpus - len(free)
        raise ConfigError(
            f"{num} trainers need {num * degree} GPUs, {len(free)} are free: this host has {num_gpus}, servers take "
            f"{taken}; lower placement.num_trainers or placement.num_servers, or name devices in "
            "placement.trainer_devices"
        )
    return [tuple(free[rank * degree : (rank + 1) * degree]) for rank in range(num)]


def _only_trainer(wanted: str, free: list[str], num_gpus: int) -> str:
    """A single trainer may share a GPU with a server, if there is no other."""
    if wanted != "auto":
        return wanted
    return free[0] if free else ("cuda:0" if num_gpus else "cpu")


def _check_one_device_each(config: RunConfig) -> None:
    """Raise ConfigError if a setting names one device for all of several ranks."""
    num, target = config.placement.num_trainers, config.target
    if config.training.device.startswith("cuda:"):
        raise ConfigError(
            f"training.device = {config.training.device!r} for {num} trainers: name one each in "
            "placement.trainer_devices instead"
        )
    if config.placement.target == "inline" and (target.device.startswith("cuda:") or target.device_map is not None):
        setting = "device_map" if target.device_map is not None else "device"
        raise ConfigError(
            f"target.{setting} = {getattr(target, setting)!r} for the {num} targets of {num} trainers: leave it out, "
            "and each target is on its trainer's device"
        )


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


def _server(config: RunConfig, rank: int, group: tuple[str, ...]) -> PlannedProcess:
    address, work = "http://127.0.0.1, a port the system chooses", server_work(config)
    return PlannedProcess("server", rank, group, address, "this command", work)


def server_work(config: RunConfig) -> str:
    """What a server does, in a few words."""
    degree = config.target.tensor_parallel
    return f"target {config.target.model}" + (f", tensor parallel {degree}" if degree > 1 else "")


def servers_elsewhere(config: RunConfig) -> list[PlannedProcess]:
    """Servers that somebody else has started."""
    return [
        PlannedProcess("server", rank, ("its own",), url, "somebody else", f"target {config.target.model}")
        for rank, url in enumerate(config.placement.urls)
    ]


def _trainer(config: RunConfig, rank: int, devices: tuple[str, ...]) -> PlannedProcess:
    address = "nothing" if config.placement.num_trainers == 1 else "the other trainers, on this host"
    return PlannedProcess("trainer", rank, devices, address, "this command", trainer_work(config))


def _trainer_of_others(config: RunConfig) -> PlannedProcess:
    """One line for the ranks that torchrun or Slurm will start: how many is theirs to say."""
    device = "cuda:LOCAL_RANK, or cpu" if config.training.device == "auto" else config.training.device
    return PlannedProcess("trainer", 0, (device,), "MASTER_ADDR:MASTER_PORT", "torchrun or Slurm", trainer_work(config))


def trainer_work(config: RunConfig) -> str:
    """What a trainer does, in a few words."""
    drafts = ", ".join(f"{name} ({draft.algorithm})" for name, draft in config.drafts.items())
    work = f"drafts {drafts}"
    if config.placement.target == "inline":
        return f"{work}; target {config.target.model} on a thread of its own"
    if config.placement.target == "recorded":
        return f"{work}; features from {config.data.recorded}"
    return f"{work}; servers named in {RunDir(Path(config.run_dir)).servers}"


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
