import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from anabranch.edge.runtime import state as states
from anabranch.edge.runtime.bundle_manifest import Limits
from anabranch.edge.runtime.data import Records
from anabranch.edge.runtime.engine import Batch, Gradients
from anabranch.edge.runtime.joint import open_engine
from anabranch.edge.runtime.steps import Interrupted, Schedule, clipped_sums
from anabranch.edge.runtime.training import Checkpoints, Trained, num_steps, train
from anabranch.protocols.errors import DeviceError, IncompatibleAdapter, PrivacyError
from anabranch.protocols.part import Part
from anabranch.protocols.spec import Arrays
from anabranch.protocols.tables import Training
from anabranch.protocols.wire import encode

Make = Callable[..., Any]
A, B = "hidden.0.lora_A.weight", "hidden.0.lora_B.weight"
ADAMW = Training(learning_rate=0.02, head_learning_rate=0.05, weight_decay=0.01, batch_size=8)
SGD = Training(
    optimizer="sgd", learning_rate=0.1, batch_size=5, schedule="cosine", warmup=0.3,
    class_weights="balanced",
)  # fmt: skip


def run(bundle: Any, records: Records, training: Training = ADAMW, **options: Any) -> Trained:
    engine = open_engine(bundle, memory_bytes=options.pop("memory_bytes", None))
    return train(engine, records, training, **({"seed": 3, "steps": 9} | options))


def checkpoints(folder: Path, every: int = 1, **about: str) -> Checkpoints:
    return Checkpoints(folder=folder, about={"bundle": "b", **about}, every=every)


def same(one: Trained, other: Trained) -> None:
    assert encode(one.adapter) == encode(other.adapter)
    np.testing.assert_array_equal(one.losses, other.losses)


# What it does


@pytest.mark.parametrize("kind", ["text", "table"])
@pytest.mark.parametrize("training", [ADAMW, SGD])
def test_the_loss_falls_and_the_result_is_told(
    make_tiny: Make, make_records: Make, kind: str, training: Training
) -> None:
    bundle = make_tiny(kind)
    records = make_records(bundle, 60)
    done = run(bundle, records, training, steps=40)
    assert np.mean(done.losses[-8:]) < 0.8 * np.mean(done.losses[:8])
    assert (done.steps, len(done.losses), done.resumed_at, done.note) == (40, 40, 0, None)
    assert encode(done.before) == encode(bundle.adapter)
    assert (done.delta.num_examples, done.delta.steps) == (60, 40)
    for name, array in done.adapter.arrays.items():
        moved = done.before.arrays[name] + done.delta.arrays[name]
        np.testing.assert_allclose(moved, array, atol=1e-6)


def test_the_same_arguments_give_the_same_bits_and_another_seed_does_not(
    make_tiny: Make, make_records: Make
) -> None:
    bundle = make_tiny("text")
    records = make_records(bundle, 40)
    same(run(bundle, records), run(bundle, records))
    assert encode(run(bundle, records, seed=4).adapter) != encode(run(bundle, records).adapter)


def test_micro_batches_do_not_change_the_result(make_tiny: Make, make_records: Make) -> None:
    bundle = make_tiny("text")
    small = make_tiny("text", limits=Limits(memory_bytes=10**9, max_records=3, max_tokens=16))
    records = make_records(bundle, 40)
    one, other = run(bundle, records), run(small, records)
    for name, array in one.adapter.arrays.items():
        np.testing.assert_allclose(other.adapter.arrays[name], array, atol=1e-4)


def test_steps_are_counted_as_on_a_site() -> None:
    assert num_steps(33, Training(batch_size=8, local_epochs=2)) == 10
    assert num_steps(33, Training(batch_size=8, local_epochs=2, local_steps=3)) == 3


