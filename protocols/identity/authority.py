"""A federation's certificate authority: ECDSA P-256, X.509 (RFC 5280). Keys, times: arguments.

    authority    self-signed, path length 0, ten years; name constraints: its certificates hold for
                 the coordinator's hosts, and for sites of this federation (URIs), nobody else
    server       the coordinator's hosts (subjectAltName), serverAuth, SERVER_DAYS; renewed early
    site         URI anabranch://<federation>.anabranch/site/<name>, clientAuth, SITE_DAYS

Names count in subjectAltName alone. A common name is for people, and has a space in it: OpenSSL
holds one that could be a host's ("10.0.0.1", "ward.b") against the name constraints.
Of a certificate request nothing is taken over but the public key, whose possession its signature
proves. Server certificates are for servers, site certificates for clients alone
(extendedKeyUsage), so neither passes for the other.

A gateway's authority (edge/gateway/authority.py) is made of the same pieces: `self_signed`,
`issued`, `request_key`, `client_uri` and the functions below them.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from anabranch.protocols.errors import MalformedMessage, ProtocolError

Key = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
Time = datetime.datetime

MAX_REQUEST = 8192  # bytes of a certificate request in PEM; a P-256 one has about 500
P256 = {"secp256r1": "P-256 (secp256r1)"}  # OpenSSL's name of a curve -> its name in errors
CA_DAYS, SERVER_DAYS, SITE_DAYS = 3650, 30, 90
RENEW_SHARE = 1 / 3  # of a certificate's time: with less than this left it is to be renewed
BACKDATED = datetime.timedelta(minutes=5)  # clocks differ


@dataclass(frozen=True)
class Authority:
    """Signs for one federation."""

    federation: str
    key: Key
    certificate: x509.Certificate

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the authority's certificate (DER), hex."""
        return fingerprint(self.certificate)

    def server(
        self, key: PublicKey, hosts: Sequence[str], now: Time, days: float = SERVER_DAYS
    ) -> x509.Certificate:
        """Return a certificate for a server that is reached as any of `hosts` (names or IPs)."""
        common, names = f"coordinator of {self.federation}", [general_name(host) for host in hosts]
        end = now + datetime.timedelta(days=days)
        return issued(self, key, common, names, ExtendedKeyUsageOID.SERVER_AUTH, now, end)

    def site(
        self, key: PublicKey, name: str, now: Time, days: float = SITE_DAYS
    ) -> x509.Certificate:
        """Return a certificate of the site `name` for a key."""
        names = [x509.UniformResourceIdentifier(site_uri(self.federation, name))]
        end = now + datetime.timedelta(days=days)
        return issued(self, key, f"site {name}", names, ExtendedKeyUsageOID.CLIENT_AUTH, now, end)


def new_authority(federation: str, hosts: Sequence[str], now: Time) -> Authority:
    """Return the authority of a new federation, which may only sign for `hosts` and its sites."""
    constraints = _constraints(federation, hosts)
    return Authority(federation, *self_signed(f"{federation} authority", now, constraints))


class Signing(Protocol):
    """What signs certificates: a key, and the certificate of that key."""

    @property
    def key(self) -> Key:
        """The private key."""

    @property
    def certificate(self) -> x509.Certificate:
        """Its certificate."""


