"""The self-test's reference: kept from an earlier time, or computed by one process of this host while others wait."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from paceline.errors import StoppedError, TargetError
from paceline.target.engines.process import EngineProcess, private_directory
from paceline.target.selftest.reference import Reference, load_reference
from paceline.target.selftest.texts import KnownTexts

_LOOK_EVERY_S = 0.2
_LOG_EVERY_S = 30.0
_SURELY_LEFT_S = 3600.0
logger = logging.getLogger(__name__)


def find_reference(
    kept: Sequence[Path],
    texts: KnownTexts,
    fingerprint: str,
    plan: Callable[[], tuple[Path, Mapping[str, Any]]],
    timeout_s: float,
    stop: threading.Event | None = None,
    anew: bool = False,
) -> Reference:
    """A reference that is kept, or one that is computed now.

    Args:
        kept: files of earlier times: the first is taken wherever it is there, the others where nothing better can be
            computed.
        plan: asked, while no other server of this host computes the same, what is to be computed: its file, and the
            settings of `paceline.target.selftest.reference` without "output". Its TargetError: there is no room.
        anew: one of an earlier time will not do.

    Raises:
        TargetError: transformers cannot compute it here, or was not ready in `timeout_s`.
        StoppedError: `stop` was set.
    """

    def look_for(path: Path) -> Reference | None:
        return None if anew else _known(path, fingerprint, texts)

    if (found := look_for(kept[0])) is not None:
        return found
    kept[0].parent.mkdir(parents=True, exist_ok=True)
    with _alone(kept[0], timeout_s, stop):
        if (found := look_for(kept[0])) is not None:
            return found
        try:
            path, settings = plan()
            if path != kept[0] and (found := look_for(path)) is not None:
                return found
            _compute(settings, path, timeout_s, stop)
        except TargetError as error:
            found = next((found for path in kept[1:] if (found := look_for(path)) is not None), None)
            if found is None:
                raise
            logger.warning(
                "the self-test takes what transformers said in %s at an earlier time: %s", found.dtype, error
            )
            return found
        return load_reference(path, fingerprint, texts)


def _known(kept: Path, fingerprint: str, texts: KnownTexts) -> Reference | None:
    try:
        return load_reference(kept, fingerprint, texts) if kept.exists() else None
    except TargetError as error:
        logger.warning("%s; it is computed again", error)
        return None


@contextlib.contextmanager
def _alone(kept: Path, timeout_s: float, stop: threading.Event | None) -> Iterator[None]:
    """Hold the lock of `kept`, which the system lets go of when this process ends."""
    begin = told = time.monotonic()
    with kept.with_suffix(".lock").open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = time.monotonic()
                if now - begin > timeout_s:
                    raise TargetError(
                        f"another process has computed the self-test's reference for {timeout_s:.0f} s "
                        f"(target.engine_start_timeout_s) and holds {lock.name}"
                    ) from None
                if now - told > _LOG_EVERY_S or told == begin:
                    told = now
                    logger.info("another process computes what transformers says to the self-test: waiting for it")
                if (stop or threading.Event()).wait(_LOOK_EVERY_S):
                    raise StoppedError("stopped while another process computed the self-test's reference") from None
            except OSError as error:  # a file system without locks
                logger.info("%s cannot be locked (%s): other servers may compute the same", lock.name, error.strerror)
                break
        yield


def _clear_away(kept: Path) -> None:
    """Remove what processes have left that were killed while they wrote, also on other hosts of a shared directory."""
    for left in kept.parent.glob(f"{kept.name}.*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _SURELY_LEFT_S:
                left.unlink()


def _compute(settings: Mapping[str, Any], kept: Path, timeout_s: float, stop: threading.Event | None) -> None:
    where = f"{len(settings['spread'])} GPUs" if settings["spread"] else settings["device"]
    logger.info("computing what transformers says to the self-test, in %s on %s", settings["dtype"], where)
    _clear_away(kept)
    output = kept.with_name(f"{kept.name}.{secrets.token_hex(4)}")
    words = json.dumps({**settings, "output": str(output)})
    command = [sys.executable, "-m", "paceline.target.selftest.reference", words]
    process = EngineProcess("transformers", private_directory("selftest"), command, os.environ)
    try:
        process.wait_until(output.exists, timeout_s, stop)
        output.replace(kept)
    except TargetError as error:
        raise TargetError(
            f"the self-test's reference cannot be computed here: {error}\nGive one that was made "
            f"{'of the weights it was quantised from' if settings['quantised'] else 'elsewhere'} "
            "(target.selftest_reference, `paceline doctor MODEL --save-reference FILE`), or do without "
            "(target.selftest = false)"
        ) from error
    finally:
        process.close()
