"""What the policy says to one message, with which reason."""

from __future__ import annotations

from typing import Any

import pytest

from anabranch.client.policy.rules import Asked, decide, seconds_left
from anabranch.client.policy.usage import Usage, Used
from anabranch.protocols.identity.proposal import Signed
from tests.client.policy.policies import (
    EVE,
    HERE,
    NOW,
    asked_of,
    policy_of,
    private_config,
    refusal,
    signed_of,
)


def test_an_approved_run_within_every_limit_is_allowed() -> None:
    assert decide(policy_of(), asked_of()) is None


def test_what_is_unsigned_is_refused() -> None:
    asked = changed(asked_of(), signed=None)

    assert refusal(policy_of(), asked) == (
        "unsigned",
        "run 'run-1': no signed proposal came with the message",
    )


def changed(asked: Asked, **changes: Any) -> Asked:
    return Asked(**(asked.__dict__ | changes))


def test_another_authority_and_another_federation_are_refused() -> None:
    code, text = refusal(policy_of(coordinators=["b" * 64]), asked_of())
    assert code == "coordinator"
    assert text == (
        "this site's policy does not list the authority aaaaaaaaaaaaaaaa… of federation heart "
        "among its coordinators"
    )
    config = private_config()
    other = asked_of(config, signed_of(config, federation="lungs"))
    assert refusal(policy_of(), other) == (
        "coordinator",
        "the run is of federation lungs, and this is heart",
    )


def test_an_author_is_known_by_name_and_key_and_signature() -> None:
    config = private_config()
    policy = policy_of()

    assert refusal(policy, asked_of(config, signed_of(config, author="eve"))) == (
        "author",
        "eve is not among the authors whose runs this site takes",
    )
    assert refusal(policy, asked_of(config, signed_of(config, EVE))) == (
        "author",
        "the run is signed with another key than the one this site has of anna",
    )
    good = signed_of(config)
    forged = Signed(proposal=good.proposal, key=good.key, signature="0" * 128)
    assert refusal(policy, asked_of(config, forged)) == (
        "author",
        "run run-1: the proposal is not signed by anna",
    )


def test_a_message_that_is_not_what_was_proposed_is_refused() -> None:
    config = private_config()
    asked = asked_of(private_config(seed=9), signed_of(config))

    code, text = refusal(policy_of(), asked)
    assert code == "run"
    assert text.startswith("run run-1: the message has configuration '")
    assert refusal(policy_of(), asked_of(run="run-2"))[0] == "run"


def test_other_software_is_refused_with_both_versions() -> None:
    config = private_config()
    signed = signed_of(config, code="d" * 64, version="0.2.0")

    assert refusal(policy_of(), asked_of(config, signed)) == (
        "code",
        "the run was proposed for version 0.2.0 (code dddddddddddd), and this site has version "
        f"{HERE.version} (code cccccccccccc): update the older one, or ask the author to propose "
        "the run again",
    )


CLIENT = {"epsilon": 2.0, "population": 50, "delta": 1e-6}
ALONE = {"quorum": 1, "client_evaluation": False, "weighting": "uniform"}


@pytest.mark.parametrize(
    ("policy", "run", "code", "sentence"),
    [
        (
            {},
            {"privacy": None},
            "privacy",
            "the run has no [privacy], and this site's policy asks for record-level privacy",
        ),
        (
            {"privacy": {"unit": "both"}},
            {},
            "privacy",
            "the run has no [client_privacy], and this site's policy asks for client-level privacy",
        ),
        (
            {"privacy": {"epsilon_max": 1.5}},
            {},
            "privacy",
            "privacy.epsilon = 2, and this site's policy allows 1.5",
        ),
        (
            {},
            {"privacy": {"delta": None}},
            "privacy",
            "privacy.delta has to be stated: this site's policy allows 1e-05",
        ),
        (
            {},
            {"privacy": {"delta": 1e-4}},
            "privacy",
            "privacy.delta = 0.0001, and this site's policy allows 1e-05",
        ),
        (
            {},
            {"federation": {"quorum": 2}},
            "cohort",
            "federation.quorum is 2, and this site's policy asks for at least 3",
        ),
        (
            {"privacy": {"unit": "client"}},
            {"client_privacy": CLIENT, "federation": {**ALONE, "cohort": 2}},
            "cohort",
            "the expected cohort is 2, and this site's policy asks for at least 3",
        ),
        (
            {"cohort": {"secure_aggregation": "required"}},
            {},
            "cohort",
            "the run has no [secure_aggregation], and this site's policy asks for it: the "
            "coordinator would see every site's update",
        ),
        (
            {"cohort": {"secure_aggregation": "required"}},
            {"secure_aggregation": {"minimum": 2}, "federation": {"quorum": 5}},
            "cohort",
            "secure_aggregation.minimum is 2, and this site's policy asks for at least 3",
        ),
        (
            {},
            {"secure_aggregation": {"minimum": 2}, "federation": {"quorum": 5}},
            "cohort",
            "secure_aggregation.minimum is 2, and this site's policy asks for at least 3",
        ),
        (
            {"cohort": {"colluding": 0.25}},
            {"secure_aggregation": {"colluding": 0.125}},
            "cohort",
            "secure_aggregation.colluding is 0.125, and this site's policy asks for at least 0.25",
        ),
        (
            {"cohort": {"threshold": 0.75}},
            {"secure_aggregation": {"threshold": 0.625}},
            "cohort",
            "secure_aggregation.threshold is 0.625, and this site's policy asks for at least 0.75",
        ),
        (
            {"data": {"columns_never": ["x"]}},
            {},
            "columns",
            "the run reads the column 'x', which this site's policy never gives",
        ),
        (
            {"limits": {"max_rounds": 1}},
            {},
            "rounds",
            "the run has 2 rounds, and this site's policy allows 1",
        ),
    ],
)
def test_a_run_that_does_not_keep_the_limits_is_refused_with_its_reason(
    policy: dict[str, Any], run: dict[str, Any], code: str, sentence: str
) -> None:
    config = private_config(**run)
    roster = "5" * 64 if config.secure_aggregation else None
    asked = asked_of(config, signed_of(config, roster=roster))

    assert refusal(policy_of(**policy), asked) == (code, sentence)


