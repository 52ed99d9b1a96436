"""`paceline doctor`: the machine, or with a MODEL whether an engine computes it rightly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli.serve import CaptureLayers, Engine, EngineUrl, build_target_config, split_engine_flags
from paceline.errors import ConfigError
from paceline.launch.signals import StopSignals

if TYPE_CHECKING:
    from paceline.config.target import TargetConfig

Model = Annotated[str | None, typer.Argument(help="Path or hub id of a target whose engine is to be tested.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="target.field=value", help="Other settings of the target.")
]
ShowCommand = Annotated[bool, typer.Option(help="Print how to start the engine for --engine-url, and end.")]
SaveReference = Annotated[
    Path | None,
    typer.Option(help="Write what transformers computes, for target.selftest_reference elsewhere, and end."),
]


def doctor(
    context: typer.Context,
    model: Model = None,
    overrides: Overrides = None,
    engine: Engine = None,
    engine_url: EngineUrl = None,
    capture_layers: CaptureLayers = None,
    save_reference: SaveReference = None,
    show_command: ShowCommand = False,
) -> None:
    """What this machine can run, and why not. With a MODEL: compare an engine with transformers.

    Options of an engine's own go after --, as in: paceline doctor MODEL --engine vllm -- --max-model-len 32768
    """
    signals = context.find_object(StopSignals)
    assert signals is not None, "main() passes them"
    signals.grace_s = 1.0
    if model is None:
        if engine or engine_url or save_reference or show_command:
            raise ConfigError("which target? paceline doctor MODEL --engine ...")
        _examine_machine()
        return
    words, flags = split_engine_flags(overrides or [])
    options = {"model": model, "engine": engine, "engine_url": engine_url, "capture_layers": capture_layers}
    config = build_target_config(None, options, words, flags)
    if show_command:
        from paceline.launch.engines import engine_command

        typer.echo(engine_command(config))
    else:
        _test_engine(config, signals, save_reference)


def _examine_machine() -> None:
    from rich.console import Console

    from paceline.cli.show import doctor_table
    from paceline.launch.doctor import examine

    Console(markup=False).print(doctor_table(examine()))


def _test_engine(config: TargetConfig, signals: StopSignals, save_reference: Path | None) -> None:
    """The engine started as `paceline serve` would, held against transformers; or only what transformers says."""
    import logging

    from rich.console import Console

    from paceline.cli.show import selftest_table
    from paceline.launch.selftest import compare, engine_name, prepare_selftest
    from paceline.launch.serve import with_capture_layers
    from paceline.target.opening import check_engine, open_engine

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config = with_capture_layers(config)
    if save_reference is None:
        check_engine(config)
    test = prepare_selftest(config, signals.stop, anew=save_reference is not None)
    if save_reference is not None:
        test.reference.save(save_reference)
        rounded = "" if test.reference.dtype == "float32" else ", for want of room: float32 would be exact"
        typer.echo(f"{save_reference}: what transformers says, in {test.reference.dtype}{rounded}")
        return
    with open_engine(config, signals.stop) as engine:
        result = compare(config, engine, test, signals.stop)
    Console(markup=False).print(selftest_table(result))
    result.check(engine_name(config))
    typer.echo(f"{engine_name(config)} computes {config.model} as transformers does")
