"""What the policy says to one message, and that a stricter one never says yes to more."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.client.policy.approvals import State
from anabranch.client.policy.policy_file import Policy
from anabranch.client.policy.rules import Asked, Code, decide, seconds_left
from anabranch.client.policy.usage import Usage, Used
from anabranch.protocols.identity.proposal import Signed
from tests.client.policy.policies import (
    ANNA,
    AUTHORITY,
    EVE,
    HERE,
    NOW,
    asked_of,
    entry_of,
    key_of,
    policy_of,
    private_config,
    signed_of,
)

# field -> values, each stricter than the one before it
SCALES: dict[tuple[str, ...], list[Any]] = {
    ("coordinators",): [(AUTHORITY, "b" * 64), (AUTHORITY,), ()],
    ("authors",): [{"anna": key_of(ANNA), "eve": key_of(EVE)}, {"anna": key_of(ANNA)}, {}],
    ("approval", "mode"): ["by rule", "each run"],
    ("privacy", "required"): [False, True],
    ("privacy", "unit"): ["record", "both"],
    ("privacy", "epsilon_max"): [100.0, 3.0, 2.0, 1.0],
    ("privacy", "delta_max"): [1e-2, 1e-5, 1e-9],
    ("cohort", "minimum"): [1, 3, 4],
    ("cohort", "secure_aggregation"): ["optional", "required"],
    ("hours", "open"): [(), ("daily 20:00-23:00",), ("daily 22:30-23:00",)],
    ("limits", "max_rounds"): [10, 2, 1],
    ("limits", "max_minutes_per_round"): [10.0, 1.0, 0.5],
    ("limits", "max_minutes_total"): [20.0, 2.0, 1.0],
    ("limits", "max_mb_down_per_round"): [10.0, 1.0],
    ("limits", "max_mb_down_total"): [20.0, 1.0],
    ("limits", "max_mb_up_per_round"): [10.0, 0.5],
    ("limits", "max_mb_up_total"): [20.0, 0.5],
    ("data", "columns_never"): [(), ("z",), ("z", "x")],
}


def loosest() -> Policy:
    policy = policy_of()
    for path, values in SCALES.items():
        policy = _set(policy, path, values[0])
    return _set(policy, ("approval", "rules"), (_RULE,))


def _set(policy: Policy, path: tuple[str, ...], value: Any) -> Policy:
    if len(path) == 1:
        return msgspec.structs.replace(policy, **{path[0]: value})
    table = msgspec.structs.replace(getattr(policy, path[0]), **{path[1]: value})
    return msgspec.structs.replace(policy, **{path[0]: table})


_EARLIER = private_config(seed=1)
LIKE = signed_of(_EARLIER, run="earlier").proposal
_RULE = policy_of(
    approval={"mode": "by rule", "rules": [{"name": "study", "like": LIKE.digest}]}
).approval.rules[0]


@st.composite
def messages(draw: st.DrawFn) -> Asked:
    """Return a message that the loosest policy mostly allows."""

    def one_of(usual: Any, *other: Any) -> Any:
        return draw(st.sampled_from([usual, usual, *other]))

    private = {"epsilon": one_of(2.0, 0.5, 50.0), "delta": one_of(1e-6, None)}
    config = private_config(privacy=one_of(private, None), federation={"quorum": one_of(3, 1, 5)})
    author, key = one_of(("anna", ANNA), ("eve", EVE), ("anna", EVE))
    signed = signed_of(config, key, author=author)
    entries = {LIKE.digest: entry_of(signed_of(_EARLIER, run="earlier"), _EARLIER)}
    state: State | None = one_of("approved", "rejected", "pending", "by rule", None)
    if state is not None:
        entries[signed.proposal.digest] = entry_of(signed, config, state)
    used = Used(
        questions=one_of((), ("q",)),
        seconds=one_of(0.0, 45.0, 90.0),
        down=one_of(0, 2_000_000),
        up=one_of(0, 700_000),
    )
    return asked_of(
        config,
        signed,
        usage=Usage(run="run-1", rounds={one_of(1, 2): used}),
        round=one_of(1, 0, 2, 3),
        down=one_of(0, 1_500_000),
        entries=entries,
    )


@settings(max_examples=40)
@pytest.mark.parametrize("path", SCALES, ids=".".join)
@given(data=st.data(), asked=messages())
def test_a_stricter_policy_never_allows_what_was_refused_before(
    path: tuple[str, ...], data: st.DataObject, asked: Asked
) -> None:
    scale, other = SCALES[path], data.draw(st.sampled_from(list(SCALES)))
    rest = _set(loosest(), other, data.draw(st.sampled_from(SCALES[other])))
    if path[-1] in ("unit", "epsilon_max", "delta_max"):
        rest = _set(rest, ("privacy", "required"), True)  # else they decide nothing
    decisions = [decide(_set(rest, path, value), asked) for value in scale]
    refused = [decision is not None for decision in decisions]

    assert refused == sorted(refused)  # once refused, refused by all that are stricter


@given(asked=messages())
def test_a_policy_without_a_rule_never_allows_what_was_refused_with_it(asked: Asked) -> None:
    if decide(loosest(), asked) is not None:
        assert decide(_set(loosest(), ("approval", "rules"), ()), asked) is not None


@given(several=st.lists(messages(), min_size=2, max_size=4))
def test_a_decision_does_not_depend_on_what_else_was_asked(several: list[Asked]) -> None:
    policy = loosest()
    forwards = [str(decide(policy, asked)) for asked in several]
    backwards = [str(decide(policy, asked)) for asked in reversed(several)]

    assert forwards == backwards[::-1]


def test_an_approved_run_within_every_limit_is_allowed() -> None:
    assert decide(policy_of(), asked_of()) is None


def refusal(policy: Policy, asked: Asked) -> tuple[Code, str]:
    found = decide(policy, asked)
    assert found is not None
    return found.code, str(found)


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
            "this site's policy asks for secure aggregation, which no run offers yet: the "
            "coordinator sees every site's update",
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
    assert refusal(policy_of(**policy), asked_of(private_config(**run))) == (code, sentence)


def test_client_level_privacy_is_enough_where_the_owner_says_so() -> None:
    config = private_config(client_privacy=CLIENT, privacy=None, federation=ALONE)

    assert decide(policy_of(privacy={"unit": "client"}), asked_of(config)) is None


def test_a_run_without_privacy_is_allowed_only_where_the_owner_says_so() -> None:
    config = private_config(privacy=None)

    assert decide(policy_of(privacy={"required": False}), asked_of(config)) is None


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
    earlier = entry_of(signed_of(_EARLIER, run="earlier"), _EARLIER)
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


def test_a_rule_ends_with_the_approval_it_is_like() -> None:
    signed = signed_of(_EARLIER, run="earlier")
    states: list[State] = ["rejected", "pending", "by rule"]
    for state in states:
        gone = {LIKE.digest: entry_of(signed, _EARLIER, state)}

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
