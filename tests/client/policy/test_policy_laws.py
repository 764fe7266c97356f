"""A stricter policy never says yes to more, whatever is asked."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.client.policy.approvals import State
from anabranch.client.policy.policy_file import Policy
from anabranch.client.policy.rules import Asked, decide
from anabranch.client.policy.usage import Usage, Used
from tests.client.policy.policies import (
    ANNA,
    AUTHORITY,
    EARLIER,
    EVE,
    LIKE,
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
    ("cohort", "threshold"): [0.5, 0.6, 0.9],
    ("cohort", "colluding"): [0.0, 0.1, 0.3],
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


_RULE = policy_of(
    approval={"mode": "by rule", "rules": [{"name": "study", "like": LIKE.digest}]}
).approval.rules[0]


@st.composite
def messages(draw: st.DrawFn) -> Asked:
    """Return a message that the loosest policy mostly allows."""

    def one_of(usual: Any, *other: Any) -> Any:
        return draw(st.sampled_from([usual, usual, *other]))

    private = {"epsilon": one_of(2.0, 0.5, 50.0), "delta": one_of(1e-6, None)}
    secure = {"minimum": one_of(3, 2, 5), "threshold": one_of(2 / 3, 0.55)}
    config = private_config(
        privacy=one_of(private, None),
        federation={"quorum": one_of(3, 1, 5)},
        secure_aggregation=one_of(None, secure),
    )
    author, key = one_of(("anna", ANNA), ("eve", EVE), ("anna", EVE))
    roster = one_of("5" * 64, None) if config.secure_aggregation else None
    signed = signed_of(config, key, author=author, roster=roster)
    entries = {LIKE.digest: entry_of(signed_of(EARLIER, run="earlier"), EARLIER)}
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
