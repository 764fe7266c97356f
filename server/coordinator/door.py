"""The one public port: TLS 1.3 with client certificates; a few of Flower's calls, and our own.

    from outside                            here
    no certificate, another authority's     the handshake fails
    no certificate, an invitation is open   POST /site/join and nothing else
    a site's certificate                    /site/*, and the Fleet calls in FLEET, forwarded to the
                                            SuperLink's socket

Before a body is read: the certificate's key must be that of an active site in the roster, and the
key that Flower's own headers claim; its rate and the size of its body are limited. What a Fleet
call says inside is judged by server/fleet_calls.py. Everything
else that a SuperLink serves (Control, Runtime, registration, app code, its documentation) has no
way in. A refusal is HTTP 4xx with a code and a sentence (protocols/identity/join.py).
"""

from __future__ import annotations

import asyncio
import base64
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.concurrency import run_in_threadpool

from anabranch.protocols.errors import AnabranchError, MalformedMessage, ProtocolError
from anabranch.protocols.identity import authority, join
from anabranch.server.coordinator import enrolment
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.limits import Buckets
from anabranch.server.coordinator.state import SiteEntry
from anabranch.server.fleet_calls import CALLS, PATH, PIECE, FleetCalls
from anabranch.server.superlink import BASE, SuperLink

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

FLEET = {f"{PATH}{call}" for call in CALLS}
PUBLIC_KEY = b"flwr-public-key"  # Flower's header: the node's key, PEM in base64
PROTOBUF = b"application/protobuf"
FORWARDED = (b"content-type", b"accept")  # and whatever begins with "flwr-"
STARTING_S = 15.0  # a site that joins waits so long for the SuperLink; it gives up after 20
TOLD, TOLD_S = 100, 3600.0  # lines in the audit log of refusals, in so many seconds
PEER = "anabranch.peer"  # in a request's scope: the peer's certificate (DER), None without

log = logging.getLogger(__name__)


