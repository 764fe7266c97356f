"""A federation's authority: what OpenSSL makes of its certificates is what they are meant for."""

from __future__ import annotations

import base64
import datetime
import hashlib
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.protocols.errors import MalformedMessage, ProtocolError
from anabranch.protocols.identity import authority as identity
from tests.protocols.identity.tls import end, shake_hands

NOW = datetime.datetime.now(datetime.UTC)  # OpenSSL asks the clock
DAY = datetime.timedelta(days=1)
HOSTS = ("fl.example.org", "10.1.2.3")
AUTHORITY = identity.new_authority("heart", HOSTS, NOW)
SERVER_KEY, SITE_KEY = identity.new_key(), identity.new_key()
SERVER = AUTHORITY.server(SERVER_KEY.public_key(), HOSTS, NOW)
SITE = AUTHORITY.site(SITE_KEY.public_key(), "st-anna", NOW)
REQUEST = identity.certificate_request(SITE_KEY)

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)
hosts = st.sampled_from(
    ["localhost", "fl.example.org", "127.0.0.1", "10.9.8.7", "::1", "2001:db8::7"]
)


def connect(
    folder: Path,
    *,
    host: str = HOSTS[0],
    server: tuple[identity.Key, x509.Certificate] = (SERVER_KEY, SERVER),
    site: tuple[identity.Key, x509.Certificate] = (SITE_KEY, SITE),
    root: x509.Certificate = AUTHORITY.certificate,
) -> bytes:
    """Return the site's certificate as the server accepted it."""
    return shake_hands(
        end(root, server, folder, server=True), end(root, site, folder, server=False), host
    )


@given(names, names, st.lists(hosts, min_size=1, max_size=4, unique=True), st.data())
@settings(max_examples=25)
def test_every_federation_can_talk(
    tmp_path_factory: pytest.TempPathFactory,
    federation: str,
    site: str,
    reached: list[str],
    data: st.DataObject,
) -> None:
    """Whatever the names, and whether the coordinator has a name or an address alone."""
    authority = identity.new_authority(federation, reached, NOW)
    server = authority.server(SERVER_KEY.public_key(), reached, NOW)
    own = authority.site(SITE_KEY.public_key(), site, NOW)

    accepted = connect(
        tmp_path_factory.mktemp("tls"),
        host=data.draw(st.sampled_from(reached)),
        server=(SERVER_KEY, server),
        site=(SITE_KEY, own),
        root=authority.certificate,
    )
    read = x509.load_der_x509_certificate(accepted)
    assert identity.site_of(read, authority.certificate, NOW) == (federation, site)


@pytest.mark.parametrize("host", ["other.example.org", "10.1.2.4", "example.org"])
def test_a_server_is_accepted_for_its_hosts_alone(tmp_path: Path, host: str) -> None:
    for own in HOSTS:
        assert connect(tmp_path, host=own) == SITE.public_bytes(serialization.Encoding.DER)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        connect(tmp_path, host=host)


@pytest.mark.parametrize("host", ["other.example.org", "10.1.2.4", "::1", "org"])
def test_the_authority_cannot_vouch_for_another_host(tmp_path: Path, host: str) -> None:
    """Even its key signs no certificate that passes: name constraints."""
    for reached in ([host], [host, *HOSTS]):
        forged = AUTHORITY.server(SERVER_KEY.public_key(), reached, NOW)
        with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
            connect(tmp_path, host=host, server=(SERVER_KEY, forged))


@pytest.mark.parametrize("only", [["fl.example.org"], ["10.1.2.3"]])
def test_an_authority_without_names_or_addresses_has_none_of_them(
    tmp_path: Path, only: list[str]
) -> None:
    authority = identity.new_authority("heart", only, NOW)
    other = "10.1.2.3" if only == ["fl.example.org"] else "fl.example.org"
    forged = authority.server(SERVER_KEY.public_key(), [other], NOW)
    site = authority.site(SITE_KEY.public_key(), "a", NOW)

    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
        connect(
            tmp_path,
            host=other,
            server=(SERVER_KEY, forged),
            site=(SITE_KEY, site),
            root=authority.certificate,
        )


def test_the_authority_cannot_vouch_for_a_site_of_another_federation(tmp_path: Path) -> None:
    """Its key signs for "lung", and neither OpenSSL nor a roster of "lung" takes it."""
    forger = identity.Authority("lung", AUTHORITY.key, AUTHORITY.certificate)
    forged = forger.site(SITE_KEY.public_key(), "st-anna", NOW)

    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
        connect(tmp_path, site=(SITE_KEY, forged))


