"""The page, its data and the metrics: an ASGI application that reads, and changes nothing.

    GET /           the page; with ?token= once, for a cookie
    GET /events     server-sent events: "view" with the whole view at once, then at most one every
                    EVERY_S and only if it shows something else; "trouble" with a sentence while
                    there is none; "still" after HEARTBEAT_S without any, so that a browser
                    knows that the line is up
    GET /api/view   the view as JSON
    GET /metrics    Prometheus
    GET /healthz    whether the state can be read: no more than that is said without a token
    GET /*.css …    the page's files

Whatever is not GET or HEAD is refused (405). The page asks nobody but this server: its
Content-Security-Policy lets a browser load and call nothing else, and run no script that is not a
file of ours. All requests together look at the state once in EVERY_S.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Final

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import (
    HTMLResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anabranch.protocols.errors import AnabranchError
from anabranch.server.coordinator.page.access import (
    Viewer,
    by_certificate,
    by_token,
    cookie_name,
    cookie_value,
    same,
)
from anabranch.server.coordinator.page.metrics import CONTENT_TYPE, metrics_text
from anabranch.server.coordinator.page.shown import View
from anabranch.server.coordinator.page.view import seen_by
from anabranch.server.coordinator.state import State

EVERY_S: Final = 1.0
HEARTBEAT_S: Final = 15.0
STREAMS: Final = 32  # open at once; beyond, 503
PEER: Final = "anabranch.peer"  # in a request's scope: the peer's certificate (DER)

FILES: Final = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "words.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
SAFE_HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
SIGN_IN: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Anabranch: not signed in</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="/icon.svg"><link rel="stylesheet" href="/page.css"></head>
<body><main><h1>Not signed in</h1>
<p>The coordinator's operator gets the address with its token by
<code>anabranch coordinator token</code>: <code>/?token=</code> and what is in the file
<code>page.token</code> of the federation's folder.</p>
<p>If you have come here by a link that had the token in it, <a href="/">open the page again</a>.
</p></main></body></html>
"""


@dataclass(eq=False)
class Feed:
    """One look at the federation for everybody who asks within EVERY_S."""

    look: Callable[[], View]
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    every_s: float = EVERY_S
    streams: int = 0
    _looked: float | None = None
    _found: View | AnabranchError | None = None
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def latest(self) -> View:
        """Return a view that is at most EVERY_S old; raise what looking raised."""
        async with self._turn:
            now = self.clock()
            if self._looked is None or now - self._looked >= self.every_s:
                try:
                    self._found = await run_in_threadpool(self.look)
                except AnabranchError as error:
                    self._found = error
                self._looked = now
        if isinstance(self._found, AnabranchError):
            raise self._found
        assert self._found is not None
        return self._found

    async def events(self, viewer: Viewer) -> AsyncIterator[bytes]:
        """Yield server-sent events for one viewer, for as long as it listens."""
        before: View | None = None
        view: View | None
        trouble, sent = "", 0.0
        self.streams += 1
        try:
            while True:
                try:
                    view, said = shown_to(viewer, await self.latest()), ""
                except AnabranchError as error:
                    view, said = None, str(error)
                if view is not None and (trouble or not view.same(before)):
                    yield sse("view", msgspec.json.encode(view))
                    before, sent = view, self.clock()
                elif said and said != trouble:
                    yield sse("trouble", msgspec.json.encode({"message": said}))
                    sent = self.clock()
                elif self.clock() - sent >= HEARTBEAT_S:
                    yield sse("still", msgspec.json.encode({"at": self.now()}))
                    sent = self.clock()
                trouble = said
                await asyncio.sleep(self.every_s)
        finally:
            self.streams -= 1


def sse(event: str, data: bytes) -> bytes:
    """Return one server-sent event; JSON has no line ends of its own."""
    return b"event: " + event.encode() + b"\ndata: " + data + b"\n\n"


