"""approvals.json: which runs the owner of a site has approved, rejected, or not answered yet.

    state      how it got there                              may go to
    pending    first message of a proposal nobody knows      approved, rejected
    by rule    the same, while a rule of policy.toml fits    approved, rejected
    approved   a person                                      rejected (withdrawn)
    rejected   a person                                      nothing: propose a new run

An entry whose configuration an earlier version took and this one refuses stays as it is in the
file, byte for byte, and is `Outdated`: rejected if it was, and else it counts for nothing.

A run with [secure_aggregation] is approved with its roster: it comes before the question, is kept
if it is the one that the author signed, and nothing is approved without it.

Entries are keyed by the digest of the proposal. "by rule" is a note for the owner: what counts is
the rule itself, asked anew for every message. Whoever can propose cannot fill disk or file: at most
PENDING wait, in at most MAX_WAITING bytes, at most PENDING are let in by rules, and a configuration
has at most MAX_CONFIG bytes. The file is replaced as a whole under a lock; one that is damaged, or
that others may write, refuses every run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from anabranch.client.policy.policy_file import PRIVATE, read_private
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError, MalformedMessage, PolicyError
from anabranch.protocols.identity.proposal import Hex, Proposal
from anabranch.protocols.secagg.terms import Roster
from anabranch.storage.files import locked, write_atomic

FILE = "approvals.json"
MAX_BYTES = 16 << 20  # of the file: thousands of runs
PENDING = 100  # entries that wait for the owner
MAX_ROSTER = 1 << 18  # bytes of a roster: some 2000 sites
MAX_WAITING = 4 << 20  # bytes of all entries that wait: their rosters may be long
MAX_CONFIG = 8192  # bytes of a run's configuration that is put before the owner
SHORTEST = 8  # digits that name an entry

State = Literal["pending", "by rule", "approved", "rejected"]


class Known(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of a proposal, whatever its configuration."""

    proposal: Proposal
    key: Hex  # the author's public key
    first_seen: float  # seconds since 1970, UTC
    decided: float | None = None
    by: str = ""  # the person's name on this machine, or the rule's
    reason: str = ""
    roster: Roster | None = None  # that of the proposal, once it has come

    @property
    def digest(self) -> str:
        """Return the digest of the proposal."""
        return self.proposal.digest


