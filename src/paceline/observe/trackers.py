"""Views of metrics in other tools, by name (entry points `paceline.trackers`); none is imported unless asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any

import xxhash

from paceline.config.run_dir import RunDir
from paceline.config.training import TrackingConfig
from paceline.errors import ConfigError
from paceline.observe.metrics import Line, View

TrackerFactory = Callable[[TrackingConfig, RunDir], View]


def build_trackers(config: TrackingConfig, run: RunDir) -> list[View]:
    """The views that `[tracking]` asks for.

    Raises:
        ConfigError: one is asked for whose package is not installed; says how to install it.
    """
    factories: dict[str, TrackerFactory] = {}
    if config.tensorboard:
        factories["tensorboard"] = TensorBoardTracker
    if config.wandb:
        factories["wandb"] = WandbTracker
    found = {entry.name: entry for entry in entry_points(group="paceline.trackers")}
    for name in config.trackers:
        if name not in found:
            known = ", ".join(sorted(found)) or "none"
            raise ConfigError(f"tracking.trackers: {name!r} is not installed (entry points paceline.trackers: {known})")
        factories[name] = found[name].load()
    return [build(config, run) for build in factories.values()]


class TensorBoardTracker:
    """Event files under `tensorboard/` of the run directory; written without TensorFlow or torch."""

    def __init__(self, config: TrackingConfig, run: RunDir) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ConfigError(_not_installed("tensorboard", error)) from error
        self._event_type = event_pb2.Event
        self._summary_type = summary_pb2.Summary
        self._writer = EventFileWriter(str(run.tensorboard))

    def write(self, line: Line) -> None:
        values = [self._summary_type.Value(tag=tag, simple_value=number) for tag, number in scalars(line)]
        event = self._event_type(wall_time=line["time"], step=line["step"], summary=self._summary_type(value=values))
        self._writer.add_event(event)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run named after the run directory; "offline" writes into the run directory only."""

    def __init__(self, config: TrackingConfig, run: RunDir) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(_not_installed("wandb", error)) from error
        root = run.root.resolve()
        self._run: Any = wandb.init(
            project=config.wandb_project,
            name=root.name,
            id=xxhash.xxh3_64_hexdigest(str(root).encode()),
            resume="allow",
            dir=str(root),
            mode=config.wandb_mode,
            settings=wandb.Settings(silent=True),
        )
        # wandb's own step may only grow; ours goes back when a run resumes.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, line: Line) -> None:
        self._run.log({"step": line["step"], **dict(scalars(line))})

    def flush(self) -> None:
        """Nothing to do: wandb sends on a thread of its own."""

    def close(self) -> None:
        self._run.finish()


def scalars(line: Line) -> Iterator[tuple[str, float]]:
    """Every number of a line with its path, such as ("train/drafts/eagle/per_position/accuracy/0", 0.5)."""
    for key, value in line.items():
        if key not in ("kind", "step", "time"):
            yield from _scalars(f"{line['kind']}/{key}", value)


def _scalars(path: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _scalars(f"{path}/{key}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _scalars(f"{path}/{index}", inner)
    elif isinstance(value, int | float):
        yield path, float(value)


def _not_installed(name: str, error: ImportError) -> str:
    return f'tracking.{name} is on, but it cannot be imported ({error}): pip install "paceline[{name}]"'
