import dataclasses
import logging
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.client.local import Learned, Local, train_alone
from anabranch.client.tuning.activations import Activations
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.lora import read_adapter
from anabranch.client.tuning.training import Schedule
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.tables import Lora, Training
from anabranch.simulations.cohort import precision
from anabranch.simulations.cohort.engine import CohortEngine
from anabranch.simulations.cohort.precision import measure, products_for
from anabranch.simulations.cohort.products import FLOAT32, Bfloat16


@pytest.fixture(scope="module")
def bert(make_config: Any, encoders: dict[str, Path]) -> Classifier:
    lora = Lora(rank=3, layers="last:2")
    return load_classifier(make_config(str(encoders["bert"]), lora=lora, max_tokens=16))


@given(seed=st.integers(0, 999), rows=st.integers(1, 9), bias=st.booleans())
def test_rounded_products_are_those_of_float32_to_eight_bits(
    seed: int, rows: int, bias: bool
) -> None:
    rng = torch.Generator().manual_seed(seed)
    x, e = torch.randn((rows, 24), generator=rng), torch.randn((rows, 40), generator=rng)
    weight = torch.randn((40, 24), generator=rng)
    b = torch.randn(40, generator=rng) if bias else None
    rounded = Bfloat16()

    for _ in range(2):  # the copy is made, then found
        y, dx = rounded.forward(x, weight, b), rounded.backward(e, weight)

    assert y.dtype == dx.dtype == torch.float32
    for ours, exact in ((y, FLOAT32.forward(x, weight, b)), (dx, FLOAT32.backward(e, weight))):
        assert 0 < (ours - exact).norm() / exact.norm() < 2**-7


def test_a_copy_goes_with_its_weight() -> None:
    rounded, weight = Bfloat16(), torch.ones(2, 2)
    rounded.forward(torch.ones(1, 2), weight, None)
    copy = weakref.ref(next(iter(rounded._copies.values())))
    assert copy() is not None

    del weight

    assert copy() is None


def test_the_measured_gradient_is_close_and_not_the_same(bert: Classifier) -> None:
    before = bert.compute_base_digest()

    found = measure(bert)

    assert 0.999 <= found.cosine < 1
    assert 0 < found.error < 0.05
    assert found.speedup > 0
    assert bert.compute_base_digest() == before
    assert all(p.grad is None for p in bert.parameters())


def test_float32_is_asked_for_without_a_word(
    bert: Classifier, caplog: pytest.LogCaptureFixture
) -> None:
    assert products_for("fp32", bert) is FLOAT32
    assert not caplog.records


@pytest.mark.parametrize(("speedup", "slower"), [(0.5, True), (3.0, False)])
def test_bfloat16_says_what_it_gains_and_costs(
    bert: Classifier,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    speedup: float,
    slower: bool,
) -> None:
    found = dataclasses.replace(measure(bert), speedup=speedup)
    monkeypatch.setattr(precision, "measure", lambda classifier: found)

    with caplog.at_level(logging.WARNING):
        assert isinstance(products_for("bf16", bert), Bfloat16)

    assert f"{speedup:.2f} times as fast" in caplog.text
    assert f"cosine {found.cosine:.6f}" in caplog.text
    assert ("slower" in caplog.text) is slower


def test_other_types_and_other_inputs_are_refused(make_config: Any, bert: Classifier) -> None:
    with pytest.raises(ConfigError, match='expected "fp32" or "bf16"'):
        products_for("fp16", bert)  # type: ignore[arg-type]
    table = load_classifier(make_config("logistic", "tabular-classification"))
    with pytest.raises(ConfigError, match=r"one shape: nothing to pack.*base_dtype = \"fp32\""):
        products_for("bf16", table)


TEXTS = [" ".join(f"w{(5 * i + j) % 35}" for j in range(1 + 3 * i % 11)) for i in range(24)]


def clients_of(
    classifier: Classifier, *, inputs: Any = TEXTS, listed: bool = False, texts: int = 8
) -> list[Local]:
    """Return clients with `texts` records each, of one shared store or with lists of their own."""
    store, start = Activations(classifier, inputs, 1 << 26), read_adapter(classifier)
    training = Training(batch_size=4, learning_rate=0.01, optimizer="sgd")
    locals = []
    for k in range(len(inputs) // texts):
        features: Any = store.features(np.arange(k * texts, (k + 1) * texts))
        locals.append(
            Local(
                name=f"client {k}",
                classifier=classifier,
                start=start,
                examples=Examples(list(features) if listed else features, torch.arange(texts) % 3),
                training=training,
                steps=4,
                schedule=Schedule(total_steps=4),
                seed=k,
            )
        )
    return locals


def update(learned: Any, local: Local) -> torch.Tensor:
    assert isinstance(learned, Learned)
    arrays = learned.after.arrays
    moved = [torch.from_numpy(a - local.start.arrays[n]).flatten() for n, a in arrays.items()]
    return torch.cat(moved)


def require_close_updates(classifier: Classifier, inputs: Any = TEXTS) -> None:
    locals = clients_of(classifier, inputs=inputs)
    exact, rounded = CohortEngine().train(locals), CohortEngine("bf16").train(locals)
    for local, ours, theirs in zip(locals, exact, rounded, strict=True):
        a, b = update(ours, local), update(theirs, local)
        assert not torch.equal(a, b)
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) >= 0.999


def test_a_round_in_bfloat16_moves_every_client_the_same_way(
    bert: Classifier, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        require_close_updates(bert)
    assert caplog.text.count("frozen products in bfloat16") == 1


@pytest.mark.slow
def test_a_round_of_minilm_in_bfloat16_moves_every_client_the_same_way(make_config: Any) -> None:
    minilm = load_classifier(make_config("minilm", lora=Lora(layers="last:2"), max_tokens=32))
    require_close_updates(minilm, ["chest pain since morning", "a cold", "fracture of femur"] * 8)


def test_bfloat16_for_tables_is_refused_client_by_client(make_config: Any) -> None:
    table = load_classifier(make_config("logistic", "tabular-classification"))
    rows = np.random.default_rng(0).random((8, 5), np.float32)

    outcomes = CohortEngine("bf16").train(clients_of(table, inputs=rows, texts=4))

    assert [type(outcome) for outcome in outcomes] == [ConfigError] * 2


def test_clients_that_are_not_packed_stay_in_float32_and_it_is_said(
    bert: Classifier, caplog: pytest.LogCaptureFixture
) -> None:
    locals, engine = clients_of(bert, listed=True), CohortEngine("bf16")

    with caplog.at_level(logging.WARNING):
        learned = engine.train(locals)

    assert caplog.text.count("in float32") == 1
    assert "one client at a time" not in caplog.text  # they are trained together

    assert engine.reasons == {'base_dtype = "bf16" is for packed texts: in float32': 3}
    for local, ours in zip(locals, learned, strict=True):
        torch.testing.assert_close(update(ours, local), update(train_alone(local), local))