@pytest.mark.parametrize(
    "part",
    [Part(factors="B"), Part(factors="A", dense=False), Part(factors="B", ranks=(1,), dense=False)],
)
@pytest.mark.parametrize("training", [ADAMW, SGD])
def test_what_is_not_in_the_part_is_the_same_afterwards_bit_for_bit(
    make_tiny: Make, make_records: Make, part: Part, training: Training
) -> None:
    bundle = make_tiny("table")
    training = msgspec.structs.replace(training, weight_decay=0.3)
    done = run(bundle, make_records(bundle, 30), training, part=part)
    spec = bundle.manifest.spec
    for name, mask in part.spread(spec, part.take(spec, {
        n: np.ones(s, np.float32) for n, s in spec.tensors
    })).items():  # fmt: skip
        before, after = done.before.arrays[name], done.adapter.arrays[name]
        np.testing.assert_array_equal(after[mask == 0], before[mask == 0])
        assert not mask.any() or not np.array_equal(after[mask == 1], before[mask == 1])
    assert done.delta.part == part


def test_a_strong_proximal_term_keeps_the_adapter_near_its_start(
    make_tiny: Make, make_records: Make
) -> None:
    bundle = make_tiny("table")
    records = make_records(bundle, 30)
    training = Training(optimizer="sgd", learning_rate=0.05, momentum=0.0, max_grad_norm=None)
    free = run(bundle, records, training, steps=30).delta.norm()
    assert run(bundle, records, training, steps=30, proximal_mu=10.0).delta.norm() < 0.3 * free


def test_the_schedule_goes_on_where_the_run_stands(make_tiny: Make, make_records: Make) -> None:
    bundle = make_tiny("table")
    records = make_records(bundle, 30)
    training = Training(optimizer="sgd", learning_rate=0.1, schedule="linear", momentum=0.0)
    late = Schedule(first_step=99, total_steps=100)
    early = run(bundle, records, training, steps=1, schedule=Schedule(total_steps=100))
    end = run(bundle, records, training, steps=1, schedule=late)
    assert end.delta.norm() == pytest.approx(early.delta.norm() / 100, rel=1e-4)


# Stopping and going on


def test_a_stop_before_any_micro_batch_saves_and_later_ends_with_the_same_bits(
    make_tiny: Make, make_records: Make, tmp_path: Path
) -> None:
    bundle = make_tiny("text", limits=Limits(memory_bytes=10**9, max_records=3, max_tokens=16))
    records = make_records(bundle, 40)
    whole = run(bundle, records)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked % 4 == 0  # a step has three micro-batches: most stops are within one

    stops, places = 0, set()
    while True:
        try:
            done = run(
                bundle, records, should_stop=stop, checkpoints=checkpoints(tmp_path, every=50)
            )
            break
        except Interrupted:
            found = states.read(tmp_path)
            assert found is not None
            places.add(found.step)
            stops += 1
    same(done, whole)
    assert stops >= 8
    assert len(places) >= 7  # after many different steps


def test_should_stop_is_asked_before_every_micro_batch(make_tiny: Make, make_records: Make) -> None:
    bundle = make_tiny("table", limits=Limits(memory_bytes=10**9, max_records=2, max_tokens=1))
    asked = []

    def stop() -> bool:
        asked.append(True)
        return False

    run(bundle, make_records(bundle, 32), steps=3, should_stop=stop)
    assert len(asked) == 3 * 4  # batches of 8, micro-batches of 2


