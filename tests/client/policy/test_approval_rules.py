"""What an owner has to approve, and what a rule of the owner's approves instead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from anabranch.client.policy.approvals import State
from anabranch.client.policy.by_rule import unlike
from anabranch.client.policy.policy_file import Policy
from anabranch.client.policy.rules import Asked, decide
from tests.client.policy.policies import (
    EARLIER,
    EVE,
    HERE,
    LIKE,
    asked_of,
    entry_of,
    key_of,
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
    secure = {"secure_aggregation": {"minimum": 3}}  # with noise, in private_config
    before, now = private_config(seed=1, **secure), private_config(**secure)

    def asked(first: str | None, second: str) -> tuple[Policy, Asked]:
        like = signed_of(before, run="earlier", roster=first)
        known = {like.proposal.digest: entry_of(like, before)}
        message = asked_of(now, signed_of(now, roster=second), entries=known)
        return ruled(like=like.proposal.digest), message

    assert decide(*asked("5" * 64, "5" * 64)) is None
    assert refusal(*asked("5" * 64, "6" * 64))[0] == "pending"
    assert refusal(*asked(None, "6" * 64))[0] == "pending"


def test_a_rule_approves_no_other_federation_and_no_other_key() -> None:
    """A site that has moved may find another author there, of the same name."""
    config = private_config()
    moved = replace(HERE, federation="lungs")
    asked = like_it(config, signed=signed_of(config, federation="lungs"), here=moved)
    assert refusal(ruled(), asked)[1].endswith(
        "(rule study does not approve it: federation is another than in the run that it has to be "
        "like)"
    )
    policy = msgspec.structs.replace(ruled(), authors={"anna": key_of(EVE)})
    asked = like_it(config, signed=signed_of(config, EVE))
    assert refusal(policy, asked)[1].endswith(
        "the author's key is another than in the run that it has to be like)"
    )


def test_the_first_rule_that_fits_approves_and_else_each_says_why() -> None:
    narrow = {"name": "narrow", "like": LIKE.digest, "epsilon_max": 1.0}
    gone = {"name": "gone", "like": "0" * 64}
    wide = {"name": "wide", "like": LIKE.digest}
    asked = like_it(private_config())

    def policy(*rules: dict[str, Any]) -> Policy:
        return policy_of(approval={"mode": "by rule", "rules": rules})

    assert decide(policy(narrow, gone, wide), asked) is None
    assert refusal(policy(narrow, gone), asked)[1].endswith(
        " (rule narrow does not approve it: privacy.epsilon is 2, and it allows 1; rule gone does "
        "not approve it: the run that it has to be like is not approved)"
    )


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
    assert "it has approved 2 runs, and allows no more" in str(
        decide(ruled(max_runs=2), like_it(private_config(), more=noted))
    )
    again = like_it(configs[0], signed=signed[0], more=noted)
    assert decide(ruled(max_runs=2), again) is None  # it is one of the two


def test_a_person_overrules_a_rule() -> None:
    config = private_config()
    signed = signed_of(config)
    no = {signed.proposal.digest: entry_of(signed, config, "rejected")}

    assert refusal(ruled(), like_it(config, more=no))[0] == "rejected"


def test_an_owner_is_told_which_of_two_runs_states_its_delta() -> None:
    def said(before: float | None, now: float | None) -> str:
        first, second = (
            private_config(seed=n, privacy={"delta": d}) for n, d in ((1, before), (2, now))
        )
        return unlike(policy_of(), ruled().approval.rules[0], first, second) or ""

    assert said(1e-6, 1e-6) == said(1e-6, 1e-7) == ""
    assert (
        said(None, 1e-6)
        == "privacy.delta is stated, and the run that it has to be like leaves it out"
    )
    assert (
        said(1e-6, None)
        == "privacy.delta is left out, and the run that it has to be like states it"
    )
    assert said(1e-7, 1e-6) == "privacy.delta is larger than in the run that it has to be like"
