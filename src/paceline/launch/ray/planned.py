"""`paceline plan` of a run on Ray: bundles instead of devices, since Ray chooses these."""

from __future__ import annotations

from paceline.config.run import RunConfig
from paceline.launch.plan import PlannedProcess, server_work, servers_elsewhere, trainer_work
from paceline.launch.ray.bundles import describe, plan_bundles


def plan_on_ray(config: RunConfig, num_gpus: int) -> list[PlannedProcess]:
    """The processes of a run on a Ray cluster, servers first; connects to none.

    Args:
        num_gpus: of this host: what "auto" means in a cluster that the run starts here. In a cluster elsewhere it means
            a GPU, as it does where there is one.

    Raises:
        ConfigError: devices are named, which Ray chooses.
    """
    settings = config.placement.ray
    elsewhere = settings.address is not None
    here = num_gpus if settings.num_gpus is None else settings.num_gpus
    planned = servers_elsewhere(config)
    for index, bundle in enumerate(plan_bundles(config, has_gpus=elsewhere or here > 0)):
        of_server = bundle.role == "server"
        address = f"http://{'its node' if elsewhere else '127.0.0.1'}, a port the system chooses"
        planned.append(
            PlannedProcess(
                bundle.role,
                bundle.rank,
                (f"bundle {index}: {describe(bundle.resources)}",),
                address if of_server else "nothing",
                f"Ray ({settings.address or 'a cluster of its own'})",
                server_work(config) if of_server else trainer_work(config),
            )
        )
    return planned
