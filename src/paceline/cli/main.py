"""The `paceline` command. Heavy imports stay inside the verbs, so that --help answers at once."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli.doctor import doctor
from paceline.cli.record import record, recorder
from paceline.cli.serve import serve
from paceline.errors import PacelineError, StoppedError, print_error
from paceline.launch.signals import StopSignals, catch_stop_signals
from paceline.version import VERSION

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.config.run import RunConfig
    from paceline.training.trainer import TrainingResult

app = typer.Typer(
    name="paceline",
    help="Train draft models for speculative decoding against a frozen target that runs anywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Show or check a configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config")

ConfigFile = Annotated[Path, typer.Argument(help="TOML configuration.")]
RunDirectory = Annotated[Path, typer.Argument(help="Run directory.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="section.field=value", help="Settings to change.")]
Drafts = Annotated[list[str] | None, typer.Option("--draft", help="Names of drafts; all by default.")]
Checkpoint = Annotated[str, typer.Option(help="best (by acceptance length) or latest.")]


def main() -> None:
    """Run a verb; errors meant for the user are one message and exit code 1, others keep their traceback.

    Notes on an error (which row, which server, where in the target's code) come before its message.
    """
    signals = catch_stop_signals()
    _prepare_libraries()
    try:
        app(obj=signals)
    except PacelineError as error:
        print_error(error)
        if isinstance(error, StoppedError) and signals.signum is not None:
            _flush_outputs()
            os._exit(signals.exit_code)
        sys.exit(1)
    except SystemExit as done:
        if signals.signum is None:
            raise
        # A verb that was interrupted and ended in order still says so. The interpreter's own end is skipped: a thread
        # or destructor of a library can block it, and by then the thread that keeps the deadline no longer runs.
        _flush_outputs()
        os._exit(int(done.code or signals.exit_code))


def _flush_outputs() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a closed pipe
            stream.flush()


def _prepare_libraries() -> None:
    """What libraries read from the environment when they are first imported; whatever the user has set stays."""
    # OpenMP's threads spin while they wait. The target's and the trainer's then take the cores from each other, and
    # from other programs (measured by benchmarks/openmp_waiting.py; alone on the machine spinning is faster).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        for library in ("HF_HUB", "HF_DATASETS"):  # their bars fill a log file line by line
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(VERSION)
        raise typer.Exit


@app.command()
def quickstart(
    context: typer.Context,
    directory: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs/quickstart"),
    short: Annotated[bool, typer.Option("--short", help="A shortened run, for tests of the pipeline.")] = False,
) -> None:
    """A few minutes on a laptop CPU: a real tiny target, two drafts, a report."""
    from paceline.launch.quickstart import run_quickstart

    run_quickstart(directory, _signals(context), _console(), short=short)


@app.command()
def regenerate(context: typer.Context, config: ConfigFile, overrides: Overrides = None) -> None:
    """Rewrite the answers of data.train with the target; run again, it goes on."""
    from paceline.cli.show import RegenerationProgress, regeneration_table
    from paceline.config.loading import load_config
    from paceline.launch.regenerate import regenerate_data

    console = _console()
    with RegenerationProgress(console) as progress:
        summary = regenerate_data(load_config(config, overrides or ()), _signals(context).stop, progress.show)
    console.print(regeneration_table(summary))


@app.command()
def prepare(context: typer.Context, config: ConfigFile, overrides: Overrides = None) -> None:
    """Tokenize data, make loss masks and packed rows (no GPU); prints what was found."""
    from paceline.cli.show import prepare_table
    from paceline.config.loading import load_config
    from paceline.launch.prepare import prepare_data
    from paceline.launch.run import open_run
    from paceline.launch.targets import open_access, target_facts

    _signals(context).grace_s = 1.0
    resolved = load_config(config, overrides or ())
    run = open_run(resolved)
    access = open_access(resolved, _signals(context).stop) if resolved.placement.target == "urls" else None
    facts = target_facts(resolved, access)
    prepared = prepare_data(resolved, run.paths, facts)
    console = _console()
    for table in prepare_table(prepared, resolved, facts.vocab_size):
        console.print(table)


@app.command()
def train(
    context: typer.Context,
    config: ConfigFile,
    overrides: Overrides = None,
    plan_only: Annotated[bool, typer.Option("--plan", help="Print the processes of the run and start none.")] = False,
) -> None:
    """Train the drafts of a configuration; run again, it goes on from the newest checkpoint."""
    from paceline.config.loading import load_config

    resolved = load_config(config, overrides or ())
    if plan_only:
        _print_plan(resolved)
        return
    if resolved.placement.launcher == "external":
        _train_external(resolved, _signals(context))
        return
    from paceline.launch.external import check_started_once
    from paceline.launch.local import config_of_only_trainer, needs_supervisor, train_supervised

    check_started_once(os.environ)
    console, signals = _console(), _signals(context)
    if resolved.placement.launcher == "ray":
        from paceline.launch.ray.driver import run_on_ray

        raise typer.Exit(run_on_ray(resolved, signals, console, ["trainer"]))
    if needs_supervisor(resolved):
        raise typer.Exit(train_supervised(resolved, signals, console))
    from paceline.launch.train import train as run_training

    _print_result(run_training(config_of_only_trainer(resolved), signals, console), console)


def _train_external(config: RunConfig, signals: StopSignals) -> None:
    """As one rank of those that torchrun or Slurm has started."""
    from paceline.launch.external import detect_external, train_external
    from paceline.launch.failures import failures_reported
    from paceline.launch.plan import count_gpus

    with failures_reported(None):
        external, console = detect_external(os.environ), _console()
        result = train_external(config, signals, console, external, count_gpus())
        if external.rendezvous.rank == 0:
            _print_result(result, console)


@app.command(hidden=True)
def trainer(
    context: typer.Context,
    config: ConfigFile,
    parent_pipe: Annotated[int, typer.Option()],
    token_file: Annotated[Path | None, typer.Option()] = None,
    failure_file: Annotated[Path | None, typer.Option()] = None,
    rank: Annotated[int, typer.Option()] = 0,
    num_ranks: Annotated[int, typer.Option()] = 1,
    rendezvous: Annotated[str | None, typer.Option()] = None,
) -> None:
    """A trainer rank of a run whose directory the parent process holds, and whose servers it has started."""
    from paceline.config.loading import load_config
    from paceline.launch.children import end_with_parent
    from paceline.launch.failures import failures_reported
    from paceline.launch.rendezvous import ALONE, Rendezvous

    end_with_parent(parent_pipe)
    with failures_reported(failure_file):
        from paceline.launch.train import train_as_child

        console = _console()
        place = Rendezvous(rank, num_ranks, rendezvous) if rendezvous else ALONE
        _print_result(train_as_child(load_config(config), _signals(context), console, token_file, place), console)


@app.command()
def plan(
    context: typer.Context,
    config: ConfigFile,
    overrides: Overrides = None,
    device: Annotated[
        str | None, typer.Option(help="Predict for this GPU, e.g. H200; by default, the one here.")
    ] = None,
) -> None:
    """Print a run's processes, what travels, and how fast it will be and why; starts nothing."""
    from paceline.config.loading import load_config

    _signals(context).grace_s = 1.0
    _print_plan(load_config(config, overrides or ()), device)


app.command()(serve)
app.command()(doctor)
app.command()(record)
app.command(hidden=True)(recorder)


@app.command()
def evaluate(
    context: typer.Context,
    run: RunDirectory,
    overrides: Overrides = None,
    draft: Drafts = None,
    checkpoint: Checkpoint = "best",
    baselines: Annotated[bool, typer.Option(help="Also the untrained draft and prompt look-up.")] = False,
) -> None:
    """Decode held-out prompts with and without the drafts; output must not change."""
    from paceline.cli.show import evaluation_tables
    from paceline.launch.evaluate import evaluate_run
    from paceline.launch.trained import check_which, load_run_config

    _signals(context).grace_s = 1.0
    which = check_which(checkpoint)
    evaluation = evaluate_run(load_run_config(run, overrides or ()), draft or [], which, baselines)
    console = _console()
    for table in evaluation_tables(evaluation):
        console.print(table)


@app.command()
def export(
    context: typer.Context,
    run: RunDirectory,
    overrides: Overrides = None,
    draft: Drafts = None,
    checkpoint: Checkpoint = "best",
) -> None:
    """Write drafts in the layout that SGLang, vLLM and transformers load; read back and compared."""
    from paceline.launch.export import export_run
    from paceline.launch.trained import check_which, load_run_config

    _signals(context).grace_s = 1.0
    which = check_which(checkpoint)
    for name, directory in export_run(load_run_config(run, overrides or ()), draft or [], which).items():
        typer.echo(f"{name}: {directory} (written, read back, equal)")


@config_app.command("show")
def config_show(config: ConfigFile, overrides: Overrides = None) -> None:
    """The resolved configuration as TOML."""
    from paceline.config.loading import dump_config, load_config

    typer.echo(dump_config(load_config(config, overrides or ())), nl=False)


@config_app.command("check")
def config_check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Say whether a configuration can be loaded; exit code 1 and every mistake if not."""
    from paceline.config.loading import load_config

    resolved = load_config(config, overrides or ())
    typer.echo(f"{config}: correct; drafts: {', '.join(resolved.drafts)}")


def _signals(context: typer.Context) -> StopSignals:
    signals = context.find_object(StopSignals)
    assert signals is not None, "main() passes them"
    return signals


def _console() -> Console:
    from rich.console import Console

    return Console(markup=False)  # brackets in paths and names are themselves


def _print_plan(config: RunConfig, device: str | None = None) -> None:
    from paceline.cli.show import plan_table
    from paceline.launch.plan import count_gpus, describe_rows, num_gpus_wanted, plan_processes
    from paceline.launch.predict import describe_prediction

    console = _console()
    num_gpus = count_gpus() if device is None else num_gpus_wanted(config)
    processes = plan_processes(config, num_gpus)
    console.print(plan_table(processes))
    for line in [*describe_rows(config), "", *describe_prediction(config, processes, device)]:
        console.print(line, highlight=False, soft_wrap=True)


def _print_result(result: TrainingResult, console: Console) -> None:
    best = ", ".join(
        f"{name} {best.acceptance_length:.2f} (step {best.step})" for name, best in sorted(result.best.items())
    )
    console.print(f"{result.status} after step {result.step}; best acceptance length: {best or 'not measured yet'}")
    console.print(f"newest checkpoint: {result.checkpoint or 'none'}")
