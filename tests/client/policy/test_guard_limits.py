"""What a guarded site counts, and where it stops: rounds, time, memory, bytes, cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from anabranch.client.policy.guard import CHECKPOINT_S, GuardedSite
from anabranch.client.policy.rules import NotAllowed
from anabranch.protocols.adapter import Adapter
from tests.client.policy.guarded_site import DOWN, Steps, Ward, code_of
from tests.client.policy.policies import HERE, assignment_of, policy_of, write_policy
from tests.simulations.rig import adapter


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
