"""Attack: a coordinator learns of single records from what a site refuses, or how it refuses.

It chooses the model, and makes one whose logits are beyond float32 if, and only if, a record has
x > TAU. Training then fails: one bit for each question, exact, without noise and in no ledger.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client import local
from anabranch.client.flower import NO_LIMITS, client_app, pack_assignment, unpack_trained
from anabranch.client.local import Learned
from anabranch.client.models import Models
from anabranch.client.refusals import FAILED
from anabranch.client.site import Site
from anabranch.client.sums.given import InMemory
from anabranch.client.sums.participant import PARTICIPANTS, Participant
from anabranch.client.sums.terms import vector_of
from anabranch.protocols import wire
from anabranch.protocols.adapter import WHOLE, Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import AnabranchError, DataError, PolicyError, RunError
from anabranch.protocols.messages import Assignment, Refused, Trained
from anabranch.protocols.secagg.contribution import WEIGHT_UNIT
from anabranch.protocols.secagg.member import Answer
from anabranch.protocols.secagg.messages import Request
from anabranch.protocols.tables import Uplink
from anabranch.server.evaluation import initial_adapter
from anabranch.simulations.cohort.engine import CohortEngine
from tests.client.test_client_app import ask
from tests.noise_cases import CLIENT, RECORD, config
from tests.runs import write_site
from tests.secure_cases import carried, invite_of

TAU = 2.5
OTHERS = [(-1 + 2 * i / 298, ("no", "yes")[i % 2]) for i in range(299)]
PATIENT, NOBODY = (2.75, "yes"), (0.1, "yes")

CLIENT_LEVEL = config(CLIENT, lora__rank=0)
BOTH_LEVELS = config(
    CLIENT,
    privacy={"epsilon": 8.0},
    training={"local_steps": 3, "batch_size": 20, "learning_rate": 0.1, "optimizer": "sgd"},
)
SUMS = config(CLIENT, client_privacy=None, federation__weighting="examples")
CLEAR = config(CLIENT, client_privacy=None, secure_aggregation=None)


def site_of(folder: Path, last: tuple[float, str], **more: Any) -> Site:
    """Return a site of 300 records, the last of them the one that is asked about."""
    data = folder.with_suffix(".csv")
    data.write_text("x,y\n" + "".join(f"{x:.4f},{y}\n" for x, y in [*OTHERS, last]))
    return Site(write_site(folder, "north", data), Models(), **more)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Site, Site]:
    """Return two sites that differ in one record: with the patient, and without."""
    return site_of(tmp_path / "with", PATIENT), site_of(tmp_path / "without", NOBODY)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    PARTICIPANTS.forget("asking")


def oracle(run: RunConfig, tau: float = TAU) -> Adapter:
    """Return a model whose logits are beyond float32 for x > tau; all its values are finite."""
    first, top, bias = initial_adapter(run), 3.4028235e38, np.float32(3.3e38)
    arrays = {name: np.zeros_like(array) for name, array in first.arrays.items()}
    for name, array in arrays.items():
        if name.endswith("bias"):
            array[:] = bias
        else:
            array[0, 0] = (top - float(bias)) / tau
    return Adapter(first.spec, arrays)


def asked(run: RunConfig, number: int = 1) -> Assignment:
    return Assignment(run="asking", round=number, config=run)


def said(site: Site, run: RunConfig, model: Adapter | None = None, number: int = 1) -> Any:
    """Return what leaves of a question: the answer, but for its seconds, or the refusal."""
    try:
        report, frame = site.train(asked(run, number), oracle(run) if model is None else model)
    except AnabranchError as error:
        return type(error), str(error)
    return msgspec.structs.replace(report, seconds=0.0), frame


def in_cohort(site: Site, run: RunConfig) -> Any:
    """Return the same of a site that is trained with others, as a simulation does."""
    begun = site.prepare(asked(run), oracle(run))
    (outcome,) = CohortEngine().train([begun.local])
    if not isinstance(outcome, Learned):
        return type(outcome), str(outcome)
    report, frame = site.finish(begun, outcome)
    return msgspec.structs.replace(report, seconds=0.0), frame


@pytest.mark.parametrize("ask_it", [said, in_cohort])
def test_where_the_members_make_the_noise_no_refusal_tells_of_a_record(
    pair: tuple[Site, Site], ask_it: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with_her, without = (ask_it(one, CLIENT_LEVEL) for one in pair)

    assert with_her == without
    assert with_her == (Trained(site="north", num_examples=0, steps=0, seconds=0.0), b"")
    assert "north: its update counts as zeros: training loss is" in caplog.text
    assert kept(pair[0]).keys() == kept(pair[1]).keys()
    assert all(not array.any() for array in kept(pair[0]).values())


def kept(site: Site) -> dict[str, Any]:
    waiting = site._participant("asking").kept
    assert waiting is not None
    return dict(waiting.delta.arrays)


def test_an_update_of_zeros_is_noised_and_charged_as_any_other(pair: tuple[Site, Site]) -> None:
    """It goes through a whole sum, beside those of two others that learned something."""
    site, run = pair[0], CLIENT_LEVEL
    model, assignment = oracle(run), asked(run)
    assert said(site, run)[1] == b""
    others = {
        n: Participant(n, Ed25519PrivateKey.generate(), InMemory()) for n in ("aarhus", "bergen")
    }
    for one in others.values():
        arrays = {n: np.full_like(a, 1e-3) for n, a in model.arrays.items()}
        one.keep(assignment, model, Delta(model.spec, arrays, 10, steps=1))
    members = {**others, "north": site._participant("asking")}
    invite = invite_of(assignment, members, model, weight=WEIGHT_UNIT)

    def answer(name: str, request: Request) -> Answer:
        if name == "north":
            return site.secure(assignment, request)
        return others[name].answer(assignment, request, NO_LIMITS, vector_of)

    assert carried(invite, answer).stage == "done"
    assert [(e.run, e.round, e.unit) for e in reserved(site)] == [("asking", 1, "client")]


def reserved(site: Site) -> list[Any]:
    state = site.ledger.state()
    return [] if state is None else list(state.reserved.values())


@pytest.mark.parametrize("ask_it", [said, in_cohort])
def test_where_a_sum_hides_the_update_one_sentence_leaves(
    pair: tuple[Site, Site], ask_it: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert ask_it(pair[0], SUMS) == (RunError, FAILED)
    assert ask_it(pair[1], SUMS)[1] == b""
    assert "north: training loss is" in caplog.text


def test_the_sentence_is_the_same_whenever_and_however_training_failed(
    pair: tuple[Site, Site],
) -> None:
    """In another step, with another loss; or in the values after the last one, by their number."""
    run = SUMS
    answers = {said(pair[0], run, oracle(run, tau), n) for n, tau in enumerate((2.0, 2.5, 2.7), 1)}
    huge = msgspec.structs.replace(run.training, learning_rate=3e38, optimizer="sgd", local_steps=1)
    fast = msgspec.structs.replace(
        run, training=msgspec.structs.replace(huge, max_grad_norm=None, batch_size=300)
    )
    other = site_of(pair[0].folder.parent / "other", (1e4, "no"))

    answers.add(said(other, fast, zeros(fast)))

    assert answers == {(RunError, FAILED)}


def zeros(run: RunConfig) -> Adapter:
    first = initial_adapter(run)
    return Adapter(first.spec, {name: np.zeros_like(a) for name, a in first.arrays.items()})


def test_that_sentence_is_what_travels(pair: tuple[Site, Site]) -> None:
    content = pack_assignment(asked(SUMS), wire.encode(oracle(SUMS)))

    reply = ask(client_app(lambda context: pair[0]), "train", content)

    refused = unpack_trained(reply, oracle(SUMS).spec, WHOLE, Uplink())
    assert refused == Refused(site="north", reason="internal", message=FAILED)


def test_a_run_that_hides_no_update_says_what_to_do(pair: tuple[Site, Site]) -> None:
    kind, text = said(pair[0], CLEAR)

    assert issubclass(kind, RunError)
    assert "lower training.learning_rate (now 0.001) or set max_grad_norm" in text


@pytest.mark.parametrize("run", [CLIENT_LEVEL, SUMS], ids=["client", "sums"])
def test_an_update_that_is_beyond_float32_tells_no_more(
    pair: tuple[Site, Site], run: RunConfig
) -> None:
    """Both ends of it are finite, and their difference is not."""
    first = zeros(run)
    low, high = (
        Adapter(first.spec, {n: np.full_like(a, x) for n, a in first.arrays.items()})
        for x in (-3e38, 3e38)
    )
    begun = pair[0].prepare(asked(run), low)
    learned = Learned(after=high, steps=begun.local.steps, loss=0.5)

    if run is CLIENT_LEVEL:
        assert pair[0].finish(begun, learned)[1] == b""
        assert all(not array.any() for array in kept(pair[0]).values())
    else:
        with pytest.raises(RunError) as refused:
            pair[0].finish(begun, learned)
        assert str(refused.value) == FAILED


@pytest.mark.parametrize("ask_it", [said, in_cohort])
def test_noised_steps_that_trained_nothing_are_no_refusal(
    pair: tuple[Site, Site], ask_it: Any
) -> None:
    """A record is hidden by its site's noise there; a client with all its records is not."""
    first = zeros(BOTH_LEVELS)
    stuck = Adapter(first.spec, {n: np.full_like(a, 3e38) for n, a in first.arrays.items()})
    run, site = BOTH_LEVELS, pair[0]
    if ask_it is said:
        report, frame = said(site, run, stuck)
    else:
        begun = site.prepare(asked(run), stuck)
        (outcome,) = CohortEngine().train([begun.local])
        assert isinstance(outcome, Learned)
        report, frame = site.finish(begun, outcome)

    assert (report.steps, report.engine, frame) == (3, "fast", b"")
    assert [(one.steps, one.unit) for one in site.ledger.history()] == [(3, "record")]
    assert all(not array.any() for array in kept(site).values())


