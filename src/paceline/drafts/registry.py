"""Algorithms by name: ours and those of other packages (entry points `paceline.algorithms`)."""

from importlib.metadata import entry_points

from paceline.drafts.interface import DraftAlgorithm
from paceline.errors import ConfigError


def load_algorithm(name: str) -> type[DraftAlgorithm]:
    """The class registered for `algorithm = name`.

    Raises:
        ConfigError: no installed package registers it; names those that are there.
    """
    found = {entry.name: entry for entry in entry_points(group="paceline.algorithms")}
    if name not in found:
        raise ConfigError(f"algorithm {name!r} is not installed; known: {', '.join(sorted(found))}")
    algorithm: type[DraftAlgorithm] = found[name].load()
    return algorithm
