"""Runs as the operator asks for them: proposed, stopped, resumed, continued, exported."""

from __future__ import annotations

import os
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from anabranch.protocols.config import parse
from anabranch.protocols.errors import ConfigError, DataError, PrivacyError
from anabranch.protocols.identity.audit import public_key, read_line, require_signed
from anabranch.protocols.identity.proposal import Signed, require_fits
from anabranch.protocols.secagg.terms import Peer, Roster
from anabranch.server.coordinator import proposing
from anabranch.server.coordinator.exporting import export
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.proposing import propose, resume, resume_with, stop
from anabranch.server.coordinator.state import RunEntry, SiteEntry
from tests.runs import TABLE_RUN, write_table

NOW = 1_000_000.0
PRIVATE = "\n[privacy]\nepsilon = 8.0\n"
CLIENT_PRIVATE = "\n[client_privacy]\nepsilon = 8.0\npopulation = 200\nmax_examples = 50\n"


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no test here cuts the power
    return Federation.create(tmp_path / "heart", "heart", ["127.0.0.1"], 8443)


def toml(folder: Path, *replacements: tuple[str, str], extra: str = "") -> Path:
    text = TABLE_RUN + extra
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    (folder / "run.toml").write_text(text)
    return folder / "run.toml"


def kinds(federation: Federation) -> list[str]:
    lines = federation.audit.path.read_text().splitlines()
    return [msgspec.json.decode(line)["kind"] for line in lines]


def ran(federation: Federation, entry: RunEntry, state: Any = "stopped") -> RunEntry:
    """Give a run the folder of one that merged two rounds."""
    folder = federation.run_folder(entry.run)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "progress").mkdir()
    (folder / "release").mkdir()
    for name in (
        "run.toml", "summary.json", "report.html", "events.jsonl", "checkpoints/round-0001.adapter",
        "checkpoints/round-0002.adapter", "release/model.bin", "progress/state", "stray.key",
    ):  # fmt: skip
        (folder / name).write_text(name)
    return federation.state.set_run(entry.run, state=state, desired="stopped")


# -- propose ---------------------------------------------------------------------------------------


def test_a_proposal_is_signed_by_its_author_for_exactly_this_run(
    federation: Federation, tmp_path: Path
) -> None:
    entry = propose(federation, toml(tmp_path), NOW)
    signed = msgspec.json.decode(entry.signed, type=Signed)
    proposal, config = signed.verified(), parse(entry.toml, source="run.toml")
    require_fits(proposal, entry.run, config)
    assert signed.key == federation.authors()[proposal.author]
    assert (proposal.federation, proposal.author) == ("heart", "operator")
    assert (proposal.code, proposal.version) == (federation.code, federation.version)
    assert (entry.state, entry.desired, entry.created) == ("queued", "running", NOW)
    assert federation.state.runs() == [entry]
    assert kinds(federation)[-1] == "proposed"
    assert proposal.digest in federation.audit.path.read_text()


def test_the_same_file_proposed_twice_is_two_runs(federation: Federation, tmp_path: Path) -> None:
    file = toml(tmp_path)
    one, other = propose(federation, file, NOW), propose(federation, file, NOW + 1)
    assert one.run != other.run
    assert proposing.existing(federation, "tiny") == other
    assert proposing.existing(federation, one.run) == one


