"""What a run asks of a Ray cluster: a bundle of CPUs and GPUs for each of its processes; starts nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paceline.config.run import RunConfig
from paceline.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Bundle:
    """One process of a run and what it needs; always on one node."""

    role: str
    """"server" or "trainer"."""
    rank: int
    num_cpus: int
    num_gpus: int

    @property
    def name(self) -> str:
        return f"{self.role}-{self.rank}"

    @property
    def device(self) -> str:
        """The first device as the process sees it: Ray shows it the GPUs of its bundle alone."""
        return "cuda:0" if self.num_gpus else "cpu"

    @property
    def resources(self) -> dict[str, float]:
        """As Ray calls them."""
        return {"CPU": float(self.num_cpus)} | ({"GPU": float(self.num_gpus)} if self.num_gpus else {})

    def __str__(self) -> str:
        return f"{self.name} ({describe(self.resources)})"


def plan_bundles(config: RunConfig, has_gpus: bool) -> list[Bundle]:
    """A bundle for each server and each trainer rank, servers first.

    Args:
        has_gpus: whether "auto" means a GPU, as it does where the cluster has any.

    Raises:
        ConfigError: devices are named, which Ray chooses.
    """
    placement, degree = config.placement, config.target.tensor_parallel
    for setting in ("server_devices", "trainer_devices"):
        if getattr(placement, setting):
            raise ConfigError(
                f'placement.{setting} = {list(getattr(placement, setting))} with placement.launcher = "ray": Ray '
                "chooses the devices, leave it out"
            )
    server_gpu = _wants_gpu("target.device", config.target.device, has_gpus)
    trainer_gpu = _wants_gpu("training.device", config.training.device, has_gpus)
    bundles = []
    if placement.target == "servers":
        bundles = [_bundle("server", rank, degree, server_gpu) for rank in range(placement.num_servers)]
    size = degree if placement.target == "inline" else 1
    on_gpu = trainer_gpu or (placement.target == "inline" and server_gpu)
    return bundles + [_bundle("trainer", rank, size, on_gpu) for rank in range(placement.num_trainers)]


def _wants_gpu(setting: str, device: str, has_gpus: bool) -> bool:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f'{setting} = {device!r} with placement.launcher = "ray": Ray chooses among GPUs, write "cuda", "cpu" or '
            '"auto"'
        )
    return has_gpus if device == "auto" else device == "cuda"


def _bundle(role: str, rank: int, num_processes: int, on_gpu: bool) -> Bundle:
    return Bundle(role, rank, num_processes, num_processes if on_gpu else 0)


def total(bundles: Sequence[Bundle]) -> dict[str, float]:
    """All that is asked for, by resource."""
    return {
        name: float(sum(bundle.resources.get(name, 0.0) for bundle in bundles))
        for name in ("CPU", "GPU")
        if any(name in bundle.resources for bundle in bundles)
    }


def describe(resources: Mapping[str, float]) -> str:
    """E.g. "2 CPU, 1 GPU"."""
    return ", ".join(f"{number:g} {name}" for name, number in resources.items())


@dataclass(frozen=True, slots=True)
class ClusterResources:
    """What a cluster has at one moment."""

    free: Mapping[str, float]
    nodes: Sequence[Mapping[str, float]]
    """Of each node that lives, everything it has."""

    @property
    def total(self) -> dict[str, float]:
        return {name: sum(node.get(name, 0.0) for node in self.nodes) for name in ("CPU", "GPU")}

    def missing(self, bundles: Sequence[Bundle]) -> str:
        """What is asked for, free and there in all, by resource; and bundles for which no node is large enough."""
        everything = self.total
        parts = [
            f"{name}: {asked:g} asked for, {self.free.get(name, 0.0):g} free of {everything[name]:g}"
            for name, asked in total(bundles).items()
        ]
        parts += [f"no node is large enough for {bundle}" for bundle in self._too_large(bundles)]
        return "; ".join(parts)

    def can_never_hold(self, bundles: Sequence[Bundle]) -> bool:
        """Whether the bundles would not fit even if nothing else ran, as far as totals and sizes of nodes say."""
        everything = self.total
        lacks = any(asked > everything[name] for name, asked in total(bundles).items())
        return lacks or bool(self._too_large(bundles))

    def _too_large(self, bundles: Sequence[Bundle]) -> list[Bundle]:
        return [
            bundle
            for bundle in bundles
            if not any(
                all(node.get(name, 0.0) >= number for name, number in bundle.resources.items()) for node in self.nodes
            )
        ]
