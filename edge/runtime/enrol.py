"""A device enrols once: a one-time token and a certificate request against a certificate.

The operator hands over one string, the invitation:

    HOST:PORT/FINGERPRINT/SECRET
    address of the gateway's enrolment port; SHA-256 (64 hex digits) of its certificate authority's
    certificate in DER; the one-time token (URL-safe characters)

`anabranch edge gateway token` prints it (`Invitation.text`). The gateway sends the authority's
certificate in its TLS handshake, after its own. The device takes the one whose SHA-256 is the
fingerprint, trusts nothing else for this call, and only then sends the secret: whoever sits in
between learns nothing. With `--ca FILE` the certificate comes from the operator instead.

The private key (ECDSA, P-256) is made here and never leaves the device. gateway.json is written
last: a device is enrolled if it is there, so an interrupted enrolment leaves a device that is not.
"""

from __future__ import annotations

import platform
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from anabranch.edge.runtime.agent import FILE as MEMORY
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.spool import SUFFIX
from anabranch.edge.runtime.trust import KEY_BYTES, add_trusted
from anabranch.protocols.errors import DeviceError, MalformedMessage
from anabranch.protocols.identity.authority import (
    Key,
    certificate_pem,
    certificate_request,
    fingerprint,
    key_pem,
    new_key,
    read_certificate,
    read_private_key,
    to_be_renewed,
)
from anabranch.protocols.identity.invitation import Ticket
from anabranch.storage.files import write_atomic

if TYPE_CHECKING:
    from anabranch.edge.runtime.transport import Gateway

PRIVATE = 0o600
HANDSHAKE_S = 20.0
MAX_CHAIN = 8  # certificates of a handshake that are looked at
MAX_NAME = 256  # characters of the name that a gateway gives a device


@dataclass(frozen=True, kw_only=True)
class Invitation(Ticket):
    """What one device needs to enrol. The secret is good for one device; treat it as a password."""

    @classmethod
    def parse(cls, text: str) -> Invitation:
        """Return the invitation in a string, or raise DeviceError. The secret is never repeated."""
        found = cls.read(text.strip())
        if found is None:
            raise DeviceError(
                "token: expected HOST:PORT/FINGERPRINT/SECRET as `anabranch edge gateway token` "
                "prints it, in one piece"
            )
        return found


