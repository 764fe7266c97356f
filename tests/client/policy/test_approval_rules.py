"""What an owner has to approve, and what a rule of the owner's approves instead."""

from __future__ import annotations

from typing import Any

from anabranch.client.policy.approvals import State
from anabranch.client.policy.policy_file import Policy
from anabranch.client.policy.rules import Asked, decide
from tests.client.policy.policies import (
    EARLIER,
    LIKE,
    asked_of,
    entry_of,
    policy_of,
    private_config,
    refusal,
    signed_of,
)


def test_nothing_is_approved_by_itself() -> None:
    config = private_config()
    short = signed_of(config).proposal.digest[:12]

    assert refusal(policy_of(), asked_of(config, entries={})) == (
        "pending",
        f"waiting for the owner: `anabranch site policy approve {short}`",
    )
    signed = signed_of(config)
    no = {signed.proposal.digest: entry_of(signed, config, "rejected")}
    assert refusal(policy_of(), asked_of(config, signed, entries=no)) == (
        "rejected",
        f"the owner of this site rejected this run ({short})",
    )


def ruled(**rule: Any) -> Policy:
    values = {"name": "study", "like": LIKE.digest, **rule}
    return policy_of(approval={"mode": "by rule", "rules": [values]})


def like_it(config: Any, **about: Any) -> Asked:
    earlier = entry_of(signed_of(EARLIER, run="earlier"), EARLIER)
    return asked_of(config, entries={LIKE.digest: earlier} | about.pop("more", {}), **about)


def test_a_rule_approves_what_is_like_an_approved_run() -> None:
    config = private_config()

    assert decide(ruled(), like_it(config)) is None
    assert decide(ruled(epsilon_max=2.0, max_rounds=2), like_it(config)) is None
    assert refusal(ruled(epsilon_max=1.9), like_it(config))[0] == "pending"
    assert refusal(ruled(max_rounds=1), like_it(config))[0] == "pending"
    assert refusal(ruled(same=["author", "contract", "config"]), like_it(config))[0] == "pending"
    other = private_config(data={"min_rows": 7})  # another contract
    assert refusal(ruled(), like_it(other))[0] == "pending"
    assert refusal(policy_of(), like_it(config))[0] == "pending"  # mode = "each run"


def test_a_rule_approves_no_other_roster() -> None:
    """Whom a site is summed with is for a person to say."""
    secure = {"secure_aggregation": {"minimum": 3}}
    before, now = private_config(seed=1, **secure), private_config(**secure)

    def asked(first: str | None, second: str) -> tuple[Policy, Asked]:
        like = signed_of(before, run="earlier", roster=first)
        known = {like.proposal.digest: entry_of(like, before)}
        message = asked_of(now, signed_of(now, roster=second), entries=known)
        return ruled(like=like.proposal.digest), message

    assert decide(*asked("5" * 64, "5" * 64)) is None
    assert refusal(*asked("5" * 64, "6" * 64))[0] == "pending"
    assert refusal(*asked(None, "6" * 64))[0] == "pending"


def test_a_rule_ends_with_the_approval_it_is_like() -> None:
    signed = signed_of(EARLIER, run="earlier")
    states: list[State] = ["rejected", "pending", "by rule"]
    for state in states:
        gone = {LIKE.digest: entry_of(signed, EARLIER, state)}

        assert refusal(ruled(), like_it(private_config(), more=gone))[0] == "pending"


def test_a_rule_lets_in_only_so_many_runs() -> None:
    configs = [private_config(seed=seed) for seed in (11, 12)]
    signed = [signed_of(one, run=f"run-{n}") for n, one in enumerate(configs)]
    noted = {
        s.proposal.digest: entry_of(s, c, "by rule", "study")
        for s, c in zip(signed, configs, strict=True)
    }

    assert decide(ruled(max_runs=3), like_it(private_config(), more=noted)) is None
    assert refusal(ruled(max_runs=2), like_it(private_config(), more=noted))[0] == "pending"
    again = like_it(configs[0], signed=signed[0], more=noted)
    assert decide(ruled(max_runs=2), again) is None  # it is one of the two


def test_a_person_overrules_a_rule() -> None:
    config = private_config()
    signed = signed_of(config)
    no = {signed.proposal.digest: entry_of(signed, config, "rejected")}

    assert refusal(ruled(), like_it(config, more=no))[0] == "rejected"
