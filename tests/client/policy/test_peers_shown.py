"""What a site's owner sees of those whom it is summed with, and `anabranch site peers`."""

from __future__ import annotations

import json

import pytest

from anabranch.cli.main import run as cli
from anabranch.client.flower import Describe, _describe, pack_describe
from anabranch.client.policy.approvals import MAX_ROSTER, Approvals, Entry
from anabranch.client.policy.guard import GuardedSite
from anabranch.client.policy.peers import Peers, seen
from anabranch.client.policy.review import entry_text, roster_text, roster_values
from anabranch.client.policy.rules import NotAllowed
from anabranch.protocols.errors import PolicyError
from anabranch.protocols.identity.peer import fingerprint
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.secagg.terms import Roster
from tests.client.policy.joined_site import Bare, Home, public, refused
from tests.client.policy.policies import HERE, NOW, Clock, private_config, signed_of


def known(home: Home, signed: Signed) -> Entry:
    return Approvals(home.folder).find(signed.proposal.digest)


def ask(home: Home, signed: Signed, roster: Roster | None) -> None:
    """Ask as the coordinator does."""
    guard = GuardedSite(home.folder, Bare(), home.log, Clock(), HERE)
    question = Describe(run=signed.proposal.run, config=home.config, signed=signed, roster=roster)
    _describe(guard, pack_describe(question))


