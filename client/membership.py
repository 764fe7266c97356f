"""Which rows a data set has, and what each of them has spent.

    digest(row)      HMAC-SHA256(key, hash of the row), first 16 bytes; the key is the ledger's
    members          the digests of a data set's rows, sorted, as often as the rows occur
    fingerprint      SHA-256("anabranch data set 2\\n" ‖ members), hex: no order, every copy

Without the key nobody can tell from digests which rows they are of, even of rows that could be
guessed. Two rows of one digest count as one row, which never makes ε smaller.

A row has spent the composition of all events of all data sets that contain it. Rows of a data
set fall into groups that lie in the same data sets; the data set's ε is the largest of its
groups'. A group whose data sets are among those of another costs no more than that one.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

WIDTH = 16  # bytes of a digest


def members_of(rows: Iterable[bytes], key: bytes) -> bytes:
    """Return the members of a data set with these row hashes."""
    return b"".join(sorted(hmac.digest(key, row, "sha256")[:WIDTH] for row in rows))


def fingerprint_of(members: bytes) -> str:
    """Return the fingerprint of a data set."""
    return hashlib.sha256(b"anabranch data set 2\n" + members).hexdigest()


def groups(members: bytes, sets: Mapping[str, bytes]) -> dict[frozenset[str], int]:
    """Return how many of `members` lie in exactly which of `sets` (fingerprint -> members)."""
    digests = _array(members)
    if not len(digests):
        return {}
    inside = np.stack([np.zeros(len(digests), bool), *(_in(digests, s) for s in sets.values())])
    patterns, counts = np.unique(inside, axis=1, return_counts=True)
    names = list(sets)
    return {
        frozenset(name for name, there in zip(names, pattern[1:], strict=True) if there): int(count)
        for pattern, count in zip(patterns.T, counts, strict=True)
    }


def largest(found: Iterable[frozenset[str]]) -> list[frozenset[str]]:
    """Return the groups that no other group contains: one of them has the largest ε."""
    several = sorted(set(found), key=lambda group: (-len(group), sorted(group)))
    kept: list[frozenset[str]] = []
    for group in several:
        if not any(group <= other for other in kept):
            kept.append(group)
    return kept


def known(members: bytes, sets: Sequence[bytes]) -> int:
    """Return how many of `members` lie in at least one of `sets`."""
    digests = _array(members)
    seen = np.zeros(len(digests), bool)
    for other in sets:
        seen |= _in(digests, other)
    return int(seen.sum())


def _array(members: bytes) -> NDArray[np.bytes_]:
    """Return the digests; numpy pads with zeros, so fixed strings are equal iff all bytes are."""
    return np.frombuffer(members, f"S{WIDTH}")


def _in(digests: NDArray[np.bytes_], other: bytes) -> NDArray[np.bool_]:
    """Return which digests are in another data set, which is sorted."""
    there = _array(other)
    if not len(there):
        return np.zeros(len(digests), bool)
    at = np.minimum(np.searchsorted(there, digests), len(there) - 1)
    return np.asarray(there[at] == digests, bool)
