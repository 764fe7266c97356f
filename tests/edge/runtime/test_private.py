"""Private training on a device: what is promised, what is drawn, and what may leave."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from anabranch.client.privacy import DpPlan
from anabranch.client.tuning.active import only
from anabranch.client.tuning.clipping import total_norms
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.prefix import PrefixCache
from anabranch.client.tuning.private import private_steps
from anabranch.client.tuning.randomness import Randomness as SiteRandomness
from anabranch.edge.runtime.device_file import Budget
from anabranch.edge.runtime.joint import open_engine
from anabranch.edge.runtime.ledger import DeviceLedger
from anabranch.edge.runtime.private import (
    RESERVATION,
    DevicePlan,
    PrivateSteps,
    plan_for,
    plan_given,
    require_private,
    run_privately,
    saved_reservation,
)
from anabranch.edge.runtime.training import Checkpoints, train
from anabranch.protocols.adapter import WHOLE
from anabranch.protocols.errors import DeviceError, PrivacyError
from anabranch.protocols.randomness import Randomness
from anabranch.protocols.rdp import epsilon_of
from anabranch.protocols.tables import Privacy, Training

Make = Callable[..., Any]
ROOT = Path(__file__).parents[3]
KEY = bytes(range(32))
RECORDS = 40
PLAN = DevicePlan(
    noise_multiplier=1.5, clipping_norm=0.7, sample_rate=0.25, steps=6, delta=1e-3, epsilon=9.0
)
SILENT = replace(PLAN, noise_multiplier=1e-30, sample_rate=1.0)


def steps_of(plan: DevicePlan = PLAN, *, steps: int = 6, done: int = 0, n: int = RECORDS) -> Any:
    return PrivateSteps(plan, steps, n, Randomness(KEY), done)


def zeros(size: int = 7) -> dict[str, NDArray[np.float32]]:
    return {"a": np.zeros(size, np.float32), "b": np.zeros((2, 3), np.float32)}


@pytest.fixture
def ledger(tmp_path: Path) -> DeviceLedger:
    return DeviceLedger(tmp_path / "device" / "ledger.sqlite", tmp_path / "state")


def go(private: Any, steps: range) -> None:
    for step in steps:
        private.steps.sample(step)
        private.steps.finish(zeros(), step)


# The plan


@settings(max_examples=20, deadline=None)
@given(
    epsilon=st.floats(0.3, 8),
    num_examples=st.integers(30, 2000),
    batch_size=st.integers(1, 128),
    steps=st.integers(1, 400),
)
def test_a_plan_never_costs_more_than_its_budget_and_wastes_little(
    epsilon: float, num_examples: int, batch_size: int, steps: int
) -> None:
    training = Training(batch_size=batch_size)
    plan = plan_for(Privacy(epsilon=epsilon), training, steps, num_examples)

    assert plan.epsilon <= epsilon == plan.budget
    assert plan.epsilon == epsilon_of([plan.spend(steps)], plan.delta)
    assert plan.sample_rate == min(1.0, batch_size / num_examples)
    assert plan.delta == 1 / (10 * num_examples)
    less = replace(plan, noise_multiplier=plan.noise_multiplier - 1e-3)
    assert epsilon_of([less.spend(steps)], plan.delta) > epsilon


def test_a_plan_keeps_delta_and_norm_that_are_given() -> None:
    plan = plan_for(Privacy(epsilon=3, delta=1e-4, clipping_norm=0.2), Training(), 10, 100)

    assert (plan.delta, plan.clipping_norm, plan.steps) == (1e-4, 0.2, 10)


def given_plan(**changes: Any) -> DevicePlan:
    values: dict[str, Any] = {
        "noise_multiplier": 1.5,
        "clipping_norm": 0.7,
        "sample_rate": 0.25,
        "delta": 1e-3,
        "training": Training(),
        "steps": 6,
        "num_examples": RECORDS,
    }
    return plan_given(**(values | changes))


def test_the_plan_of_a_task_is_the_tasks_and_its_epsilon_our_own() -> None:
    plan = given_plan()

    assert plan.epsilon == epsilon_of([plan.spend(6)], 1e-3)
    assert plan.budget is None
    bundled = given_plan(privacy=Privacy(epsilon=5, delta=1e-4))
    assert (bundled.budget, bundled.delta) == (5, 1e-4)  # the stricter δ
    assert bundled.epsilon > plan.epsilon


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_multiplier": math.nan}, "leaves nothing to learn"),
        ({"noise_multiplier": 0.0}, "expected noise_multiplier > 0"),
        ({"noise_multiplier": 1e6}, "leaves nothing to learn"),
        ({"noise_multiplier": 0.01}, "cost epsilon inf .* above 100 of any training"),
        ({"sample_rate": math.nan}, "leaves nothing to learn"),
        ({"sample_rate": 1e-9}, "leaves nothing to learn"),
        ({"sample_rate": 1.5}, r"expected sample_rate in \(0, 1\]"),
        ({"clipping_norm": 0.0}, "clipping_norm is 0"),
        ({"clipping_norm": math.inf}, "clipping_norm is inf"),
        ({"delta": 0.5}, "not above 0 and below 1/n = 0.025"),
        ({"delta": math.nan}, "not above 0 and below"),
        ({"delta": 1e-60}, "which is what can be accounted for"),
        ({"steps": 0}, "0 steps"),
        ({"num_examples": 0}, "0 records"),
        ({"privacy": Privacy(epsilon=0.1)}, "above 0.1 of its bundle. Nothing is trained"),
        ({"privacy": Privacy(epsilon=9, clipping="automatic")}, "clip flat alone"),
        ({"training": Training(class_weights="balanced")}, "no class weights"),
        ({"training": Training(class_weights=(1.0, 2.0))}, "no class weights"),
    ],
)
def test_a_task_that_cannot_be_kept_private_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PrivacyError, match=message):
        given_plan(**changes)


@pytest.mark.parametrize(
    ("privacy", "training", "records", "message"),
    [
        (Privacy(epsilon=3, clipping="adaptive"), Training(), 50, "clipping = 'adaptive': devices"),
        (Privacy(epsilon=3, clipping="per-layer"), Training(), 50, 'Set clipping = "flat"'),
        (Privacy(epsilon=3), Training(class_weights="balanced"), 50, "no class weights"),
        (Privacy(epsilon=3), Training(class_weights=(1.0, 2.0)), 50, "no class weights"),
        (Privacy(epsilon=3, delta=0.05), Training(), 50, "releasing whole records"),
        (Privacy(epsilon=3), Training(), 0, "0 records"),
        (Privacy(epsilon=1e-6, delta=1e-9), Training(), 5, "cannot be reached"),
    ],
)
def test_what_a_device_cannot_promise_is_refused_by_name(
    privacy: Privacy, training: Training, records: int, message: str
) -> None:
    with pytest.raises(PrivacyError, match=message):
        plan_for(privacy, training, 10, records)


def test_a_device_with_a_budget_trains_privately_alone() -> None:
    require_private(None, None)
    require_private(Budget(epsilon=3, delta=1e-5), PLAN)
    with pytest.raises(PrivacyError, match=r"\[budget\] of device\.toml allows private training"):
        require_private(Budget(epsilon=3, delta=1e-5), None)


# Batches and noise


def test_batches_are_poisson_samples() -> None:
    steps, sizes, counts = steps_of(steps=2000), [], np.zeros(RECORDS)
    for step in range(2000):
        rows = steps.sample(step)
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()
        sizes.append(len(rows))
        counts[rows] += 1
        steps.finish(zeros(), step)

    assert np.mean(sizes) == pytest.approx(10, abs=0.3)
    assert np.var(sizes) == pytest.approx(RECORDS * 0.25 * 0.75, rel=0.15)  # a shuffle has 0
    assert counts.min() > 400  # of 500 on average, 5 standard deviations
    assert counts.max() < 600


def test_a_full_batch_has_everybody() -> None:
    steps = steps_of(replace(PLAN, sample_rate=1.0))

    assert steps.sample(0).tolist() == list(range(RECORDS))


def test_noise_has_the_scale_of_the_plan_and_one_wrong_by_3_percent_is_noticed() -> None:
    steps, size = steps_of(), 40_000
    steps.sample(0)
    noisy = steps.finish({"a": np.zeros(size, np.float32)}, 0)["a"]
    unit = noisy.astype(np.float64) * (0.25 * RECORDS) / (1.5 * 0.7)

    low, high = stats.chi2.ppf([1e-6, 1 - 1e-6], size)
    assert low < (unit**2).sum() < high
    assert stats.kstest(unit, "norm").pvalue > 0.01
    for wrong in (0.97, 1.03):
        assert not low < ((unit * wrong) ** 2).sum() < high


def test_every_value_of_every_step_has_noise_of_its_own() -> None:
    steps, drawn = steps_of(), []
    for step in range(6):
        steps.sample(step)
        drawn += [array.ravel() for array in steps.finish(zeros(200), step).values()]
    values = np.concatenate(drawn)

    assert len(np.unique(values)) == len(values)
    assert abs(np.corrcoef(drawn[0], drawn[2])[0, 1]) < 0.4  # 5.6 standard deviations


def test_the_mean_is_the_sum_over_the_expected_batch() -> None:
    steps = steps_of(SILENT)
    steps.sample(0)
    sums = {"a": np.array([1.0, -2.0], np.float32), "b": np.full((1, 3), 0.5, np.float32)}
    noisy = steps.finish(sums, 0)

    for name, array in sums.items():
        assert noisy[name].dtype == np.float32
        assert noisy[name].shape == array.shape
        np.testing.assert_allclose(noisy[name], array / RECORDS, rtol=1e-6)
    assert sums["a"][0] == 1.0  # what came in is as it was


def test_an_empty_batch_is_a_step_of_noise() -> None:
    steps = steps_of(replace(PLAN, sample_rate=1e-4), steps=1)

    assert steps.sample(0).size == 0
    noisy = steps.finish(zeros(), 0)

    assert all(bool(array.all()) for array in noisy.values())
    assert steps.ran == replace(PLAN, sample_rate=1e-4).spend(1)


def test_fresh_runs_share_nothing(ledger: DeviceLedger) -> None:
    drawn = []
    for _ in range(2):
        with run_privately(ledger, PLAN, run="r", steps=1, num_examples=RECORDS) as private:
            private.steps.sample(0)
            drawn.append(private.steps.finish({"a": np.zeros(1000, np.float32)}, 0)["a"])

    assert abs(np.corrcoef(drawn[0], drawn[1])[0, 1]) < 0.25  # 8 standard deviations


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        ({"a": np.array([np.nan], np.float32)}, "not finite"),
        ({"a": np.array([np.inf], np.float32)}, "not finite"),
        ({"a": np.array([RECORDS * 0.7 * 1.01], np.float32)}, "graph does not clip"),
        ({}, "is missing"),
    ],
)
def test_sums_that_clipped_gradients_cannot_have_are_refused(
    sums: dict[str, Any], message: str
) -> None:
    steps = steps_of(replace(PLAN, sample_rate=1.0))
    steps.sample(0)

    with pytest.raises(PrivacyError, match=message):
        steps.finish(sums, 0)


def test_steps_come_in_order_and_not_beyond_what_was_reserved() -> None:
    steps = steps_of(steps=2)
    with pytest.raises(PrivacyError, match="step 0 was not sampled"):
        steps.finish(zeros(), 0)
    with pytest.raises(PrivacyError, match="step 1 cannot be sampled: 0 of 2"):
        steps.sample(1)
    steps.sample(0)
    assert steps.ran is None
    with pytest.raises(PrivacyError, match="and the next one is open"):
        steps.sample(0)
    steps.finish(zeros(), 0)
    with pytest.raises(PrivacyError, match="step 0 cannot be sampled: 1 of 2"):
        steps.sample(0)  # what was released to the optimiser is not drawn again
    steps.sample(1)
    steps.finish(zeros(), 1)
    with pytest.raises(PrivacyError, match="step 2 cannot be sampled: 2 of 2 reserved steps ran"):
        steps.sample(2)
    assert steps.ran == PLAN.spend(2)


def test_a_saved_state_goes_on_where_it_was_or_before_but_not_after() -> None:
    later, anew = steps_of(done=3), steps_of(done=3)

    with pytest.raises(PrivacyError, match="step 4 cannot be sampled: 3 of 6"):
        later.sample(4)
    later.sample(3)
    later.finish(zeros(), 3)
    assert later.ran == PLAN.spend(4)
    anew.sample(0)
    anew.finish(zeros(), 0)
    assert anew.ran == PLAN.spend(1)
    assert steps_of(done=6).ran == PLAN.spend(6)  # killed after the last step


# The gate


def test_what_ran_as_planned_may_leave_and_nothing_else(ledger: DeviceLedger) -> None:
    with run_privately(ledger, PLAN, run="r", steps=6, num_examples=RECORDS) as private:
        assert ledger.history() == [PLAN.spend(6)]  # before the first step
        go(private, range(6))
        with pytest.raises(PrivacyError, match="is not settled: nothing may leave"):
            private.released("adapter")

    assert private.released("adapter") == "adapter"
    assert private.head == ledger.head


@pytest.mark.parametrize("ran", [0, 1, 5])
def test_fewer_steps_than_reserved_settle_nothing(ledger: DeviceLedger, ran: int) -> None:
    with (
        pytest.raises(PrivacyError, match=r"planned .*6\), ran .* what was trained is discarded"),
        run_privately(ledger, PLAN, run="r", steps=6, num_examples=RECORDS) as private,
    ):
        go(private, range(ran))

    with pytest.raises(PrivacyError, match="nothing may leave"):
        private.released(0)
    assert ledger.history() == [PLAN.spend(6)]


def test_a_training_that_breaks_off_counts_and_goes_on_under_its_reservation(
    ledger: DeviceLedger,
) -> None:
    about: dict[str, Any] = {"run": "r", "steps": 6, "num_examples": RECORDS}
    runs: list[Any] = []

    def stopped() -> None:
        with run_privately(ledger, PLAN, **about) as private:
            runs.append(private)
            go(private, range(4))
            raise DeviceError("conditions were lost")

    with pytest.raises(DeviceError, match="conditions"):
        stopped()
    (first,) = runs
    with pytest.raises(PrivacyError, match="nothing may leave"):
        first.released(0)

    with run_privately(ledger, PLAN, entry=first.entry, done=3, **about) as second:
        go(second, range(3, 6))

    assert second.released(1) == 1
    assert ledger.history() == [PLAN.spend(6)]
    with (
        pytest.raises(PrivacyError, match="is not open: it is settled"),
        run_privately(ledger, PLAN, entry=first.entry, done=3, **about),
    ):
        pytest.fail("a reservation is settled once")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "other"}, "begin it anew; what was reserved counts"),
        ({"steps": 5}, "begin it anew; what was reserved counts"),
        ({"num_examples": RECORDS + 1}, "begin it anew; what was reserved counts"),
        ({"plan": replace(PLAN, noise_multiplier=1.4)}, "begin it anew"),
        ({"done": 7}, "7 steps ran before, of 6"),
        ({"done": -1}, "-1 steps ran before"),
        ({"entry": 99}, "entry 99 is not open"),
        ({"entry": None, "done": 2}, "no reservation of them is given"),
        ({"steps": 7}, "7 steps are not within the plan's 6"),
        ({"steps": 0}, "0 steps are not within"),
        ({"num_examples": 0}, "0 records"),
        ({"num_examples": 5000}, "releasing whole records"),
    ],
)
def test_another_training_cannot_take_up_a_reservation(
    ledger: DeviceLedger, changes: dict[str, Any], message: str
) -> None:
    entry = ledger.reserve(PLAN.spend(6), "r", RECORDS)
    values: dict[str, Any] = {
        "run": "r",
        "steps": 6,
        "num_examples": RECORDS,
        "entry": entry,
        "done": 3,
    }
    plan = changes.get("plan", PLAN)
    values |= {name: value for name, value in changes.items() if name != "plan"}
    before = ledger.events()

    with pytest.raises(PrivacyError, match=message), run_privately(ledger, plan, **values):
        pytest.fail("trained")
    assert ledger.events() == before


def test_budgets_of_run_and_device_stop_a_training_before_it_begins(ledger: DeviceLedger) -> None:
    plan = plan_for(Privacy(epsilon=3), Training(batch_size=10), 20, RECORDS)

    def attempt(run: str, budget: Budget | None = None) -> None:
        about: Any = {"run": run, "steps": 10, "num_examples": RECORDS, "budget": budget}
        with run_privately(ledger, plan, **about) as private:
            go(private, range(10))

    attempt("a")
    attempt("a")  # the whole run, as planned
    with pytest.raises(PrivacyError, match=r"above the budget of run 'a' of 3: 20 steps are spent"):
        attempt("a")
    with pytest.raises(PrivacyError, match=r"above the \[budget\] of device\.toml of 3"):
        attempt("b", Budget(epsilon=3, delta=plan.delta))
    attempt("b")
    assert len(ledger.history()) == 3


def test_a_ledger_that_cannot_be_trusted_stops_before_training_and_before_release(
    ledger: DeviceLedger,
) -> None:
    about: dict[str, Any] = {"run": "r", "steps": 2, "num_examples": RECORDS}
    runs: list[Any] = []

    def attempt() -> None:
        with run_privately(ledger, PLAN, **about) as private:
            runs.append(private)
            go(private, range(2))
            ledger.path.unlink()

    for _ in range(2):
        with pytest.raises(PrivacyError, match="ledger is missing"):
            attempt()
    (private,) = runs  # the second one did not begin
    with pytest.raises(PrivacyError, match="nothing may leave"):
        private.released(0)


# Kills

KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from anabranch.edge.runtime.ledger import DeviceLedger
from anabranch.edge.runtime.private import DevicePlan, run_privately
folder, at = Path(sys.argv[1]), sys.argv[2]

def now(point):
    if point == at:
        os.kill(os.getpid(), signal.SIGKILL)

plan = DevicePlan(noise_multiplier=1.5, clipping_norm=0.7, sample_rate=0.25, steps=6, delta=1e-3,
                  epsilon=9.0)
ledger = DeviceLedger(folder / "device" / "ledger.sqlite", folder / "state")
now("start")
with run_privately(ledger, plan, run="r", steps=3, num_examples=40) as private:
    now("reserved")
    for step in range(3):
        private.steps.sample(step)
        now(f"sampled {step}")
        private.steps.finish({"a": np.zeros(3, np.float32)}, step)
        now(f"finished {step}")
now("settled")
(folder / "delta").write_text(private.released("noisy"))
"""


