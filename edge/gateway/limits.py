"""Who may call, how often, and how many at once: checked before a call does anything.

calls_at_once, calls_a_minute    in memory: a restart forgives a minute
bytes_a_day                      in the database: a restart forgives nothing
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from anabranch.edge.gateway.config import Limits
from anabranch.edge.gateway.refusals import Exhausted
from anabranch.edge.gateway.store import Store

MINUTE = 60.0
EVERYBODY = ""  # the caller of calls without a certificate
MANY = 4096  # callers that are remembered before idle ones are forgotten


class Quotas:
    """What each caller has used."""

    def __init__(self, limits: Limits, store: Store) -> None:
        self.limits, self._store = limits, store
        self._lock = threading.Lock()
        self._calls: dict[str, deque[float]] = {}
        self._now: dict[str, int] = {}

    @contextmanager
    def call(self, caller: str) -> Iterator[None]:
        """Count one call of this caller while it lasts; Exhausted names the quota."""
        self._begin(caller)
        try:
            yield
        finally:
            with self._lock:
                self._now[caller] -= 1
                if not self._now[caller]:
                    del self._now[caller]

    def require_bytes(self, device: str) -> int:
        """Return the bytes that a device may still move today; Exhausted if there are none."""
        left = self.limits.bytes_a_day - self._store.traffic(device, today())
        if left <= 0:
            raise Exhausted(
                f"bytes: {self.limits.bytes_a_day} a day are used up; come back after midnight UTC"
            )
        return left

    def count_bytes(self, device: str, count: int) -> None:
        """Add bytes that a device has fetched."""
        self._store.add_traffic(device, today(), count)

    def _begin(self, caller: str) -> None:
        now, everybody = time.monotonic(), caller == EVERYBODY
        a_minute = self.limits.enrolments_a_minute if everybody else self.limits.calls_a_minute
        at_once = self.limits.calls if everybody else self.limits.calls_at_once
        with self._lock:
            calls = self._calls.setdefault(caller, deque())
            while calls and calls[0] <= now - MINUTE:
                calls.popleft()
            if len(calls) >= a_minute:
                raise Exhausted(f"calls: {a_minute} a minute are allowed; wait a minute")
            if self._now.get(caller, 0) >= at_once:
                raise Exhausted(f"calls: {at_once} at once are allowed; end one first")
            calls.append(now)
            self._now[caller] = self._now.get(caller, 0) + 1
            if len(self._calls) > MANY:
                self._forget(now)

    def _forget(self, now: float) -> None:
        idle = [c for c, calls in self._calls.items() if not calls or calls[-1] <= now - MINUTE]
        for caller in idle:
            del self._calls[caller]


def today() -> int:
    """Return the number of this day, UTC."""
    return int(time.time()) // 86400
