from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import ConfigError, PrivacyError, RunError
from anabranch.protocols.messages import Assignment, Evaluated
from anabranch.server.aggregation.rule import Merged, Rule
from anabranch.server.result import mean_metrics
from tests.simulations.federation import NAMES, POLL_S, Federation, arrays_of, value
from tests.simulations.rig import (
    NEVER,
    SPEC,
    ToySite,
    adapter,
    config,
)

# Laws


@settings(max_examples=15)
@given(
    order=st.permutations(NAMES),
    node_ids=st.lists(st.integers(2, 2**62), min_size=4, max_size=4, unique=True),
    delays=st.lists(st.floats(0, 50), min_size=4, max_size=4),
)
def test_the_adapter_depends_on_names_only_not_on_node_ids_order_or_speed(
    order: list[str], node_ids: list[int], delays: list[float]
) -> None:
    run = config(cohort=3)
    expected = Federation(run=run).run()

    got = Federation(
        run=run, order=order, node_ids=node_ids, delays=dict(zip(order, delays, strict=True))
    ).run()

    assert arrays_of(got) == arrays_of(expected)
    assert [r.asked for r in got.history] == [r.asked for r in expected.history]


@settings(max_examples=15)
@given(silent=st.sets(st.sampled_from(NAMES)), quorum=st.integers(1, 4))
def test_a_round_counts_exactly_when_its_quorum_is_reached(silent: set[str], quorum: int) -> None:
    federation = Federation(
        run=config(rounds=1, quorum=quorum), delays=dict.fromkeys(silent, NEVER)
    )
    if 4 - len(silent) < quorum:
        with pytest.raises(RunError, match=f"{quorum} are needed"):
            federation.run()
    else:
        (report,) = federation.run().history
        assert set(report.failed) == silent
    assert federation.time.now <= POLL_S + 60.0


def test_another_seed_gives_another_cohort_and_another_adapter() -> None:
    a = Federation(run=config(cohort=2, rounds=6, seed=1)).run()
    b = Federation(run=config(cohort=2, rounds=6, seed=2)).run()

    assert all(len(report.asked) == 2 for report in a.history)
    assert len({report.asked for report in a.history}) > 1
    assert [r.asked for r in a.history] != [r.asked for r in b.history]
    assert arrays_of(a) != arrays_of(b)


# Examples


def test_two_sites_are_averaged_by_their_examples() -> None:
    sites = [ToySite("a", 30, step=1.0), ToySite("b", 10, step=5.0)]

    assert value(Federation(sites, run=config(rounds=3)).run()) == 6.0


def test_uniform_weighting_counts_every_site_once() -> None:
    sites = [ToySite("a", 30, step=1.0), ToySite("b", 10, step=5.0)]

    assert value(Federation(sites, run=config(rounds=1, weighting="uniform")).run()) == 3.0


def test_the_events_of_a_round_tell_its_story() -> None:
    federation = Federation([ToySite("a", 30, step=1.0), ToySite("b", 10, step=5.0)])
    federation.run()

    kinds = [event["kind"] for event in federation.events.all]
    assert kinds[:7] == [
        "site_joined",
        "site_joined",
        "round_started",
        "site_trained",
        "site_trained",
        "round_aggregated",
        "site_evaluated",
    ]
    assert kinds[-1] == "run_finished"
    aggregated = federation.events.of("round_aggregated")[0]
    assert aggregated["sites"] == ["a", "b"]
    assert aggregated["num_examples"] == 40
    assert aggregated["update_norm"] == pytest.approx(2.0 * np.sqrt(SPEC.num_values))
    trained = federation.events.of("site_trained")[0]
    assert trained["norm"] == pytest.approx(np.sqrt(SPEC.num_values))
    assert (trained["site"], trained["num_examples"], trained["loss"]) == ("a", 30, 0.25)


def test_a_checkpoint_is_kept_before_the_round_is_announced() -> None:
    seen: list[tuple[int, int]] = []
    federation = Federation()

    def checkpoint(number: int, adapter: Adapter) -> None:
        seen.append((number, len(federation.events.of("round_aggregated"))))

    federation.engine._checkpoint = checkpoint
    federation.run()

    assert seen == [(1, 0), (2, 1)]


def test_bytes_up_and_down_are_those_of_frames_and_messages() -> None:
    result = Federation(run=config(rounds=1, client_evaluation=False)).run()

    frame = len(wire.encode(adapter()))
    assert 4 * frame < result.bytes_down < 4 * (frame + 2000)
    assert 4 * frame < result.bytes_up < 4 * (frame + 500)
    assert result.bytes_up == sum(row.bytes_up for row in result.sites.values())
    assert result.bytes_up == result.history[0].bytes_up
    assert result.sites["cork"].rounds == 1
    assert result.sites["cork"].seconds == 0.5


def test_metrics_of_sites_are_weighted_by_their_records() -> None:
    metrics = [
        Evaluated(site="a", num_examples=30, metrics={"accuracy": 1.0, "auroc": 0.5}),
        Evaluated(site="b", num_examples=10, metrics={"accuracy": 0.0}),
    ]

    assert mean_metrics(metrics) == {"accuracy": 0.75, "auroc": 0.5}


