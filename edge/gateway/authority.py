"""The gateway's certificate authority: ECDSA P-256, X.509 (RFC 5280).

    ca.key  ca.pem           self-signed, path length 0, ten years
    server.key  server.pem   for the hosts (subjectAltName); renewed a month before its end
    device certificates      CN and URI urn:anabranch:device:<id>; the gateway chooses the id

Of a device's certificate request nothing is taken over but the public key, whose possession its
signature proves. Server certificates are for servers, device certificates for clients alone
(extendedKeyUsage), so neither passes for the other.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from anabranch.edge.gateway.config import make_private
from anabranch.edge.gateway.refusals import Denied, Malformed
from anabranch.protocols.errors import ConfigError
from anabranch.storage.files import write_atomic

URN = "urn:anabranch:device:"
MAX_REQUEST = 8192  # bytes of a certificate request; a P-256 one has about 500
CURVES = ("secp256r1", "secp384r1")  # that gRPC's TLS accepts of a client
CA_DAYS, SERVER_DAYS, RENEW_DAYS = 3650, 397, 30
BACKDATED = datetime.timedelta(minutes=5)  # clocks of devices differ


@dataclass(frozen=True)
class Authority:
    """Signs for one gateway."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        """Return the authority's certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def server_credentials(self, hosts: Sequence[str]) -> tuple[bytes, bytes]:
        """Return (key, certificate) of the server in PEM; made anew if hosts or time ask for it."""
        key_file, file = self.folder / "server.key", self.folder / "server.pem"
        if file.exists() and key_file.exists() and not _stale(file.read_bytes(), hosts):
            return read_key(key_file), file.read_bytes()
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        certificate = self._sign(
            key.public_key(), hosts[0], names, ExtendedKeyUsageOID.SERVER_AUTH, SERVER_DAYS
        )
        write_atomic(key_file, _key_pem(key), 0o600)
        write_atomic(file, certificate.public_bytes(serialization.Encoding.PEM))
        return _key_pem(key), certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, request: bytes, device: str, days: int) -> x509.Certificate:
        """Return a certificate of `device` for the key of a PKCS #10 request (PEM).

        Raises Malformed for a request that is too large, cannot be read, is not signed by its
        own key, or has a key that is not on P-256 or P-384.
        """
        key = request_key(request)
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(URN + device)])
        return self._sign(key, device, names, ExtendedKeyUsageOID.CLIENT_AUTH, days)

    def device_of(self, pem: bytes, now: datetime.datetime | None = None) -> str:
        """Return whose certificate this is.

        Raises Denied unless this authority signed it for a device and its time has come and not
        passed.
        """
        now = now or _now()
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            certificate.verify_directly_issued_by(self.certificate)
            usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
            raise Denied("certificate: not one that this gateway issued; enrol again") from None
        uris = names.value.get_values_for_type(x509.UniformResourceIdentifier)
        if ExtendedKeyUsageOID.CLIENT_AUTH not in usage or [u[: len(URN)] for u in uris] != [URN]:
            raise Denied("certificate: not one of a device; enrol again")
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise Denied(
                f"certificate: valid until {certificate.not_valid_after_utc:%Y-%m-%d}; enrol again"
            )
        return uris[0][len(URN) :]

    def _sign(
        self,
        key: ec.EllipticCurvePublicKey,
        name: str,
        names: x509.SubjectAlternativeName,
        usage: x509.ObjectIdentifier,
        days: int,
    ) -> x509.Certificate:
        now = _now()
        end = min(now + datetime.timedelta(days=days), self.certificate.not_valid_after_utc)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(names, critical=False)
            .add_extension(issuer, critical=False)
            .sign(self.key, hashes.SHA256())
        )


def make_authority(folder: Path, name: str) -> Authority:
    """Make the authority of a new gateway in `folder`; ConfigError if there is one already."""
    if (folder / "ca.key").exists():
        raise ConfigError(
            f"{folder / 'ca.key'}: exists; a new authority would lock out every device that is "
            "enrolled. Choose another folder"
        )
    make_private(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    now = _now()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name(f"{name} authority"))
        .issuer_name(_name(f"{name} authority"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_signs_certificates(), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_atomic(folder / "ca.key", _key_pem(key), 0o600)
    write_atomic(folder / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))
    return Authority(folder, key, certificate)


def open_authority(folder: Path) -> Authority:
    """Return the authority in `folder`; ConfigError if it cannot be used."""
    try:
        key = serialization.load_pem_private_key(read_key(folder / "ca.key"), password=None)
        certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{folder}: no usable authority ({error}); run `anabranch edge gateway init`, or "
            "restore the folder"
        ) from None
    if (
        not isinstance(key, ec.EllipticCurvePrivateKey)
        or key.public_key() != certificate.public_key()
    ):
        raise ConfigError(f"{folder}: ca.key and ca.pem do not belong together; restore both")
    return Authority(folder, key, certificate)


def read_key(file: Path) -> bytes:
    """Return a private key's file; ConfigError if others on this machine may read it."""
    mode = file.stat().st_mode
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(
            f"{file}: mode {mode & 0o777:04o}, but nobody else may read it; chmod 600"
        )
    return file.read_bytes()


def request_key(request: bytes) -> ec.EllipticCurvePublicKey:
    """Return the public key of a certificate request, or raise Malformed."""
    if len(request) > MAX_REQUEST:
        raise Malformed(f"certificate_request: {len(request)} bytes, at most {MAX_REQUEST} allowed")
    try:
        csr = x509.load_pem_x509_csr(request)
        key, signed = csr.public_key(), csr.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise Malformed("certificate_request: expected PKCS #10 in PEM") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise Malformed(f"certificate_request: expected a key on one of {', '.join(CURVES)}")
    if not signed:
        raise Malformed("certificate_request: not signed by its own key")
    return key


def key_digest(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return the SHA-256 of a public key (DER)."""
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).digest()


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
    certificate = x509.load_pem_x509_certificate(pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    left = certificate.not_valid_after_utc - _now()
    wanted = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    return left < datetime.timedelta(days=RENEW_DAYS) or names != wanted


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _signs_certificates() -> x509.KeyUsage:
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
        "key_agreement", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(key_cert_sign=True, crl_sign=True, **dict.fromkeys(names, False))


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
