"""A site's calls: what is sent to whom, and what every failure is called."""

from __future__ import annotations

import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client.agent import door as module
from anabranch.client.agent.door import CutOff, Door, Refused, join_door, pinned, renew_if_needed
from anabranch.protocols.errors import AnabranchError, MalformedMessage, ProtocolError, RunError
from anabranch.protocols.identity import authority, join
from anabranch.protocols.identity.authority import Authority
from anabranch.protocols.identity.peer import public_hex, require_possessed
from tests.client.agent.conftest import Doors
from tests.client.agent.doors import (
    Coordinator,
    everything,
    long_ago,
    make_identity,
    rewrite,
    server_context,
)

REPORT = join.Report(boot="ab" * 32, activity="idle", since=1.0)


def call(coordinator: Coordinator, folder: Path) -> Door:
    """Return the door of a site that has joined this coordinator."""
    return Door(make_identity(folder, coordinator.root, address=coordinator.address))


def test_every_call_shows_the_sites_certificate(door: Coordinator, tmp_path: Path) -> None:
    with call(door, tmp_path / "site") as site:
        hello = site.hello()
        heard = site.report(REPORT)
        site.leave("moved away")
    assert (hello.federation, hello.version) == ("heart", door.version)
    assert abs(heard.time - time.time()) < 60
    assert [(one.path, one.certificate) for one in door.seen] == [
        ("/site/hello", True),
        ("/site/report", True),
        ("/site/leave", True),
    ]
    assert join.decode(door.seen[1].body, join.Report) == REPORT
    assert join.decode(door.seen[2].body, join.Leave).reason == "moved away"


def test_proxies_of_the_environment_are_not_used(
    door: Coordinator, tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port}")
    with call(door, tmp_path / "site") as site:
        assert site.hello().federation == "heart"


def refused(tmp_path: Path, coordinator: Coordinator, trust: Authority) -> AnabranchError:
    """Return what a call raises at a site of the authority `trust`."""
    identity = make_identity(tmp_path / "site", trust, address=coordinator.address)
    with Door(identity) as site, pytest.raises(AnabranchError) as caught:
        site.hello()
    assert coordinator.seen == []
    return caught.value


def test_another_coordinator_is_recognised_and_told_nothing(
    doors: Doors, tmp_path: Path, root: Authority
) -> None:
    other = authority.new_authority("heart", ["127.0.0.1"], datetime.now(UTC))
    error = refused(tmp_path, doors(root=other), root)
    assert isinstance(error, ProtocolError)
    assert "this is not the coordinator that invited you" in str(error)


def test_a_certificate_for_another_host_is_not_accepted(
    doors: Doors, tmp_path: Path, root: Authority
) -> None:
    tls = server_context(tmp_path / "tls", root, hosts=("localhost",))
    error = refused(tmp_path, doors(tls), root)
    assert isinstance(error, ProtocolError)
    assert "its certificate is not for the host 127.0.0.1" in str(error)


@pytest.mark.parametrize(
    ("days", "said"), [(-100, "has expired"), (100, "is not valid yet")], ids=["past", "future"]
)
def test_a_servers_certificate_out_of_its_time_points_to_the_clock(
    days: int, said: str, doors: Doors, tmp_path: Path, root: Authority
) -> None:
    begin = datetime.fromtimestamp(time.time() + days * 86_400, UTC)
    tls = server_context(tmp_path / "tls", root, now=begin)
    error = refused(tmp_path, doors(tls), root)
    assert isinstance(error, RunError)
    assert f"its certificate {said} by this machine's clock" in str(error)
    assert "Set the clock" in str(error)


def test_an_older_tls_is_not_spoken(doors: Doors, tmp_path: Path, root: Authority) -> None:
    tls = server_context(tmp_path / "tls", root)
    tls.minimum_version = ssl.TLSVersion.TLSv1_2
    tls.maximum_version = ssl.TLSVersion.TLSv1_2
    error = refused(tmp_path, doors(tls), root)
    assert isinstance(error, ProtocolError)
    assert "does not speak TLS 1.3" in str(error)


def test_an_expired_certificate_of_the_site_is_named(door: Coordinator, tmp_path: Path) -> None:
    identity = make_identity(tmp_path / "site", door.root, address=door.address, begin=long_ago())
    with Door(identity) as site, pytest.raises(Refused, match="has expired") as caught:
        site.hello()
    assert caught.value.code == "certificate"
    assert "anabranch site leave --offline" in str(caught.value)
    assert door.seen == []


def test_a_certificate_of_an_authority_that_the_server_does_not_know_is_named(
    doors: Doors, tmp_path: Path, root: Authority
) -> None:
    other = authority.new_authority("heart", ["127.0.0.1"], datetime.now(UTC))
    coordinator = doors()
    identity = make_identity(tmp_path / "site", other, address=coordinator.address, trust=other)
    (identity.home / "ca.pem").write_bytes(authority.certificate_pem(root.certificate))
    rewrite(tmp_path / "site", authority=root.fingerprint)
    identity = type(identity)(tmp_path / "site")
    with Door(identity) as site, pytest.raises(Refused, match="the coordinator does not"):
        site.hello()
    assert coordinator.seen == []


def test_nobody_there_is_worth_another_try(
    tmp_path: Path, root: Authority, closed_port: int
) -> None:
    identity = make_identity(tmp_path, root, address=f"127.0.0.1:{closed_port}")
    with Door(identity) as site, pytest.raises(RunError, match="cannot be reached") as caught:
        site.hello()
    assert "firewall" in str(caught.value)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, root: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        identity = make_identity(tmp_path, root, address=address)
        with Door(identity, timeout_s=0.05) as site, pytest.raises(RunError, match="timed out"):
            site.hello()


