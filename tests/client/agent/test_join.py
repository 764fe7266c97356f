"""Joining: what is made, what is never written or sent, and what a failure leaves."""

from __future__ import annotations

import logging
import ssl
import stat
import time
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from anabranch.client.agent.door import Refused
from anabranch.client.agent.identity import Identity, joined
from anabranch.client.agent.join import JoinReport, join_site, read_invitation
from anabranch.client.agent.leaving import leave
from anabranch.client.policy.policy_file import read_policy
from anabranch.client.site_file import SiteFile, read_site
from anabranch.protocols.errors import ConfigError, MalformedMessage, ProtocolError, RunError
from anabranch.protocols.identity import authority, join
from anabranch.protocols.identity.authority import Authority
from anabranch.protocols.identity.invitation import Invitation
from anabranch.storage.audit_check import verify
from anabranch.storage.files import write_atomic
from tests.client.agent.conftest import Doors
from tests.client.agent.doors import (
    AUTHOR,
    Answer,
    Coordinator,
    everything,
    make_identity,
    server_context,
)


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
    assert all(mode & 0o022 == 0 for mode in modes.values())
    key = (folder / "identity" / "site.key").read_bytes()
    assert all(key not in one.body for one in door.seen)


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


def test_another_fingerprint_is_told_nothing(
    door: Coordinator, records: Path, tmp_path: Path
) -> None:
    invitation = door.invite(fingerprint="0" * 64)
    with pytest.raises(ProtocolError, match="this is not the coordinator that invited you"):
        join_site(invitation, records, tmp_path / "site")
    assert door.seen == []
    assert not joined(tmp_path / "site")


def test_somebody_who_shows_our_authority_without_its_key_is_told_nothing(
    doors: Doors, records: Path, tmp_path: Path, root: Authority
) -> None:
    other = authority.new_authority("heart", ["127.0.0.1"], datetime.now(UTC))
    tls = server_context(tmp_path / "tls", other)
    chain = (tmp_path / "tls" / "server.pem").read_bytes()
    own = authority.certificate_pem(other.certificate)
    (tmp_path / "tls" / "server.pem").write_bytes(
        chain.replace(own, authority.certificate_pem(root.certificate))
    )
    tls.load_cert_chain(tmp_path / "tls" / "server.pem", tmp_path / "tls" / "server.key")
    coordinator = doors(tls)
    with pytest.raises(ProtocolError, match="not signed by the federation's authority"):
        join_site(coordinator.invite(), records, tmp_path / "site")
    assert coordinator.seen == []


def test_a_certificate_for_another_host_is_told_nothing(
    doors: Doors, records: Path, tmp_path: Path, root: Authority
) -> None:
    coordinator = doors(server_context(tmp_path / "tls", root, hosts=("localhost",)))
    with pytest.raises(ProtocolError, match=r"not for the host 127\.0\.0\.1"):
        join_site(coordinator.invite(), records, tmp_path / "site")
    assert coordinator.seen == []


def test_nobody_there_leaves_nothing(records: Path, tmp_path: Path, closed_port: int) -> None:
    invitation = Invitation(address=f"127.0.0.1:{closed_port}", authority="0" * 64, secret="s" * 43)
    with pytest.raises(RunError, match="cannot be reached"):
        join_site(invitation, records, tmp_path / "site")
    assert list((tmp_path / "site").iterdir()) == []


def test_a_used_invitation_leaves_nothing_and_another_one_joins(
    door: Coordinator, records: Path, tmp_path: Path
) -> None:
    used, folder = door.invite(), tmp_path / "site"
    join_site(used, records, tmp_path / "first")
    with pytest.raises(Refused, match=r"unknown, used or expired.*ask .* for another one") as no:
        join_site(used, records, folder)
    assert no.value.code == "invitation"
    assert list(folder.iterdir()) == []
    assert join_site(door.invite(), records, folder).ready


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


def test_what_can_be_known_before_is_said_before_the_invitation_is_used(
    door: Coordinator, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = door.invite()
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "site.toml").write_text("name = 1")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="no such file or folder; nothing was sent"):
        join_site(invitation, tmp_path / "absent.csv", tmp_path / "site")
    with pytest.raises(ConfigError, match="others may write there; nothing was sent"):
        join_site(invitation, records, open_to_all)
    with pytest.raises(ConfigError, match=r"site\.toml: "):
        join_site(invitation, records, broken)
    with pytest.raises(ConfigError, match="cannot be written"):
        join_site(invitation, records, tmp_path / "file" / "site")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        join_site(invitation, records, tmp_path / "site", device="cuda")
    assert door.seen == []
    assert join_site(invitation, records, tmp_path / "site").ready


