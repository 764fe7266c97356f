"""The process of the door: uvicorn with what it lacks, peer certificates and limits of connections.

    python -m anabranch.server.coordinator.door_server FOLDER SOCKET

A connection has asyncio's 60 s for its TLS handshake and REQUEST_S for each request's head, and an
address has at most so many connections at a time: beyond that it is cut off.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from anabranch.server.coordinator.child import end_with_parent
from anabranch.server.coordinator.door import PEER, Door, server_context
from anabranch.server.coordinator.folder import Federation
from anabranch.server.superlink import SuperLink

REQUEST_S = 20.0
MAX_HEAD = 16 << 10  # bytes of a request's line and headers
REFRESH_S = 1.0

log = logging.getLogger(__name__)


class PeerProtocol(H11Protocol):
    """HTTP/1.1 that tells the application who its peer is, and does not wait for ever."""

    held: ClassVar[Counter[str]] = Counter()  # connections, by address
    most: ClassVar[int] = 64  # of one address

    def connection_made(self, transport: Any) -> None:
        """Take a connection, unless its address has too many."""
        super().connection_made(transport)
        secure = transport.get_extra_info("ssl_object")
        peer = secure.getpeercert(True) if secure else None
        self._address = (transport.get_extra_info("peername") or ("?",))[0]
        self.held[self._address] += 1
        self._idle: asyncio.TimerHandle | None = None
        inner = self.app

        async def with_peer(scope: Any, receive: Any, send: Any) -> None:
            self._wait(False)
            scope[PEER] = peer
            await inner(scope, receive, send)

        self.app = with_peer
        if self.held[self._address] > self.most:
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
        self.held[self._address] -= 1
        if not self.held[self._address]:
            del self.held[self._address]
        super().connection_lost(exc)

    def _wait(self, on: bool) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if on and not self.transport.is_closing():
            self._idle = self.loop.call_later(REQUEST_S, self.transport.abort)


async def serve(federation: Federation, link: SuperLink) -> None:
    """Serve the door until the process is told to end."""
    settings = federation.settings
    context = server_context(federation)
    door = Door(federation, link)
    host, _, port = settings.bind.rpartition(":")
    PeerProtocol.most = settings.limits.connections_per_address
    config = uvicorn.Config(
        door,
        host=host.strip("[]"),
        port=int(port),
        http=PeerProtocol,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        date_header=False,
        h11_max_incomplete_event_size=MAX_HEAD,
        limit_concurrency=settings.limits.connections,
        timeout_keep_alive=int(REQUEST_S),
        timeout_graceful_shutdown=3,
        ssl_certfile=str(federation.server_credentials()[1]),
        ssl_keyfile=str(federation.server_credentials()[0]),
    )
    config.load()
    config.ssl = context
    server = uvicorn.Server(config)

    async def keep_up() -> None:
        while not server.should_exit:
            door.refresh(context, time.time())
            await asyncio.sleep(REFRESH_S)

    keeping = asyncio.create_task(keep_up())
    try:
        await server.serve()
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
