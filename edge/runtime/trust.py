"""Whose bundles a device opens: Ed25519 (RFC 8032) over the bytes of manifest.json.

    manifest.sig    {"algorithm":"ed25519","key":hex,"signature":hex}
                    signature over b"anabranch bundle\\0" ‖ manifest.json
    trusted.json    {"format":1,"keys":{hex of a public key: what it is called}}
    versions.json   {"format":1,"bundles":{name: {"version": n, "manifest": SHA-256}}}

The manifest holds the size and SHA-256 of every other file, so a signature on it covers all of
them. The key in manifest.sig is only a hint: it must be one that the device trusts already. The
prefix keeps a signature made for something else from being one for a bundle.

versions.json is the floor against roll-back: the highest version of each bundle that was
accepted, and the digest of its manifest. An older version is refused, and so is the same version
with other content.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from anabranch.edge.runtime.manifest import Digest
from anabranch.protocols.errors import BundleError
from anabranch.protocols.tables import Count, Name
from anabranch.storage.files import locked, open_to_others, write_atomic

PREFIX = b"anabranch bundle\0"
MAX_SIGNATURE = 512  # bytes of manifest.sig; it has about 250
KEY_BYTES = 32

HexKey = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
HexSignature = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{128}\Z")]


T = TypeVar("T", bound=msgspec.Struct)


class _Signature(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    algorithm: Literal["ed25519"] = "ed25519"
    key: HexKey
    signature: HexSignature


class _Trusted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal[1] = 1
    keys: dict[HexKey, str]


class _Seen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: Count
    manifest: Digest


class _Versions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal[1] = 1
    bundles: dict[Name, _Seen]


def new_key(path: Path) -> bytes:
    """Write a new private key (PKCS #8, PEM, mode 0600); return the public key, 32 bytes.

    Raises BundleError if `path` exists: a key is never overwritten.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise BundleError(
            f"{path}: exists, and a key is never overwritten; choose another path"
        ) from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return public_bytes(key)


def load_private(path: Path) -> Ed25519PrivateKey:
    """Return the private key in a PEM file, or raise BundleError.

    A key that others on this machine can read is refused.
    """
    try:
        data, mode = path.read_bytes(), open_to_others(path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from None
    if mode:
        raise BundleError(f"{path}: mode {mode}, but nobody else may read a key; chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise BundleError(f"{path}: expected a private key in PEM without a password") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise BundleError(f"{path}: expected an Ed25519 key, got {type(key).__name__}")
    return key


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """Return the public key that belongs to a private one: 32 bytes."""
    return key.public_key().public_bytes_raw()


def sign(manifest: bytes, key: Ed25519PrivateKey, prefix: bytes = PREFIX) -> bytes:
    """Return the content of manifest.sig for the bytes of a manifest."""
    signature = key.sign(prefix + manifest)
    return msgspec.json.encode(_Signature(key=public_bytes(key).hex(), signature=signature.hex()))


def verify_signature(
    manifest: bytes,
    signature: bytes,
    trusted: Sequence[bytes],
    prefix: bytes = PREFIX,
    what: str = "manifest.json",
) -> bytes:
    """Return the trusted key that signed `manifest`.

    Raises BundleError: no key is trusted, manifest.sig is not what `sign` writes, its key is not
    trusted, or the signature is wrong. Nothing of the manifest is parsed.
    """
    if not trusted:
        raise BundleError(
            "signature: this device trusts no key, so it opens no bundle; add the publisher's "
            "public key"
        )
    claimed = _decoded(signature)
    key = bytes.fromhex(claimed.key)
    if key not in trusted:
        raise BundleError(
            f"signature: by key {claimed.key[:16]}…, which this device does not trust; add the "
            "key if it is the publisher's, or fetch the bundle from its publisher"
        )
    try:
        public = Ed25519PublicKey.from_public_bytes(key)
        public.verify(bytes.fromhex(claimed.signature), prefix + manifest)
    except (InvalidSignature, ValueError):
        raise BundleError(
            f"signature: does not fit {what}; one of them was changed: fetch the bundle again"
        ) from None
    return key


def read_trusted(path: Path) -> tuple[bytes, ...]:
    """Return the trusted public keys in trusted.json; none if the file is not there.

    Raises BundleError for a damaged file, and for one that others on this machine can write.
    """
    keys = _read_keys(path).keys
    return tuple(bytes.fromhex(key) for key in keys)


def add_trusted(path: Path, key: bytes, name: str = "") -> None:
    """Add a public key (32 bytes) to trusted.json; once more is the same as once."""
    if len(key) != KEY_BYTES:
        raise BundleError(f"a public key has {KEY_BYTES} bytes, got {len(key)}")
    with locked(path):
        keys = _read_keys(path).keys | {key.hex(): name}
        write_atomic(path, msgspec.json.encode(_Trusted(keys=keys)))


def require_not_older(path: Path, name: str, version: int, manifest: str) -> None:
    """Raise BundleError if this would be a step back for the bundle `name`.

    That is: versions.json at `path` holds a higher version, or this one with another manifest
    (`manifest` is the SHA-256 in hex), or cannot be read.
    """
    seen = _read_versions(path).bundles.get(name)
    if seen is None:
        return
    if version < seen.version:
        raise BundleError(
            f"version: {name} {version} is older than {seen.version}, which this device has had; "
            "a device never goes back: publish what is wanted under a higher version"
        )
    if version == seen.version and manifest != seen.manifest:
        raise BundleError(
            f"version: {name} {version} was {seen.manifest[:12]}… and is now {manifest[:12]}…; one "
            "version has one content: publish the other under a higher version"
        )


def remember_version(path: Path, name: str, version: int, manifest: str) -> None:
    """Record an accepted bundle in versions.json. Raises BundleError as `require_not_older`.

    The floor never sinks, also when two processes write at the same time.
    """
    with locked(path):
        require_not_older(path, name, version, manifest)
        bundles = _read_versions(path).bundles
        now = _Seen(version=version, manifest=manifest)
        if bundles.get(name) != now:
            write_atomic(path, msgspec.json.encode(_Versions(bundles=bundles | {name: now})))


def _decoded(signature: bytes) -> _Signature:
    """Return the content of manifest.sig; only the very bytes that `sign` writes are taken."""
    if len(signature) > MAX_SIGNATURE:
        raise BundleError(
            f"signature: {len(signature)} bytes, at most {MAX_SIGNATURE} are expected"
        )
    try:
        claimed = msgspec.json.decode(signature, type=_Signature)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"signature: {error}; fetch the bundle again") from None
    if msgspec.json.encode(claimed) != signature:
        raise BundleError("signature: not in the one form that a signer writes")
    return claimed


def _read_keys(path: Path) -> _Trusted:
    if not path.exists():
        return _Trusted(keys={})
    found, mode = _read(path, _Trusted), path.stat().st_mode
    if os.name == "posix" and mode & 0o022:
        raise BundleError(
            f"{path}: mode {mode & 0o777:04o}, but who can write it decides whose bundles are "
            f"opened; look at its keys, then chmod 644 {path}"
        )
    return found


def _read_versions(path: Path) -> _Versions:
    if not path.exists():
        return _Versions(bundles={})
    return _read(path, _Versions)


def _read(path: Path, kind: type[T]) -> T:
    """Return the content of a small JSON file; whatever is wrong with it is a refusal."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(
            f"{path}: {error}; restore it from a backup, nothing is opened without it"
        ) from None