@pytest.mark.parametrize(
    ("at", "spent", "settled"),
    [
        ("start", 0, 0),
        ("reserved", 1, 0),
        *((f"{what} {step}", 1, 0) for step in range(3) for what in ("sampled", "finished")),
        ("settled", 1, 1),
        ("never", 1, 1),
    ],
)
def test_a_kill_at_any_point_forgets_no_spend_and_lets_nothing_out_early(
    tmp_path: Path, at: str, spent: int, settled: int
) -> None:
    code = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), at], cwd=ROOT, check=False
    ).returncode

    assert code == (0 if at == "never" else -signal.SIGKILL)
    assert (tmp_path / "delta").exists() == (at == "never")
    ledger = DeviceLedger(tmp_path / "device" / "ledger.sqlite", tmp_path / "state")
    assert ledger.history() == [PLAN.spend(3)] * spent
    state = ledger.state()
    assert settled == (0 if state is None else len(state.settled))
    if spent > settled:
        with run_privately(
            ledger, PLAN, run="r", steps=3, num_examples=40, entry=2, done=2
        ) as private:
            go(private, range(2, 3))
        assert private.released(1) == 1
        assert ledger.history() == [PLAN.spend(3)]


# With the engine and the training loop


def test_a_training_under_privacy_is_killed_goes_on_and_is_released(
    make_tiny: Make, make_records: Make, ledger: DeviceLedger, tmp_path: Path
) -> None:
    bundle = make_tiny("table")
    records = make_records(bundle, RECORDS)
    training = Training(optimizer="sgd", batch_size=10, learning_rate=0.1)
    plan = plan_for(Privacy(epsilon=8), training, 5, len(records))
    folder = tmp_path / "training"
    stopped = False

    def stops() -> bool:
        nonlocal stopped
        due = not stopped and saved_reservation(folder)[1] >= 2
        stopped = stopped or due
        return due

    def attempt() -> Any:
        entry, done = saved_reservation(folder)
        engine = open_engine(bundle)
        with run_privately(
            ledger, plan, run="r", steps=5, num_examples=len(records), entry=entry, done=done
        ) as private:
            about = {"bundle": bundle.digest, RESERVATION: str(private.entry)}
            trained = train(
                engine,
                records,
                training,
                steps=5,
                seed=0,
                checkpoints=Checkpoints(folder=folder, about=about, every=1),
                should_stop=stops,
                private=private.steps,
            )
        return private.released(trained)

    with pytest.raises(DeviceError, match="stopped"):
        attempt()
    entry, done = saved_reservation(folder)
    assert entry == 2
    assert 0 < done < 5
    trained = attempt()

    assert trained.resumed_at == done
    assert ledger.history() == [plan.spend(5)]
    assert all(np.isfinite(array).all() for array in trained.delta.arrays.values())
    assert not trained.losses.any()


