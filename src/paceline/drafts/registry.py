"""Algorithms by name: ours, and those of other packages (entry points `paceline.algorithms`)."""

from importlib import import_module
from importlib.metadata import entry_points

from paceline.drafts.interface import DraftAlgorithm
from paceline.errors import ConfigError

_OURS = {"eagle3": "paceline.drafts.eagle3.algorithm:Eagle3", "dflash": "paceline.drafts.dflash.algorithm:DFlash"}


def load_algorithm(name: str) -> type[DraftAlgorithm]:
    """The class registered for `algorithm = name`.

    Raises:
        ConfigError: no installed package registers it; names those that are there.
    """
    others = {entry.name: entry.value for entry in entry_points(group="paceline.algorithms")}
    found = others | _OURS
    if name not in found:
        raise ConfigError(f"algorithm {name!r} is not installed; known: {', '.join(sorted(found))}")
    module, _, attribute = found[name].partition(":")
    algorithm: type[DraftAlgorithm] = getattr(import_module(module), attribute)
    return algorithm
