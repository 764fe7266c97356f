"""HTTP over a Unix socket: a client for one, and what an application behind one needs."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpcore
import httpx
from starlette.middleware import Middleware

KEEPALIVE_S = 5.0


def client(path: Path, base: str, timeout_s: float) -> httpx.Client:
    """Return a client whose every request goes to the socket at `path`; `base` stands in them."""
    transport = httpx.HTTPTransport(verify=False)  # no TLS on a socket: no authorities are read
    transport._pool = httpcore.ConnectionPool(
        uds=str(path), network_backend=_Sockets(), keepalive_expiry=KEEPALIVE_S
    )
    return httpx.Client(transport=transport, base_url=base, timeout=timeout_s)


class _Sockets(httpcore.SyncBackend):
    """Connects Unix sockets; httpcore alone leaves those open that cannot be connected."""

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Any = None
    ) -> httpcore.NetworkStream:
        """Return a connected stream."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
            except OSError as error:
                raise httpcore.ConnectError(str(error)) from None
        return super().connect_unix_socket(path, timeout, socket_options)


def whole_bodies(app: Callable[..., Any]) -> Callable[..., Any]:
    """Return `app` with each body handed to it in one part.

    Flower's middlewares spend a millisecond on every part.
    """

    async def served(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        parts, left = [], True
        while left:
            event = await receive()
            if event["type"] != "http.request":
                return  # it was cut off
            parts.append(event.get("body", b""))
            left = event.get("more_body", False)
        whole = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def received() -> Any:
            return whole.pop() if whole else await receive()

        await app(scope, received, send)

    return served


class Only:
    """A middleware that only requests under `prefix` go through; all others pass it by."""

    def __init__(self, app: Callable[..., Any], inner: Middleware, prefix: str) -> None:
        self._app, self._prefix = app, prefix
        self._inner: Callable[..., Any] = inner.cls(app, *inner.args, **inner.kwargs)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        through = scope["type"] != "http" or scope["path"].startswith(self._prefix)
        await (self._inner if through else self._app)(scope, receive, send)
