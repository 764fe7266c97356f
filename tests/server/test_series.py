"""What the report and the summary say of rounds."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from anabranch.protocols.config import RunConfig
from anabranch.protocols.messages import Evaluated
from anabranch.protocols.tables import Federation, Personal, Robust, Server, Uplink
from anabranch.server.result import Result, RoundReport
from anabranch.server.series import (
    aggregation_of,
    error_curves,
    metric_curves,
    site_accuracy,
    site_bars,
)
from tests.simulations.rig import adapter, config


def evaluated(site: str, **metrics: float) -> Evaluated:
    return Evaluated(site=site, num_examples=4, metrics=metrics)


def report(number: int, *sites: Evaluated, error: float | None = None) -> RoundReport:
    return RoundReport(
        round=number,
        asked=(),
        trained={},
        failed={},
        method="altqr",
        update_norm=1.0,
        aggregation_error=error,
        delta_norms={},
        ages={},
        evaluated={one.site: one for one in sites},
        client={},
        coordinator={"accuracy": number / 10},
        bytes_up=0,
        bytes_down=0,
        seconds=0.0,
    )


def result(history: Sequence[RoundReport]) -> Result:
    return Result(
        adapter=adapter(),
        best_adapter=adapter(),
        best_round=1,
        history=tuple(history),
        sites={},
        bytes_up=0,
        bytes_down=0,
        seconds=0.0,
    )


SHARED = result([report(1, evaluated("a", accuracy=0.5)), report(2, evaluated("a", accuracy=0.6))])
BOTH = result(
    [
        report(
            1,
            evaluated("b", accuracy=0.7, personal_accuracy=0.8),
            evaluated("a", accuracy=0.5),
        ),
        report(2),  # nobody evaluated
    ]
)


def test_the_last_evaluation_counts_per_site_shared_and_personal() -> None:
    assert site_accuracy(SHARED) == {"shared": {"a": 0.6}}
    assert site_accuracy(BOTH) == {"shared": {"a": 0.5, "b": 0.7}, "personal": {"b": 0.8}}
    assert site_accuracy(result([report(1)])) == {}


def test_bars_have_the_runs_name_or_shared_and_personal() -> None:
    assert site_bars({"federated": SHARED}) == {"federated": {"a": 0.6}}
    assert set(site_bars({"federated": BOTH})) == {"shared", "personal"}
    assert set(site_bars({"private": BOTH, "federated": SHARED})) == {
        "private, shared",
        "private, personal",
        "federated",
    }


def test_errors_that_nobody_knows_are_left_out() -> None:
    history = [report(1, error=0.25), report(2), report(3, error=0.5)]

    assert error_curves({"federated": history, "other": [report(1)]}) == {
        "federated": {1: 0.25, 3: 0.5}
    }
    assert metric_curves({"federated": history}, "accuracy") == {
        "federated": {1: 0.1, 2: 0.2, 3: 0.3}
    }


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        ({}, "method", "fedavg"),
        ({}, "merged", "every round's cohort"),
        (
            {"federation": Federation(rounds=1, method="fedavg", buffer=3)},
            "merged",
            "as soon as 3 deltas are there",
        ),
        ({}, "weights", "by examples"),
        (
            {"federation": Federation(rounds=1, method="fedavg", weighting="uniform")},
            "weights",
            "equal",
        ),
        ({"federation": Federation(rounds=1, method="hetlora")}, "weights", "by norm"),
        ({"server": Server(learning_rate=0.1, optimizer="yogi")}, "server optimiser", "yogi"),
        ({}, "codec", "fp32"),
        (
            {"uplink": Uplink(codec="top-k", keep=0.25, error_feedback=True)},
            "codec",
            "top-k, 0.25 of the values, error feedback",
        ),
        ({}, "kept at the sites", "nothing"),
        ({"personal": Personal(head="local")}, "kept at the sites", "the head"),
        ({"personal": Personal(rank=2)}, "kept at the sites", "a private adapter of rank 2"),
    ],
)
def test_what_decided_the_aggregation_is_told(
    change: dict[str, msgspec.Struct], name: str, value: str
) -> None:
    run: RunConfig = msgspec.structs.replace(config(), **change)

    assert aggregation_of(run)[name] == value


def test_a_robust_rule_weighs_every_site_alike() -> None:
    federation = Federation(rounds=1, method="ffa")
    run = msgspec.structs.replace(config(), federation=federation, robust=Robust(rule="median"))

    told = aggregation_of(run)

    assert (told["robust rule"], told["weights"]) == ("median", "equal")
