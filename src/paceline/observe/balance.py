"""Who holds up whom: trainers their target, or the target its trainers. Numbers in, a verdict with numbers out.

Steps come as fast as the slower side. Demand is what the trainers would train if rows were always there, supply what
the servers would compute if they always worked; both are measured while the run goes on, from the time each side really
works. One server or one trainer more moves its side in proportion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

_NOTHING = 0.05
"""Waiting, and differences between the two sides, below this share are noise."""
_AT_WORK = 0.85
"""Servers that work less while trainers wait are not what holds them up."""

Limit = Literal["target", "trainers", "balanced", "path", "shared", "disk"]


@dataclass(frozen=True, slots=True)
class BalanceWindow:
    """What was measured over a number of steps, by one trainer rank or by all of them together."""

    wall_s: float = 0.0
    tokens: float = 0.0
    """Trained; each once, also where several ranks share a row."""
    data_wait_s: float = 0.0
    """Time in which the host waited for rows."""
    busy_s: float = 0.0
    """Time the device spent on drafts: forward, backward, optimizer."""
    num_bytes: float = 0.0
    """Of features received."""
    target_tokens: float = 0.0
    """Of rows received."""
    target_s: float = 0.0
    """Time servers spent on these rows, all of them together."""
    server_s: float = 0.0
    """`wall_s` times the number of servers; 0 where there are none."""

    @property
    def wait_s(self) -> float:
        """Time in which no row was there and the device had nothing to do.

        A GPU goes on with what it has been given while its host waits. One that is idle without a waiting host has a
        slow host: that is a part of demand.
        """
        return max(0.0, min(self.data_wait_s, self.wall_s - self.busy_s))

    def __add__(self, later: BalanceWindow) -> BalanceWindow:
        """The same ranks, over both times."""
        ours, theirs = dataclasses.astuple(self), dataclasses.astuple(later)
        return BalanceWindow(*(a + b for a, b in zip(ours, theirs, strict=True)))


def across_ranks(ranks: Sequence[BalanceWindow]) -> BalanceWindow:
    """The same time, all trainer ranks together.

    Ranks end a step together. One that has its rows early waits for the others inside its backward pass, which its
    device takes for work: the rank that waited longest for rows tells how long all were held up.
    """
    last = max(ranks, key=lambda rank: rank.wait_s)
    return dataclasses.replace(
        sum(ranks, BalanceWindow()),
        wall_s=max(rank.wall_s for rank in ranks),
        data_wait_s=last.data_wait_s,
        busy_s=last.busy_s,
        server_s=max(rank.server_s for rank in ranks),
    )


@dataclass(frozen=True, slots=True)
class Balance:
    """The verdict on a window."""

    limit: Limit
    """What the run waits for: the servers ("target"), its own "trainers", both alike ("balanced"), neither, so what is
    between them ("path"), the one device that both work on ("shared"), or rows from "disk" (if anything)."""
    text: str
    trainers_wait: float
    """Share of the time."""
    servers_work: float | None
    """Share of the time; where target and drafts share a device, that of the target, beside drafts. None without."""
    tokens_per_s: float
    demand_tokens_per_s: float
    supply_tokens_per_s: float | None
    """None where no servers were measured."""
    num_trainers: int
    num_servers: int
    one_more_server: float | None
    """Times `tokens_per_s`; None where it cannot be told."""
    one_more_trainer: float | None
    one_server_fewer: float | None
    window: BalanceWindow

    def to_line(self) -> dict[str, Any]:
        """As metrics.jsonl has it."""
        return dataclasses.asdict(self)


def judge(window: BalanceWindow, num_trainers: int) -> Balance | None:
    """The verdict on `window` of all ranks together; None where nothing was trained, or no row came."""
    if min(window.tokens, window.wall_s, window.target_tokens) <= 0:
        return None
    if window.target_s > 0:
        return (_judge_servers if window.server_s > 0 else _judge_shared)(window, num_trainers)
    return None if window.server_s > 0 else _judge_disk(window, num_trainers)


def gains(demand: float, supply: float, num_trainers: int, num_servers: int) -> tuple[float, float, float | None]:
    """Tokens/s with one more server, with one more trainer, and with one server fewer (None for the last one)."""
    fewer = min(demand, supply * (num_servers - 1) / num_servers) if num_servers > 1 else None
    return (
        min(demand, supply * (num_servers + 1) / num_servers),
        min(demand * (num_trainers + 1) / num_trainers, supply),
        fewer,
    )


def _judge_servers(window: BalanceWindow, num_trainers: int) -> Balance:
    num_servers = max(1, round(window.server_s / window.wall_s))
    rate, wait = window.tokens / window.wall_s, window.wait_s / window.wall_s
    work = min(1.0, window.target_s / window.server_s)
    demand = _demand(window)
    supply = num_servers * window.target_tokens / window.target_s
    more_servers, more_trainers, fewer_servers = gains(demand, supply, num_trainers, num_servers)
    limit: Limit
    if wait <= _NOTHING:
        limit = "balanced" if supply <= demand * (1 + _NOTHING) else "trainers"
    elif work < _AT_WORK:
        limit = "path"
    else:
        limit = "balanced" if demand <= supply * (1 + _NOTHING) else "target"
    known = limit != "path"
    verdict = Balance(
        limit=limit,
        text="",
        trainers_wait=wait,
        servers_work=work,
        tokens_per_s=rate,
        demand_tokens_per_s=demand,
        supply_tokens_per_s=supply,
        num_trainers=num_trainers,
        num_servers=num_servers,
        one_more_server=max(1.0, more_servers / rate) if known else None,
        one_more_trainer=max(1.0, more_trainers / rate) if known else None,
        one_server_fewer=min(1.0, fewer_servers / rate) if known and fewer_servers is not None else None,
        window=window,
    )
    return dataclasses.replace(verdict, text=_text(verdict))


def _text(verdict: Balance) -> str:
    waits = f"{_trainers(verdict.num_trainers)} {verdict.trainers_wait:.0%} of the time"
    assert verdict.servers_work is not None
    work = "the server works" if verdict.num_servers == 1 else f"the {verdict.num_servers} servers work"
    works = f"{work} {verdict.servers_work:.0%}"
    if verdict.limit == "path":
        text = (
            f"{waits}, while {works} for it: rows are long on their way, or behind those of other runs; raise "
            "transport.prefetch_rows, or take a faster transport"
        )
    elif verdict.limit == "target":
        text = f"{waits}, {works}: 1 more server would give {verdict.one_more_server:.1f}x"
    elif verdict.limit == "balanced":
        text = f"balanced: {waits}, {works}"
    else:
        text = f"{works} of the time, {waits.removesuffix(' of the time')}: "
        text += f"1 more trainer would give {verdict.one_more_trainer:.1f}x"
        if verdict.one_server_fewer is not None and verdict.one_server_fewer > 1 - _NOTHING:
            text += ", 1 server fewer would cost nothing"
    return text.replace("%", " %")


def _judge_shared(window: BalanceWindow, num_trainers: int) -> Balance:
    """Both sides' kernels run beside each other, which makes either slower: their times do not tell shares of work."""
    target = min(1.0, window.target_s / num_trainers / window.wall_s)  # of one device, as the time for drafts is
    drafts = min(1.0, window.busy_s / window.wall_s)
    where = "the trainer's device" if num_trainers == 1 else "each trainer's device"
    at_once = ", in part at once" if target + drafts > 1 + _NOTHING else ""
    text = (
        f"target and drafts share {where}, at work {target:.0%} and {drafts:.0%} of the time{at_once}: servers would "
        "take the target off it, but on further devices only"
    )
    return _alone(window, num_trainers, "shared", text.replace("%", " %"), target)


