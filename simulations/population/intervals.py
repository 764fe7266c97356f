"""Availability from a trace: the intervals in which each device was seen online.

Notation: client i has the intervals start[i] to start[i + 1] of begin and end, in seconds of
virtual time. With period[i] > 0 its trace repeats: what is at t is also at t + period[i].
"""

from __future__ import annotations

import math

import numpy as np

from anabranch.protocols.errors import ConfigError
from anabranch.simulations.population.devices import Flags, Floats, Ints


class Traced:
    """Intervals of N clients: start (N + 1,), begin and end (intervals,), period (N,).

    Raises ConfigError for intervals that are empty, overlap, touch, or leave [0, period].
    """

    def __init__(self, start: Ints, begin: Floats, end: Floats, period: Floats) -> None:
        owner = np.repeat(np.arange(len(period)), np.diff(start))
        self._period = np.where(period > 0, period, math.inf)
        if not ((begin >= 0) & (begin < end) & (end <= self._period[owner])).all():
            raise ConfigError("availability: expected 0 <= begin < end <= period for each interval")
        follows = (owner[1:] == owner[:-1]) & (begin[1:] <= end[:-1])
        if follows.any():
            raise ConfigError(
                f"availability: the intervals of device {int(owner[1:][follows][0])} overlap or "
                "touch, or are not in ascending order: merge and sort them"
            )
        self._start, self._begin, self._end = start, begin, end
        # One ascending key for all clients: owner, then begin.
        self._span = float(end.max(initial=0.0)) + 1.0
        self._key = owner * self._span + begin

    def online(self, clients: Ints, at: float) -> Flags:
        """Return which of `clients` are online."""
        if not len(self._key):
            return np.zeros(len(clients), np.bool_)
        local = self._place(clients, at)
        last = self._last(clients, local)
        now: Flags = (last >= self._start[clients]) & (local < self._end[np.maximum(last, 0)])
        return now

    def online_until(self, client: int, at: float) -> float:
        """Return the end of the present window; `at` itself if the client is offline.

        A window that ends with the period goes on where the next period begins with one.
        """
        lap, local = self._local(client, at)
        begin, end = self._of(client)
        now = np.flatnonzero((begin <= local) & (local < end))
        if not len(now):
            return at
        until, period = float(end[now[0]]), float(self._period[client])
        if until < period or math.isinf(period):
            return self._reached(client, lap, until)
        if begin[0] > 0.0:
            return self._reached(client, lap + 1, 0.0)
        return math.inf if end[0] == period else self._reached(client, lap + 1, float(end[0]))

    def next_online(self, client: int, at: float) -> float:
        """Return the first time >= `at` at which the client is online."""
        lap, local = self._local(client, at)
        begin, end = self._of(client)
        coming = begin[end > local]
        if len(coming):
            return at if coming[0] <= local else self._reached(client, lap, float(coming[0]))
        if not len(begin) or math.isinf(self._period[client]):
            return math.inf
        return self._reached(client, lap + 1, float(begin[0]))

    def next_change(self, at: float) -> float:
        """Return the first time > `at` at which any client comes or goes; infinity if never."""
        if not len(self._key):
            return math.inf
        clients = np.flatnonzero(np.diff(self._start))
        local = self._place(clients, at)
        last = self._last(clients, local)
        inside = (last >= self._start[clients]) & (local < self._end[np.maximum(last, 0)])
        next_ = np.maximum(last + 1, self._start[clients])
        more = next_ < self._start[clients + 1]
        begins = self._begin[np.minimum(next_, len(self._begin) - 1)]
        first = self._begin[self._start[clients]] + self._period[clients]
        wait = np.where(more, begins, first) - local
        wait = np.where(inside, self._end[np.maximum(last, 0)] - local, wait)
        # Rounded; of those that are first up to rounding the exact times decide. A window that
        # goes on over the end of its period is looked at exactly, too.
        near = wait <= wait.min() + 1e-6 * max(1.0, abs(at))
        while True:
            exact = min((self._next(int(client), at) for client in clients[near]), default=math.inf)
            missed = ~near & (at + wait < exact)
            if not missed.any():
                return exact
            near = missed & (wait <= wait[missed].min() + 1e-6 * max(1.0, abs(at))) | near

    def _next(self, client: int, at: float) -> float:
        until = self.online_until(client, at)
        return until if until > at else self.next_online(client, at)

    def _reached(self, client: int, lap: int, local: float) -> float:
        """Return the first moment of `lap` whose place in the period is at least `local`.

        lap · period + local may be rounded to just before it.
        """
        period = float(self._period[client])
        if math.isinf(period):
            return local
        at = lap * period + local
        while self._local(client, at) < (lap, local):
            at = math.nextafter(at, math.inf)
        return at

    def _local(self, client: int, at: float) -> tuple[int, float]:
        """Return which repetition of its trace the client is in, and the place in it."""
        period = float(self._period[client])
        if math.isinf(period):
            return 0, at
        local = at % period
        return round((at - local) / period), local

    def _of(self, client: int) -> tuple[Floats, Floats]:
        own = slice(int(self._start[client]), int(self._start[client + 1]))
        return self._begin[own], self._end[own]

    def _place(self, clients: Ints, at: float) -> Floats:
        period = self._period[clients]
        place: Floats = np.where(np.isfinite(period), np.mod(at, period), at)
        return place

    def _last(self, clients: Ints, local: Floats) -> Ints:
        """Return the last interval that begins at or before `local`; before a client's, none."""
        wanted = clients * self._span + np.minimum(local, self._span - 0.5)
        found: Ints = np.searchsorted(self._key, wanted, side="right").astype(np.int64) - 1
        # The key is rounded: look at the interval that was found and at its neighbours.
        first, end = self._start[clients], self._start[clients + 1]
        own = np.clip(found + 1, first, np.maximum(end - 1, first))
        own = np.minimum(own, len(self._begin) - 1)
        for _ in range(2):
            late = (own >= first) & (self._begin[np.maximum(own, 0)] > local)
            own = own - late
        return np.where((own >= first) & (own < end), own, first - 1)
