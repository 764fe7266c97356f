"""Attack: a rule of an owner's policy lets in a run that shows more than the one it is like.

An author could take an approved run, and let its sums be opened by fewer, have its noise made by
others or by nobody, or its updates be of fewer records; or run it again with other members, so
that the difference of two sums is what one site learned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from anabranch.client.models import Models
from anabranch.client.policy.by_rule import LIMITED, TRAINED, TUNED
from anabranch.client.policy.review import entry_text
from anabranch.client.policy.rules import decide
from anabranch.client.site import Site
from anabranch.client.sums.terms import vector_of
from anabranch.protocols import wire
from anabranch.protocols.adapter import Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.messages import Assignment
from anabranch.protocols.tables import Server
from anabranch.server.evaluation import initial_adapter
from tests import noise_cases
from tests.client.policy.policies import asked_of, entry_of, policy_of, private_config, signed_of
from tests.runs import write_site
from tests.simulations.rig import SPEC

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
CLIENTS: dict[str, Any] = {
    "privacy": None,
    "client_privacy": {"epsilon": 2.0, "delta": 1e-6, "population": 1000},
    "federation": {
        "quorum": 1,
        "cohort": 100,
        "weighting": "uniform",
        "client_evaluation": False,
    },
}
SUMMED: dict[str, Any] = {"secure_aggregation": SUMS}
WITHOUT: dict[str, Any] = {**SUMMED, "privacy": None}
PLAIN: dict[str, Any] = {"privacy": None, "training": {"holdout": 0.2}}


def waits(before: RunConfig, now: RunConfig, **about: Any) -> str | None:
    """Return why a run waits for a person that is like an approved one; None: a rule lets it in."""
    like = signed_of(before, run="earlier", roster=ROSTER if before.secure_aggregation else None)
    rule = {"name": "study", "like": like.proposal.digest, **about.pop("rule", {})}
    approval = {"mode": "by rule", "rules": [rule]}
    wanted = {"required": False} | about.pop("privacy", {})
    policy = policy_of(approval=approval, privacy=wanted, cohort={"minimum": 1})
    known = {like.proposal.digest: entry_of(like, before)}
    signed = signed_of(now, roster=ROSTER if now.secure_aggregation else None)
    refused = decide(policy, asked_of(now, signed, entries=known))
    if refused is None:
        return None
    assert refused.code == "pending"
    first = f"waiting for the owner: `anabranch site policy approve {signed.proposal.digest[:12]}`"
    text = str(refused).removeprefix(first + " (rule study does not approve it: ")
    assert text != str(refused)
    return text.removesuffix(")")


def test_a_run_with_the_same_sums_is_let_in() -> None:
    before, now = (private_config(seed=seed, secure_aggregation=SUMS) for seed in (1, 2))

    assert waits(before, now) is None


@pytest.mark.parametrize(
    "weaker",
    [{"minimum": 3}, {"threshold": 0.7}, {"colluding": 0.0}],
    ids=lambda one: next(iter(one)),
)
def test_a_person_decides_on_sums_of_fewer(weaker: dict[str, Any]) -> None:
    before = private_config(secure_aggregation=SUMS)
    now = private_config(secure_aggregation=SUMS | weaker)
    (name,) = weaker

    assert waits(before, now) == (
        f"secure_aggregation.{name} is not as in the run that it has to be like"
    )


def test_a_person_decides_on_who_makes_the_noise() -> None:
    alone = {name: table for name, table in TOGETHER.items() if name != "privacy"}
    before = private_config(secure_aggregation=SUMS, **alone)
    now = private_config(secure_aggregation=SUMS, **TOGETHER)

    why = "privacy.noise is not as in the run that it has to be like"
    assert waits(before, now) == waits(now, before) == why


def test_the_owner_is_told_who_makes_the_noise() -> None:
    now = private_config(secure_aggregation=SUMS, **TOGETHER)
    said = entry_text(entry_of(signed_of(now, roster=ROSTER), now, "pending"))

    assert "the members of a sum make the noise together" in said
    assert "together" not in entry_text(entry_of(signed_of(private_config()), private_config()))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_person_decides_on_every_sum_without_noise(seed: int) -> None:
    """The same run under another name, without one member: two sums differ by her update."""
    assert waits(private_config(**WITHOUT), private_config(**WITHOUT, seed=seed)) == (
        "its sums have no noise of epsilon 8 and delta 1e-05 or less, so two of them from one "
        "model can show what a single site learned. A person has to approve each such run"
    )


def test_no_rule_is_loose_enough_for_a_sum_without_noise() -> None:
    before, now = private_config(**WITHOUT), private_config(**WITHOUT, seed=1)

    for same in ([], ["base"], ["config"]):
        rule = {"same": ["author", "contract", *same], "max_runs": 100, "max_rounds": 100}
        assert waits(before, before, rule=rule) is not None
        assert waits(before, now, rule=rule) is not None


@pytest.mark.parametrize(
    ("kind", "weak"),
    [
        (SUMMED, {"epsilon": 9.0}),
        (SUMMED, {"delta": 1e-3}),
        (SUMMED, {"delta": None}),
        (SUMMED | TOGETHER, {"epsilon": 9.0}),
        (SUMMED | TOGETHER, {"delta": 1e-3}),
    ],
    ids=["local-epsilon", "local-delta", "local-unstated", "together-epsilon", "together-delta"],
)
def test_noise_too_weak_for_the_owner_counts_as_none(
    kind: dict[str, Any], weak: dict[str, Any]
) -> None:
    """Also where [privacy] is not required: these values say what the owner takes for noise."""
    run = private_config(**kind | {"privacy": kind.get("privacy", {}) | weak})

    assert (waits(run, run) or "").startswith("its sums have no noise")


@pytest.mark.parametrize(
    "kind",
    [SUMMED, SUMMED | TOGETHER, SUMMED | CLIENTS],
    ids=["local", "distributed", "clients"],
)
def test_a_rule_lets_in_sums_with_noise(kind: dict[str, Any]) -> None:
    assert waits(private_config(**kind), private_config(**kind, seed=1)) is None


def test_a_person_decides_on_a_run_without_the_noise_that_members_made() -> None:
    before = private_config(**SUMMED, **CLIENTS)
    now = private_config(**SUMMED, **(CLIENTS | {"client_privacy": None}))

    assert (waits(before, now) or "").startswith("its sums have no noise")
    bare = {name: CLIENTS[name] for name in ("privacy", "federation")}
    alone = private_config(**(CLIENTS | {"client_privacy": None}))
    assert waits(private_config(**CLIENTS), alone) == (
        "client_privacy is not as in the run that it has to be like"
    )
    with_records = private_config(**SUMMED, **(CLIENTS | {"privacy": {}}))
    assert waits(with_records, private_config(**SUMMED, **(bare | {"privacy": {}}))) == (
        "client_privacy is not as in the run that it has to be like"
    )


@pytest.mark.parametrize(
    ("weaker", "why"),
    [
        ({"client_privacy": {"population": 10_000}}, "client_privacy.population is not"),
        ({"client_privacy": {"clipping_norm": 9.0}}, "client_privacy.clipping_norm is not"),
        ({"client_privacy": {"epsilon": 2.5}}, "client_privacy.epsilon is 2.5, and it allows 2"),
        ({"client_privacy": {"delta": 1e-5}}, "client_privacy.delta is larger"),
        ({"federation": {"cohort": 50}}, "federation.cohort is not"),
        ({"federation": {"rounds": 3}}, "federation.rounds is 3, and it allows 2"),
        ({"federation": {"client_evaluation": True}, "training": {"holdout": 0.0}}, "federation.c"),
        ({"personal": {"rank": 2}}, "personal.rank is not"),
        ({"secure_aggregation": {"minimum": 8}}, "secure_aggregation.minimum is not"),
    ],
    ids=lambda one: "" if isinstance(one, dict) else one.split()[0],
)
def test_a_person_decides_on_weaker_noise_of_clients(weaker: dict[str, Any], why: str) -> None:
    run = SUMMED | CLIENTS

    assert (waits(private_config(**run), changed(run, weaker)) or "").startswith(why)


def changed(run: dict[str, Any], tables: dict[str, Any]) -> RunConfig:
    return private_config(**run | {name: run.get(name, {}) | tables[name] for name in tables})


@pytest.mark.parametrize(
    ("weaker", "why"),
    [
        ({"training": {"holdout": 0.9}}, "training.holdout is not"),
        ({"training": {"holdout": 0.2, "batch_size": 1}}, "training.batch_size is not"),
        ({"training": {"holdout": 0.2, "local_steps": 1}}, "training.local_steps is not"),
        ({"training": {"holdout": 0.2, "class_weights": (1.0, 1e-6)}}, "training.class_weights is"),
        ({"lora": {"modules_to_save": ["embed*"]}}, "lora.modules_to_save is not"),
        ({"federation": {"client_evaluation": False}}, "federation.client_evaluation is not"),
        ({"federation": {"quorum": 2}}, "federation.quorum is not"),
        ({"federation": {"weighting": "uniform"}}, "federation.weighting is not"),
        ({"federation": {"rounds": 3}}, "federation.rounds is 3, and it allows 2"),
        ({"uplink": {"codec": "int8"}}, "uplink.codec is not"),
        ({"robust": {"rule": "median"}}, "robust is not"),
        ({"personal": {"head": "local"}}, "personal.head is not"),
        ({"model": {"revision": "a" * 40}}, "model.revision is not"),
        ({"lora": {"rank": 4}}, "lora.rank is not"),
    ],
    ids=lambda one: "" if isinstance(one, dict) else one.split()[0],
)
def test_without_noise_a_rule_lets_nothing_be_of_fewer_records(
    weaker: dict[str, Any], why: str
) -> None:
    plain = PLAIN | {"federation": {"method": "ffa"}}

    assert (waits(private_config(**plain), changed(plain, weaker)) or "").startswith(why)


def test_another_default_method_is_another_method() -> None:
    """Without federation.method other tables choose it: one factor is sent, or both."""
    run = private_config(**PLAIN, federation={"method": None}, model={"base": "mlp"})
    moments = msgspec.structs.replace(run, server=Server(learning_rate=1.0))

    assert (run.method, moments.method) == ("altqr", "fedavg")
    assert (waits(run, moments) or "").startswith("federation.method is not as in")


def test_what_only_tunes_a_run_is_free() -> None:
    tuned = {"learning_rate": 0.1, "schedule": "cosine", "warmup": 0.1}
    before = private_config(**PLAIN, federation={"method": "ffa"})
    now = private_config(
        **PLAIN | {"training": PLAIN["training"] | tuned},
        federation={"method": "ffa", "rounds": 1, "proximal_mu": 0.1},
        name="another",
        seed=7,
    )

    assert waits(before, now) is None


def test_where_noise_bounds_it_training_is_free_and_less_may_be_spent() -> None:
    now = private_config(
        training={"batch_size": 4, "local_steps": 1},
        lora={"rank": 4},
        privacy={"epsilon": 1.0, "delta": 1e-7},
    )

    assert waits(private_config(), now) is None


@pytest.mark.parametrize(
    ("weaker", "why"),
    [
        ({"epsilon": 2.5}, "privacy.epsilon is 2.5, and it allows 2"),
        ({"delta": 2e-6}, "privacy.delta is larger"),
        ({"clipping": "adaptive"}, "privacy.clipping is not"),
        ({"engine": "opacus"}, "privacy.engine is not"),
    ],
    ids=lambda one: "" if isinstance(one, dict) else one.split()[0],
)
def test_a_person_decides_on_weaker_noise_of_records(weaker: dict[str, Any], why: str) -> None:
    assert (waits(private_config(), private_config(privacy=weaker)) or "").startswith(why)


def test_an_owner_may_say_how_much_more_is_like_it() -> None:
    more = private_config(privacy={"epsilon": 3.0}, federation={"rounds": 5})

    assert waits(private_config(), more, rule={"epsilon_max": 3.0, "max_rounds": 5}) is None
    assert waits(private_config(), more, rule={"epsilon_max": 2.9, "max_rounds": 5}) == (
        "privacy.epsilon is 3, and it allows 2.9"
    )
    assert waits(private_config(**PLAIN), private_config(**PLAIN), rule={"epsilon_max": 9.0}) == (
        "it has no privacy table, so it spends any epsilon"
    )


def test_what_is_free_is_named_as_in_a_run() -> None:
    """A name that is misspelt, or of a field that is gone, would free nothing or the wrong one."""
    for path in TUNED | TRAINED | LIMITED:
        table, _, field = path.partition(".")
        kind = {one.name: one.type for one in msgspec.structs.fields(RunConfig)}[table]
        if field:
            structs = [one for one in getattr(kind, "__args__", (kind,)) if one is not type(None)]
            assert any(field in one.__struct_fields__ for one in structs), path


# Two runs that a rule lets in have noise of their own


def test_a_site_draws_noise_anew_for_each_run_and_pays_for_both(tmp_path: Path) -> None:
    run = noise_cases.config(
        noise_cases.RECORD, privacy__noise="local", federation__rounds=1, secure_aggregation=None
    )
    rows = "".join(f"{i / 300:.4f},{('no', 'yes')[i % 2]}\n" for i in range(300))
    (tmp_path / "records.csv").write_text(f"x,y\n{rows}")
    site = Site(write_site(tmp_path / "north", "north", tmp_path / "records.csv"), Models())
    start = initial_adapter(run)
    deltas = []
    for name in ("heart-1", "heart-2"):
        _, frame = site.train(Assignment(run=name, round=1, config=run), start)
        deltas.append(wire.decode_delta(frame, start.spec).arrays)

    assert all(not np.array_equal(deltas[0][name], deltas[1][name]) for name in deltas[0])
    assert len(site.ledger.history()) == 2


@pytest.mark.parametrize("base", [noise_cases.RECORD, noise_cases.CLIENT], ids=["record", "client"])
def test_members_draw_their_noise_anew_for_each_run(base: dict[str, Any]) -> None:
    run = noise_cases.config(base)
    arrays = {name: np.zeros(shape, np.float32) for name, shape in SPEC.tensors}
    delta = Delta(SPEC, arrays, 300, steps=1)
    one, two = (
        vector_of(
            delta,
            Assignment(run=name, round=1, config=run),
            msgspec.structs.replace(noise_cases.terms(run), run=name),
            advertised=5,
        )
        for name in ("heart-1", "heart-2")
    )

    assert not np.array_equal(one, two)