def test_a_run_that_sums_securely_passes_where_that_is_required() -> None:
    config = private_config(secure_aggregation={"minimum": 4}, federation={"quorum": 1})
    strict = policy_of(cohort={"secure_aggregation": "required", "minimum": 4, "threshold": 0.6})

    assert decide(strict, asked_of(config, signed_of(config, roster="5" * 64))) is None


def test_a_run_that_sums_securely_is_refused_without_a_roster() -> None:
    config = private_config(secure_aggregation={"minimum": 4})
    code, sentence = refusal(policy_of(), asked_of(config, signed_of(config)))

    assert code == "run"
    assert "its proposal has no roster" in sentence


def test_client_level_privacy_is_enough_where_the_owner_says_so() -> None:
    config = private_config(client_privacy=CLIENT, privacy=None, federation=ALONE)

    assert decide(policy_of(privacy={"unit": "client"}), asked_of(config)) is None


def test_a_run_without_privacy_is_allowed_only_where_the_owner_says_so() -> None:
    config = private_config(privacy=None)

    assert decide(policy_of(privacy={"required": False}), asked_of(config)) is None


def using(**used: Any) -> Usage:
    return Usage(run="run-1", rounds={1: Used(**used)})


@pytest.mark.parametrize(
    ("limits", "about", "code", "sentence"),
    [
        ({}, {"round": 3}, "rounds", "round 3 of a run that has 2"),
        (
            {"max_rounds": 2},
            {
                "usage": Usage(run="run-1", rounds={n: Used(questions=("q",)) for n in (7, 8)}),
                "round": 2,
            },
            "rounds",
            "this site has trained 2 rounds of this run: its limit",
        ),
        (
            {"max_minutes_per_round": 1.0},
            {"usage": using(seconds=60.0)},
            "minutes",
            "this site has no time left for round 1, which may take 1 minutes",
        ),
        (
            {"max_minutes_total": 1.0},
            {"usage": using(seconds=60.0), "round": 2},
            "minutes",
            "this site has no time left for this run, which may take 1 minutes",
        ),
        (
            {"max_mb_down_per_round": 1.0},
            {"down": 1_000_001},
            "bytes",
            "1 MB would be received in one round, and this site's policy allows 1",
        ),
        (
            {"max_mb_down_total": 2.0},
            {"usage": using(down=1_500_000), "down": 1_000_000, "round": 2},
            "bytes",
            "2.5 MB would be received in one run, and this site's policy allows 2",
        ),
        (
            {"max_mb_up_per_round": 1.0},
            {"usage": using(up=1_500_000)},
            "bytes",
            "1.5 MB would be sent in one round, and this site's policy allows 1",
        ),
        (
            {"max_mb_up_total": 1.0},
            {"usage": using(up=1_500_000), "round": 2},
            "bytes",
            "1.5 MB would be sent in one run, and this site's policy allows 1",
        ),
    ],
)
def test_what_was_used_up_is_refused(
    limits: dict[str, Any], about: dict[str, Any], code: str, sentence: str
) -> None:
    assert refusal(policy_of(limits=limits), asked_of(**about)) == (code, sentence)


def test_a_round_that_is_asked_for_again_is_no_new_round() -> None:
    both = Usage(run="run-1", rounds={n: Used(questions=("q",)) for n in (1, 2)})
    policy = policy_of(limits={"max_rounds": 2})

    assert decide(policy, asked_of(usage=both, round=2, question="q")) is None
    code, _ = refusal(policy, asked_of(usage=both, round=2, question="with another adapter"))
    assert code == "rounds"


def test_outside_the_hours_nothing_is_done() -> None:
    policy = policy_of(hours={"open": ["Mon-Fri 20:00-06:00"], "zone": "Europe/Copenhagen"})

    assert decide(policy, asked_of(now=NOW)) is None  # Tue 23:13 there
    assert refusal(policy, asked_of(now=NOW + 10 * 3600)) == (
        "hours",
        "outside the hours of this site; they begin Wed 2023-11-15 20:00 (Europe/Copenhagen)",
    )


def test_the_time_left_is_the_least_of_both_limits() -> None:
    policy = policy_of(limits={"max_minutes_per_round": 2.0, "max_minutes_total": 3.0})
    usage = Usage(run="run-1", rounds={1: Used(seconds=90.0), 2: Used(seconds=60.0)})

    assert seconds_left(policy, usage, 2) == 30.0
    assert seconds_left(policy, Usage(run="run-1"), 1) == 120.0
