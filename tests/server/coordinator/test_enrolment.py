"""Sites come and go: one key per invitation, nothing half-way, no secret anywhere."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from anabranch.protocols.errors import ConfigError, MalformedMessage, ProtocolError, RunError
from anabranch.protocols.identity import authority
from anabranch.protocols.identity.invitation import Invitation
from anabranch.protocols.identity.join import Join, Joined, Leave, Renew, Report, encode
from anabranch.protocols.identity.peer import Announced, announce, public_hex
from anabranch.server.coordinator import enrolment
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.state import NO_INVITATION, SiteEntry
from tests.runs import TABLE_RUN

NOW = time.time()
DAY = 86400.0


class Nodes:
    """A SuperLink's nodes: the same key is the same node; can be made to refuse."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.gone: list[int] = []
        self.error: BaseException | None = None

    def register(self, key: bytes) -> int:
        if self.error is not None:
            raise self.error
        if key not in self.keys:
            self.keys.append(key)
        return 2**64 - 1 - self.keys.index(key)

    def unregister(self, node: int) -> None:
        self.gone.append(node)


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no test here cuts the power
    (tmp_path / "run.toml").write_text(TABLE_RUN)
    folder = tmp_path / "heart"
    return Federation.create(folder, "heart", ["fl.example.org"], 8443, tmp_path / "run.toml")


@pytest.fixture
def nodes() -> Nodes:
    return Nodes()


def asked(invitation: Invitation, key: authority.Key) -> Join:
    request = authority.certificate_request(key).decode()
    return Join(secret=invitation.secret, request=request, version="1.0")


def joined(
    federation: Federation, nodes: Nodes, name: str = "north", key: authority.Key | None = None
) -> tuple[Joined, authority.Key]:
    key = key or authority.new_key()
    invitation = enrolment.invite(federation, name, NOW)
    return enrolment.join(federation, asked(invitation, key), NOW, nodes.register), key


def site(federation: Federation, name: str = "north") -> SiteEntry:
    found = federation.state.site(name)
    assert found is not None
    return found


def kinds(federation: Federation) -> list[str]:
    lines = federation.audit.path.read_text().splitlines()
    return [msgspec.json.decode(line)["kind"] for line in lines]


# -- join ------------------------------------------------------------------------------------------


def test_a_site_joins_with_everything_it_needs(federation: Federation, nodes: Nodes) -> None:
    answer, key = joined(federation, nodes)
    certificate = authority.read_certificate(answer.certificate.encode(), "certificate")
    root = authority.read_certificate(answer.authority.encode(), "authority")
    moment = datetime.fromtimestamp(NOW, UTC)
    assert authority.site_of(certificate, root, moment) == ("heart", "north")
    assert certificate.public_key() == key.public_key()
    assert authority.fingerprint(root) == federation.authority().fingerprint
    assert answer.authors == federation.authors()
    assert (answer.contract, answer.time) == (TABLE_RUN, NOW)
    assert (answer.app, answer.version) == (federation.app, federation.version)
    entry = site(federation)
    assert entry.key == authority.key_digest(key.public_key())
    assert (entry.node, entry.status, entry.version) == (2**64 - 1, "active", "1.0")
    assert entry.expires == pytest.approx(NOW + 90 * DAY, abs=1)
    assert entry.serial == str(certificate.serial_number)
    assert nodes.keys == [enrolment.public_pem(key.public_key())]
    assert kinds(federation)[-2:] == ["invited", "joined"]
    assert len(encode(answer)) < 64 << 10


def test_the_state_is_copied_when_the_roster_changes(federation: Federation, nodes: Nodes) -> None:
    before = federation.backup_file.read_bytes()
    joined(federation, nodes)
    after = federation.backup_file.read_bytes()
    assert after != before
    enrolment.revoke(federation, "north")
    assert federation.backup_file.read_bytes() != after


def test_a_key_may_come_again_with_its_invitation_as_its_answer_may_be_lost(
    federation: Federation, nodes: Nodes
) -> None:
    key = authority.new_key()
    ask = asked(enrolment.invite(federation, "north", NOW), key)
    first = enrolment.join(federation, ask, NOW, nodes.register)
    again = enrolment.join(federation, ask, NOW + 5, nodes.register)
    assert again.site == first.site
    assert len(federation.state.sites()) == 1
    assert len(nodes.keys) == 1


