"""What is known of devices before anything runs on them."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of GPU, as its vendor describes it."""

    name: str
    bf16_tflops: float
    """Dense matrix products in bf16, peak."""
    memory_gib: float
    memory_tb_per_s: float
    measured: bool
    """Whether this project has measured what share of the peak its work reaches there."""


DEVICES = (
    Device("H100", 989, 80, 3.35, True),
    Device("H200", 989, 141, 4.8, True),
    Device("H20", 148, 96, 4.0, False),
    Device("B200", 2250, 180, 8.0, False),
    Device("A100", 312, 80, 2.0, False),
    Device("L40S", 362, 48, 0.86, False),
    Device("L4", 121, 24, 0.3, False),
    Device("A10", 125, 24, 0.6, False),
    Device("RTX 4090", 165, 24, 1.0, False),
)


def find_device(name: str) -> Device | None:
    """The entry of a device whose driver calls it `name`, e.g. "NVIDIA H100 80GB HBM3"; None for an unknown one."""
    words = name.upper().replace("-", " ").split()
    for device in DEVICES:
        wanted = device.name.split()
        if any(words[start : start + len(wanted)] == wanted for start in range(len(words))):
            return device
    return None


def named_device(name: str) -> Device:
    """The entry that a user asked for.

    Raises:
        ConfigError: there is none; names those there are.
    """
    device = find_device(name)
    if device is None:
        raise ConfigError(f"device {name!r} is not in the table: choose from {', '.join(one.name for one in DEVICES)}")
    return device
