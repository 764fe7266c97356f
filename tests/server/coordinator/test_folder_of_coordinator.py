"""A federation's folder: made whole, closed to others, one coordinator, and its state put back."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.protocols.errors import ConfigError, RunError
from anabranch.protocols.identity.authority import read_certificate, to_be_renewed
from anabranch.server.coordinator.folder import SOCKET_NAME, SOCKET_PATH, Federation
from anabranch.server.coordinator.recovery import restore_state
from anabranch.server.coordinator.state import SiteEntry, State
from anabranch.storage.audit_log import verify
from tests.runs import TABLE_RUN

SECRET = {"ca.key", "server.key", "operator.key", "page.token", "audit.key"}
NOW = datetime.now(UTC)


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no test here cuts the power
    return Federation.create(tmp_path / "heart", "heart", ["127.0.0.1", "fl.example.org"], 8443)


def add(federation: Federation, name: str, key: str) -> None:
    federation.state.add_site(
        SiteEntry(name=name, key=key, public_key="", joined=0, expires=1, serial="1", version="1")
    )


# -- init ------------------------------------------------------------------------------------------


def test_the_folder_and_every_secret_in_it_are_for_their_owner_alone(
    federation: Federation,
) -> None:
    federation.server_credentials()
    assert stat.S_IMODE(federation.folder.stat().st_mode) == 0o700
    files = [path for path in federation.folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= SECRET | {"state.sqlite", "audit.jsonl"}
    for path in files:
        if path.name in SECRET or path.name.startswith(("state", "audit")):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for path in federation.folder.rglob("*"):
        if path.is_dir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o700, path


def test_an_umask_that_lets_others_read_does_not(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = Federation.create(tmp_path / "heart", "heart", ["127.0.0.1"], 8443)
        made.server_credentials()
        made.state.sites()
    finally:
        os.umask(before)
    for path in made.folder.rglob("*"):
        if path.name in SECRET or path.name.startswith(("state", "audit")):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_what_is_made_is_in_the_audit_log(federation: Federation) -> None:
    assert verify(federation.audit.path).entries == 2  # opened, made
    assert federation.authority().fingerprint in federation.audit.path.read_text()


def test_a_folder_that_holds_something_is_left_alone(federation: Federation) -> None:
    before = {path: path.read_bytes() for path in federation.folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="not empty"):
        Federation.create(federation.folder, "other", ["127.0.0.1"], 8443)
    after = {path: path.read_bytes() for path in federation.folder.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize(
    ("name", "host", "match"),
    [("He art", "127.0.0.1", "name"), ("heart", "no/host", "address|hosts"), ("", "x", "name")],
)
def test_a_wrong_name_or_host_leaves_no_folder(
    name: str, host: str, match: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=match):
        Federation.create(tmp_path / "heart", name, [host], 8443)
    assert list(tmp_path.iterdir()) == []


def test_a_contract_is_kept_and_a_wrong_one_refused(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TABLE_RUN)
    made = Federation.create(tmp_path / "a", "a", ["127.0.0.1"], 8443, tmp_path / "run.toml")
    assert made.contract() == TABLE_RUN
    assert Federation.create(tmp_path / "b", "b", ["127.0.0.1"], 8443).contract() == ""
    (tmp_path / "run.toml").write_text("name = 1")
    with pytest.raises(ConfigError, match=r"run\.toml"):
        Federation.create(tmp_path / "c", "c", ["127.0.0.1"], 8443, tmp_path / "run.toml")
    (tmp_path / "run.toml").write_text(TABLE_RUN + "#" * 40000)
    with pytest.raises(ConfigError, match="at most 32768 are sent"):
        Federation.create(tmp_path / "c", "c", ["127.0.0.1"], 8443, tmp_path / "run.toml")


# -- secrets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "use"),
    [
        ("authority/ca.key", lambda f: f.authority()),
        ("authority/server.key", lambda f: f.server_credentials()),
        ("authors/operator.key", lambda f: f.author("operator")),
        ("page.token", lambda f: f.page_token()),
    ],
)
def test_a_secret_that_others_can_read_is_refused_and_never_shown(
    file: str, use: object, federation: Federation
) -> None:
    assert callable(use)
    use(federation)
    text = (federation.folder / file).read_text()
    (federation.folder / file).chmod(0o640)
    with pytest.raises(ConfigError, match=r"0640.*chmod 600") as refused:
        use(federation)
    assert text.splitlines()[-1] not in str(refused.value)
    (federation.folder / file).unlink()
    with pytest.raises(ConfigError, match=r"restore it|expected one of"):
        use(federation)


def test_authors_are_the_keys_in_their_folder(federation: Federation) -> None:
    key = Ed25519PrivateKey.generate()
    file = federation.folder / "authors" / "dr-lee.key"
    file.write_text(key.private_bytes_raw().hex())
    file.chmod(0o600)
    assert set(federation.authors()) == {"dr-lee", "operator"}
    assert federation.authors()["dr-lee"] == key.public_key().public_bytes_raw().hex()
    for name in ("nobody", "../authority/ca", ""):
        with pytest.raises(ConfigError, match="expected one of dr-lee, operator"):
            federation.author(name)
    file.write_text("short")
    with pytest.raises(ConfigError, match="64 hex digits"):
        federation.author("dr-lee")


# -- the server's certificate ----------------------------------------------------------------------


def test_the_servers_certificate_is_renewed_for_the_same_key_when_its_time_is_nearly_over(
    federation: Federation,
) -> None:
    key, file = federation.server_credentials(NOW)
    first, secret = file.read_bytes(), key.read_bytes()
    federation.server_credentials(NOW + timedelta(days=19))
    assert file.read_bytes() == first
    federation.server_credentials(NOW + timedelta(days=21))
    second = read_certificate(file.read_bytes(), "server.pem")
    assert file.read_bytes() != first
    assert key.read_bytes() == secret
    assert second.public_key() == read_certificate(first, "server.pem").public_key()
    second.verify_directly_issued_by(federation.root())
    assert not to_be_renewed(second, NOW + timedelta(days=22))


def settle(federation: Federation, before: str, after: str) -> Federation:
    file = federation.folder / "coordinator.toml"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))
    return Federation(federation.folder)


def test_the_servers_certificate_follows_the_hosts(federation: Federation) -> None:
    _, file = federation.server_credentials()
    first = file.read_bytes()
    fewer = settle(federation, ', "fl.example.org"]', "]")
    fewer.server_credentials()
    assert file.read_bytes() != first


@pytest.mark.parametrize("host", ["other.org", "fl.example.org.evil.org", "127.0.0.2", "::1"])
def test_a_host_that_the_authority_may_not_sign_for_is_refused(
    host: str, federation: Federation
) -> None:
    more = settle(federation, ', "fl.example.org"]', f', "{host}"]')
    with pytest.raises(ConfigError, match=f"hosts: '{host}'"):
        more.server_credentials()


# -- sockets and locks -----------------------------------------------------------------------------


def test_the_socket_folder_is_private_short_and_the_same_for_every_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        monkeypatch.setattr(tempfile, "tempdir", f"{name}/t")
        for place, inside in ((Path(name, "a"), True), (Path(name, "d" * 100), False)):
            made = Federation.create(place, "heart", ["127.0.0.1"], 8443)
            Path(name, "t").mkdir(exist_ok=True)
            folder = made.socket_folder()
            assert folder == Federation(place).socket_folder()
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert len(os.fsencode(folder)) + 1 + SOCKET_NAME <= SOCKET_PATH
            assert folder.parent == (made.folder if inside else Path(name, "t"))
        monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "t" * 100)
        folder = made.socket_folder()
        assert folder.parent == Path("/tmp")
        folder.rmdir()


def test_a_socket_folder_of_somebody_else_is_refused(
    federation: Federation, tmp_path: Path
) -> None:
    folder = federation.socket_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="not a folder of this user"):
        federation.socket_folder()
    folder.unlink()


HOLD = """
import sys
from pathlib import Path
from anabranch.server.coordinator.folder import Federation
with Federation(Path(sys.argv[1])).serving():
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_one_coordinator_serves_a_folder_and_a_killed_one_leaves_it_free(
    federation: Federation,
) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(federation.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(RunError, match="serving this federation already"), federation.serving():
        pass
    with pytest.raises(RunError, match="serving this federation already"):
        restore_state(federation, 0.0)
    other.kill()
    other.communicate()
    with federation.serving():
        pass


@pytest.mark.parametrize("run", ["../x", "a/b", "", ".", ".."])
def test_a_run_has_a_folder_below_runs_and_nowhere_else(run: str, federation: Federation) -> None:
    with pytest.raises(ConfigError, match="expected an id"):
        federation.run_folder(run)
    assert federation.run_folder("tiny-1").parent == federation.runs


# -- the state put back ----------------------------------------------------------------------------


def test_a_damaged_state_is_put_back_from_its_copy_and_kept_aside(federation: Federation) -> None:
    add(federation, "north", "key0")
    federation.backup()
    federation.state.close()
    federation.state_file.write_bytes(b"nothing" * 999)
    damaged = Federation(federation.folder)
    with pytest.raises(ConfigError, match="restore-state"):
        damaged.state.check()
    aside, sites = restore_state(damaged, 12.0)
    assert aside is not None
    assert aside.read_bytes() == b"nothing" * 999
    assert sites == 1
    again = Federation(federation.folder)
    again.state.check()
    assert [one.name for one in again.state.sites()] == ["north"]
    assert "state-restored" in again.audit.path.read_text()
    assert stat.S_IMODE(again.state_file.stat().st_mode) == 0o600


def test_what_was_shut_out_after_the_copy_does_not_come_back(federation: Federation) -> None:
    for name in ("north", "south", "west"):
        add(federation, name, f"key-{name}")
    federation.state.invite("east", "hash", 1e12, 0.0)
    federation.backup()
    for name, kind in (("north", "revoked"), ("south", "left")):
        federation.state.set_site(name, status=kind)
        federation.audit.append(kind, site=name, key=f"key-{name}", reason="moved")
    federation.audit.append("revoked", site="west", key="key-of-an-earlier-west", reason="")
    with federation.audit.path.open("ab") as file:
        file.write(b'{"n":6,"time":"20')  # a crash
    federation.state.close()
    federation.state_file.unlink()
    assert restore_state(Federation(federation.folder), 12.0) == (None, 1)
    state = State(federation.state_file)
    assert {one.name: one.status for one in state.sites()} == {
        "north": "revoked",
        "south": "left",
        "west": "active",
    }
    assert state.site("north").reason == "moved"  # type: ignore[union-attr]
    assert state.open_invitations(0.0) == []


def test_without_a_copy_or_with_a_damaged_one_nothing_changes(federation: Federation) -> None:
    federation.state.close()
    before = federation.state_file.read_bytes()
    federation.backup_file.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="damaged"):
        restore_state(federation, 0.0)
    federation.backup_file.unlink()
    with pytest.raises(ConfigError, match="let them join anew"):
        restore_state(federation, 0.0)
    assert federation.state_file.read_bytes() == before