def test_the_coordinators_own_records_are_checked_and_kept_by_their_whole_path(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "own.csv", n=20, seed=1)
    entry = propose(
        federation, toml(tmp_path), NOW, validation=Path("own.csv"), test=Path("own.csv")
    )
    assert entry.validation == entry.test == str(tmp_path / "own.csv")
    (tmp_path / "own.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError):
        propose(federation, toml(tmp_path), NOW, validation=Path("own.csv"))
    assert len(federation.state.runs()) == 1


SECURE = "\n[secure_aggregation]\nminimum = 3\n"


def join_sites(federation: Federation, count: int, **changes: Any) -> None:
    """Let sites in; each with a peer key, unless `changes` says otherwise."""
    for number in range(count):
        entry = SiteEntry(
            name=f"site-{number}", key=f"{number:064x}", public_key="PEM", joined=NOW, expires=NOW,
            serial="1", version="1", peer_key=f"{number:064x}",
        )  # fmt: skip
        federation.state.add_site(msgspec.structs.replace(entry, **changes.get(entry.name, {})))


def test_a_run_that_sums_securely_is_signed_with_all_sites_that_are_in(
    federation: Federation, tmp_path: Path
) -> None:
    no_key, gone = {"peer_key": None}, {"status": "revoked"}
    join_sites(federation, 6, **{"site-1": no_key, "site-4": gone})
    entry = propose(federation, toml(tmp_path, extra=SECURE), NOW)
    proposal = msgspec.json.decode(entry.signed, type=Signed).verified()
    roster = federation.state.roster(entry.run)
    assert roster is not None
    assert [peer.name for peer in roster.peers] == ["site-0", "site-2", "site-3", "site-5"]
    assert proposal.roster == roster.digest
    assert proposing.roster_of(federation, entry.run, proposal) == roster
    assert f'"roster":"{roster.digest}"' in federation.audit.path.read_text()
    require_fits(proposal, entry.run, parse(entry.toml, source="run.toml"))
    federation.state.set_site("site-1", peer_key="99" * 32)  # too late for this run
    assert federation.state.roster(entry.run) == roster


def test_a_run_that_sums_nothing_has_no_roster(federation: Federation, tmp_path: Path) -> None:
    join_sites(federation, 4)
    entry = propose(federation, toml(tmp_path), NOW)
    proposal = msgspec.json.decode(entry.signed, type=Signed).proposal
    assert proposal.roster is None
    assert proposing.roster_of(federation, entry.run, proposal) is None


def test_too_few_sites_with_a_peer_key_are_named_and_nothing_is_stored(
    federation: Federation, tmp_path: Path
) -> None:
    file = toml(tmp_path, extra=SECURE)
    with pytest.raises(ConfigError, match="needs 3 sites with a peer key, and none are active"):
        propose(federation, file, NOW)
    join_sites(federation, 3, **{"site-1": {"peer_key": None}})
    with pytest.raises(
        ConfigError,
        match=r"2 \(site-0, site-2\) are active\. site-1: active, and no peer key announced.*"
        r"Who joins after the proposal takes no part",
    ):
        propose(federation, file, NOW)
    assert federation.state.runs() == []
    assert "proposed" not in kinds(federation)


def test_a_roster_that_was_changed_in_the_state_is_not_used(
    federation: Federation, tmp_path: Path
) -> None:
    join_sites(federation, 4)
    entry = propose(federation, toml(tmp_path, extra=SECURE), NOW)
    proposal = msgspec.json.decode(entry.signed, type=Signed).proposal
    swapped = Roster.of([Peer(name=f"site-{n}", key=f"{n + 9:064x}") for n in range(4)])
    with closing(sqlite3.connect(federation.state_file)) as db:
        db.execute("UPDATE rosters SET roster = ?", (msgspec.json.encode(swapped).decode(),))
        db.commit()
    with pytest.raises(ConfigError, match="is not the one that operator signed"):
        proposing.roster_of(federation, entry.run, proposal)


REFUSED: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "no TOML": ("name = ", {}, ConfigError, r"run\.toml"),
    "no text": ("\udcff", {}, ConfigError, r"run\.toml"),
    "an author that is none": (TABLE_RUN, {"author": "dr-no"}, ConfigError, "author 'dr-no'"),
    "records for a model that stays": (
        TABLE_RUN + '\n[personal]\nhead = "local"\n',
        {"validation": Path("own.csv")},
        ConfigError,
        "validation: with personal.head",
    ),
    "client privacy for few": (
        TABLE_RUN + CLIENT_PRIVATE.replace("200", "9"),
        {},
        PrivacyError,
        "too few clients",
    ),
    "a run that is none": (TABLE_RUN, {"continues": "tiny-0"}, ConfigError, "run tiny-0: there is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_begin_is_not_proposed(
    case: str, federation: Federation, tmp_path: Path
) -> None:
    text, options, kind, match = REFUSED[case]
    (tmp_path / "run.toml").write_bytes(text.encode(errors="surrogateescape"))
    before = kinds(federation)
    with pytest.raises(kind, match=match):
        propose(federation, tmp_path / "run.toml", NOW, **options)
    assert federation.state.runs() == []
    assert kinds(federation) == before


def test_a_file_that_is_missing_is_named(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml"):
        propose(federation, tmp_path / "nothing.toml", NOW)


# -- stop and resume -------------------------------------------------------------------------------


def test_a_run_is_stopped_and_resumed_by_id_or_name(federation: Federation, tmp_path: Path) -> None:
    entry = propose(federation, toml(tmp_path), NOW)
    federation.state.set_run(entry.run, state="running", restarts=3, detail="round 2")
    stopped = stop(federation, "tiny")
    assert (stopped.desired, stopped.state) == ("stopped", "running")  # its process says when
    federation.state.set_run(entry.run, state="stopped")
    again = resume(federation, entry.run)
    assert (again.desired, again.state, again.restarts, again.detail) == (
        "running",
        "queued",
        0,
        "",
    )
    assert kinds(federation)[-2:] == ["stop-asked", "resume-asked"]


def test_a_run_that_no_process_has_is_stopped_at_once(
    federation: Federation, tmp_path: Path
) -> None:
    entry = propose(federation, toml(tmp_path), NOW)
    assert stop(federation, entry.run).state == "stopped"


def test_a_failed_run_is_resumed_and_a_running_or_finished_one_is_not(
    federation: Federation, tmp_path: Path
) -> None:
    entry = propose(federation, toml(tmp_path), NOW)
    federation.state.set_run(entry.run, state="failed")
    assert resume(federation, entry.run).state == "queued"
    with pytest.raises(ConfigError, match="queued; it was not stopped"):
        resume(federation, entry.run)
    federation.state.set_run(entry.run, state="finished")
    with pytest.raises(ConfigError, match="finished already; for more rounds"):
        resume(federation, entry.run)
    with pytest.raises(ConfigError, match="nothing to stop"):
        stop(federation, entry.run)
    with pytest.raises(ConfigError, match="none of this id or name"):
        stop(federation, "tiny-0")


def test_a_changed_configuration_is_a_new_run_that_goes_on_from_the_old_one(
    federation: Federation, tmp_path: Path
) -> None:
    old = ran(federation, propose(federation, toml(tmp_path), NOW))
    new = resume_with(federation, old.run, toml(tmp_path, ("rounds = 2", "rounds = 9")), NOW + 1)
    assert new.run != old.run
    assert (new.continues, new.state, new.desired) == (old.run, "queued", "running")
    assert federation.state.run(old.run) == old
    proposed = [msgspec.json.decode(one.signed, type=Signed).proposal for one in (old, new)]
    assert proposed[0].digest != proposed[1].digest  # sites approve it anew


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("rank = 3", "rank = 4"), r"\[lora\] is not that of run"),
        (("hidden = [5, 7]", "hidden = [5, 8]"), r"\[model\]"),
        (('labels = ["no", "yes"]', 'labels = ["yes", "no"]'), r"\[task\]"),
        (("[federation]", '[personal]\nhead = "local"\n[federation]'), "stays at the sites"),
    ],
)
def test_a_configuration_that_the_old_adapter_does_not_fit_is_refused(
    change: tuple[str, str], match: str, federation: Federation, tmp_path: Path
) -> None:
    old = ran(federation, propose(federation, toml(tmp_path), NOW))
    with pytest.raises(ConfigError, match=match):
        resume_with(federation, old.run, toml(tmp_path, change), NOW)
    assert len(federation.state.runs()) == 1


