"""Every error paceline raises on purpose; each class says whether trying again can help."""


class PacelineError(Exception):
    """Base of all errors with a message meant for the user: what is wrong, both values, the remedy."""

    retryable = False
    """Whether the same call can succeed later without anybody changing anything."""


class ConfigError(PacelineError):
    """A configuration value that cannot work; raised before any model is loaded."""


class DataError(PacelineError):
    """Input data that cannot be read or used: names the file and, where there is one, the line."""


class TargetError(PacelineError):
    """A target checkpoint that cannot be loaded or described."""


class CaptureMismatchError(PacelineError):
    """An intact reply that is wrong: other token count, hash, shapes, dtypes, layers, or not finite."""


class HandshakeError(PacelineError):
    """A server whose target, tokenizer, sizes or protocol are not what the run expects: says which side has what."""


class DraftError(PacelineError):
    """A draft that does not fit its target, its vocabulary or its weights."""


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


class TransportError(PacelineError):
    """Features lost or damaged on the way; the row is asked for again."""

    retryable = True


class ServerBusyError(TransportError):
    """The server's queue is full."""


class StoppedError(PacelineError):
    """Work was ended by request (a signal or `close()`), not by a fault."""
