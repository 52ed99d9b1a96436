"""How the trainer ranks of a run find each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """One trainer rank's place among all of them, and where they meet."""

    rank: int
    num_ranks: int
    address: str
    """"file:///PATH": a file that does not exist yet, on one host. "tcp://HOST:PORT": rank 0 listens there.
    "tcp://HOST:PORT/NAME": the same; the name keeps apart those who meet there one after the other."""
    hosted: bool = True
    """tcp: rank 0 listens; False where somebody does already (torchrun's agent)."""


ALONE = Rendezvous(0, 1, "")
"""A single rank meets nobody."""