def test_a_join_interrupted_at_any_write_can_be_done_again(
    door: Coordinator, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list[str]()
    for count in range(20):
        folder, done = tmp_path / f"site{count}", list[str]()

        def stop(path: Path, data: bytes, mode: int = 0o644) -> None:
            if len(done) == count:  # noqa: B023 - called before the next turn
                raise KeyboardInterrupt
            write_atomic(path, data, mode)
            done.append(path.name)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(f"{join_site.__module__}.write_atomic", stop)
            patch.setattr(f"{Identity.__module__}.write_atomic", stop)
            try:
                join_site(door.invite(), records, folder)
            except KeyboardInterrupt:
                assert not joined(folder)
            else:
                names = done
                break
        report = join_site(door.invite(), records, folder)
        assert report.ready, (done, report.preflight.told)
    assert names[-4:] == ["site.key", "site.pem", "ca.pem", "coordinator.json"]
    assert set(names) >= {"site.toml", "policy.toml", "contract.toml"}


def test_an_answer_that_does_not_fit_writes_nothing(
    door: Coordinator, records: Path, tmp_path: Path
) -> None:
    folder, other = tmp_path / "site", authority.new_key()
    second = authority.new_authority("heart", ["127.0.0.1"], datetime.now(UTC))
    now = datetime.now(UTC)

    def answering(**changes: str) -> Callable[[bytes], Answer]:
        def answer(body: bytes) -> tuple[int, bytes]:
            asked = join.decode(body, join.Join)
            values: dict[str, Any] = {
                "site": "cardiology",
                "federation": "heart",
                "certificate": door.sign(asked.request),
                "authority": authority.certificate_pem(door.root.certificate).decode(),
                "authors": {},
                "version": "1",
                "app": "00" * 32,
                "time": 0.0,
            } | changes
            return 200, join.encode(join.Joined(**values))

        return answer

    foreign = authority.certificate_pem(second.site(other.public_key(), "cardiology", now))
    for message, changes in {
        "for another key": {"certificate": foreign.decode()},
        "for site 'cardiology'": {"site": "oncology"},
        "for site 'cardiology' of 'heart'": {"federation": "lung"},
        "another authority than the invitation": {
            "authority": authority.certificate_pem(second.certificate).decode()
        },
        "expected a certificate as PEM": {"certificate": "nonsense"},
    }.items():
        door.answers[join.JOIN] = answering(**changes)
        with pytest.raises(ProtocolError, match=message):
            join_site(door.invite(), records, folder)
        assert not joined(folder)
        assert [path.name for path in folder.rglob("*")] == ["identity", "site.key"]


def test_a_lost_answer_is_had_again_with_the_same_invitation(
    door: Coordinator, records: Path, tmp_path: Path
) -> None:
    folder, invitation = tmp_path / "site", door.invite()

    def lose(body: bytes) -> Answer:
        assert door.join(body)[0] == 200
        return 502, b""

    door.answers[join.JOIN] = lose
    with pytest.raises(RunError, match="status 502"):
        join_site(invitation, records, folder)
    del door.answers[join.JOIN]
    with pytest.raises(Refused, match="unknown, used or expired"):
        join_site(invitation, records, tmp_path / "other")  # another key
    key = (folder / "identity" / "site.key").read_bytes()
    assert join_site(invitation, records, folder).ready
    assert (folder / "identity" / "site.key").read_bytes() == key


def test_a_key_that_is_refused_makes_room_for_a_new_one(
    door: Coordinator, records: Path, tmp_path: Path, root: Authority
) -> None:
    folder = tmp_path / "site"
    key = make_identity(folder, root).key().private_numbers()
    (folder / "identity" / "coordinator.json").unlink()
    tried: list[bytes] = []

    def once(body: bytes) -> Answer:
        tried.append(body)
        if len(tried) == 1:
            text = "this key was in the roster before"
            return 403, join.encode(join.Refusal(code="refused", message=text))
        return door.join(body)

    door.answers[join.JOIN] = once
    assert join_site(door.invite(), records, folder).ready
    assert len(tried) == 2
    assert Identity(folder).key().private_numbers() != key


def test_a_door_that_is_closed_to_strangers_is_knocked_at_again(
    doors: Doors,
    records: Path,
    tmp_path: Path,
    root: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tls = server_context(tmp_path / "tls", root)
    tls.verify_mode = ssl.CERT_REQUIRED
    coordinator = doors(tls)
    invitation = coordinator.invite()
    monkeypatch.setattr(f"{join_site.__module__}.KNOCK_S", 0.0)
    with pytest.raises(Refused, match=r"no invitation is open there.*ask .* for another one"):
        join_site(invitation, records, tmp_path / "site")
    assert coordinator.seen == []

    def open_up(seconds: float) -> None:
        tls.verify_mode = ssl.CERT_OPTIONAL

    monkeypatch.setattr(f"{join_site.__module__}.KNOCK_S", 60.0)
    monkeypatch.setattr(time, "sleep", open_up)
    assert join_site(invitation, records, tmp_path / "site").ready


def test_a_door_that_cuts_off_strangers_is_knocked_at_again(
    door: Coordinator, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = door.invite()
    door.answers[join.JOIN] = lambda body: (0, b"")
    monkeypatch.setattr(f"{join_site.__module__}.KNOCK_S", 0.0)
    with pytest.raises(RunError, match="no invitation is open there"):
        join_site(invitation, records, tmp_path / "site")
    monkeypatch.setattr(f"{join_site.__module__}.KNOCK_S", 60.0)
    monkeypatch.setattr(time, "sleep", lambda seconds: door.answers.clear())
    assert join_site(invitation, records, tmp_path / "site").ready


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
