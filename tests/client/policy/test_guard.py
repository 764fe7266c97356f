"""A guarded site, end to end: what reaches the site behind it, and what is counted and logged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from anabranch.client.flower import (
    DESCRIBE,
    Describe,
    client_app,
    pack_describe,
    reason_of,
    unpack_described,
)
from anabranch.client.policy.approvals import Approvals
from anabranch.client.policy.guard import CHECKPOINT_S, GuardedSite, Watch
from anabranch.client.policy.journal import LINES, REPEAT_S
from anabranch.client.policy.policy_file import FILE
from anabranch.client.policy.rules import NotAllowed
from anabranch.client.policy.usage import FOLDER, UsageBook
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PolicyError, RunError
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.messages import Assignment, Evaluated, Refused, Trained
from anabranch.simulations.grid import InProcessGrid
from tests.client.policy.policies import (
    HERE,
    NOW,
    Clock,
    Notes,
    assignment_of,
    policy_of,
    private_config,
    proposal_of,
    signed_of,
    write_policy,
)
from tests.simulations.rig import ToySite, adapter

DOWN = sum(array.nbytes for array in adapter().arrays.values())


@dataclass
class Steps(ToySite):
    """A ToySite that works in steps, each of `seconds`, and tells whoever watches."""

    watch: Watch | None = None
    seconds: float = 0.0
    stopwatch: Clock = field(default_factory=lambda: Clock(0.0))
    heard: list[str] = field(default_factory=list)

    def admit(self, run: str, config: RunConfig, signed: Signed | None) -> None:
        self.heard.append("describe")

    def train(self, assignment: Assignment, before: Adapter) -> tuple[Trained, bytes]:
        self.heard.append(f"train {assignment.round}")
        for step in range(1, 4):
            self.stopwatch.now += self.seconds
            if self.watch is not None:
                self.watch("training", step, 3)
        return super().train(assignment, before)

    def evaluate(self, assignment: Assignment, adapter: Adapter) -> Evaluated:
        self.heard.append(f"evaluate {assignment.round}")
        return super().evaluate(assignment, adapter)


@dataclass
class Ward:
    """A guarded site with all its parts at hand."""

    folder: Path
    site: Steps = field(default_factory=lambda: Steps("aarhus"))
    notes: Notes = field(default_factory=Notes)
    clock: Clock = field(default_factory=Clock)
    resident: int = 0

    def __post_init__(self) -> None:
        self.config = private_config()
        self.signed = signed_of(self.config)
        self.set()
        self.begin()

    def set(self, **tables: Any) -> None:
        write_policy(self.folder, policy_of(**tables))

    def begin(self) -> None:
        """Start the site's process, or start it again."""
        self.site = Steps("aarhus", seconds=self.site.seconds, stopwatch=self.site.stopwatch)
        self.guard = GuardedSite(
            self.folder,
            self.site,
            audit=self.notes,
            clock=self.clock,
            here=HERE,
            stopwatch=self.site.stopwatch,
            memory=lambda: self.resident,
        )

    def describe(self) -> None:
        self.guard.admit("run-1", self.config, self.signed)

    def train(self, number: int = 1) -> tuple[Trained, bytes]:
        return self.guard.train(assignment_of(self.config, self.signed, number), adapter())

    def evaluate(self, number: int = 1) -> Evaluated:
        return self.guard.evaluate(assignment_of(self.config, self.signed, number), adapter())

    def approve(self) -> None:
        if not Approvals(self.folder).entries():
            Approvals(self.folder).note(
                self.signed.proposal, self.signed.key, self.config, self.clock()
            )
        Approvals(self.folder).approve(self.signed.proposal.digest, by="kim", now=self.clock())

    def used(self) -> Any:
        return UsageBook(self.folder).read("run-1")


@pytest.fixture
def ward(tmp_path: Path) -> Ward:
    return Ward(tmp_path)


def code_of(work: Callable[[], object]) -> str:
    with pytest.raises(NotAllowed) as error:
        work()
    assert reason_of(error.value) == "policy"
    return error.value.code


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


def test_usage_is_exact_over_restarts_and_a_round_counts_once(ward: Ward) -> None:
    ward.approve()
    ward.site.seconds = 2.0
    _, frame = ward.train(1)
    ward.begin()
    ward.train(1)
    ward.evaluate(1)
    ward.begin()
    ward.train(2)

    used = ward.used()
    assert used.trained == 2
    assert (used.round(1).seconds, used.round(2).seconds) == (12.0, 6.0)
    assert (used.round(1).down, used.round(1).up) == (3 * DOWN, 2 * len(frame))
    assert (used.total.down, used.total.up) == (4 * DOWN, 3 * len(frame))


def test_rounds_beyond_the_limit_are_refused_and_old_ones_are_not(ward: Ward) -> None:
    ward.approve()
    ward.train(1)
    ward.train(2)
    ward.begin()
    ward.train(2)
    assert code_of(lambda: ward.train(3)) == "rounds"


