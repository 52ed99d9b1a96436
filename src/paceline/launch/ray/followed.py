"""The processes of a run on Ray as its driver sees them: one watch call is always out for each."""

from __future__ import annotations

import json
import logging
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import ConfigError
from paceline.launch.children import describe_exit, last_lines
from paceline.launch.failures import Failure
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
    """One process, over all starts of its actor.

    consumes: answers of the actor      waits for: nothing; `poll` is called often
    unblocked by: an answer every few seconds, or Ray's word that the actor is gone
    """

    name: str
    actor: Any
    """Ray's handle."""
    state: ActorState | None = None
    """The last one heard of; None while its actor is not there."""
    lost: str | None = None
    """Why its actor is gone for good."""
    watch: Any = None
    """The call that is out; None when there is nothing more to hear."""

    @property
    def last_lines(self) -> str:
        return "" if self.state is None else self.state.last_lines

    def listen(self) -> bool | None:
        """Take an answer if one has come: whether the actor answered, None if nothing was heard.

        Raises:
            ConfigError: its node cannot work for this run.
        """
        import ray

        if self.watch is None and self.lost is None:
            self.watch = self._ask()
        if self.watch is None or not ray.wait([self.watch], timeout=0)[0]:
            return None
        return self._hear()

    def ask_to_end(self) -> None:
        """SIGTERM to its process; nothing if its actor is not there."""
        if self.lost is None:
            self.actor.ask_to_end.remote()

    def kill(self) -> None:
        """End its actor, and its process with it."""
        import ray

        ray.kill(self.actor, no_restart=True)

    def _ask(self) -> Any:
        seen = None if self.state is None else self.state.stage
        return self.actor.watch.remote(seen, None, _WATCH_S)

    def _hear(self) -> bool:
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
            self.lost = state.problem
            raise ConfigError(state.problem)
        if self.state is None:
            logger.info("%s runs on node %s, process %s", self.name, state.node, state.pid)
        self.state = state
        return True


@dataclass(slots=True)
class FollowedWorker(Followed):
    """A trainer or recorder: started once; what it writes may be shown here, and why it failed is kept here."""

    log: Path = field(kw_only=True)
    failure_file: Path | None = field(kw_only=True)
    """On this machine; None for one that tells the user itself."""
    console: Console | None = field(kw_only=True)
    """Where its output is shown; None shows none."""
    num_read: int = 0
    """Bytes of its output that were shown."""
    was_killed: bool = False
    """From here."""

    def poll(self) -> int | None:
        """Its exit code (negative: the signal that ended it) once its output was shown, None while it runs."""
        if self.lost is None and not self._has_ended() and self.listen():
            self._show()
        if self.lost is not None:
            return self._code_of_lost()
        return self.state.code if self._has_ended() and self.state is not None else None

    def kill(self) -> None:
        self.was_killed = True
        Followed.kill(self)

    def _has_ended(self) -> bool:
        state = self.state
        return state is not None and state.code is not None and not state.output

    def _ask(self) -> Any:
        seen = None if self.state is None else self.state.stage
        if self.console is None:
            return self.actor.watch.remote(seen, None, _WATCH_S)
        # what was written before the end comes in pieces, without waiting
        all_written = seen is not None and seen[2] is not None
        return self.actor.watch.remote(seen, self.num_read, 0.0 if all_written else _WATCH_S)

    def _show(self) -> None:
        state = self.state
        assert state is not None
        if self.console is not None:
            self.num_read = state.output_end
            self.console.file.write(state.output)
            self.console.file.flush()
        if state.failure is not None and self.failure_file is not None:
            self.failure_file.write_text(state.failure, encoding="utf-8")

    def _code_of_lost(self) -> int:
        if self.was_killed:
            return -signal.SIGKILL
        text = (
            f"Ray has lost the actor of {self.name}: {self.lost}; the last lines of {self.log}:\n{last_lines(self.log)}"
        )
        if self.failure_file is None:
            logger.error("%s", text)
        elif not self.failure_file.exists():
            self.failure_file.write_text(json.dumps(asdict(Failure(time.time(), text, (), follows=False))))
        return 1


@dataclass(slots=True)
class FollowedServer(Followed):
    """A server: Ray starts its actor anew when it dies, and this asks Ray to when the process in it did."""

    life: ServerLife = field(kw_only=True)
    asked_anew: bool = False
    """Whether Ray was asked to start its actor anew, and has not yet."""
    is_silent: bool = False
    """Whether its actor did not answer: Ray may be placing it on another node."""
    known_start: str | None = None
    """Which start of the actor was heard of last."""
    next_log: float = field(default_factory=lambda: time.monotonic() + _LOG_EVERY_S)

    def look_after(self) -> None:
        """React to what is heard of it, start it anew if it is time, and say what it waits for.

        Raises:
            TargetError: it ended before it was ever ready, or should have been ready by now.
        """
        heard = self.listen()
        if heard is not None:
            self._on_answer() if heard else self._on_silence()
        self._go_on()

    def has_ended(self) -> bool:
        """Whether its process is gone, for now or for good."""
        self.listen()
        return self.lost is not None or (self.state is not None and self.state.code is not None)

    def _on_silence(self) -> None:
        life = self.life
        if self.lost is not None and not life.given_up:
            life.num_restarts = life.placement.max_restarts
            life.died(f"Ray has lost it: {self.lost}", last_lines(life.log))
        elif life.url is not None:
            logger.warning("the Ray actor of %s does not answer", self.name)
            life.url = None
        self.is_silent = True

    def _on_answer(self) -> None:
        life, state = self.life, self.state
        assert state is not None
        self.is_silent = False
        if state.code is not None:
            if life.start_at is None and not self.asked_anew and not life.given_up:
                life.was_ready |= state.url is not None
                life.died(describe_exit(state.code), state.last_lines)
            return
        known, self.known_start = self.known_start, state.actor_id
        if known is not None and known != state.actor_id:
            if not self.asked_anew:  # Ray has noticed a death of the actor itself
                life.died("its Ray actor was lost", last_lines(life.log))
            life.begin()
            self.asked_anew = False
        if state.url is not None and life.url is None:
            life.ready(state.url, f" on node {state.node}, process {state.pid}")

    def _go_on(self) -> None:
        import ray

        life, now = self.life, time.monotonic()
        if life.given_up:
            return
        if life.start_at is not None and now >= life.start_at and not self.asked_anew:
            self.asked_anew = True
            life.begin()
            ray.kill(self.actor, no_restart=False)
        if life.url is not None:
            self.next_log = now + _LOG_EVERY_S
        elif now >= self.next_log:
            placed = self.state is not None and not self.is_silent and not self.asked_anew
            logger.info("%s waits %s", self.name, "for its target to load" if placed else "for Ray to place it")
            self.next_log = now + _LOG_EVERY_S
        # A place may be long in coming after a node is lost; the others do its work.
        if life.start_at is None and not self.is_silent and not self.asked_anew and life.is_late():
            raise life.too_late(self.last_lines)


def start_actor(
    bundle: Bundle, order: Order, whereabouts: Whereabouts, token: str | None, group: Any, index: int, max_restarts: int
) -> Any:
    """Ray's handle of a new actor in a bundle of a placement group.

    Args:
        token: of the servers; None where they ask for none.
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
