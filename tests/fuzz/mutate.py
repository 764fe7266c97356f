"""Changes to valid bytes: some know nothing of their form, some know JSON, frames and PEM."""

from __future__ import annotations

import base64
import binascii
import copy
import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

NUMBERS = (b"-1", b"0", b"1e999", b"9007199254740993", b"18446744073709551616", b"9" * 5000, b"NaN")
STRANGE: tuple[object, ...] = (
    None, True, False, -1, 0, 2**53 + 1, 2**63, 2**64, 10**40, -0.0, 1e308, 5e-324, "", "\0",
    "\x1b[2J", "é" * 300, "a" * 5000, "../..", "a\n", [], {}, [[]] * 3, [None], {"": None},
)  # fmt: skip
_PEM = re.compile(rb"-----BEGIN ([A-Z ]+)-----\n(.*?)-----END \1-----\n", re.DOTALL)


def blind(data: bytes, rng: random.Random) -> bytes:
    """Change some bytes: flipped, replaced, inserted, removed, doubled, cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        begin = rng.randint(0, len(changed))
        end = min(len(changed), begin + rng.choice((0, 1, 1, 2, 4, 8, 64)))
        how = rng.randrange(6)
        if how == 0 and begin < len(changed):
            changed[begin] ^= 1 << rng.randrange(8)
        elif how == 1:
            changed[begin:end] = rng.randbytes(end - begin)
        elif how == 2:
            changed[begin:begin] = rng.choice((rng.randbytes(rng.randint(1, 8)), *NUMBERS))
        elif how == 3:
            del changed[begin:end]
        elif how == 4:
            changed[begin:begin] = changed[begin:end] * rng.choice((1, 2, 50))
        else:
            changed[begin:end] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * (end - begin)
    return bytes(changed[: rng.randint(0, len(changed))] if rng.random() < 0.05 else changed)


def fresh(data: bytes, rng: random.Random) -> bytes:
    """Return other bytes, for what takes them as a seed."""
    return rng.randbytes(16)


def json_value(data: bytes, rng: random.Random) -> bytes:
    """Exchange one value somewhere in a JSON document; `blind` for what is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return blind(data, rng)
    places = list(_places(value))
    if not places or rng.random() < 0.02:
        opening = rng.choice((b"[", b'{"a":'))
        return opening * rng.choice((3, 2000, 20_000))
    holder, key = rng.choice(places)
    how = rng.randrange(6)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice(("more", "", "n", key + "\n"))] = copy.deepcopy(rng.choice(STRANGE))
    elif how == 2:
        other, from_key = rng.choice(places)
        holder[key] = copy.deepcopy(other[from_key])
    elif how == 3 and isinstance(holder[key], str):
        text = holder[key].encode("utf-8", "surrogatepass")
        holder[key] = blind(text, rng).decode("utf-8", "replace")
    elif how == 4 and isinstance(holder[key], int | float):
        holder[key] = rng.choice((-1, 2, 1000, 2**31, 2**64)) * holder[key]
    else:
        holder[key] = copy.deepcopy(rng.choice(STRANGE))
    return _json(value)


def frame(data: bytes, rng: random.Random) -> bytes:
    """Change header or values of a frame, and make its length and checksum right again."""
    size = int.from_bytes(data[4:8], "little")
    head, body = data[8 : 8 + size], data[8 + size : -32]
    if rng.random() < 0.6:
        head = rng.choice((json_value, json_value, blind))(head, rng)
    else:
        body = blind(body, rng)
    size = len(head)
    if rng.random() < 0.05:
        size = rng.choice((0, 2**20 + 1, 2**31, 2**32 - 1))
    changed = b"ABA1" + size.to_bytes(4, "little") + head + body
    return changed + hashlib.sha256(changed).digest()


def pem(data: bytes, rng: random.Random) -> bytes:
    """Change the DER inside a PEM, which stays well-formed."""
    found = _PEM.search(data)
    if found is None:
        return blind(data, rng)
    try:
        der = base64.b64decode(found[2])
    except (binascii.Error, ValueError):
        return blind(data, rng)
    text = base64.encodebytes(blind(der, rng))
    return b"-----BEGIN %b-----\n%b-----END %b-----\n" % (found[1], text, found[1])


def pem_in_base64(data: bytes, rng: random.Random) -> bytes:
    """Change the DER of a PEM that is itself in base64, as in one of Flower's headers."""
    try:
        return base64.b64encode(pem(base64.b64decode(data, validate=True), rng))
    except (binascii.Error, ValueError):
        return blind(data, rng)


def changed(samples: Sequence[bytes], aware: Sequence[Mutation], rng: random.Random) -> bytes:
    """Return one of the samples after a few changes, or the halves of two of them."""
    data = rng.choice(samples)
    if rng.random() < 0.03:
        other = rng.choice(samples)
        return data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice((*aware, *aware, blind))(data, rng)
    return data


def _places(value: object) -> list[tuple[Any, Any]]:
    """Return (holder, key or index) of every value in a document."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        if isinstance(holder, dict):
            found += [(holder, key) for key in holder]
            waiting += holder.values()
        elif isinstance(holder, list):
            found += [(holder, at) for at in range(len(holder))]
            waiting += holder
    return found


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(
        "utf-8", "surrogatepass"
    )
