"""Attack of time: what an earlier version let an owner answer, and this one's checks refuse.

One such entry locked a site's owner out of every run, also a rejected one.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from anabranch.cli.main import run
from anabranch.client.policy.approvals import FILE, Approvals, Entry, Outdated, State
from anabranch.client.policy.rules import decide
from anabranch.protocols.errors import PolicyError
from anabranch.protocols.identity.proposal import Signed
from tests.client.policy.policies import (
    NOW,
    asked_of,
    entry_of,
    policy_of,
    private_config,
    refusal,
    signed_of,
    write_coordinator,
    write_policy,
)

GROUPS = private_config(
    federation={"method": "altqr", "cohort": 20, "weighting": "uniform"},
    robust={"rule": "median"},
    secure_aggregation={"group": 5, "minimum": 3},
)
OLD = signed_of(GROUPS, run="old", roster="d" * 64)
OTHER = private_config(seed=1)
STATES: tuple[State, ...] = ("pending", "by rule", "approved", "rejected")
WHY = "no longer valid with this version: secure_aggregation.group"


def signed(number: int) -> Signed:
    return signed_of(OTHER, run=f"run-{number}")


def stored(state: State, by: str = "kim") -> bytes:
    """Return the entry as an earlier version wrote it: fields in another order, groups of 3."""
    now = json.loads(msgspec.json.encode(entry_of(OLD, GROUPS, state, by)))
    text = json.dumps({name: now[name] for name in sorted(now)}, indent=1)
    assert text.count('"group": 5') == 1
    return text.replace('"group": 5', '"group": 3').encode()


def site(folder: Path, *entries: bytes) -> Approvals:
    """Return the approvals of a site: these, and one of today that was approved."""
    today = msgspec.json.encode(entry_of(signed(0), OTHER))
    (folder / FILE).write_bytes(b"[" + b",".join((*entries, today)) + b"]")
    (folder / FILE).chmod(0o600)
    return Approvals(folder)


@pytest.mark.parametrize("state", STATES)
def test_it_stays_as_it_is_and_locks_nobody_out(tmp_path: Path, state: State) -> None:
    approvals = site(tmp_path, stored(state))

    approvals.note(signed(1).proposal, signed(1).key, OTHER, NOW)
    approvals.approve(signed(1).proposal.digest, by="kim", now=NOW)
    approvals.reject(signed(0).proposal.digest, by="kim", now=NOW)

    assert stored(state) in (tmp_path / FILE).read_bytes()
    old, first, second = approvals.entries().values()
    assert isinstance(old, Outdated)
    assert (old.was, old.state == "rejected") == (state, state == "rejected")
    assert (first.state, second.state) == ("rejected", "approved")
    message = asked_of(OTHER, signed(1), entries=approvals.entries())
    assert decide(policy_of(), message) is None


@pytest.mark.parametrize("state", STATES)
def test_it_approves_nothing_and_only_a_rejection_counts(tmp_path: Path, state: State) -> None:
    """The run itself, too, if it comes: here with a configuration that its entry has not."""
    approvals = site(tmp_path, stored(state))
    policy = policy_of(cohort={"secure_aggregation": "required"})

    message = asked_of(GROUPS, OLD, entries=approvals.entries())
    assert refusal(policy, message)[0] == ("rejected" if state == "rejected" else "pending")

    approvals.note(OLD.proposal, OLD.key, GROUPS, NOW)
    entry = approvals.entries()[OLD.proposal.digest]
    if state == "rejected":
        assert isinstance(entry, Outdated)
    else:
        assert isinstance(entry, Entry)  # asked anew
        assert entry.state == "pending"


@pytest.mark.parametrize("state", STATES)
def test_nobody_can_answer_it(tmp_path: Path, state: State) -> None:
    approvals = site(tmp_path, stored(state))
    digest, before = OLD.proposal.digest, (tmp_path / FILE).read_bytes()

    with pytest.raises(PolicyError, match=WHY):
        approvals.find(digest[:12])
    for answer in (approvals.approve, approvals.reject):
        with pytest.raises(PolicyError, match="rejection is final" if state == "rejected" else WHY):
            answer(digest, by="kim", now=NOW)
    assert (tmp_path / FILE).read_bytes() == before


def test_no_rule_takes_it_as_what_a_run_has_to_be_like(tmp_path: Path) -> None:
    rule = {"name": "study", "like": OLD.proposal.digest}
    policy = policy_of(approval={"mode": "by rule", "rules": [rule]})
    entries = site(tmp_path, stored("approved")).entries()

    code, sentence = refusal(policy, asked_of(OTHER, signed(1), entries=entries))

    assert code == "pending"
    assert "is no longer valid with this version" in sentence


def test_a_rule_has_let_it_in_still(tmp_path: Path) -> None:
    rule = {"name": "study", "like": signed(0).proposal.digest, "max_runs": 1}
    policy = policy_of(approval={"mode": "by rule", "rules": [rule]})

    new = asked_of(OTHER, signed(1), entries=site(tmp_path).entries())
    assert decide(policy, new) is None
    entries = site(tmp_path, stored("by rule", by="study")).entries()
    assert (
        "it has approved 1 runs" in refusal(policy, asked_of(OTHER, signed(1), entries=entries))[1]
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"federation": "heart"', b'"federation": 3'),
        (b'"key":', b'"kay":'),
        (b'"state": "approved"', b'"state": "no longer valid"'),
        (b'"first_seen":', b'"was": "approved", "first_seen":'),
        (b'"config": {', b'"config": 1, "more": {'),
    ],
)
def test_what_is_damaged_beside_the_configuration_refuses_every_run(
    tmp_path: Path, old: bytes, new: bytes
) -> None:
    entry = stored("approved")
    assert old in entry

    with pytest.raises(PolicyError, match=r"approvals.json: .*nothing is allowed"):
        site(tmp_path, entry.replace(old, new)).entries()


def test_a_configuration_that_is_no_table_refuses_every_run(tmp_path: Path) -> None:
    entry = json.loads(stored("approved")) | {"config": None}

    with pytest.raises(PolicyError, match=r"approvals.json: .*nothing is allowed"):
        site(tmp_path, json.dumps(entry).encode()).entries()


@pytest.mark.parametrize("state", STATES)
def test_the_owner_sees_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], state: State
) -> None:
    folder = tmp_path / "site"
    write_coordinator(folder, "aarhus")
    write_policy(folder, policy_of())
    site(folder, stored(state))
    short = OLD.proposal.digest[:12]

    assert run(["site", "policy", "list", "-f", str(folder)]) == 0
    assert f"{short}: {WHY}" in capsys.readouterr().out
    assert run(["site", "policy", "list", "-f", str(folder), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["runs"][0]
    assert listed["was"] == state
    assert listed["invalid"].startswith("secure_aggregation.group")

    assert run(["site", "policy", "show", "-f", str(folder)]) == 0
    assert "1 proposals are no longer valid with this version" in capsys.readouterr().out
    assert run(["site", "policy", "approve", short, "-f", str(folder), "--yes"]) == 1
    assert WHY in capsys.readouterr().err