def test_deltas_are_let_go_once_they_are_summed() -> None:
    alive: list[int] = []

    def merge(state: None, sent: Adapter, deltas: Iterable[Delta]) -> tuple[None, Merged]:
        seen: list[weakref.ref[Delta]] = []
        last = None
        for delta in deltas:
            seen.append(weakref.ref(delta))
            last = delta
            del delta
            gc.collect()
            alive.append(sum(ref() is not None for ref in seen))
        assert last is not None
        return state, Merged(adapter=sent.plus(last), num_examples=4, clients=4)

    Federation(
        run=config(rounds=1),
        delays={name: float(i) for i, name in enumerate(NAMES)},
        rule=Rule(name="last", init=lambda adapter: (None, adapter), merge=merge),
    ).run()

    assert len(alive) == 4
    assert max(alive) <= 2


# Evaluation, the best adapter, early stopping


def scores(*values: float) -> Callable[[Adapter], dict[str, float]]:
    left = list(values)
    return lambda adapter: {"accuracy": left.pop(0)}


def test_the_best_adapter_is_the_one_the_coordinator_measured_best() -> None:
    sites = [ToySite("a", step=1.0)]
    result = Federation(sites, run=config(rounds=4), evaluate=scores(0.5, 0.9, 0.9, 0.1)).run()

    assert result.best_round == 2
    assert float(result.best_adapter.arrays["head.weight"][0, 0]) == 2.0
    assert value(result) == 4.0
    assert [r.coordinator["accuracy"] for r in result.history] == [0.5, 0.9, 0.9, 0.1]


def test_without_a_coordinator_metric_the_clients_accuracy_decides() -> None:
    near = ToySite("a", step=0.9 * ToySite("a")._target())
    result = Federation([near], run=config(rounds=5)).run()

    assert result.best_round == 1
    assert result.history[0].client["accuracy"] > result.history[4].client["accuracy"]


def test_without_any_metric_the_last_adapter_is_the_best() -> None:
    result = Federation(run=config(holdout=0.0)).run()

    assert result.best_round == 2
    assert result.best_adapter is result.adapter
    assert result.history[0].client == {}


def test_a_run_stops_early_when_nothing_gets_better() -> None:
    federation = Federation(
        run=config(rounds=9, early_stopping=2), evaluate=scores(0.5, 0.6, 0.6, 0.5, 0.9)
    )
    result = federation.run()

    assert len(result.history) == 4
    assert result.best_round == 2
    assert federation.events.of("stopped_early") == [
        {"kind": "stopped_early", "round": 4, "best_round": 2}
    ]


def test_evaluations_are_made_every_so_many_rounds_and_in_the_last() -> None:
    federation = Federation(run=config(rounds=5, evaluate_every=2), evaluate=scores(0.5, 0.9, 0.7))
    result = federation.run()

    assert [dict(r.coordinator) != {} for r in result.history] == [False, True, False, True, True]
    assert [bool(r.evaluated) for r in result.history] == [False, True, False, True, True]
    assert result.best_round == 4


def test_early_stopping_without_an_evaluation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"early_stopping compares evaluations.*holdout above 0"):
        Federation(run=config(holdout=0.0, early_stopping=1))


def test_a_site_without_held_out_records_is_not_asked_to_evaluate() -> None:
    result = Federation([ToySite("a"), ToySite("b", held_out=0)], run=config(rounds=1)).run()

    assert set(result.history[0].evaluated) == {"a"}


def test_a_site_that_refuses_to_evaluate_does_not_end_the_run() -> None:
    class Shy(ToySite):
        def evaluate(self, assignment: Assignment, adapter: Adapter) -> Evaluated:
            raise PrivacyError("metrics stay here")

    federation = Federation([ToySite("a"), Shy("b")], run=config(rounds=1))
    result = federation.run()

    assert set(result.history[0].evaluated) == {"a"}
    (failed,) = federation.events.of("site_failed")
    assert (failed["asked"], failed["reason"], failed["message"]) == (
        "evaluate",
        "privacy",
        "metrics stay here",
    )


def test_a_site_that_is_silent_in_evaluation_costs_one_deadline() -> None:
    federation = Federation(run=config(rounds=1), delays={"cork": NEVER}, slow="evaluate")
    result = federation.run()

    assert set(result.history[0].evaluated) == set(NAMES) - {"cork"}
    assert federation.time.now == POLL_S + 60.0  # one look to meet the sites, one deadline


def test_metrics_that_are_not_numbers_do_not_leave_the_site() -> None:
    class Broken(ToySite):
        def evaluate(self, assignment: Assignment, adapter: Adapter) -> Evaluated:
            return Evaluated(site=self.name, num_examples=4, metrics={"accuracy": float("nan")})

    federation = Federation([ToySite("a"), Broken("b")], run=config(rounds=1))

    assert set(federation.run().history[0].evaluated) == {"a"}
    (failed,) = federation.events.of("site_failed")
    assert (failed["site"], failed["reason"]) == ("b", "internal")
    assert failed["message"] == "ValueError in evaluation: see the site's log"


def test_metrics_with_a_weight_that_the_site_did_not_describe_are_rejected() -> None:
    class Broken(ToySite):
        def evaluate(self, assignment: Assignment, adapter: Adapter) -> Evaluated:
            return Evaluated(site=self.name, num_examples=99, metrics={"accuracy": 1.0})

    federation = Federation([ToySite("a"), Broken("b")], run=config(rounds=1))
    federation.run()

    (failed,) = federation.events.of("site_failed")
    assert (
        "expected 1 to 4, the held-out records that the site described, got 99"
        in (failed["message"])
    )
