"""How long a device waits before it calls again.

    k   failures in a row, 0 after a success         b, c   base and cap in seconds

    full jitter:     delay ~ U(0, min(c, b · 2ᵏ))
    a server's RetryWindow [lo, hi]:   delay ~ U(lo, hi), and never below lo

Full jitter: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015: it spreads
the calls of many clients over time better than a fixed or an equal-jitter delay. A window is the
server's pace steering (Bonawitz et al. 2019, arXiv:1902.01046, section 2.3).

Pure: the generator of random numbers is an argument.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

MAX_WINDOW_S = 7 * 86_400.0  # a gateway cannot silence a device for longer than a week,
MIN_WINDOW_S = 1.0  # nor make it call without a pause
_MAX_EXPONENT = 60  # 2⁶⁰ seconds are beyond any cap, and still a float


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """Base and cap of the delays, in seconds."""

    base_s: float = 2.0
    cap_s: float = 900.0

    def __post_init__(self) -> None:
        if not 0 < self.base_s <= self.cap_s:
            raise ValueError(
                f"expected 0 < base_s <= cap_s, got base_s={self.base_s}, cap_s={self.cap_s}"
            )

    def ceiling_s(self, failures: int) -> float:
        """Return the longest delay after so many failures in a row."""
        return min(self.cap_s, self.base_s * 2.0 ** min(max(failures, 0), _MAX_EXPONENT))

    def delay_s(self, failures: int, rng: random.Random) -> float:
        """Return a delay between 0 and `ceiling_s(failures)` seconds."""
        return rng.uniform(0.0, self.ceiling_s(failures))


@dataclass(frozen=True, kw_only=True)
class Window:
    """When a server wants to hear of a device again, in seconds from now.

    A window that ends before it begins, or is not between MIN_WINDOW_S and MAX_WINDOW_S, is cut to
    what is sensible: the server's numbers are not trusted with a device's future.
    """

    min_s: float
    max_s: float

    def __post_init__(self) -> None:
        low = min(max(self.min_s, MIN_WINDOW_S), MAX_WINDOW_S)
        object.__setattr__(self, "min_s", low)
        object.__setattr__(self, "max_s", min(max(self.max_s, low), MAX_WINDOW_S))

    def delay_s(self, rng: random.Random) -> float:
        """Return a delay within the window."""
        return rng.uniform(self.min_s, self.max_s)


def next_delay_s(
    failures: int, window: Window | None, backoff: Backoff, rng: random.Random
) -> float:
    """Return the delay before the next call: the window's, the back-off's, or the longer of both.

    Guarantees: never below the window's min_s; at most max(window.max_s, cap_s).
    """
    asked = window.delay_s(rng) if window is not None else 0.0
    jitter = backoff.delay_s(failures, rng) if failures or window is None else 0.0
    return max(asked, jitter)
