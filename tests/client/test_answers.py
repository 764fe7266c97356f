"""One question, one reservation, one answer: what is reserved, kept, and given again."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from anabranch.client import local
from anabranch.client.answers import Answers
from anabranch.client.ledger import Ledger
from anabranch.client.models import Models
from anabranch.client.privacy import epsilon_of
from anabranch.client.question import key_of
from anabranch.client.site import Site
from anabranch.protocols.errors import PolicyError, PrivacyError, RunError
from anabranch.protocols.identity.proposal import Proposal, Signed
from anabranch.protocols.messages import Trained
from anabranch.protocols.spend import Spend
from tests.client.killing import (
    DELTA,
    MODELS,
    Life,
    Question,
    Questions,
    ask,
    killed,
    leftovers,
    new_site,
    spent,
)
from tests.ledgers import change

# One reservation, one result


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return new_site(tmp_path / "north")


@pytest.fixture(scope="module")
def private() -> Questions:
    return Questions("private")


def test_another_question_of_the_same_round_reserves_anew(site: Path, private: Questions) -> None:
    ask(site, private(1), models=MODELS)
    ask(site, private(1, variant=1), models=MODELS)

    assert spent(site)[:2] == (2, 0)


def test_a_question_that_was_given_up_for_another_reserves_anew(
    site: Path, private: Questions
) -> None:
    assert killed(site, private(1), 60)
    assert spent(site)[:2] == (1, 1)
    assert killed(site, private(1, variant=1), 60)
    ask(site, private(1), models=MODELS)

    assert spent(site)[:2] == (3, 2)


def test_a_reserve_that_is_open_is_kept_to_the_limits_of_now(
    site: Path, private: Questions
) -> None:
    """Its owner has lowered the budget since: what is reserved is spent, and not used."""
    assert killed(site, private(1), 60)
    file = site / "site.toml"
    file.write_text(file.read_text() + "\n[budget]\nepsilon = 0.5\ndelta = 0.0025\n")

    with pytest.raises(PrivacyError, match=r"the \[budget\] of site\.toml of 0\.5: 0 steps are"):
        ask(site, private(1), models=MODELS)
    assert spent(site)[:2] == (1, 1)


def test_a_reserve_of_other_rows_is_not_used(site: Path, private: Questions) -> None:
    assert killed(site, private(1), 60)
    records = site.with_suffix(".csv")
    records.write_text(records.read_text().replace("yes", "no", 1))
    ask(site, private(1), models=MODELS)

    assert spent(site)[:2] == (2, 1)


def test_training_that_fails_uses_its_reserve_up(
    site: Path, private: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it failed is sent, and may depend on what was trained."""

    def failing(*_: Any, **__: Any) -> Any:
        raise PrivacyError("not finite after private training")

    with monkeypatch.context() as patch:
        patch.setattr(local, "fit_private", failing)
        with pytest.raises(PrivacyError, match="not finite"):
            ask(site, private(1), models=MODELS)
    assert [path.name for path in (site / "answers").glob("*.begun")] == []
    ask(site, private(1), models=MODELS)

    assert spent(site)[:2] == (2, 1)


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_round_that_the_watch_stops_goes_on_with_its_reserve(
    site: Path, private: Questions, step: int
) -> None:
    seen: list[tuple[str, int, int]] = []

    def closing(activity: str, at: int, steps: int) -> None:
        if (activity, at) == ("training", step):
            raise PolicyError("the hours of this site are over")

    question = private(1)
    with pytest.raises(PolicyError, match="the hours"):
        Site(site, MODELS, watch=closing).train(question.assignment, question.adapter)
    open_again = Site(site, MODELS, watch=lambda *now: seen.append(now))
    open_again.train(question.assignment, question.adapter)

    assert spent(site)[:2] == (1, 0)
    shared = [at for activity, at, steps in seen if steps == 4]
    assert seen[0] == ("preparing", 0, 0)
    assert shared == list(range(step + 1, 5))


def test_a_watch_that_stops_the_private_adapter_stops_the_round(site: Path) -> None:
    """An adapter that diverges is left as it was; a watch is obeyed."""
    question = Questions("beside")(1)
    fits: list[int] = []

    def closing(activity: str, at: int, steps: int) -> None:
        fits.append(at)
        if fits.count(1) == 2:
            raise RunError("not now")

    with pytest.raises(RunError, match="not now"):
        Site(site, MODELS, watch=closing).train(question.assignment, question.adapter)
    assert not (site / "personal").exists()


def test_evaluation_says_what_it_does(site: Path) -> None:
    seen: list[str] = []
    config = Questions("kept").config
    held = msgspec.structs.replace(
        config, training=msgspec.structs.replace(config.training, holdout=0.25)
    )
    question = Questions("kept")(1)
    assignment = msgspec.structs.replace(question.assignment, config=held)
    Site(site, MODELS, watch=lambda activity, *_: seen.append(activity)).evaluate(
        assignment, question.adapter
    )

    assert seen == ["preparing", "evaluating"]


ROWS = [bytes([i]) * 32 for i in range(3)]
SPEND = Spend(noise_multiplier=2.0, sample_rate=0.1, steps=3)


