"""Activations of shared rows: lazy, bounded, the same bits wherever they are kept."""

import gc
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anabranch.client.data.records import Records
from anabranch.client.tuning.activations import Activations, Mixed
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Dense, Examples, Packing, Ragged, collate, lengths
from anabranch.client.tuning.lora import load_adapter, read_adapter
from anabranch.client.tuning.spill import SpillFile
from anabranch.client.tuning.training import Schedule, fit, predict
from anabranch.protocols.tables import Lora, Training
from anabranch.simulations.population.data import SharedData

PLENTY = 1 << 26
TEXTS = [" ".join(f"w{(5 * i + j) % 35}" for j in range(1 + 3 * i % 11)) for i in range(23)]
TOKENS = [len(text.split()) + 2 for text in TEXTS]
ROW = 24 * 4  # bytes of a token
TIERS = [(PLENTY, 0), (0, PLENTY), (900, PLENTY), (900, 2000), (0, 0), (2000, 0)]
ROWS = st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=9)


@pytest.fixture(scope="module")
def bert(make_config: Any, encoders: dict[str, Path]) -> Classifier:
    lora = Lora(rank=3, layers="last:1")
    return load_classifier(make_config(str(encoders["bert"]), lora=lora, max_tokens=16))


def rows(*at: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(at, np.int64)


def direct(classifier: Classifier, inputs: Sequence[str], at: Sequence[int]) -> list[Tensor]:
    found = []
    for i in at:
        x, mask = collate(classifier.encode([inputs[i]]))
        found.append(classifier.prefix(x, mask)[0])
    return found


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("limit", "spill"), TIERS)
@settings(max_examples=20)
@given(clients=st.lists(ROWS, min_size=1, max_size=4), data=st.data())
def test_features_are_those_of_the_prefix_wherever_they_are_kept(
    bert: Classifier,
    tmp_path_factory: pytest.TempPathFactory,
    limit: int,
    spill: int,
    clients: list[list[int]],
    data: st.DataObject,
) -> None:
    file = SpillFile(tmp_path_factory.mktemp("spill"), spill)
    store = Activations(bert, TEXTS, limit, file)
    for client in clients:
        features = store.features(rows(*client))
        at = data.draw(st.lists(st.integers(0, len(client) - 1), min_size=1, max_size=6))
        expected = direct(bert, TEXTS, [client[i] for i in at])

        assert isinstance(features, Packing)
        assert len(features) == len(client)
        assert lengths(features) == [TOKENS[i] for i in client]
        same(features.take(at), expected)
        same([features[i] for i in at], expected)
        values, length = features.packed(torch.tensor(at))
        same(list(values.split(length.tolist())), expected)
        stats = store.stats
        assert stats.bytes <= limit
        assert stats.spilled_bytes <= spill
        assert stats.cached * 3 * ROW <= stats.bytes + stats.spilled_bytes  # 3 tokens at least
    file.close()


def test_the_same_bits_come_out_of_memory_and_of_the_file(bert: Classifier, tmp_path: Path) -> None:
    memory = Activations(bert, TEXTS, PLENTY)
    file = Activations(bert, TEXTS, 0, SpillFile(tmp_path, PLENTY))
    both = Activations(bert, TEXTS, 3000, SpillFile(tmp_path, PLENTY))
    everything = np.arange(len(TEXTS))

    stores = [store.features(everything) for store in (memory, file, both)]

    first, *others = [features.take(range(len(TEXTS))) for features in stores]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert [type(features) for features in stores] == [Ragged, Mixed, Mixed]
    total = sum(TOKENS) * ROW
    assert (memory.stats.bytes, memory.stats.spilled_bytes) == (total, 0)
    assert (file.stats.bytes, file.stats.spilled_bytes) == (0, total)
    assert both.stats.bytes + both.stats.spilled_bytes == total
    assert 0 < both.stats.spilled < len(TEXTS)
    assert {store.stats.computed for store in (memory, file, both)} == {len(TEXTS)}