def test_an_owner_is_shown_who_is_on_the_roster_before_approving(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    first = home.roster("b", "c")
    home.require(home.approved(first, "run-0"), first)
    roster = home.roster("b", "d", c=public("z"))
    signed = home.signed(roster)
    with pytest.raises(NotAllowed, match="waiting for the owner"):
        ask(home, signed, roster)
    verdicts = {one.name: one.verdict for one in seen(home.folder, roster)}
    assert verdicts == {"a": "this site", "b": "pinned", "c": "ANOTHER KEY", "d": "new"}
    digest = signed.proposal.digest
    assert cli(["site", "policy", "approve", digest, "-f", str(home.folder), "--yes"]) == 0
    out = capsys.readouterr().out
    assert "sums        of at least 3 sites, opened if more than 67% agree" in out
    assert "roster      4 sites: 1 this site, 1 pinned, 1 new, 1 ANOTHER KEY\n" in out
    assert f"b  {fingerprint(public('b'))}  pinned since 2023-11-14\n" in out
    assert f"c  {fingerprint(public('z'))}  ANOTHER KEY\n" in out
    assert f"d  {fingerprint(public('d'))}  new\n" in out
    assert cli(["site", "policy", "list", "-f", str(home.folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["runs"][1]["roster"]
    assert [(one["name"], one["verdict"]) for one in shown] == list(verdicts.items())
    assert shown[3]["fingerprint"] == fingerprint(public("d"))
    refused(home, signed, roster, "roster", "site c's key is another")  # approved or not


def test_an_owner_sees_another_key_under_the_sites_own_name(home: Home) -> None:
    roster = home.roster("b", a=public("z"))
    signed = home.signed(roster)
    home.approve(signed, roster, "pending")
    text = roster_text(home.folder, known(home, signed))
    assert text.startswith("roster      2 sites: 1 this site, with ANOTHER KEY, 1 new\n")


def test_nothing_is_approved_before_its_roster_has_come(home: Home) -> None:
    roster = home.roster("b", "c")
    signed = home.signed(roster)
    with pytest.raises(NotAllowed, match="waiting for the owner"):
        ask(home, signed, None)
    assert "NOT HERE YET" in roster_text(home.folder, known(home, signed))
    assert roster_values(home.folder, known(home, signed)) is None
    with pytest.raises(PolicyError, match="its roster comes with the next question"):
        Approvals(home.folder).approve(signed.proposal.digest, by="kim", now=NOW)
    with pytest.raises(NotAllowed, match="waiting for the owner"):
        ask(home, signed, roster)
    assert known(home, signed).roster == roster
    Approvals(home.folder).approve(signed.proposal.digest, by="kim", now=NOW)
    ask(home, signed, roster)
    assert known(home, signed).state == "approved"
    assert home.pins() == {"b": public("b"), "c": public("c")}


def test_a_site_counts_no_records_for_a_run_that_it_could_not_be_summed_in(home: Home) -> None:
    """Nor trains, and spends privacy, for nothing."""
    first = home.roster("b", "c")
    home.require(home.approved(first, "run-0"), first)
    swapped = home.roster("b", c=public("z"))
    signed = home.approved(swapped)
    guard = GuardedSite(home.folder, Bare(), home.log, Clock(), HERE)
    guard.show_roster(swapped)
    with pytest.raises(NotAllowed, match="site c's key is another"):
        guard.admit("run-1", home.config, signed)
    with pytest.raises(NotAllowed, match="just admitted"):
        guard.sizes(home.config)
    assert home.log.kinds.count("refused") == 1


def test_a_roster_that_was_not_signed_is_not_put_before_the_owner(home: Home) -> None:
    roster, other = home.roster("b", "c"), home.roster("b", "c", "z")
    signed = home.signed(roster)
    with pytest.raises(NotAllowed, match="is not the one that anna signed"):
        ask(home, signed, other)
    assert Approvals(home.folder).entries() == {}
    with pytest.raises(NotAllowed, match="waiting for the owner"):
        ask(home, signed, None)  # what was shown before is not taken for this one
    assert known(home, signed).roster is None


def test_a_roster_that_nobody_could_read_is_refused(home: Home) -> None:
    many = {f"site-{n}": f"{n:064x}" for n in range(MAX_ROSTER // 80)}
    roster = home.roster(**many)
    with pytest.raises(NotAllowed, match="at most 262144 bytes of one can be put before"):
        ask(home, home.signed(roster), roster)
    assert Approvals(home.folder).entries() == {}


def test_a_run_that_sums_nothing_says_so(home: Home) -> None:
    config = private_config()
    signed = signed_of(config)
    Approvals(home.folder).note(signed.proposal, signed.key, config, NOW)
    entry = known(home, signed)
    assert "sums        none: the coordinator sees what each site sends" in entry_text(entry)
    assert roster_text(home.folder, entry) == ""


# -- the command line ------------------------------------------------------------------------------


def test_peers_are_listed_added_and_forgotten(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["-f", str(home.folder)]
    assert cli(["site", "peers", *where]) == 0
    out = capsys.readouterr().out
    assert fingerprint(home.own) in out
    assert "this site" in out
    assert cli(["site", "peers", "add", "b", public("b"), *where]) == 0
    assert capsys.readouterr().out == f"b is pinned: {fingerprint(public('b'))}\n"
    roster = home.roster("b", "c")
    home.require(home.approved(roster), roster)
    assert cli(["site", "peers", "list", *where, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["site"] == {"name": "a", "key": home.own, "fingerprint": fingerprint(home.own)}
    assert [(one["name"], one["run"]) for one in said["peers"]] == [("b", None), ("c", "run-1")]
    assert cli(["site", "peers", "forget", "b", "--yes", *where]) == 0
    assert home.pins() == {"c": public("c")}
    log = (home.folder / "audit.jsonl").read_text()
    assert log.count('"kind":"peer-pinned"') == 1
    assert log.count('"kind":"peer-forgotten"') == 1


@pytest.mark.parametrize(
    ("verb", "sentence"),
    [
        (["add", "b", "00"], "expected a site's name and its public key"),
        (["add", "../b", "00" * 32], "expected a site's name and its public key"),
        (["add", "c", "11" * 32], "site c is pinned since 2023-11-14"),
        (["add", "d", public("c")], "the key that is pinned for c"),
        (["forget", "b", "--yes"], "no such peer is pinned"),
    ],
)
def test_a_wrong_pin_is_refused(
    home: Home, verb: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Peers(home.folder).add("c", public("c"), now=NOW, record=lambda pin: None)
    before = home.state()
    assert cli(["site", "peers", *verb, "-f", str(home.folder)]) == 1
    assert sentence in capsys.readouterr().err
    assert home.state() == before
