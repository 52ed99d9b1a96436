"""Tensor parallelism: what rank 0, which serves, and ranks 1..N-1, its followers, agree on.

The model's own collectives are the only ones. Rows reach the followers through pipes, one each, so that no rank ever
waits inside a collective for work to come: an idle server would run into the collective's time-out. Each process
computes rows in the order they were handed out, on one thread.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from paceline.config.target import TargetConfig
from paceline.errors import ConfigError
from paceline.target.hf.loading import ModelParts, load_config

_DIVIDED = ("num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size", "moe_intermediate_size")
"""What the plans cut into equal shares, by transformers' names."""
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Ranks reach the first collective when each has read its share of the checkpoint; later ones are far shorter."""
_JOIN_TIMEOUT = timedelta(minutes=5)


def check_parallel(config: TargetConfig, checkpoint: Path, device: torch.device) -> None:
    """Raise unless `target.tensor_parallel` processes can compute this target together.

    Raises:
        ConfigError: no plan for this architecture, sizes that cannot be divided, too few GPUs, or a process that
            belongs to a process group already.
    """
    size = config.tensor_parallel
    if dist.is_initialized():
        raise ConfigError(
            f"target.tensor_parallel = {size} in a process that is rank {dist.get_rank()} of another group of "
            f"{dist.get_world_size()}: a parallel target needs a process of its own, one target in each"
        )
    if device.type == "cuda":
        index, count = device.index or 0, torch.cuda.device_count()
        if index + size > count:
            raise ConfigError(
                f"target.tensor_parallel = {size} takes cuda:{index} to cuda:{index + size - 1}, this machine has "
                f"{count} CUDA devices: lower target.tensor_parallel, or correct target.device"
            )
    elif torch.accelerator.is_available():
        # transformers places the shares on whatever accelerator it finds, with no way to ask for the CPU
        raise ConfigError(
            f'target.tensor_parallel = {size} with target.device = "{device}" on a machine with GPUs: use '
            'target.device = "cuda", or hide them (CUDA_VISIBLE_DEVICES="")'
        )
    text = load_config(checkpoint, config.trust_remote_code).get_text_config(decoder=True)
    if not getattr(text, "base_model_tp_plan", None):
        raise ConfigError(
            f"target.tensor_parallel = {size}, but transformers has no tensor-parallel plan for {text.model_type}: "
            "use target.tensor_parallel = 1 (target.device_map spreads a model that is too large for one device)"
        )
    for name in _DIVIDED:
        number = getattr(text, name, None)
        if isinstance(number, int) and number % size:
            raise ConfigError(
                f"target.tensor_parallel = {size} does not divide the {number} {name} of {config.model}: "
                "choose a divisor of both heads, such as 2"
            )


def device_of(device: torch.device, rank: int) -> torch.device:
    """Where a rank computes: one GPU after the other, or all of them on the CPU."""
    return torch.device("cuda", (device.index or 0) + rank) if device.type == "cuda" else device


@contextlib.contextmanager
def rank_environment(device: torch.device) -> Iterator[None]:
    """A block in which the group is joined and the model loaded: what libraries read from the environment is set.

    transformers has no other way to be told which GPU is its own, nor gloo to listen on the loopback interface alone.
    """
    wanted = {"LOCAL_RANK": str(device.index)} if device.type == "cuda" else {}
    if device.type == "cpu" and Path("/sys/class/net/lo").exists():
        wanted["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def join_group(rank: int, size: int, directory: Path, device: torch.device) -> None:
    """Make this process a rank of the group, once all are there. Meets through a file: nothing listens for it.

    Args:
        directory: private to the user, the same for all ranks, empty at first.
    """
    store = dist.FileStore(str(directory / "store"), size)  # type: ignore[attr-defined]
    store.set_timeout(_JOIN_TIMEOUT)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=_COLLECTIVE_TIMEOUT,
        device_id=device if cuda else None,
    )


def leave_group(parts: ModelParts | None) -> None:
    """Forget the group, and those of `parts`, without a word to the other ranks; harmless where there is none."""
    if not dist.is_initialized():
        return
    if dist.get_backend() == "nccl":
        abort_group(parts)  # an orderly end of NCCL would wait for ranks that may be gone
    with contextlib.suppress(RuntimeError):  # aborted from another thread
        dist.destroy_process_group()


def abort_group(parts: ModelParts | None) -> None:
    """Free whoever is inside a collective of the group, as far as the backend can; may itself take long."""
    if not dist.is_initialized():
        return
    groups = [dist.group.WORLD]
    if parts is not None:
        shares = [p for p in parts.model.parameters() if isinstance(p, DTensor)]
        groups += [shares[0].device_mesh.get_group()] if shares and shares[0].device_mesh.ndim == 1 else []
    for group in groups:
        if group is not None:
            with contextlib.suppress(RuntimeError):  # gloo cannot, and needs not: a peer's end is an error there
                group.abort()
