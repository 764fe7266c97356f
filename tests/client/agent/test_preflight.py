"""Preflight: what each check says, what it leaves behind, and what the coordinator may read."""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.client.agent import checks, machine
from anabranch.client.agent.checks import (
    Check,
    clock_check,
    memory_check,
    size,
    space_check,
    version_check,
)
from anabranch.client.agent.join import join_site
from anabranch.client.agent.preflight import Preflight, preflight
from anabranch.client.agent.rehearsal import load, rehearse
from anabranch.client.data.records import load_records
from anabranch.client.models import MODELS
from anabranch.client.policy.code import version
from anabranch.client.site_file import SiteFile
from anabranch.protocols.errors import ConfigError, DataError, ModelError, PrivacyError, RunError
from anabranch.protocols.identity.authority import Authority
from anabranch.protocols.identity.join import Hello
from tests.client.agent.conftest import Doors
from tests.client.agent.doors import Coordinator, everything, long_ago, make_identity, rewrite
from tests.runs import PRIVATE, TEXT_RUN, table_run, table_text, write_table

STEPS = ("local_epochs = 2", "local_steps = 3")


@pytest.fixture
def site(door: Coordinator, records: Path, tmp_path: Path) -> Path:
    """Return the folder of a site that is ready."""
    assert join_site(door.invite(), records, tmp_path / "site").ready
    return tmp_path / "site"


def hello(**changes: object) -> Callable[[], Hello]:
    values: dict[str, object] = {"federation": "heart", "version": version(), "time": 1e9}
    return lambda: Hello(**values | changes)  # type: ignore[arg-type]


def look(folder: Path, **changes: object) -> Preflight:
    """Return a preflight at a coordinator that answers as it should, but for `changes`."""
    clock = checks_clock(folder)
    return preflight(folder, hello(**{"time": clock()} | changes), clock=clock)


def checks_clock(folder: Path) -> Callable[[], float]:
    """Return a clock that stands still within the certificate's time."""
    from anabranch.client.agent.identity import Identity

    now = Identity(folder).expires - 30.5 * 86_400
    return lambda: now


def one(found: Preflight, name: str) -> Check:
    return next(check for check in found.checks if check.name == name)


def failing(found: Preflight) -> list[str]:
    return [check.name for check in found.checks if not check.ok]


@given(
    theirs=st.floats(1e9, 2e9),
    ahead=st.floats(-1000, 1000),
    trip=st.floats(0, 30),
)
def test_a_clock_is_right_if_some_moment_of_the_call_is(
    theirs: float, ahead: float, trip: float
) -> None:
    before = theirs + ahead
    found = clock_check(theirs, before, before + trip)
    nearest = ahead if ahead > 0 else min(ahead + trip, 0.0)
    if min(abs(nearest - 5), abs(nearest + 60)) > 1e-3:
        assert found.ok == (-60 <= nearest <= 5)
    assert found.ok == (found.sentence == "")


def test_a_wrong_clock_is_told_which_way() -> None:
    assert "90 s ahead of the coordinator's: set it" in clock_check(1000, 1090, 1091).sentence
    assert "89 s behind the coordinator's: set it" in clock_check(1000, 910, 911).sentence
    assert clock_check(1000, 999, 1001).value == "+0.0 s"


def test_sizes_are_for_people() -> None:
    assert (size(0), size(3 << 20), size(3 << 29)) == ("0 MiB", "3 MiB", "1.5 GiB")
    assert space_check("disk", 10, 10, "/x").ok
    short = space_check("disk", 1 << 20, 1 << 30, "/x")
    assert short.sentence == "/x: 1 MiB free, at least 1.0 GiB are needed: make room"
    assert "/x" not in short.told
    assert memory_check(1 << 30).ok
    assert "raise the limit of the container" in memory_check(1 << 20).told


def test_another_release_is_not_ready() -> None:
    assert version_check("1.0", "1.0").ok
    assert "install anabranch==1.1" in version_check("1.1", "1.0").sentence


def test_everything_is_looked_at_and_nothing_left_behind(site: Path, door: Coordinator) -> None:
    before, held = everything(site), dict(MODELS._local.__dict__)
    calls, threads = len(door.seen), threading.active_count()
    found = preflight(site)
    assert found.ready, found.told
    assert [check.name for check in found.checks] == [
        "coordinator", "clock", "version", "code", "libraries", "certificate", "folder", "disk",
        "temporary", "memory", "cores", "gpu", "ledger", "policy", "data", "base", "rehearsal",
    ]  # fmt: skip
    assert everything(site) == before
    assert MODELS._local.__dict__ == held
    assert [request.path for request in door.seen[calls:]] == ["/site/hello"]
    assert threading.active_count() <= threads + 1  # the door's own
    assert found.told == ()
    assert found.as_dict()["ready"] is True