class Refused(Exception):
    """Answered with HTTP `status`; nothing of the request has been taken over."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(eq=False)
class Door:
    """The ASGI application behind the public port."""

    federation: Federation
    link: SuperLink
    wall: Callable[[], float] = time.time
    buckets: Buckets = field(init=False)
    calls: FleetCalls = field(init=False)
    refused: dict[str, int] = field(default_factory=dict)  # code -> how often
    _told: set[tuple[str, str]] = field(default_factory=set)  # (code, address)
    _told_since: float = float("-inf")  # of the monotonic clock
    _invited: set[str] = field(default_factory=set)  # sites whose invitation has been used
    _http: httpx.AsyncClient | None = None

    def __post_init__(self) -> None:
        limits = self.federation.settings.limits
        self.buckets = Buckets(limits, self.wall)
        self.calls = FleetCalls(limits.max_message_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        try:
            status, kind, body = await self._heard(scope, receive)
        except Refused as refused:
            await self._note(scope, refused)
            said = join.Refusal(code=refused.code, message=join.plain(refused.message))
            status, kind, body = refused.status, b"application/json", join.encode(said)
        headers = [
            (b"content-type", kind),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        if status >= 400:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _heard(self, scope: Scope, receive: Receive) -> tuple[int, bytes, bytes]:
        """Return the answer; what is wrong at the coordinator itself is for its log alone."""
        try:
            return await self._answer(scope, receive)
        except AnabranchError as error:
            log.error("%s: %s", scope["path"][:100], error)
            raise Refused(503, "unavailable", "the coordinator cannot answer now") from None

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[int, bytes, bytes]:
        method, path, peer = scope["method"], scope["path"], scope.get(PEER)
        address = (scope.get("client") or ("?",))[0]
        if peer is None:
            if (method, path) != ("POST", join.JOIN):
                raise Refused(401, "no certificate", "a client certificate is needed here")
            return await self._join(address, scope, receive)
        key = _key_of(peer)
        if not self.buckets.take(key):
            raise Refused(429, "too many requests", "too many requests; try again later")
        site = await run_in_threadpool(self._site, peer)
        if path in FLEET and method == "POST":
            _require_own_key(scope, site)
            body = await _body(scope, receive, PIECE)
            await run_in_threadpool(self._site, peer)  # it may have been revoked meanwhile
            return await self._fleet(scope, site, body)
        if path.startswith("/site/"):
            return await self._own(site, method, path, scope, receive)
        raise Refused(404, "not served", "this is not served here")

    async def _join(self, address: str, scope: Scope, receive: Receive) -> tuple[int, bytes, bytes]:
        if not self.buckets.take_join(address):
            raise Refused(429, "too many requests", "too many attempts to join; try again later")
        body = await _body(scope, receive, join.MAX_BODY)

        def work() -> msgspec.Struct:
            asked = join.decode(body, join.Join)
            joined = enrolment.join(self.federation, asked, self.wall(), self._register)
            self._invited.add(joined.site)
            return joined

        return await _said(work)

    def _register(self, public_key: bytes) -> int:
        """Register a site; it may come while the SuperLink is being started."""
        self.link.wait_ready(STARTING_S)
        return self.link.register(public_key)

    async def _own(
        self, site: SiteEntry, method: str, path: str, scope: Scope, receive: Receive
    ) -> tuple[int, bytes, bytes]:
        if (method, path) == ("GET", join.HELLO):
            return await _said(lambda: enrolment.hello(self.federation, self.wall()))
        if method != "POST" or path not in (join.RENEW, join.REPORT, join.LEAVE):
            raise Refused(404, "not served", "this is not served here")
        if path == join.RENEW and not self.buckets.take_renewal(site.key):
            raise Refused(429, "too many requests", "too many renewals; try again later")
        body = await _body(scope, receive, join.MAX_BODY)

        def work() -> msgspec.Struct:
            now = self.wall()
            if path == join.RENEW:
                return enrolment.renew(self.federation, site, join.decode(body, join.Renew), now)
            if path == join.REPORT:
                report = join.decode(body, join.Report)
                return enrolment.report(self.federation, site, report, now)
            asked = join.decode(body, join.Leave)
            return enrolment.leave(self.federation, site, asked, now, self.link.unregister)

        return await _said(work)

    def _site(self, peer: bytes) -> SiteEntry:
        """Return the active site of a certificate."""
        certificate = x509.load_der_x509_certificate(peer)
        site = self.federation.state.site_by_key(_key_of(peer))
        if site is None:
            raise Refused(403, "not registered", "this site is not registered here; join again")
        if site.status != "active":
            why = f": {site.reason}" if site.reason else ""
            raise Refused(403, site.status, f"this site was {site.status} by the coordinator{why}")
        now = self.wall()
        if not certificate.not_valid_before_utc.timestamp() <= now:
            raise Refused(403, "not valid yet", "the certificate is not valid yet")
        if now > certificate.not_valid_after_utc.timestamp():
            raise Refused(403, "expired", "the certificate has expired; join again")
        if site.name in self._invited:  # it comes with its certificate for the first time
            self._invited.discard(site.name)
            self.federation.state.arrived(site.name)
        return site

    def refresh(self, context: ssl.SSLContext, now: float) -> None:
        """Let strangers knock only while an invitation is open; take up a renewed certificate.

        For connections that come from now on.
        """
        invitations = self.federation.state.open_invitations(now)
        self._invited = {one.site for one in invitations if one.used is not None}
        context.verify_mode = ssl.CERT_OPTIONAL if invitations else ssl.CERT_REQUIRED
        key, certificate = self.federation.server_credentials()
        context.load_cert_chain(certificate, key)

    async def _fleet(self, scope: Scope, site: SiteEntry, body: bytes) -> tuple[int, bytes, bytes]:
        """Answer a Fleet call, or have the SuperLink answer what a site may ask."""
        path = scope["path"]
        try:
            answer = self.calls.judge(site.key, path, body)
        except MalformedMessage as error:
            raise Refused(400, "malformed", str(error)) from None
        except ProtocolError as error:
            raise Refused(403, "refused", str(error)) from None
        if answer is not None:
            return 200, PROTOBUF, answer
        got = await self._forward(scope, body)
        if got[0] == 200:
            self.calls.answered(site.key, path, got[2])
        return got

    async def _forward(self, scope: Scope, body: bytes) -> tuple[int, bytes, bytes]:
        headers = [
            (name, value)
            for name, value in scope["headers"]
            if name in FORWARDED or name.startswith(b"flwr-")
        ]
        if self._http is None:
            transport = httpx.AsyncHTTPTransport(uds=str(self.link.socket))
            self._http = httpx.AsyncClient(transport=transport, base_url=BASE, timeout=60.0)
        try:
            got = await self._http.post(scope["path"], content=body, headers=headers)
        except httpx.TransportError:
            raise Refused(503, "starting", "the coordinator is starting again") from None
        kind = got.headers.get("content-type", "application/octet-stream")
        return got.status_code, kind.encode(), got.content

    async def _note(self, scope: Scope, refused: Refused) -> None:
        """Count a refusal; the audit log has one of a kind and an address, and TOLD in TOLD_S."""
        self.refused[refused.code] = self.refused.get(refused.code, 0) + 1
        if refused.status in (404, 429, 503):
            return
        now = time.monotonic()
        if now - self._told_since >= TOLD_S:
            self._told, self._told_since = set(), now
        key = (refused.code, (scope.get("client") or ("?",))[0])
        if key in self._told or len(self._told) >= TOLD:
            return
        self._told.add(key)
        try:
            await run_in_threadpool(
                self.federation.audit.append, "peer-refused", code=key[0], address=key[1]
            )
        except AnabranchError as error:
            log.error("the audit log: %s", error)  # it is refused all the same


def server_context(federation: Federation) -> ssl.SSLContext:
    """Return TLS 1.3 with the server's certificate, for clients of this federation alone."""
    key, certificate = federation.server_credentials()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # no session is resumed: every connection shows its certificate
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(federation.authority_file)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


