"""Joining that fails: who is told nothing, what is left of it, and how it is done again."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from anabranch.client.agent.door import Refused
from anabranch.client.agent.identity import Identity, joined
from anabranch.client.agent.join import join_site
from anabranch.protocols.errors import ConfigError, ProtocolError, RunError
from anabranch.protocols.identity import authority, join
from anabranch.protocols.identity.authority import Authority
from anabranch.protocols.identity.invitation import Invitation
from anabranch.storage.files import write_atomic
from tests.client.agent.conftest import Doors
from tests.client.agent.doors import Answer, Coordinator, make_identity, server_context


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
        left = {path.name for path in folder.rglob("*") if not path.name.endswith(".lock")}
        assert left == {"identity", "site.key", "peer.key"}


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
    monkeypatch.setattr(f"{join_site.__module__}.KNOCKS", 1)
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
    monkeypatch.setattr(f"{join_site.__module__}.KNOCKS", 1)
    with pytest.raises(RunError, match="no invitation is open there"):
        join_site(invitation, records, tmp_path / "site")
    monkeypatch.setattr(f"{join_site.__module__}.KNOCK_S", 60.0)
    monkeypatch.setattr(time, "sleep", lambda seconds: door.answers.clear())
    assert join_site(invitation, records, tmp_path / "site").ready