def test_a_private_rehearsal_touches_no_ledger_and_leaves_nothing(site: Path) -> None:
    (site / "contract.toml").write_text(table_text(STEPS, extra=PRIVATE))
    before = everything(site)
    found = look(site)
    assert found.ready, found.told
    assert "3 private steps" in one(found, "rehearsal").value
    assert one(found, "ledger").value == "none yet"
    assert everything(site) == before
    assert not (site / "ledger.sqlite").exists()


def test_a_privacy_that_cannot_be_had_is_not_ready(site: Path) -> None:
    private = PRIVATE + "delta = 0.09\n"  # above 1 / n
    (site / "contract.toml").write_text(table_text(STEPS, extra=private))
    found = look(site)
    assert failing(found) == ["rehearsal"]
    assert "not below 1/n" in one(found, "rehearsal").sentence
    assert "0.025" not in found.told[0]  # tells how many records there are


def test_a_coordinator_that_is_not_reached_is_said(site: Path, closed_port: int) -> None:
    rewrite(site, address=f"127.0.0.1:{closed_port}")
    found = preflight(site)
    assert failing(found) == ["coordinator"]
    assert "cannot be reached" in one(found, "coordinator").sentence


def test_another_federation_at_the_address_is_said(site: Path) -> None:
    assert "answers for federation 'lung'" in look(site, federation="lung").told[0]


def test_another_release_or_changed_sources_are_said(site: Path) -> None:
    assert failing(look(site, version="9.9")) == ["version"]
    rewrite(site, app="00" * 32)
    found = look(site)
    assert failing(found) == ["code"]
    assert "install the release anew, unchanged" in one(found, "code").sentence
    rewrite(site, app="00" * 32, version="0.0.9")
    assert "another release than when this site joined" in one(look(site), "code").value


def test_the_certificates_time_is_said(tmp_path: Path, root: Authority) -> None:
    made = make_identity(tmp_path / "old", root, begin=long_ago())
    end = made.expires
    assert checks.certificate(made, end - 86_400 * 2).value == "2 days left, renewed by itself"
    assert "ask for a new invitation" in checks.certificate(made, end + 1).sentence
    early = checks.certificate(made, end - 86_400 * 365)
    assert (early.value, early.ok) == ("not valid yet", False)
    made.key_file.chmod(0o644)
    assert "chmod 600" in checks.certificate(made, end - 1).sentence


def test_missing_libraries_room_and_memory_are_said(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    usage = shutil.disk_usage(site)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", absent)
        assert 'pip install "anabranch[client]"' in checks.libraries().sentence
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1))
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1)
    assert [checks.disk(site).ok, checks.temporary().ok, checks.memory().ok] == [False] * 3
    monkeypatch.setattr(machine, "memory_bytes", lambda: None)
    assert checks.memory().value == "not known on this system"


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    found = checks.folder(tmp_path / "absent")
    assert not found.ok
    assert str(tmp_path) in found.sentence
    assert str(tmp_path) not in found.told


def test_no_gpu_is_fine_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checks.gpu(SiteFile(name="a", data="b")).ok
    assert "install a CUDA build" in checks.gpu(SiteFile(name="a", data="b", device="cuda")).told


def test_a_gpu_is_named_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 3 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    assert checks.gpu(SiteFile(name="a", data="b")).value == "Card, 1.0 GiB of 3.0 GiB free"


def test_a_ledger_that_cannot_be_opened_is_said_without_its_place(site: Path) -> None:
    (site / "ledger.sqlite").write_bytes(b"nonsense" * 99)
    found = look(site)
    assert failing(found) == ["ledger"]
    assert str(site) not in "".join(found.told)


def test_a_policy_that_refuses_everything_is_said(site: Path) -> None:
    text = (site / "policy.toml").read_text()
    (site / "policy.toml").write_text(text.replace("[cohort]", "[cohorts]"))
    assert "nothing is allowed" in one(look(site), "policy").sentence
    (site / "policy.toml").write_text(text.replace('    "', '    "ff')[: len(text)])
    assert failing(look(site)) == ["policy"]


