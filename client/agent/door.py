"""A site's side of the coordinator's door: JSON over HTTPS (protocols/identity/join.py).

Every failure is one of two kinds, so that a caller knows whether to try again:

    RunError        not reached, overloaded, in between, clocks: try again later, with backoff
      CutOff        it ended the connection without an answer
    ProtocolError   refused, or not our coordinator: asking again changes nothing
      Refused       the coordinator said no; `code` is its word

The first connection of a site is pinned: the server shows its authority's certificate in the
handshake; the one whose SHA-256 the invitation names is trusted, alone, in a second and verified
connection, and only then the secret is sent. Proxies of the environment are not used.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Self

import httpx
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client.agent.identity import Identity, trusting
from anabranch.client.agent.status import plain
from anabranch.protocols.errors import AnabranchError, MalformedMessage, ProtocolError, RunError
from anabranch.protocols.identity import authority, join
from anabranch.protocols.identity.invitation import Invitation
from anabranch.protocols.identity.peer import announce
from anabranch.protocols.messages import M

TIMEOUT_S = 20.0  # to connect, and for each piece of an answer
ANSWER_S = 60.0  # for a whole answer
MAX_CHAIN = 8  # certificates of a handshake that are looked at
AGAIN = frozenset({408, 425, 429})  # statuses below 500 that pass with time

CERTIFICATE, CLOSED = "certificate", "no invitation is open"  # codes of Refused that are ours

# X509_V_ERR_* of OpenSSL's x509_vfy.h
NOT_YET, OVER = 9, 10
WRONG_HOST = frozenset({62, 64})

# Alerts of RFC 8446 §6.2 with which a server turns a client's certificate down.
_ALERTS = {
    "CERTIFICATE_EXPIRED": "this site's certificate has expired",
    "CERTIFICATE_REVOKED": "this site's certificate is revoked",
    "UNKNOWN_CA": "the coordinator does not know the authority of this site's certificate",
    "BAD_CERTIFICATE": "the coordinator does not accept this site's certificate",
    "CERTIFICATE_UNKNOWN": "the coordinator does not accept this site's certificate",
    "CERTIFICATE_REQUIRED": "the coordinator asks for a certificate, and none was taken",
    "ACCESS_DENIED": "the coordinator denies access to this site's certificate",
}
_JOIN_AGAIN = (
    "; nothing was done. Ask the coordinator's operator for a new invitation, then "
    "`anabranch site leave --offline` and `anabranch site join`"
)


class Refused(ProtocolError):
    """The coordinator said no. `code` is for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class CutOff(RunError):
    """The coordinator ended a connection without an answer. Some do where TLS would say why."""


