"""What a run with secure aggregation says: that sums were seen, and of whom what else was."""

from __future__ import annotations

import html
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import (
    Federation,
    Lora,
    Model,
    Robust,
    SecureAggregation,
    Training,
)
from anabranch.server.card import privacy_section
from anabranch.server.report import ReportData, render
from anabranch.server.statement.as_json import as_json
from anabranch.server.statement.disclosures import Disclosure, disclosures
from anabranch.server.statement.guarantees import PrivacyStatement, state
from anabranch.server.statement.text import (
    NO_CLIENT_LEVEL,
    NO_RECORD_LEVEL_IN_SUMS,
    NONE,
    limits,
    paragraphs,
    sums_paragraphs,
)
from tests.noise_cases import CLIENT, RECORD, config, noise
from tests.privacy_cases import (
    client_config,
    client_plan,
    facts_of,
    open_config,
    private_config,
    site,
)

SECURE = SecureAggregation()
ASSUMED = (
    "Assumed: the names and keys of the roster are those of real sites, by the word of its author: "
    "of the run, or of the coordinator itself where no run was proposed and signed. At most "
    "⌊0.1·n⌋ of a round's n members tell the coordinator all they know, and so take their own "
    "updates out of the sum. X25519, Ed25519, AES-256 or ChaCha20, and Shamir shares hold. "
)


def plain(**changes: Any) -> PrivacyStatement:
    return state(open_config(**{"secure_aggregation": SECURE} | changes), facts_of("north"))


def local() -> PrivacyStatement:
    """Return the statement of a run whose sites noise their own steps."""
    return state(private_config(secure_aggregation=SECURE), facts_of("north", "south"))


def together(base: dict[str, Any], **changes: Any) -> PrivacyStatement:
    run = config(base, **changes)
    spent = site("site-1", noise_multiplier=9.0, sample_rate=0.05, steps=10, delta=1e-5)
    return state(run, facts_of("site-1", privacy=(spent,), noise=noise(run), rounds=10))


def both() -> PrivacyStatement:
    return together(CLIENT, privacy={"epsilon": 3.0}, training={"local_steps": 25})


STATEMENTS = {
    "plain": plain,
    "local": local,
    "record": lambda: together(RECORD),
    "client": lambda: together(CLIENT),
    "both": both,
}


# Laws


@pytest.mark.parametrize("name", STATEMENTS)
def test_no_sentence_says_that_an_update_was_seen(name: str) -> None:
    statement = STATEMENTS[name]()
    said = [*paragraphs(statement), *(f"{d.what} {d.why}" for d in statement.disclosures)]
    for sentence in (*said, privacy_section(statement), json.dumps(as_json(statement))):
        for wrong in (
            "saw each",
            "sees each client's update",
            "with every delta",
            "norms of delta",
        ):
            assert wrong not in sentence
    text = "\n".join(said)
    assert "the coordinator saw sums of updates, and no update" in text
    assert "the numbers of training and held-out records, and the highest rank" in text
    assert "⌊0.1·n⌋ of a round's n members tell the coordinator all they know" in text


@given(minimum=st.integers(2, 50), threshold=st.floats(0.6, 0.95), colluding=st.floats(0, 0.2))
def test_the_numbers_of_the_table_are_those_that_are_said(
    minimum: int, threshold: float, colluding: float
) -> None:
    secure = SecureAggregation(minimum=minimum, threshold=threshold, colluding=colluding)
    statement = plain(secure_aggregation=secure)
    written = as_json(statement)["secure_aggregation"]
    assert [written[name] for name in ("minimum", "threshold", "colluding", "group")] == [
        minimum, threshold, colluding, None,
    ]  # fmt: skip
    saw, assumed = sums_paragraphs(statement)
    assert f"at least {minimum} sites, and more than {threshold:.4g} of" in saw
    assert f"⌊{colluding:.4g}·n⌋" in assumed


@pytest.mark.parametrize(
    "run",
    [
        open_config(),
        private_config(),
        client_config(),
        client_config(privacy=private_config().privacy),
    ],
)
def test_without_secure_aggregation_nothing_of_it_is_said(run: RunConfig) -> None:
    statement = state(run, facts_of("north", client=client_plan()))
    assert sums_paragraphs(statement) == []
    assert as_json(statement)["secure_aggregation"] is None
    for word in ("Secure aggregation", "secure aggregation", "masked", "sums of", "collude"):
        assert word not in privacy_section(statement)


# Word for word


def test_a_run_without_privacy_word_for_word() -> None:
    assert paragraphs(plain()) == [
        NONE,
        "Secure aggregation: the coordinator saw sums of updates, and no update. A round's sum was "
        "opened only if at least 3 sites, and more than 0.6667 of its members, those that trained "
        "in time and sent keys, are in it. With it the sums of their records, weights and steps "
        "are opened. Of a single site the coordinator saw the numbers of training and held-out "
        "records, and the highest rank, that it said before round 1; when it takes part, how long "
        "it trains, at which stage of a sum it is lost, and why. Members of a sum are told each "
        "other's names, and the largest of their numbers of records.",
        ASSUMED + "What a sum says is bounded by nothing: one of few updates says much about each.",
    ]
    assert plain().disclosures == ()
    assert limits(plain()) == ()


