"""The state of a coordinator: laws of its methods, several processes, kills, damaged files."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from anabranch.protocols.errors import ConfigError, ProtocolError, RunError
from anabranch.protocols.identity.join import Report
from anabranch.protocols.secagg.terms import Peer, Roster
from anabranch.server.coordinator.state import (
    NO_INVITATION,
    RETRY_S,
    Asked,
    OpenInvitation,
    Reported,
    RunEntry,
    SiteEntry,
    State,
    Wait,
)
from anabranch.server.coordinator.state_file import STEPS

NOW = 1_000_000.0
NAMES = st.sampled_from(["north", "south"])
KEYS = st.sampled_from(["key0", "key1", "key2"])
SECRETS = st.sampled_from(["hash0", "hash1"])
RUNS = st.sampled_from(["run-1", "run-2"])


def site(name: str = "north", key: str = "key0", **changes: Any) -> SiteEntry:
    entry = SiteEntry(
        name=name, key=key, public_key="PEM", joined=NOW, expires=NOW + 9, serial="7", version="1"
    )
    return msgspec.structs.replace(entry, **changes)


def entry(run: str = "run-1", **changes: Any) -> RunEntry:
    made = RunEntry(run=run, name="tiny", toml="…", signed="{}", created=NOW)
    return msgspec.structs.replace(made, **changes)


def report(boot: str = "0" * 64, **changes: Any) -> Report:
    return msgspec.structs.replace(Report(boot=boot, activity="idle", since=NOW), **changes)


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State.create(tmp_path / "state.sqlite")


# -- laws ------------------------------------------------------------------------------------------


class Model(RuleBasedStateMachine):
    """The state beside plain dictionaries."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(os.environ["ANABRANCH_TEST_FOLDER"])
        for left in self.folder.glob("state*"):
            left.unlink()
        self.path = self.folder / "state.sqlite"
        shutil.copyfile(self.folder / "empty", self.path)
        self.state = State(self.path)
        self.now = NOW
        self.invitations: dict[str, tuple[str, float, float | None, str]] = {}
        self.sites: dict[str, SiteEntry] = {}
        self.keys: dict[str, str] = {}
        self.reports: dict[str, Reported] = {}
        self.runs: dict[str, RunEntry] = {}
        self.waits: dict[str, Wait] = {}
        self.asked: dict[tuple[str, str], Asked] = {}

    def teardown(self) -> None:
        if hasattr(self, "state"):
            self.state.close()

    @rule(seconds=st.sampled_from([1.0, RETRY_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def another_process_goes_on(self) -> None:
        self.state.close()
        self.state = State(self.path)

    @invariant()
    def all_agree(self) -> None:
        if hasattr(self, "state"):
            self.agree()

    def agree(self) -> None:
        """Compare what the state says with the dictionaries."""


class Enrolling(Model):
    """Invitations and sites."""

    @rule(name=NAMES, secret=SECRETS)
    def invite(self, name: str, secret: str) -> None:
        if secret in self.invitations:
            return
        self.state.invite(name, secret, self.now + 1000, self.now)
        self.withdraw(name)
        self.invitations[secret] = (name, self.now + 1000, None, "")

    def withdraw(self, name: str) -> None:
        kept = {k: v for k, v in self.invitations.items() if v[0] != name or v[2] is not None}
        self.invitations = kept

    @rule(secret=SECRETS, key=KEYS)
    def redeem(self, secret: str, key: str) -> None:
        name, expires, used, by = self.invitations.get(secret, ("", 0.0, None, ""))
        open_now = expires > self.now
        if open_now and (used is None or (by == key and used + RETRY_S > self.now)):
            assert self.state.redeem(secret, self.now, key) == name
            self.invitations[secret] = (name, expires, self.now if used is None else used, key)
        else:
            with pytest.raises(ProtocolError, match=NO_INVITATION):
                self.state.redeem(secret, self.now, key)

    @rule(secret=SECRETS, key=KEYS)
    def free(self, secret: str, key: str) -> None:
        self.state.free(secret, key)
        name, expires, used, by = self.invitations.get(secret, ("", 0.0, None, ""))
        there = self.sites.get(name)
        if used is not None and by == key and (there is None or there.key != key):
            self.invitations[secret] = (name, expires, None, "")

    @rule(name=NAMES, key=KEYS, node=st.none() | st.integers(0, 2**64 - 1))
    def add_site(self, name: str, key: str, node: int | None) -> None:
        new, there = site(name, key, node=node), self.sites.get(name)
        again = there is not None and (there.key, there.status) == (key, "active")
        refused = not again and (
            key in self.keys or (there is not None and there.status == "active")
        )
        if refused:
            with pytest.raises(ProtocolError, match=f"site {name}"):
                self.state.add_site(new)
            return
        others = {one.node for one in self.sites.values() if one.name != name}
        if node is not None and node in others:
            with pytest.raises(ConfigError, match="another has the same"):
                self.state.add_site(new)
            return
        self.state.add_site(new)
        self.sites[name], self.keys[key] = new, name

    @rule(name=NAMES, status=st.sampled_from(["active", "revoked", "left"]), reason=st.text())
    def set_site(self, name: str, status: Any, reason: str) -> None:
        if name not in self.sites:
            with pytest.raises(ConfigError, match="none of this name"):
                self.state.set_site(name, status=status)
            return
        reason = reason.replace("\0", "").encode("utf-8", "ignore").decode()
        changed = msgspec.structs.replace(self.sites[name], status=status, reason=reason)
        assert self.state.set_site(name, status=status, reason=reason) == changed
        self.sites[name] = changed
        if status != "active":
            self.withdraw(name)

    def agree(self) -> None:
        assert self.state.sites() == [self.sites[name] for name in sorted(self.sites)]
        assert self.state.unregistered() == [
            one for one in self.state.sites() if one.status == "active" and one.node is None
        ]
        for key in ("key0", "key1", "key2"):
            assert self.state.knows_key(key) == self.keys.get(key)
            owner = next((one for one in self.sites.values() if one.key == key), None)
            assert self.state.site_by_key(key) == owner
        expected = [
            OpenInvitation(site=name, expires=expires, used=used)
            for name, expires, used, _ in self.invitations.values()
            if expires > self.now and (used is None or used + RETRY_S > self.now)
        ]
        assert sorted(self.state.open_invitations(self.now), key=repr) == sorted(expected, key=repr)


class Running(Model):
    """Runs, and what sites say."""

    @rule(name=NAMES, step=st.integers(0, 9))
    def report(self, name: str, step: int) -> None:
        said = report(step=step)
        self.state.report(name, said, self.now)
        self.reports[name] = Reported(site=name, report=said, at=self.now)

    @rule(run=RUNS, flower=st.none() | st.integers(0, 2**64 - 1))
    def propose(self, run: str, flower: int | None) -> None:
        new = entry(run, flower_run=flower, created=self.now)
        if run in self.runs:
            with pytest.raises(ConfigError, match="exists already"):
                self.state.propose(new)
            return
        self.state.propose(new)
        self.runs[run] = new

    @rule(run=RUNS, desired=st.sampled_from(["running", "stopped"]), restarts=st.integers(0, 3))
    def set_run(self, run: str, desired: Any, restarts: int) -> None:
        if run in self.runs:
            self.runs[run] = msgspec.structs.replace(
                self.runs[run], desired=desired, restarts=restarts
            )
            got = self.state.set_run(run, desired=desired, restarts=restarts)
            assert got == self.runs[run]

    @rule(run=RUNS, wait=st.none() | st.builds(Wait, why=st.just("quorum"), since=st.just(NOW)))
    def wait(self, run: str, wait: Wait | None) -> None:
        self.state.wait(run, wait)
        self.waits.pop(run, None)
        if wait is not None:
            self.waits[run] = wait

    @rule(run=RUNS, name=NAMES, round_number=st.none() | st.integers(0, 3))
    def ask(self, run: str, name: str, round_number: int | None) -> None:
        asked = (
            None
            if round_number is None
            else Asked(kind="train", round=round_number, since=NOW, until=NOW + 1)
        )
        self.state.asked(run, name, asked)
        self.asked.pop((run, name), None)
        if asked is not None:
            self.asked[run, name] = asked

    def agree(self) -> None:
        assert {one.run: one for one in self.state.runs()} == self.runs
        assert self.state.waits() == self.waits
        assert self.state.reports() == self.reports
        for run in ("run-1", "run-2"):
            mine = {name: one for (of, name), one in self.asked.items() if of == run}
            assert self.state.asking(run) == mine


@pytest.mark.parametrize("machine", [Enrolling, Running])
def test_the_state_does_what_dictionaries_do(
    machine: type[Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    State.create(tmp_path / "empty").close()
    monkeypatch.setenv("ANABRANCH_TEST_FOLDER", str(tmp_path))
    run_state_machine_as_test(
        machine, settings=settings(max_examples=30, stateful_step_count=40, deadline=None)
    )


# -- kills -----------------------------------------------------------------------------------------


class Cut:
    """A connection that ends this process, or raises, at its n-th statement."""

    def __init__(self, db: sqlite3.Connection, at: int, end: Callable[[], None]) -> None:
        self.db, self.left, self.end = db, at, end

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        self.left -= 1
        if self.left == -1:
            self.end()
        return self.db.execute(*arguments)

    @property
    def in_transaction(self) -> bool:
        return self.db.in_transaction


CHANGES: dict[str, Callable[[State], object]] = {
    "invite": lambda s: s.invite("south", "new", NOW + 9, NOW),
    "redeem": lambda s: s.redeem("open", NOW, "key9"),
    "free": lambda s: s.free("used", "key8"),
    "withdraw": lambda s: s.withdraw_invitations(),
    "add_site": lambda s: s.add_site(site("west", "key9", node=1)),
    "add_site again": lambda s: s.add_site(site("left", "key9", node=1)),
    "revoke": lambda s: s.set_site("north", status="revoked"),
    "report": lambda s: s.report("north", report(step=3), NOW),
    "propose": lambda s: s.propose(entry("run-2")),
    "set_run": lambda s: s.set_run("run-1", desired="stopped"),
    "wait": lambda s: s.wait("run-1", None),
    "asked": lambda s: s.asked("run-1", "north", None),
}


def filled(path: Path) -> None:
    state = State.create(path)
    for name, key in (("north", "key0"), ("left", "key1")):
        state.add_site(site(name, key))
    state.set_site("left", status="left")
    state.report("left", report(), NOW)
    state.invite("south", "open", NOW + 9, NOW)
    state.invite("north", "used", NOW + 9, NOW)
    state.redeem("used", NOW, "key8")
    state.propose(entry())
    state.wait("run-1", Wait(why="quorum", since=NOW))
    state.asked("run-1", "north", Asked(kind="train", since=NOW, until=NOW))
    state.close()


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return list(db.iterdump())


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_whole_or_not_there_wherever_its_process_is_killed(
    name: str, tmp_path: Path
) -> None:
    filled(tmp_path / "before")
    before = dump(tmp_path / "before")
    after = Path(shutil.copy(tmp_path / "before", tmp_path / "after"))
    CHANGES[name](State(after))
    changed = dump(after)
    assert changed != before
    seen = []
    for at in range(20):
        path = Path(shutil.copy(tmp_path / "before", tmp_path / f"killed-{at}"))
        child = os.fork()
        if child == 0:
            state = State(path)
            cut = Cut(state._file._writer, at, lambda: os._exit(9))
            state._file._writer = cut  # type: ignore[assignment]
            CHANGES[name](state)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        seen.append(dump(path))
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert seen[-1] == changed
    assert len(seen) > 3  # BEGIN, a change, COMMIT
    assert all(one == before for one in seen[:-1])


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_fails_changes_nothing_and_the_next_one_works(
    name: str, tmp_path: Path
) -> None:
    filled(tmp_path / "state")
    before = dump(tmp_path / "state")
    state = State(tmp_path / "state")
    db = state._file._writer

    def full() -> None:
        raise sqlite3.OperationalError("database or disk is full")

    for at in range(statements(name, tmp_path)):
        cut = Cut(db, at, full)
        state._file._writer = cut  # type: ignore[assignment]
        with pytest.raises(RunError, match="Make room"):
            CHANGES[name](state)
        assert dump(tmp_path / "state") == before
    state._file._writer = db
    CHANGES[name](state)
    assert dump(tmp_path / "state") != before


def statements(name: str, folder: Path) -> int:
    """Return how many statements a change executes."""
    state = State(Path(shutil.copy(folder / "state", folder / "counted")))
    cut = Cut(state._file._writer, 0, lambda: None)
    state._file._writer = cut  # type: ignore[assignment]
    CHANGES[name](state)
    assert cut.left <= -3  # BEGIN, a change, COMMIT
    return -cut.left


# -- several processes -----------------------------------------------------------------------------

REDEEM = """
import sys
from pathlib import Path
from anabranch.protocols.errors import ProtocolError, RunError
from anabranch.server.coordinator.state import State
state = State(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for n in range(10):
    while True:
        try:
            print(state.redeem(f"hash{n}", 1.0, sys.argv[2]), flush=True)
        except ProtocolError:
            pass  # another one was first
        except RunError:
            continue  # the disk is slow: another one still writes
        break
"""


def test_of_processes_that_redeem_an_invitation_at_once_exactly_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    state = State.create(path)
    for n in range(10):
        state.invite(f"site{n}", f"hash{n}", 9.0, 0.0)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", REDEEM, str(path), f"key{n}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(3)
    ]
    for one in racers:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in racers:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    won = [line for one in racers for line in one.communicate()[0].split()]
    assert sorted(won) == sorted(f"site{n}" for n in range(10))


def test_one_process_sees_what_another_wrote(tmp_path: Path) -> None:
    one = State.create(tmp_path / "state.sqlite")
    other = State(tmp_path / "state.sqlite")
    one.add_site(site())
    assert other.site("north") == site()
    other.set_site("north", node=3)
    assert one.site_by_key("key0") == site(node=3)


def test_a_writer_that_never_ends_is_reported_and_readers_go_on(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.add_site(site())
    state._file._writer.execute("PRAGMA busy_timeout = 1")
    with closing(sqlite3.connect(state.path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(RunError, match="locked"):
            state.set_site("north", node=3)
        assert state.site("north") == site()
        db.execute("ROLLBACK")
    assert state.set_site("north", node=3).node == 3


# -- examples and refusals -------------------------------------------------------------------------


def test_every_file_of_the_state_is_for_its_owner_alone(state: State) -> None:
    state.add_site(site())
    state.backup(state.path.with_suffix(".bak"))
    files = list(state.path.parent.iterdir())
    assert len(files) >= 4  # with -wal and -shm
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_backup_has_everything_that_was_committed(state: State, tmp_path: Path) -> None:
    state.add_site(site())
    state.propose(entry())
    state.backup(tmp_path / "copy")
    copy = State(tmp_path / "copy")
    copy.check()
    assert copy.sites() == state.sites()
    assert copy.runs() == state.runs()


def test_a_new_invitation_takes_the_place_of_one_that_was_not_used(state: State) -> None:
    state.invite("north", "first", NOW + 9, NOW)
    state.invite("north", "second", NOW + 9, NOW)
    with pytest.raises(ProtocolError, match=NO_INVITATION):
        state.redeem("first", NOW, "key0")
    assert state.redeem("second", NOW, "key0") == "north"


def test_an_invitation_ends_with_its_time_and_for_the_key_that_used_it_after_a_while(
    state: State,
) -> None:
    state.invite("north", "hash", NOW + 2 * RETRY_S, NOW)
    assert state.redeem("hash", NOW, "key0") == "north"
    assert state.redeem("hash", NOW + RETRY_S - 1, "key0") == "north"
    for now, key in ((NOW + 1, "key1"), (NOW + RETRY_S, "key0")):
        with pytest.raises(ProtocolError, match=NO_INVITATION):
            state.redeem("hash", now, key)
    state.invite("south", "other", NOW + 5, NOW)
    with pytest.raises(ProtocolError, match=NO_INVITATION):
        state.redeem("other", NOW + 5, "key0")


def test_an_invitation_is_freed_only_by_the_key_that_used_it_and_is_not_in_with_it(
    state: State,
) -> None:
    state.invite("north", "hash", NOW + 9, NOW)
    state.redeem("hash", NOW, "key0")
    state.free("hash", "key1")
    assert state.open_invitations(NOW)[0].used == NOW
    state.free("hash", "key0")
    assert state.redeem("hash", NOW, "key1") == "north"
    state.add_site(site("north", "key1"))
    state.free("hash", "key1")
    assert state.open_invitations(NOW)[0].used == NOW


def test_an_invitation_without_a_key_is_used_once(state: State) -> None:
    state.invite("north", "hash", NOW + 9, NOW)
    assert state.redeem("hash", NOW) == "north"
    with pytest.raises(ProtocolError, match=NO_INVITATION):
        state.redeem("hash", NOW)


def test_a_key_that_was_in_the_roster_never_comes_in_again(state: State) -> None:
    state.add_site(site())
    state.set_site("north", status="revoked")
    for name in ("north", "south"):
        with pytest.raises(ProtocolError, match="in the roster before"):
            state.add_site(site(name, "key0"))
    state.add_site(site("north", "key1"))
    assert state.site_by_key("key0") is None
    with pytest.raises(ProtocolError, match="in the roster before"):
        state.add_site(site("south", "key0"))


def test_fields_that_are_none_and_values_of_another_type_are_refused(state: State) -> None:
    state.add_site(site())
    with pytest.raises(TypeError, match="nodes"):
        state.set_site("north", nodes=3)
    with pytest.raises(TypeError, match="run"):
        state.set_run("run-1", **{"run": "run-2"})
    with pytest.raises(msgspec.ValidationError):
        state.set_site("north", status="asleep")
    assert state.sites() == [site()]


def test_a_state_that_is_missing_is_not_made_by_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing.*restore-state"):
        State(tmp_path / "state.sqlite")
    assert list(tmp_path.iterdir()) == []


def test_a_state_is_never_made_over_another(state: State) -> None:
    state.add_site(site())
    with pytest.raises(ConfigError, match="exists"):
        State.create(state.path)
    assert state.sites() == [site()]


def test_a_state_of_a_newer_version_is_refused(state: State) -> None:
    state.close()
    with closing(sqlite3.connect(state.path)) as db:
        db.execute("PRAGMA user_version = 3")
    with pytest.raises(ConfigError, match="version 3, this software knows 2"):
        State(state.path)


# -- files of an earlier version -------------------------------------------------------------------

SCHEMA_1 = f"""
BEGIN; {STEPS[1]} PRAGMA user_version = 1;
INSERT INTO sites VALUES ('north', 'key0', 'PEM', '7', 'active', 1.0, 9.0, '7', '1', '');
INSERT INTO keys VALUES ('key0', 'north');
INSERT INTO invitations (secret_hash, site, created, expires) VALUES ('hash0', 'south', 1, 9);
INSERT INTO runs VALUES ('run-1', 'tiny', '…', '{{}}', 1.0, 'running', 'queued', '', NULL, 0,
  NULL, NULL, NULL);
COMMIT;
"""


def of_version_1(path: Path) -> Path:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(SCHEMA_1)
    return path


def test_a_state_of_version_1_is_used_as_it_was(tmp_path: Path) -> None:
    state = State(of_version_1(tmp_path / "state.sqlite"))
    assert state.sites() == [site(node=7, joined=1.0, expires=9.0)]
    assert state.knows_key("key0") == "north"
    assert [one.site for one in state.open_invitations(2.0)] == ["south"]
    assert state.runs() == [entry(created=1.0)]
    assert state.roster("run-1") is None
    assert state.set_site("north", peer_key="ab" * 32).peer_key == "ab" * 32
    state.propose(entry("run-2"), ROSTER)
    state.close()
    again = State(tmp_path / "state.sqlite")
    assert again.roster("run-2") == ROSTER
    again.check()


def test_what_version_1_was_is_never_changed() -> None:
    """Files of it are there; what is to be different is another step."""
    assert hashlib.sha256(STEPS[1].encode()).hexdigest() == (
        "82f22574f57d9867b1d293e276e9053dff37fd5a41d877329a9bb956a6120310"
    )


def test_a_new_state_and_an_updated_one_have_the_same_tables(tmp_path: Path) -> None:
    State(of_version_1(tmp_path / "old.sqlite")).close()
    State.create(tmp_path / "new.sqlite").close()

    def tables(name: str) -> list[tuple[str, str]]:
        with closing(sqlite3.connect(tmp_path / name)) as db:
            return sorted(db.execute("SELECT name, sql FROM sqlite_schema WHERE sql NOT NULL"))

    assert tables("old.sqlite") == tables("new.sqlite")


def test_an_update_that_breaks_off_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = of_version_1(tmp_path / "state.sqlite")
    with monkeypatch.context() as patch:
        patch.setitem(STEPS, 2, STEPS[2] + "INSERT INTO nothing VALUES (1);")
        with pytest.raises(RunError, match="cannot be used now"):
            State(path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert db.execute("SELECT * FROM sites").fetchall()[0][0] == "north"
    assert [one.name for one in State(path).sites()] == ["north"]


def test_of_many_that_open_an_old_state_one_updates_it(tmp_path: Path) -> None:
    path = of_version_1(tmp_path / "state.sqlite")
    script = (
        "import sys; from pathlib import Path; from anabranch.server.coordinator.state import State"
        "\nsys.stdin.readline(); print([one.name for one in State(Path(sys.argv[1])).sites()])"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    for one in started:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    said = [one.communicate(timeout=60)[0] for one in started]
    assert said == ["['north']\n"] * 3


# -- peer keys and rosters -------------------------------------------------------------------------

ROSTER = Roster.of([Peer(name="north", key="ab" * 32), Peer(name="south", key="cd" * 32)])


def test_two_names_never_have_one_peer_key(state: State) -> None:
    state.add_site(site(peer_key="ab" * 32))
    with pytest.raises(ProtocolError, match="site south: its peer key is that of site north"):
        state.add_site(site("south", "key1", peer_key="ab" * 32))
    assert [one.name for one in state.sites()] == ["north"]
    assert state.knows_key("key1") is None
    state.add_site(site("south", "key1"))
    with pytest.raises(ProtocolError, match="that of site north"):
        state.set_site("south", peer_key="ab" * 32)
    state.add_site(site(peer_key="ab" * 32))  # the same site once more
    other = state.site("south")
    assert other is not None
    assert other.peer_key is None


def test_a_run_and_its_roster_are_there_together_or_not_at_all(state: State) -> None:
    state.propose(entry(), ROSTER)
    assert state.roster("run-1") == ROSTER
    with pytest.raises(ConfigError, match="exists already"):
        state.propose(entry(), Roster.of(ROSTER.peers[:1]))
    assert state.roster("run-1") == ROSTER
    assert state.roster("run-2") is None


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "other.sqlite")) as db:
        db.execute("CREATE TABLE things (name TEXT)")
    with pytest.raises(ConfigError, match="not a coordinator's state"):
        State(tmp_path / "other.sqlite")


@pytest.mark.parametrize("text", [b"", b"SQLite format 3\0 and then nothing of it", b"\0" * 4096])
def test_a_file_that_is_no_database_is_refused_with_what_to_do(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.sqlite").write_bytes(text)
    with pytest.raises(ConfigError, match="restore-state"):
        State(tmp_path / "state.sqlite")


def test_a_damaged_page_is_found_by_check(state: State) -> None:
    for number in range(200):
        state.add_site(site(f"site{number}", f"key{number}", public_key="PEM" * 99))
    state.close()
    data = bytearray(state.path.read_bytes())
    for page in range(2 * 4096, len(data), 4096):
        data[page : page + 64] = b"\xff" * 64
    state.path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"damaged.*restore-state"):
        State(state.path).check()


def test_a_row_that_is_no_longer_what_it_was_is_reported_as_damage(state: State) -> None:
    state.wait("run-1", Wait(why="quorum", since=NOW))
    with closing(sqlite3.connect(state.path)) as db:
        db.execute("UPDATE waits SET wait = '{}'")
        db.commit()
    with pytest.raises(ConfigError, match=r"damaged.*restore-state"):
        state.waits()


def test_what_an_earlier_site_of_the_name_said_is_forgotten(state: State) -> None:
    state.add_site(site())
    state.report("north", report(), NOW)
    state.add_site(site(node=5))  # the same site once more
    assert set(state.reports()) == {"north"}
    state.set_site("north", status="left")
    state.add_site(site("north", "key1"))
    assert state.reports() == {}
