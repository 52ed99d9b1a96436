"""Which decoder layers of the target a draft reads: an algorithm's default, its fallback, and the checks."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.errors import ConfigError
from paceline.schema.target_info import TargetInfo


def even_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """At most `count` layers spread evenly over 0..N-2, both ends included, no repeats; one is the middle.

    The last layer is left out because SGLang cannot capture it; a target with fewer eligible layers than `count`
    gives them all.

    Args:
        num_layers: N, decoder layers of the target.

    Raises:
        ConfigError: the target has a single layer, so none is eligible.
    """
    eligible = num_layers - 1
    if eligible < 1:
        raise ConfigError(
            f"the target has {num_layers} decoder layer(s), a draft reads layers before the last: take a deeper target"
        )
    count = min(count, eligible)
    if count == 1:
        return (round((eligible - 1) / 2),)
    # The step is at least 1, so rounding (half to even) never gives a layer twice.
    return tuple(round(i * (eligible - 1) / (count - 1)) for i in range(count))


def choose_layers(
    configured: Sequence[int] | None, default: Sequence[int], info: TargetInfo, at_least: int = 1
) -> tuple[int, ...]:
    """The configured layers, else the algorithm's default, else (a default that repeats a layer, is out of order
    or out of range: every tiny target) as many evenly spaced ones.

    Raises:
        ConfigError: as `check_layers`.
    """
    if configured is not None:
        layers = tuple(configured)
    elif _fits(default, info.num_layers):
        layers = tuple(default)
    else:
        layers = even_layers(info.num_layers, len(default))
    check_layers(layers, info, at_least)
    return layers


def check_layers(layers: Sequence[int], info: TargetInfo, at_least: int = 1) -> None:
    """Raise ConfigError unless `layers` are strictly ascending, in 0..N-2, and at least `at_least` of them."""
    listed, largest = list(layers), info.num_layers - 2
    if len(listed) < at_least:
        raise ConfigError(
            f"target_layers = {listed} names {len(listed)} layer(s), the draft needs at least {at_least}: add some "
            f"of 0..{largest}"
        )
    if listed != sorted(set(listed)):
        raise ConfigError(f"target_layers = {listed} are not strictly ascending: sort them and drop repeats")
    if info.num_layers - 1 in listed:
        raise ConfigError(
            f"target_layers = {listed} holds {info.num_layers - 1}, the last of the target's {info.num_layers} layers, "
            f"which SGLang cannot capture: choose from 0..{largest}"
        )
    if listed and (listed[0] < 0 or listed[-1] > largest):
        raise ConfigError(
            f"target_layers = {listed} are out of range: the target has {info.num_layers} layers, "
            f"choose from 0..{largest}"
        )


def _fits(layers: Sequence[int], num_layers: int) -> bool:
    ascending = list(layers) == sorted(set(layers))
    return ascending and all(0 <= layer <= num_layers - 2 for layer in layers)
