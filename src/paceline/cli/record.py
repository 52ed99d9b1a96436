"""`paceline record`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.launch.signals import StopSignals

if TYPE_CHECKING:
    from paceline.config.run import RunConfig

Output = Annotated[
    Path | None, typer.Option("--output", help="Directory to write; recording.output, or recording/ in the run's.")
]
Check = Annotated[bool, typer.Option("--check", help="Read every shard first; damaged ones are recorded again.")]


def record(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="TOML configuration.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="section.field=value", help="Settings to change.")
    ] = None,
    output: Output = None,
    check: Check = False,
) -> None:
    """Write the features of every row to disk once, to train on them many times; run again, it goes on."""
    from rich.console import Console

    from paceline.config.loading import load_config
    from paceline.launch.record import RecordOptions, check_recordable
    from paceline.launch.record import record as run_recording

    resolved, console, signals = (
        check_recordable(load_config(config, overrides or ())),
        Console(markup=False),
        _signals(context),
    )
    words = ["recorder", *(["--output", str(output)] if output else []), *(["--check"] if check else [])]
    if resolved.placement.launcher == "ray":
        from paceline.launch.ray.driver import run_on_ray

        raise typer.Exit(run_on_ray(_with_one_recorder(resolved, "ray"), signals, console, words))
    if resolved.placement.target == "servers":
        from paceline.launch.local import run_supervised

        raise typer.Exit(run_supervised(_with_one_recorder(resolved, "local"), signals, console, words))
    result = run_recording(resolved, RecordOptions(output, check), signals, console)
    console.print(result.text(), highlight=False)


def _with_one_recorder(config: RunConfig, launcher: str) -> RunConfig:
    """One recorder, whatever trains later; beside servers it computes nothing: every GPU may be one of theirs."""
    placement = config.placement.model_copy(update={"launcher": launcher, "num_trainers": 1, "trainer_devices": ()})
    alone = {"placement": placement, "training": config.training.model_copy(update={"device": "cpu"})}
    return config.model_copy(update=alone)


def recorder(
    context: typer.Context,
    config: Path,
    parent_pipe: Annotated[int, typer.Option()],
    token_file: Annotated[Path | None, typer.Option()] = None,
    output: Output = None,
    check: Check = False,
) -> None:
    """The recorder of a run whose directory the parent process holds, and whose servers it has started."""
    from rich.console import Console

    from paceline.config.loading import load_config
    from paceline.launch.children import end_with_parent
    from paceline.launch.record import RecordOptions, record_as_child

    end_with_parent(parent_pipe)
    console = Console(markup=False)
    options = RecordOptions(output, check, token_file)
    result = record_as_child(load_config(config), options, _signals(context), console)
    console.print(result.text(), highlight=False)


def _signals(context: typer.Context) -> StopSignals:
    signals = context.find_object(StopSignals)
    assert signals is not None, "main() passes them"
    return signals
