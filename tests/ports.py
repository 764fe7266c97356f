"""Ports of this machine that nobody listens at."""

from __future__ import annotations

import socket

_GIVEN: set[int] = set()


def free_port() -> int:
    """Return a port that is free, and that was not returned before."""
    while True:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
        if port not in _GIVEN:
            _GIVEN.add(port)
            return port