def test_a_state_without_a_reservation_has_none(tmp_path: Path) -> None:
    assert saved_reservation(tmp_path) == (None, 0)


@pytest.mark.parametrize("norm", [0.05, 0.5, 1e3])
def test_norms_and_clipped_sums_are_those_of_the_sites_engine(
    make_classifier: Make, norm: float
) -> None:
    import onnxruntime

    from anabranch.edge.export.joint import step_graph

    classifier = make_classifier("text")
    texts = ["acute fracture of the femur", "chronic heart failure", "infarction", "left arm with"]
    features, labels = classifier.encode(texts * 2), torch.tensor([0, 1, 2, 0, 1, 2, 1, 0])
    prepared = PrefixCache(1 << 24).prepare(classifier, texts * 2)
    norms, sums = by_the_sites(classifier, Examples(prepared, labels), norm)

    width = max(map(len, features))
    feeds: dict[str, Any] = {
        "input_ids": np.stack([np.pad(f.numpy(), (0, width - len(f))) for f in features]),
        "attention_mask": np.stack([np.arange(width) < len(f) for f in features]).astype(np.int64),
        "labels": labels.numpy(),
        "weights": np.ones(len(labels), np.float32),
        "clipping_norm": np.array(norm, np.float32),
    }
    model = step_graph(classifier, clipped=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    inputs = [i.name for i in session.get_inputs()]
    adapter = {n: a.detach().numpy() for n, a in adapter_of(classifier).items()}
    outputs = [o.name for o in session.get_outputs()]
    values = session.run(outputs, {n: (feeds | adapter)[n] for n in inputs})
    found = dict(zip(outputs, values, strict=True))

    np.testing.assert_allclose(found["norms"], norms, rtol=1e-4)
    for name, array in sums.items():
        scale = float(np.abs(array).max())
        np.testing.assert_allclose(found[f"{name}.grad"], array, atol=1e-4 * scale, err_msg=name)


def adapter_of(classifier: Any) -> dict[str, torch.Tensor]:
    from anabranch.client.tuning.lora import trainable_parameters

    return dict(trainable_parameters(classifier))


def by_the_sites(classifier: Any, examples: Examples, norm: float) -> tuple[Any, dict[str, Any]]:
    """Return norms and clipped sums as a site's step computes them, without noise."""
    n = len(examples)
    plan = DpPlan(
        noise_multiplier=1e-30,
        clipping="flat",
        clipping_norm=norm,
        sample_rate=1.0,
        steps=1,
        delta=1e-5,
        epsilon=1.0,
    )
    config = Training(optimizer="sgd", momentum=0.0, learning_rate=1e-9, batch_size=n)
    randomness = SiteRandomness.reproducible(torch.Generator().manual_seed(0))
    with (
        only(classifier, WHOLE) as active,
        private_steps(classifier, active, plan, config, n, randomness) as step,
    ):
        with torch.enable_grad():
            gradients = step._gradients.gradients(examples)
        blocks = gradients.blocks(step._flat.slots, packed=True)
        norms = total_norms(torch.stack([block.norms() for _, block in blocks])).numpy().copy()
        step(examples)
        sums = {m: p.grad.numpy() * n for m, p in active.parameters.items() if p.grad is not None}
        assert step.engine == "fast"
        return norms, {name: array.copy() for name, array in sums.items()}