def test_an_authority_below_the_authority_is_refused(tmp_path: Path) -> None:
    """Path length 0: a site's certificate signs nothing."""
    under = identity.Authority("heart", SITE_KEY, SITE)
    forged = under.site(SITE_KEY.public_key(), "forged", NOW)
    context = end(AUTHORITY.certificate, None, tmp_path, server=False)
    file = tmp_path / "chain.pem"
    pem = identity.certificate_pem
    file.write_bytes(pem(forged) + pem(SITE) + identity.key_pem(SITE_KEY))
    context.load_cert_chain(file)

    with pytest.raises(ssl.SSLCertVerificationError, match="invalid CA certificate"):
        shake_hands(
            end(AUTHORITY.certificate, (SERVER_KEY, SERVER), tmp_path, server=True),
            context,
            HOSTS[0],
        )
    with pytest.raises(ProtocolError, match="not one of this federation"):
        identity.site_of(forged, AUTHORITY.certificate, NOW)


def test_a_site_cannot_serve_and_a_server_is_no_site(tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="unsuitable certificate purpose"):
        connect(tmp_path, server=(SITE_KEY, SITE))
    with pytest.raises(ssl.SSLCertVerificationError, match="unsuitable certificate purpose"):
        connect(tmp_path, site=(SERVER_KEY, SERVER))
    with pytest.raises(ProtocolError, match="not one of a site"):
        identity.site_of(SERVER, AUTHORITY.certificate, NOW)


def test_another_authority_of_the_same_name_is_refused(tmp_path: Path) -> None:
    other = identity.new_authority("heart", HOSTS, NOW)
    site = other.site(SITE_KEY.public_key(), "st-anna", NOW)

    with pytest.raises(ssl.SSLCertVerificationError):
        connect(tmp_path, site=(SITE_KEY, site))
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(tmp_path, root=other.certificate)
    for found in (site, other.certificate):
        with pytest.raises(ProtocolError, match="not one of this federation; join again"):
            identity.site_of(found, AUTHORITY.certificate, NOW)
    with pytest.raises(ProtocolError, match="not one of this federation; join again"):
        identity.site_of(AUTHORITY.certificate, AUTHORITY.certificate, NOW)  # names no site


@pytest.mark.parametrize("shift", [-100, 1])
def test_a_certificate_holds_for_its_time_alone(tmp_path: Path, shift: int) -> None:
    then = NOW + shift * DAY
    old = identity.new_authority("heart", HOSTS, NOW - 200 * DAY)
    site = old.site(SITE_KEY.public_key(), "st-anna", then)
    server = old.server(SERVER_KEY.public_key(), HOSTS, then)
    good = old.site(SITE_KEY.public_key(), "st-anna", NOW)
    valid = old.server(SERVER_KEY.public_key(), HOSTS, NOW)
    root = old.certificate

    why = "expired" if shift < 0 else "not yet valid"
    with pytest.raises(ssl.SSLCertVerificationError, match=why):
        connect(tmp_path, server=(SERVER_KEY, server), site=(SITE_KEY, good), root=root)
    with pytest.raises(ssl.SSLCertVerificationError, match=why):
        connect(tmp_path, server=(SERVER_KEY, valid), site=(SITE_KEY, site), root=root)
    with pytest.raises(ProtocolError, match=r"valid from 20.* UTC, and it is 20"):
        identity.site_of(site, root, NOW)
    assert identity.site_of(site, root, then) == ("heart", "st-anna")


def test_a_clock_that_is_some_minutes_late_is_forgiven() -> None:
    early = NOW - datetime.timedelta(minutes=4)
    assert identity.site_of(SITE, AUTHORITY.certificate, early) == ("heart", "st-anna")
    with pytest.raises(ProtocolError, match="valid from"):
        identity.site_of(SITE, AUTHORITY.certificate, NOW - datetime.timedelta(minutes=6))


def test_no_certificate_outlives_its_authority() -> None:
    late = NOW + (identity.CA_DAYS - 2) * DAY
    site = AUTHORITY.site(SITE_KEY.public_key(), "st-anna", late)
    assert site.not_valid_after_utc == AUTHORITY.certificate.not_valid_after_utc


@pytest.mark.parametrize(("days", "due"), [(0, False), (59, False), (61, True), (91, True)])
def test_a_site_renews_in_the_last_third(days: int, due: bool) -> None:
    assert identity.to_be_renewed(SITE, NOW + days * DAY) is due


def test_a_self_made_certificate_with_a_sites_names_is_refused() -> None:
    """Of every kind of key: the error is the same."""
    for key in (
        SITE_KEY,
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ):
        own = _self_signed(key)
        with pytest.raises(ProtocolError, match="not one of this federation"):
            identity.site_of(own, AUTHORITY.certificate, NOW)


