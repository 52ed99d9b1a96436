"""Algorithms by name: ours, and those of other packages (entry points `paceline.algorithms`)."""

from importlib import import_module
from importlib.metadata import entry_points

from paceline.config.drafts import AnyDraftConfig
from paceline.drafts.interface import DraftAlgorithm, DraftContext
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


def build_algorithm(config: AnyDraftConfig, context: DraftContext) -> DraftAlgorithm:
    """The draft that `config` describes, initialised.

    Raises:
        ConfigError: as its constructor does; or it cannot share rows with other ranks, and is to.
    """
    algorithm = load_algorithm(config.algorithm)
    if context.sequence is not None and not algorithm.shares_rows:
        raise ConfigError(
            f"algorithm {config.algorithm!r} trains whole rows only, training.sequence_parallel = "
            f"{context.sequence.size}: set it to 1, or train this draft in a run of its own"
        )
    return algorithm(config, context)