def issued(
    by: Signing,
    key: PublicKey,
    common: str,
    names: Sequence[x509.GeneralName],
    usage: x509.ObjectIdentifier,
    now: Time,
    end: Time,
) -> x509.Certificate:
    """Return a certificate of `key` for `names`, valid to `end` but no longer than its issuer's."""
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(by.key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(_name(common))
        .issuer_name(by.certificate.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(min(end, by.certificate.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(issuer, critical=False)
        .sign(by.key, hashes.SHA256())
    )


def self_signed(
    common: str, now: Time, constraints: x509.NameConstraints | None = None
) -> tuple[Key, x509.Certificate]:
    """Return the key and certificate of a new authority: path length 0, CA_DAYS."""
    key, name = new_key(), _name(common)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_signs_certificates(), critical=True)
    )
    if constraints is not None:
        builder = builder.add_extension(constraints, critical=True)
    return key, builder.sign(key, hashes.SHA256())


def new_key() -> Key:
    """Return a new key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def certificate_request(key: Key) -> bytes:
    """Return a request (PKCS #10, PEM) for a certificate of this key; who signs chooses names."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def request_key(
    request: bytes, what: str = "certificate request", curves: Mapping[str, str] = P256
) -> PublicKey:
    """Return the public key of a certificate request.

    Raises MalformedMessage, naming `what`, for one that is too large, cannot be read, is not
    signed by its own key, or has a key on none of the `curves`.
    """
    if len(request) > MAX_REQUEST:
        raise MalformedMessage(f"{what}: {len(request)} bytes, at most {MAX_REQUEST} allowed")
    try:
        csr = x509.load_pem_x509_csr(request)
        key, signed = csr.public_key(), csr.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise MalformedMessage(f"{what}: expected PKCS #10 in PEM") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in curves:
        raise MalformedMessage(f"{what}: expected a key on {' or '.join(curves.values())}")
    if not signed:
        raise MalformedMessage(f"{what}: not signed by its own key")
    return key


def client_uri(certificate: x509.Certificate, root: x509.Certificate) -> str | None:
    """Return the URI of a client's certificate; None for one that is for something else.

    Raises MalformedMessage unless `root` signed it. Its time is not looked at.
    """
    try:
        certificate.verify_directly_issued_by(root)
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound):
        raise MalformedMessage("certificate: not one of this authority") from None
    uris = names.value.get_values_for_type(x509.UniformResourceIdentifier)
    return uris[0] if ExtendedKeyUsageOID.CLIENT_AUTH in usage and len(uris) == 1 else None


def site_of(certificate: x509.Certificate, root: x509.Certificate, now: Time) -> tuple[str, str]:
    """Return (federation, name) of the site whose certificate this is.

    Raises ProtocolError unless `root` signed it for a site and its time has come and not passed.
    """
    try:
        uri = client_uri(certificate, root)
    except MalformedMessage:
        raise ProtocolError("certificate: not one of this federation; join again") from None
    parts = urlsplit(uri or "")
    if parts.scheme != "anabranch" or not parts.path.startswith("/site/"):
        raise ProtocolError("certificate: not one of a site; join again")
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise ProtocolError(
            f"certificate: valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M}"
        )
    return parts.netloc.removesuffix(FEDERATION_SUFFIX), parts.path.removeprefix("/site/")


FEDERATION_SUFFIX = ".anabranch"  # so that a name constraint can hold for exactly this host


def site_uri(federation: str, name: str) -> str:
    """Return the URI that a site's certificate carries."""
    return f"anabranch://{federation}{FEDERATION_SUFFIX}/site/{name}"


def to_be_renewed(certificate: x509.Certificate, now: Time) -> bool:
    """Whether less than RENEW_SHARE of a certificate's time is left."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return end - now < RENEW_SHARE * (end - begin)


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate in DER, hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def key_digest(key: PublicKey) -> str:
    """Return the SHA-256 of a public key (DER), hex."""
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).hexdigest()


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def read_certificate(pem: bytes, what: str) -> x509.Certificate:
    """Return the certificate in PEM; MalformedMessage naming `what` if there is none."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, TypeError, x509.InvalidVersion):
        raise MalformedMessage(f"{what}: expected a certificate as PEM") from None


def key_pem(key: Key) -> bytes:
    """Return a private key as PEM (PKCS #8, not encrypted): for files of mode 0600 only."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def read_private_key(pem: bytes, what: str) -> Key:
    """Return a P-256 key from PEM; MalformedMessage naming `what` if there is none."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise MalformedMessage(f"{what}: expected a private key as PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise MalformedMessage(f"{what}: expected a key on P-256")
    return key


def general_name(host: str) -> x509.GeneralName:
    """Return a host as it stands in a certificate: an IP address or a DNS name."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _constraints(federation: str, hosts: Sequence[str]) -> x509.NameConstraints:
    permitted: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(f"{federation}{FEDERATION_SUFFIX}")
    ]
    for host in hosts:
        try:
            permitted.append(x509.IPAddress(ipaddress.ip_network(host)))
        except ValueError:
            permitted.append(x509.DNSName(host))
    if not any(isinstance(one, x509.DNSName) for one in permitted):
        permitted.append(x509.DNSName("none.invalid"))  # no entry of a kind: all of it is allowed
    if not any(isinstance(one, x509.IPAddress) for one in permitted):
        permitted.append(x509.IPAddress(ipaddress.ip_network("192.0.2.0/32")))  # RFC 5737
    return x509.NameConstraints(permitted_subtrees=permitted, excluded_subtrees=None)


def _signs_certificates() -> x509.KeyUsage:
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
        "key_agreement", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(key_cert_sign=True, crl_sign=True, **dict.fromkeys(names, False))


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])
