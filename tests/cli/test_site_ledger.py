"""`anabranch site ledger`: shows, verifies, exports; and the documented verifier needs no tool."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from anabranch.cli.main import run
from anabranch.client import pld
from anabranch.client.chain import KINDS
from anabranch.client.data.read import read_table
from anabranch.client.data.rows import row_hashes
from anabranch.client.ledger import Ledger
from anabranch.client.privacy import epsilon_of, repeats_within
from anabranch.client.site_file import ledger_of, read_site
from anabranch.protocols.chain import link_hash
from tests.ledgers import SPEND, change, old_ledger, rows, spend
from tests.runs import PRIVATE, table_text, write_site, write_table

DOCS = Path(__file__).parents[2] / "docs" / "ledger.md"
BUDGET = "\n[budget]\nepsilon = 3.0\ndelta = 0.0001\n"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return a site that has trained two rounds; one more was cut off."""
    folder = write_site(tmp_path / "north", "north", write_table(tmp_path / "records.csv", n=20))
    ledger, own = ledger_of(folder, read_site(folder)), records(folder)
    for number in (1, 2):
        ledger.settle(ledger.reserve(own, "r1", number, SPEND), SPEND)
    ledger.reserve(own, "r2", 1, spend(2.0))
    return folder


def records(folder: Path) -> tuple[bytes, ...]:
    return row_hashes(read_table(Path(read_site(folder).data)))


