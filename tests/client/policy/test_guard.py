"""A guarded site, end to end: what reaches the site behind it, and what does not."""

from __future__ import annotations

import pytest
from flwr.app import Message

from anabranch.client.flower import DESCRIBE, Describe, client_app, pack_describe, unpack_described
from anabranch.client.policy.approvals import Approvals
from anabranch.client.policy.policy_file import FILE
from anabranch.client.policy.rules import NotAllowed
from anabranch.client.policy.usage import FOLDER
from anabranch.protocols.errors import PolicyError
from anabranch.protocols.messages import Refused
from anabranch.simulations.grid import InProcessGrid
from tests.client.policy.guarded_site import Ward, code_of
from tests.client.policy.policies import (
    HERE,
    NOW,
    assignment_of,
    private_config,
    proposal_of,
    signed_of,
)
from tests.simulations.rig import ToySite, adapter


def test_a_run_waits_until_its_owner_has_approved_it(ward: Ward) -> None:
    short = ward.signed.proposal.digest[:12]
    for ask in (ward.describe, ward.train, ward.evaluate):
        with pytest.raises(PolicyError, match=rf"^waiting for the owner: .* approve {short}`$"):
            ask()
    assert ward.site.heard == []
    (entry,) = Approvals(ward.folder).entries().values()
    assert (entry.state, entry.proposal) == ("pending", ward.signed.proposal)

    ward.approve()
    ward.describe()
    ward.train()
    ward.evaluate()
    assert ward.site.heard == ["describe", "train 1", "evaluate 1"]


def test_what_the_site_says_passes_through_unchanged(ward: Ward) -> None:
    ward.approve()

    assert ward.train() == ToySite("aarhus").train(assignment_of(ward.config, None), adapter())
    assert (ward.guard.name, ward.guard.max_rank) == ("aarhus", None)
    ward.describe()
    assert len(ward.guard.sizes(ward.config)[0]) == 10


def test_records_are_counted_only_for_a_run_that_was_admitted(ward: Ward) -> None:
    ward.approve()
    assert code_of(lambda: ward.guard.sizes(ward.config)) == "run"
    ward.describe()
    assert code_of(lambda: ward.guard.sizes(private_config(seed=99))) == "run"
    with pytest.raises(NotAllowed):
        ward.guard.admit("run-1", ward.config, None)
    assert code_of(lambda: ward.guard.sizes(ward.config)) == "run"


def test_an_unsigned_message_never_reaches_the_site(ward: Ward) -> None:
    ward.approve()
    ward.signed = None  # type: ignore[assignment]

    for ask in (ward.describe, ward.train, ward.evaluate):
        assert code_of(ask) == "unsigned"
    assert ward.site.heard == []


def test_a_configuration_under_another_approval_never_reaches_the_site(ward: Ward) -> None:
    ward.approve()
    ward.config = private_config(privacy={"epsilon": 7.9})

    for ask in (ward.describe, ward.train, ward.evaluate):
        assert code_of(ask) == "run"
    assert ward.site.heard == []


def test_a_withdrawn_approval_counts_from_the_next_message_on(ward: Ward) -> None:
    ward.approve()
    ward.train()
    Approvals(ward.folder).reject(ward.signed.proposal.digest, by="kim", now=NOW)

    for ask in (ward.describe, ward.train, ward.evaluate):
        assert code_of(ask) == "rejected"
    assert ward.site.heard == ["train 1"]


def test_a_changed_policy_counts_from_the_next_message_on(ward: Ward) -> None:
    ward.approve()
    ward.train()
    ward.set(privacy={"epsilon_max": 1.0})
    assert code_of(ward.train) == "privacy"
    ward.set()
    ward.train()


def test_what_cannot_be_trusted_refuses_everything_and_says_what_to_do(ward: Ward) -> None:
    ward.approve()
    ward.train()
    usage = next((ward.folder / FOLDER).iterdir())
    for path in (ward.folder / FILE, ward.folder / "approvals.json", usage):
        path.chmod(0o666)
        with pytest.raises(PolicyError, match=rf"{path.name}: other users may write to it") as no:
            ward.train()
        assert str(ward.folder) not in str(no.value)
        path.chmod(0o600)
    (ward.folder / FILE).unlink()
    assert code_of(ward.train) == "policy"
    assert ward.site.heard == ["train 1"]


def test_a_damaged_usage_refuses_the_run(ward: Ward) -> None:
    ward.approve()
    ward.train()
    next((ward.folder / FOLDER).iterdir()).write_bytes(b'{"run": "run-1", "rounds": {"1": {}}')

    with pytest.raises(PolicyError, match="what run run-1 has used is not known"):
        ward.train()


def test_a_refusal_reaches_the_coordinator_as_a_reason(ward: Ward) -> None:
    app = client_app(lambda context: ward.guard)
    content = pack_describe(Describe(run="run-1", config=ward.config, signed=ward.signed))
    with InProcessGrid(app, ["aarhus"]) as grid:
        (node,) = grid.get_node_ids()
        (reply,) = grid.send_and_receive([Message(content, node, DESCRIBE)], timeout=30)

    short = ward.signed.proposal.digest[:12]
    text = f"waiting for the owner: `anabranch site policy approve {short}`"
    expected = Refused(site="aarhus", reason="policy", message=text)
    assert unpack_described(reply.content) == expected


def test_another_federations_site_takes_nothing(ward: Ward) -> None:
    ward.approve()
    ward.signed = signed_of(ward.config, federation="lungs")
    assert code_of(ward.describe) == "coordinator"
    assert proposal_of(ward.config).federation == HERE.federation
