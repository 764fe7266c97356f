"""Attack: proposals with long rosters fill what a site's owner answers them in.

approvals.json has a bound. A coordinator that holds an author's key and reached it would keep
the owner from approving, rejecting or withdrawing anything.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from anabranch.client.policy.approvals import FILE, MAX_BYTES, MAX_ROSTER, MAX_WAITING, Approvals
from anabranch.protocols.errors import PolicyError
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.secagg.terms import Peer, Roster
from tests.client.policy.policies import NOW, private_config, signed_of

LONG = Roster.of(Peer(name=f"site-{i:04d}", key=f"{i:064x}") for i in range(2500))
CONFIG = private_config()


def proposed(number: int, roster: Roster | None = LONG) -> Signed:
    return signed_of(CONFIG, run=f"run-{number}", roster=None if roster is None else roster.digest)


def note(approvals: Approvals, number: int, roster: Roster | None = LONG) -> str:
    signed = proposed(number, roster)
    approvals.note(signed.proposal, signed.key, CONFIG, NOW, roster=roster)
    return signed.proposal.digest


def full(approvals: Approvals) -> list[str]:
    """Return the digests of as many proposals as are let wait."""
    found: list[str] = []
    said = ""
    while not said and len(found) < 90:
        try:
            found.append(note(approvals, len(found)))
        except PolicyError as error:
            said = str(error)
    assert "what waits for the owner of this site would be more" in said
    return found


def test_long_rosters_leave_room_for_the_owners_answers(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    assert len(msgspec.json.encode(LONG)) < MAX_ROSTER

    waiting = full(approvals)

    assert 10 < len(waiting) < 20
    assert (tmp_path / FILE).stat().st_size <= MAX_WAITING + 16 < MAX_BYTES / 2
    approvals.approve(waiting[0], by="kim", now=NOW)
    approvals.reject(waiting[1], by="kim", now=NOW)
    assert note(approvals, 100)  # what was answered waits no more


def test_a_rejection_keeps_no_roster(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    for digest in full(approvals):
        approvals.reject(digest, by="kim", now=NOW)

    assert (tmp_path / FILE).stat().st_size < 100_000


def test_a_roster_that_comes_later_is_held_against_the_same_bound(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    late = proposed(200)
    approvals.note(late.proposal, late.key, CONFIG, NOW)
    full(approvals)

    with pytest.raises(PolicyError, match="to answer some of it"):
        approvals.note(late.proposal, late.key, CONFIG, NOW, roster=LONG)

    assert approvals.entries()[late.proposal.digest].roster is None
