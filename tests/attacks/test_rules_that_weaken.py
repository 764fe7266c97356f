"""Attack: a rule of an owner's policy lets in a run that sums among fewer than the one it is like.

By default a rule compares author, software, model and data. An author could take the sums of the
approved run, and let them be opened by fewer, or have the noise made by others.
"""

from __future__ import annotations

from typing import Any

import pytest

from anabranch.client.policy.review import entry_text
from anabranch.client.policy.rules import decide
from anabranch.protocols.config import RunConfig
from tests.client.policy.policies import asked_of, entry_of, policy_of, private_config, signed_of

ROSTER = "5" * 64
TOGETHER: dict[str, Any] = {
    "privacy": {"noise": "distributed"},
    "federation": {"weighting": "uniform"},
    "training": {
        "local_steps": 1,
        "optimizer": "sgd",
        "momentum": 0.0,
        "learning_rate": 0.5,
        "batch_size": 20,
    },
    "data": {"min_rows": 200},
}
SUMS: dict[str, Any] = {"minimum": 9, "threshold": 0.8, "colluding": 0.2}


def like_it(before: RunConfig, now: RunConfig) -> str | None:
    """Return the code with which a run is refused that is like an approved one; None: let in."""
    like = signed_of(before, run="earlier", roster=ROSTER)
    rule = {"name": "study", "like": like.proposal.digest}
    policy = policy_of(approval={"mode": "by rule", "rules": [rule]})
    known = {like.proposal.digest: entry_of(like, before)}
    refused = decide(policy, asked_of(now, signed_of(now, roster=ROSTER), entries=known))
    return None if refused is None else refused.code


def test_a_run_with_the_same_sums_is_let_in() -> None:
    before, now = (private_config(seed=seed, secure_aggregation=SUMS) for seed in (1, 2))

    assert like_it(before, now) is None


@pytest.mark.parametrize(
    "weaker",
    [{"minimum": 3}, {"threshold": 0.7}, {"colluding": 0.0}],
    ids=lambda one: next(iter(one)),
)
def test_a_person_decides_on_sums_of_fewer(weaker: dict[str, Any]) -> None:
    before = private_config(secure_aggregation=SUMS)
    now = private_config(secure_aggregation=SUMS | weaker)

    assert like_it(before, now) == "pending"


def test_a_person_decides_on_who_makes_the_noise() -> None:
    alone = {name: table for name, table in TOGETHER.items() if name != "privacy"}
    before = private_config(secure_aggregation=SUMS, **alone)
    now = private_config(secure_aggregation=SUMS, **TOGETHER)

    assert like_it(before, now) == "pending"


def test_the_owner_is_told_who_makes_the_noise() -> None:
    now = private_config(secure_aggregation=SUMS, **TOGETHER)
    said = entry_text(entry_of(signed_of(now, roster=ROSTER), now, "pending"))

    assert "the members of a sum make the noise together" in said
    assert "together" not in entry_text(entry_of(signed_of(private_config()), private_config()))