def test_a_ledger_gives_an_open_reserve_again_to_the_same_round_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    first = ledger.reserve(ROWS, "r1", 1, SPEND, again=0)
    other = dataclasses.replace(SPEND, steps=4)

    assert ledger.reserve(ROWS, "r1", 1, SPEND, again=0) == first
    for unlike in (
        (ROWS[:2], "r1", 1, SPEND, 0),
        (ROWS, "r2", 1, SPEND, 0),
        (ROWS, "r1", 2, SPEND, 0),
        (ROWS, "r1", 1, other, 0),
        (ROWS, "r1", 1, SPEND, first),
        (ROWS, "r1", 1, SPEND, None),
    ):
        *what, again = unlike
        assert ledger.reserve(*what, again=again) > first  # type: ignore[misc, arg-type]
    ledger.settle(first, SPEND)
    assert ledger.reserve(ROWS, "r1", 1, SPEND, again=0) > first


def test_an_entry_is_confirmed_as_it_was_settled(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    entry = ledger.reserve(ROWS, "r1", 1, SPEND)
    head, epsilon = ledger.confirm(entry, "r1", 1, SPEND, DELTA) or ("", 0.0)
    ledger.reserve(ROWS, "r1", 2, SPEND)

    assert head == ledger.events()[entry].hash  # the event behind it
    assert epsilon == epsilon_of([SPEND], DELTA)
    assert (ledger.confirm(entry, "r1", 1, SPEND, DELTA) or ("",))[0] == head
    assert ledger.confirm(entry, "r1", 2, SPEND, DELTA) is None
    assert ledger.confirm(entry + 9, "r1", 1, SPEND, DELTA) is None


# What a key is of


def test_who_signed_a_question_does_not_change_it(private: Questions) -> None:
    question = private(1)
    proposal = Proposal(
        federation="f",
        run="r1",
        author="a",
        version="1",
        code="0" * 64,
        config=private.config.digest(),
        base="mlp",
        contract="0" * 64,
    )
    signed = Signed(proposal=proposal, key="0" * 64, signature="0" * 128)
    other = msgspec.structs.replace(question.assignment, signed=signed)

    assert key_of(other, question.adapter) == key_of(question.assignment, question.adapter)


def test_whatever_decides_an_answer_changes_the_key(private: Questions) -> None:
    question = private(1)
    asked = question.assignment
    part = msgspec.structs.replace(asked.part, dense=False)
    config = msgspec.structs.replace(asked.config, seed=99)
    keys = {
        key_of(asked, question.adapter),
        key_of(asked, private(1, variant=1).adapter),
        key_of(msgspec.structs.replace(asked, round=2), question.adapter),
        key_of(msgspec.structs.replace(asked, run="r2"), question.adapter),
        key_of(msgspec.structs.replace(asked, part=part), question.adapter),
        key_of(msgspec.structs.replace(asked, config=config), question.adapter),
    }

    assert len(keys) == 6


# Files


def test_only_the_last_answers_are_kept(site: Path) -> None:
    questions = Questions("kept")
    small = Site(site, MODELS)
    small._answers = Answers(site, most=2)
    for number in (1, 2, 3):
        small.train(questions(number).assignment, questions(number).adapter)
    assert len(list((site / "answers").glob("*/report.json"))) == 2
    small._answers = Answers(site, most_bytes=1)
    small.train(questions(4).assignment, questions(4).adapter)

    (report,) = (site / "answers").glob("*/report.json")
    assert report.parent.name == key_of(questions(4).assignment, questions(4).adapter)
    assert leftovers(site) == []


def test_answers_are_for_the_owner_alone(site: Path) -> None:
    ask(site, Questions("kept")(1), models=MODELS)

    assert (site / "answers").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("file", ["report.json", "frame", "result.json"])
def test_an_answer_that_is_damaged_is_neither_given_nor_made_again(
    site: Path, private: Questions, file: str
) -> None:
    ask(site, private(1), models=MODELS)
    (path,) = (site / "answers").glob(f"*/{file}")
    path.write_bytes(path.read_bytes()[:-3] + b"xyz")

    with pytest.raises(
        RunError, match=rf"answers/[0-9a-f]{{64}}/{file} in the site's folder"
    ) as no:
        ask(site, private(1), models=MODELS)
    assert str(site) not in str(no.value)
    assert spent(site)[:2] == (1, 0)
    ask(site, private(2), models=MODELS)  # it is in nobody else's way


def test_an_attempt_that_cannot_be_read_reserves_anew(site: Path, private: Questions) -> None:
    assert killed(site, private(1), 60)
    (begun,) = (site / "answers").glob("*.begun")
    begun.write_text("{")
    ask(site, private(1), models=MODELS)

    assert spent(site)[:2] == (2, 1)


def test_a_disk_that_is_full_keeps_the_round_for_later(
    site: Path, private: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("anabranch.client.answers.staged", full)
        with pytest.raises(
            RunError, match=r"cannot write down its round \(No space left on device"
        ):
            ask(site, private(1), models=MODELS)
    ask(site, private(1), models=MODELS)

    assert spent(site)[:2] == (1, 0)


def test_a_ledger_that_was_edited_gives_nothing(site: Path, private: Questions) -> None:
    life = Life()
    ask(site, private(1), life, MODELS)
    change(
        site / "ledger.sqlite",
        "UPDATE events SET body = replace(body, '\"steps\":4', '\"steps\":1')",
    )

    with pytest.raises(PrivacyError, match="ledger was changed"):
        ask(site, private(2), models=MODELS)


def test_two_processes_that_ask_at_once_get_one_answer(site: Path) -> None:
    questions = Questions("kept")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: _plainly(site, questions(1)), range(4)))

    assert len({frame for _, frame in answers}) == 1
    assert len({report.seconds for report, _ in answers}) == 1


def _plainly(folder: Path, question: Question) -> tuple[Trained, bytes]:
    return Site(folder, Models()).train(question.assignment, question.adapter)
