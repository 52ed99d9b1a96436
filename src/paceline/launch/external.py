"""`placement.launcher = "external"`: this process is one of the trainer ranks that torchrun or Slurm has started."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.launch.plan import config_on
from paceline.launch.rendezvous import Rendezvous

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.launch.signals import StopSignals
    from paceline.training.trainer import TrainingResult

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID")
_FIRST_PORT, _NUM_PORTS = 15_000, 15_000
"""Below the ports that systems give to whoever asks for any."""


@dataclass(frozen=True, slots=True)
class External:
    """What a launcher told this process."""

    rendezvous: Rendezvous
    local_rank: int
    """Among the ranks on this host."""
    launcher: str
    """"torchrun" or "Slurm"."""


def detect_external(environ: Mapping[str, str]) -> External:
    """This process's place, from the variables that torchrun or `srun` has set; torchrun's count where both are.

    Raises:
        ConfigError: there are none, some are missing, or one is not a number; names them.
    """
    if "RANK" in environ or ("WORLD_SIZE" in environ and "SLURM_PROCID" not in environ):
        return _from_torchrun(environ)
    if "SLURM_PROCID" in environ:
        return _from_slurm(environ)
    raise ConfigError(
        f'placement.launcher = "external", but nobody has started this process as a rank: torchrun sets '
        f"{', '.join(_TORCHRUN)}; srun sets {', '.join(_SLURM)}; to start ranks without either, set "
        'placement.launcher = "local" and placement.num_trainers'
    )


def check_started_once(environ: Mapping[str, str]) -> None:
    """Raise ConfigError if torchrun started several copies of a command that starts its ranks itself."""
    num = environ.get("WORLD_SIZE", "1")
    if "RANK" in environ and num != "1":
        raise ConfigError(
            f'torchrun has started this command {num} times, but placement.launcher = "local" starts its trainers '
            "itself: add placement.launcher=external to the command, or leave torchrun out and set "
            f"placement.num_trainers={num}"
        )


def check_external(config: RunConfig, num_ranks: int) -> None:
    """Raise ConfigError for a placement that ranks started by others cannot have."""
    placement = config.placement
    if placement.target == "servers":
        raise ConfigError(
            'placement.target = "servers" with placement.launcher = "external": nobody would start the servers once; '
            'start them with `paceline serve`, and set placement.target = "urls" and placement.urls'
        )
    if placement.num_trainers not in (1, num_ranks):
        raise ConfigError(
            f"placement.num_trainers = {placement.num_trainers}, but the launcher has started {num_ranks} ranks: leave "
            "placement.num_trainers out, the launcher's number counts"
        )


def external_device(config: RunConfig, external: External, num_gpus: int) -> str:
    """The device of this rank: as it is set, else the GPU of its local rank, else the CPU.

    Args:
        num_gpus: that this process sees.

    Raises:
        ConfigError: this host has fewer GPUs than ranks.
    """
    placement, wanted, local_rank = config.placement, config.training.device, external.local_rank
    if placement.trainer_devices and len(placement.trainer_devices) == external.rendezvous.num_ranks:
        return placement.trainer_devices[external.rendezvous.rank]
    if wanted not in ("auto", "cuda"):
        return wanted
    if num_gpus == 0 and wanted == "auto":
        return "cpu"
    if external.launcher == "Slurm" and num_gpus == 1:
        return "cuda:0"  # --gpus-per-task=1: each task sees one GPU, its own
    if local_rank >= num_gpus:
        raise ConfigError(
            f"local rank {local_rank} needs GPU {local_rank}, this process sees {num_gpus}: start fewer ranks on each "
            "host, or set training.device = cpu"
        )
    return f"cuda:{local_rank}"


def train_external(
    config: RunConfig, signals: StopSignals, console: Console, external: External, num_gpus: int
) -> TrainingResult:
    """Train as one rank; rank 0 holds the run directory for all.

    Raises:
        PacelineError: anything that keeps the run from going on; see `errors`.
    """
    from paceline.launch.train import train

    check_external(config, external.rendezvous.num_ranks)
    own = config_on(config, external_device(config, external, num_gpus))
    return train(own, signals, console, external.rendezvous)


def _from_torchrun(environ: Mapping[str, str]) -> External:
    numbers = _numbers("torchrun", environ, _TORCHRUN, names=("MASTER_ADDR",))
    address = f"tcp://{_bracketed(environ['MASTER_ADDR'])}:{numbers['MASTER_PORT']}"
    # torchrun's agent listens at that port already, unless it says otherwise, and goes on when it starts ranks anew.
    hosted = environ.get("TORCHELASTIC_USE_AGENT_STORE", "False") != "True"
    if not hosted:
        address += f"/attempt-{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    rendezvous = Rendezvous(numbers["RANK"], numbers["WORLD_SIZE"], address, hosted)
    return External(_checked("torchrun", rendezvous), numbers["LOCAL_RANK"], "torchrun")


def _from_slurm(environ: Mapping[str, str]) -> External:
    extra = tuple(name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "MASTER_PORT") if name in environ)
    numbers = _numbers("Slurm", environ, (*_SLURM, *extra))
    # srun may start fewer tasks than the job has room for
    num_ranks = numbers.get("SLURM_STEP_NUM_TASKS", numbers["SLURM_NTASKS"])
    drawn = _FIRST_PORT + (numbers["SLURM_JOB_ID"] * 7 + numbers.get("SLURM_STEP_ID", 0)) % _NUM_PORTS
    address = f"tcp://{_bracketed(_slurm_host(environ))}:{numbers.get('MASTER_PORT', drawn)}"
    rendezvous = Rendezvous(numbers["SLURM_PROCID"], num_ranks, address)
    return External(_checked("Slurm", rendezvous), numbers["SLURM_LOCALID"], "Slurm")


def _slurm_host(environ: Mapping[str, str]) -> str:
    """Where rank 0 runs: the first node of the step."""
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"]
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if nodes:
        return first_node(nodes)
    if "SLURM_LAUNCH_NODE_IPADDR" in environ:
        return environ["SLURM_LAUNCH_NODE_IPADDR"]
    raise ConfigError(
        "Slurm has set none of SLURM_STEP_NODELIST, SLURM_JOB_NODELIST and SLURM_LAUNCH_NODE_IPADDR: export "
        "MASTER_ADDR with the name of the host of rank 0"
    )


def first_node(nodes: str) -> str:
    """The first name of a Slurm list of nodes: "gpu[007-010,12],cpu3" -> "gpu007"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert first is not None, "an empty list names no node"
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _numbers(
    launcher: str, environ: Mapping[str, str], variables: tuple[str, ...], names: tuple[str, ...] = ()
) -> dict[str, int]:
    """The values of `variables`, of which `names` are no numbers."""
    missing = [name for name in variables if not environ.get(name)]
    if missing:
        raise ConfigError(
            f"{launcher} sets {', '.join(variables)}, but {', '.join(missing)} is missing: start every rank with "
            f"{'torchrun' if launcher == 'torchrun' else 'srun'}"
        )
    try:
        return {name: int(environ[name]) for name in variables if name not in names}
    except ValueError as error:
        raise ConfigError(f"a variable of {launcher} is no number: {error}") from error


def _checked(launcher: str, rendezvous: Rendezvous) -> Rendezvous:
    if not 0 <= rendezvous.rank < rendezvous.num_ranks:
        raise ConfigError(f"{launcher} says that this is rank {rendezvous.rank} of {rendezvous.num_ranks}")
    return rendezvous


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
