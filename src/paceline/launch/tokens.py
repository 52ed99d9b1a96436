"""The token that servers ask for: from a file, or from the one variable that the project reads."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from paceline.errors import ConfigError

TOKEN_VARIABLE = "PACELINE_TOKEN"  # noqa: S105 - its name
_TOKEN = re.compile(r"[\x21-\x7e]{1,4000}")


def take_token(file: str | Path | None) -> str | None:
    """The token in `file`, else in PACELINE_TOKEN, else None.

    The variable is removed from this process's environment: children start without it.

    Raises:
        ConfigError: a file that cannot be read, that others may read, or that holds no token.
    """
    from_variable = os.environ.pop(TOKEN_VARIABLE, None)
    if file is not None:
        return _checked(_read(Path(file)), str(file))
    return None if from_variable is None else _checked(from_variable, TOKEN_VARIABLE)


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise ConfigError(
                    f"token file {path} can be read or written by others (mode {mode:04o}): chmod 600 {path}"
                )
            return file.read(10_000)
    except OSError as error:
        raise ConfigError(f"cannot read token file {path}: {error.strerror or error}") from error


def _checked(text: str, source: str) -> str:
    token = text.strip()
    if not token:
        raise ConfigError(f"{source} is empty: write a token into it, e.g. 64 random hex digits")
    if not _TOKEN.fullmatch(token):
        raise ConfigError(f"{source} holds no token: one word of printable ASCII, at most 4000 long, is expected")
    return token
