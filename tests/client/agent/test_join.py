"""Joining: what is made, what is never written or sent, and what makes a site not ready."""

from __future__ import annotations

import logging
import stat
import tomllib
from pathlib import Path

import pytest

from anabranch.client.agent.door import Refused
from anabranch.client.agent.identity import Identity, joined
from anabranch.client.agent.join import JoinReport, join_site, read_invitation
from anabranch.client.agent.leaving import leave
from anabranch.client.policy.policy_file import read_policy
from anabranch.client.site_file import SiteFile, read_site
from anabranch.protocols.errors import ConfigError, MalformedMessage
from anabranch.protocols.identity import join
from anabranch.protocols.identity.invitation import Invitation
from anabranch.protocols.identity.peer import public_hex
from anabranch.storage.audit_check import verify
from tests.client.agent.conftest import Doors
from tests.client.agent.doors import AUTHOR, Coordinator, everything


def test_one_call_makes_a_site_that_is_ready(
    door: Coordinator, records: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "site"
    report = join_site(door.invite(), records, folder)
    assert report.ready, report.preflight.told
    assert report.made == ("site.toml", "policy.toml", "contract.toml", "identity/")
    assert read_site(folder) == SiteFile(name="cardiology", data=str(records))
    policy = read_policy(folder)
    assert policy.coordinators == (door.root.fingerprint,)
    assert policy.authors == {"trial": AUTHOR}
    assert (folder / "contract.toml").read_text() == door.contract
    identity = Identity(folder)
    assert (identity.name, identity.address) == ("cardiology", door.address)
    assert identity.app == door.app
    assert verify(folder / "audit.jsonl").entries == 2  # opened, joined
    assert report.preflight.seconds_per_round is not None


def test_keys_are_made_here_and_for_their_owner_alone(
    door: Coordinator, records: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "site"
    join_site(door.invite(), records, folder)
    modes = {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode)
        for path in (folder, *folder.rglob("*"))
    }
    assert modes["."] == modes["identity"] == 0o700
    assert modes["identity/site.key"] == modes["policy.toml"] == modes["audit.key"] == 0o600
    assert modes["identity/peer.key"] == 0o600
    assert all(mode & 0o022 == 0 for mode in modes.values())
    key = (folder / "identity" / "site.key").read_bytes()
    assert all(key not in one.body for one in door.seen)
    peer = (folder / "identity" / "peer.key").read_bytes().strip()
    assert all(peer not in one.body for one in door.seen)
    asked = join.decode(next(one.body for one in door.seen if one.path == join.JOIN), join.Join)
    assert asked.peer is not None
    assert asked.peer.key == public_hex(Identity(folder).peer_key())
    assert f'"peer":"{asked.peer.key}"' in (folder / "audit.jsonl").read_text()


def test_the_secret_is_in_no_file_log_or_output(
    door: Coordinator,
    records: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    invitation = door.invite()
    report = join_site(invitation, records, tmp_path / "site")
    with pytest.raises(Refused) as caught:
        join_site(invitation, records, tmp_path / "second")
    said = "".join((*capfd.readouterr(), caplog.text, repr(report), str(report.as_dict())))
    said += repr(invitation) + repr(caught.value) + str(caught.value)
    assert invitation.secret.encode() in door.seen[0].body
    assert invitation.secret not in said
    assert invitation.secret.encode() not in everything(tmp_path)


def test_a_site_that_has_joined_stays_as_it_is(
    door: Coordinator, records: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "site"
    join_site(door.invite(), records, folder)
    before, seen = everything(folder), len(door.seen)
    again = door.invite()
    with pytest.raises(ConfigError, match="this is site 'cardiology' of 'heart' already"):
        join_site(again, records, folder)
    assert everything(folder) == before
    assert len(door.seen) == seen
    assert join_site(again, records, tmp_path / "other").ready  # it is still good


def test_options_and_places_go_into_site_toml(
    door: Coordinator, records: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "site"
    folder.mkdir(mode=0o700)
    inside = records.rename(folder / "records.csv")
    join_site(door.invite(), inside, folder, device="cpu", max_rank=4)
    assert tomllib.loads((folder / "site.toml").read_text()) == {
        "name": "cardiology",
        "data": "records.csv",
        "max_rank": 4,
    }


def test_who_joins_again_keeps_settings_policy_and_books(
    door: Coordinator, records: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "site"
    join_site(door.invite(), records, folder)
    settings = (folder / "site.toml").read_text() + "\n[budget]\nepsilon = 4.0\ndelta = 1e-6\n"
    (folder / "site.toml").write_text(settings)
    policy = (folder / "policy.toml").read_text() + "# mine\n"
    (folder / "policy.toml").write_text(policy)
    key = Identity(folder).key().private_numbers()
    leave(folder)
    door.site = "oncology"
    report = join_site(door.invite(), records, folder)
    assert report.made == ("site.toml", "contract.toml", "identity/")
    assert (folder / "policy.toml").read_text() == policy
    file = read_site(folder)
    assert (file.name, file.budget is not None) == ("oncology", True)
    assert Identity(folder).key().private_numbers() != key
    assert verify(folder / "audit.jsonl").entries == 4  # opened, joined, left, joined


def check(report: JoinReport, name: str) -> str:
    return next(one.sentence for one in report.preflight.checks if one.name == name)


def test_a_wrong_clock_joins_and_is_not_ready(
    door: Coordinator, records: Path, tmp_path: Path
) -> None:
    door.skew_s = 3600.0
    report = join_site(door.invite(), records, tmp_path / "site")
    assert joined(tmp_path / "site")
    assert not report.ready
    assert "clock is 3600 s behind the coordinator's: set it" in check(report, "clock")


def test_records_that_break_the_contract_join_and_are_not_ready(
    door: Coordinator, tmp_path: Path
) -> None:
    records = tmp_path / "records.csv"
    records.write_text("a,b,y\n1.0,zebra,yes\n2.0,3.0,perhaps\n")
    report = join_site(door.invite(), records, tmp_path / "site")
    assert joined(tmp_path / "site")
    assert not report.ready
    sentence = check(report, "data")
    assert "b: not a number: row 1" in sentence
    assert "y: unknown label (allowed, spelled exactly so: no, yes): row 2" in sentence
    said = str(report.as_dict()) + repr(report)
    assert "zebra" not in said
    assert "perhaps" not in said
    assert report.preflight.told == (
        "data: not ready; at the site, `anabranch site preflight` says why",
    )


def test_without_a_contract_yet_a_site_is_ready_for_one(
    doors: Doors, records: Path, tmp_path: Path
) -> None:
    report = join_site(doors().invite(), records, tmp_path / "site")
    assert report.ready
    assert not (tmp_path / "site" / "contract.toml").exists()
    assert report.preflight.seconds_per_round is None


def test_a_contract_that_cannot_be_read_joins_and_is_not_ready(
    doors: Doors, records: Path, tmp_path: Path
) -> None:
    report = join_site(doors(contract="name = 1").invite(), records, tmp_path / "site")
    assert joined(tmp_path / "site")
    assert "contract.toml" in check(report, "data")


def test_an_invitation_comes_as_itself_a_file_or_standard_input(tmp_path: Path) -> None:
    invitation = Invitation(address="h:1", authority="0" * 64, secret="s" * 43)
    file = tmp_path / "invitation"
    file.write_text(invitation.text() + "\n")
    for given in (invitation.text(), f" {invitation.text()}\n", f"@{file}", str(file)):
        assert read_invitation(given) == invitation
    assert read_invitation("-", lambda: invitation.text() + "\n") == invitation


@pytest.mark.parametrize("given", ["hunter2", "@hunter2", "anabranch:h:1/hunter2", "", "hunter\0"])
def test_what_is_no_invitation_is_not_repeated(given: str) -> None:
    with pytest.raises((ConfigError, MalformedMessage), match="invitation") as caught:
        read_invitation(given)
    assert "hunter" not in str(caught.value)


def test_a_file_that_holds_something_else_is_not_repeated(tmp_path: Path) -> None:
    for content in (b"hunter2", b"\xff\xfe", b"anabranch:h:1/" + b"0" * 64 + b"/hunter2"):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises((ConfigError, MalformedMessage)) as caught:
            read_invitation(str(tmp_path / "file"))
        assert "hunter" not in str(caught.value)
