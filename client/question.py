"""What a site writes down of a question and its answer; how it does so: answers.py.

question  what a site is asked in a round: assignment without `signed`, and adapter
key       SHA-256 of the question (key_of), hex
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from anabranch.client.ledger import Ledger, Limit
from anabranch.client.private_round import Cost
from anabranch.protocols import messages, wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import RunError
from anabranch.protocols.messages import Assignment, Trained
from anabranch.protocols.spend import Spend, Unit

FOLDER = "answers"
S = TypeVar("S", bound=msgspec.Struct)


class Attempt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """<key>.begun."""

    number: int  # ascending in the order in which they were begun
    run: str
    round: int
    after: int  # events in the ledger before this question reserved anything


class Result(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """result.json: what a round came to, nothing of it settled or moved yet."""

    number: int  # ascending in the order in which rounds were done
    run: str
    round: int
    report: Trained  # without what settling adds
    frame: str  # SHA-256, hex
    changes: tuple[str, ...]  # paths in the site's folder; change.i is to be the i-th
    cost: Cost | None  # None: the round is not private


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a round came to."""

    report: Trained  # without what settling adds
    frame: bytes
    changes: Mapping[str, bytes]  # path in the site's folder -> contents
    cost: Cost | None


def key_of(assignment: Assignment, adapter: Adapter) -> str:
    """Return the key of a question, hex: it depends on all that decides the answer.

    Not on who signed it: an approval that was renewed asks for the same work.
    """
    asked = messages.encode(msgspec.structs.replace(assignment, signed=None))
    digests = (hashlib.sha256(part).digest() for part in (asked, wire.encode(adapter)))
    return hashlib.sha256(b"anabranch question 1\0" + b"".join(digests)).hexdigest()


@dataclass(frozen=True)
class Reserving:
    """The books of one question: the ledger, with the reserve that the question has."""

    ledger: Ledger
    attempt: Attempt

    def reserve(
        self,
        rows: Sequence[bytes],
        run: str,
        round_number: int,
        spend: Spend,
        limits: Sequence[Limit] = (),
    ) -> int:
        """Reserve once: the entry of an earlier attempt is used again while it is open."""
        after = self.attempt.after
        return self.ledger.reserve(rows, run, round_number, spend, limits, again=after)

    def settle(self, entry: int, spend: Spend) -> str:
        """Settle the entry in the ledger."""
        return self.ledger.settle(entry, spend)

    def spent(self, rows: Sequence[bytes], delta: float, unit: Unit = "record") -> float:
        """Return what the ledger says."""
        return self.ledger.spent(rows, delta, unit)


def settled(result: Result, ledger: Ledger) -> Trained | None:
    """Return the report of a settled round; None if the ledger does not know its reserve."""
    cost = result.cost
    if cost is None:
        return result.report
    found = ledger.confirm(cost.entry, result.run, result.round, cost.spend, cost.delta)
    if found is None:
        return None
    return msgspec.structs.replace(result.report, ledger=found[0], epsilon=found[1])


def read(path: Path, kind: type[S]) -> S:
    """Return what a file says; raise RunError if it cannot be read."""
    try:
        return msgspec.json.decode(contents(path), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise damaged(path, str(error)) from None


def contents(path: Path) -> bytes:
    """Return the bytes of a file; raise RunError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise damaged(path, error.strerror or "cannot be read") from None


def damaged(path: Path, why: str) -> RunError:
    """Return an error that names the file inside the site's folder."""
    name = path.name if path.parent.name == FOLDER else f"{path.parent.name}/{path.name}"
    return RunError(
        f"{FOLDER}/{name} in the site's folder: {why}. Restore it; or remove that file, or the "
        "folder that it lies in, and the round is done again: a private one is then charged again"
    )


@contextmanager
def writing() -> Iterator[None]:
    """Turn what keeps a site from writing into a RunError that says what to do."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"the site cannot write down its round ({error.strerror}): make room there, or its "
            "folder writable, and ask again"
        ) from error
