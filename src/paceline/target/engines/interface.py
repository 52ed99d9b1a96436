"""What a production engine must do for us: start, then hidden states of one document and its own next token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from paceline.config.target import TargetConfig
from paceline.target.engines.programs import EngineProgram

INSIDE = Path(__file__).parents[1] / "inside"
"""A folder for an engine's import path: the only code of ours that enters its process."""


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where an engine's server answers and where it writes hidden states."""

    url: str
    """http(s)://HOST:PORT"""
    directory: Path
    """As seen from here; nobody else's files may lie in it."""
    layers: tuple[int, ...]
    """The capture layers it was started for, ascending; the target's last layer is always one of them."""
    key: str = field(default="", repr=False)
    """A bearer token; "" where the server asks for none."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the states of one document belong."""

    label: str
    """For the id of its request, by which the engine finds it; "" where the memory is this process's own."""
    states: Tensor
    """[n, L, H] on the CPU; anything until the engine has written it."""


@dataclass(frozen=True, slots=True)
class RowMemory:
    """For the states of a row; whoever reserved it may use it again when nothing refers to `states` any more."""

    label: str
    """Of a row that an engine can write into; "" where the memory is this process's own."""
    states: Tensor
    """[T, L, H] on the CPU."""

    def place(self, start: int, end: int) -> Place:
        """Of the row's tokens from `start` to before `end`."""
        return Place(f"{self.label}.{start}.{end - start}" if self.label else "", self.states[start:end])


@dataclass(frozen=True, slots=True)
class CapturedDocument:
    """What an engine computed for one document."""

    hidden: Tensor
    """[n, L, H] on the CPU, in the engine's dtype: outputs of decoder layers, before any final norm. The states of its
    place where they are there already."""
    layers: list[int]
    """0-based, L of them, ascending."""
    next_token: int
    """The engine's own greedy token after the last one."""


class DocumentServer(Protocol):
    """A running engine; any number of threads may call it at the same time."""

    name: str
    """For messages: "vLLM at http://..."."""
    layers: tuple[int, ...]
    """The capture layers that it was started for, ascending; the target's last layer is always one of them."""
    max_tokens: int
    """Of one document."""

    def reserve(self, num_tokens: int, hidden_size: int, dtype: torch.dtype, pinned: bool) -> RowMemory:
        """Memory for a row, shared with the engine where that can be; pinned for copies to the current GPU."""

    def capture(self, tokens: np.ndarray, place: Place | None = None) -> CapturedDocument:
        """Hidden states of one document, int32[n]; written to `place` by the engine itself, if it can.

        Raises:
            CaptureMismatchError: other tokens or layers than were asked for.
            TransportError: the engine, or what it sent, is gone; asking again, or another server, can help.
            TargetError: the engine refused.
        """

    def is_alive(self) -> bool:
        """Whether the engine says that it can compute; blocks for a few seconds at most."""

    def close(self) -> None:
        """End the requests that are out; their threads see a TransportError. The engine itself goes on."""


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One production engine: all that is its own, before it runs."""

    title: str
    """For messages."""
    packages: tuple[str, ...]
    """Names under which it may be installed."""
    install: str
    """What to do where it is not, for messages."""
    tried: tuple[str, ...]
    """Versions that this one of paceline was run with; docs/engines.md has what was tried on what."""
    variables: Mapping[str, str]
    """Of its environment, where ours does not have them."""
    spreading: tuple[str, ...]
    """Options that say over how many GPUs a target is spread, with dashes; a short one with its dash in front."""
    sharding: tuple[str, ...]
    """Those of `spreading` that say over how many one copy of the weights is."""
    step_options: tuple[str, ...]
    """Options that say how many tokens are computed at once: longer prompts are cut there."""
    replica_options: tuple[str, ...]
    """Options that say how many computers of their own requests are dealt to; some of `spreading`."""
    command: Callable[[TargetConfig, EngineProgram, Path, EngineAddress], list[str]]
    """(config, program, checkpoint, address): the command line of a server, without its key. Raises ConfigError for
    options that are set here."""
    own_words: Callable[[TargetConfig, str, Path], tuple[list[str], dict[str, str]]]
    """(config, key, private directory that lives as long as the server): words and variables of one server: its key,
    where other users cannot read it, its ports, and places for what it would leave behind."""
    shell_command: Callable[[str, str], str]
    """(a server's command line, a word): the line for a shell, with the word as its key."""
    connect: Callable[[EngineAddress], DocumentServer]
    """A client of a server that is ready. Raises TransportError if it does not answer, TargetError if it refuses."""
    thread_variables: Mapping[str, str] = field(default_factory=dict)
    """More `variables`, without which `target.num_threads` would not count."""