def test_a_step_whose_sum_is_beyond_float32_is_no_refusal(pair: tuple[Site, Site]) -> None:
    """The members make the noise of it: it counts as zeros, and stays charged."""
    run = config(
        RECORD,
        training__learning_rate=3e38,
        training__batch_size=200,
        privacy__clipping_norm=1e6,
        data__columns={"x": {"type": "number", "mean": -10.0}, "y": {"type": "label"}},
    )
    wrong = zeros(run)
    wrong.arrays["head.bias"][:] = (1e3, 0.0)  # for everybody who is a "yes"

    report, frame = said(pair[0], run, wrong)

    assert (report.steps, report.noise_multiplier is not None, frame) == (1, True, b"")
    assert all(not array.any() for array in kept(pair[0]).values())
    assert [(e.run, e.round, e.unit) for e in reserved(pair[0])] == [("asking", 1, "record")]


@pytest.mark.parametrize("error", [MemoryError("8 GiB"), RuntimeError("can't allocate memory")])
@pytest.mark.parametrize("run", [CLIENT_LEVEL, BOTH_LEVELS, config(RECORD)])
def test_a_record_that_takes_too_much_memory_is_no_refusal(
    pair: tuple[Site, Site],
    run: RunConfig,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    for name in ("fit", "fit_private", "fit_unnoised"):
        monkeypatch.setattr(local, name, fails)
    got = said(pair[0], run, zeros(run))
    monkeypatch.undo()

    expected = said(pair[1], run, zeros(run))
    same = {"ledger": None, "epsilon": None}
    assert [msgspec.structs.replace(one[0], **same) for one in (got, expected)] == [
        msgspec.structs.replace(expected[0], **same)
    ] * 2
    assert got[1] == expected[1] == b""
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("run", [SUMS, CLEAR], ids=["sums", "clear"])
def test_elsewhere_its_type_is_told(
    pair: tuple[Site, Site], run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise MemoryError("8 GiB")

    monkeypatch.setattr(local, "fit", fails)

    with pytest.raises(MemoryError):
        pair[0].train(asked(run), zeros(run))


def test_training_that_diverges_takes_as_many_steps_as_any(tmp_path: Path) -> None:
    """Nor does it begin again where its process is started anew."""
    run, seen = CLIENT_LEVEL, list[tuple[int, int]]()

    def watch(activity: str, step: int, steps: int) -> None:
        seen.append((step, steps))
        if seen.count((step, steps)) == 1 and step in (4, 9):
            raise PolicyError("the hours of this site are over")

    site = site_of(tmp_path / "watched", PATIENT, watch=watch)
    for _ in range(2):
        assert said(site, run, oracle(run, 2.0))[0] is PolicyError
    assert said(site, run, oracle(run, 2.0))[1] == b""

    assert seen == [
        (0, 0),
        *((k, 10) for k in range(1, 5)),
        (0, 0),
        *((k, 10) for k in range(5, 10)),
        (0, 0),
        (10, 10),
    ]
    assert all(not array.any() for array in kept(site).values())


BOUNDED = {"x": {"type": "number", "max": TAU}, "y": {"type": "label"}}


@pytest.mark.parametrize("base", [CLIENT, {**CLIENT, "client_privacy": None}])
@pytest.mark.parametrize("secure", [True, False])
def test_a_contract_that_a_coordinator_asks_by_names_no_row(
    pair: tuple[Site, Site], base: dict[str, Any], secure: bool
) -> None:
    changes = {} if secure else {"secure_aggregation": None}
    run = config(base, data__columns=BOUNDED, **changes)

    with pytest.raises(DataError) as refused:
        pair[0].sizes(run)

    hides = secure or run.client_privacy is not None
    assert ("row 300" in str(refused.value)) is not hides
    assert str(refused.value).startswith("the records do not keep the data contract") is hides