def said(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """Return what a command prints, and check its exit code."""
    assert run(["site", "ledger", "-f", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    return out if code == 0 or out else err


def found(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(said(capsys, *arguments, "--json", code=code))
    return result


def test_it_shows_what_every_data_set_has_spent(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spends = [SPEND, SPEND, spend(2.0)]

    report = found(capsys, site)
    text = said(capsys, site)

    (one,) = report["sets"]
    assert (one["rows"], one["rounds"], one["open"], one["runs"]) == (20, 3, 1, ["r1", "r2"])
    assert one["delta"] == 1 / 200
    assert one["epsilon"] == report["everything"] == epsilon_of(spends, 1 / 200)
    assert (one["left"], one["rounds_left"]) == (None, None)
    assert report["records"] == {"known": 20, "new": 0}
    assert report["head"] == Ledger(site / "ledger.sqlite").head
    assert report["events"] == 7
    assert re.search(rf"{one['data'][:12]}… +20 +3 +1 +{one['epsilon']:.3f} +5\.0e-03", text)
    assert "budget: none in site.toml" in text
    assert "records: 20 known, 0 new" in text
    assert report["head"] in text


def test_it_shows_what_is_left_of_a_budget(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "site.toml").write_text((site / "site.toml").read_text() + BUDGET)
    spends = [SPEND, SPEND, spend(2.0)]

    (one,) = found(capsys, site)["sets"]

    assert one["delta"] == 1e-4
    assert one["left"] == 3.0 - epsilon_of(spends, 1e-4)
    left = repeats_within(spends, spend(2.0), epsilon=3.0, delta=1e-4)
    assert one["rounds_left"] == left > 0
    assert "budget: epsilon 3 at delta 0.0001, any one row" in said(capsys, site)


def test_edited_and_added_rows_are_counted_as_new(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(read_site(site).data)
    head, first, *others = data.read_text().splitlines()
    data.write_text("\n".join([head, *others, first.replace(first[:3], "9.9"), "7,7,no"]))

    assert found(capsys, site)["records"] == {"known": 19, "new": 2}

    data.unlink()
    assert found(capsys, site)["records"] is None
    assert "the site's file cannot be read" in said(capsys, site)


def test_spends_of_an_older_ledger_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = write_site(tmp_path / "north", "north", write_table(tmp_path / "records.csv", n=20))
    old_ledger(site / "ledger.sqlite", [("ab" * 32, "r0", 1, SPEND, "settled")])

    report = found(capsys, site)

    assert (report["imported"], report["sets"]) == (1, [])
    assert report["everything"] == epsilon_of([SPEND], report["delta"])
    assert "imported from an older ledger, charged to every row: 1" in said(capsys, site)
    assert found(capsys, site, "--verify")["ok"]


def test_an_epsilon_beyond_what_is_computed_is_null(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Ledger(site / "ledger.sqlite").reserve(records(site), "r9", 1, spend(0.3, 1.0, 500))

    (one,) = found(capsys, site)["sets"]

    assert one["epsilon"] is None
    assert math.isinf(Ledger(site / "ledger.sqlite").spent(records(site), 1e-4))
    assert found(capsys, site, "--verify")["epsilons"] == {}


def test_verify_checks_witnesses_and_both_accountants(
    site: Path, state_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = found(capsys, site, "--verify")
    text = said(capsys, site, "--verify")

    assert checked["ok"]
    assert checked["events"] == 7
    beside, elsewhere = checked["witnesses"]
    assert beside == str(site / "ledger.head")
    assert Path(elsewhere).parent == state_home / "anabranch" / "ledgers"
    ((_, one),) = checked["epsilons"].items()
    assert one["agree"]
    assert 0 < one["pld"][0] <= one["prv"][1] < one["pld"][1] + 0.02
    assert "agree" in text
    assert checked["head"] in text


def test_accountants_that_disagree_fail_the_verification(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pld, "pld_bounds", lambda spends, delta: (2.9, 3.0))

    assert not found(capsys, site, "--verify", code=1)["ok"]
    assert "DISAGREE" in said(capsys, site, "--verify", code=1)


@pytest.mark.parametrize("option", [[], ["--verify"], ["--export", "x.jsonl"]])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("UPDATE events SET body = replace(body, '10', '1') WHERE id = 3", "was changed: event 3"),
        ("DELETE FROM events WHERE id = 7", "rolled back or cut: it has 6 events"),
    ],
)
def test_damage_is_an_error(
    site: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: list[str],
    damage: str,
    says: str,
) -> None:
    monkeypatch.chdir(site)
    change(site / "ledger.sqlite", damage)

    assert says in said(capsys, site, *option, code=1)
    assert not (site / "x.jsonl").exists()


def test_exchanged_rows_fail_the_verification(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(site / "ledger.sqlite", "UPDATE members SET digests = zeroblob(320)")

    assert "are not what was written" in said(capsys, site, "--verify", code=1)


def test_contains_says_whether_a_head_of_the_coordinator_is_in_the_chain(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = Ledger(site / "ledger.sqlite").events()[3].hash

    assert found(capsys, site, "--contains", head) == {"contains": True}
    assert found(capsys, site, "--contains", "0" * 64, code=1) == {"contains": False}
    assert "expected the 64 hex digits" in said(capsys, site, "--contains", "abc", code=1)


def test_adopt_goes_on_after_a_loss(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is nothing to accept" in said(capsys, site, "--adopt", code=1)
    (site / "ledger.sqlite").unlink()
    assert "ledger is missing" in said(capsys, site, code=1)

    head = found(capsys, site, "--adopt")["head"]

    assert found(capsys, site)["head"] == head
    assert found(capsys, site)["events"] == 2


def test_a_site_that_never_trained_privately_says_so_and_gets_no_ledger(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = write_site(tmp_path / "north", "north", tmp_path / "records.csv")

    assert "has not trained privately yet" in said(capsys, site, code=1)
    assert "has not trained privately yet" in said(capsys, site, "--verify", code=1)
    assert not (site / "ledger.sqlite").exists()


def test_one_thing_at_a_time(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give one of" in said(capsys, site, "--verify", "--adopt", code=2)


# The export and the page about it


def export(site: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    target = site / "events.jsonl"
    assert found(capsys, site, "--export", target) == {"file": str(target), "events": 7}
    return target


def test_an_export_holds_the_chain_and_nothing_of_the_rows(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(site / "ledger.sqlite")
    text = export(site, capsys).read_text()

    previous = "0" * 64
    for number, line in enumerate(text.splitlines(), 1):
        event = json.loads(line)
        previous = link_hash(previous, number, event["kind"], event["body"])
        assert event == {**event, "id": number, "hash": previous}
    assert previous == ledger.head
    (members,) = ledger.members().values()
    for at in range(0, len(members), 16):
        assert members[at : at + 16].hex() not in text


def documented_verifier(tmp_path: Path, file: Path) -> subprocess.CompletedProcess[str]:
    (script,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(script.strip().splitlines()) <= 10
    (tmp_path / "verify.py").write_text(script)
    return subprocess.run(
        [sys.executable, "-I", str(tmp_path / "verify.py"), str(file)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_documented_verifier_checks_an_export_without_the_tool(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = export(site, capsys)

    done = documented_verifier(tmp_path, file)

    assert done.returncode == 0
    assert done.stdout == f"7 events, head {Ledger(site / 'ledger.sqlite').head}\n"


@pytest.mark.parametrize("damage", ["edit", "remove", "swap"])
def test_the_documented_verifier_notices_damage(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    file = export(site, capsys)
    lines = file.read_text().splitlines(keepends=True)
    changed = {
        "edit": [*lines[:2], lines[2].replace('steps\\":10', 'steps\\":1'), *lines[3:]],
        "remove": [*lines[:2], *lines[3:]],
        "swap": [*lines[:2], lines[3], lines[2], *lines[4:]],
    }[damage]
    assert changed != lines
    file.write_text("".join(changed))

    done = documented_verifier(tmp_path, file)

    assert done.returncode == 1
    assert done.stderr == "event 3 is not what was written\n"


def test_the_page_names_every_option_and_every_kind_of_event() -> None:
    text = DOCS.read_text()

    for option in ("--verify", "--export", "--contains", "--adopt", "--json"):
        assert option in text
    for kind in KINDS:
        assert f"| `{kind}` |" in text


def test_an_unknown_row_costs_nothing(site: Path) -> None:
    assert Ledger(site / "ledger.sqlite").spent(rows("never seen"), 1e-4) == 0.0


def test_every_head_in_the_events_of_a_run_is_in_the_chain_of_its_site(
    tmp_path: Path, state_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(tmp_path / "a.csv", n=40)
    text = table_text(("local_epochs = 2", "local_steps = 3"), extra=PRIVATE)
    (tmp_path / "run.toml").write_text(text)
    (tmp_path / "exp.toml").write_text('run = "run.toml"\n[sites]\na = "a.csv"\n')
    before = sorted(state_home.rglob("*"))

    assert run(["simulate", str(tmp_path / "exp.toml"), "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()

    (events,) = (tmp_path / "out").rglob("events.jsonl")
    trained = [e for e in map(json.loads, events.read_text().splitlines()) if "ledger" in e]
    assert len(trained) == 2
    site = events.parent / "sites" / "a"
    for event in trained:
        assert found(capsys, site, "--contains", event["ledger"]) == {"contains": True}
    assert found(capsys, site)["head"] == trained[-1]["ledger"]
    assert sorted(state_home.rglob("*")) == before  # a simulation leaves nothing there
