"""Every error paceline raises on purpose; each class says whether trying again can help."""

import sys


class PacelineError(Exception):
    """Base of all errors with a message meant for the user: what is wrong, both values, the remedy."""

    retryable = False
    """Whether the same call can succeed later without anybody changing anything."""


def print_error(error: PacelineError) -> None:
    """On stderr, as a command's last words: its notes (which row, which server), then its message."""
    print(*getattr(error, "__notes__", ()), f"error: {error}", sep="\n", file=sys.stderr)  # noqa: T201


class ConfigError(PacelineError):
    """A configuration value that cannot work; raised before any model is loaded."""


class DataError(PacelineError):
    """Input data that cannot be read or used: names the file and, where there is one, the line."""


class TargetError(PacelineError):
    """A target checkpoint that cannot be loaded or described."""


class EngineLostError(TargetError):
    """The engine lost one of its processes, or they fell out of step: it computes no more rows, another one can."""

    retryable = True


class CaptureMismatchError(PacelineError):
    """An intact reply that is wrong: other token count, hash, shapes, dtypes, layers, or not finite."""


class HandshakeError(PacelineError):
    """A server whose target, tokenizer, sizes or protocol are not what the run expects: says which side has what."""


class DraftError(PacelineError):
    """A draft that does not fit its target, its vocabulary or its weights."""


class TrainerFailedError(PacelineError):
    """A trainer rank that ended, and the run with it: names the rank that was first, with its own message."""


class RunDirectoryError(PacelineError):
    """A run directory that belongs to another configuration, or whose state contradicts itself."""


class CheckpointError(PacelineError):
    """A checkpoint that cannot be written, or is damaged: names the file."""


class ExportError(PacelineError):
    """An export that, read back, is not what was trained."""


class LosslessnessError(PacelineError):
    """Speculative decoding changed the target's greedy output."""


class OutOfMemoryError(PacelineError):
    """Device memory ran out: names the setting to lower."""


class WireError(PacelineError):
    """A request that cannot be right, whoever sends it: refused with the reason, and never worth sending again."""


class AuthorizationError(PacelineError):
    """A token that is missing or wrong."""


class RowKillsServersError(PacelineError):
    """A row that was in flight at every death of several servers, the last time alone: names it and its samples."""


class TransportError(PacelineError):
    """Features lost or damaged on the way; the row is asked for again."""

    retryable = True


class DamagedError(TransportError):
    """Bytes that are not what was sent: a checksum, a length or a header is wrong."""


class ServerLostError(TransportError):
    """The server cannot be reached, or the connection to it broke: its rows go to others."""


class ServerFailedError(TransportError):
    """The server lives, but could not compute or send this row."""


class SessionLostError(TransportError):
    """The server does not know the session (any more): another is opened."""


class ServerBusyError(TransportError):
    """The server's queue is full."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """When the server expects to have room, if it says so."""


class StoppedError(PacelineError):
    """Work was ended by request (a signal or `close()`), not by a fault."""
