from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from anabranch.edge.runtime import predict as predicting
from anabranch.edge.runtime.bundle_manifest import Limits
from anabranch.edge.runtime.joint import open_engine
from anabranch.edge.runtime.predict import Predictor, Score, evaluate
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import BundleError, DataError, DeviceError, IncompatibleAdapter
from anabranch.protocols.spec import AdapterSpec

Make = Callable[..., Any]
TEXTS = ["acute fracture", "heart", "failure of femur " * 4, "chronic", ""] * 5


def other_adapter(bundle: Any) -> Adapter:
    return Adapter(bundle.adapter.spec, {n: a * 2 for n, a in bundle.adapter.arrays.items()})


# Answers


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_logits_are_those_of_the_training_engine(make_tiny: Make, precision: Any) -> None:
    bundle = make_tiny("text")
    predictor = Predictor.open(bundle, precision=precision)
    encoded = [bundle.tokenizer.encode(text) for text in TEXTS]
    ids, mask = bundle.tokenizer.batch(encoded)
    expected = open_engine(bundle).predict({"input_ids": ids, "attention_mask": mask})
    np.testing.assert_allclose(predictor.logits(TEXTS), expected, rtol=1e-4, atol=1e-5)
    feeds = {"input_ids": ids, "attention_mask": mask}
    np.testing.assert_allclose(predictor.run(feeds), expected, rtol=1e-4, atol=1e-5)


def test_labels_come_ranked_with_their_probabilities(make_tiny: Make) -> None:
    predictor = Predictor.open(make_tiny("text"), precision="fp32")
    ranked = predictor.ranked(TEXTS)
    logits = predictor.logits(TEXTS)
    for one, z in zip(ranked, logits, strict=True):
        assert sum(p for _, p in one) == pytest.approx(1, abs=1e-6)
        assert [p for _, p in one] == sorted((p for _, p in one), reverse=True)
        assert one[0][0] == predictor.bundle.manifest.labels[int(z.argmax())]
    assert predictor.classify(TEXTS) == [one[0] for one in ranked]
    assert predictor.classify([]) == []


def test_answers_do_not_depend_on_limits(make_tiny: Make) -> None:
    expected = Predictor.open(make_tiny("text"), precision="fp32").logits(TEXTS)
    for limits in (
        Limits(memory_bytes=10**9, max_records=1, max_tokens=16),
        Limits(memory_bytes=(1 << 20) + 6000, max_records=99, max_tokens=16),
    ):
        predictor = Predictor.open(make_tiny("text", limits=limits), precision="fp32")
        np.testing.assert_allclose(predictor.logits(TEXTS), expected, rtol=1e-4, atol=1e-5)


# Adapters


def test_another_adapter_is_used_and_the_released_one_comes_back_bit_for_bit(
    make_tiny: Make,
) -> None:
    bundle = make_tiny("table")
    x = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
    predictor = Predictor.open(bundle)
    released = predictor.logits(x)
    other = other_adapter(bundle)
    predictor.use(other)
    after = predictor.logits(x)
    assert not np.allclose(after, released)
    np.testing.assert_array_equal(Predictor.open(bundle, adapter=other).logits(x), after)
    predictor.use(bundle.adapter)
    np.testing.assert_array_equal(predictor.logits(x), released)
    predictor.use(None)
    np.testing.assert_array_equal(predictor.logits(x), released)


def test_switching_loads_no_session(make_tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_tiny("table")
    predictor = Predictor.open(bundle)
    session = predictor._session
    monkeypatch.setattr(predicting, "load", None)
    predictor.use(other_adapter(bundle))
    predictor.logits(np.zeros((1, 6), np.float32))
    assert predictor._session is session


def test_an_adapter_of_another_spec_is_refused_and_nothing_changes(make_tiny: Make) -> None:
    bundle = make_tiny("table")
    spec = bundle.adapter.spec
    fields = {n: getattr(spec, n) for n in ("tokenizer", "rank", "alpha", "targets", "tensors")}
    wrong = Adapter(AdapterSpec(base="c" * 64, **fields), bundle.adapter.arrays)
    predictor = Predictor.open(bundle)
    x = np.ones((2, 6), np.float32)
    before = predictor.logits(x)
    with pytest.raises(IncompatibleAdapter, match="base model"):
        predictor.use(wrong)
    np.testing.assert_array_equal(predictor.logits(x), before)


# Refusals


def test_what_cannot_be_opened_is_refused(make_tiny: Make) -> None:
    bundle = make_tiny("table")
    with pytest.raises(BundleError, match=r"no graph infer.int4; it infers in fp32, int8"):
        Predictor.open(bundle, precision="int4")
    with pytest.raises(DeviceError, match="one record of 1 tokens needs 1 MB"):
        Predictor.open(bundle, memory_bytes=1000)
    with pytest.raises(ValueError, match="threads >= 1, got 0"):
        Predictor.open(bundle, threads=0)
    graphs = bundle.manifest.graphs
    swapped = {**graphs, "infer.int8": graphs["train_step.int8"]}
    with pytest.raises(BundleError, match="inputs labels, weights are not as the format says"):
        Predictor.open(make_tiny("table", graphs=swapped))


def test_inputs_of_another_kind_are_refused(make_tiny: Make) -> None:
    text, table = Predictor.open(make_tiny("text")), Predictor.open(make_tiny("table"))
    with pytest.raises(DataError, match="expected a list of str"):
        text.logits(np.zeros((1, 6), np.float32))
    with pytest.raises(DataError, match=r"float32 inputs of shape \(n, 6\), got float32"):
        table.logits(np.zeros((1, 5), np.float32))
    with pytest.raises(DataError, match="NaN or infinite"):
        table.logits(np.full((1, 6), np.nan, np.float32))
    limits = Limits(memory_bytes=10**9, max_records=9, max_tokens=3)
    short = Predictor.open(make_tiny("text", limits=limits))
    with pytest.raises(DeviceError, match="tokens, this bundle allows 3"):
        short.logits(["acute fracture of femur"])


# Scores


def test_the_score_is_accuracy_and_cross_entropy(make_tiny: Make, make_records: Make) -> None:
    bundle = make_tiny("text")
    records = make_records(bundle, 150)
    engine = open_engine(bundle)
    z = engine.predict(records.feeds(range(150))).astype(np.float64)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    score = evaluate(engine, records)
    assert score.records == 150
    assert score.accuracy == np.mean(z.argmax(1) == records.labels)
    expected = -np.log(p[np.arange(150), records.labels]).mean()
    assert score.loss == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="at least one record"):
        evaluate(engine, records.take([]))


def test_accuracy_decides_then_loss_and_what_is_not_finite_loses() -> None:
    def score(accuracy: float, loss: float) -> Score:
        return Score(records=10, accuracy=accuracy, loss=loss)

    assert score(0.8, 9.0).at_least(score(0.7, 1.0))
    assert not score(0.7, 1.0).at_least(score(0.8, 9.0))
    assert score(0.8, 1.0).at_least(score(0.8, 1.0))
    assert not score(0.8, 1.1).at_least(score(0.8, 1.0))
    assert not score(1.0, float("nan")).at_least(score(0.1, 1.0))
    assert not score(1.0, float("inf")).at_least(score(0.1, 1.0))
    assert score(0.1, 9.0).at_least(score(1.0, float("nan")))
    assert score(0.5, 9.0).at_least(score(0.5, float("nan")))
