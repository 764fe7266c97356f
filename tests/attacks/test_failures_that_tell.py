"""Attack: the model or the contract makes the site's own code fail if a record is such and such.

A base without a row for one word ends in an IndexError, a long text in a MemoryError. Where the
members of a sum make its noise, that a site fails, and how, must not leave.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from anabranch.client import local
from anabranch.client import site as site_module
from anabranch.client.agent.overview import ZEROS
from anabranch.client.agent.work import Doing
from anabranch.client.local import Learned, train_alone
from anabranch.client.policy.approvals import Approvals
from anabranch.client.policy.rules import NotAllowed
from anabranch.client.refusals import FAILED, MACHINE, tells
from anabranch.client.site import Site
from anabranch.client.sums.participant import PARTICIPANTS
from anabranch.protocols import errors
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError, IncompatibleAdapter, RunError
from anabranch.protocols.secagg.terms import Peer, Roster
from anabranch.simulations.cohort import private as cohort_private
from anabranch.simulations.cohort.executor import CohortExecutor
from tests.attacks.test_refusals_that_tell import (
    BOTH_LEVELS,
    CLEAR,
    CLIENT_LEVEL,
    NOBODY,
    PATIENT,
    SUMS,
    asked,
    in_cohort,
    kept,
    said,
    site_of,
    zeros,
)
from tests.client.policy.guarded_site import Ward
from tests.client.policy.policies import private_config, signed_of
from tests.noise_cases import RECORD, config

FAILURES = [
    AssertionError("x"),
    IndexError("index out of range in self"),
    KeyError("x"),
    MemoryError("x"),
    TypeError("x"),
    ValueError("x"),
    ZeroDivisionError("x"),
]
NOISED_SITES = config(
    RECORD, privacy__noise="local", training__local_steps=2, federation__weighting="examples"
)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    PARTICIPANTS.forget("asking")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return site_of(tmp_path / "with", PATIENT)


def raising(error: Exception) -> Callable[..., Any]:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    return fails


def test_no_sentence_for_the_user_is_taken_for_a_failure_of_the_machine() -> None:
    """So a stop, a policy and privacy that cannot be established pass through."""
    kinds = [one for one in vars(errors).values() if isinstance(one, type)]
    assert len(kinds) > 10
    assert not [one for one in kinds if issubclass(one, MACHINE)]
    assert not issubclass(NotAllowed, MACHINE)


@pytest.mark.parametrize("run", [CLIENT_LEVEL, BOTH_LEVELS, config(RECORD)])
@pytest.mark.parametrize("error", FAILURES, ids=lambda one: type(one).__name__)
def test_no_error_of_training_is_a_refusal(
    site: Site, run: RunConfig, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fit", "fit_private", "fit_unnoised"):
        monkeypatch.setattr(local, name, raising(error))

    assert said(site, run, zeros(run))[1] == b""
    assert all(not array.any() for array in kept(site).values())


@pytest.mark.parametrize("run", [CLIENT_LEVEL, BOTH_LEVELS, config(RECORD)])
@pytest.mark.parametrize("ask_it", [said, in_cohort])
def test_no_error_of_the_frozen_layers_is_a_refusal(
    site: Site,
    tmp_path: Path,
    run: RunConfig,
    ask_it: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is asked with a model that trains nothing, so that both come to zeros in every run."""
    monkeypatch.setattr(Site, "_features", raising(IndexError("index out of range in self")))
    got = ask_it(site, run)
    monkeypatch.undo()

    same = {"ledger": None, "epsilon": None}
    expected = ask_it(site_of(tmp_path / "without", NOBODY), run)
    assert [msgspec.structs.replace(one[0], **same) for one in (got, expected)] == [
        msgspec.structs.replace(expected[0], **same)
    ] * 2
    assert got[1] == expected[1] == b""
    assert all(not array.any() for array in kept(site).values())
    assert "IndexError" in caplog.text
    if run is BOTH_LEVELS:
        assert [(one.steps, one.unit) for one in site.ledger.history()] == [(3, "record")]


@pytest.mark.parametrize("run", [SUMS, CLEAR], ids=["sums", "clear"])
def test_elsewhere_the_type_is_told(
    site: Site, run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Site, "_features", raising(IndexError("x")))

    with pytest.raises(IndexError):
        site.train(asked(run), zeros(run))


def test_a_stop_in_preparation_is_no_update_of_zeros(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Site, "_features", raising(NotAllowed("hours", "over")))

    assert said(site, CLIENT_LEVEL) == (NotAllowed, "over")


@pytest.mark.parametrize("run", [CLIENT_LEVEL, SUMS, CLEAR], ids=["client", "sums", "clear"])
def test_reading_the_records_fails_in_the_words_of_the_contract(
    site: Site, run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_module, "load_records", raising(OverflowError("row 300")))

    with pytest.raises((DataError, OverflowError)) as refused:
        site.sizes(run)

    told = tells(run) == "all"
    assert isinstance(refused.value, OverflowError) is told
    assert ("row 300" in str(refused.value)) is told
    assert str(refused.value).startswith("the records do not keep the data contract") is not told


