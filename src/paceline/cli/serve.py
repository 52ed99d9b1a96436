"""`paceline serve`: its options, and what they mean."""

from __future__ import annotations

import tomllib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from paceline.errors import ConfigError
from paceline.launch.signals import StopSignals

if TYPE_CHECKING:
    from paceline.config.target import TargetConfig

_OF_TARGET = (
    "model",
    "engine",
    "engine_url",
    "capture_layers",
    "dtype",
    "device",
    "tensor_parallel",
    "num_threads",
    "attention",
    "compile",
    "trust_remote_code",
)
"""Options that are settings of [target] by the same name."""
_TARGET, _NETWORK, _PROCESS = "The target", "Address and security", "The process"


class LogLevel(StrEnum):
    """Least severe level that is logged."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


def _target_option(text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=_TARGET, **limits)


def _network_option(text: str, **limits: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=_NETWORK, **limits)


def _process_option(text: str, **limits: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=_PROCESS, **limits)


Model = Annotated[str, typer.Argument(help="Path or hub id of the target.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="target.field=value", help="Other settings of the target.")
]
TargetFile = Annotated[Path | None, _target_option("TOML with settings of the target section; options win over it.")]
Engine = Annotated[str | None, _target_option("Who runs the target: hf, vllm, sglang.")]
EngineUrl = Annotated[str | None, _target_option("An engine that runs already; see `paceline doctor --show-command`.")]
CaptureLayers = Annotated[
    str | None, _target_option("Layers that an engine other than hf is started for: 1,17,32.", metavar="LAYERS")
]
Dtype = Annotated[str | None, _target_option("auto, float32, bfloat16, float16.")]
Device = Annotated[str | None, _target_option("auto, cpu, cuda, cuda:N.")]
TensorParallel = Annotated[int | None, _target_option("Processes that compute each row together.")]
NumThreads = Annotated[int | None, _target_option("CPU threads of torch.")]
Attention = Annotated[str | None, _target_option("transformers' attention implementation.")]
Compile = Annotated[bool | None, _target_option("Compile the decoder layers.", "--compile")]
TrustCode = Annotated[bool | None, _target_option("Run code of the checkpoint.", "--trust-remote-code")]
RowsPerForward = Annotated[int, _target_option("Rows computed together; more than 1 is lossy.", min=1)]
MaxRowTokens = Annotated[int, _target_option("Longer rows are refused.", min=1)]
MaxUnsentBytes = Annotated[int, _target_option("Features of one session computed and not yet sent.", min=1)]
Host = Annotated[str, _network_option("Address to listen on; others than loopback need a token.")]
Port = Annotated[int, _network_option("0: chosen by the system.", min=0, max=65535)]
Advertise = Annotated[str | None, _network_option("Name or address by which clients reach this server.")]
TokenFile = Annotated[Path | None, _network_option("File (mode 0600) with the token; else PACELINE_TOKEN.")]
TlsCert = Annotated[Path | None, _network_option("Certificate chain, PEM.")]
TlsKey = Annotated[Path | None, _network_option("Its private key, PEM.")]
AutoExit = Annotated[float | None, _process_option("End after so long without a session.", min=0)]
ReadyFile = Annotated[Path | None, _process_option("Gets {url, pid} as JSON when the server is ready.")]
LogFile = Annotated[Path | None, _process_option("Log here instead of to stderr.")]
Level = Annotated[LogLevel, _process_option("Least severe level.")]
ParentPipe = Annotated[int | None, typer.Option(hidden=True)]


def serve(
    context: typer.Context,
    model: Model,
    overrides: Overrides = None,
    target_config: TargetFile = None,
    engine: Engine = None,
    engine_url: EngineUrl = None,
    capture_layers: CaptureLayers = None,
    dtype: Dtype = None,
    device: Device = None,
    tensor_parallel: TensorParallel = None,
    num_threads: NumThreads = None,
    attention: Attention = None,
    compile: Compile = None,  # noqa: A002 - the option's name
    trust_remote_code: TrustCode = None,
    rows_per_forward: RowsPerForward = 1,
    max_row_tokens: MaxRowTokens = 131_072,
    max_unsent_bytes: MaxUnsentBytes = 8 << 30,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    advertise: Advertise = None,
    token_file: TokenFile = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    auto_exit_s: AutoExit = None,
    ready_file: ReadyFile = None,
    log_file: LogFile = None,
    log_level: Level = LogLevel.INFO,
    parent_pipe: ParentPipe = None,
) -> None:
    """Serve a target to trainers elsewhere, until a signal ends it.

    Options of an engine's own go after --, as in: paceline serve MODEL --engine vllm -- --max-model-len 32768
    """
    options = {name: value for name, value in locals().items() if name in _OF_TARGET}
    from paceline.launch.children import end_with_parent
    from paceline.launch.tokens import take_token
    from paceline.target.server.settings import ServerSettings

    end_with_parent(parent_pipe)
    words, flags = split_engine_flags(overrides or [])
    config = build_target_config(target_config, options, words, flags)
    settings = ServerSettings(
        host=host,
        port=port,
        token=take_token(token_file),
        tls_cert=tls_cert,
        tls_key=tls_key,
        advertise=advertise,
        max_row_tokens=max_row_tokens,
        max_unsent_rows=3 * rows_per_forward + 1,
        max_unsent_tokens=0 if config.engine == "hf" else 2 * config.engine_tokens,  # there, and on their way out
        max_unsent_bytes=max_unsent_bytes,
    )
    from paceline.launch.serve import ServeOptions, serve_target

    process = ServeOptions(auto_exit_s, ready_file, log_file, log_level.value, rows_per_forward)
    signals = context.find_object(StopSignals)
    assert signals is not None, "main() passes them"
    serve_target(config, settings, process, signals, typer.echo)


def split_engine_flags(words: list[str]) -> tuple[list[str], list[str]]:
    """(target.field=value words, the engine's own options, which begin with the first word that begins with -)."""
    first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first], words[first:]


def build_target_config(
    file: Path | None, options: dict[str, Any], overrides: list[str], engine_flags: list[str]
) -> TargetConfig:
    """The settings of [target]: those of a file, then options that are not None, then overrides.

    Args:
        engine_flags: command line words of the engine's own, which win over `engine_args` of the file.

    Raises:
        ConfigError: an unreadable file, an unknown or wrong setting; all of them are named.
    """
    from paceline.config.loading import apply_overrides
    from paceline.config.target import TargetConfig

    table: dict[str, Any] = {}
    if file is not None:
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {file}: {error}") from error
    table |= {name: value for name, value in options.items() if value is not None}
    if isinstance(table.get("capture_layers"), str):
        table["capture_layers"] = table["capture_layers"].split(",")
    if engine_flags:
        from paceline.target.engines.flags import parse_flags

        table["engine_args"] = {**table.get("engine_args", {}), **parse_flags(engine_flags)}
    whole = apply_overrides({"target": table}, overrides)
    others = sorted(whole.keys() - {"target"})
    if others:
        raise ConfigError(f"a server has settings of [target] only, not of {', '.join(others)}")
    try:
        return TargetConfig.model_validate(whole["target"])
    except ValidationError as error:
        known = ", ".join(TargetConfig.model_fields)
        problems = [
            f"  target.{'.'.join(map(str, one['loc']))}: "
            + (
                f"unknown; known: {known}"
                if one["type"] == "extra_forbidden"
                else f"{one['msg']}, got {one['input']!r}"
            )
            for one in error.errors()
        ]
        raise ConfigError("\n".join(["paceline serve:", *problems])) from error
