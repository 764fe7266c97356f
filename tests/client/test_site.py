"""A site does one round: contract, model, training, ledger, delta."""

from __future__ import annotations

from pathlib import Path

import pytest

from anabranch.client.models import Models
from anabranch.client.privacy import epsilon_of
from anabranch.client.site import Site, round_seed
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.protocols import wire
from anabranch.protocols.adapter import WHOLE, Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import (
    ConfigError,
    DataError,
    IncompatibleAdapter,
    PrivacyError,
    ProtocolError,
)
from anabranch.protocols.messages import Assignment
from anabranch.protocols.part import Part
from tests.runs import PRIVATE, table_run, write_site, write_table

PRIVATE_RUN = (("local_epochs = 2", "local_steps = 3"),)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    data = write_table(tmp_path / "records.csv")
    return Site(write_site(tmp_path / "north", "north", data), Models())


def start(config: RunConfig) -> Adapter:
    return read_adapter(load_classifier(config))


def assignment(config: RunConfig, number: int = 1, run: str = "r1") -> Assignment:
    return Assignment(run=run, round=number, config=config)


def received(frame: bytes, config: RunConfig, part: Part = WHOLE) -> Delta:
    """Return the delta as the coordinator reads it."""
    uplink = config.uplink
    spec = start(config).spec
    return wire.decode_delta(frame, spec, part, codec=uplink.codec, keep=uplink.keep)


def test_a_round_returns_what_changed_and_how_many_records_are_behind_it(site: Site) -> None:
    config = table_run()

    report, frame = site.train(assignment(config), start(config))
    delta = received(frame, config)

    assert (report.site, report.num_examples, report.steps) == ("north", 40, 10)
    assert report.loss is not None
    assert report.epsilon is None
    assert (delta.num_examples, delta.steps) == (40, 10)
    assert delta.norm() > 0


def test_a_round_does_not_depend_on_what_the_process_did_before(tmp_path: Path) -> None:
    config = table_run()
    data = write_table(tmp_path / "records.csv")
    used = Site(write_site(tmp_path / "a", "north", data), Models())
    used.train(assignment(config), start(config))
    fresh = Site(write_site(tmp_path / "b", "north", data), Models())

    _, second = used.train(assignment(config, 2), start(config))
    _, alone = fresh.train(assignment(config, 2), start(config))

    assert second == alone


def test_sites_and_rounds_shuffle_differently() -> None:
    seeds = {round_seed(0, site, number) for site in ("a", "b") for number in (1, 2)}

    assert len(seeds) == 4


def test_a_private_round_is_in_the_ledger_before_it_is_released(site: Site) -> None:
    config = table_run(*PRIVATE_RUN, extra=PRIVATE)

    report, frame = site.train(assignment(config), start(config))

    spent = site.ledger.history("r1")
    assert [(s.noise_multiplier, s.sample_rate, s.steps) for s in spent] == [
        (report.noise_multiplier, 8 / 40, 3)
    ]
    assert report.delta == pytest.approx(1 / 400)
    assert report.epsilon == pytest.approx(epsilon_of(spent, 1 / 400))
    assert report.loss is None
    assert report.ledger == site.ledger.head
    assert [event.kind for event in site.ledger.events()] == ["opened", "data", "reserve", "settle"]
    assert received(frame, config).norm() > 0


def test_rounds_of_a_private_run_add_up_to_the_target_and_not_above(site: Site) -> None:
    config = table_run(*PRIVATE_RUN, extra=PRIVATE)

    first, _ = site.train(assignment(config, 1), start(config))
    second, _ = site.train(assignment(config, 2), start(config))

    assert first.epsilon is not None
    assert second.epsilon is not None
    assert first.epsilon < second.epsilon <= 8.0
    assert second.epsilon > 7.9


def test_a_round_beyond_the_plan_is_refused_before_it_trains(site: Site) -> None:
    config = table_run(*PRIVATE_RUN, extra=PRIVATE)
    for number in (1, 2):
        site.train(assignment(config, number), start(config))
    before = site.ledger.history()
    other = Adapter(start(config).spec, {n: a + 1 for n, a in start(config).arrays.items()})

    with pytest.raises(PrivacyError, match=r"\[privacy\] budget of 8: 6 steps are spent"):
        site.train(assignment(config, 2), other)

    assert site.ledger.history() == before