def test_privacy_is_not_promised_for_rounds_that_had_none(
    federation: Federation, tmp_path: Path
) -> None:
    steps = ("local_epochs = 2", "local_steps = 2")
    old = ran(federation, propose(federation, toml(tmp_path), NOW))
    with pytest.raises(ConfigError, match=r"\[privacy\] cannot be promised"):
        resume_with(federation, old.run, toml(tmp_path, steps, extra=PRIVATE), NOW)
    with pytest.raises(ConfigError, match=r"\[client_privacy\] is planned as a whole"):
        resume_with(federation, old.run, toml(tmp_path, extra=CLIENT_PRIVATE), NOW)
    private = ran(federation, propose(federation, toml(tmp_path, steps, extra=PRIVATE), NOW))
    assert resume_with(federation, private.run, tmp_path / "run.toml", NOW).continues == private.run


def test_a_run_that_runs_or_merged_nothing_is_not_gone_on_from(
    federation: Federation, tmp_path: Path
) -> None:
    old = propose(federation, toml(tmp_path), NOW)
    with pytest.raises(ConfigError, match="queued; stop it first"):
        resume_with(federation, old.run, tmp_path / "run.toml", NOW)
    stop(federation, old.run)
    with pytest.raises(ConfigError, match="no round of it was merged"):
        resume_with(federation, old.run, tmp_path / "run.toml", NOW)


