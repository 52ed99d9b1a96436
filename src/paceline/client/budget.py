"""The prefetch budget of one trainer rank: rows and bytes in flight, shared by its streams."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from paceline.transport.base import Delivery


@dataclass(slots=True, eq=False)
class OwnRows:
    """Rows that a stream may have in flight besides the shared budget."""

    allowed: int
    in_use: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """One row's place in the budget."""

    num_bytes: int
    own: OwnRows | None
    """Whose own row it is; None for a place in the shared budget."""


class PrefetchBudget:
    """At most `max_rows` rows and `max_bytes` bytes at a time; a row larger than `max_bytes` goes alone.

    A place is given back when the work on its row is done, on a GPU too: the host may run ahead of the device, the
    budget does not.
    """

    def __init__(self, max_rows: int, max_bytes: int) -> None:
        self.max_rows = max_rows
        self.max_bytes = max_bytes
        self._changed = threading.Condition()
        self._num_changes = 0
        self._shared_rows = 0
        self._shared_bytes = 0
        self._own_bytes = 0
        self._own_rows = 0
        self._being_freed: deque[tuple[Reservation, Delivery]] = deque()

    @property
    def rows_in_flight(self) -> int:
        """Rows of all streams, own rows included."""
        return self._shared_rows + self._own_rows

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of all streams, own rows included."""
        return self._shared_bytes + self._own_bytes

    def reserve(self, num_bytes: int, own: OwnRows) -> Reservation | None:
        """A place for a row, out of the stream's own rows first; None if there is none now."""
        with self._changed:
            self._take_back_free()
            if own.in_use < own.allowed:
                own.in_use += 1
                self._own_rows += 1
                self._own_bytes += num_bytes
                return Reservation(num_bytes, own)
            fits = self._shared_rows < self.max_rows and self._shared_bytes + num_bytes <= self.max_bytes
            if not fits and self._shared_rows > 0:
                return None
            self._shared_rows += 1
            self._shared_bytes += num_bytes
            return Reservation(num_bytes, None)

    def give_back(self, reservation: Reservation, delivery: Delivery | None = None) -> None:
        """Free the place, as soon as the work on `delivery` (already released) is done."""
        with self._changed:
            if delivery is None or delivery.is_free():
                self._free(reservation)
            else:
                self._being_freed.append((reservation, delivery))
        self.signal_change()

    @property
    def num_changes(self) -> int:
        """Goes up with everything a stream may wait for; see `wait_for_change`."""
        return self._num_changes

    def signal_change(self) -> None:
        """Wake all streams: a row was answered, a stream was closed."""
        with self._changed:
            self._num_changes += 1
            self._changed.notify_all()

    def wait_for_change(self, seen: int, timeout_s: float) -> None:
        """Return when `num_changes` is no longer `seen`, or time is up."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_changes != seen, timeout_s)

    def wait_until_freed(self) -> bool:
        """Wait for the device to finish with the row released first; False if there is no such row."""
        with self._changed:
            delivery = self._being_freed[0][1] if self._being_freed else None
        if delivery is None:
            return False
        delivery.wait_until_free()
        return True

    def _take_back_free(self) -> None:
        while self._being_freed and self._being_freed[0][1].is_free():
            self._free(self._being_freed.popleft()[0])

    def _free(self, reservation: Reservation) -> None:
        if reservation.own is not None:
            reservation.own.in_use -= 1
            self._own_rows -= 1
            self._own_bytes -= reservation.num_bytes
        else:
            self._shared_rows -= 1
            self._shared_bytes -= reservation.num_bytes
