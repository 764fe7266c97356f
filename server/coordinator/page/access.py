"""Who may look: the page's token, or the certificate of an active site of the federation.

    Authorization: Bearer TOKEN     programs
    /?token=TOKEN                   a browser, once: answered with a cookie and a redirect, so that
                                    the token leaves the address bar and the history's last entry
    Cookie: anabranch_…=…           a browser from then on: HttpOnly, SameSite=Strict; a digest of
                                    the token, of no use elsewhere; its name, too, is of the token,
                                    as pages on other ports of a host share its cookies
    a client certificate            over TLS: the site sees itself, and nothing of other sites

Secrets are compared in constant time. Without any of these there is nothing to see.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from anabranch.protocols.identity.authority import key_digest
from anabranch.server.coordinator.settings import Settings, join_address, split_address
from anabranch.server.coordinator.state import State


@dataclass(frozen=True)
class Viewer:
    """Who looks: the operator, or a site."""

    site: str = ""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def page_address(settings: Settings) -> str:
    """Return where the page is: HTTP on this machine's own addresses, HTTPS elsewhere.

    If it listens on all addresses, the one by which sites know the coordinator.
    """
    host, port = split_address(settings.page)
    if is_loopback(host):
        return f"http://{settings.page}"
    if host in ("0.0.0.0", "::"):
        host = split_address(settings.address)[0]
    return f"https://{join_address(host, port)}"


def cookie_value(token: str) -> str:
    """Return what the browser keeps: HMAC-SHA-256 under the token, hex."""
    return hmac.new(token.encode(), b"anabranch page cookie", hashlib.sha256).hexdigest()


def cookie_name(token: str) -> str:
    """Return the name under which it keeps that: one for each federation."""
    digest = hmac.new(token.encode(), b"anabranch page cookie name", hashlib.sha256).hexdigest()
    return f"anabranch_{digest[:8]}"


def same(given: str, secret: str) -> bool:
    """Whether the two are equal, in a time that does not depend on where they differ."""
    return bool(secret) and hmac.compare_digest(given.encode(), secret.encode())


def by_token(token: str, authorization: str, cookies: str) -> Viewer | None:
    """Return the operator if the header or the cookie proves the token."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "bearer" and same(given.strip(), token):
        return Viewer()
    try:
        morsel = SimpleCookie(cookies).get(cookie_name(token))
    except CookieError:
        return None
    if morsel is not None and same(morsel.value, cookie_value(token)):
        return Viewer()
    return None


def by_certificate(peer: bytes | None, state: State, now: float) -> Viewer | None:
    """Return the active site of a certificate (DER) that TLS has verified."""
    if peer is None:
        return None
    certificate = x509.load_der_x509_certificate(peer)
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return None
    valid = certificate.not_valid_before_utc.timestamp() <= now
    valid = valid and now <= certificate.not_valid_after_utc.timestamp()
    site = state.site_by_key(key_digest(key))
    if not valid or site is None or site.status != "active":
        return None
    return Viewer(site.name)
