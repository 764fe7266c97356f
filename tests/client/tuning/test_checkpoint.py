"""A fit that was stopped goes on from its last state as if it had never been stopped."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from anabranch.client.privacy import DpPlan
from anabranch.client.tuning.checkpoint import State, Steps, decode, encode, read
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.client.tuning.private import PrivateFit, fit_private
from anabranch.client.tuning.randomness import Randomness
from anabranch.client.tuning.training import Fit, Schedule, fit
from anabranch.protocols.errors import PrivacyError, RunError
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Clipping, Training
from tests.client.tuning.private_rig import (
    CLIPPINGS,
    ENGINES,
    Sequences,
    examples,
    make,
    plan,
    values,
)

INPUTS = "a" * 64
STEPS = 7  # more than two epochs of 11 records in batches of 4
OPTIMISERS = {
    "adamw": Training(optimizer="adamw", learning_rate=0.05, weight_decay=0.3, batch_size=4),
    "momentum": Training(optimizer="sgd", learning_rate=0.3, momentum=0.9, batch_size=4),
    "sgd": Training(optimizer="sgd", learning_rate=0.3, momentum=0.0, batch_size=4),
    "schedule": Training(learning_rate=0.05, schedule="cosine", warmup=0.3, batch_size=4),
}
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "proximal": {"proximal_mu": 0.7},
    "part": {"part": Part(factors="B", ranks=(1,)), "proximal_mu": 0.2},
    "kept": {"part": Part(factors="A", dense=False), "kept": Part(factors="B")},
}


class Stopped(RunError):
    """What the watch raises."""


def stopper(after: int | None) -> Callable[[str, int, int], None]:
    def watch(activity: str, step: int, steps: int) -> None:
        assert (activity, steps) == ("training", STEPS)
        if step == after:
            raise Stopped("the hours are over")

    return watch


def steps(path: Path, after: int | None = None, *, seconds: float = 1e9, **more: Any) -> Steps:
    return Steps(path=path, inputs=INPUTS, watch=stopper(after), seconds=seconds, **more)


def train(training: Training, progress: Steps | None, **way: Any) -> tuple[Sequences, Fit]:
    """Train a new classifier, as another process would."""
    classifier = make()
    schedule = Schedule(first_step=2, total_steps=2 * STEPS)
    done = fit(
        classifier,
        examples(),
        training,
        steps=STEPS,
        schedule=schedule,
        seed=5,
        progress=progress,
        **way,
    )
    return classifier, done


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_fit_stopped_after_any_step_ends_bit_for_bit_as_one_that_was_not(
    tmp_path: Path, optimiser: str, way: str
) -> None:
    training, options = OPTIMISERS[optimiser], WAYS[way]
    whole, expected = train(training, None, **options)
    for after in range(1, STEPS + 1):
        path = tmp_path / str(after)
        with pytest.raises(Stopped):
            train(training, steps(path, after), **options)

        resumed, done = train(training, steps(path), **options)

        assert same(values(resumed), values(whole))
        assert (done.steps, done.loss) == (expected.steps, expected.loss)


def test_a_fit_may_be_stopped_at_every_step(tmp_path: Path) -> None:
    whole, expected = train(OPTIMISERS["adamw"], None)
    for after in range(1, STEPS + 1):
        with pytest.raises(Stopped):
            train(OPTIMISERS["adamw"], steps(tmp_path / "s", after))
    resumed, done = train(OPTIMISERS["adamw"], steps(tmp_path / "s"))

    assert same(values(resumed), values(whole))
    assert done.loss == expected.loss


def test_no_step_before_a_state_is_taken_again(tmp_path: Path) -> None:
    seen: list[int] = []
    with pytest.raises(Stopped):
        train(OPTIMISERS["sgd"], steps(tmp_path / "s", 4))
    again = Steps(
        path=tmp_path / "s", inputs=INPUTS, watch=lambda activity, step, of: seen.append(step)
    )
    train(OPTIMISERS["sgd"], again)

    assert seen == [5, 6, 7]


@given(seconds=st.integers(0, 9), slow=st.lists(st.integers(1, 5), min_size=9, max_size=9))
def test_a_state_is_written_when_so_many_seconds_have_passed(
    tmp_path_factory: pytest.TempPathFactory, seconds: int, slow: list[int]
) -> None:
    times = itertools.chain([0], itertools.accumulate(slow))
    now = [0]

    def clock() -> float:
        return float(now[0])

    path = tmp_path_factory.mktemp("steps") / "s"
    progress = Steps(path=path, inputs=INPUTS, seconds=seconds, clock=clock)
    next(times)
    written, last = [], 0
    for step, at in enumerate(times, 1):
        now[0] = at
        path.unlink(missing_ok=True)
        progress.after(step, 9, lambda step=step: State(step=step, tensors={}))  # type: ignore[misc]
        if path.exists():
            written.append(step)
            last = at
        assert at - last < seconds or at == last
    assert seconds or written == list(range(1, 10))


# Private fits


class Counting(Randomness):
    """Counts draws of noise, over all fits; every stream has a key of its own."""

    drawn = 0
    sampled = 0

    def normal(self, count: int) -> NDArray[np.float32]:
        type(self).drawn += count > 1  # the count of adaptive clipping is a draw of one
        return super().normal(count)

    def sample(self, count: int, rate: float) -> list[int]:
        type(self).sampled += 1
        return super().sample(count, rate)


PRIVATE = Training(learning_rate=0.05, batch_size=4, local_steps=STEPS)


def a_plan(clipping: Clipping = "flat") -> DpPlan:
    return plan(noise_multiplier=0.8, sample_rate=4 / 11, steps=2 * STEPS, clipping=clipping)


def privately(
    of: DpPlan, progress: Steps | None, randomness: Randomness, **options: Any
) -> tuple[Sequences, PrivateFit]:
    classifier = make()
    done = fit_private(
        classifier,
        examples(),
        of,
        PRIVATE,
        steps=STEPS,
        step_offset=STEPS,
        randomness=randomness,
        progress=progress,
        **options,
    )
    return classifier, done


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_a_private_fit_takes_the_planned_noisy_steps_however_often_it_is_stopped(
    tmp_path: Path, clipping: Clipping, engine: str
) -> None:
    of = a_plan(clipping)
    Counting.drawn = Counting.sampled = 0
    for after in (2, 3, 6):
        with pytest.raises(Stopped):
            privately(of, steps(tmp_path / "s", after), Counting.fresh(), engine=engine)

    classifier, done = privately(of, steps(tmp_path / "s"), Counting.fresh(), engine=engine)

    assert (Counting.drawn, Counting.sampled) == (STEPS, STEPS)  # no step was redone
    assert done.spend == of.spend(STEPS)
    assert not same(values(classifier), values(make()))


def test_steps_that_were_lost_are_taken_again_with_other_noise(tmp_path: Path) -> None:
    """The state is that after step 2; a process that came to step 5 died."""
    Counting.drawn = 0
    with pytest.raises(Stopped):
        privately(a_plan(), steps(tmp_path / "s", 2), Counting.fresh())
    state = (tmp_path / "s").read_bytes()
    ends = []
    for _ in range(2):
        (tmp_path / "s").write_bytes(state)
        with pytest.raises(Stopped):
            privately(a_plan(), steps(tmp_path / "s", 5), Counting.fresh())
        ends.append(read(tmp_path / "s", INPUTS))
    (tmp_path / "s").write_bytes(state)
    _, done = privately(a_plan(), steps(tmp_path / "s"), Counting.fresh())

    assert Counting.drawn == 2 + 3 + 3 + 5
    assert done.spend == a_plan().spend(STEPS)  # what the released chain has
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].step == ends[1].step == 5
    assert not same(dict(ends[0].tensors), dict(ends[1].tensors))


def test_with_the_same_noise_a_private_fit_goes_on_as_if_it_had_not_been_stopped(
    tmp_path: Path,
) -> None:
    """Adaptive clipping, moments and the schedule are those of the state."""
    of = a_plan("adaptive")
    whole, expected = privately(of, None, Randomness(b"k" * 32))
    resumed_noise = Randomness(b"k" * 32)
    with pytest.raises(Stopped):
        privately(of, steps(tmp_path / "s", 3), resumed_noise)  # the stream goes on where it was

    resumed, done = privately(of, steps(tmp_path / "s"), resumed_noise)

    assert same(values(resumed), values(whole))
    assert done == expected


def test_a_private_state_holds_nothing_without_noise(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        privately(a_plan("adaptive"), steps(tmp_path / "s", 3), Randomness.fresh())
    state = read(tmp_path / "s", INPUTS)

    assert state is not None
    kinds = {name.partition("/")[0] for name in state.tensors}
    moments = {name.rpartition("/")[2] for name in state.tensors if name.startswith("moment")}
    assert kinds == {"value", "moment"}
    assert moments == {"step", "exp_avg", "exp_avg_sq"}  # of noisy gradients
    assert state.losses == ()
    (ran,) = state.ran
    assert ran[0] == pytest.approx(0.8)
    assert ran[1:] == (4 / 11, 3)


def test_a_state_of_other_noise_is_not_published(tmp_path: Path) -> None:
    """Whatever a state says was run is held against the plan."""
    with pytest.raises(Stopped):
        privately(a_plan(), steps(tmp_path / "s", 3), Randomness.fresh())
    state = read(tmp_path / "s", INPUTS)
    assert state is not None
    quiet = State(
        step=3,
        tensors=state.tensors,
        ran=((0.1, 4 / 11, 3),),
        clipping_norm=state.clipping_norm,
    )
    (tmp_path / "s").write_bytes(encode(quiet, INPUTS))

    with pytest.raises(PrivacyError, match="the update is discarded"):
        privately(a_plan(), steps(tmp_path / "s"), Randomness.fresh())


# States that are not used


def test_a_state_of_other_inputs_is_as_good_as_none(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(OPTIMISERS["sgd"], steps(tmp_path / "s", 4))
    seen: list[int] = []
    other = Steps(
        path=tmp_path / "s", inputs="b" * 64, watch=lambda activity, step, of: seen.append(step)
    )
    train(OPTIMISERS["sgd"], other)

    assert seen == list(range(1, STEPS + 1))


@given(data=st.data())
def test_a_damaged_state_is_as_good_as_none(data: st.DataObject) -> None:
    classifier = make()
    tensors = {f"value/{n}": p for n, p in trainable_parameters(classifier).items()}
    written = encode(State(step=3, tensors=tensors, losses=((0.5, 4),)), INPUTS)
    at = data.draw(st.integers(0, len(written) - 1))
    flipped = bytes([written[at] ^ data.draw(st.integers(1, 255))])

    assert decode(written, INPUTS) is not None
    assert decode(written[:at] + flipped + written[at + 1 :], INPUTS) is None
    assert decode(written[:at], INPUTS) is None


def test_a_state_is_for_its_owner_alone_and_a_disk_that_is_full_stops_nothing(
    tmp_path: Path,
) -> None:
    with pytest.raises(Stopped):
        train(OPTIMISERS["sgd"], steps(tmp_path / "s", 1))
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600

    (tmp_path / "file").write_text("")
    whole, _ = train(OPTIMISERS["sgd"], None)
    trained, _ = train(OPTIMISERS["sgd"], steps(tmp_path / "file" / "s", seconds=0))
    assert same(values(trained), values(whole))