class Entry(Known, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One proposal, and what the owner says to it."""

    config: RunConfig  # what the digest in the proposal stands for
    state: State


class _Stored(Known, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry in the file, its configuration not looked at."""

    config: dict[str, Any]
    state: State


class Outdated(Known, frozen=True, kw_only=True):
    """An entry whose configuration this version refuses: it approves nothing."""

    state: Literal["rejected", "no longer valid"]
    was: State  # in the file
    why: str
    raw: bytes  # as it is in the file

    @property
    def sentence(self) -> str:
        """Return what is wrong with it."""
        return f"no longer valid with this version: {self.why}"


Entries = dict[str, Entry | Outdated]  # digest -> entry
Record = Callable[[Entry], object]


def ignore(entry: Entry) -> None:
    """Record nothing."""


@dataclass(frozen=True)
class Approvals:
    """The approvals of the site in `folder`. Every method raises PolicyError for a bad file."""

    folder: Path

    @property
    def path(self) -> Path:
        """Return where they are."""
        return self.folder / FILE

    def entries(self) -> Entries:
        """Return what is known, by digest, the oldest first."""
        if not self.path.exists():
            return {}
        try:
            data = read_private(self.path, MAX_BYTES)
            found = [_read(raw) for raw in msgspec.json.decode(data, type=tuple[msgspec.Raw, ...])]
        except (msgspec.DecodeError, UnicodeDecodeError, ConfigError, MalformedMessage) as error:
            raise PolicyError(
                f"{FILE}: {error}; until it is mended, or removed and every run approved anew, "
                "nothing is allowed"
            ) from None
        return {entry.digest: entry for entry in found}

    def find(self, prefix: str) -> Entry:
        """Return the only entry whose digest begins so.

        Raises PolicyError if there is not exactly one, or it is no longer valid.
        """
        if not re.fullmatch(rf"[0-9a-f]{{{SHORTEST},64}}", prefix):
            raise PolicyError(
                f"{prefix[:64]!r}: expected at least {SHORTEST} hex digits of a proposal's digest, "
                "as `anabranch site policy list` shows it"
            )
        found = [entry for digest, entry in self.entries().items() if digest.startswith(prefix)]
        if len(found) != 1:
            raise PolicyError(
                f"{prefix}: {len(found) or 'no'} proposals begin so; `anabranch site policy list` "
                "shows those that are known"
            )
        return _valid(found[0])

    def note(
        self,
        proposal: Proposal,
        key: str,
        config: RunConfig,
        now: float,
        rule: str = "",
        roster: Roster | None = None,
    ) -> bool:
        """Write down a proposal that is not known yet, for the owner; return whether it was new.

        `rule`: the name of the rule that allows it. `roster`: among whom it sums, for the owner.
        Raises PolicyError for a roster that is not the proposal's, and if too many wait already.
        """
        if roster is not None:
            _require_shown(proposal, roster)
        if (size := len(msgspec.json.encode(config))) > MAX_CONFIG:
            raise PolicyError(
                f"the configuration has {size} bytes, and at most {MAX_CONFIG} can be put before "
                "the owner of this site"
            )
        with self._changing() as entries:
            before = entries.get(proposal.digest)
            if isinstance(before, Outdated):
                if before.state == "rejected":
                    return False
                before = None  # it came again, and can be read now: the owner is asked anew
            if before is not None and before.roster is None and roster is not None:
                before = msgspec.structs.replace(before, roster=roster)
                entries[proposal.digest] = before
                _require_room(entries)
            state: State = "by rule" if rule else "pending"
            if before is not None and (
                before.state in ("approved", "rejected")
                or (before.state, before.by) == (state, rule)
            ):
                return False
            same = [one for one in entries.values() if one.state == state and one != before]
            if len(same) >= PENDING and rule:
                raise PolicyError(f"{PENDING} runs were let in by rules: a person has to decide")
            if len(same) >= PENDING:
                raise PolicyError(
                    f"{PENDING} runs wait for the owner of this site already: it has to answer "
                    "some of them with `anabranch site policy approve` or `reject`"
                )
            entries[proposal.digest] = Entry(
                proposal=proposal,
                key=key,
                config=config,
                state=state,
                first_seen=now,
                by=rule,
                roster=roster if before is None else before.roster,
            )
            _require_room(entries)
        return before is None

    def approve(self, digest: str, *, by: str, now: float, record: Record = ignore) -> Entry:
        """Approve a known proposal.

        Raises PolicyError if it is not known, was rejected, or its roster has not come yet.
        `record` is given the entry as it was, before the answer counts: if it raises, none does.
        """
        return self._decide(digest, "approved", record, by=by, now=now)

    def reject(
        self, digest: str, *, by: str, now: float, reason: str = "", record: Record = ignore
    ) -> Entry:
        """Reject a known proposal for good, or withdraw its approval."""
        return self._decide(digest, "rejected", record, by=by, now=now, reason=reason)

    def _decide(
        self, digest: str, state: State, record: Record, *, by: str, now: float, reason: str = ""
    ) -> Entry:
        with self._changing() as entries:
            before = entries.get(digest)
            if before is None:
                raise PolicyError(f"{digest[:12]}: no such proposal is known here")
            if before.state == "rejected":
                raise PolicyError(
                    f"{digest[:12]}: rejected by {before.by}, and a rejection is final; the author "
                    "can propose it again as a new run"
                )
            before = _valid(before)
            if state == "approved" and before.proposal.roster is not None and before.roster is None:
                raise PolicyError(
                    f"{digest[:12]}: among whom it sums is not known here yet: its roster comes "
                    "with the next question of the run. Look again in a minute"
                )
            record(before)
            roster = before.roster if state == "approved" else None  # of nobody's use any more
            after = msgspec.structs.replace(
                before, state=state, by=by, decided=now, reason=reason[:200], roster=roster
            )
            entries[digest] = after
            return after

    @contextmanager
    def _changing(self) -> Iterator[Entries]:
        """Yield the entries to be changed; they are written when the block ends."""
        with locked(self.path):
            entries = self.entries()
            before = dict(entries)
            yield entries
            if entries != before:
                data = msgspec.json.encode([_written(entry) for entry in entries.values()])
                if len(data) > MAX_BYTES:
                    raise PolicyError(
                        f"{FILE}: would be larger than {MAX_BYTES} bytes; put it away, and begin "
                        "anew: every run is then to be approved again"
                    )
                write_atomic(self.path, data, PRIVATE)


def _read(raw: msgspec.Raw) -> Entry | Outdated:
    """Return one entry of the file; raise what is wrong with it beside its configuration."""
    try:
        return msgspec.json.decode(raw, type=Entry)
    except (msgspec.ValidationError, ConfigError, MalformedMessage) as error:
        stored, why = msgspec.json.decode(raw, type=_Stored), str(error)
    known = {name: getattr(stored, name) for name in Known.__struct_fields__}
    state: Literal["rejected", "no longer valid"] = (
        "rejected" if stored.state == "rejected" else "no longer valid"
    )
    return Outdated(state=state, was=stored.state, why=why, raw=bytes(raw), **known)


def _written(entry: Entry | Outdated) -> Entry | msgspec.Raw:
    return msgspec.Raw(entry.raw) if isinstance(entry, Outdated) else entry


def _valid(entry: Entry | Outdated) -> Entry:
    """Return an entry that can be answered; raise PolicyError for one that is outdated."""
    if isinstance(entry, Outdated):
        raise PolicyError(
            f"{entry.digest[:12]}: {entry.sentence}. It approves nothing, so there is nothing to "
            "answer; the author can propose a changed configuration as a new run"
        )
    return entry


def _require_room(entries: Entries) -> None:
    """Raise PolicyError if what waits for the owner would fill the file."""
    waiting = [entry for entry in entries.values() if entry.state == "pending"]
    if len(msgspec.json.encode(waiting)) > MAX_WAITING:
        raise PolicyError(
            f"what waits for the owner of this site would be more than {MAX_WAITING} bytes: it has "
            "to answer some of it with `anabranch site policy approve` or `reject`"
        )


def _require_shown(proposal: Proposal, roster: Roster) -> None:
    """Raise PolicyError for a roster that is not what was signed, or that nobody could read."""
    if roster.digest != proposal.roster:
        raise PolicyError(
            f"the roster that came ({roster.digest[:12]}) is not the one that {proposal.author} "
            f"signed ({(proposal.roster or 'none')[:12]})"
        )
    if len(msgspec.json.encode(roster)) > MAX_ROSTER:
        raise PolicyError(
            f"the roster has {len(roster.peers)} sites, and at most {MAX_ROSTER} bytes of one can "
            "be put before the owner of this site"
        )
