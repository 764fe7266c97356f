"""`anabranch site policy`: what its owner types, and what the documents say of it."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from anabranch.cli.main import run
from anabranch.client.policy import policy_file
from anabranch.client.policy.approvals import Approvals
from anabranch.client.policy.guard import GuardedSite, here_of
from anabranch.client.policy.policy_file import FILE, Policy, default_policy, parse_policy
from anabranch.client.policy.review import entry_text, policy_text
from anabranch.storage.audit_check import verify
from anabranch.storage.audit_log import AuditLog
from anabranch.storage.files import write_atomic
from tests.client.policy.policies import (
    ANNA,
    AUTHORITY,
    NOW,
    entry_of,
    key_of,
    policy_of,
    private_config,
    signed_of,
    without_none,
    write_coordinator,
    write_policy,
)
from tests.simulations.rig import ToySite

ROOT = Path(__file__).parents[3]
RUN = ROOT / "examples" / "first-run" / "run.toml"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return the folder of a joined site with the default policy and one run that waits."""
    folder = tmp_path / "site"
    write_coordinator(folder, "aarhus")
    text = default_policy({"heart": AUTHORITY}, {"anna": key_of(ANNA)})
    write_atomic(folder / FILE, text.encode(), 0o600)
    config = private_config()
    signed = signed_of(config, code=here_of(folder).code)
    Approvals(folder).note(signed.proposal, signed.key, config, NOW)
    return folder


def digest(site: Path) -> str:
    return next(iter(Approvals(site).entries()))


def state(site: Path) -> str:
    return Approvals(site).entries()[digest(site)].state


