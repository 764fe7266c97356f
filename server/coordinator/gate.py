"""The socket of the public port: whoever has not shown a certificate holds no place for long.

A connection counts from the moment it is accepted, before TLS has begun: an address has at most
so many that have shown no certificate, and all addresses together at most STRANGERS of the port's
connections. Beyond that the oldest of them is cut off: a site that comes shows its certificate in a
few round trips, and whoever only holds connections makes room for it.
"""

from __future__ import annotations

import socket
from collections import Counter
from typing import Any

Peer = tuple[Any, ...]  # as the system names it: (address, port, …)
STRANGERS = 0.5  # of the port's connections


class Gate(socket.socket):
    """A listening socket at host and port, for an event loop to accept from."""

    def __init__(self, host: str, port: int, *, connections: int, per_address: int) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        super().__init__(family, kind, protocol)
        self._most, self._per_address = max(1, int(STRANGERS * connections)), per_address
        self._strangers: dict[Peer, Visitor] = {}  # the oldest first
        self._addresses: Counter[str] = Counter()  # of strangers
        try:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.bind(address)
        except OSError as error:
            self.close()
            raise OSError(
                error.errno,
                f"{host} port {port} cannot be listened on ({error.strerror}): end what uses it, "
                "or give another one in coordinator.toml",
            ) from None
        self.setblocking(False)

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection that is let in; BlockingIOError if there is none."""
        while True:
            accepted, peer = super().accept()
            if self._addresses[peer[0]] < self._per_address:
                break
            accepted.close()
        if len(self._strangers) >= self._most:
            oldest, visitor = next(iter(self._strangers.items()))
            self.knows(oldest)
            visitor.cut_off()
        visitor = Visitor(accepted, peer, self)
        self._strangers[peer] = visitor
        self._addresses[peer[0]] += 1
        return visitor, peer

    def knows(self, peer: Peer | None) -> None:
        """A connection is a stranger's no longer: it has shown a certificate, or is closed."""
        if peer is None or self._strangers.pop(peer, None) is None:
            return
        self._addresses[peer[0]] -= 1
        if not self._addresses[peer[0]]:
            del self._addresses[peer[0]]

    @property
    def strangers(self) -> int:
        """Return how many connections have shown no certificate."""
        return len(self._strangers)


class Visitor(socket.socket):
    """A connection that tells its gate when it is closed."""

    def __init__(self, accepted: socket.socket, peer: Peer, gate: Gate) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self._peer, self._gate = peer, gate

    def cut_off(self) -> None:
        """End it; whoever serves it finds that out as if the peer had gone."""
        try:
            self.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has gone

    def close(self) -> None:
        """Close it."""
        self._gate.knows(self._peer)
        super().close()
