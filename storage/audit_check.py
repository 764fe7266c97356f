"""An audit log read and verified: offline, line by line, in memory that does not grow with it.

`verify` needs the file and the public key. It finds a line that was edited, removed, inserted or
moved, and another key; a witness, or a head that the other side has kept, shows a cut end.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.protocols.chain import Witness
from anabranch.protocols.errors import (
    AnabranchError,
    ConfigError,
    PrivacyError,
    ProtocolError,
)
from anabranch.protocols.identity.audit import (
    MAX_LINE,
    Entry,
    Opening,
    opening_of,
    public_key,
    read_line,
    require_next,
    require_signed,
)
from anabranch.storage.files import locked, open_to_others
from anabranch.storage.witness import state_folder

GAP, TORN = "gap", "torn"  # kinds of line that the log writes by itself


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A log that is whole, as far as it goes."""

    entries: int  # lines
    head: str  # hash of the last one
    key: str  # public key, hex
    log: str  # 32 hex digits
    who: str
    first: str  # time of the first line
    last: str  # time of the last one
    witnesses: int  # that saw a beginning of it; 0: nothing here says that its end was not cut
    gaps: tuple[str, ...]  # what the log itself says is missing, a sentence each
    torn: int  # bytes after the last line: a crash; the next append moves them to a side file
    repaired: int  # times that this happened


def verify(path: Path, public_key: str | None = None, contains: Collection[str] = ()) -> Verified:
    """Return what a log holds if every line of it is what was written.

    `public_key`, hex: that of whoever kept it; None takes the one in its first line, which
    proves no more than that one key signed it all. `contains`: heads that somebody has
    kept; each must be the hash of a line. Raises ProtocolError naming the first bad line, a
    witness that saw more, or a head that is not there.
    """
    try:
        return _verify(path, public_key, set(contains))
    except FileNotFoundError:
        raise ProtocolError(f"{path}: there is no audit log") from None
    except OSError as error:
        raise ProtocolError(f"{path}: the audit log cannot be read: {error}") from None


def _verify(path: Path, key: str | None, heads: set[str]) -> Verified:
    opening = opening_at(path)
    if key is not None and key != opening.key:
        raise ProtocolError(
            f"{path}: line 1 names the public key {opening.key[:16]}…, expected {key[:16]}…: this "
            "is another log, or another hand wrote it"
        )
    seen = read_witnesses(path, opening)
    gaps = [
        f"line 1: a log of {lost.lines} lines was here before this one" for lost in opening.lost
    ]
    repaired, first, last = 0, "", None
    size = _size(path)
    with path.open("rb") as file:
        for entry in checked(path, file, size, opening):
            first = first or entry.time
            repaired += entry.kind == TORN
            if entry.kind == GAP:
                gaps.append(f"line {entry.n}: {entry.fields.get('reason')}")
            for name, witness in seen:
                if witness.count == entry.n and witness.head != entry.hash:
                    raise ProtocolError(f"{path}: line {entry.n} is not the one that {name} saw")
            heads.discard(entry.hash)
            last = entry
        torn = size - file.tell()
    if last is None:
        raise ProtocolError(f"{path}: there is not one whole line")
    for name, witness in seen:
        if witness.count > last.n:
            raise ProtocolError(
                f"{path}: the end was cut after line {last.n}: {name} saw {witness.count} lines"
            )
    if heads:
        raise ProtocolError(
            f"{path}: no line has the hash {min(heads)}: the end was cut, or this is another log"
        )
    return Verified(
        entries=last.n,
        head=last.hash,
        key=opening.key,
        log=opening.log,
        who=opening.who,
        first=first,
        last=last.time,
        witnesses=len(seen),
        gaps=tuple(gaps),
        torn=torn,
        repaired=repaired,
    )


def checked(path: Path, file: BinaryIO, size: int, opening: Opening) -> Iterator[Entry]:
    """Yield the whole lines within the first `size` bytes, each verified.

    Afterwards the file stands where the last whole line ends. Raises ProtocolError.
    """
    key = public_key(opening.key)
    before: Entry | None = None
    end = 0
    while end < size:
        line = file.readline(min(MAX_LINE + 1, size - end))
        if not line.endswith(b"\n") and len(line) <= MAX_LINE:
            break
        number = 1 if before is None else before.n + 1
        try:
            entry = read_line(line.removesuffix(b"\n"))
            require_next(entry, before)
            require_signed(entry, key)
        except ProtocolError as error:
            raise ProtocolError(f"{path}: line {number}: {error}") from None
        yield entry
        before, end = entry, end + len(line)
    file.seek(end)


def opening_at(path: Path) -> Opening:
    """Return what the first line says; its signature is not verified. Raises ProtocolError."""
    with path.open("rb") as file:
        line = file.readline(MAX_LINE + 1)
    try:
        return opening_of(read_line(line.removesuffix(b"\n")))
    except ProtocolError as error:
        raise ProtocolError(f"{path}: line 1: {error}") from None


