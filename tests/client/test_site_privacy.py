"""What a site's private rounds cost its records, whoever asks and however."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from anabranch.client import local
from anabranch.client.models import Models
from anabranch.client.privacy import epsilon_of
from anabranch.client.site import Site
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.client.tuning.private import fit_private
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import (
    ConfigError,
    DataError,
    ModelError,
    PrivacyError,
    ProtocolError,
)
from anabranch.protocols.messages import Assignment, Trained
from tests.ledgers import SPEND, change, old_ledger
from tests.runs import PRIVATE, table_run, write_site, write_table

STEPS = ("local_epochs = 2", "local_steps = 3")
DELTA = 1 / 400  # of 40 records


@pytest.fixture
def site(tmp_path: Path) -> Site:
    data = write_table(tmp_path / "records.csv")
    return Site(write_site(tmp_path / "north", "north", data), Models())


def private(*replacements: tuple[str, str], extra: str = PRIVATE) -> RunConfig:
    return table_run(STEPS, *replacements, extra=extra)


def start(config: RunConfig) -> Adapter:
    return read_adapter(load_classifier(config))


def train(site: Site, config: RunConfig, number: int = 1, run: str = "r1") -> Trained:
    return site.train(Assignment(run=run, round=number, config=config), start(config))[0]


def with_lines(site: Site, lines: str) -> Site:
    file = site.folder / "site.toml"
    file.write_text(file.read_text() + lines)
    return Site(site.folder, Models())


# One identity


OTHER_CONTRACTS: list[tuple[str, str]] = [
    ("mean = 1.0, std = 2.0", "mean = 0.0, std = 9.0"),
    ("seed = 3", "seed = 8"),
    ('a = { type = "number", mean = 1.0, std = 2.0 }\n', ""),
    ('name = "tiny"', 'name = "another"'),
]


@pytest.mark.parametrize("change", OTHER_CONTRACTS, ids=str)
def test_no_configuration_gives_the_records_a_new_budget(
    site: Site, change: tuple[str, str]
) -> None:
    first = train(site, private())

    second = train(site, private(change), run="r2")

    assert [event.kind for event in site.ledger.events()].count("data") == 1
    assert first.epsilon is not None
    assert second.epsilon == epsilon_of(site.ledger.history(), DELTA)
    assert second.epsilon > first.epsilon


def test_another_holdout_is_another_data_set_of_the_same_rows(site: Site) -> None:
    held = ("[training]", "[training]\nholdout = 0.25")
    train(site, private(held, ("seed = 3", "seed = 5")))

    report = train(site, private(held), run="r2")  # other records are held out

    assert report.delta is not None
    assert [event.kind for event in site.ledger.events()].count("data") == 2
    assert report.epsilon == epsilon_of(site.ledger.history(), report.delta)


def test_new_rows_bring_a_spend_of_their_own_and_no_discount_for_the_old(site: Site) -> None:
    config = private()
    train(site, config)
    spent = site.ledger.history()
    text = site.data.read_text()
    site.data.write_text(text + "9.5,1.5,yes\n8.5,1.5,no\n")
    grown = Site(site.folder, Models())

    report = train(grown, config, run="r2")

    assert report.delta == 1 / 420
    assert report.epsilon == epsilon_of(grown.ledger.history(), 1 / 420)
    assert report.epsilon > epsilon_of(grown.ledger.history("r2"), 1 / 420)
    assert epsilon_of(spent, 1 / 420) > 0


def test_a_reordered_file_is_the_same_data_set(site: Site) -> None:
    train(site, private())
    head, *lines = site.data.read_text().splitlines()
    site.data.write_text("\n".join([head, *reversed(lines)]) + "\n")

    train(Site(site.folder, Models()), private(), run="r2")

    assert [event.kind for event in site.ledger.events()].count("data") == 1


def test_spends_of_an_older_ledger_are_not_forgotten(site: Site) -> None:
    old_ledger(site.folder / "ledger.sqlite", [("ab" * 32, "r0", 1, SPEND, "settled")])

    report = train(site, private())

    assert site.ledger.history()[0] == SPEND
    assert report.epsilon == epsilon_of(site.ledger.history(), DELTA)


# Budgets of the site


def budget(epsilon: float, over: str = "row") -> str:
    return f'\n[budget]\nepsilon = {epsilon}\ndelta = 0.0025\nover = "{over}"\n'


@pytest.mark.parametrize("over", ["row", "site"])
def test_a_budget_in_site_toml_is_kept_over_all_runs(site: Site, over: str) -> None:
    site = with_lines(site, budget(9.0, over))
    for number in (1, 2):
        train(site, private(), number)  # 8 are spent
    before = site.ledger.events()

    with pytest.raises(
        PrivacyError, match=r"above the \[budget\] of site\.toml of 9: 6 steps are spent"
    ) as caught:
        train(site, private(), run="r2")

    assert site.ledger.events() == before
    assert str(site.folder) not in str(caught.value)


def test_a_budget_of_rows_lets_new_rows_train(site: Site) -> None:
    site = with_lines(site, budget(9.0))
    for number in (1, 2):
        train(site, private(), number)
    fresh = write_table(site.data.parent / "fresh.csv", seed=9)
    shutil.copy(fresh, site.data)

    train(Site(site.folder, Models()), private(), run="r2")

    assert len(site.ledger.history()) == 3


def test_no_site_spends_more_than_an_epsilon_can_say(site: Site) -> None:
    for run in range(30):
        try:
            train(site, private(extra="\n[privacy]\nepsilon = 60.0\n"), run=f"r{run}")
        except PrivacyError as error:
            message = str(error)
            break

    assert "above the largest epsilon that counts of 100" in message


def test_a_site_with_a_budget_takes_part_in_no_run_without_privacy(site: Site) -> None:
    site = with_lines(site, budget(9.0))
    config = table_run(("[training]", "[training]\nholdout = 0.25"))
    assignment = Assignment(run="r1", round=1, config=config)

    for ask in (site.train, site.evaluate):
        with pytest.raises(PrivacyError, match=r"no \[privacy\], and the \[budget\] .* = 9 over"):
            ask(assignment, start(config))
    assert site.ledger.events() == []


BOUNDED = ('b = { type = "number" }', 'b = { type = "number", max = -1e9 }')


@pytest.mark.parametrize(
    ("extra", "lines"), [(PRIVATE, ""), ("", "\n[budget]\nepsilon = 9.0\ndelta = 1e-5\n")]
)
def test_a_broken_contract_is_answered_with_a_fixed_sentence_where_privacy_is_asked_for(
    site: Site, extra: str, lines: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = table_run(STEPS, BOUNDED, extra=extra)

    with pytest.raises(DataError) as caught:
        with_lines(site, lines).records(config)

    assert str(caught.value) == (
        "the records do not keep the data contract of this run; at the site, `anabranch site "
        "check` lists what is wrong"
    )
    assert "b: above the maximum -1e+09: rows 1-40" in caplog.text


def test_without_privacy_a_broken_contract_is_explained(site: Site) -> None:
    with pytest.raises(DataError, match="b: "):
        site.records(table_run(BOUNDED))


def test_a_run_goes_on_with_the_configuration_it_began_with(site: Site) -> None:
    train(site, table_run())

    with pytest.raises(ProtocolError, match="r1 began with another configuration"):
        train(site, private())

    assert site.ledger.events() == []


def test_a_round_beyond_the_plan_costs_nothing(site: Site) -> None:
    with pytest.raises(PrivacyError, match="round 1000000000 is beyond the 2 of the run's plan"):
        train(site, private(), 10**9)

    assert site.ledger.events() == []


def test_the_rows_that_are_charged_are_those_that_are_trained(site: Site) -> None:
    """The file changes, and another contract makes the site read it again in between."""
    config, other = table_run(), table_run(("seed = 3", "seed = 8"))
    asked, first = Assignment(run="r1", round=1, config=config), start(config)
    site.train(asked, first)
    write_table(site.data, seed=9)
    site.records(other)

    _, frame = site.train(asked, first)

    assert site.records(config)[0].rows == Site(site.folder, Models()).records(config)[0].rows
    assert frame == Site(site.folder, Models()).train(asked, first)[1]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("\n[budget]\nepsilon = 1.0\n", "missing required field `delta`"),
        ("\n[budget]\nepsilon = 0.0\ndelta = 1e-5\n", "> 0.0"),
        (budget(1.0, "run"), "Invalid enum value 'run'"),
        ('ledger_witness = "none"\n', "Invalid enum value 'none'"),
    ],
)
def test_a_budget_that_says_too_little_is_refused(site: Site, lines: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        with_lines(site, lines)


# Witnesses


def test_a_site_has_a_second_witness_in_the_state_folder(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    train(site, private())
    (witness,) = (tmp_path / "state" / "anabranch" / "ledgers").iterdir()
    assert json.loads(witness.read_text())["path"] == str(site.folder / "ledger.sqlite")

    shutil.rmtree(site.folder / "clipping", ignore_errors=True)
    for name in ("ledger.sqlite", "ledger.head"):
        (site.folder / name).unlink()

    with pytest.raises(
        PrivacyError, match=r"ledger is missing, but [0-9a-f]{32}\.head says .* 4 events"
    ) as caught:
        train(site, private(), run="r2")
    assert str(tmp_path) not in str(caught.value)


def test_a_simulated_site_leaves_nothing_outside_its_folder(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    site = with_lines(site, 'ledger_witness = "folder"\n')

    train(site, private())

    assert not (tmp_path / "state").exists()
    assert (site.folder / "ledger.head").exists()


def test_a_ledger_that_was_edited_stops_the_round_and_not_a_run_without_privacy(
    site: Site,
) -> None:
    train(site, private())
    change(site.ledger.path, "UPDATE events SET body = replace(body, '\"steps\":3', '\"steps\":1')")

    with pytest.raises(PrivacyError, match="ledger was changed: event 3") as caught:
        train(site, private(), 2)
    assert str(site.folder) not in str(caught.value)

    train(site, table_run(), run="r2")


def test_a_crash_after_the_reserve_is_spent(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(local, "fit_private", killed)
        with pytest.raises(KeyboardInterrupt):
            train(site, private())

    spent = site.ledger.history()
    report = train(site, private(), run="r2")

    assert len(spent) == 1
    assert report.epsilon == epsilon_of(site.ledger.history(), DELTA)
    state = site.ledger.state()
    assert state is not None
    assert len(state.open) == 1


# The engine, and clipping from round to round


@pytest.mark.parametrize("engine", ["fast", "opacus"])
def test_the_report_says_which_engine_ran(site: Site, engine: str) -> None:
    extra = f'{PRIVATE}engine = "{engine}"\n'

    assert train(site, private(extra=extra)).engine == engine


ADAPTIVE = f'{PRIVATE}clipping = "adaptive"\nclipping_norm = 0.7\n'


def test_adaptive_clipping_goes_on_where_the_last_round_ended(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float | None] = []
    ended: list[float] = []
    real = fit_private

    def watched(*args: Any, **kwargs: Any) -> Any:
        given.append(kwargs["clipping_norm"])
        done = real(*args, **kwargs)
        ended.append(done.clipping_norm)
        return done

    monkeypatch.setattr(local, "fit_private", watched)
    config = private(extra=ADAPTIVE)
    for number in (1, 2):
        train(Site(site.folder, Models()), config, number)  # another process each time
    train(site, config, run="r2")

    assert given == [None, ended[0], None]
    assert ended[0] != 0.7
    kept = json.loads((site.folder / "clipping" / "r1.json").read_text())
    assert kept == {"clipping_norm": ended[1]}


def test_clipping_that_does_not_adapt_keeps_nothing(site: Site) -> None:
    train(site, private())

    assert not (site.folder / "clipping").exists()


def test_a_damaged_clipping_file_is_refused_before_anything_is_spent(site: Site) -> None:
    (site.folder / "clipping").mkdir()
    (site.folder / "clipping" / "r1.json").write_text('{"clipping_norm": -1}')

    with pytest.raises(ModelError, match=r"clipping/r1\.json cannot be read .* or delete it"):
        train(site, private(extra=ADAPTIVE))

    assert site.ledger.history() == []


def test_a_run_is_never_a_path(site: Site) -> None:
    with pytest.raises(ProtocolError, match="run: expected up to 200 letters, digits"):
        train(site, private(extra=ADAPTIVE), run="../evil")

    assert site.ledger.history() == []