def test_only_rows_that_were_asked_for_are_computed_and_only_once(bert: Classifier) -> None:
    store = Activations(bert, TEXTS, PLENTY)
    store.features(rows(3, 5, 3))
    assert (store.stats.computed, store.stats.cached) == (2, 2)

    store.features(rows(5, 7))
    store.features(rows(7, 3))

    stats = store.stats
    assert (stats.computed, stats.cached, stats.too_many) == (3, 3, 0)
    assert stats.bytes == sum(TOKENS[i] for i in (3, 5, 7)) * ROW


def test_a_text_is_tokenised_once_and_only_if_it_is_asked_for(
    bert: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    encode = bert.encode

    def counted(texts: list[str]) -> list[Tensor]:
        seen.extend(texts)
        return encode(texts)

    monkeypatch.setattr(bert, "encode", counted)
    store = Activations(bert, TEXTS, 0)

    for _ in range(2):
        store.features(rows(4, 9)).take([0, 1])
        store.features(rows(9, 2)).take([0, 1])

    assert sorted(seen) == sorted(TEXTS[i] for i in (2, 4, 9))


def test_clients_share_one_tensor(bert: Classifier) -> None:
    store = Activations(bert, TEXTS, PLENTY)

    ours, theirs = store.features(rows(0, 1)), store.features(rows(1, 2))

    assert isinstance(ours, Ragged)
    assert isinstance(theirs, Ragged)
    assert ours.values is theirs.values


def tensors() -> int:
    gc.collect()
    return sum(type(o) is Tensor for o in gc.get_objects())


def test_a_hundred_thousand_records_are_not_a_hundred_thousand_tensors(
    bert: Classifier,
    make_config: Any,
) -> None:
    texts = ["w1"] * 100_000
    data = SharedData(Records(texts, np.zeros(len(texts), np.int64)))
    before = tensors()

    data.features(make_config("minilm"), bert, rows(*range(0, 100_000, 500)))

    assert tensors() - before < 20


@pytest.mark.parametrize(("limit", "spill"), TIERS)
def test_a_batch_of_no_records_is_empty_wherever_they_are_kept(
    bert: Classifier, tmp_path: Path, limit: int, spill: int
) -> None:
    """A Poisson sample may be empty."""
    features = Activations(bert, TEXTS, limit, SpillFile(tmp_path, spill)).features(rows(3, 1))

    assert isinstance(features, Packing)
    assert features.take([]) == []
    values, length = features.packed(torch.zeros(0, dtype=torch.int64))
    assert values.shape == (0, 24)
    assert len(length) == 0


def test_what_is_kept_nowhere_is_computed_again_and_said_once(
    bert: Classifier, caplog: pytest.LogCaptureFixture
) -> None:
    store = Activations(bert, TEXTS, 3000)
    with caplog.at_level(logging.WARNING):
        features = store.features(np.arange(len(TEXTS)))
        store.features(np.arange(len(TEXTS)))
    kept, computed = store.stats.cached, store.stats.computed
    assert 0 < kept < len(TEXTS)
    assert len(caplog.records) == 1
    assert "raise training.cache_bytes" in caplog.text

    features.take([*range(len(TEXTS)), 0, len(TEXTS) - 1])

    assert store.stats.computed - computed == store.stats.too_many == len(TEXTS) - kept
    assert store.stats.cached == kept


def test_memory_is_given_for_what_is_written_and_the_file_goes_with_its_owner(
    bert: Classifier,
    tmp_path: Path,
    make_config: Any,
) -> None:
    records = Records(TEXTS, np.zeros(len(TEXTS), np.int64))
    data = SharedData(records, tmp_path / "activations", spill_bytes=PLENTY)
    config = msgspec.structs.replace(make_config("minilm"), training=Training(cache_bytes=900))
    assert data.stats is None

    features = data.features(config, bert, np.arange(len(TEXTS)))

    stats = data.stats
    assert stats is not None
    assert stats.bytes <= 900
    assert stats.spilled > 0
    same(list(features), direct(bert, TEXTS, range(len(TEXTS))))
    assert list((tmp_path / "activations").iterdir()) == []  # the file has no name
    descriptors = len(os.listdir("/proc/self/fd"))
    del data, features
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) < descriptors


