"""A site that is killed anywhere and asked again does every round once."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from anabranch.client import local
from anabranch.client.answers import Answers
from anabranch.client.ledger import Ledger
from anabranch.client.models import Models
from anabranch.client.privacy import epsilon_of
from anabranch.client.question import key_of
from anabranch.client.site import Site
from anabranch.protocols.errors import DataError, PolicyError, PrivacyError, RunError
from anabranch.protocols.identity.proposal import Proposal, Signed
from anabranch.protocols.messages import Trained
from anabranch.protocols.spend import Spend
from tests.client.killing import (
    RUNS,
    Killed,
    Life,
    Question,
    Questions,
    ask,
    kept,
    leftovers,
    new_site,
)
from tests.ledgers import change

ROOT = Path(__file__).resolve().parents[2]
DELTA = 1 / 400  # of 40 records
MODELS = Models()  # frozen weights are the same in every process


@dataclasses.dataclass(frozen=True)
class Reference:
    """What an undisturbed site does in rounds 1 and 2."""

    questions: Questions
    after_one: Path  # the folder when round 1 is done
    answers: list[tuple[Trained, bytes]]
    kept: dict[str, bytes]
    writes: int  # of round 2


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Return the undisturbed rounds of a run of RUNS."""
    found: dict[str, Reference] = {}

    def of(name: str) -> Reference:
        if name not in found:
            folder = new_site(tmp_path_factory.mktemp(name) / "north")
            questions, life = Questions(name), Life()
            first = ask(folder, questions(1), models=MODELS)
            shutil.copytree(folder, folder.with_name("one"))
            second = ask(folder, questions(2), life, MODELS)
            found[name] = Reference(
                questions, folder.with_name("one"), [first, second], kept(folder), life.writes
            )
        return found[name]

    return of


def spent(folder: Path) -> tuple[int, int, float]:
    """Return how often a site has reserved, how many of these are open, and ε of all."""
    state = Site(folder, MODELS).ledger.state()
    if state is None:
        return 0, 0, 0.0
    return len(state.reserved), len(state.open), epsilon_of(state.spends(), DELTA)


def killed(folder: Path, question: Question, at: int) -> bool:
    """Ask a site that dies at its write number `at`; return whether it came so far."""
    try:
        ask(folder, question, Life(at=at), MODELS)
    except Killed:
        return True
    return False


def dies(*_: Any, **__: Any) -> Any:
    raise Killed


def require_as_undisturbed(folder: Path, expected: Reference, name: str) -> None:
    """Fail unless a site that was disturbed in round 2 has ended as one that was not."""
    report, frame = ask(folder, expected.questions(2), models=MODELS)
    whole, wanted = expected.answers[1]
    again = ask(folder, expected.questions(2), models=MODELS)

    assert again == (report, frame)
    assert ask(folder, expected.questions(1), models=MODELS) == expected.answers[0]
    assert leftovers(folder) == []
    if "private" in name:
        assert spent(folder) == (2, 0, whole.epsilon)
        assert report.epsilon == whole.epsilon
        assert Site(folder, MODELS).ledger.contains(str(report.ledger))
        assert kept(folder).keys() == expected.kept.keys()
    else:
        assert frame == wanted
        assert kept(folder) == expected.kept
        assert (report.loss, report.steps) == (whole.loss, whole.steps)


# Killed at a write: what is on the disk is what was written before it


def through(reference: Callable[[str], Reference], name: str, folder: Path, every: int) -> None:
    expected = reference(name)
    for at in range(1, expected.writes + 1, every):
        site = folder / str(at)
        shutil.copytree(expected.after_one, site)

        assert killed(site, expected.questions(2), at)
        require_as_undisturbed(site, expected, name)
        shutil.rmtree(site)


@pytest.mark.parametrize("name", RUNS)
def test_a_site_killed_at_a_write_does_its_round_once(
    reference: Callable[[str], Reference], name: str, tmp_path: Path
) -> None:
    through(reference, name, tmp_path, 31)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_site_killed_at_any_write_does_its_round_once(
    reference: Callable[[str], Reference], name: str, tmp_path: Path
) -> None:
    through(reference, name, tmp_path, 1)


@pytest.mark.parametrize("name", RUNS)
def test_a_site_killed_again_and_again_in_one_round_does_it_once(
    reference: Callable[[str], Reference], name: str, tmp_path: Path
) -> None:
    """Every process comes a few writes further than what the one before it left behind."""
    expected = reference(name)
    site = tmp_path / "north"
    shutil.copytree(expected.after_one, site)
    at = 1
    while killed(site, expected.questions(2), at):
        at += 23

    require_as_undisturbed(site, expected, name)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.client.killing import Life, Questions, ask

folder, name, points = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
question = Questions(name)(2)
for at in map(int, points):
    child = os.fork()
    if not child:
        try:
            ask(folder, question, Life(at=at, die=lambda: os.kill(os.getpid(), signal.SIGKILL)))
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "points"), [("kept", "5 12 19 26 9"), ("private", "5 14 22 33 47 12")]
)
def test_a_process_that_is_killed_by_the_system_is_no_other_case(
    reference: Callable[[str], Reference], name: str, points: str, tmp_path: Path
) -> None:
    expected = reference(name)
    site = tmp_path / "north"
    shutil.copytree(expected.after_one, site)
    subprocess.run(
        [sys.executable, "-c", KILLED, str(site), name, *points.split()],
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )

    require_as_undisturbed(site, expected, name)


# Any order of questions, kills, stops and restarts


