"""Two ends of a TLS connection in memory: what OpenSSL thinks of a certificate, no sockets."""

from __future__ import annotations

import ssl
from pathlib import Path

from cryptography import x509

from anabranch.protocols.identity import authority

Held = tuple[authority.Key, x509.Certificate]


def end(root: x509.Certificate, held: Held | None, folder: Path, *, server: bool) -> ssl.SSLContext:
    """Return one end that trusts `root` alone, in OpenSSL's strict mode, and shows `held`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=authority.certificate_pem(root).decode())
    if held is not None:
        file = folder / "held.pem"
        file.write_bytes(authority.certificate_pem(held[1]) + authority.key_pem(held[0]))
        context.load_cert_chain(file)
    return context


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> bytes:
    """Return the client's certificate (DER) as the server accepted it; raises ssl.SSLError."""
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(one, other, server_hostname=host),
        server.wrap_bio(other, one, server_side=True),
    ]
    left = list(ends)
    for _ in range(6):  # flights of a TLS 1.3 handshake: at most three
        for channel in list(left):
            try:
                channel.do_handshake()
            except ssl.SSLWantReadError:
                continue
            left.remove(channel)
    if left:
        raise ssl.SSLError("the handshake did not end")
    certificate = ends[1].getpeercert(binary_form=True)
    return certificate or b""
