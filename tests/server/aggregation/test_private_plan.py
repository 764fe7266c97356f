"""The noise that was made beside the noise that was planned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.spec import AdapterSpec
from anabranch.server.aggregation import private
from anabranch.server.aggregation.fedavg import fedavg
from anabranch.server.aggregation.private import ClientPlan, require_planned, with_client_privacy
from tests.private_cases import PLAN, Array, filled, gaussians, rounds, zeros


def test_every_round_records_the_noise_that_it_was_made_with() -> None:
    for adaptive in (False, True):
        plan = replace(PLAN, adaptive=adaptive)
        history = rounds(with_client_privacy(fedavg(), plan, gaussians(1)), [[]] * 3)

        assert history[-1][0].made == pytest.approx((2.0, 2.0, 2.0))
        require_planned(plan, history[-1][0].made, 3)


def test_a_round_beyond_the_plan_is_refused_before_it_is_sent_out() -> None:
    rule = with_client_privacy(fedavg(), replace(PLAN, rounds=2), gaussians(1))
    state, merged = rounds(rule, [[], []])[-1]

    with pytest.raises(PrivacyError, match="round 3 is beyond the 2 that the plan accounts for"):
        rule.open(state, merged.adapter, 3)
    taken: list[int] = []
    with pytest.raises(PrivacyError, match="round 3 is beyond"):
        rule.merge(state, merged.adapter, (taken.append(1) or filled(1.0) for _ in range(1)))  # type: ignore[func-returns-value]
    assert taken == []


def test_a_round_that_is_counted_twice_or_left_out_is_refused() -> None:
    rule = with_client_privacy(fedavg(), PLAN, gaussians(1))
    state, adapter = rule.init(zeros())

    with pytest.raises(PrivacyError, match="round 2 after 0 noisy rounds"):
        rule.open(state, adapter, 2)


@pytest.mark.parametrize(
    ("made", "count", "says"),
    [
        ((2.0, 1.0), None, "a round was made with noise multiplier 1, the plan has 2"),
        ((2.0,) * 6, None, "6 noisy rounds were made, expected at most 5"),
        ((2.0,) * 2, 3, "2 noisy rounds were made, expected 3"),
    ],
)
def test_a_run_that_is_not_the_planned_one_is_told(
    made: tuple[float, ...], count: int | None, says: str
) -> None:
    with pytest.raises(PrivacyError, match=says):
        require_planned(PLAN, made, count)


@pytest.mark.parametrize("adaptive", [False, True])
def test_noise_halved_between_plan_and_sum_is_caught(
    adaptive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ClientPlan.__dict__["update_noise"].fget
    halved = property(lambda plan: right(plan) / 2)
    monkeypatch.setattr(private.ClientPlan, "update_noise", halved)
    rule = with_client_privacy(fedavg(), replace(PLAN, adaptive=adaptive), gaussians(1))

    with pytest.raises(PrivacyError, match=r"the plan has 2\. Publish nothing"):
        rounds(rule, [[]])


@pytest.mark.parametrize(
    "bug",
    [
        np.zeros,
        lambda count: 0.5 * np.random.default_rng(0).standard_normal(count),
        lambda count: np.full(count, np.nan),
        lambda count: np.random.default_rng(0).standard_normal(count - 1),
    ],
    ids=["off", "halved", "not a number", "too few"],
)
def test_a_source_that_is_not_standard_gaussian_is_caught(
    bug: Callable[[int], Array],
) -> None:
    wide = AdapterSpec(
        base="0" * 64,
        tokenizer="",
        rank=0,
        alpha=1.0,
        targets=(),
        tensors=(("head.weight", (20, 20)),),
    )
    rule = with_client_privacy(fedavg(), PLAN, bug)
    state, adapter = rule.init(Adapter(wide, {"head.weight": np.zeros((20, 20), np.float32)}))

    with pytest.raises(PrivacyError, match="are no standard Gaussians"):
        rule.merge(state, adapter, [])


@pytest.mark.parametrize("count", [1, 2, 10, 400, 5000])
def test_an_honest_source_is_never_refused(count: int) -> None:
    normal = gaussians(count)
    for _ in range(2000 if count < 1000 else 50):
        private._gaussians(normal, count)
