"""Documents through a server that answers over HTTP and writes their hidden states into files of a directory."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from paceline.errors import CaptureMismatchError, TransportError
from paceline.target.engines.http_calls import EngineCalls
from paceline.target.engines.interface import CapturedDocument, EngineAddress, Place, RowMemory
from paceline.target.engines.own_files import OwnFiles
from paceline.target.engines.shared_rows import SharedRows

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
        self._rows = SharedRows(address.directory, self._files.prefix)

    def reserve(self, num_tokens: int, hidden_size: int, dtype: torch.dtype, pinned: bool) -> RowMemory:
        """Memory for a row's states, which the server writes by itself; any thread, of the GPU it is pinned for."""
        return self._rows.reserve((num_tokens, len(self.layers), hidden_size), dtype, pinned)

    def capture(self, tokens: np.ndarray, place: Place | None = None) -> CapturedDocument:
        """Hidden states of one document, int32[n]; the server's files are gone afterwards.

        Raises:
            CaptureMismatchError: other tokens or layers than were asked for.
            TransportError: the server or its files are gone; asking again, or another server, can help.
            TargetError: the server refused.
        """
        name = self._files.new_name("" if place is None else place.label)
        try:
            self._files.sweep()
            return self._capture(tokens.tolist(), name, place)
        except OSError as error:  # the directory goes with its engine, at any moment
            raise TransportError(
                f"files of {self.name} in {self._directory} cannot be read or removed ({error}): did it end?"
            ) from error
        finally:
            self._files.finish(name)

    def is_alive(self) -> bool:
        """Whether it answers as one that can compute, however much it has to do."""
        return self._calls.is_healthy()

    def close(self) -> None:
        """End the requests that are out; their threads see a TransportError."""
        self._calls.close()
        self._rows.close()
        self._files.close()

    @abstractmethod
    def _ask_max_tokens(self) -> int:
        """What the server says that it takes; raises TargetError where it was not started for this."""

    @abstractmethod
    def _capture(self, sent: list[int], name: str, place: Place | None) -> CapturedDocument:
        """One request, with `name` in those of the server's files."""


def states_of(stored: Mapping[str, Tensor], place: Place | None, first: int = 0) -> Tensor:
    """[n, L, H]: what a file holds, or what the engine has written to the document's place instead.

    Args:
        stored: with `hidden_states`, or with `placed` [0, L, H], and `token_ids` int64[n].
        first: of the document's tokens.

    Raises:
        CaptureMismatchError: the engine has written other states there than belong there.
    """
    if "hidden_states" in stored:
        return stored["hidden_states"]
    like, num_tokens = stored["placed"], len(stored["token_ids"])
    there = like[:0] if place is None or not place.label else place.states[first : first + num_tokens]
    if (there.shape, there.dtype) != ((num_tokens, *like.shape[1:]), like.dtype):
        raise CaptureMismatchError(
            f"the engine has written {num_tokens} states of {list(like.shape[1:])} as {like.dtype} to a place for "
            f"{list(there.shape)} as {there.dtype}: start it for the same layers, with the data type of target.dtype"
        )
    return there


def growing_pauses() -> Iterator[None]:
    """Sleeps before each further look at something that is there within milliseconds, most times."""
    pause_s = _FIRST_PAUSE_S
    while True:
        yield
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