def test_groups_metrics_ranks_and_a_simulation_are_said() -> None:
    groups = plain(
        secure_aggregation=SecureAggregation(group=5, minimum=4),
        robust=Robust(rule="median"),
        lora=Lora(rank=0),
        federation=Federation(rounds=6, weighting="uniform"),
    )
    saw, _ = sums_paragraphs(groups)
    assert "A group's sum was opened only if at least 4 sites" in saw
    assert (
        "Groups are drawn at random in every round, of at least 5 members if there are so many; "
        "the coordinator saw the sum of each, and its members' names." in saw
    )
    assert saw.endswith("Members of a sum are told each other's names.")
    ranks = plain(
        model=Model(base="mlp"),
        federation=Federation(rounds=6, mixed_ranks=True, method="altqr"),
        training=Training(holdout=0.2),
    )
    saw, _ = sums_paragraphs(ranks)
    assert "records, weights and steps, and of their weights on each rank, are opened" in saw
    assert "and why; metrics on its held-out records." in saw
    assert saw.endswith("and the heaviest of their weights, by records and ranks.")
    run = open_config(secure_aggregation=SECURE)
    assert "In this simulation one program played all parties" in " ".join(
        paragraphs(state(run, facts_of("north", simulated=True)))
    )


def test_with_noise_of_each_site_its_guarantee_stands_and_the_sums_beside_it() -> None:
    told = paragraphs(local())
    without = paragraphs(state(private_config(), facts_of("north", "south")))
    assert told[:-2] == without
    assert "and why; its ε, δ, σ, q, steps, engine and ledger head." in told[-2]
    assert told[-1] == ASSUMED + (
        "What a sum says is bounded by the privacy noise in it, as stated above."
    )


def test_with_noise_of_the_members_records_are_not_counted() -> None:
    for statement in (together(RECORD), together(CLIENT), both()):
        saw, _ = sums_paragraphs(statement)
        assert "In it all members weigh the same, and their records are not counted." in saw
        assert saw.endswith("Members of a sum are told each other's names.")
    assert NO_CLIENT_LEVEL in paragraphs(together(RECORD))
    assert paragraphs(together(CLIENT))[0] == NO_RECORD_LEVEL_IN_SUMS
    assert "hides who took part" not in "\n".join(paragraphs(both()))
    assert "Target of this run: ε_u = 6 for the whole run." in paragraphs(together(CLIENT))


# What else leaves


def row(run: RunConfig, what: str) -> Disclosure:
    (found,) = [one for one in disclosures(run) if what in one.what]
    return found


LOCAL = private_config(secure_aggregation=SECURE)
OF_RECORDS, OF_CLIENTS = config(RECORD), config(CLIENT)


@pytest.mark.parametrize(
    ("run", "what", "status", "why"),
    [
        (LOCAL, "number of training", "not covered", "all members are told the largest"),
        (LOCAL, "number of training", "not covered", "again in the sums"),
        (OF_RECORDS, "number of training", "not covered", "in no sum; all updates weigh the same"),
        (LOCAL, "takes part", "not covered", "at which stage of a sum it is lost"),
        (LOCAL, "update of a single site", "not sent", "one sum per round of at least 3 updates"),
        (LOCAL, "sums of updates", "charged", "noised updates"),
        (OF_CLIENTS, "sums of updates", "charged", "the members' noise is made for"),
        (LOCAL, "weights and steps", "not covered", "exact"),
        (OF_RECORDS, "weights and steps", "not sent", "every member counts for one"),
        (LOCAL, "secure_aggregation.range", "charged", "lost at the stage of masks"),
        (LOCAL, "norm of what a round changed", "charged", "those of single deltas are not seen"),
        (LOCAL, "training loss", "not sent", "[privacy]"),
        (OF_CLIENTS, "training loss", "not sent", "where updates are summed"),
        (OF_CLIENTS, "models of every round", "charged", "a function of noised sums"),
        (OF_CLIENTS, "who is drawn", "not covered", "does not count on it, and does not hide it"),
        (OF_CLIENTS, "events.jsonl", "not covered", "participation and failures by client;"),
    ],
)
def test_what_leaves_in_place_of_updates_has_its_status(
    run: RunConfig, what: str, status: str, why: str
) -> None:
    found = row(run, what)
    assert (found.status, why in found.why) == (status, True), found


def test_a_run_noised_by_its_members_refuses_no_value() -> None:
    for run in (OF_RECORDS, OF_CLIENTS):
        assert not [one for one in disclosures(run) if "secure_aggregation.range" in one.what]


def test_the_limits_are_those_of_the_noise_that_there_is() -> None:
    def has(statement: PrivacyStatement, words: str) -> bool:
        return words in " ".join(limits(statement))

    gaussian, summed, others = "the Gaussian", "sum of clipped gradients", "add no noise count as"
    rows = [(local(), 1, 0, 0), (together(RECORD), 0, 1, 1), (together(CLIENT), 0, 0, 1)]
    for statement, *expected in [*rows, (both(), 1, 0, 1)]:
        assert [has(statement, words) for words in (gaussian, summed, others)] == expected


# Card and page


@pytest.mark.parametrize("name", STATEMENTS)
def test_card_and_page_say_it_once(name: str) -> None:
    statement = STATEMENTS[name]()
    saw, assumed = sums_paragraphs(statement)
    page = html.unescape(render(ReportData(name="run", privacy=statement)))
    for text in (privacy_section(statement), page):
        assert text.count(saw) == text.count(assumed) == 1
    assert page.count("<h3>Secure aggregation</h3>") == (name != "plain")
