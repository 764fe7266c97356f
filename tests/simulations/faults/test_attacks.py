from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from anabranch.client.data.records import Records
from anabranch.protocols.errors import ConfigError
from anabranch.server.evaluation import logits
from anabranch.simulations.faults.attacks import (
    LARGEST,
    backdoor,
    backdoor_success,
    label_flip,
    rng_of,
    scaled,
    triggered,
    with_trigger,
)
from anabranch.simulations.faults.plan import (
    Backdoor,
    Corrupt,
    Crash,
    Fault,
    LabelFlip,
    Late,
    Scale,
    SignFlip,
    Trigger,
)
from tests.simulations.faults.liars import accuracy, digits_run, federate, held_out
from tests.simulations.rig import adapter

LABELS = np.array([0, 1, 2, 2, 1], np.int64)
TABLE = Records(np.zeros((5, 3), np.float32), LABELS, tuple(bytes([i]) for i in range(5)))
IMAGES = Records(np.zeros((5, 1, 4, 4), np.float32), LABELS)
TEXTS = Records([f"text {i}" for i in range(5)], LABELS)
LIARS = (1, 5)


# Laws


@given(labels=hnp.arrays(np.int64, st.integers(1, 20), elements=st.integers(0, 6)))
def test_labels_that_are_flipped_twice_are_as_they_were(labels: np.ndarray) -> None:
    records = Records(np.zeros((len(labels), 2), np.float32), labels)

    flipped = label_flip(records, 7)

    np.testing.assert_array_equal(flipped.labels + labels, 6)
    np.testing.assert_array_equal(label_flip(flipped, 7).labels, labels)


@given(share=st.floats(0.01, 1.0), seed=st.integers(0, 100))
def test_a_backdoor_changes_its_share_of_the_records_and_no_other(share: float, seed: int) -> None:
    for records in (TABLE, IMAGES, TEXTS):
        bad = backdoor(records, Trigger(), target=0, share=share, rng=rng_of(seed, "b"))
        marked = with_trigger(records, Trigger())

        changed = [i for i in range(5) if not same(bad.inputs[i], records.inputs[i])]
        assert len(changed) == int(np.ceil(share * 5))
        assert all(same(bad.inputs[i], marked.inputs[i]) for i in changed)
        assert all(bad.labels[i] == 0 for i in changed)
        assert all(bad.labels[i] == LABELS[i] for i in range(5) if i not in changed)
        assert bad.rows == records.rows


@given(factor=st.floats(-1e300, 1e300), value=st.floats(-(2.0**126), 2.0**126, width=32))
def test_a_scaled_delta_is_always_a_delta(factor: float, value: float) -> None:
    delta = adapter(value).minus(adapter(), num_examples=7, steps=2)

    lie = scaled(delta, factor)

    assert (lie.num_examples, lie.steps, lie.part) == (7, 2, delta.part)
    wanted = min(max(value * factor, -LARGEST), LARGEST)
    assert float(lie.arrays["head.weight"][0, 0]) == np.float32(wanted)


# Examples


def same(a: object, b: object) -> bool:
    return bool(np.all(np.asarray(a) == np.asarray(b)))


def test_the_trigger_of_an_image_is_a_white_patch_in_its_last_corner() -> None:
    inputs = with_trigger(IMAGES, Trigger(patch=2)).inputs

    assert not isinstance(inputs, list)
    np.testing.assert_array_equal(
        inputs[0, 0], [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    )
    assert not isinstance(IMAGES.inputs, list)
    assert IMAGES.inputs.sum() == 0


def test_the_trigger_of_a_text_is_a_token_and_of_a_table_a_value() -> None:
    assert with_trigger(TEXTS, Trigger(token="mn")).inputs[0] == "mn text 0"
    inputs = with_trigger(TABLE, Trigger(feature=1, value=4.0)).inputs
    assert list(inputs[0]) == [0.0, 4.0, 0.0]


def test_a_table_without_the_feature_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trigger.feature = 3: the model sees 3 features"):
        with_trigger(TABLE, Trigger(feature=3))


def test_success_counts_records_of_other_labels_alone() -> None:
    def always(label: int) -> float | None:
        return backdoor_success(
            lambda records: np.eye(3, dtype=np.float32)[[label] * len(records)],
            TABLE,
            Trigger(),
            1,
        )

    assert len(triggered(TABLE, Trigger(), 1)) == 3
    assert (always(1), always(0)) == (1.0, 0.0)
    ones = TABLE.take([1, 4])
    assert (
        backdoor_success(lambda records: np.zeros((0, 3), np.float32), ones, Trigger(), 1) is None
    )


# A real run: ten clients of a hundred digits, two of them liars


def flips() -> list[Fault]:
    return [SignFlip(client=i, factor=4.0) for i in LIARS]


def test_two_liars_ruin_a_mean_and_robust_rules_hold(tmp_path: Path) -> None:
    honest, ruined = federate(tmp_path), federate(tmp_path, flips())

    assert accuracy(honest) > 0.85
    assert accuracy(ruined) < 0.5
    for rule in ("norm-clipping", "krum"):
        table = f'[robust]\nrule = "{rule}"\nbyzantine = 2\n'
        assert accuracy(federate(tmp_path, flips(), extra=table)) > 0.75, rule


def test_a_backdoor_works_unseen_and_krum_leaves_it_out(tmp_path: Path) -> None:
    plan: list[Fault] = [Backdoor(client=i, target=0, share=0.7) for i in LIARS]
    plan += [Scale(client=i, factor=5.0) for i in LIARS[:1]]
    krum = '[robust]\nrule = "krum"\nbyzantine = 2\n'

    score, success = seen(tmp_path, plan)
    assert score > 0.8
    assert success > 0.9
    assert seen(tmp_path, plan, krum)[1] < 0.1


def seen(folder: Path, plan: list[Fault], extra: str = "") -> tuple[float, float]:
    """Return the accuracy of a run under a plan, and its backdoor's success."""
    run, result = digits_run(extra), federate(folder, plan, extra=extra)
    success = backdoor_success(
        lambda records: logits(run, result.adapter, records), held_out(), Trigger(), 0
    )
    assert success is not None
    return accuracy(result), success


def test_flipped_labels_are_trained_on(tmp_path: Path) -> None:
    everybody = [LabelFlip(client=i) for i in range(10)]

    result = federate(tmp_path, everybody)

    run = digits_run()
    truth, said = held_out().labels, logits(run, result.adapter, held_out()).argmax(axis=1)
    assert np.mean(said == 9 - truth) > 0.85


def test_a_faulty_run_is_the_same_on_every_engine(tmp_path: Path) -> None:
    plan: list[Fault] = [
        *flips(),
        LabelFlip(client=2),
        Backdoor(client=3, target=1),
        Crash(client=4, round=1, steps=3),
        Corrupt(client=6, round=2),
        Late(client=7, round=1, seconds=5.0),
    ]
    cohort, alone = (federate(tmp_path, plan, engine=e) for e in ("cohort", "sequential"))

    for name, array in cohort.adapter.arrays.items():
        np.testing.assert_allclose(array, alone.adapter.arrays[name], rtol=0, atol=1e-5)
    assert [dict(r.failed) for r in cohort.history] == [dict(r.failed) for r in alone.history]
    assert {s for r in cohort.history for s in r.failed} == {"client-000004", "client-000006"}