def test_another_key_does_not_come_in_with_a_used_invitation(
    federation: Federation, nodes: Nodes
) -> None:
    invitation = enrolment.invite(federation, "north", NOW)
    enrolment.join(federation, asked(invitation, authority.new_key()), NOW, nodes.register)
    before = federation.state.sites()
    with pytest.raises(ProtocolError, match=NO_INVITATION):
        enrolment.join(federation, asked(invitation, authority.new_key()), NOW, nodes.register)
    assert federation.state.sites() == before
    assert len(nodes.keys) == 1


@pytest.mark.parametrize("case", ["unknown", "used", "expired"])
def test_unknown_used_and_expired_invitations_are_told_the_same(
    case: str, federation: Federation, nodes: Nodes
) -> None:
    invitation = enrolment.invite(federation, "north", NOW)
    now = NOW
    if case == "unknown":
        invitation = Invitation(address="x:1", authority="0" * 64, secret="A" * 43)
    elif case == "used":
        enrolment.join(federation, asked(invitation, authority.new_key()), NOW, nodes.register)
    else:
        now += DAY
    with pytest.raises(ProtocolError) as refused:
        enrolment.join(federation, asked(invitation, authority.new_key()), now, nodes.register)
    assert str(refused.value) == NO_INVITATION


def test_of_two_that_join_at_once_with_one_invitation_one_gets_in(
    federation: Federation, nodes: Nodes
) -> None:
    invitation = enrolment.invite(federation, "north", NOW)
    both, answers = threading.Barrier(2), []

    def join() -> None:
        mine = Federation(federation.folder)
        ask = asked(invitation, authority.new_key())
        both.wait()
        try:
            answers.append(enrolment.join(mine, ask, NOW, nodes.register).site)
        except ProtocolError as error:
            answers.append(str(error))

    threads = [threading.Thread(target=join) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [NO_INVITATION, "north"]
    assert len(federation.state.sites()) == 1


def test_when_the_superlink_refuses_the_invitation_is_as_it_was(
    federation: Federation, nodes: Nodes
) -> None:
    invitation = enrolment.invite(federation, "north", NOW)
    nodes.error = RunError("the SuperLink is starting")
    with pytest.raises(RunError, match="starting"):
        enrolment.join(federation, asked(invitation, authority.new_key()), NOW, nodes.register)
    assert federation.state.sites() == []
    nodes.error = None
    other = asked(invitation, authority.new_key())
    assert enrolment.join(federation, other, NOW, nodes.register).site == "north"


class Killed(BaseException):
    """The process ends here: nothing after it runs."""


@pytest.mark.parametrize("step", ["register", "log", "roster", "copy", "answer"])
def test_a_join_that_is_cut_off_leaves_no_site_or_a_whole_one_and_its_key_comes_again(
    step: str, federation: Federation, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = authority.new_key()
    ask = asked(enrolment.invite(federation, "north", NOW), key)

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(federation.state, "free", lambda *_: None)  # a dead process frees nothing
        match step:
            case "register":
                nodes.error = Killed()
            case "log":
                patch.setattr(federation.audit, "append", killed)
            case "roster":
                patch.setattr(federation.state, "add_site", killed)
            case "copy":
                patch.setattr(federation, "backup", killed)
            case "answer":
                patch.setattr(federation, "contract", killed)
        with pytest.raises(Killed):
            enrolment.join(federation, ask, NOW, nodes.register)
    nodes.error = None
    after = Federation(federation.folder)
    there = after.state.site("north")
    assert (there is None) == (step in ("register", "log", "roster"))
    assert after.state.unregistered() == []
    request = authority.certificate_request(authority.new_key()).decode()
    other = msgspec.structs.replace(ask, request=request)
    with pytest.raises(ProtocolError, match=NO_INVITATION):
        enrolment.join(after, other, NOW + 1, nodes.register)
    assert enrolment.join(after, ask, NOW + 1, nodes.register).site == "north"
    assert site(after).key == authority.key_digest(key.public_key())
    assert len(nodes.keys) == 1


BAD_REQUESTS: dict[str, str] = {
    "no PEM": "nothing",
    "a certificate": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    "cut": authority.certificate_request(authority.new_key()).decode()[:200],
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_request_that_is_none_uses_no_invitation_up(
    case: str, federation: Federation, nodes: Nodes
) -> None:
    invitation = enrolment.invite(federation, "north", NOW)
    ask = Join(secret=invitation.secret, request=BAD_REQUESTS[case], version="1")
    with pytest.raises(MalformedMessage, match="certificate request"):
        enrolment.join(federation, ask, NOW, nodes.register)
    assert [one.used for one in federation.state.open_invitations(NOW)] == [None]
    assert nodes.keys == []


@pytest.mark.parametrize("end", ["revoked", "left", "active"])
def test_a_key_that_was_in_the_roster_does_not_come_in_under_another_name(
    end: str, federation: Federation, nodes: Nodes
) -> None:
    _, key = joined(federation, nodes)
    federation.state.set_site("north", status=end)
    invitation = enrolment.invite(federation, "south", NOW)
    with pytest.raises(ProtocolError, match="in the roster before"):
        enrolment.join(federation, asked(invitation, key), NOW, nodes.register)
    assert [one.used for one in federation.state.open_invitations(NOW) if one.site == "south"] == [
        None
    ]


def test_a_revoked_site_does_not_come_back_with_the_invitation_it_used(
    federation: Federation, nodes: Nodes
) -> None:
    ask = asked(enrolment.invite(federation, "north", NOW), authority.new_key())
    enrolment.join(federation, ask, NOW, nodes.register)
    enrolment.revoke(federation, "north", "gone")
    with pytest.raises(ProtocolError, match="in the roster before"):
        enrolment.join(federation, ask, NOW + 1, nodes.register)
    assert site(federation).status == "revoked"


def test_a_name_is_free_again_for_a_new_key_once_its_site_is_out(
    federation: Federation, nodes: Nodes
) -> None:
    joined(federation, nodes)
    enrolment.revoke(federation, "north")
    answer, key = joined(federation, nodes)
    assert answer.site == "north"
    assert site(federation).key == authority.key_digest(key.public_key())


# -- invite ----------------------------------------------------------------------------------------


def test_a_secret_is_nowhere_on_the_disk(federation: Federation, nodes: Nodes) -> None:
    invitation = enrolment.invite(federation, "north", NOW)
    enrolment.join(federation, asked(invitation, authority.new_key()), NOW, nodes.register)
    other = enrolment.invite(federation, "south", NOW)
    files = [path for path in federation.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        for one in (invitation, other):
            assert one.secret.encode() not in path.read_bytes(), path
    assert invitation.secret not in repr(invitation)


def test_an_invitation_leads_to_this_federation(federation: Federation) -> None:
    text = enrolment.invite(federation, "north", NOW, hours=2).text()
    read = Invitation.parse(text)
    assert read.address == "fl.example.org:8443"
    assert read.authority == federation.authority().fingerprint
    (kept,) = federation.state.open_invitations(NOW)
    assert (kept.site, kept.expires) == ("north", NOW + 7200)


@pytest.mark.parametrize("name", ["", "North", "a b", "../x", "a" * 65, "north\n"])
def test_a_name_that_is_none_is_not_invited(name: str, federation: Federation) -> None:
    with pytest.raises(ConfigError, match="site"):
        enrolment.invite(federation, name, NOW)


@pytest.mark.parametrize("hours", [0.0, -1.0, 721.0, float("nan"), float("inf")])
def test_hours_that_are_none_are_refused(hours: float, federation: Federation) -> None:
    with pytest.raises(ConfigError, match="hours"):
        enrolment.invite(federation, "north", NOW, hours)


def test_an_active_site_is_not_invited(federation: Federation, nodes: Nodes) -> None:
    joined(federation, nodes)
    with pytest.raises(ConfigError, match=r"is in already.*revoke north"):
        enrolment.invite(federation, "north", NOW)


def test_no_more_sites_are_invited_than_the_limit_says(
    federation: Federation, nodes: Nodes
) -> None:
    file = federation.folder / "coordinator.toml"
    file.write_text(file.read_text().replace("max_sites = 100", "max_sites = 2"))
    small = Federation(federation.folder)
    joined(small, nodes)
    enrolment.invite(small, "south", NOW)
    enrolment.invite(small, "south", NOW)  # the same place
    with pytest.raises(ConfigError, match=r"max_sites = 2.*1 sites are in, 1 invited"):
        enrolment.invite(small, "west", NOW)
    enrolment.invite(small, "west", NOW + 2 * DAY)  # the other one has expired


# -- renew, report, leave, revoke ------------------------------------------------------------------


def test_a_certificate_is_renewed_for_the_same_key_alone(
    federation: Federation, nodes: Nodes
) -> None:
    _, key = joined(federation, nodes)
    before = site(federation)
    later = NOW + 70 * DAY
    request = authority.certificate_request(key).decode()
    answer = enrolment.renew(federation, before, Renew(request=request), later)
    made = authority.read_certificate(answer.certificate.encode(), "certificate")
    moment = datetime.fromtimestamp(later, UTC)
    assert authority.site_of(made, federation.root(), moment) == ("heart", "north")
    assert made.public_key() == key.public_key()
    after = site(federation)
    assert after.serial == str(made.serial_number) != before.serial
    assert after.expires == pytest.approx(later + 90 * DAY, abs=1)
    other = authority.certificate_request(authority.new_key()).decode()
    with pytest.raises(ProtocolError, match="for the same key"):
        enrolment.renew(federation, after, Renew(request=other), later)
    assert site(federation) == after


def announced(
    federation: Federation, request: str, peer: Ed25519PrivateKey | None = None
) -> tuple[Announced, str]:
    """Return an announcement that proves its key, and the key."""
    peer = peer or Ed25519PrivateKey.generate()
    root = authority.fingerprint(federation.root())
    return announce(peer, request.encode(), root), public_hex(peer)


def test_a_site_joins_with_the_peer_key_that_it_proves(
    federation: Federation, nodes: Nodes
) -> None:
    invitation = enrolment.invite(federation, "north", NOW)
    ask = asked(invitation, authority.new_key())
    peer, key = announced(federation, ask.request)
    ask = msgspec.structs.replace(ask, peer=peer)
    enrolment.join(federation, ask, NOW, nodes.register)
    assert site(federation).peer_key == key
    assert f'"peer":"{key}"' in federation.audit.path.read_text()
    enrolment.join(federation, ask, NOW + 1, nodes.register)  # its answer was lost
    assert site(federation).peer_key == key


PROOFS: dict[str, Callable[[Federation, str, Announced], Announced]] = {
    "a changed signature": lambda _, __, one: replace(one, proof="00" + one.proof[2:]),
    "another key": lambda _, __, one: replace(one, key=public_hex(Ed25519PrivateKey.generate())),
    "no key at all": lambda _, __, one: replace(one, key="ff" * 32),
    "that of another request": lambda f, _, __: announced(
        f, authority.certificate_request(authority.new_key()).decode()
    )[0],
    "that of another federation": lambda _, request, __: announce(
        Ed25519PrivateKey.generate(), request.encode(), "00" * 32
    ),
}


@pytest.mark.parametrize("case", PROOFS)
def test_a_peer_key_that_is_not_proved_lets_nobody_in(
    federation: Federation, nodes: Nodes, case: str
) -> None:
    invitation = enrolment.invite(federation, "north", NOW)
    ask = asked(invitation, authority.new_key())
    good, _ = announced(federation, ask.request)
    wrong = PROOFS[case](federation, ask.request, good)
    lines = federation.audit.path.read_text()
    with pytest.raises(ProtocolError, match="did not sign this certificate request"):
        enrolment.join(federation, replace(ask, peer=wrong), NOW, nodes.register)
    assert federation.state.sites() == []
    assert nodes.keys == []
    assert federation.audit.path.read_text() == lines
    enrolment.join(federation, replace(ask, peer=good), NOW, nodes.register)  # not used up


def test_another_sites_peer_key_lets_nobody_in(federation: Federation, nodes: Nodes) -> None:
    shared = Ed25519PrivateKey.generate()
    for name in ("north", "south"):
        invitation = enrolment.invite(federation, name, NOW)
        ask = asked(invitation, authority.new_key())
        ask = replace(ask, peer=announced(federation, ask.request, shared)[0])
        if name == "north":
            enrolment.join(federation, ask, NOW, nodes.register)
            continue
        with pytest.raises(ProtocolError, match="its peer key is that of site north"):
            enrolment.join(federation, ask, NOW, nodes.register)
    assert [one.name for one in federation.state.sites()] == ["north"]


def test_a_site_that_joined_without_a_peer_key_announces_one_with_its_next_renewal(
    federation: Federation, nodes: Nodes
) -> None:
    _, key = joined(federation, nodes)
    said = Report(boot="0" * 64, activity="idle", since=NOW, version=federation.version)
    old = msgspec.structs.replace(said, version="0.0.0")
    assert not enrolment.report(federation, site(federation), old, NOW).renew  # it has none to say
    assert enrolment.report(federation, site(federation), said, NOW).renew
    request = authority.certificate_request(key).decode()
    peer, public = announced(federation, request)
    enrolment.renew(federation, site(federation), Renew(request=request, peer=peer), NOW)
    assert site(federation).peer_key == public
    assert kinds(federation)[-2:] == ["peer-key", "renewed"]
    assert not enrolment.report(federation, site(federation), said, NOW).renew
    enrolment.renew(federation, site(federation), Renew(request=request), NOW)
    assert site(federation).peer_key == public  # what is not said is not forgotten


def test_a_renewal_with_a_wrong_proof_changes_nothing(federation: Federation, nodes: Nodes) -> None:
    _, key = joined(federation, nodes)
    before, lines = site(federation), federation.audit.path.read_text()
    request = authority.certificate_request(key).decode()
    other = authority.certificate_request(authority.new_key()).decode()
    wrong = Renew(request=request, peer=announced(federation, other)[0])
    with pytest.raises(ProtocolError, match="did not sign this certificate request"):
        enrolment.renew(federation, before, wrong, NOW)
    assert site(federation) == before
    assert federation.audit.path.read_text() == lines


def test_a_site_that_was_revoked_meanwhile_gets_no_new_certificate(
    federation: Federation, nodes: Nodes
) -> None:
    _, key = joined(federation, nodes)
    before = site(federation)
    enrolment.revoke(federation, "north")
    request = authority.certificate_request(key).decode()
    with pytest.raises(ProtocolError, match="not active any more"):
        enrolment.renew(federation, before, Renew(request=request), NOW)


def test_a_site_is_told_to_renew_in_the_last_third_of_its_certificate(
    federation: Federation, nodes: Nodes
) -> None:
    joined(federation, nodes)
    said = Report(boot="0" * 64, activity="idle", since=NOW, version="2.0")

    def hear(day: float) -> bool:
        return enrolment.report(federation, site(federation), said, NOW + day * DAY).renew

    assert [hear(day) for day in (0.0, 59.0, 61.0, 89.0)] == [False, False, True, True]
    assert federation.state.reports()["north"].report == said
    assert site(federation).version == "2.0"


def test_a_site_that_leaves_is_out_and_its_node_is_removed(
    federation: Federation, nodes: Nodes
) -> None:
    joined(federation, nodes)
    entry = site(federation)
    heard = enrolment.leave(federation, entry, Leave(reason="moved"), NOW, nodes.unregister)
    assert heard.time == NOW
    assert (site(federation).status, site(federation).reason) == ("left", "moved")
    assert nodes.gone == [entry.node]
    assert kinds(federation)[-1] == "left"


def test_a_revoked_site_is_out_with_its_reason_and_open_invitations(
    federation: Federation, nodes: Nodes
) -> None:
    joined(federation, nodes)
    entry = enrolment.revoke(federation, "north", "key was copied")
    assert (entry.status, entry.reason) == ("revoked", "key was copied")
    assert federation.state.site_by_key(entry.key) == entry
    assert kinds(federation)[-1] == "revoked"
    with pytest.raises(ConfigError, match="revoked already"):
        enrolment.revoke(federation, "north")
    with pytest.raises(ConfigError, match="none of this name"):
        enrolment.revoke(federation, "south")


def test_hello_says_who_answers(federation: Federation) -> None:
    said = enrolment.hello(federation, NOW)
    assert (said.federation, said.time) == ("heart", NOW)