def logs_folder() -> Path:
    """Return the folder of the second witnesses of this user's audit logs.

    Raises PrivacyError for a user without a home folder, which XDG_STATE_HOME stands in for.
    """
    return state_folder().parent / "logs"


def witness_files(path: Path, log: str) -> tuple[Path, Path]:
    """Return the witnesses of this log: beside it, and in the user's state folder."""
    return path.with_suffix(".head"), logs_folder() / f"{log}.head"


def read_witnesses(path: Path, opening: Opening) -> list[tuple[Path, Witness]]:
    """Return the witnesses of a log that are there.

    Raises ProtocolError for a file that is none, or that speaks of a log which this one does not
    name as lost.
    """
    known = {lost.log for lost in opening.lost}
    found = []
    for file in _existing_witnesses(path, opening.log):
        witness = read_witness(file)
        if witness.ledger == opening.log:
            found.append((file, witness))
        elif witness.ledger not in known:
            raise ProtocolError(
                f"{path}: another log was here: {file} speaks of log {witness.ledger[:12]}…, this "
                f"one is {opening.log[:12]}…"
            )
    return found


def read_witness(file: Path) -> Witness:
    """Return what a witness saw. Raises ProtocolError."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Witness)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(
            f"{file}: this witness of an audit log cannot be read ({error}); restore it from a "
            "backup. If no backup has it, move it away: the other witness, if there is one, counts"
        ) from None


def lost_at(path: Path) -> list[Witness]:
    """Return what is witnessed of logs that were at `path`, where there is none now."""
    beside = path.with_suffix(".head")
    files = [*([beside] if beside.exists() else []), *sorted(logs_folder().glob("*.head"))]
    where = str(path.resolve())
    newest: dict[str, Witness] = {}
    for file in files:
        seen = read_witness(file)
        known = newest.get(seen.ledger)
        if (seen.path == where or file == beside) and (known is None or known.count < seen.count):
            newest[seen.ledger] = seen
    return list(newest.values())


def read_log_key(path: Path) -> Ed25519PrivateKey:
    """Return the key in a file. Raises ConfigError for a mode with more than the owner's rights."""
    if mode := open_to_others(path):
        raise ConfigError(
            f"{path}: mode {mode}, others may read or change the key; expected 0600: "
            f"chmod 600 {path}"
        )
    try:
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text("ascii")))
    except ValueError:
        raise ConfigError(f"{path}: expected an Ed25519 key, 64 hex digits") from None


def public_hex(key: Ed25519PrivateKey) -> str:
    """Return the public key that belongs to a private one, hex."""
    return key.public_key().public_bytes_raw().hex()


def log_report(
    path: Path, key: str | None = None, contains: Collection[str] = ()
) -> tuple[dict[str, object], str, bool]:
    """Return what `log verify` says of a log: for programs, for people, and whether it is whole.

    `key` is the public key, hex; None takes that of the private key beside the log if it is
    there. A log that says of itself that lines are missing is not whole.
    """
    try:
        own = path.with_suffix(".key")
        expected = key or (public_hex(read_log_key(own)) if own.exists() else None)
        found = verify(path, expected, contains)
    except AnabranchError as error:
        return {"ok": False, "path": str(path), "error": str(error)}, f"not whole: {error}", False
    ok = not found.gaps
    values = {"ok": ok, "path": str(path), "key_given": expected is not None, **asdict(found)}
    return values, _text(path, found, expected, len(contains)), ok


def _text(path: Path, found: Verified, expected: str | None, heads: int) -> str:
    lines = [
        f"{'whole' if not found.gaps else 'not whole'}: {path}, {found.entries} lines, every one "
        "signed and in its place",
        f"  kept by   {found.who}",
        f"  from      {found.first} to {found.last}",
        f"  key       {found.key}",
        f"  head      {found.head}",
        f"  witnesses {found.witnesses}" + (f", and {heads} heads given" if heads else ""),
    ]
    lines += [f"  missing   {gap}" for gap in found.gaps]
    if expected is None:
        lines.append("  note      no key was given: one key signed it all, whose is not known")
    if not found.witnesses and not heads:
        lines.append("  note      no witness here: only a head kept elsewhere shows a cut end")
    if found.repaired:
        lines.append(
            f"  note      {found.repaired} times a crash cut a line that was being written"
        )
    if found.torn:
        lines.append(f"  note      {found.torn} bytes of a line that was never finished: a crash")
    return "\n".join(lines)


def _existing_witnesses(path: Path, log: str) -> list[Path]:
    try:
        return [file for file in witness_files(path, log) if file.exists()]
    except PrivacyError:  # no home: only who writes must have one
        return [file for file in (path.with_suffix(".head"),) if file.exists()]


def _size(path: Path) -> int:
    """Return the size of the log between two appends, where it can be locked."""
    if not os.access(path.parent, os.W_OK):
        return path.stat().st_size
    with locked(path):
        return path.stat().st_size