def test_a_policy_for_another_federation_is_said(site: Path, root: Authority) -> None:
    text = (site / "policy.toml").read_text().replace(root.fingerprint, "0" * 64)
    (site / "policy.toml").write_text(text)
    sentence = one(look(site), "policy").sentence
    assert "does not allow the federation 'heart'" in sentence
    assert root.fingerprint in sentence


def test_records_that_are_gone_or_broken_are_said_without_their_place(
    site: Path, records: Path
) -> None:
    write_table(records, n=3).write_text("a,y\n1,yes\n")
    found = look(site)
    assert failing(found) == ["data"]
    assert "b: column missing" in one(found, "data").sentence
    assert one(found, "base").ok  # the others are looked at all the same
    records.unlink()
    found = look(site)
    assert failing(found) == ["data"]
    assert str(records.parent) not in "".join(found.told)


def test_a_base_that_is_not_here_is_said(site: Path) -> None:
    text = TEXT_RUN.replace('"minilm"', f'"{site}/absent"')
    (site / "contract.toml").write_text(text)
    found = look(site)
    assert failing(found) == ["data", "base"]
    assert str(site) not in "".join(found.told)


def test_a_rank_beyond_this_machines_is_said(site: Path) -> None:
    text = (site / "site.toml").read_text()
    (site / "site.toml").write_text(text + "max_rank = 2\n")
    found = look(site)
    assert failing(found) == ["rank"]
    assert one(found, "rehearsal").ok


def test_what_has_not_joined_has_no_preflight(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has not joined a federation"):
        preflight(tmp_path)


@pytest.mark.parametrize("extra", ["", PRIVATE], ids=["plain", "private"])
def test_the_estimate_is_steps_times_one_step(extra: str, tmp_path: Path) -> None:
    config = table_run(STEPS, extra=extra)
    train = load_records(write_table(tmp_path / "r.csv"), config)
    done = rehearse(load(config, "cpu"), config, train)
    assert (done.steps, done.private) == (3, bool(extra))
    assert done.seconds_per_round == 3 * done.step_s > 0
    assert done.prepare_s > 0


def test_text_is_rehearsed_on_its_base(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from anabranch.protocols.config import parse

    caplog.set_level(logging.DEBUG)
    config = parse(TEXT_RUN, source="run.toml")
    (tmp_path / "r.csv").write_text("text,y\n" + "a broken zebra,bone\nchest pain,heart\n" * 3)
    loaded = load(config, "cpu", max_rank=1)
    factors = {len(p) for name, p in loaded.classifier.named_parameters() if "lora_A" in name}
    assert factors == {1}
    done = rehearse(loaded, config, load_records(tmp_path / "r.csv", config))
    assert done.steps == 2
    assert "zebra" not in caplog.text


def test_a_rehearsal_without_records_is_refused(tmp_path: Path) -> None:
    config = table_run()
    train = load_records(write_table(tmp_path / "r.csv"), config)
    with pytest.raises(DataError, match="no records to train on"):
        rehearse(load(config, "cpu"), config, train.take([]))


def test_a_loss_that_is_not_finite_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    config = table_run(("learning_rate = 0.05", "learning_rate = 0.05"))
    train = load_records(write_table(tmp_path / "r.csv"), config)
    broken = type(train)(train.inputs * float("inf"), train.labels)  # type: ignore[operator]
    with pytest.raises(RunError, match="training loss is nan"):
        rehearse(load(config, "cpu"), config, broken)


def test_a_device_or_base_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        load(table_run(), "cuda")
    with pytest.raises(ModelError, match="does not do"):
        load(table_run(('"mlp"', '"vit"')), "cpu")


def test_a_budget_that_cannot_be_reached_is_refused(tmp_path: Path) -> None:
    config = table_run(STEPS, extra=PRIVATE)
    assert config.privacy is not None
    tiny = msgspec.structs.replace(config.privacy, delta=0.05)
    config = msgspec.structs.replace(config, privacy=tiny)
    train = load_records(write_table(tmp_path / "r.csv"), config)
    with pytest.raises(PrivacyError, match="not below 1/n"):
        rehearse(load(config, "cpu"), config, train)


def test_doors_of_several_sites_share_nothing(doors: Doors, records: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("cardiology", "oncology")):
        coordinator = doors(contract=table_text(), site=name)
        assert join_site(coordinator.invite(), records, tmp_path / str(number)).site == name
