"""Every other release of a run has its status, and none stands twice."""

from typing import Any

import pytest

from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import (
    ClientPrivacy,
    Federation,
    Model,
    Personal,
    Privacy,
    Training,
    Uplink,
)
from anabranch.server.statement.disclosures import Disclosure, disclosures
from anabranch.server.statement.guarantees import state
from anabranch.server.statement.text import (
    DISCLOSURE_HEAD,
    disclosure_rows,
    limits,
)
from tests.privacy_cases import (
    client_config,
    client_plan,
    facts_of,
    private_config,
)


def status(config: RunConfig, what: str, **more: Any) -> Disclosure:
    (row,) = [row for row in disclosures(config, **more) if what in row.what]
    return row


COUNTS = "number of training"
METRICS = "metrics on a site's held-out records"
WEIGHTS = "class weights"
HELD = Training(local_steps=5, holdout=0.2)
CAPPED = {
    "client_privacy": ClientPrivacy(epsilon=3.0, population=1000, max_examples=50),
    "federation": Federation(rounds=100, cohort=100),
}
ADAPTIVE = {"client_privacy": ClientPrivacy(epsilon=3.0, population=1000, clipping="adaptive")}
TOLD = Federation(rounds=100, cohort=100, weighting="uniform", client_evaluation=False)


@pytest.mark.parametrize(
    ("config", "what", "expected", "why"),
    [
        (private_config(), COUNTS, "not covered", "deltas are weighted by it"),
        (
            private_config(federation=Federation(rounds=6, weighting="uniform")),
            COUNTS,
            "not covered",
            "all deltas weigh the same",
        ),
        (client_config(), COUNTS, "not covered", "the mean does not use it"),
        (client_config(**CAPPED), COUNTS, "not covered", "min(n / 50, 1), which the noise pays"),
        (private_config(), "takes part", "not covered", "network"),
        (private_config(), "refuses", "not covered", "never a cell's content"),
        (private_config(), "ε, δ, σ, q", "not covered", "number of records"),
        (private_config(), "engine", "fixed in advance", "run.toml"),
        (private_config(), "head of the site's ledger", "not covered", "hash"),
        (private_config(), "training loss", "not sent", "[privacy]"),
        (client_config(), "training loss", "not covered", "every delta"),
        (private_config(), METRICS, "not sent", "refuses"),
        (private_config(training=HELD), METRICS, "not sent", "refuses"),
        (client_config(training=HELD, federation=TOLD), METRICS, "not sent", "not ask"),
        (private_config(), "normalisation (mean, std) of age", "fixed in advance", "run.toml"),
        (private_config(), "vocabulary", "fixed in advance", "run.toml"),
        (private_config(), "LoRA rank", "fixed in advance", "site.toml"),
        (private_config(), WEIGHTS, "fixed in advance", "all 1"),
        (
            private_config(training=Training(local_steps=5, class_weights=(1.0, 2.0))),
            WEIGHTS,
            "fixed in advance",
            "one number per label",
        ),
        (
            client_config(training=Training(class_weights="balanced")),
            WEIGHTS,
            "charged",
            "clipped and noised",
        ),
        (private_config(), "models of every round", "charged", "int8 uses no records"),
        (client_config(), "models of every round", "charged", "noised models"),
        (private_config(), "coordinator's own records", "not covered", "cost nothing more"),
        (private_config(), "best round", "not covered", "last round"),
        (
            private_config(federation=Federation(rounds=6, early_stopping=2)),
            "number of rounds",
            "not covered",
            "stops early",
        ),
        (private_config(), "norms of deltas", "charged", "noised deltas"),
        (private_config(), "bytes sent", "fixed in advance", "codec"),
        (
            private_config(privacy=Privacy(epsilon=3, clipping="adaptive")),
            "clipping norm",
            "charged",
            "σ",
        ),
        (private_config(training=HELD), "are held out", "not covered", "move others"),
        (client_config(), "clipping norm", "fixed in advance", "run.toml"),
        (client_config(federation=TOLD, **ADAPTIVE), "clipping norm", "charged", "z states"),
        (client_config(), "who is drawn", "not covered", "secret"),
        (client_config(), "may be drawn", "fixed in advance", "run.toml"),
        (client_config(), "events.jsonl", "not covered", "not for publication"),
        (
            private_config(uplink=Uplink(codec="int8", error_feedback=True)),
            "compression",
            "charged",
            "noised already",
        ),
        (client_config(uplink=Uplink(codec="int8")), "compression", "charged", "before updates"),
        (
            private_config(personal=Personal(head="local"), model=Model(base="mlp")),
            "what a site keeps",
            "not sent",
            "without noise",
        ),
    ],
)
def test_every_other_release_has_its_status(
    config: RunConfig, what: str, expected: str, why: str
) -> None:
    row = status(config, what)
    assert (row.status, why in row.why) == (expected, True), row


def test_what_only_a_simulation_shows_is_marked() -> None:
    row = status(private_config(), "simulation", simulated=True)
    assert row.status == "not covered"
    assert not [row for row in disclosures(private_config()) if "simulation" in row.what]


@pytest.mark.parametrize("config", [private_config(), client_config()])
def test_what_is_not_covered_comes_first_and_nothing_stands_twice(config: RunConfig) -> None:
    rows = disclosure_rows(state(config, facts_of("north", client=client_plan())))
    order = ["not covered", "charged", "fixed in advance", "not sent"]

    assert len(DISCLOSURE_HEAD) == 3
    assert [order.index(row[1]) for row in rows] == sorted(order.index(row[1]) for row in rows)
    assert len({row[0] for row in rows}) == len(rows)
    assert all(cell for row in rows for cell in row)


def test_the_limits_of_every_guarantee_are_named() -> None:
    text = " ".join(limits(state(private_config(), facts_of("north"))))
    for thing in ("floating-point", "base model", "configuration", "site's folder", "audit.json"):
        assert thing in text