def test_another_cut_takes_the_place_of_the_first(
    bert: Classifier,
    encoders: dict[str, Path],
    make_config: Any,
) -> None:
    lora = Lora(rank=3, layers="last:2")
    other = load_classifier(make_config(str(encoders["bert"]), lora=lora, max_tokens=16))
    data = SharedData(Records(TEXTS, np.zeros(len(TEXTS), np.int64)))
    config = make_config("minilm")
    for classifier in (bert, other):
        taken = data.features(config, classifier, rows(0, 1))
        same([taken[0], taken[1]], direct(classifier, TEXTS, [0, 1]))
        assert data.stats is not None
        assert data.stats.cached == 2


@pytest.mark.parametrize("limit", [PLENTY, 3000])
def test_training_and_prediction_are_those_of_a_list_of_features(
    bert: Classifier, tmp_path: Path, limit: int
) -> None:
    start, labels = read_adapter(bert), torch.arange(12) % 3
    shared = Activations(bert, TEXTS, limit, SpillFile(tmp_path, 4000)).features(np.arange(12))
    listed = list(Activations(bert, TEXTS, PLENTY).features(np.arange(12)))
    results = []
    for features in (listed, shared):
        load_adapter(bert, start)
        training, schedule = Training(batch_size=5, learning_rate=0.01), Schedule(total_steps=6)
        fit(bert, Examples(features, labels), training, steps=6, schedule=schedule, seed=1)
        results.append((predict(bert, features), read_adapter(bert).arrays))
    load_adapter(bert, start)

    (ours, mine), (theirs, its) = results
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    for name, array in mine.items():
        np.testing.assert_allclose(array, its[name], atol=1e-5)


@pytest.mark.parametrize("limit", [PLENTY, 200, 0])
def test_images_and_pooled_vectors_are_rows_of_one_tensor(
    make_config: Any,
    encoders: dict[str, Path],
    limit: int,
) -> None:
    config = make_config("vit", "image-classification", lora=Lora(layers="last:1"), depth=3)
    vit = load_classifier(config)
    images = np.random.default_rng(0).random((9, 1, 8, 8), np.float32)
    pooled = load_classifier(make_config(str(encoders["bert"]), lora=Lora(rank=0), max_tokens=16))
    expected = {
        vit: vit.prefix(torch.tensor(images), None),
        pooled: torch.stack(direct(pooled, TEXTS, range(9))),
    }
    for classifier, inputs in ((vit, images), (pooled, TEXTS)):
        features = Activations(classifier, inputs, limit).features(rows(7, 2, 2, 0))

        exact = expected[classifier][[7, 2, 2, 0]]
        same(features.take(range(4)), list(exact))
        same(list(features.rows(torch.tensor([3, 0]))), list(exact[[3, 0]]))
        assert lengths(features) == [exact.shape[1]] * 4
        assert isinstance(features, Dense) is (limit == PLENTY)


def test_without_a_frozen_prefix_records_are_rows_of_one_tensor(make_config: Any) -> None:
    table = load_classifier(make_config("logistic", "tabular-classification"))
    inputs = np.arange(20, dtype=np.float32).reshape(4, 5)
    store = Activations(table, inputs, 0)

    features = store.features(rows(2, 0, 2))

    assert isinstance(features, Dense)
    assert torch.equal(torch.stack(list(features)), torch.tensor(inputs[[2, 0, 2]]))
    assert store.stats.computed == 0


def test_without_a_frozen_prefix_token_ids_are_runs_of_one_tensor(
    make_config: Any,
    encoders: dict[str, Path],
) -> None:
    lora = Lora(rank=2, targets=("query",), modules_to_save=("embeddings",))
    whole = load_classifier(make_config(str(encoders["bert"]), lora=lora, max_tokens=16))
    assert whole.cut == 0
    store = Activations(whole, TEXTS, 0)
    for at in ([4, 1, 4], [0, 4]):  # the flat tensor grows in between
        features = store.features(rows(*at))

        assert isinstance(features, Ragged)
        ids = whole.encode([TEXTS[i] for i in at])
        assert all(torch.equal(a, b) for a, b in zip(features, ids, strict=True))


def test_a_client_without_records_has_no_features(bert: Classifier) -> None:
    assert len(Activations(bert, TEXTS, PLENTY).features(rows())) == 0


def test_a_negative_limit_is_refused(bert: Classifier) -> None:
    with pytest.raises(ValueError, match="limit_bytes >= 0, got -1"):
        Activations(bert, TEXTS, -1)
