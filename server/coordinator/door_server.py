"""The process of the door: uvicorn with what it lacks, peer certificates and limits of connections.

    python -m anabranch.server.coordinator.door_server FOLDER SOCKET

A connection has asyncio's 60 s for its TLS handshake and REQUEST_S for each request's head. An
address has at most so many connections at a time, and a site SITE_MOST: beyond that it is cut off.
Those that have shown no certificate are counted before TLS begins (gate.py).
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from uvicorn.protocols.http.h11_impl import H11Protocol

from anabranch.protocols.errors import AnabranchError
from anabranch.server.coordinator.child import end_with_parent
from anabranch.server.coordinator.door import PEER, Door, server_context
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.gate import Gate
from anabranch.server.coordinator.settings import split_address
from anabranch.server.superlink import SuperLink

REQUEST_S = 20.0
MAX_HEAD = 16 << 10  # bytes of a request's line and headers
REFRESH_S = 1.0
SITE_MOST = 16  # connections of one site; an agent has three

log = logging.getLogger(__name__)


class PeerProtocol(H11Protocol):
    """HTTP/1.1 that tells the application who its peer is, and does not wait for ever."""

    held: ClassVar[Counter[str]] = Counter()  # connections, by address, and by a site's key
    most: ClassVar[int] = 64  # of one address
    gate: ClassVar[Gate | None] = None

    def connection_made(self, transport: Any) -> None:
        """Take a connection, unless its address has too many."""
        super().connection_made(transport)
        secure = transport.get_extra_info("ssl_object")
        peer = secure.getpeercert(True) if secure else None
        name = transport.get_extra_info("peername")
        if peer is not None and self.gate is not None:
            self.gate.knows(name)
        self._held_as = {(name or ("?",))[0]: self.most}
        if peer is not None:
            self._held_as[_key_of(peer)] = SITE_MOST
        self.held.update(self._held_as.keys())
        self._idle: asyncio.TimerHandle | None = None
        inner = self.app

        async def with_peer(scope: Any, receive: Any, send: Any) -> None:
            self._wait(False)
            scope[PEER] = peer
            await inner(scope, receive, send)

        self.app = with_peer
        if any(self.held[one] > most for one, most in self._held_as.items()):
            transport.abort()
            return
        self._wait(True)

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        self._wait(True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._wait(False)
        for one in self._held_as:
            self.held[one] -= 1
            if not self.held[one]:
                del self.held[one]
        super().connection_lost(exc)

    def _wait(self, on: bool) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if on and not self.transport.is_closing():
            self._idle = self.loop.call_later(REQUEST_S, self.transport.abort)


def _key_of(peer: bytes) -> str:
    """Return what stands for the key of a certificate (DER): a renewed one has the same."""
    return x509.load_der_x509_certificate(peer).public_key().public_bytes(*_SPKI).hex()


_SPKI = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def bounded(app: Any, connections: int, **more: Any) -> uvicorn.Config:
    """Return how a port that others can reach is served: HTTP/1.1 alone, in bounds, saying little.

    `connections`: open at once, of everybody. `more`: what else uvicorn.Config takes.
    """
    return uvicorn.Config(
        app,
        http=PeerProtocol,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        date_header=False,
        h11_max_incomplete_event_size=MAX_HEAD,
        limit_concurrency=connections,
        timeout_keep_alive=int(REQUEST_S),
        **more,
    )


async def serve(federation: Federation, link: SuperLink) -> None:
    """Serve the door until the process is told to end."""
    settings = federation.settings
    context = server_context(federation)
    door = Door(federation, link)
    limits = settings.limits
    PeerProtocol.most = limits.connections_per_address
    PeerProtocol.gate = gate = Gate(
        *split_address(settings.bind),
        connections=limits.connections,
        per_address=limits.connections_per_address,
    )
    config = bounded(
        door,
        limits.connections,
        timeout_graceful_shutdown=3,
        ssl_certfile=str(federation.server_credentials()[1]),
        ssl_keyfile=str(federation.server_credentials()[0]),
    )
    config.load()
    config.ssl = context
    server = uvicorn.Server(config)

    async def keep_up() -> None:
        while not server.should_exit:
            try:
                door.refresh(context, time.time())
            except (AnabranchError, OSError) as error:
                context.verify_mode = ssl.CERT_REQUIRED  # nobody is let in on what is not known
                log.error("invitations and certificate: %s", error)
            await asyncio.sleep(REFRESH_S)

    keeping = asyncio.create_task(keep_up())
    try:
        await server.serve(sockets=[gate])
    finally:
        keeping.cancel()


def main(folder: Path, socket: Path) -> None:
    """Run the process."""
    end_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells every request
    asyncio.run(serve(Federation(folder), SuperLink(socket)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