# -- export ----------------------------------------------------------------------------------------


def test_an_export_has_the_run_its_signature_and_its_lines_of_the_log_and_no_more(
    federation: Federation, tmp_path: Path
) -> None:
    entry = ran(federation, propose(federation, toml(tmp_path), NOW), "finished")
    propose(federation, toml(tmp_path), NOW + 1)
    files = export(federation, entry.run, tmp_path / "out")
    assert files == [
        "audit.jsonl", "audit.pub", "checkpoints/round-0001.adapter",
        "checkpoints/round-0002.adapter", "events.jsonl", "proposal.json", "release/model.bin",
        "report.html", "run.toml", "summary.json",
    ]  # fmt: skip
    target = tmp_path / "out"
    signed = msgspec.json.decode((target / "proposal.json").read_bytes(), type=Signed)
    assert signed.verified().run == entry.run
    key = public_key((target / "audit.pub").read_text().strip())
    lines = (target / "audit.jsonl").read_bytes().splitlines()
    assert [read_line(line).kind for line in lines] == ["proposed"]
    for line in lines:
        require_signed(read_line(line), key)
    assert kinds(federation)[-1] == "exported"


def test_no_secret_of_the_federation_is_in_an_export(
    federation: Federation, tmp_path: Path
) -> None:
    entry = ran(federation, propose(federation, toml(tmp_path), NOW), "finished")
    export(federation, entry.run, tmp_path / "out")
    secrets = [
        path.read_bytes().split(b"\n")[-2]
        for path in federation.folder.rglob("*")
        if path.suffix in (".key", ".token") and path.name != "stray.key"
    ]
    secrets += [(federation.folder / "authority" / "ca.key").read_bytes().splitlines()[1]]
    assert len(secrets) == 6
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or not any(one in path.read_bytes() for one in secrets), path
        assert not path.is_symlink()


def test_who_took_part_in_a_client_private_run_stays_here(
    federation: Federation, tmp_path: Path
) -> None:
    entry = propose(federation, toml(tmp_path, extra=CLIENT_PRIVATE), NOW)
    files = export(federation, ran(federation, entry, "finished").run, tmp_path / "out")
    assert "report.html" in files
    assert not {"events.jsonl", "audit.jsonl"} & set(files)


def test_an_export_goes_to_a_folder_of_its_own_and_needs_something_to_take(
    federation: Federation, tmp_path: Path
) -> None:
    entry = propose(federation, toml(tmp_path), NOW)
    with pytest.raises(ConfigError, match="nothing to export yet"):
        export(federation, entry.run, tmp_path / "out")
    ran(federation, entry)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export(federation, entry.run, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_exports_links_are_not_followed(federation: Federation, tmp_path: Path) -> None:
    entry = ran(federation, propose(federation, toml(tmp_path), NOW))
    folder = federation.run_folder(entry.run)
    (folder / "summary.json").unlink()
    (folder / "summary.json").symlink_to(federation.folder / "page.token")
    (folder / "release" / "link").symlink_to(federation.folder / "page.token")
    files = export(federation, entry.run, tmp_path / "out")
    assert not {"summary.json", "release/link"} & set(files)
    assert stat.S_ISDIR((tmp_path / "out").stat().st_mode)