class Enrolled(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """gateway.json: the device's name, and where its gateway listens."""

    device: str
    address: str  # host:port


def read_enrolled(home: Home) -> Enrolled:
    """Return what the device is enrolled as; raise DeviceError if it is not."""
    try:
        return msgspec.json.decode(home.gateway.read_bytes(), type=Enrolled)
    except FileNotFoundError:
        raise DeviceError(
            f"{home.folder}: this device is not enrolled; run `anabranch edge enroll TOKEN`"
        ) from None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DeviceError(f"{home.gateway}: {error}; enrol again with --force") from None


def enrol(
    home: Home, invitation: Invitation, *, authority: bytes | None = None, force: bool = False
) -> Enrolled:
    """Enrol the device and write its key, certificate, authority, bundle keys and gateway.json.

    `authority`: the certificate authority as PEM, if the operator gave a file.

    Guarantees: the secret is sent only to a gateway whose certificate the invitation's authority
    signed; nothing is written unless the gateway's answer is a certificate of that authority for
    this device's key; gateway.json is written last. Bundle keys are added to those trusted. The
    task and the deltas of another enrolment are removed: what was trained for one gateway does
    not go to the next.

    Raises DeviceError: enrolled already and not `force`; another authority; the gateway refuses
    or cannot be reached; an answer that does not fit.
    """
    if home.gateway.exists() and not force:
        device = read_enrolled(home).device
        raise DeviceError(
            f"{home.folder}: this device is enrolled as {device!r}; --force enrols it anew"
        )
    root = _pinned(invitation, authority)
    key = new_key()
    reply = _call(invitation, root, certificate_request(key))
    certificate = _checked(reply.certificate, key, root)
    if _read(reply.authority, "the gateway's authority") != root:
        raise DeviceError(
            "the gateway's answer names another certificate authority than the token; ask its "
            "operator for a new token"
        )
    if any(len(public) != KEY_BYTES for public in reply.bundle_keys):
        raise DeviceError(f"the gateway's bundle keys: expected {KEY_BYTES} bytes each")
    if not 0 < len(reply.device) <= MAX_NAME or not reply.device.isprintable():
        raise DeviceError(f"the device's name: expected 1 to {MAX_NAME} printable characters")
    enrolled = Enrolled(device=reply.device, address=_address(reply.gateway, invitation.address))
    _store(home, key, certificate, root, list(reply.bundle_keys), enrolled)
    return enrolled


def renew(home: Home, gateway: Gateway, now: datetime | None = None) -> bool:
    """Replace the device's certificate if less than a third of its time is left.

    The key stays; the answer is checked as in `enrol`. Returns whether it was replaced.
    """
    from anabranch.edge.generated import edge_pb2

    old = _read(home.certificate.read_bytes(), str(home.certificate))
    if not to_be_renewed(old, now or datetime.now(UTC)):
        return False
    try:
        key = read_private_key(home.device_key.read_bytes(), "device.key")
    except MalformedMessage:
        raise DeviceError(f"{home.device_key}: not the key of this device; enrol again") from None
    reply = gateway.enroll(edge_pb2.EnrollRequest(certificate_request=certificate_request(key)))
    root = _read(home.authority.read_bytes(), str(home.authority))
    certificate = _checked(reply.certificate, key, root)
    write_atomic(home.certificate, certificate_pem(certificate))
    return True


def _store(
    home: Home,
    key: Key,
    certificate: x509.Certificate,
    root: x509.Certificate,
    bundle_keys: list[bytes],
    enrolled: Enrolled,
) -> None:
    """Write the identity; what was there stops counting first, gateway.json begins to last."""
    from anabranch.edge.runtime import task

    home.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    home.gateway.unlink(missing_ok=True)
    begun = task.remembered(home)
    if begun is not None:
        task.forget(home, begun)
    for path in (home.folder / MEMORY, home.peer_key, *home.spool.glob("*" + SUFFIX)):
        path.unlink(missing_ok=True)
    try:
        write_atomic(home.device_key, key_pem(key), PRIVATE)
        write_atomic(home.certificate, certificate_pem(certificate))
        write_atomic(home.authority, certificate_pem(root))
        for public in bundle_keys:
            add_trusted(home.trusted, public, enrolled.address)
        write_atomic(home.gateway, msgspec.json.encode(enrolled))
    except BaseException:
        for path in (home.gateway, home.device_key, home.certificate, home.authority):
            path.unlink(missing_ok=True)
        raise


def _pinned(invitation: Invitation, authority: bytes | None) -> x509.Certificate:
    """Return the certificate authority that the invitation names."""
    if authority is not None:
        offered = [_read(authority, "the certificate authority's file")]
        where = "the given file"
    else:
        offered = _chain(invitation)
        where = f"what {invitation.address} sends"
    for certificate in offered:
        if fingerprint(certificate) == invitation.authority:
            return certificate
    raise DeviceError(
        f"the token names the certificate authority {invitation.authority[:16]}…, which is not in "
        f"{where}: this may not be the gateway; nothing was sent. Ask its operator for a new "
        "token, or for the authority's file (--ca)"
    )


def _chain(invitation: Invitation) -> list[x509.Certificate]:
    """Return the certificates that the gateway shows, unverified: the caller compares digests."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((invitation.host, invitation.port), HANDSHAKE_S) as raw,
            context.wrap_socket(raw, server_hostname=invitation.host) as tls,
        ):
            return [x509.load_der_x509_certificate(der) for der in _shown(tls)[:MAX_CHAIN]]
    except (OSError, ValueError) as error:
        raise DeviceError(
            f"{invitation.address}: no TLS connection to the gateway ({error})"
        ) from None


def _shown(tls: ssl.SSLSocket) -> list[bytes]:
    """Return the peer's chain as DER. Public from Python 3.13; before, of the inner object."""
    public: Any = getattr(tls, "get_unverified_chain", None)
    if public is not None:
        return list(public())
    inner: Any = tls._sslobj  # type: ignore[attr-defined]
    return [ssl.PEM_cert_to_DER_cert(one.public_bytes()) for one in inner.get_unverified_chain()]


def _call(invitation: Invitation, root: x509.Certificate, request: bytes) -> Any:
    """Return the gateway's EnrollReply."""
    from anabranch.edge.generated import edge_pb2
    from anabranch.edge.runtime.transport import Gateway, tls_channel

    about = f"{platform.system()} {platform.machine()} Python {platform.python_version()}"
    message = edge_pb2.EnrollRequest(
        token=invitation.secret, certificate_request=request, platform=about
    )
    with Gateway(tls_channel(invitation.address, certificate_pem(root))) as gateway:
        return gateway.enroll(message)


def _read(pem: bytes, what: str) -> x509.Certificate:
    try:
        return read_certificate(pem, what)
    except MalformedMessage as error:
        raise DeviceError(str(error)) from None


def _checked(pem: bytes, key: Key, root: x509.Certificate) -> x509.Certificate:
    """Return the issued certificate if it is for this key, by this authority, and valid now."""
    certificate = _read(pem, "the certificate that the gateway issued")
    if certificate.public_key() != key.public_key():
        raise DeviceError("the certificate that the gateway issued is for another key")
    try:
        certificate.verify_directly_issued_by(root)
    except (InvalidSignature, ValueError, TypeError):
        raise DeviceError(
            "the certificate that the gateway issued is not signed by its certificate authority"
        ) from None
    if not certificate.not_valid_before_utc <= datetime.now(UTC) < certificate.not_valid_after_utc:
        raise DeviceError(
            f"the certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; set this device's clock"
        )
    return certificate


def _address(answered: str, enrolment: str) -> str:
    """Return where the gateway listens for devices: host:port, or the port beside enrolment's."""
    host, _, port = answered.rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise DeviceError(f"the gateway's address: expected host:port, got {answered[:80]!r}")
    return answered if host else f"{enrolment.rpartition(':')[0]}:{port}"


def read_authority(path: Path) -> bytes:
    """Return the operator's file, or raise DeviceError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DeviceError(f"{path}: {error.strerror or error}") from None


def digest_of_pem(pem: bytes) -> str:
    """Return the fingerprint of the certificate in PEM: what an invitation holds."""
    return fingerprint(_read(pem, "certificate"))