def _self_signed(
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey,
) -> x509.Certificate:
    uri = x509.UniformResourceIdentifier(identity.site_uri("heart", "st-anna"))
    return (
        x509.CertificateBuilder()
        .subject_name(SITE.subject)
        .issuer_name(AUTHORITY.certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        .sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    )


# Requests ------------------------------------------------------------------------------------


def test_a_request_yields_its_key_and_nothing_else() -> None:
    names = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator")])
    hostile = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(names)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOSTS[0])]), critical=False)
        .sign(SITE_KEY, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    for request in (REQUEST, hostile):
        key = identity.request_key(request)
        assert identity.key_digest(key) == identity.key_digest(SITE_KEY.public_key())
        issued = AUTHORITY.site(key, "st-anna", NOW)
        assert issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
        assert identity.site_of(issued, AUTHORITY.certificate, NOW) == ("heart", "st-anna")


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP256K1(), None])
def test_a_request_for_another_kind_of_key_is_refused(curve: ec.EllipticCurve | None) -> None:
    key = ec.generate_private_key(curve) if curve else ed25519.Ed25519PrivateKey.generate()
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    signed = builder.sign(key, hashes.SHA256() if curve else None)

    with pytest.raises(MalformedMessage, match="expected a key on P-256"):
        identity.request_key(signed.public_bytes(serialization.Encoding.PEM))


@given(st.data())
def test_a_request_with_a_changed_byte_brings_no_other_key(data: st.DataObject) -> None:
    """In its DER: key, signature, version or structure; all but the count of bits left unused, a 0
    that may be as high as there are zeros at the signature's end, and says nothing."""
    der = bytearray(
        x509.load_pem_x509_csr(REQUEST).public_bytes(serialization.Encoding.DER),
    )
    der[data.draw(st.integers(0, len(der) - 1))] ^= data.draw(st.integers(1, 255))

    try:
        key = identity.request_key(_pem(bytes(der), "CERTIFICATE REQUEST"))
    except MalformedMessage as error:
        assert "certificate request: " in str(error)  # noqa: PT017 - most bytes
    else:
        signature = _signature(REQUEST)
        unused = der[-len(signature) - 1]
        assert key == identity.request_key(REQUEST)
        assert 1 <= unused <= 7
        assert signature[-1] % (1 << unused) == 0


def _signature(request: bytes) -> bytes:
    return x509.load_pem_x509_csr(request).signature


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@given(st.binary(max_size=300), st.booleans())
def test_bytes_that_are_no_request_key_or_certificate_are_refused(data: bytes, pem: bool) -> None:
    shown = [_pem(data, kind) for kind in ("CERTIFICATE REQUEST", "CERTIFICATE", "PRIVATE KEY")]
    request, certificate, key = shown if pem else (data, data, data)

    with pytest.raises(MalformedMessage, match="certificate request"):
        identity.request_key(request)
    with pytest.raises(MalformedMessage, match=r"ca\.pem: expected a certificate"):
        identity.read_certificate(certificate, "ca.pem")
    with pytest.raises(MalformedMessage, match=r"site\.key: expected a private key"):
        identity.read_private_key(key, "site.key")


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@given(st.data())
def test_a_certificate_with_a_changed_byte_is_of_nobody(data: st.DataObject) -> None:
    """Or nothing of what was signed has changed: a signature's last bits have two spellings."""
    der = bytearray(SITE.public_bytes(serialization.Encoding.DER))
    der[data.draw(st.integers(0, len(der) - 1))] ^= data.draw(st.integers(1, 255))

    try:
        found = identity.read_certificate(_pem(bytes(der), "CERTIFICATE"), "site.pem")
        assert identity.site_of(found, AUTHORITY.certificate, NOW) == ("heart", "st-anna")
        assert found.tbs_certificate_bytes == SITE.tbs_certificate_bytes
    except ProtocolError as error:
        assert "certificate" in str(error)  # noqa: PT017 - either of the two is right


def test_a_request_of_too_many_bytes_is_not_read() -> None:
    padded = REQUEST + b"\n" * (identity.MAX_REQUEST + 1 - len(REQUEST))
    with pytest.raises(MalformedMessage, match="8193 bytes, at most 8192 allowed"):
        identity.request_key(padded)


def _pem(der: bytes, kind: str) -> bytes:
    text = base64.encodebytes(der)
    return b"-----BEGIN %b-----\n%b-----END %b-----\n" % (kind.encode(), text, kind.encode())


# Files ---------------------------------------------------------------------------------------


def test_keys_and_certificates_are_read_back() -> None:
    again = identity.read_private_key(identity.key_pem(SITE_KEY), "site.key")
    assert identity.key_digest(again.public_key()) == identity.key_digest(SITE_KEY.public_key())
    assert identity.read_certificate(identity.certificate_pem(SITE), "site.pem") == SITE
    der = AUTHORITY.certificate.public_bytes(serialization.Encoding.DER)
    assert AUTHORITY.fingerprint == hashlib.sha256(der).hexdigest()


def test_another_kind_of_private_key_is_refused() -> None:
    for key in (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())):
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        with pytest.raises(MalformedMessage, match=r"site\.key: expected a key on P-256"):
            identity.read_private_key(pem, "site.key")
    locked = SITE_KEY.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    with pytest.raises(MalformedMessage, match=r"site\.key: expected a private key"):
        identity.read_private_key(locked, "site.key")
