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

from anabranch.client.answers import Answers
from anabranch.client.ledger import Ledger
from anabranch.client.question import key_of
from anabranch.client.site import Site
from anabranch.protocols.errors import DataError, PrivacyError
from anabranch.protocols.messages import Trained
from tests.client.killing import (
    MODELS,
    RUNS,
    Killed,
    Life,
    Questions,
    ask,
    kept,
    killed,
    leftovers,
    new_site,
    spent,
)

ROOT = Path(__file__).resolve().parents[2]


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