ROUNDS = 4
PLANNED = 6  # rounds of the run


class Federation(RuleBasedStateMachine):
    """A coordinator that asks what it likes, of a site that may die at any write."""

    name: str
    folders: Iterator[Path]

    @initialize()
    def begin(self) -> None:
        self.folder = new_site(next(self.folders))
        self.questions = Questions(self.name)
        self.given: dict[tuple[int, int], tuple[Trained, bytes]] = {}
        self.last: dict[int, int] = {}  # round -> variant that was asked last
        self.turns: Counter[int] = Counter()  # how often another variant of a round was asked

    @rule(
        number=st.integers(1, ROUNDS),
        variant=st.sampled_from([0, 0, 0, 1]),
        at=st.none() | st.integers(1, 120),
    )
    def asks(self, number: int, variant: int, at: int | None) -> None:
        which = (number, variant)
        self.turns[number] += self.last.setdefault(number, variant) != variant
        self.last[number] = variant
        try:
            answer = ask(self.folder, self.questions(*which), Life(at=at), MODELS)
        except Killed:
            return
        except PrivacyError:
            if spent(self.folder)[0] < PLANNED:
                raise
            return  # there is no room for questions beyond the plan
        assert answer == self.given.setdefault(which, answer)

    @invariant()
    def every_answer_costs_one_reserve_and_no_other_is_made_without_cause(self) -> None:
        if not hasattr(self, "folder") or "private" not in self.name:
            return
        state = Site(self.folder, MODELS).ledger.state()
        if state is None:
            return
        reserved = Counter(body.round for body in state.reserved.values())
        settled = Counter(state.reserved[entry].round for entry in state.settled)
        done = Counter(which[0] for which in self.done())
        for number in range(1, ROUNDS + 1):
            assert settled[number] <= done[number]
            assert reserved[number] <= done[number] + self.turns[number] + (done[number] == 0)
            if not self.turns[number]:
                assert reserved[number] <= 1

    def done(self) -> list[tuple[int, int]]:
        """Return what rounds are done, in their order, as the disk has it."""
        keys = {}
        for which in itertools.product(range(1, ROUNDS + 1), (0, 1)):
            question = self.questions(*which)
            keys[key_of(question.assignment, question.adapter)] = which
        found = [
            (msgspec.json.decode(path.read_bytes())["number"], keys[path.parent.name])
            for path in (self.folder / "answers").glob("[!.]*/result.json")
        ]
        return [which for _, which in sorted(found)]

    def teardown(self) -> None:
        """What a site keeps follows from the rounds that are done, in their order, alone."""
        if not hasattr(self, "folder"):
            return
        done = self.done()
        for which in done:
            self.asks(*which, None)
        assert self.done() == done
        assert set(done) == self.given.keys()
        if "private" in self.name:
            assert len(done) == spent(self.folder)[0] - spent(self.folder)[1]
            return
        undisturbed = new_site(next(self.folders))
        for which in done:
            _, frame = ask(undisturbed, self.questions(*which), models=MODELS)
            assert frame == self.given[which][1]
        here, there = kept(self.folder), kept(undisturbed)
        assert {name: here[name] for name in there} == there  # a run may have begun, and no more
        assert here.keys() - there.keys() <= {"runs/r1"}


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        ("kept", 2),
        ("private-kept", 1),
        *(pytest.param(name, 12, marks=pytest.mark.slow) for name in RUNS),
    ],
)
def test_no_order_of_questions_and_kills_changes_what_is_done(
    name: str, examples: int, tmp_path: Path
) -> None:
    folders = (tmp_path / str(i) / "north" for i in itertools.count())
    machine = type("Machine", (Federation,), {"name": name, "folders": folders})
    hurry = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=10,
            deadline=None,
            suppress_health_check=hurry,
        ),
    )


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


def test_a_result_whose_reserve_was_lost_is_thrown_away(
    reference: Callable[[str], Reference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger was exchanged for an older one, and that accepted, before it could be settled."""
    expected = reference("private")
    site = tmp_path / "north"
    shutil.copytree(expected.after_one, site)
    older = {name: (site / name).read_bytes() for name in ("ledger.sqlite", "ledger.head")}
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "confirm", dies)
        with pytest.raises(Killed):
            ask(site, expected.questions(2), models=MODELS)
    assert spent(site)[:2] == (2, 1)
    for name, data in older.items():
        (site / name).write_bytes(data)
    before = kept(site)

    assert spent(site)[:2] == (1, 0)
    _, frame = ask(site, expected.questions(2), models=MODELS)
    assert spent(site)[:2] == (2, 0)
    assert ask(site, expected.questions(2), models=MODELS)[1] == frame
    assert kept(site) != before
    assert leftovers(site) == []


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


def test_evaluation_sees_what_a_round_that_is_done_has_changed(
    reference: Callable[[str], Reference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reference("kept")
    site = tmp_path / "north"
    shutil.copytree(expected.after_one, site)
    with monkeypatch.context() as patch:
        patch.setattr(Answers, "complete", dies)
        with pytest.raises(Killed):
            ask(site, expected.questions(2), models=MODELS)
    assert kept(site) != expected.kept
    question = expected.questions(2)
    training = msgspec.structs.replace(question.assignment.config.training, holdout=0.0)
    assignment = msgspec.structs.replace(
        question.assignment,
        config=msgspec.structs.replace(question.assignment.config, training=training),
    )

    with pytest.raises(DataError, match="no held-out records"):
        Site(site, MODELS).evaluate(assignment, question.adapter)
    assert kept(site) == expected.kept
