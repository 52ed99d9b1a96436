"""The session's key-value store: a dictionary on the server, and torch's view of it on either side."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch.distributed import DistStoreError, Store  # type: ignore[attr-defined]  # public, not in its __all__

from paceline.errors import WireError
from paceline.schema.protocol import StoreCall, StoreReply

MAX_KEYS = 256
MAX_BYTES = 1 << 20
_FIRST_LOOK_S = 0.001
_LONGEST_LOOK_S = 0.05

AskStore = Callable[[StoreCall], StoreReply]
"""Sends one call to the session's store: over HTTP on the client, a function call on the server."""


class SessionStore:
    """The store itself, on the server; thread-safe, bounded, never waits."""

    def __init__(self, on_set: Callable[[str], None]) -> None:
        """`on_set` is told each key that was set."""
        self._on_set = on_set
        self._lock = threading.Lock()
        self._values: dict[str, bytes] = {}

    def answer(self, call: StoreCall) -> StoreReply:
        """Do what the call says.

        Raises:
            WireError: a call that makes no sense, or more keys or bytes than a rendezvous can need.
        """
        with self._lock:
            match call.op:
                case "set":
                    if len(call.values) != len(call.keys):
                        raise WireError(f"a store call sets {len(call.keys)} keys to {len(call.values)} values")
                    self._put(dict(zip(call.keys, call.values, strict=True)))
                    reply = StoreReply()
                case "get":
                    return StoreReply(values=tuple(self._values.get(key) for key in call.keys))
                case "delete":
                    return StoreReply(number=int(self._values.pop(call.keys[0], None) is not None))
                case "add":
                    reply = self._add(call.keys[0], call.number)
                case "compare_set":
                    reply = self._compare_set(call)
        for key in call.keys:
            self._on_set(key)
        return reply

    def get(self, key: str) -> bytes | None:
        """The key's value, None if there is none."""
        with self._lock:
            return self._values.get(key)

    def set(self, key: str, value: bytes) -> None:
        """For the server itself; nobody is told."""
        with self._lock:
            self._values[key] = value

    def forget_all_but(self, keys: tuple[str, ...]) -> None:
        """Drop everything else."""
        with self._lock:
            self._values = {key: value for key, value in self._values.items() if key in keys}

    def _add(self, key: str, number: int) -> StoreReply:
        try:
            total = int(self._values.get(key, b"0")) + number
        except ValueError as error:
            raise WireError(f"the store's value of {key!r} is no number: nothing can be added to it") from error
        self._put({key: str(total).encode()})
        return StoreReply(number=total)

    def _compare_set(self, call: StoreCall) -> StoreReply:
        if len(call.values) != 2:
            raise WireError(f"compare_set takes the expected and the new value, {len(call.values)} came")
        key, (expected, new) = call.keys[0], call.values
        if self._values.get(key, b"") == expected:
            self._put({key: new})
        return StoreReply(values=(self._values.get(key, expected),))

    def _put(self, values: dict[str, bytes]) -> None:
        after = self._values | values
        num_bytes = sum(len(key) + len(value) for key, value in after.items())
        if len(after) > MAX_KEYS or num_bytes > MAX_BYTES:
            raise WireError(
                f"a session's store would hold {len(after)} keys and {num_bytes} bytes, a rendezvous needs no more "
                f"than {MAX_KEYS} and {MAX_BYTES}"
            )
        self._values = after


class StoreView(Store):
    """A part of the store as torch's communicators know it; waits by asking again."""

    def __init__(
        self,
        ask: AskStore,
        prefix: str,
        timeout_s: float,
        is_over: Callable[[], bool],
        on_first_use: Callable[[], None],
    ) -> None:
        """All keys begin with `prefix`.

        Args:
            timeout_s: of waits that name none.
            is_over: True ends a wait early.
            on_first_use: called once, before anything is asked.
        """
        super().__init__()
        self._ask = ask
        self._prefix = prefix
        self._timeout = timedelta(seconds=timeout_s)
        self._is_over = is_over
        self._on_first_use: Callable[[], None] | None = on_first_use
        # torch keeps the C++ half of a store alive, and not the half that is written here
        self._clones: list[StoreView] = []

    def set(self, key: str, value: bytes | str) -> None:
        self._call("set", [key], [value])

    def get(self, key: str) -> bytes:
        return self._wait([key], self._timeout)[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return self._wait(keys, self._timeout)

    def multi_set(self, keys: Sequence[str], values: Sequence[bytes | str]) -> None:
        self._call("set", keys, values)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._wait(keys, timeout or self._timeout)

    def check(self, keys: Sequence[str]) -> bool:
        return None not in self._call("get", keys).values

    def add(self, key: str, amount: int) -> int:
        return self._call("add", [key], number=amount).number

    def compare_set(self, key: str, expected_value: bytes | str, desired_value: bytes | str) -> bytes:
        (value,) = self._call("compare_set", [key], [expected_value, desired_value]).values
        assert value is not None, "there is a value after it was set"
        return value

    def delete_key(self, key: str) -> bool:
        return self._call("delete", [key]).number > 0

    def has_extended_api(self) -> bool:
        return False

    def clone(self) -> StoreView:
        clone = StoreView(self._ask, self._prefix, self._timeout.total_seconds(), self._is_over, lambda: None)
        self._clones.append(clone)
        return clone

    def _wait(self, keys: Sequence[str], timeout: timedelta) -> list[bytes]:
        deadline = time.monotonic() + timeout.total_seconds()
        look_s = _FIRST_LOOK_S
        while True:
            found = self._call("get", keys).values
            values = [value for value in found if value is not None]
            if len(values) == len(keys):
                return values
            missing = ", ".join(key for key, value in zip(keys, found, strict=True) if value is None)
            if self._is_over():
                raise DistStoreError(f"no longer waiting for {missing}: the channel was closed or begins anew")
            if time.monotonic() > deadline:
                raise DistStoreError(f"the other side did not set {missing} within {timeout.total_seconds():g} s")
            time.sleep(look_s)
            look_s = min(2 * look_s, _LONGEST_LOOK_S)

    def _call(self, op: str, keys: Sequence[str], values: Sequence[bytes | str] = (), number: int = 0) -> StoreReply:
        if self._on_first_use is not None:
            self._on_first_use()
            self._on_first_use = None
        in_bytes = tuple(value.encode() if isinstance(value, str) else bytes(value) for value in values)
        names = tuple(self._prefix + key for key in keys)
        return self._ask(StoreCall.model_validate({"op": op, "keys": names, "values": in_bytes, "number": number}))