def test_a_refusal_says_what_the_coordinator_said(door: Coordinator, tmp_path: Path) -> None:
    refusal = join.Refusal(code="revoked", message="this site is revoked\n: left the study")
    door.refusal = (403, refusal)
    with call(door, tmp_path / "site") as site, pytest.raises(Refused) as caught:
        site.hello()
    assert caught.value.code == "revoked"
    assert str(caught.value) == (
        f"coordinator {door.address}: this site is revoked: left the study"
    )


def test_what_a_refusal_would_do_to_a_terminal_is_not_shown(
    door: Coordinator, tmp_path: Path
) -> None:
    door.refusal = (403, join.Refusal(code="revoked", message="\x1b[2J gone"))
    with call(door, tmp_path / "site") as site, pytest.raises(Refused) as caught:
        site.hello()
    assert caught.value.code == "http-403"
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("status", "kind"),
    [(500, RunError), (503, RunError), (429, RunError), (404, Refused), (302, Refused)],
)
def test_only_what_passes_with_time_is_worth_another_try(
    status: int, kind: type[AnabranchError], door: Coordinator, tmp_path: Path
) -> None:
    door.answers[join.HELLO] = lambda body: (status, b"<html>")
    with call(door, tmp_path / "site") as site, pytest.raises(kind, match=f"status {status}"):
        site.hello()


def test_an_answer_that_is_too_large_is_not_read(door: Coordinator, tmp_path: Path) -> None:
    door.answers[join.HELLO] = lambda body: (200, b" " * (join.MAX_BODY + 1))
    with (
        call(door, tmp_path / "site") as site,
        pytest.raises(MalformedMessage, match="more than 65536 bytes"),
    ):
        site.hello()


def test_a_connection_that_is_cut_off_is_worth_another_try_unless_the_certificate_is_over(
    door: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    door.answers[join.HELLO] = lambda body: (0, b"")
    with call(door, tmp_path / "site") as site:
        with pytest.raises(CutOff, match="ended the connection without an answer"):
            site.hello()
        monkeypatch.setattr(time, "time", lambda: site.identity.expires + 1)
        with pytest.raises(Refused, match="this site's certificate has expired"):
            site.hello()


def test_an_answer_that_takes_too_long_is_given_up(
    door: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWER_S", -1.0)
    with call(door, tmp_path / "site") as site, pytest.raises(RunError, match="took more than"):
        site.hello()


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"\xff", b'{"time":1,"more":2}', b"[" * 5000])
def test_an_answer_that_is_none_is_refused(body: bytes, door: Coordinator, tmp_path: Path) -> None:
    door.answers[join.REPORT] = lambda _: (200, body)
    with call(door, tmp_path / "site") as site, pytest.raises(MalformedMessage, match="Heard"):
        site.report(REPORT)


def test_a_certificate_is_renewed_when_it_is_time_or_asked_for(
    door: Coordinator, tmp_path: Path
) -> None:
    with call(door, tmp_path / "site") as site:
        identity = site.identity
        old, key = identity.certificate(), identity.key().private_numbers()
        late = identity.expires - 86_400
        assert not renew_if_needed(identity, site, time.time())
        assert door.seen == []
        assert renew_if_needed(identity, site, time.time(), asked=True)
        assert renew_if_needed(identity, site, late)
        assert identity.certificate() != old
        assert identity.key().private_numbers() == key
        site.hello()
    assert [one.path for one in door.seen] == ["/site/renew"] * 2 + ["/site/hello"]
    assert all(one.certificate for one in door.seen)
    request = join.decode(door.seen[0].body, join.Renew).request
    assert authority.request_key(request.encode()).public_numbers() == key.public_numbers


def test_threads_share_a_door_while_it_is_renewed(door: Coordinator, tmp_path: Path) -> None:
    with call(door, tmp_path / "site") as site, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(site.hello) for _ in range(20)]
        site.renew()
        assert {one.result().federation for one in asked} == {"heart"}


def test_a_renewal_that_fails_leaves_the_old_certificate_and_the_connection(
    door: Coordinator, tmp_path: Path
) -> None:
    with call(door, tmp_path / "site") as site:
        site.identity.peer_key()  # it is made when it is first asked for
        before = everything(tmp_path / "site")
        wrong = door.sign(authority.certificate_request(authority.new_key()).decode())
        answer = join.encode(join.Renewed(certificate=wrong))
        door.answers[join.RENEW] = lambda _: (200, answer)
        with pytest.raises(ProtocolError, match="for another key"):
            renew_if_needed(site.identity, site, time.time(), asked=True)
        assert everything(tmp_path / "site") == before
        assert site.hello().federation == "heart"


def test_the_pinned_authority_is_the_one_invited_to(door: Coordinator) -> None:
    assert pinned(door.invite()) == door.root.certificate
    assert door.seen == []


def test_a_secret_is_only_sent_with_the_authority_of_its_invitation(door: Coordinator) -> None:
    other = authority.new_authority("heart", ["127.0.0.1"], datetime.now(UTC))
    invitation = door.invite()
    request = authority.certificate_request(authority.new_key())
    peer = Ed25519PrivateKey.generate()
    with pytest.raises(ProtocolError, match="not the one that the invitation names"):
        join_door(invitation, request, "1", other.certificate, peer)
    assert door.seen == []
    assert join_door(invitation, request, "1", door.root.certificate, peer).site == "cardiology"
    asked = join.decode(door.seen[-1].body, join.Join)
    assert asked.peer is not None
    assert require_possessed(asked.peer, request, invitation.authority) == public_hex(peer)
