"""What a guarded site writes into its audit log."""

from __future__ import annotations

import pytest

from anabranch.client.policy.approvals import Approvals
from anabranch.client.policy.journal import LINES, REPEAT_S
from anabranch.client.policy.rules import NotAllowed
from anabranch.client.policy.usage import FOLDER
from anabranch.protocols.errors import RunError
from tests.client.policy.guarded_site import Ward, code_of
from tests.client.policy.policies import private_config, signed_of


def test_the_log_tells_what_was_allowed_once_and_every_round(ward: Ward) -> None:
    ward.approve()
    ward.describe()
    ward.train(1)
    ward.begin()
    ward.train(2)
    ward.evaluate(2)

    assert ward.notes.kinds == ["policy", "run-allowed", "round-trained", "policy", "round-trained"]
    allowed = ward.notes.lines[1][1]
    assert allowed["proposal"] == ward.signed.proposal.digest
    assert allowed["privacy"] == {"privacy": {"epsilon": 2.0, "delta": 1e-6}}
    assert (allowed["author"], allowed["rule"]) == ("anna", "")
    trained = ward.notes.lines[2][1]
    assert (trained["run"], trained["round"], trained["examples"]) == ("run-1", 1, 10)


def test_the_log_names_the_fingerprint_of_the_data(ward: Ward) -> None:
    import numpy as np

    from anabranch.client.data.records import Records, fingerprint

    train = Records(np.eye(2, dtype=np.float32), np.array([0, 1]))
    ward.approve()
    ward.site.records = lambda config: (train, train)  # type: ignore[attr-defined]
    ward.train()

    assert dict(ward.notes.lines[-1][1])["data"] == fingerprint(train)


def test_a_rule_is_named_in_the_log_and_in_the_approvals(ward: Ward) -> None:
    ward.approve()
    like = ward.signed.proposal.digest
    ward.set(approval={"mode": "by rule", "rules": [{"name": "study", "like": like}]})
    ward.config = private_config(seed=8)
    ward.signed = signed_of(ward.config)
    ward.train()

    assert dict(ward.notes.lines[1][1])["rule"] == "study"
    entry = Approvals(ward.folder).entries()[ward.signed.proposal.digest]
    assert (entry.state, entry.by) == ("by rule", "study")
    ward.set()
    assert code_of(ward.train) == "pending"  # the rule is gone
    assert Approvals(ward.folder).entries()[ward.signed.proposal.digest].state == "pending"
    for name in ("study", "renamed"):  # it counts among the runs of the rule that lets it in
        ward.set(approval={"mode": "by rule", "rules": [{"name": name, "like": like}]})
        ward.train()
        entry = Approvals(ward.folder).entries()[ward.signed.proposal.digest]
        assert (entry.state, entry.by) == ("by rule", name)
    assert ward.notes.kinds.count("run-allowed") == 1  # it is one run, all the same


def test_the_same_refusal_is_logged_once_in_a_while_and_counted(ward: Ward) -> None:
    for _ in range(5):
        code_of(ward.describe)
    refused = [fields for kind, fields in ward.notes.lines if kind == "refused"]
    assert [(f["code"], f["repeated"]) for f in refused] == [("pending", 0)]

    ward.clock.now += REPEAT_S
    code_of(ward.describe)
    refused = [fields for kind, fields in ward.notes.lines if kind == "refused"]
    assert [f["repeated"] for f in refused] == [0, 4]


def test_whoever_asks_cannot_fill_the_disk(ward: Ward) -> None:
    for number in range(LINES + 50):
        ward.signed = signed_of(ward.config, run=f"run-{number}")
        assert code_of(ward.describe) in ("run", "pending")

    assert ward.notes.kinds.count("refused") == LINES
    assert len(Approvals(ward.folder).entries()) <= 100
    assert not (ward.folder / FOLDER).exists()


def test_nothing_is_done_that_the_log_does_not_take(ward: Ward) -> None:
    ward.approve()

    def full(kind: str, **fields: object) -> None:
        raise RunError(f"{ward.folder}/audit.jsonl: no space")

    ward.notes.append = full  # type: ignore[method-assign]
    with pytest.raises(NotAllowed, match=r"^this site's audit log cannot be written") as no:
        ward.train()
    assert str(ward.folder) not in str(no.value)
    assert ward.site.heard == []