async def _said(work: Callable[[], msgspec.Struct]) -> tuple[int, bytes, bytes]:
    """Return the JSON of what `work` says, or a refusal with its reason."""
    try:
        answer = await run_in_threadpool(work)
    except MalformedMessage as error:
        raise Refused(400, "malformed", str(error)) from None
    except ProtocolError as error:
        raise Refused(403, "refused", str(error)) from None
    except AnabranchError as error:
        raise Refused(503, "unavailable", str(error)) from None
    return 200, b"application/json", join.encode(answer)


async def _body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Return the body; refused before it is read if it says, or while it is, that it is larger."""
    declared = dict(scope["headers"]).get(b"content-length", b"")
    if declared and (not declared.isdigit() or int(declared) > limit):
        raise Refused(413, "too large", f"at most {limit} bytes are taken")
    parts, size = [], 0
    try:
        async with asyncio.timeout(120):
            while True:
                event = await receive()
                if event["type"] != "http.request":
                    raise Refused(400, "cut off", "the request was cut off")
                parts.append(event.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise Refused(413, "too large", f"at most {limit} bytes are taken")
                if not event.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise Refused(408, "too slow", "the request took more than 120 s") from None


def _key_of(peer: bytes) -> str:
    """Return the digest of the key of a certificate (DER) that TLS has verified."""
    key = x509.load_der_x509_certificate(peer).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise Refused(403, "not a site", "this certificate is not one of a site")
    return authority.key_digest(key)


def _require_own_key(scope: Scope, site: SiteEntry) -> None:
    """Refuse a call in the name of another node's key."""
    claimed = [value for name, value in scope["headers"] if name == PUBLIC_KEY]
    try:
        (encoded,) = claimed
        key = serialization.load_pem_public_key(base64.b64decode(encoded, validate=True))
        fits = isinstance(key, ec.EllipticCurvePublicKey) and authority.key_digest(key) == site.key
    except (ValueError, UnsupportedAlgorithm):
        fits = False
    if not fits:
        raise Refused(412, "another key", "the node's key is not that of the client certificate")
