"""Documents through a server that answers over HTTP and writes their hidden states into files of a directory."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from paceline.target.engines.http_calls import EngineCalls
from paceline.target.engines.interface import CapturedDocument, EngineAddress
from paceline.target.engines.own_files import OwnFiles

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.02


class DocumentRequests(ABC):
    """A client of one server (`target.engines.interface.DocumentServer`); a kind of engine says what is asked how."""

    def __init__(self, title: str, address: EngineAddress) -> None:
        """Ask the server what it serves.

        Raises:
            TransportError: it does not answer.
            TargetError: it refuses, or was not started for this.
        """
        self.name = f"{title} at {address.url}"
        self.layers = address.layers
        self._directory = address.directory
        self._calls = EngineCalls(self.name, address.url, address.key)
        self.max_tokens = self._ask_max_tokens()
        """Of one document."""
        self._files = OwnFiles(address.directory)

    def capture(self, tokens: np.ndarray) -> CapturedDocument:
        """Hidden states of one document, int32[n]; the server's files are gone afterwards.

        Raises:
            CaptureMismatchError: other tokens or layers than were asked for.
            TransportError: the server or its files are gone; asking again, or another server, can help.
            TargetError: the server refused.
        """
        self._files.sweep()
        name = self._files.new_name()
        try:
            return self._capture(tokens.tolist(), name)
        finally:
            self._files.finish(name)

    def is_alive(self) -> bool:
        """Whether it answers as one that can compute, however much it has to do."""
        return self._calls.is_healthy()

    def close(self) -> None:
        """End the requests that are out; their threads see a TransportError."""
        self._calls.close()
        self._files.close()

    @abstractmethod
    def _ask_max_tokens(self) -> int:
        """What the server says that it takes; raises TargetError where it was not started for this."""

    @abstractmethod
    def _capture(self, sent: list[int], name: str) -> CapturedDocument:
        """One request, of which the server's files begin with `name`."""


def growing_pauses() -> Iterator[None]:
    """Sleeps before each further look at something that is there within milliseconds, most times."""
    pause_s = _FIRST_PAUSE_S
    while True:
        yield
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
