"""Among whom a site is summed: what its author signed, its owner saw, and its pins allow."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.client.agent.identity import Coordinator
from anabranch.client.policy.approvals import State
from anabranch.client.policy.guard import GuardedSite
from anabranch.client.policy.peers import FILE, Peers, Pin, limits_for, require_roster
from anabranch.client.policy.rules import NotAllowed
from anabranch.protocols.errors import AnabranchError, ConfigError, PolicyError
from anabranch.protocols.identity.proposal import sign
from anabranch.storage.files import write_atomic
from tests.client.policy.joined_site import Bare, Home, make_home, public, refused
from tests.client.policy.policies import AUTHORITY, EVE, HERE, NOW, Clock, policy_of, signed_of

# -- what is taken ---------------------------------------------------------------------------------


def test_who_is_new_on_an_approved_roster_is_pinned_once(home: Home) -> None:
    roster = home.roster("b", "c")
    signed = home.approved(roster)
    home.require(signed, roster)
    assert home.pins() == {"b": public("b"), "c": public("c")}
    assert home.log.lines == [
        (
            "peer-pinned",
            {
                "run": "run-1",
                "roster": roster.digest,
                "peers": {"b": public("b"), "c": public("c")},
            },
        )
    ]
    pin = Peers(home.folder).pins()["b"]
    assert pin == Pin(federation=AUTHORITY, name="b", key=public("b"), since=NOW, run="run-1")
    before = home.state()
    home.require(signed, roster)
    assert home.state() == before
    wider = home.roster("b", "c", "d")
    home.require(home.approved(wider, "run-2"), wider)
    assert home.log.lines[1][1]["peers"] == {"d": public("d")}


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rosters=st.lists(
        st.dictionaries(st.sampled_from("bcdez"), st.sampled_from("bcdez"), min_size=1),
        min_size=1,
        max_size=5,
    )
)
def test_a_name_never_has_another_key_than_the_first(
    tmp_path_factory: pytest.TempPathFactory, rosters: list[dict[str, str]]
) -> None:
    """Whatever rosters an author signs, and an owner approves, in any order."""
    home = make_home(tmp_path_factory.mktemp("law") / "site")
    model: dict[str, str] = {}
    for number, names in enumerate(rosters):
        wanted = {name: public(key) for name, key in names.items()}
        if len(set(wanted.values())) < len(wanted):
            continue  # no roster has a key twice
        roster = home.roster(**wanted)
        names_of = {key: name for name, key in model.items()}
        fits = all(
            model.get(name, key) == key and names_of.get(key, name) == name
            for name, key in wanted.items()
        )
        signed = home.approved(roster, f"run-{number}")
        if fits:
            home.require(signed, roster)
            model |= wanted
        else:
            with pytest.raises(NotAllowed, match="forget"):
                home.require(signed, roster)
        assert home.pins() == model


def test_a_key_that_was_forgotten_may_be_another(home: Home) -> None:
    first, other = home.roster("b"), home.roster(b=public("z"))
    home.require(home.approved(first), first)
    signed = home.approved(other, "run-2")
    refused(home, signed, other, "roster", "another than the one pinned on 2023-11-14")
    Peers(home.folder).forget("b", record=lambda pin: None)
    home.require(signed, other)
    assert home.pins() == {"b": public("z")}


def test_the_sites_of_another_federation_are_other_sites(home: Home) -> None:
    roster = home.roster("b")
    home.require(home.approved(roster), roster)
    path = home.folder / "identity" / "coordinator.json"
    stored = msgspec.json.decode(path.read_bytes(), type=Coordinator)
    write_atomic(path, msgspec.json.encode(msgspec.structs.replace(stored, authority="9" * 64)))
    assert home.pins() == {}
    other = home.roster(b=public("z"))
    home.require(home.approved(other, "run-2"), other)
    assert home.pins() == {"b": public("z")}


def test_a_rule_lets_a_run_in_with_the_roster_that_a_person_approved(home: Home) -> None:
    roster = home.roster("b", "c")
    like = home.approved(roster, "run-0").proposal.digest
    home.policy(approval={"mode": "by rule", "rules": [{"name": "study", "like": like}]})
    guard = GuardedSite(home.folder, Bare(), home.log, Clock(), HERE)
    same = home.signed(roster)
    guard.admit("run-1", home.config, same)
    home.require(same, roster)
    wider = home.roster("b", "c", "d")
    another = home.signed(wider, "run-2")
    guard.show_roster(wider)
    with pytest.raises(NotAllowed, match="waiting for the owner"):
        guard.admit("run-2", home.config, another)
    refused(home, another, wider, "pending", "waiting for the owner")


# -- what is refused, and changes nothing ----------------------------------------------------------


def test_a_roster_that_the_author_did_not_sign_is_refused(home: Home) -> None:
    """Sybils beside the real sites, a swapped key, a site left out: another digest."""
    roster = home.roster("b", "c")
    signed = home.approved(roster)
    for other in (
        home.roster("b", "c", "z"),
        home.roster("b", c=public("z")),
        home.roster("b"),
        home.roster(),
    ):
        refused(home, signed, other, "roster", "is not the one that anna signed")


def test_an_unsigned_or_forged_roster_is_refused(home: Home) -> None:
    roster = home.roster("b", "c")
    signed = home.approved(roster)
    refused(home, None, roster, "unsigned", "no signed proposal")
    forged = msgspec.structs.replace(signed, signature="0" * 128)
    refused(home, forged, roster, "author", "not signed by anna")
    theirs = sign(signed.proposal, EVE)
    refused(home, theirs, roster, "author", "not signed by an author whom this site knows")
    claimed = msgspec.structs.replace(theirs, key=signed.key)
    refused(home, claimed, roster, "author", "not signed by anna")
    wider = home.roster("b", "c", "z")
    renamed = msgspec.structs.replace(signed.proposal, roster=wider.digest)
    moved = msgspec.structs.replace(signed, proposal=renamed)
    refused(home, moved, wider, "author", "not signed by anna")
    nobody = msgspec.structs.replace(signed.proposal, author="eve")
    refused(home, sign(nobody, EVE), roster, "author", "whom this site knows")


def test_a_run_without_a_roster_is_summed_with_nobody(home: Home) -> None:
    bare = signed_of(home.config)
    refused(home, bare, home.roster("b", "c"), "roster", r"signed \(none\)")


@pytest.mark.parametrize("state", ["pending", "rejected"])
def test_nobody_is_pinned_for_a_run_that_is_not_approved(home: Home, state: State) -> None:
    roster = home.roster("b", "c")
    refused(home, home.signed(roster), roster, "pending", "waiting for the owner")
    home.approve(home.signed(roster), roster, state)
    refused(home, home.signed(roster), roster, "pending", "waiting for the owner")


def test_another_key_for_a_pinned_name_is_refused_whoever_signs(home: Home) -> None:
    """Also where new sites come along: none of them is pinned."""
    roster = home.roster("b", "c")
    home.require(home.approved(roster), roster)
    swapped = home.roster("b", "d", c=public("z"))
    signed = home.approved(swapped, "run-2")
    refused(home, signed, swapped, "roster", "site c's key is another.*site peers forget c")


def test_a_pinned_key_under_another_name_is_refused(home: Home) -> None:
    roster = home.roster("b")
    home.require(home.approved(roster), roster)
    renamed = home.roster(z=public("b"))
    signed = home.approved(renamed, "run-2")
    refused(home, signed, renamed, "roster", "site z has the key that is pinned for b")


def test_a_site_is_on_the_roster_with_its_own_key_or_takes_no_part(home: Home) -> None:
    without = home.roster("b", "c", a="")
    refused(
        home,
        home.approved(without),
        without,
        "roster",
        "site a is not on the run's roster.*propose the run again",
    )
    swapped = home.roster("b", "c", a=public("z"))
    refused(
        home,
        home.approved(swapped, "run-2"),
        swapped,
        "roster",
        "has another key for site a than the one it holds",
    )


def test_new_sites_are_refused_where_the_owner_adds_them(home: Home) -> None:
    home.policy(cohort={"new_peers": "refuse"})
    roster = home.roster("b", "c", "d", "e", "z")
    signed = home.approved(roster)
    refused(home, signed, roster, "roster", r"b, c, d and 2 more: .*site peers add NAME KEY")
    for name in "bcdez":
        Peers(home.folder).add(name, public(name), now=NOW, record=lambda pin: None)
    home.require(signed, roster)
    assert home.log.lines == []


def test_nobody_is_pinned_if_the_log_does_not_take_it(home: Home) -> None:
    class Full:
        def append(self, kind: str, **fields: object) -> object:
            raise ConfigError("audit.jsonl: no room")

    roster = home.roster("b", "c")
    signed = home.approved(roster)
    with pytest.raises(AnabranchError, match="no room"):
        require_roster(home.folder, signed, roster, audit=Full(), clock=Clock())
    assert home.pins() == {}


@pytest.mark.parametrize("data", [b"{", b"[1]", b'[{"name": "b"}]', b"\xff", b"null"])
def test_pins_that_cannot_be_read_refuse_every_sum(home: Home, data: bytes) -> None:
    write_atomic(home.folder / FILE, data, 0o600)
    roster = home.roster("b", "c")
    signed = home.approved(roster)
    with pytest.raises(PolicyError, match=r"peers\.json: .*no secure sum"):
        home.require(signed, roster)
    assert (home.folder / FILE).read_bytes() == data


def test_pins_that_others_may_write_refuse_every_sum(home: Home) -> None:
    write_atomic(home.folder / FILE, b"[]", 0o622)
    (home.folder / FILE).chmod(0o622)
    roster = home.roster("b", "c")
    with pytest.raises(PolicyError, match="other users may write"):
        home.require(home.approved(roster), roster)


def pin_some(folder: Path, start: int) -> None:
    for number in range(start, start + 15):
        Peers(folder).add(f"p{number}", f"{number:064x}", now=NOW, record=lambda pin: None)


def test_no_pin_is_lost_under_two_processes(home: Home) -> None:
    spawn = multiprocessing.get_context("fork")
    both = [spawn.Process(target=pin_some, args=(home.folder, start)) for start in (0, 100)]
    for one in both:
        one.start()
    for one in both:
        one.join(60)
    assert len(home.pins()) == 30
    assert (home.folder / FILE).stat().st_mode & 0o777 == 0o600


def test_many_new_sites_fit_the_lines_of_the_log(home: Home) -> None:
    """Without `audit` the site's own log is taken; a line of it has a size."""
    many = {f"site-{n}-{'x' * 50}": f"{n:064x}" for n in range(600)}
    roster = home.roster(**many)
    require_roster(home.folder, home.approved(roster), roster, clock=Clock())
    lines = [json.loads(one) for one in (home.folder / "audit.jsonl").read_text().splitlines()]
    logged = [line["peers"] for line in lines if line["kind"] == "peer-pinned"]
    assert {name: key for some in logged for name, key in some.items()} == home.pins() == many


def test_the_floors_of_a_member_are_those_of_the_policy() -> None:
    limits = limits_for(policy_of(cohort={"minimum": 5, "threshold": 0.7}))
    assert (limits.minimum, limits.threshold) == (5, 0.7)
    assert limits_for(policy_of(cohort={"minimum": 1})).minimum == 2