def shown_to(viewer: Viewer, view: View) -> View:
    """Return what this viewer may see."""
    return seen_by(view, viewer.site) if viewer.site else view


def application(
    state: Callable[[], State],
    token: Callable[[], str],
    look: Callable[[], View],
    *,
    secure: bool = False,
    now: Callable[[], float] = time.time,
    every_s: float = EVERY_S,
) -> ASGIApp:
    """Return the application. `secure`: it is served over TLS, so the cookie travels by that alone.

    `token` and `state` are asked for every request: a token that was replaced counts at once.
    """
    feed = Feed(look, now=now, every_s=every_s)

    async def viewer(request: Request) -> Viewer | None:
        headers = request.headers
        by = by_token(token(), headers.get("authorization", ""), headers.get("cookie", ""))
        if by is not None or request.scope.get(PEER) is None:
            return by
        return await run_in_threadpool(by_certificate, request.scope[PEER], state(), now())

    async def page(request: Request) -> Response:
        secret, given = token(), request.query_params.get("token")
        if given is not None:
            return _enter(secret, secure) if same(given, secret) else _refused(request)
        if await viewer(request) is None:
            return _refused(request)
        return HTMLResponse(_file("page.html"))

    async def view(request: Request) -> Response:
        who = await viewer(request)
        if who is None:
            return _refused(request)
        data = msgspec.json.encode(shown_to(who, await feed.latest()))
        return Response(data, media_type="application/json")

    async def metrics(request: Request) -> Response:
        who = await viewer(request)
        if who is None:
            return _refused(request)
        text = metrics_text(shown_to(who, await feed.latest()))
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def events(request: Request) -> Response:
        who = await viewer(request)
        if who is None:
            return _refused(request)
        if feed.streams >= STREAMS:
            text = f"{STREAMS} pages are open already; close one\n"
            return PlainTextResponse(text, 503, headers={"retry-after": "10"})
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        return StreamingResponse(
            feed.events(who),
            media_type="text/event-stream",
            headers={"x-accel-buffering": "no"},
        )

    async def health(request: Request) -> Response:
        await feed.latest()
        return PlainTextResponse("ok\n")

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/api/view", view),
            Route("/events", events),
            Route("/metrics", metrics),
            Route("/healthz", health),
            *(Route(f"/{name}", _static(name)) for name in FILES),
        ],
        exception_handlers={AnabranchError: _unavailable},
    )
    return _ReadOnly(app)


@dataclass(frozen=True)
class _ReadOnly:
    """Refuses what is not GET or HEAD, and gives every answer the headers that keep it safe."""

    inner: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SAFE_HEADERS.items():
                    headers[name] = value
            await send(message)

        if scope["method"] in ("GET", "HEAD"):
            await self.inner(scope, receive, with_headers)
            return
        answer = PlainTextResponse(
            "this page is for reading\n", 405, headers={"allow": "GET, HEAD"}
        )
        await answer(scope, receive, with_headers)


def _enter(secret: str, secure: bool) -> Response:
    """Return the cookie, and the page without the token in its address."""
    answer = RedirectResponse("/", 303)
    answer.set_cookie(
        cookie_name(secret),
        cookie_value(secret),
        httponly=True,
        samesite="strict",
        secure=secure,
        path="/",
    )
    return answer


def _refused(request: Request) -> Response:
    headers = {"www-authenticate": 'Bearer realm="anabranch"'}
    if "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(SIGN_IN, 401, headers=headers)
    return PlainTextResponse("a token or a client certificate is needed\n", 401, headers=headers)


async def _unavailable(_: Request, error: Exception) -> Response:
    return PlainTextResponse(f"{error}\n", 503)


def _static(name: str) -> Callable[[Request], Response]:
    def file(_: Request) -> Response:
        return Response(_file(name), headers={"content-type": FILES[name]})

    return file


def _file(name: str) -> bytes:
    return files("anabranch.server.coordinator.page").joinpath(name).read_bytes()
