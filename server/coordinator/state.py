"""What a coordinator knows, for all its processes: a restart loses nothing, counts nothing twice.

Supervisor, door, page, every run and the command line each open the same file
(server/coordinator/state_file.py); every change is one transaction. Times are seconds since 1970,
UTC, and always arguments.

    invite ─► redeem(secret, key) ─► enrol ─► active ─► left | revoked
                    └─► free: the site could not be taken in; the invitation is as before

An invitation lets one key in, once. The same key may come again for RETRY_S, as its answer may have
been lost. A key that was ever in the roster never comes in as another site, or again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from anabranch.protocols.errors import ConfigError, ProtocolError
from anabranch.protocols.identity.join import Report
from anabranch.protocols.secagg.terms import Roster
from anabranch.server.coordinator.entries import Asked as Asked
from anabranch.server.coordinator.entries import Desired as Desired
from anabranch.server.coordinator.entries import OpenInvitation as OpenInvitation
from anabranch.server.coordinator.entries import Reported as Reported
from anabranch.server.coordinator.entries import RunEntry as RunEntry
from anabranch.server.coordinator.entries import RunState as RunState
from anabranch.server.coordinator.entries import SiteEntry as SiteEntry
from anabranch.server.coordinator.entries import SiteStatus as SiteStatus
from anabranch.server.coordinator.entries import Wait as Wait
from anabranch.server.coordinator.state_file import (
    StateFile,
    change,
    damaged,
    make,
    one,
    put,
    require_own_peer,
    struct_of,
    text_of,
)

RETRY_S = 600.0  # for which the key that used an invitation may come again
NO_INVITATION = "invitation: unknown, used or expired"

S = TypeVar("S", bound=msgspec.Struct)


class State:
    """The state at `path`, which `State.create` made.

    Raises ConfigError for a file that is missing, damaged or of another version, saying what to
    do; every method raises RunError while the disk is full or another process keeps writing, and
    has then changed nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = StateFile(path)

    @classmethod
    def create(cls, path: Path) -> State:
        """Make the state of a new federation; ConfigError if there is one."""
        make(path)
        return cls(path)

    def close(self) -> None:
        """Close the file; nothing is lost without it."""
        self._file.close()

    def check(self) -> None:
        """Read the whole file; raise ConfigError if any of it is damaged."""
        self._file.check()

    def backup(self, target: Path) -> None:
        """Write a copy of this moment to `target`, whole or not at all, mode 0600."""
        self._file.backup(target)

    # -- invitations -----------------------------------------------------------------------------

    def invite(self, site: str, secret_hash: str, expires: float, now: float) -> None:
        """Keep an invitation; one for the same site that was not used is withdrawn."""
        with self._file.writing() as db:
            db.execute("DELETE FROM invitations WHERE site = ? AND used IS NULL", (site,))
            db.execute(
                "INSERT INTO invitations (secret_hash, site, created, expires) VALUES (?, ?, ?, ?)",
                (secret_hash, site, now, expires),
            )

    def open_invitations(self, now: float) -> list[OpenInvitation]:
        """Return those with which somebody may join now, the first to expire first."""
        found = self._file.rows(
            "SELECT site, expires, used FROM invitations WHERE expires > ? "
            "AND (used IS NULL OR used > ?) ORDER BY expires, site",
            now,
            now - RETRY_S,
        )
        return [msgspec.convert(row, OpenInvitation) for row in found]

    def redeem(self, secret_hash: str, now: float, key: str = "") -> str:
        """Use an invitation for a key (its digest); return the site's name.

        Of many that come with one invitation, one key gets in; only that key may come again, for
        RETRY_S. Raises ProtocolError, with one text for an invitation that is unknown, used or
        expired.
        """
        with self._file.writing() as db:
            row = db.execute(
                "SELECT * FROM invitations WHERE secret_hash = ?", (secret_hash,)
            ).fetchone()
            if row is None or row["expires"] <= now:
                raise ProtocolError(NO_INVITATION)
            if row["used"] is not None:
                if not key or row["key"] != key or row["used"] + RETRY_S <= now:
                    raise ProtocolError(NO_INVITATION)
                return str(row["site"])
            db.execute(
                "UPDATE invitations SET used = ?, key = ? WHERE secret_hash = ?",
                (now, key, secret_hash),
            )
            return str(row["site"])

    def free(self, secret_hash: str, key: str) -> None:
        """Take a `redeem` back: the key could not be taken in. Nothing if the site has it."""
        with self._file.writing() as db:
            db.execute(
                "UPDATE invitations SET used = NULL, key = '' WHERE secret_hash = ? AND key = ? "
                "AND NOT EXISTS (SELECT 1 FROM sites "
                "WHERE sites.name = invitations.site AND sites.key = invitations.key)",
                (secret_hash, key),
            )

    def arrived(self, site: str) -> None:
        """The site has its certificate: what let it in lets nobody in again."""
        with self._file.writing() as db:
            db.execute("DELETE FROM invitations WHERE site = ? AND used IS NOT NULL", (site,))

    def withdraw_invitations(self) -> None:
        """Forget every invitation, used or not."""
        with self._file.writing() as db:
            db.execute("DELETE FROM invitations")

    # -- the roster ------------------------------------------------------------------------------

    def add_site(self, entry: SiteEntry) -> None:
        """Add a site, in the place of one of that name which was revoked or left.

        The same site with the same key replaces itself. Raises ProtocolError if the name is that
        of an active site with another key, or the key was in the roster before, or its peer key
        is another site's.
        """
        with self._file.writing() as db:
            there = one(db, "SELECT * FROM sites WHERE name = ?", entry.name)
            again = there is not None and (there["key"], there["status"]) == (entry.key, "active")
            if there is not None and there["status"] == "active" and not again:
                raise ProtocolError(
                    f"site {entry.name}: there is an active site of this name; ask for an "
                    "invitation with another one, or have this one revoked first"
                )
            if not again:
                if one(db, "SELECT 1 FROM keys WHERE key = ?", entry.key) is not None:
                    raise ProtocolError(
                        f"site {entry.name}: this key was in the roster before; make a new one"
                    )
                db.execute("INSERT INTO keys VALUES (?, ?)", (entry.key, entry.name))
                db.execute("DELETE FROM reports WHERE site = ?", (entry.name,))
                db.execute("DELETE FROM sites WHERE name = ?", (entry.name,))
            require_own_peer(db, entry.name, entry.peer_key)
            put(db, "sites", entry)

    def knows_key(self, key: str) -> str | None:
        """Return which site a key (its digest) belongs or belonged to, None for a new key."""
        found = self._file.rows("SELECT site FROM keys WHERE key = ?", key)
        return found[0]["site"] if found else None

    def site(self, name: str) -> SiteEntry | None:
        """Return the site that has or had this name last."""
        return self._first(SiteEntry, "SELECT * FROM sites WHERE name = ?", name)

    def site_by_key(self, key_digest: str) -> SiteEntry | None:
        """Return the site of a key; None, too, once another site took its name."""
        return self._first(SiteEntry, "SELECT * FROM sites WHERE key = ?", key_digest)

    def sites(self) -> list[SiteEntry]:
        """Return all sites, by name."""
        return self._all(SiteEntry, "SELECT * FROM sites ORDER BY name")

    def unregistered(self) -> list[SiteEntry]:
        """Return active sites that the SuperLink is still to be told of (node None)."""
        return [site for site in self.sites() if site.status == "active" and site.node is None]

    def set_site(self, name: str, **changes: Any) -> SiteEntry:
        """Change fields of a site; return the whole. ConfigError if there is no such site.

        A site that is revoked or leaves takes invitations to its name along that were not used.
        Raises ProtocolError for a peer key that is another site's.
        """
        with self._file.writing() as db:
            require_own_peer(db, name, changes.get("peer_key"))
            entry = change(db, "sites", name, SiteEntry, changes)
            if entry.status != "active":
                db.execute("DELETE FROM invitations WHERE site = ? AND used IS NULL", (name,))
            return entry

    def report(self, site: str, report: Report, at: float) -> None:
        """Keep what a site says; what it said before is forgotten."""
        with self._file.writing() as db:
            text = text_of(report)
            db.execute("INSERT OR REPLACE INTO reports VALUES (?, ?, ?)", (site, text, at))

    def reports(self) -> dict[str, Reported]:
        """Return what each site said last."""
        return {
            row["site"]: Reported(
                site=row["site"], report=self._decode(row["report"], Report), at=row["at"]
            )
            for row in self._file.rows("SELECT * FROM reports ORDER BY site")
        }

    # -- runs ------------------------------------------------------------------------------------

    def propose(self, entry: RunEntry, roster: Roster | None = None) -> None:
        """Add a run, and among whom it sums; ConfigError if there is one with this id."""
        with self._file.writing() as db:
            if one(db, "SELECT 1 FROM runs WHERE run = ?", entry.run) is not None:
                raise ConfigError(f"run {entry.run}: exists already; a run has an id of its own")
            put(db, "runs", entry)
            if roster is not None:
                db.execute("INSERT INTO rosters VALUES (?, ?)", (entry.run, text_of(roster)))

    def roster(self, run: str) -> Roster | None:
        """Return the roster that a run was proposed with; None: it has none."""
        found = self._file.rows("SELECT roster FROM rosters WHERE run = ?", run)
        return self._decode(found[0]["roster"], Roster) if found else None

    def run(self, run: str) -> RunEntry | None:
        """Return a run."""
        return self._first(RunEntry, "SELECT * FROM runs WHERE run = ?", run)

    def runs(self) -> list[RunEntry]:
        """Return all runs, the oldest first."""
        return self._all(RunEntry, "SELECT * FROM runs ORDER BY created, run")

    def set_run(self, run: str, **changes: Any) -> RunEntry:
        """Change fields of a run; return the whole. ConfigError if there is no such run."""
        with self._file.writing() as db:
            return change(db, "runs", run, RunEntry, changes)

    def wait(self, run: str, wait: Wait | None) -> None:
        """Say what a run waits for; None: for nothing any more."""
        with self._file.writing() as db:
            if wait is None:
                db.execute("DELETE FROM waits WHERE run = ?", (run,))
            else:
                text = text_of(wait)
                db.execute("INSERT OR REPLACE INTO waits VALUES (?, ?)", (run, text))

    def waits(self) -> dict[str, Wait]:
        """Return what each run waits for."""
        found = self._file.rows("SELECT * FROM waits ORDER BY run")
        return {row["run"]: self._decode(row["wait"], Wait) for row in found}

    def asked(self, run: str, site: str, asked: Asked | None) -> None:
        """Say what a run asked of a site last; None: nothing any more."""
        with self._file.writing() as db:
            if asked is None:
                db.execute("DELETE FROM asked WHERE run = ? AND site = ?", (run, site))
            else:
                text = text_of(asked)
                db.execute("INSERT OR REPLACE INTO asked VALUES (?, ?, ?)", (run, site, text))

    def asking(self, run: str) -> dict[str, Asked]:
        """Return what a run asked of each site last."""
        found = self._file.rows("SELECT * FROM asked WHERE run = ? ORDER BY site", run)
        return {row["site"]: self._decode(row["asked"], Asked) for row in found}

    # -- rows to structs -------------------------------------------------------------------------

    def _first(self, kind: type[S], query: str, *values: Any) -> S | None:
        return next(iter(self._all(kind, query, *values)), None)

    def _all(self, kind: type[S], query: str, *values: Any) -> list[S]:
        try:
            return [struct_of(row, kind) for row in self._file.rows(query, *values)]
        except msgspec.ValidationError as error:
            raise damaged(self.path, error) from None

    def _decode(self, text: str, kind: type[S]) -> S:
        try:
            return msgspec.json.decode(text, type=kind)
        except msgspec.DecodeError as error:
            raise damaged(self.path, error) from None
