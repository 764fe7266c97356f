"""approvals.json: who answered what, under two processes, and how full it may get."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.client.policy import approvals as module
from anabranch.client.policy.approvals import FILE, Approvals
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PolicyError
from anabranch.protocols.identity.proposal import Signed
from tests.client.policy.policies import NOW, private_config, signed_of


def noted(approvals: Approvals, number: int = 1, rule: str = "") -> str:
    config = private_config()
    signed = signed_of(config, run=f"run-{number}")
    approvals.note(signed.proposal, signed.key, config, NOW + number, rule)
    return signed.proposal.digest


def state(approvals: Approvals, digest: str) -> str:
    return approvals.entries()[digest].state


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["note", "rule", "approve", "reject"]), st.integers(1, 2)),
        max_size=8,
    )
)
def test_no_order_of_answers_brings_a_rejected_run_back(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    approvals = Approvals(tmp_path_factory.mktemp("site"))
    rejected: set[str] = set()
    answers = {"approve": approvals.approve, "reject": approvals.reject}
    for step, number in steps:
        config = private_config()
        digest = signed_of(config, run=f"run-{number}").proposal.digest
        if step in ("note", "rule"):
            noted(approvals, number, "study" if step == "rule" else "")
        elif digest in approvals.entries() and digest not in rejected:
            answers[step](digest, by="kim", now=NOW)
        else:
            with pytest.raises(PolicyError):
                answers[step](digest, by="kim", now=NOW)
        if step == "reject" and digest in approvals.entries():
            rejected.add(digest)
        found = approvals.entries()
        assert {d for d, e in found.items() if e.state == "rejected"} == rejected


def test_an_unknown_proposal_waits_and_is_written_down_once(tmp_path: Path) -> None:
    approvals, config = Approvals(tmp_path), private_config()
    signed = signed_of(config)

    assert approvals.note(signed.proposal, signed.key, config, NOW)
    assert not approvals.note(signed.proposal, signed.key, config, NOW + 9)

    entry = approvals.find(signed.proposal.digest)
    assert list(approvals.entries().values()) == [entry]
    assert (entry.state, entry.first_seen, entry.config) == ("pending", NOW, config)
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_an_approval_says_who_and_when_and_can_be_withdrawn(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    digest = noted(approvals)

    approved = approvals.approve(digest, by="kim", now=NOW + 5)
    assert (approved.state, approved.by, approved.decided) == ("approved", "kim", NOW + 5)
    withdrawn = approvals.reject(digest, by="lee", now=NOW + 6, reason="not any more")
    assert (withdrawn.state, withdrawn.by, withdrawn.reason) == ("rejected", "lee", "not any more")
    assert approvals.entries()[digest] == withdrawn


def test_a_rejection_is_final(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    digest = noted(approvals)
    approvals.reject(digest, by="kim", now=NOW)

    for answer in (approvals.approve, approvals.reject):
        with pytest.raises(PolicyError, match=r"rejected by kim, and a rejection is final"):
            answer(digest, by="kim", now=NOW)
    noted(approvals)
    assert state(approvals, digest) == "rejected"


def test_what_cannot_be_recorded_is_not_answered(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    digest = noted(approvals)

    def fail(entry: object) -> None:
        raise PolicyError("no room")

    with pytest.raises(PolicyError, match="no room"):
        approvals.approve(digest, by="kim", now=NOW, record=fail)
    assert state(approvals, digest) == "pending"


def test_a_note_of_a_rule_becomes_a_question_when_the_rule_has_ended(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    digest = noted(approvals)
    noted(approvals, rule="study")
    assert (state(approvals, digest), approvals.entries()[digest].by) == ("by rule", "study")
    noted(approvals, rule="another")  # which counts it, from now on
    assert (state(approvals, digest), approvals.entries()[digest].by) == ("by rule", "another")
    noted(approvals)
    assert state(approvals, digest) == "pending"


def test_an_entry_is_found_by_a_unique_prefix(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    digest = noted(approvals)

    assert approvals.find(digest[:8]).digest == digest
    assert approvals.find(digest).digest == digest
    for prefix in (digest[:7], "", "xyzxyzxyz", digest + "0", digest[:8].upper() + "!"):
        with pytest.raises(PolicyError, match=r"expected at least 8 hex digits"):
            approvals.find(prefix)
    with pytest.raises(PolicyError, match=r"no proposals begin so"):
        approvals.find("0" * 8 if digest[:8] != "0" * 8 else "1" * 8)


def test_at_most_so_many_runs_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PENDING", 3)
    approvals = Approvals(tmp_path)
    digests = [noted(approvals, number) for number in range(3)]

    with pytest.raises(PolicyError, match=r"3 runs wait for the owner of this site already"):
        noted(approvals, 3)
    noted(approvals, 2)  # known already
    assert list(approvals.entries()) == digests  # the oldest first
    approvals.reject(digests[0], by="kim", now=NOW)
    noted(approvals, 3)
    for number in range(10, 13):
        noted(approvals, number, "study")
    with pytest.raises(PolicyError, match=r"3 runs were let in by rules"):
        noted(approvals, 13, "study")


def test_a_configuration_that_nobody_could_read_is_refused(tmp_path: Path) -> None:
    labels = [f"label number {number}" for number in range(600)]
    config = private_config(task={"labels": labels})
    signed = signed_of(config)

    with pytest.raises(PolicyError, match=r"at most 8192 can be put before the owner"):
        Approvals(tmp_path).note(signed.proposal, signed.key, config, NOW)
    assert Approvals(tmp_path).entries() == {}


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'[{"state": "approved"}]', b"\xff"])
def test_a_damaged_file_refuses_every_run(tmp_path: Path, data: bytes) -> None:
    (tmp_path / FILE).write_bytes(data)
    (tmp_path / FILE).chmod(0o600)

    with pytest.raises(PolicyError, match=r"approvals.json: .*nothing is allowed"):
        Approvals(tmp_path).entries()
    with pytest.raises(PolicyError):
        noted(Approvals(tmp_path))
    assert (tmp_path / FILE).read_bytes() == data


def test_a_file_that_others_may_write_refuses_every_run(tmp_path: Path) -> None:
    digest = noted(Approvals(tmp_path))
    (tmp_path / FILE).chmod(0o666)

    with pytest.raises(PolicyError, match=r"approvals.json: other users may write"):
        Approvals(tmp_path).approve(digest, by="kim", now=NOW)


def test_no_entry_is_lost_under_two_processes(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, '.');"
        "from tests.client.policy.test_approvals import noted; "
        "from anabranch.client.policy.approvals import Approvals; "
        "[noted(Approvals(Path(sys.argv[1])), int(sys.argv[2]) + n) for n in range(15)]"
    )
    root = Path(__file__).parents[3]
    others = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(first)], cwd=root)
        for first in (100, 200)
    ]
    approvals = Approvals(tmp_path)
    digests = [noted(approvals, number) for number in range(15)]
    for digest in digests:
        approvals.approve(digest, by="kim", now=NOW)

    assert [other.wait(timeout=60) for other in others] == [0, 0]
    entries = approvals.entries()
    assert len(entries) == 45
    assert {d for d, e in entries.items() if e.state == "approved"} == set(digests)


def test_the_same_run_with_another_configuration_is_another_proposal() -> None:
    def digest(config: RunConfig) -> str:
        signed: Signed = signed_of(config)
        return signed.proposal.digest

    assert digest(private_config()) != digest(private_config(seed=8))