@pytest.mark.parametrize("verb", [[], ["show"]])
def test_it_shows_every_value_and_how_many_wait(
    site: Path, verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["site", "policy", *verb, "-f", str(site)]) == 0
    out = capsys.readouterr().out
    assert "privacy.epsilon_max = 8.0\n" in out
    assert 'approval.mode = "each run"\n' in out
    assert "limits.cores = any\n" in out
    assert out.endswith("\n1 runs wait for an answer\n")

    assert run(["site", "policy", *verb, "-f", str(site), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["policy"]["cohort"] == {
        "minimum": 3,
        "secure_aggregation": "optional",
        "threshold": 0.5,
        "colluding": 0.0,
        "new_peers": "accept",
    }
    assert shown["pending"] == 1


def test_it_lists_what_was_proposed(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["site", "policy", "list", "-f", str(site)]) == 0
    out = capsys.readouterr().out
    assert digest(site)[:12] in out
    assert "pending" in out
    assert run(["site", "policy", "list", "-f", str(site), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["runs"]
    assert (entry["digest"], entry["proposal"]["author"]) == (digest(site), "anna")


def test_an_approval_shows_the_run_and_is_logged(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = digest(site)[:12]
    assert run(["site", "policy", "approve", short, "-f", str(site), "--yes"]) == 0
    out = capsys.readouterr().out
    assert "reads       x (number), y (label)\n" in out
    assert "privacy     record-level epsilon 2, delta 1e-06\n" in out
    assert "rounds      2, at least 3 sites in each\n" in out
    assert out.endswith(f"{short} is approved\n")
    assert state(site) == "approved"

    assert run(["site", "policy", "reject", short, "-f", str(site), "--yes"]) == 0
    assert state(site) == "rejected"
    assert run(["site", "policy", "approve", short, "-f", str(site), "--yes"]) == 1
    assert "a rejection is final" in capsys.readouterr().err
    log = (site / "audit.jsonl").read_text()
    assert log.count('"kind":"run-approved"') == 1  # an answer that does not count is not logged
    assert log.count('"kind":"run-rejected"') == 1
    assert verify(site / "audit.jsonl").entries == 3


def test_an_owner_with_rules_is_told_why_a_run_waits(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    like, config = digest(site), private_config(seed=9, federation={"rounds": 3})
    assert run(["site", "policy", "approve", like, "-f", str(site), "--yes"]) == 0
    assert "\nwaits " not in capsys.readouterr().out
    rule = {"name": "study", "like": like}
    write_policy(site, policy_of(approval={"mode": "by rule", "rules": [rule]}))
    signed = signed_of(config, run="run-2", code=here_of(site).code)
    Approvals(site).note(signed.proposal, signed.key, config, NOW)
    why = "federation.rounds is 3, and it allows 2"

    later = signed.proposal.digest
    assert run(["site", "policy", "reject", later, "-f", str(site), "--yes"]) == 0
    said = capsys.readouterr().out
    assert f"\nwaits       rule study does not approve it: {why}\n" in said
    (tmp_path / "run.toml").write_bytes(
        msgspec.toml.encode(without_none(msgspec.to_builtins(config)))
    )
    arguments = ["site", "policy", "check", str(tmp_path / "run.toml"), "-f", str(site)]
    assert run(arguments) == 0
    assert f"; rule study: {why}\n" in capsys.readouterr().out


def test_an_owner_may_say_no_while_the_policy_is_broken(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (site / FILE).write_text("nonsense")
    assert run(["site", "policy", "reject", digest(site), "-f", str(site), "--yes"]) == 0
    assert "\nwaits       policy.toml: " in capsys.readouterr().out
    assert state(site) == "rejected"


def test_an_owner_is_told_what_two_runs_without_noise_can_show() -> None:
    summed = private_config(secure_aggregation={"minimum": 3}, privacy=None)
    said = [
        entry_text(entry_of(signed_of(one, roster="5" * 64), one, "pending"))
        for one in (summed, private_config(secure_aggregation={"minimum": 3}))
    ]

    assert ["two runs like it" in one for one in said] == [True, False]


def test_nothing_is_approved_without_a_yes(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io
    import sys

    for answer in ("", "n\n", "\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        assert run(["site", "policy", "approve", digest(site), "-f", str(site)]) == 1
        assert state(site) == "pending"
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert run(["site", "policy", "approve", digest(site), "-f", str(site)]) == 0
    assert state(site) == "approved"


def test_a_prefix_is_not_guessed(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["site", "policy", "approve", digest(site)[:7], "-f", str(site), "--yes"]
    assert run(arguments) == 1
    assert "expected at least 8 hex digits" in capsys.readouterr().err


def test_a_run_is_held_against_the_policy_line_by_line(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["site", "policy", "check", str(RUN), "-f", str(site), "--author", "anna"]
    assert run(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "yes    author    anna is among the authors whose runs this site takes",
        "NO     privacy   privacy.delta has to be stated: this site's policy allows 1e-05",
        "NO     cohort    federation.quorum is 2, and this site's policy asks for at least 3",
        "yes    columns   age, systolic, smoker, readmitted",
        "yes    rounds    6 rounds",
        "later  approval  each run; no run of this configuration has been proposed",
        "yes    hours     open now",
    ]

    write_policy(site, policy_of(privacy={"required": False}, cohort={"minimum": 2}))
    assert run(["site", "policy", "check", str(RUN), "-f", str(site), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert run(["site", "policy", "check", str(RUN), "-f", str(site), "--author", "eve"]) == 1
    assert "NO     author    eve is not among" in capsys.readouterr().out


def test_a_policy_that_cannot_be_trusted_is_said_by_every_verb(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (site / FILE).chmod(0o666)
    for verb in (["show", "-f", str(site)], ["check", str(RUN), "-f", str(site)]):
        assert run(["site", "policy", *verb]) == 1
        assert "other users may write to it" in capsys.readouterr().err


def test_a_guard_finds_its_federation_in_the_folder(site: Path) -> None:
    config, audit = private_config(), AuditLog(site / "audit.jsonl", site / "audit.key", "aarhus")
    approvals = Approvals(site)
    approvals.approve(digest(site), by="kim", now=NOW)
    guard = GuardedSite(site, ToySite("aarhus"), audit=audit)
    signed = signed_of(config, code=here_of(site).code)

    guard.admit("run-1", config, signed)
    assert len(guard.sizes(config)[0]) == 10
    assert verify(site / "audit.jsonl").entries == 3  # opened, policy, run-allowed


def test_every_value_is_explained_in_the_documents() -> None:
    text = (ROOT / "docs" / "policy.md").read_text()
    for name in Policy.__struct_fields__:
        value = getattr(parse_policy(default_policy({}, {}), source=FILE), name)
        if not isinstance(value, msgspec.Struct):
            assert f"`{name}`" in text
            continue
        for one in value.__struct_fields__:
            assert f"`{name}.{one}`" in text, f"{name}.{one}"
    for one in policy_file.Rule.__struct_fields__:
        assert f"`{one}`" in text, one


def test_every_default_is_what_the_documents_say() -> None:
    text = (ROOT / "docs" / "policy.md").read_text()
    shown = policy_text(parse_policy(default_policy({}, {}), source=FILE))
    for line in shown.splitlines():
        name, value = line.split(" = ", 1)
        if name in ("coordinators", "authors") or value == "[]":
            continue
        row = next(row for row in text.splitlines() if row.startswith(f"| `{name}` |"))
        assert f"| {value.strip(chr(34))} |" in row, line
