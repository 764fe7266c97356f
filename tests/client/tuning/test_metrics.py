import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from sklearn import metrics as oracle

from anabranch.client.tuning.metrics import (
    auroc,
    calibration_error,
    confusion,
    evaluate,
    softmax,
)

Case = tuple[NDArray[np.float64], NDArray[np.int64]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Logits (n, k) with many ties, and labels (n,) of which some may be absent."""
    n, k = draw(st.integers(1, 30)), draw(st.integers(2, 6))
    halves = st.integers(-6, 6).map(lambda value: value / 2)
    return draw(hnp.arrays(np.float64, (n, k), elements=halves)), draw(
        hnp.arrays(np.int64, n, elements=st.integers(0, k - 1))
    )


def random_case(n: int, k: int, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    return rng.normal(size=(n, k)) + 1.5 * np.eye(k)[labels], labels


@given(case=cases())
def test_accuracy_f1_and_loss_are_those_of_scikit_learn(case: Case) -> None:
    logits, labels = case
    figures = evaluate(logits, labels)
    predicted = logits.argmax(axis=1)
    k = logits.shape[1]

    assert figures["accuracy"] == pytest.approx(oracle.accuracy_score(labels, predicted))
    assert figures["macro_f1"] == pytest.approx(
        oracle.f1_score(labels, predicted, average="macro", zero_division=0)
    )
    assert figures["loss"] == pytest.approx(
        oracle.log_loss(labels, softmax(logits), labels=range(k)), abs=1e-12
    )


@given(case=cases())
def test_confusion_is_that_of_scikit_learn(case: Case) -> None:
    logits, labels = case
    predicted, k = logits.argmax(axis=1), logits.shape[1]

    counts = confusion(predicted, labels, k)

    assert (counts == oracle.confusion_matrix(labels, predicted, labels=range(k))).all()


@given(
    scores=hnp.arrays(np.float64, st.integers(2, 40), elements=st.sampled_from([-1, 0, 0.5, 1])),
    data=st.data(),
)
def test_auroc_is_the_share_of_pairs_in_order_and_half_of_the_ties(
    scores: NDArray[np.float64], data: st.DataObject
) -> None:
    positive = data.draw(hnp.arrays(bool, scores.shape))
    assume(positive.any() and not positive.all())
    pairs = scores[positive][:, None] - scores[~positive][None, :]

    area = auroc(scores, positive)

    assert area == pytest.approx(np.mean((pairs > 0) + (pairs == 0) / 2))
    assert area == pytest.approx(oracle.roc_auc_score(positive, scores))


@pytest.mark.parametrize(("n", "k"), [(50, 2), (200, 3), (97, 7)])
@pytest.mark.parametrize("seed", range(5))
def test_auroc_of_logits_is_that_of_scikit_learn(n: int, k: int, seed: int) -> None:
    logits, labels = random_case(n, k, seed)
    probabilities = softmax(logits)

    expected = (
        oracle.roc_auc_score(labels, probabilities[:, 1])
        if k == 2
        else oracle.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    )

    assert evaluate(logits, labels)["auroc"] == pytest.approx(expected)


@given(case=cases())
def test_calibration_error_is_the_sum_over_bins_as_in_the_paper(case: Case) -> None:
    logits, labels = case
    probabilities = softmax(logits)
    confidence, hit = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    expected = 0.0
    for m in range(1, 16):
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if inside.any():
            expected += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())

    assert evaluate(logits, labels)["ece"] == pytest.approx(expected)


@given(case=cases(), data=st.data())
def test_order_of_records_does_not_matter(case: Case, data: st.DataObject) -> None:
    logits, labels = case
    order = data.draw(st.permutations(range(len(labels))))

    assert evaluate(logits[order], labels[order]) == pytest.approx(evaluate(logits, labels))


@given(case=cases())
def test_every_figure_is_finite_and_auroc_is_there_exactly_if_it_is_defined(case: Case) -> None:
    logits, labels = case

    figures = evaluate(logits, labels)

    assert all(math.isfinite(figure) for figure in figures.values())
    assert figures.keys() - {"auroc"} == {"accuracy", "macro_f1", "ece", "loss"}
    assert ("auroc" in figures) == (len(set(labels.tolist())) > 1)


@given(
    logits=hnp.arrays(
        np.float32, (3, 5), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)
    )
)
def test_softmax_of_any_finite_logits_is_a_distribution(logits: NDArray[np.float32]) -> None:
    p = softmax(logits)

    assert p.dtype == np.float64
    assert (p >= 0).all()
    assert p.sum(axis=1) == pytest.approx(1)
    assert (p[range(3), logits.argmax(axis=1)] == p.max(axis=1)).all()


def test_a_small_example_by_hand() -> None:
    """p(1) = 1/4, 1/2, 9/10 against labels 1, 0, 1; a tie is predicted as label 0."""
    logits = np.log([[3, 1], [1, 1], [1, 9]])

    figures = evaluate(logits, [1, 0, 1])

    assert figures == pytest.approx(
        {
            "accuracy": 2 / 3,
            "macro_f1": (2 / 3 + 2 / 3) / 2,  # each label: precision and recall 1/2 and 1
            "auroc": 1 / 2,  # positives 1/4 and 9/10, negative 1/2
            "ece": (3 / 4 + 1 / 2 + 1 / 10) / 3,  # each alone in its bin
            "loss": (math.log(4) + math.log(2) - math.log(9 / 10)) / 3,
        }
    )


def test_confidences_on_an_edge_belong_to_the_lower_bin() -> None:
    edges = np.array([[0.6, 0.4], [0.61, 0.39]])  # 0.6 = 9/15

    assert calibration_error(edges, np.array([0, 1])) == pytest.approx((0.4 + 0.61) / 2)


def test_labels_without_record_or_prediction_are_left_out_of_macro_f1() -> None:
    logits = np.eye(4)[[0, 0, 1]]

    assert evaluate(logits, [0, 0, 1])["macro_f1"] == 1
    assert evaluate(logits, [0, 0, 3])["macro_f1"] == pytest.approx(1 / 3)


def test_extreme_logits_keep_their_order() -> None:
    """Softmax of all four is 1.0 in float64, yet the positives lie above the negatives."""
    logits = np.array([[0, 50], [0, 60], [0, 70], [0, 80]])

    figures = evaluate(logits, [0, 0, 1, 1])

    assert figures["auroc"] == 1
    assert figures["loss"] == pytest.approx((50 + 60) / 4)


def test_confusion_has_truth_in_its_rows() -> None:
    assert confusion([2, 2, 0], [0, 0, 1], 3).tolist() == [[0, 0, 2], [1, 0, 0], [0, 0, 0]]


GOOD: Case = (np.zeros((3, 2)), np.array([0, 1, 1]))


@pytest.mark.parametrize(
    ("logits", "labels", "says"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), r"expected logits of shape .*, got \(0, 2\)"),
        (np.zeros((3, 1)), GOOD[1], r"expected logits of shape .*, got \(3, 1\)"),
        (np.zeros(3), GOOD[1], r"expected logits of shape .*, got \(3,\)"),
        (np.full((3, 2), np.nan), GOOD[1], "logits are NaN or infinite"),
        (np.full((3, 2), np.inf), GOOD[1], "logits are NaN or infinite"),
        (GOOD[0], np.array([0, 1]), "3 rows of logits, but 2 labels"),
        (GOOD[0], np.array([0, 1, 2]), r"expected values in \[0, 2\), got 0 to 2"),
        (GOOD[0], np.array([0, 1, -1]), r"expected values in \[0, 2\), got -1 to 1"),
        (GOOD[0], np.array([0.0, 1.0, 1.0]), "expected integers of shape .*, got float64"),
        (GOOD[0], np.array([[0, 1, 1]]), r"expected integers of shape .* of shape \(1, 3\)"),
    ],
)
def test_what_is_not_a_classifier_s_output_is_refused(logits: Any, labels: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        evaluate(logits, labels)


def test_confusion_of_unequal_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="2 predictions, but 1 labels"):
        confusion([0, 1], [0], 2)