def test_a_finished_state_gives_the_result_without_a_step(
    make_tiny: Make, make_records: Make, tmp_path: Path
) -> None:
    bundle = make_tiny("table")
    records = make_records(bundle, 20)
    first = run(bundle, records, checkpoints=checkpoints(tmp_path))
    again = run(bundle, records, checkpoints=checkpoints(tmp_path), should_stop=lambda: True)
    same(first, again)
    assert again.resumed_at == 9


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": 4}, "seed"),
        ({"steps": 8}, "configuration"),
        ({"proximal_mu": 0.1}, "configuration"),
        ({"part": Part(factors="B")}, "configuration"),
        ({"training": SGD}, "configuration"),
        ({"memory_bytes": 50 << 20}, "configuration"),
        ({"records": 19}, "records"),
        ({"about": "other"}, "bundle"),
    ],
)
def test_a_state_of_something_else_is_not_used_and_that_is_said(
    make_tiny: Make, make_records: Make, tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    bundle = make_tiny("table")
    records = make_records(bundle, 20)
    run(bundle, records, steps=9, checkpoints=checkpoints(tmp_path))
    change = dict(change)
    other = records.take(range(change.pop("records", 20)))
    where = checkpoints(tmp_path, bundle=change.pop("about", "b"))
    done = run(bundle, other, checkpoints=where, **change)
    assert (done.resumed_at, done.note) == (
        0,
        f"a saved state was not used: it is of a training with another {what}",
    )
    same(done, run(bundle, other, **change))
    left = states.read(tmp_path)
    assert left is not None
    assert left.step == done.steps


def test_a_state_of_another_start_is_not_used(
    make_tiny: Make, make_records: Make, tmp_path: Path
) -> None:
    bundle = make_tiny("table")
    records = make_records(bundle, 20)
    first = run(bundle, records, checkpoints=checkpoints(tmp_path))
    moved = replace(bundle, adapter=first.adapter)
    done = run(moved, records, checkpoints=checkpoints(tmp_path))
    assert done.note is not None
    assert done.note.endswith("another adapter")


def test_a_damaged_state_is_refused_and_the_engine_keeps_its_adapter(
    make_tiny: Make, make_records: Make, tmp_path: Path
) -> None:
    bundle = make_tiny("table")
    records = make_records(bundle, 20)
    run(bundle, records, checkpoints=checkpoints(tmp_path))
    path = tmp_path / states.FILE
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DeviceError, match="damaged"):
        run(bundle, records, checkpoints=checkpoints(tmp_path))


KILLED = """
import pickle, sys
from pathlib import Path
from types import SimpleNamespace
from anabranch.edge.runtime.data import Records
from anabranch.edge.runtime.joint import JointEngine
from anabranch.edge.runtime.training import Checkpoints, train
from anabranch.protocols.wire import encode

folder = Path(sys.argv[1])
bundle, adapter, manifest, training, records = pickle.loads((folder / "job").read_bytes())
engine = JointEngine(bundle, manifest, adapter)

def tell() -> bool:
    print("step", flush=True)
    sys.stdin.readline()
    return False

done = train(engine, records, training, steps=30, seed=3, should_stop=tell,
             checkpoints=Checkpoints(folder=folder / "state", about={}, every=2))
(folder / "result").write_bytes(encode(done.adapter) + done.losses.tobytes())
"""


def test_a_training_killed_at_random_steps_ends_with_the_same_bits(
    make_tiny: Make, make_records: Make, tmp_path: Path
) -> None:
    bundle = make_tiny("text")
    records = make_records(bundle, 40)
    job = (bundle.folder, bundle.adapter, bundle.manifest, ADAMW, records)
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    rng, kills = random.Random(5), 0
    environment = os.environ | {"PYTHONPATH": ""}
    while not (tmp_path / "result").exists():
        patience = rng.randrange(3, 14)
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
        )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            for seen, _ in enumerate(process.stdout, 1):
                process.stdin.write(b"\n")  # one step further, and no more
                if seen == patience:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                    break
        assert process.returncode in (0, -signal.SIGKILL)
        assert kills < 40
    expected = run(bundle, records, steps=30)
    assert (tmp_path / "result").read_bytes() == encode(
        expected.adapter
    ) + expected.losses.tobytes()
    assert kills >= 2


# Privacy


class Steps:
    """Takes fixed rows and adds nothing: what private training must ask for, in order."""

    clipping_norm = 0.5

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows, self.calls, self.sums = rows, [], []  # type: ignore[var-annotated]

    def sample(self, step: int) -> NDArray[np.int64]:
        self.calls.append(("sample", step))
        return np.array(self.rows[step], np.int64)

    def finish(self, sums: Arrays, step: int) -> dict[str, NDArray[np.float32]]:
        self.calls.append(("finish", step))
        self.sums.append(sums)
        return {name: array / np.float32(4) for name, array in sums.items()}


