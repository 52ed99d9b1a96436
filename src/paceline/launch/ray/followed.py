"""The processes of a run on Ray as its driver sees them: one watch call is always out for each."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paceline.errors import ConfigError
from paceline.launch.children import describe_exit
from paceline.launch.ray.actors import ActorState, ChildActor, Order, Whereabouts
from paceline.launch.ray.bundles import Bundle
from paceline.launch.restarts import ServerLife

if TYPE_CHECKING:
    from rich.console import Console

_WATCH_S = 5.0
_LOG_EVERY_S = 30.0
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Followed:
    """One process, over all starts of its actor."""

    bundle: Bundle
    actor: Any
    """Ray's handle."""
    console: Console | None = None
    """Where its output is shown; None shows none."""
    state: ActorState | None = None
    """The last one heard of; None while its actor is not there."""
    lost: str | None = None
    """Why its actor is gone for good."""
    watch: Any = None
    """The call that is out; None when there is nothing more to hear."""
    num_read: int = 0
    """Bytes of its output that were shown."""

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def has_ended(self) -> bool:
        """Whether its process is gone, and its output was shown."""
        state = self.state
        return self.lost is not None or (state is not None and state.code is not None and not state.output)

    @property
    def last_lines(self) -> str:
        return "" if self.state is None else self.state.last_lines

    def listen(self) -> None:
        """Have a watch call out, if there is anything left to hear."""
        if self.watch is None and self.lost is None:
            seen = None if self.state is None else self.state.stage
            offset = None if self.console is None else self.num_read
            # what was written before the end comes in pieces, without waiting
            all_written = self.console is not None and seen is not None and seen[2] is not None
            self.watch = self.actor.watch.remote(seen, offset, 0.0 if all_written else _WATCH_S)

    def hear(self) -> bool:
        """Take the answer of the call that is out, which is there; whether the actor answered.

        Raises:
            ConfigError: its node cannot work for this run.
        """
        import ray
        from ray.exceptions import ActorDiedError, RayActorError

        watch, self.watch = self.watch, None
        try:
            state: ActorState = ray.get(watch)
        except ActorDiedError as error:
            self.lost = " ".join(str(error).split())
            return False
        except RayActorError:
            return False
        if state.problem is not None:
            raise ConfigError(state.problem)
        if self.state is None:
            logger.info("%s runs on node %s, process %s", self.name, state.node, state.pid)
        self.state, self.num_read = state, state.output_end
        if self.console is not None and state.output:
            self.console.file.write(state.output)
            self.console.file.flush()
        return True

    def ask_to_end(self) -> None:
        """SIGTERM to its process; nothing if its actor is not there."""
        if self.lost is None:
            self.actor.ask_to_end.remote()

    def end(self) -> None:
        """End its actor, and its process with it."""
        import ray

        ray.kill(self.actor, no_restart=True)


@dataclass(slots=True)
class FollowedServer(Followed):
    """A server: Ray starts its actor anew when it dies, and this asks Ray to when the process in it did."""

    life: ServerLife = field(kw_only=True)
    is_away: bool = False
    """Whether its actor is being placed and started anew."""
    known_start: str | None = None
    """Which start of the actor was heard of last."""
    next_log: float = field(default_factory=lambda: time.monotonic() + _LOG_EVERY_S)

    def look_after(self, heard: bool) -> None:
        """React to the answer of a watch call: a start, a death, or that the actor does not answer.

        Raises:
            TargetError: it ended before it was ever ready.
        """
        life, state = self.life, self.state
        if not heard:
            if self.lost is not None and not life.given_up:
                life.num_restarts = life.placement.max_restarts
                life.died(f"Ray has lost it: {self.lost}", self.last_lines)
            elif life.url is not None:
                logger.warning("the Ray actor of %s does not answer", self.name)
                life.url = None
            return
        assert state is not None
        if state.code is not None:
            if life.start_at is None and not self.is_away and not life.given_up:
                life.was_ready |= state.url is not None
                life.died(describe_exit(state.code), state.last_lines)
            return
        if self._is_another_start(state):
            if not self.is_away:  # Ray has noticed a death of the actor itself
                life.died("its Ray actor was lost", "")
            life.begin()
            self.is_away = False
        if state.url is not None and life.url is None:
            life.ready(state.url, f" on node {state.node}, process {state.pid}")

    def go_on(self) -> None:
        """Start it anew if it is time, and say what it waits for.

        Raises:
            TargetError: it should have been ready by now.
        """
        import ray

        life, now = self.life, time.monotonic()
        if life.given_up:
            return
        if life.start_at is not None and now >= life.start_at and not self.is_away:
            self.is_away = True
            life.begin()
            ray.kill(self.actor, no_restart=False)
        if life.url is None and now >= self.next_log:
            what = "is placed by Ray" if self.state is None or self.is_away else f"starts on node {self.state.node}"
            logger.info("%s %s, since %.0f s", self.name, what, now - life.started)
            self.next_log = now + _LOG_EVERY_S
        if life.start_at is None and life.is_late():
            raise life.too_late(self.last_lines)

    def _is_another_start(self, state: ActorState) -> bool:
        known, self.known_start = self.known_start, state.actor_id
        return known is not None and known != state.actor_id


def start_actor(
    bundle: Bundle, order: Order, whereabouts: Whereabouts, token: str, group: Any, index: int, max_restarts: int
) -> Any:
    """Ray's handle of a new actor in a bundle of a placement group.

    Args:
        index: of the bundle in the group.
        max_restarts: how often Ray starts it anew, after it died or was asked to.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return (
        ray.remote(ChildActor)
        .options(
            name=f"{group.id.hex()[:12]}-{bundle.name}",
            num_cpus=bundle.num_cpus,
            num_gpus=bundle.num_gpus,
            max_restarts=max_restarts,
            max_concurrency=4,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        )
        .remote(order, whereabouts, token)
    )