def test_spending_outlives_the_process_and_the_run(site: Site) -> None:
    config = table_run(*PRIVATE_RUN, extra=PRIVATE)
    first, _ = site.train(assignment(config, run="r1"), start(config))

    again = Site(site.folder, Models())
    second, _ = again.train(assignment(config, run="r2"), start(config))

    assert first.epsilon is not None
    assert second.epsilon is not None
    assert second.epsilon > first.epsilon


def test_an_unusable_ledger_stops_private_training(site: Site) -> None:
    config = table_run(*PRIVATE_RUN, extra=PRIVATE)
    (site.folder / "ledger.sqlite").write_bytes(b"not a database, but long enough to be read")

    with pytest.raises(PrivacyError, match=r"ledger"):
        site.train(assignment(config), start(config))


def test_private_noise_differs_between_two_runs_of_the_same_round(tmp_path: Path) -> None:
    config = table_run(*PRIVATE_RUN, extra=PRIVATE)
    data = write_table(tmp_path / "records.csv")
    sites = [Site(write_site(tmp_path / name, "north", data), Models()) for name in ("a", "b")]

    frames = [site.train(assignment(config), start(config))[1] for site in sites]
    deltas = [received(frame, config) for frame in frames]

    assert any((deltas[0].arrays[n] != deltas[1].arrays[n]).any() for n in deltas[0].arrays)


def test_evaluation_uses_the_held_out_records_alone(site: Site) -> None:
    config = table_run(("local_epochs = 2", "local_epochs = 2\nholdout = 0.25"))

    evaluated = site.evaluate(assignment(config), start(config))
    report, _ = site.train(assignment(config), start(config))

    assert evaluated.num_examples == 10
    assert report.num_examples == 30
    assert set(evaluated.metrics) >= {"accuracy", "macro_f1", "auroc", "ece", "loss"}


def test_evaluation_is_refused_in_a_private_run(site: Site) -> None:
    config = table_run(("local_epochs = 2", "local_steps = 3\nholdout = 0.25"), extra=PRIVATE)

    with pytest.raises(PrivacyError, match=r"set federation\.client_evaluation = false"):
        site.evaluate(assignment(config), start(config))


def test_who_approved_no_evaluation_is_asked_for_none(site: Site) -> None:
    config = table_run(
        ("local_epochs = 2", "local_epochs = 2\nholdout = 0.25"),
        ("rounds = 2", "rounds = 2\nclient_evaluation = false"),
    )

    with pytest.raises(ProtocolError, match="asks no site to evaluate"):
        site.evaluate(assignment(config), start(config))


def test_evaluation_without_held_out_records_says_how_to_get_some(site: Site) -> None:
    with pytest.raises(DataError, match=r"set training\.holdout above 0"):
        site.evaluate(assignment(table_run()), start(table_run()))


def test_an_adapter_for_another_base_is_refused(site: Site) -> None:
    other = table_run(("seed = 3", "seed = 4"))

    with pytest.raises(IncompatibleAdapter, match=r"adapter is for base model \w{12}…, expected"):
        site.train(assignment(table_run()), start(other))


def test_records_that_break_the_contract_are_refused_before_a_model_is_loaded(
    tmp_path: Path,
) -> None:
    data = tmp_path / "records.csv"
    data.write_text("a,b,y\n1,nan,yes\n2,3,perhaps\n")
    site = Site(write_site(tmp_path / "north", "north", data), Models())

    with pytest.raises(DataError, match=r"2 violations of the data contract") as caught:
        site.train(assignment(table_run()), start(table_run()))

    assert "perhaps" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, r"No such file.*which holds site\.toml with name and data"),
        ('name = "North Hospital"\ndata = "x.csv"', r"Expected `str` matching regex"),
        ('name = "north"', r"missing required field `data`"),
        ('name = "north"\ndata = "x.csv"\npolicy = 1', r"unknown field `policy`"),
    ],
)
def test_a_wrong_site_file_is_refused(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "site.toml").write_text(text)

    with pytest.raises(ConfigError, match=says):
        Site(tmp_path)