@pytest.mark.parametrize("ask_it", [said, in_cohort])
@pytest.mark.parametrize("run", [BOTH_LEVELS, NOISED_SITES], ids=["nothing", "sentence"])
def test_noised_values_that_are_no_adapter_tell_no_more(
    site: Site, run: RunConfig, ask_it: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = raising(IncompatibleAdapter("adapter: head.weight is not finite"))
    model = zeros(run)
    monkeypatch.setattr(local, "read_adapter", bad)
    monkeypatch.setattr(cohort_private, "Adapter", bad)

    got = said(site, run, model) if ask_it is said else trained_with_others(site, run, model)

    if run is BOTH_LEVELS:
        assert got[1] == b""
        assert all(not array.any() for array in kept(site).values())
    else:
        assert got == (RunError, FAILED)


def trained_with_others(site: Site, run: RunConfig, model: Any) -> Any:
    """Return what comes of a round in the cohort executor."""
    begun = site.prepare(asked(run), model)
    (outcome,) = CohortExecutor(lambda _: site)._learned([begun.local])
    if isinstance(outcome, Learned):
        return site.finish(begun, outcome)
    return type(outcome), str(outcome)


def test_a_cohort_that_fails_comes_to_what_each_comes_to_alone(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cohort_private, "grouped_gradients", raising(RuntimeError("memory")))
    monkeypatch.setattr(local, "fit_private", raising(RuntimeError("memory")))
    begun = site.prepare(asked(BOTH_LEVELS), zeros(BOTH_LEVELS))

    (together,) = CohortExecutor(lambda _: site)._learned([begun.local])
    alone = train_alone(begun.local)

    assert isinstance(together, Learned)
    assert together.after is alone.after is begun.local.start
    assert (together.steps, together.private) == (alone.steps, alone.private)


def test_where_the_sites_make_their_own_noise_both_tell_the_type(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cohort_private, "grouped_gradients", raising(RuntimeError("memory")))
    monkeypatch.setattr(local, "fit_private", raising(RuntimeError("memory")))
    noised = site.prepare(asked(NOISED_SITES), zeros(NOISED_SITES)).local

    (told,) = CohortExecutor(lambda _: site)._learned([noised])
    assert isinstance(told, RuntimeError)
    with pytest.raises(RuntimeError, match="memory"):
        train_alone(noised)


# what stops a site's work

STOPS = [
    ("memory", {"memory_mb": 100}, r"101 MiB", "the site holds more memory than its policy allows"),
    ("minutes", {"max_minutes_per_round": 1.0}, r"step 2 of 3", "round 1: stopped, its time at"),
]
HIDDEN = private_config(secure_aggregation={"minimum": 3}, federation={"weighting": "examples"})

ROSTER = Roster.of([Peer(name="aarhus", key="ab" * 32)])


@pytest.mark.parametrize(("code", "limits", "inside", "outside"), STOPS)
@pytest.mark.parametrize("hides", [True, False])
def test_where_an_update_is_hidden_a_stop_says_no_number(
    tmp_path: Path, hides: bool, code: str, limits: dict[str, Any], inside: str, outside: str
) -> None:
    ward = Ward(tmp_path)
    if hides:
        ward.config = HIDDEN
        ward.signed = signed_of(HIDDEN, roster=ROSTER.digest)
        proposal, key = ward.signed.proposal, ward.signed.key
        Approvals(tmp_path).note(proposal, key, HIDDEN, ward.clock(), roster=ROSTER)
    ward.approve()
    ward.set(limits=limits)
    ward.site.seconds = 31.0 if code == "minutes" else 0.0
    outer = ward.site.watch
    assert outer is not None

    def grows(activity: str, step: int, steps: int) -> None:
        ward.resident = (99 + step) << 20 if code == "memory" else 0
        outer(activity, step, steps)

    ward.site.watch = grows
    with pytest.raises(NotAllowed) as refused:
        ward.train()

    assert refused.value.code == code
    assert (inside in str(refused.value)) is not hides
    assert str(refused.value).startswith(outside) is hides
    assert inside in str(dict(ward.notes.lines[-1][1])["message"])  # the owner's log


@pytest.mark.parametrize("hides", [True, False])
def test_where_an_update_is_hidden_no_step_is_reported(hides: bool) -> None:
    doing = Doing("1")
    doing.hides = hides
    doing.watch("training", 80, 100)

    assert (doing.outward.step, doing.outward.steps) == ((0, 0) if hides else (80, 100))
    assert (doing.report.step, doing.report.steps) == (80, 100)  # `anabranch site status`


# what the owner sees


@pytest.mark.parametrize("fails", [True, False])
def test_an_update_of_zeros_is_in_the_log_of_this_machine(
    tmp_path: Path, fails: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site, told = site_of(tmp_path / "with", PATIENT), list[int]()
    site.on_zeros = lambda: told.append(1)
    if fails:
        monkeypatch.setattr(local, "fit", raising(KeyError("x")))
    with caplog.at_level(logging.WARNING):
        said(site, CLIENT_LEVEL, zeros(CLIENT_LEVEL))
        said(site, CLIENT_LEVEL, zeros(CLIENT_LEVEL))  # the answer is at hand

    assert told == [1] * fails
    assert ("north: its update of round 1 of run asking is zeros" in caplog.text) is fails


def test_it_is_in_the_owners_audit_log_without_a_reason(tmp_path: Path) -> None:
    ward = Ward(tmp_path)
    ward.approve()
    ward.site.on_zeros = None  # type: ignore[attr-defined]
    ward.guard.__post_init__()
    outer = ward.site.watch
    assert outer is not None

    def nothing(activity: str, step: int, steps: int) -> None:
        if step == 1:
            ward.site.on_zeros()  # type: ignore[attr-defined]
        outer(activity, step, steps)

    ward.site.watch = nothing
    ward.train(1)
    ward.site.watch = outer
    ward.train(2)

    assert ward.notes.kinds.count(ZEROS) == 1
    at = ward.notes.kinds.index(ZEROS)
    assert ward.notes.lines[at][1] == {"run": "run-1", "round": 1}
    assert ward.notes.kinds[at + 1] == "round-trained"
