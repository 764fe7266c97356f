"""The lines of an audit log: chained by their hashes, each signed. JSON in, JSON out; no files.

    line       {"n":1, "time":"…Z", "kind":"word", … fields …, "previous":hex,
                "hash":hex, "signature":hex}            one per event, in this order of keys
    body       the line without its hash and its signature: the text before `,"hash":`, and "}"
    hash       SHA-256(HASH_DOMAIN ‖ body)
    signature  Ed25519 (RFC 8032) of SIGN_DOMAIN ‖ the 32 bytes of the hash
    previous   the hash of the line before; 64 zeros in the first

The text that was written is the text that is hashed, so no second spelling of a line passes. The
first line, of kind "opened", names the log, who keeps it, its public key and this format: with
the right key, a log is verified by itself. The last hash, the head, fixes every line before it.

What a log proves. Who has only the public key can change, remove, insert or exchange no line but
at the end. A cut end looks whole: a witness, or a head that somebody else has kept, shows it.
Who has the private key can write another log from its beginning: only heads that others have
kept show that, which is why the coordinator and its sites tell each other theirs.

Fields name runs, people, digests, counts and reasons. They never hold the contents of a record,
a secret, or a number computed from single records: a log is made to be shown.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from anabranch.protocols.chain import GENESIS, Hash, Identity
from anabranch.protocols.errors import MalformedMessage, ProtocolError
from anabranch.protocols.tables import Count

FORMAT: Literal[1] = 1
HASH_DOMAIN = b"anabranch audit line 1\0"
SIGN_DOMAIN = b"anabranch audit signature 1\0"
MAX_LINE = 64 << 10  # bytes, without the end of the line
OPENED = "opened"  # kind of the first line, and of no other
OWN = frozenset({"n", "time", "kind", "previous", "hash", "signature"})

_TAIL = re.compile(rb',"hash":"([0-9a-f]{64})","signature":"([0-9a-f]{128})"}')
_TAIL_BYTES = len(b',"hash":"","signature":""}') + 64 + 128
_KIND = re.compile(r"[a-z][a-z0-9-]{0,63}")
_FIELD = re.compile(r"[a-z][a-z0-9_]{0,63}")
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """One line, as it was read."""

    n: int  # 1, 2, …
    time: str  # UTC, ISO 8601; as the writer's clock had it
    kind: str
    fields: Mapping[str, object]
    previous: str  # hex
    hash: str  # hex
    signature: str  # hex


def write_line(
    before: Entry | None, kind: str, time: str, fields: Mapping[str, object], key: Ed25519PrivateKey
) -> bytes:
    """Return the line that follows `before` (None: the first), without the end of the line.

    Fields are strings, numbers, booleans, None, or lists and tables of these. Raises ValueError
    for a kind or field that is no plain word, a field of the chain's own, a value that JSON has
    no form for, or a line of more than MAX_LINE bytes.
    """
    if _KIND.fullmatch(kind) is None:
        raise ValueError(f"audit log: kind {kind!r}, expected a lower-case word")
    if (kind == OPENED) != (before is None):
        raise ValueError(f"audit log: only the first line is of kind {OPENED}, and it always is")
    for name in fields:
        if name in OWN or _FIELD.fullmatch(name) is None:
            raise ValueError(f"audit log: a line of kind {kind} cannot have a field {name!r}")
    number, previous = (1, GENESIS) if before is None else (before.n + 1, before.hash)
    body = {"n": number, "time": time, "kind": kind, **fields, "previous": previous}
    try:
        text = msgspec.json.encode(body)
    except (TypeError, UnicodeEncodeError, OverflowError) as error:
        raise ValueError(f"audit log: a line of kind {kind}: {error}") from None
    digest = _hash(text)
    signature = key.sign(SIGN_DOMAIN + digest).hex()
    line = b'%b,"hash":"%b","signature":"%b"}' % (
        text[:-1],
        digest.hex().encode(),
        signature.encode(),
    )
    if len(line) > MAX_LINE:
        raise ValueError(
            f"audit log: a line of kind {kind} has {len(line)} bytes, at most {MAX_LINE}"
        )
    return line


def read_line(line: bytes) -> Entry:
    """Return the entry of a line without its end.

    Its hash is that of its body; whether its place and its signature are right is for
    `require_next` and `require_signed`. Raises MalformedMessage.
    """
    if len(line) > MAX_LINE:
        raise MalformedMessage(f"more than {MAX_LINE} bytes")
    tail = _TAIL.fullmatch(line[-_TAIL_BYTES:])
    if tail is None:
        raise MalformedMessage("no line of an audit log")
    text = line[:-_TAIL_BYTES] + b"}"
    written, signature = tail[1].decode(), tail[2].decode()
    if _hash(text).hex() != written:
        raise MalformedMessage("not what was written: its hash is another")
    try:
        body = msgspec.json.decode(text, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"not JSON ({error})") from None
    n, time, kind, previous = (body.pop(name, None) for name in ("n", "time", "kind", "previous"))
    if not (
        type(n) is int
        and isinstance(time, str)
        and isinstance(kind, str)
        and isinstance(previous, str)
        and _HEX.fullmatch(previous)
    ):
        raise MalformedMessage("no line of an audit log: n, time, kind or previous is missing")
    return Entry(n, time, kind, body, previous, written, signature)


def require_next(entry: Entry, before: Entry | None) -> None:
    """Raise ProtocolError unless `entry` follows `before` (None: is the first)."""
    number, previous = (1, GENESIS) if before is None else (before.n + 1, before.hash)
    if entry.n != number:
        raise ProtocolError(f"it is line {entry.n}: lines were removed, added or moved")
    if entry.previous != previous:
        raise ProtocolError("it does not follow the line before it")
    if (entry.kind == OPENED) != (before is None):
        raise ProtocolError(f"it is of kind {entry.kind}, which its place does not allow")


def require_signed(entry: Entry, key: Ed25519PublicKey) -> None:
    """Raise ProtocolError unless the log with this key has signed the entry."""
    try:
        key.verify(bytes.fromhex(entry.signature), SIGN_DOMAIN + bytes.fromhex(entry.hash))
    except InvalidSignature:
        raise ProtocolError("it is not signed with this log's key") from None


class Lost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A log that was here before, as a witness knew it."""

    log: Identity
    lines: Count
    head: Hash


class Opening(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a first line says."""

    format: Literal[1]
    log: Identity  # random
    who: str
    key: Hash  # Ed25519 public key, hex
    lost: tuple[Lost, ...] = ()

    def fields(self) -> dict[str, object]:
        """Return the fields of the first line; `opening_of` reads them back."""
        fields: dict[str, object] = msgspec.to_builtins(self)
        return fields if self.lost else {k: v for k, v in fields.items() if k != "lost"}


def opening_of(entry: Entry) -> Opening:
    """Return what the first line says. Raises ProtocolError if it is no first line."""
    if entry.kind != OPENED:
        raise ProtocolError(f"it is of kind {entry.kind}, expected {OPENED}: the beginning is gone")
    try:
        return msgspec.convert(dict(entry.fields), type=Opening)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"it does not open a log of this format: {error}") from None


def public_key(text: str) -> Ed25519PublicKey:
    """Return the public key in 64 hex digits. Raises ProtocolError."""
    if _HEX.fullmatch(text) is None:
        raise ProtocolError("audit log: expected a public key as 64 hex digits")
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))


def _hash(body: bytes) -> bytes:
    return hashlib.sha256(HASH_DOMAIN + body).digest()
