"""How often a peer may ask: token buckets, one per site, one per address for joins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

RENEWALS, RENEWAL_S = 10.0, 60.0  # of one site's certificate: at once, and one more each
MAX_PEERS = 10_000  # buckets that are remembered; beyond, those that are full are forgotten


class Limits(Protocol):
    """What coordinator.toml says of rates."""

    @property
    def requests_per_second(self) -> float:
        """Of one site, on average."""

    @property
    def joins_per_minute(self) -> float:
        """Attempts from one address, on average."""


class Buckets:
    """Token buckets. A bucket holds at most ten seconds' (joins: one minute's) worth."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._sites: dict[str, tuple[float, float]] = {}
        self._joins: dict[str, tuple[float, float]] = {}
        self._renewals: dict[str, tuple[float, float]] = {}
        self._rate, self._join_rate = limits.requests_per_second, limits.joins_per_minute / 60

    def take(self, peer: str) -> bool:
        """Whether a site may make one more request now."""
        return self._take(self._sites, peer, self._rate, 10 * self._rate)

    def take_join(self, address: str) -> bool:
        """Whether an address may try to join once more now."""
        return self._take(self._joins, address, self._join_rate, max(1.0, 60 * self._join_rate))

    def take_renewal(self, peer: str) -> bool:
        """Whether a site may have its certificate renewed now: each is signed, and written down."""
        return self._take(self._renewals, peer, 1 / RENEWAL_S, RENEWALS)

    def _take(
        self, buckets: dict[str, tuple[float, float]], key: str, rate: float, size: float
    ) -> bool:
        now = self._clock()
        left, at = buckets.get(key, (size, now))
        left = min(size, left + max(0.0, now - at) * rate)
        if len(buckets) >= MAX_PEERS and key not in buckets:
            full = [k for k, (n, t) in buckets.items() if n + (now - t) * rate >= size]
            for one in full or list(buckets)[: MAX_PEERS // 2]:
                del buckets[one]
        if left < 1.0:
            buckets[key] = (left, now)
            return False
        buckets[key] = (left - 1.0, now)
        return True
