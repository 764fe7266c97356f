"""Rounds that are summed securely: who is in the mean, and what is said of them."""

from __future__ import annotations

import pytest

from anabranch.client.flower import TYPES, client_app
from anabranch.protocols.errors import RunError
from anabranch.server.progress import Progress
from tests.secure_cases import MANY, furthest, plain_of, secured, step_of, toys
from tests.simulations.federation import Federation
from tests.simulations.rig import NEVER, SIZES, app_of, config

STAGES = ("advertise", "share", "mask", "agree", "reveal")


# Laws


@pytest.mark.parametrize("count", range(3, 9))
def test_the_secure_mean_is_the_plain_mean_within_a_step_of_the_grid(count: int) -> None:
    sizes = dict(list(MANY.items())[:count])
    run = secured(config(rounds=1))

    got = Federation(toys(sizes), run=run).run()

    expected = plain_of(toys(sizes), run)
    weights = [float(size) for size in sizes.values()]
    off = furthest(got.adapter, expected.adapter)
    assert 0 < off <= step_of(run, count, weights)
    assert set(got.history[0].trained) == set(sizes)
    assert got.history[0].aggregation_error is None
    assert got.history[0].delta_norms == {}


@pytest.mark.parametrize("stage", STAGES)
def test_who_is_lost_at_any_stage_is_left_out_or_recovered(stage: str) -> None:
    federation = Federation(
        toys(MANY),
        run=secured(config(rounds=1, client_evaluation=False), minimum=5),
        delays={"site-2": NEVER, "site-6": NEVER},
        slow=f"query.{stage}",
    )

    result = federation.run()

    masked = stage in ("agree", "reveal")  # its update was there before it was lost
    left = [name for name in MANY if masked or name not in ("site-2", "site-6")]
    (report,) = result.history
    assert list(report.trained) == left
    assert set(report.failed) == (set() if masked else {"site-2", "site-6"})
    plain = plain_of(toys({name: MANY[name] for name in left}), config(rounds=1))
    assert furthest(result.adapter, plain.adapter) < 1e-4
    lost = federation.events.of("secure_dropout")
    assert [(one["site"], one["stage"], one["reason"]) for one in lost] == [
        ("site-2", stage, "deadline"),
        ("site-6", stage, "deadline"),
    ]
    assert result.sites["site-2"].failures == 1
    (told,) = federation.events.of("secure_sum")
    assert (told["members"], told["survivors"]) == (sorted(MANY), sorted(left))
    assert told["dropped"] == {stage: ["site-2", "site-6"]}


@pytest.mark.parametrize("stage", STAGES)
def test_a_sum_of_too_few_is_not_opened(stage: str) -> None:
    kept: list[Progress] = []
    federation = Federation(
        toys(MANY),
        run=secured(config(rounds=1), minimum=6),
        delays=dict.fromkeys(["site-1", "site-4", "site-7"], NEVER),
        slow=f"query.{stage}",
        progress=kept.append,
    )

    with pytest.raises(RunError, match=r"not opened.*: 5 (of 8 )?members|were revealed") as error:
        federation.run()

    assert "Nothing was merged" in str(error.value)
    assert f"site-4: lost at '{stage}': deadline: no answer within 20 s" in str(error.value)
    assert federation.events.of("round_aggregated") == []
    masked = stage in STAGES[2:]
    attempts = 1 if masked else 2  # for a third one 5 are left, and 6 are needed
    assert ("in 2 attempts" in str(error.value)) is (attempts == 2)
    told = federation.events.of("secure_sum")
    assert [(one["attempt"], one["opened"]) for one in told] == [
        (number + 1, False) for number in range(attempts)
    ]
    assert [one.masked for one in kept] == ([1] if masked else [])


# What is said


def test_no_number_of_one_sites_records_is_said() -> None:
    federation = Federation(toys(SIZES), run=secured(config(rounds=2, client_evaluation=False)))

    result = federation.run()

    for event in federation.events.of("site_trained"):
        assert event.keys() & {"num_examples", "steps", "loss", "norm"} == set()
    (first, *_) = federation.events.of("round_aggregated")
    assert first["num_examples"] == sum(SIZES.values())
    assert all(row.num_examples is None for row in result.sites.values())
    assert all(row.rounds == 2 for row in result.sites.values())


def test_bytes_and_seconds_of_the_stages_are_counted() -> None:
    federation = Federation(toys(SIZES), run=secured(config(rounds=1, client_evaluation=False)))

    result = federation.run()

    (told,) = federation.events.of("secure_sum")
    assert list(told["stage_seconds"]) == list(STAGES)
    assert told["seconds"] == sum(told["stage_seconds"].values())
    assert 4 * 29 * 4 < told["bytes_up"] < result.bytes_up  # vectors, shares, signatures
    assert result.bytes_up == sum(row.bytes_up for row in result.sites.values())
    assert result.history[0].bytes_down == result.bytes_down


def test_the_desk_is_told_what_is_waited_for() -> None:
    from anabranch.server.desk import Desk, Wait

    waits: list[Wait | None] = []
    federation = Federation(
        toys(SIZES),
        run=secured(config(rounds=1)),
        delays={"cork": 5.0},
        slow="query.share",
        desk=Desk(wait=waits.append, now=lambda: 0.0),
    )
    federation.run()

    assert "sites share keys of round 1" in [one.why for one in waits if one is not None]


def test_every_stage_is_a_message_type_that_sites_serve() -> None:
    served = client_app(lambda context: toys(SIZES)[0])

    assert {"train", "evaluate", "query.describe", *(f"query.{one}" for one in STAGES)} == TYPES
    assert served is not None
    assert app_of(toys(SIZES)) is not None