class Door:
    """Calls of a joined site, one at a time; threads may share one. `close` it at the end.

    Raises RunError (try again) or ProtocolError (do not), as said above.
    """

    def __init__(self, identity: Identity, timeout_s: float = TIMEOUT_S) -> None:
        self.identity = identity
        self._timeout_s = timeout_s
        self._one = threading.RLock()
        self._client = _client(identity.address, identity.context(), timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def hello(self) -> join.Hello:
        """Return the coordinator's clock and version."""
        return self._call("GET", join.HELLO, None, join.Hello)

    def report(self, report: join.Report) -> join.Heard:
        """Say what the site is doing."""
        return self._call("POST", join.REPORT, report, join.Heard)

    def leave(self, reason: str = "") -> join.Heard:
        """Ask to be removed."""
        return self._call("POST", join.LEAVE, join.Leave(reason=plain(reason)), join.Heard)

    def renew(self) -> None:
        """Get and keep a new certificate for the same key, and go on with it.

        The peer key is announced along: so does one that was made after the site joined.
        """
        request = authority.certificate_request(self.identity.key())
        root = self.identity.coordinator.authority
        peer = announce(self.identity.peer_key(), request, root)
        asked = join.Renew(request=request.decode(), peer=peer)
        with self._one:
            renewed = self._call("POST", join.RENEW, asked, join.Renewed)
            self.identity.replace_certificate(renewed.certificate.encode())
            old = self._client
            self._client = _client(self.identity.address, self.identity.context(), self._timeout_s)
            old.close()

    def _call(self, method: str, path: str, message: msgspec.Struct | None, kind: type[M]) -> M:
        address = self.identity.address
        try:
            with self._one:
                return _call(self._client, address, method, path, message, kind)
        except CutOff:
            if time.time() <= self.identity.expires:
                raise
            said = _ALERTS["CERTIFICATE_EXPIRED"]
            raise Refused(CERTIFICATE, f"coordinator {address}: {said}{_JOIN_AGAIN}") from None


def renew_if_needed(identity: Identity, door: Door, now: float, asked: bool = False) -> bool:
    """Renew the certificate if less than a third of its time is left, or the coordinator asked.

    Returns whether it was renewed. Raises what `Door` does; the old certificate then stays.
    """
    if not (asked or identity.needs_renewal(now)):
        return False
    door.renew()
    return True


def pinned(invitation: Invitation, timeout_s: float = TIMEOUT_S) -> x509.Certificate:
    """Return the authority that the invitation names, as its coordinator shows it.

    Nothing is sent. Raises RunError if nobody answers, ProtocolError if it is somebody else.
    """
    for certificate in _chain(invitation, timeout_s):
        if authority.fingerprint(certificate) == invitation.authority:
            return certificate
    raise ProtocolError(
        f"{invitation.address}: this is not the coordinator that invited you: it does not show "
        f"the authority {invitation.authority[:16]}… of the invitation. Nothing was sent. Check "
        "the address with the coordinator's operator, and whether a proxy in between opens TLS"
    )


def join_door(
    invitation: Invitation,
    request: bytes,
    version: str,
    root: x509.Certificate,
    peer: Ed25519PrivateKey,
    timeout_s: float = TIMEOUT_S,
) -> join.Joined:
    """Send the secret and a certificate request over TLS that trusts `root` alone.

    `peer`, the key that other sites know this one by, is announced along. `root` is what `pinned`
    returned. Raises what `Door` does; no error holds the secret. A door at which no invitation is
    open lets nobody in without a certificate: Refused, code CLOSED.
    """
    if authority.fingerprint(root) != invitation.authority:
        raise ProtocolError("the authority is not the one that the invitation names")
    message = join.Join(
        secret=invitation.secret,
        request=request.decode(),
        version=version,
        peer=announce(peer, request, invitation.authority),
    )
    try:
        with _client(invitation.address, trusting(root), timeout_s) as client:
            return _call(client, invitation.address, "POST", join.JOIN, message, join.Joined)
    except Refused as error:
        if error.code != CERTIFICATE:
            raise
        raise Refused(
            CLOSED,
            f"coordinator {invitation.address}: no invitation is open there; this one was used or "
            "withdrawn, or has expired",
        ) from None


def _client(address: str, context: ssl.SSLContext, timeout_s: float) -> httpx.Client:
    return httpx.Client(
        base_url=f"https://{address}",
        verify=context,
        timeout=timeout_s,
        trust_env=False,  # no proxies, no .netrc
        follow_redirects=False,
        headers={"accept-encoding": "identity"},
    )


def _call(
    client: httpx.Client,
    address: str,
    method: str,
    path: str,
    message: msgspec.Struct | None,
    kind: type[M],
) -> M:
    content = None if message is None else join.encode(message)
    headers = {} if content is None else {"content-type": "application/json"}
    try:
        with client.stream(method, path, content=content, headers=headers) as response:
            body, status = _body(response, address), response.status_code
    except (httpx.HTTPError, httpx.StreamError, OSError) as error:
        raise _failed(address, error) from None
    if status == 200:
        return join.decode(body, kind)
    raise _refused(address, status, body)


def _body(response: httpx.Response, address: str) -> bytes:
    """Return the body as it came; refuse one that is too large or takes too long."""
    until = time.monotonic() + ANSWER_S
    body = bytearray()
    for piece in response.iter_raw():
        body += piece
        if len(body) > join.MAX_BODY:
            raise MalformedMessage(
                f"coordinator {address}: its answer has more than {join.MAX_BODY} bytes"
            )
        if time.monotonic() > until:
            raise RunError(f"coordinator {address}: its answer took more than {ANSWER_S:.0f} s")
    return bytes(body)


def _refused(address: str, status: int, body: bytes) -> AnabranchError:
    try:
        refusal = join.decode(body, join.Refusal)
        code, said = refusal.code, "".join(c for c in refusal.message if c.isprintable())
    except MalformedMessage:
        code, said = f"http-{status}", f"HTTP status {status} without a reason"
    text = f"coordinator {address}: {said}"
    if status >= 500 or status in AGAIN:
        return RunError(text)
    return Refused(code, text)


def _failed(address: str, error: Exception) -> AnabranchError:
    """Return what went wrong with a connection, as one of ours."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _unverified(address, cause)
        if isinstance(cause, ssl.SSLError):
            return _tls(address, cause)
    if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError | httpx.WriteError):
        return CutOff(
            f"coordinator {address} ended the connection without an answer: it is being started "
            "again, or it does not accept what this machine shows"
        )
    said = str(error) or type(error).__name__
    return RunError(
        f"coordinator {address} cannot be reached: {said}. Check that it runs, and that this "
        "machine's firewall lets connections to this address out"
    )


def _unverified(address: str, error: ssl.SSLCertVerificationError) -> AnabranchError:
    if error.verify_code in (NOT_YET, OVER):
        what = "is not valid yet" if error.verify_code == NOT_YET else "has expired"
        return RunError(
            f"coordinator {address}: its certificate {what} by this machine's clock, which says "
            f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC. Set the clock; if it is right, tell the "
            "coordinator's operator"
        )
    if error.verify_code in WRONG_HOST:
        host = address.rpartition(":")[0]
        return ProtocolError(
            f"coordinator {address}: its certificate is not for the host {host}. Nothing was "
            "sent. The operator adds the host to coordinator.toml, or invites with another address"
        )
    return ProtocolError(
        f"coordinator {address}: this is not the coordinator that invited you: its certificate is "
        f"not signed by the federation's authority ({error.verify_message}). Nothing was sent"
    )


def _tls(address: str, error: ssl.SSLError) -> AnabranchError:
    reason = error.reason or ""
    for word, said in _ALERTS.items():
        if word in reason:
            return Refused(CERTIFICATE, f"coordinator {address}: {said}{_JOIN_AGAIN}")
    if "VERSION" in reason or "PROTOCOL" in reason:
        return ProtocolError(
            f"coordinator {address}: it does not speak TLS 1.3 ({reason}). Nothing was sent. A "
            "proxy in between may not either"
        )
    return RunError(f"coordinator {address} cannot be reached: TLS failed ({reason or error})")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _chain(invitation: Invitation, timeout_s: float) -> list[x509.Certificate]:
    """Return the certificates that the server shows, unverified: the caller compares digests."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    try:
        with (
            socket.create_connection((invitation.host, invitation.port), timeout_s) as raw,
            context.wrap_socket(raw, server_hostname=invitation.host) as tls,
        ):
            shown = _shown(tls)[:MAX_CHAIN]
    except (OSError, ValueError) as error:
        raise _failed(invitation.address, error) from None
    found = []
    for der in shown:
        try:
            found.append(x509.load_der_x509_certificate(der))
        except ValueError:
            continue  # not the one we look for
    return found


def _shown(tls: ssl.SSLSocket) -> list[bytes]:
    """Return the peer's chain as DER. Public from Python 3.13; before, of the inner object."""
    public: Any = getattr(tls, "get_unverified_chain", None)
    if public is not None:
        return list(public())
    inner: Any = tls._sslobj  # type: ignore[attr-defined]
    return [ssl.PEM_cert_to_DER_cert(one.public_bytes()) for one in inner.get_unverified_chain()]