def test_private_steps_get_clipped_sums_of_their_rows_and_no_loss_is_told(
    make_tiny: Make, make_records: Make
) -> None:
    bundle = make_tiny("table")
    records = make_records(bundle, 20)
    steps = Steps([[0, 5, 7], [], [2]])
    training = Training(optimizer="sgd", learning_rate=0.1, momentum=0.0, max_grad_norm=1e-9)
    done = run(bundle, records, training, steps=3, private=steps)

    assert steps.calls == [(what, i) for i in range(3) for what in ("sample", "finish")]
    batch = records.batch([0, 5, 7], np.ones(3, np.float32))
    expected = open_engine(bundle).grads(batch, clipping_norm=0.5).arrays
    for name, array in expected.items():
        np.testing.assert_allclose(steps.sums[0][name], array, atol=1e-6)
    assert not any(array.any() for array in steps.sums[1].values())
    assert not done.losses.any()
    total = sum(-0.1 * sums["head.bias"] / 4 for sums in steps.sums)  # not clipped once more
    np.testing.assert_allclose(done.delta.arrays["head.bias"], total, atol=1e-6)


def test_private_steps_see_what_is_trained_alone(make_tiny: Make, make_records: Make) -> None:
    bundle = make_tiny("table")
    steps = Steps([[0, 1]])
    part = Part(factors="B", ranks=(1,), dense=False)
    run(bundle, make_records(bundle, 9), steps=1, private=steps, part=part)
    assert list(steps.sums[0]) == [B]
    assert not steps.sums[0][B][:, 0].any()


def test_a_record_whose_gradient_is_not_finite_counts_as_nothing(
    make_tiny: Make, make_records: Make
) -> None:
    bundle = make_tiny("table")
    records = make_records(bundle, 4)
    good = clipped_sums(open_engine(bundle), records.batch([0, 2], np.ones(2, np.float32)), 0.5)
    np.asarray(records.features)[1] = 3e38
    batch = records.batch([0, 1, 2], np.ones(3, np.float32))
    raw = open_engine(bundle).grads(batch, clipping_norm=0.5)
    assert raw.norms is not None
    assert not np.isfinite(raw.norms).all()
    got = clipped_sums(open_engine(bundle), batch, 0.5)
    for name, array in good.arrays.items():
        np.testing.assert_allclose(got.arrays[name], array, atol=1e-6)


def test_private_training_refuses_class_weights_and_engines_that_do_not_clip(
    make_tiny: Make, make_records: Make
) -> None:
    bundle = make_tiny("table")
    records = make_records(bundle, 9)
    with pytest.raises(PrivacyError, match="no class weights"):
        run(bundle, records, SGD, private=Steps([[0]]))

    class Loose:
        def grads(self, batch: Batch, *, clipping_norm: float | None = None) -> Gradients:
            return open_engine(bundle).grads(batch)

    with pytest.raises(PrivacyError, match="it does not clip"):
        clipped_sums(Loose(), records.batch([0], np.ones(1, np.float32)), 1.0)  # type: ignore[arg-type]


# Refusals


def test_a_loss_that_is_not_finite_ends_the_training_and_the_adapter_stays(
    make_tiny: Make, make_records: Make
) -> None:
    bundle = make_tiny("table")
    engine = open_engine(bundle)
    training = Training(optimizer="sgd", learning_rate=1e30, max_grad_norm=None)
    with (
        np.errstate(all="ignore"),
        pytest.raises(
            DeviceError,
            match=r"not finite at step \d of 9|training loss is \S+ at step \d of 9: lower",
        ),
    ):
        train(engine, make_records(bundle, 20), training, steps=9, seed=0)
    for name, array in bundle.adapter.arrays.items():
        np.testing.assert_array_equal(engine.params()[name], array)


def test_trainings_that_cannot_be_are_refused(make_tiny: Make, make_records: Make) -> None:
    bundle = make_tiny("table")
    records = make_records(bundle, 5)
    with pytest.raises(DeviceError, match="no records to train on"):
        run(bundle, records.take([]))
    with pytest.raises(ValueError, match="at least one step, got 0"):
        run(bundle, records, steps=0)
    with pytest.raises(IncompatibleAdapter, match="expected different indices"):
        run(bundle, records, part=Part(ranks=(7,)))