def _judge_disk(window: BalanceWindow, num_trainers: int) -> Balance:
    wait = window.wait_s / window.wall_s
    text = (
        f"{_trainers(num_trainers)} {wait:.0%} of the time for rows from disk, read at "
        f"{window.num_bytes / window.wall_s / 1e9:.2f} GB/s"
    )
    return _alone(window, num_trainers, "trainers" if wait <= _NOTHING else "disk", text.replace("%", " %"), None)


def _alone(window: BalanceWindow, num_trainers: int, limit: Limit, text: str, work: float | None) -> Balance:
    """A verdict where there are no servers to add or to leave out."""
    return Balance(
        limit=limit,
        text=text,
        trainers_wait=window.wait_s / window.wall_s,
        servers_work=work,
        tokens_per_s=window.tokens / window.wall_s,
        demand_tokens_per_s=_demand(window),
        supply_tokens_per_s=None,
        num_trainers=num_trainers,
        num_servers=0,
        one_more_server=None,
        one_more_trainer=None,
        one_server_fewer=None,
        window=window,
    )


def _demand(window: BalanceWindow) -> float:
    return window.tokens / max(window.wall_s - window.wait_s, 1e-9)


def _trainers(num: int) -> str:
    return "the trainer waits" if num == 1 else f"the {num} trainers wait"


def window_of_line(balance: dict[str, Any]) -> BalanceWindow:
    """The window of a line's `balance`, to be added to others."""
    return BalanceWindow(**balance["window"])
