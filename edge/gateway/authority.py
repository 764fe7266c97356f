"""The gateway's certificate authority: ECDSA P-256, X.509 (RFC 5280).

    ca.key  ca.pem           self-signed, path length 0, ten years
    server.key  server.pem   for the hosts (subjectAltName); renewed a month before its end
    device certificates      CN and URI urn:anabranch:device:<id>; the gateway chooses the id

Of a device's certificate request nothing is taken over but the public key, whose possession its
signature proves. Server certificates are for servers, device certificates for clients alone
(extendedKeyUsage), so neither passes for the other. How certificates are made and read:
protocols/identity/authority.py; here are their files, and what a gateway's names are.
"""

from __future__ import annotations

import datetime
import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from anabranch.edge.gateway.config import make_private
from anabranch.edge.gateway.refusals import Denied, Malformed
from anabranch.protocols.errors import ConfigError, MalformedMessage
from anabranch.protocols.identity import authority as identity
from anabranch.protocols.identity.authority import (
    P256,
    Key,
    PublicKey,
    certificate_pem,
    general_name,
    issued,
    key_pem,
    new_key,
    read_certificate,
    read_private_key,
    self_signed,
)
from anabranch.storage.files import open_to_others, write_atomic

URN = "urn:anabranch:device:"
CURVES = P256 | {"secp384r1": "P-384 (secp384r1)"}  # that gRPC's TLS accepts of a client
SERVER_DAYS, RENEW_DAYS = 397, 30


@dataclass(frozen=True)
class Authority:
    """Signs for one gateway."""

    folder: Path
    key: Key
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        """Return the authority's certificate."""
        return certificate_pem(self.certificate)

    def server_credentials(self, hosts: Sequence[str]) -> tuple[bytes, bytes]:
        """Return (key, certificate) of the server in PEM; made anew if hosts or time ask for it."""
        key_file, file = self.folder / "server.key", self.folder / "server.pem"
        if file.exists() and key_file.exists() and not _stale(file.read_bytes(), hosts):
            return read_key(key_file), file.read_bytes()
        key, now = new_key(), _now()
        names, end = [general_name(host) for host in hosts], now + _days(SERVER_DAYS)
        usage = ExtendedKeyUsageOID.SERVER_AUTH
        pem = certificate_pem(issued(self, key.public_key(), hosts[0], names, usage, now, end))
        write_atomic(key_file, key_pem(key), 0o600)
        write_atomic(file, pem)
        return key_pem(key), pem

    def issue(self, request: bytes, device: str, days: int) -> x509.Certificate:
        """Return a certificate of `device` for the key of a PKCS #10 request (PEM).

        Raises Malformed for a request that is too large, cannot be read, is not signed by its
        own key, or has a key that is not on P-256 or P-384.
        """
        key = request_key(request)
        names, now = [x509.UniformResourceIdentifier(URN + device)], _now()
        usage = ExtendedKeyUsageOID.CLIENT_AUTH
        return issued(self, key, device, names, usage, now, now + _days(days))

    def device_of(self, pem: bytes, now: datetime.datetime | None = None) -> str:
        """Return whose certificate this is.

        Raises Denied unless this authority signed it for a device and its time has come and not
        passed.
        """
        now = now or _now()
        try:
            certificate = read_certificate(pem, "certificate")
            uri = identity.client_uri(certificate, self.certificate)
        except MalformedMessage:
            raise Denied("certificate: not one that this gateway issued; enrol again") from None
        if uri is None or not uri.startswith(URN):
            raise Denied("certificate: not one of a device; enrol again")
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise Denied(
                f"certificate: valid until {certificate.not_valid_after_utc:%Y-%m-%d}; enrol again"
            )
        return uri.removeprefix(URN)


def make_authority(folder: Path, name: str) -> Authority:
    """Make the authority of a new gateway in `folder`; ConfigError if there is one already."""
    if (folder / "ca.key").exists():
        raise ConfigError(
            f"{folder / 'ca.key'}: exists; a new authority would lock out every device that is "
            "enrolled. Choose another folder"
        )
    make_private(folder)
    key, certificate = self_signed(f"{name} authority", _now())
    write_atomic(folder / "ca.key", key_pem(key), 0o600)
    write_atomic(folder / "ca.pem", certificate_pem(certificate))
    return Authority(folder, key, certificate)


def open_authority(folder: Path) -> Authority:
    """Return the authority in `folder`; ConfigError if it cannot be used."""
    try:
        key = read_private_key(read_key(folder / "ca.key"), "ca.key")
        certificate = read_certificate((folder / "ca.pem").read_bytes(), "ca.pem")
    except (OSError, MalformedMessage) as error:
        raise ConfigError(
            f"{folder}: no usable authority ({error}); run `anabranch edge gateway init`, or "
            "restore the folder"
        ) from None
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"{folder}: ca.key and ca.pem do not belong together; restore both")
    return Authority(folder, key, certificate)


def read_key(file: Path) -> bytes:
    """Return a private key's file; ConfigError if others on this machine may read it."""
    if mode := open_to_others(file):
        raise ConfigError(f"{file}: mode {mode}, but nobody else may read it; chmod 600")
    return file.read_bytes()


def request_key(request: bytes) -> PublicKey:
    """Return the public key of a certificate request, or raise Malformed."""
    try:
        return identity.request_key(request, "certificate_request", CURVES)
    except MalformedMessage as error:
        raise Malformed(str(error)) from None


def key_digest(key: PublicKey) -> bytes:
    """Return the SHA-256 of a public key (DER)."""
    return bytes.fromhex(identity.key_digest(key))


def new_token() -> str:
    """Return a one-time enrolment token: 256 random bits."""
    return secrets.token_urlsafe(32)


def token_hash(token: str) -> bytes:
    """Return what is stored of a token. 256 random bits need no salt."""
    return hashlib.sha256(token.encode()).digest()


def new_device() -> str:
    """Return a device's name: random, so that it says nothing of its owner."""
    return f"d-{secrets.token_hex(12)}"


def _stale(pem: bytes, hosts: Sequence[str]) -> bool:
    certificate = read_certificate(pem, "server.pem")
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    wanted = [general_name(host) for host in hosts]
    return certificate.not_valid_after_utc - _now() < _days(RENEW_DAYS) or list(names) != wanted


def _days(count: int) -> datetime.timedelta:
    return datetime.timedelta(days=count)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
