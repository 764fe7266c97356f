"""The process of the page.

    python -m anabranch.server.coordinator.page.server FOLDER

It listens where coordinator.toml says. On this machine's own addresses that is HTTP, for whoever
has the token; elsewhere it is TLS 1.3 with the coordinator's certificate, or nothing: a token never
crosses a network in the clear. Over TLS a site may show its certificate in place of a token.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import sys
import threading
import time
from pathlib import Path

import uvicorn

from anabranch.protocols.errors import AnabranchError, ConfigError
from anabranch.server.coordinator.child import end_with_parent
from anabranch.server.coordinator.door import server_context
from anabranch.server.coordinator.door_server import bounded
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.page.access import is_loopback
from anabranch.server.coordinator.page.app import application
from anabranch.server.coordinator.page.trackers import Trackers
from anabranch.server.coordinator.page.view import Watcher
from anabranch.server.coordinator.settings import split_address

CONNECTIONS = 128  # open at once, of everybody
RENEW_S = 60.0  # between two looks for a renewed certificate

log = logging.getLogger(__name__)


def require_safe(host: str, *, tls: bool) -> None:
    """Raise ConfigError for a page that others could reach without TLS."""
    if not tls and not is_loopback(host):
        raise ConfigError(
            f"coordinator.toml: page: {host} can be reached from other machines, and without TLS "
            "its token could be read on the way; take 127.0.0.1"
        )


def config_of(
    federation: Federation, *, tls: bool | None = None, trackers: Trackers | None = None
) -> uvicorn.Config:
    """Return how the page is served; `tls` None: as its address needs.

    Raises ConfigError for an address that others can reach, without TLS.
    """
    host, port = split_address(federation.settings.page)
    tls = not is_loopback(host) if tls is None else tls
    require_safe(host, tls=tls)
    watcher = Watcher(federation)
    seen = (lambda view: view) if trackers is None else trackers.alerted
    app = application(
        lambda: federation.state,
        federation.page_token,
        lambda: seen(watcher.view(time.time())),
        secure=tls,
    )
    config = bounded(app, CONNECTIONS, host=host, port=port, timeout_graceful_shutdown=1)
    config.load()
    if tls:
        config.ssl = page_context(federation)
        config.ssl_certfile = str(federation.server_credentials()[1])
    return config


def page_context(federation: Federation) -> ssl.SSLContext:
    """Return TLS 1.3 with the coordinator's certificate; a client's is welcome, not needed."""
    context = server_context(federation)
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


async def serve(federation: Federation) -> None:
    """Serve the page, and feed the trackers, until the process is told to end."""
    trackers, stop = Trackers(federation), threading.Event()
    config = config_of(federation, trackers=trackers)
    server = uvicorn.Server(config)
    if trackers.wanted:
        threading.Thread(target=trackers.follow, args=(stop,), name="tracking", daemon=True).start()

    async def keep_up() -> None:
        while not server.should_exit:
            await asyncio.sleep(RENEW_S)
            if config.ssl is None:
                continue
            try:
                key, certificate = federation.server_credentials()
                config.ssl.load_cert_chain(certificate, key)
            except (AnabranchError, OSError) as error:
                log.error("certificate: %s", error)

    keeping = asyncio.create_task(keep_up())
    try:
        await server.serve()
    finally:
        keeping.cancel()
        stop.set()


def main(folder: Path) -> None:
    """Run the process."""
    end_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    asyncio.run(serve(Federation(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
