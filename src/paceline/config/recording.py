"""`[recording]`: features written to disk once."""

from pydantic import Field

from paceline.config.base import Config


class RecordingConfig(Config):
    """`paceline record`."""

    output: str | None = None
    """Directory to write; None is `recording/` in the run directory."""
    shard_bytes: int = Field(2 << 30, ge=1)
    """A file of features is closed when it has grown to this. What an interruption costs is at most one."""