def test_a_round_with_another_adapter_is_another_round(ward: Ward) -> None:
    ward.set(limits={"max_rounds": 2})
    ward.approve()
    ward.train(1)
    before = adapter()
    other = Adapter(before.spec, {name: one + 1 for name, one in before.arrays.items()})
    ward.guard.train(assignment_of(ward.config, ward.signed, 1), other)

    assert ward.used().trained == 2
    assert code_of(lambda: ward.train(2)) == "rounds"


def test_an_evaluation_is_no_round(ward: Ward) -> None:
    ward.approve()
    ward.evaluate(1)

    assert (ward.used().trained, ward.used().round(1).down) == (0, DOWN)


def test_a_round_is_stopped_when_its_time_is_over(ward: Ward) -> None:
    ward.approve()
    ward.set(limits={"max_minutes_per_round": 1.0})
    ward.site.seconds = 31.0

    with pytest.raises(NotAllowed, match=r"^round 1: stopped at step 2 of 3, its time") as no:
        ward.train()
    assert no.value.code == "minutes"
    assert ward.used().round(1).seconds == 62.0  # it goes on from here, over restarts
    ward.begin()
    with pytest.raises(NotAllowed, match=r"no time left for round 1, which may take 1 minutes"):
        ward.train()


def test_an_interrupted_round_has_only_the_rest_of_its_time(ward: Ward) -> None:
    ward.approve()
    ward.set(limits={"max_minutes_per_round": 1.0})
    ward.site.seconds = 10.0
    ward.train()
    ward.site.seconds = 16.0

    with pytest.raises(NotAllowed, match=r"stopped at step 2 of 3"):
        ward.train()


def test_seconds_are_written_down_while_the_site_works(ward: Ward) -> None:
    ward.approve()
    ward.site.seconds = CHECKPOINT_S
    written: list[float] = []
    outer = ward.site.watch
    assert outer is not None

    def killed(activity: str, step: int, steps: int) -> None:
        outer(activity, step, steps)
        written.append(ward.used().round(1).seconds)

    ward.site.watch = killed
    ward.train()
    assert written == [CHECKPOINT_S, 2 * CHECKPOINT_S, 3 * CHECKPOINT_S]


def test_a_round_is_stopped_when_the_hours_are_over(ward: Ward) -> None:
    ward.approve()
    ward.set(hours={"open": ["daily 22:00-22:30"]})
    outer = ward.site.watch
    assert outer is not None

    def late(activity: str, step: int, steps: int) -> None:
        ward.clock.now += 600.0  # NOW is 22:13
        outer(activity, step, steps)

    ward.site.watch = late
    with pytest.raises(NotAllowed, match=r"stopped at step 2 of 3, the hours of this site are ov"):
        ward.train()


def test_memory_is_looked_at_before_and_at_every_step(ward: Ward) -> None:
    ward.approve()
    ward.set(limits={"memory_mb": 100})
    ward.resident = 101 << 20
    assert code_of(ward.train) == "memory"
    assert ward.site.heard == []

    ward.resident = 100 << 20
    outer = ward.site.watch
    assert outer is not None

    def grows(activity: str, step: int, steps: int) -> None:
        ward.resident += 1 << 20
        outer(activity, step, steps)

    ward.site.watch = grows
    with pytest.raises(NotAllowed, match=r"^the site holds 101 MiB of memory, and its policy all"):
        ward.train()


def test_more_bytes_than_allowed_never_leave(ward: Ward) -> None:
    ward.approve()
    ward.set(limits={"max_mb_up_per_round": 1e-5})

    assert code_of(ward.train) == "bytes"
    assert ward.site.heard == ["train 1"]
    assert ward.used().round(1).up == 0
    ward.set(limits={"max_mb_down_per_round": 1e-5})
    assert code_of(ward.train) == "bytes"
    assert ward.site.heard == ["train 1"]


def test_watching_outside_a_message_says_nothing(ward: Ward) -> None:
    ward.guard.watch("training", 1, 3)


def test_the_sites_own_watch_is_told_first(tmp_path: Path) -> None:
    told: list[int] = []
    site = Steps("aarhus", watch=lambda activity, step, steps: told.append(step))
    write_policy(tmp_path, policy_of(approval={"mode": "each run"}))
    ward = Ward(tmp_path)
    ward.site, ward.guard = site, GuardedSite(tmp_path, site, here=HERE, clock=ward.clock)
    ward.approve()
    ward.train()

    assert told == [1, 2, 3]


def test_cores_are_held_to_the_policys_and_given_back(ward: Ward) -> None:
    import torch

    ward.approve()
    ward.set(limits={"cores": 1})
    ward.train()
    assert torch.get_num_threads() == 1
    ward.set(limits={"cores": 10_000})  # never more than it began with
    ward.train()
    assert torch.get_num_threads() <= 10_000


# the audit log


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
