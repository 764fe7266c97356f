import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples, collate, fetch, lengths
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.client.tuning.prefix import PrefixCache
from anabranch.client.tuning.spill import SpillFile
from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import Lora

MakeConfig = Callable[..., RunConfig]
Randomise = Callable[..., None]
PLENTY = 1 << 30
TEXTS = [" ".join(["w1", "w7", f"w{i}"] * (1 + i % 4)) for i in range(10)]
BYTES = sum(len(t.split()) + 2 for t in TEXTS) * 24 * 4  # tokens with [CLS], [SEP] × width × 4


@pytest.fixture(scope="module")
def classifier(
    make_config: MakeConfig, encoders: dict[str, Path], randomise: Randomise
) -> Classifier:
    lora = Lora(rank=3, layers="last:1")
    classifier = load_classifier(make_config(str(encoders["bert"]), lora=lora, max_tokens=16))
    randomise(classifier)
    return classifier


def logits_of(classifier: Classifier, features: list[Tensor]) -> Tensor:
    logits: Tensor = classifier(*collate(features))
    return logits


def whole(classifier: Classifier, inputs: list[str]) -> Tensor:
    return classifier.logits(*collate(classifier.encode(inputs)))


@given(
    chosen=st.lists(st.sampled_from(TEXTS), max_size=6), limit=st.sampled_from([0, 2000, 1 << 30])
)
def test_prepared_features_give_the_logits_of_the_whole_model(
    classifier: Classifier, chosen: list[str], limit: int
) -> None:
    cache = PrefixCache(limit)
    for _ in range(2):  # cold, then warm
        features = cache.prepare(classifier, chosen)
        assert len(features) == len(chosen)
        if chosen:
            logits = logits_of(classifier, fetch(features, range(len(chosen))))
            torch.testing.assert_close(logits, whole(classifier, chosen), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layers", ["last:1", "last:2", "all"])
def test_minilm_is_exact_to_five_digits(
    make_config: MakeConfig, randomise: Randomise, layers: str
) -> None:
    classifier = load_classifier(make_config("minilm", lora=Lora(layers=layers)))
    randomise(classifier)
    with torch.no_grad():
        classifier.head.weight /= 20  # logits of order 1
    inputs = ["asthma", "fracture of shaft of left femur, initial encounter", "sepsis, unspecified"]

    features = PrefixCache(PLENTY).prepare(classifier, inputs)

    expected = whole(classifier, inputs)
    assert 0.1 < expected.std() < 10
    torch.testing.assert_close(logits_of(classifier, list(features)), expected, atol=1e-5, rtol=0)


def test_training_on_cached_features_is_training_on_the_whole_model(
    classifier: Classifier,
) -> None:
    features = PrefixCache(PLENTY).prepare(classifier, TEXTS)
    parameters = list(trainable_parameters(classifier).values())

    def gradients(logits: Tensor) -> list[Tensor]:
        labels = torch.arange(len(TEXTS)) % 3
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return list(torch.autograd.grad(loss, parameters))

    cached = gradients(logits_of(classifier, list(features)))
    direct = gradients(whole(classifier, TEXTS))

    for ours, theirs in zip(cached, direct, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_every_record_is_computed_once(classifier: Classifier) -> None:
    cache = PrefixCache(PLENTY)
    for _ in range(3):
        cache.prepare(classifier, [*TEXTS, *TEXTS[:2]])

    stats = cache.stats
    assert (stats.cached, stats.bytes, stats.too_many) == (len(TEXTS), BYTES, 0)
    assert stats.computed == len(TEXTS)
    assert stats.hits == 2 + 2 * (len(TEXTS) + 2)


def test_over_the_limit_records_are_computed_each_time_and_said_once(
    classifier: Classifier, caplog: pytest.LogCaptureFixture
) -> None:
    cache = PrefixCache(BYTES // 2)
    with caplog.at_level(logging.WARNING):
        features = cache.prepare(classifier, TEXTS)
        cache.prepare(classifier, TEXTS)
    kept = cache.stats.cached
    computed = cache.stats.computed
    examples = Examples(features, torch.zeros(len(TEXTS), dtype=torch.int64))

    taken = examples.take(range(len(TEXTS)))

    assert 0 < kept < len(TEXTS)
    assert 0 < cache.stats.bytes <= BYTES // 2
    assert cache.stats.computed - computed == len(TEXTS) - kept
    assert cache.stats.cached == kept
    assert "prefix cache is full" in caplog.text
    assert len(caplog.records) == 1
    expected = whole(classifier, TEXTS)
    torch.testing.assert_close(
        logits_of(classifier, list(taken.features)), expected, atol=1e-5, rtol=0
    )
    assert lengths(features) == [len(f) for f in taken.features]
    torch.testing.assert_close(features[-1], taken.features[-1], atol=1e-5, rtol=0)


def test_cached_features_do_not_keep_padding_alive(classifier: Classifier) -> None:
    for feature in PrefixCache(PLENTY).prepare(classifier, TEXTS):
        assert feature.untyped_storage().nbytes() == feature.numel() * 4


def test_features_prepared_for_inference_can_be_trained_on(classifier: Classifier) -> None:
    with torch.inference_mode():
        features = PrefixCache(PLENTY).prepare(classifier, TEXTS[:2])

    logits_of(classifier, list(features)).sum().backward()
    classifier.zero_grad()


def test_another_cut_is_another_entry_and_makes_room(
    make_config: MakeConfig, encoders: dict[str, Path], classifier: Classifier
) -> None:
    lora = Lora(rank=3, layers="last:2")
    other = load_classifier(make_config(str(encoders["bert"]), lora=lora, max_tokens=16))
    cache = PrefixCache(BYTES + 5000)
    ours = cache.prepare(classifier, TEXTS)
    theirs = cache.prepare(other, TEXTS)

    assert not torch.allclose(ours[0], theirs[0])
    assert cache.stats.cached == len(TEXTS)  # those of the first cut had to go
    assert cache.stats.too_many == 0
    cache.clear()
    assert (cache.stats.cached, cache.stats.bytes) == (0, 0)


def test_adapters_of_one_shape_share_entries(
    make_config: MakeConfig, encoders: dict[str, Path]
) -> None:
    lora = Lora(rank=3, layers="last:1")
    cache = PrefixCache(PLENTY)
    for seed in (1, 2):
        config = make_config(str(encoders["bert"]), lora=lora, max_tokens=16, seed=seed)
        cache.prepare(load_classifier(config), TEXTS)

    assert cache.stats.computed == len(TEXTS)


def test_with_the_head_alone_pooled_vectors_are_kept(
    make_config: MakeConfig, encoders: dict[str, Path], randomise: Randomise
) -> None:
    config = make_config(str(encoders["bert"]), lora=Lora(rank=0), max_tokens=16)
    head_only = load_classifier(config)
    randomise(head_only)
    cache = PrefixCache(PLENTY)

    features = cache.prepare(head_only, TEXTS)

    assert cache.stats.bytes == len(TEXTS) * 24 * 4
    logits = logits_of(head_only, list(features))
    torch.testing.assert_close(logits, whole(head_only, TEXTS), atol=1e-5, rtol=0)


def test_images_are_cached_like_texts(make_config: MakeConfig, randomise: Randomise) -> None:
    config = make_config("vit", "image-classification", lora=Lora(layers="last:1"), depth=3)
    vit = load_classifier(config)
    randomise(vit)
    images = np.random.default_rng(0).random((5, 1, 8, 8), np.float32)
    cache = PrefixCache(PLENTY)

    for _ in range(2):
        features = cache.prepare(vit, images)

    assert cache.stats.computed == 5
    logits = logits_of(vit, list(features))
    expected = vit.logits(torch.tensor(images), None)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_without_a_frozen_prefix_nothing_is_cached(make_config: MakeConfig) -> None:
    classifier = load_classifier(make_config("logistic", "tabular-classification"))
    cache = PrefixCache(0)
    rows = np.ones((2, 5), np.float32)

    features = cache.prepare(classifier, rows)

    assert torch.equal(torch.stack(list(features)), torch.tensor(rows))
    assert cache.stats.computed == 0


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="limit_bytes >= 0, got -1"):
        PrefixCache(-1)


@pytest.mark.parametrize("limit", [0, BYTES // 3, PLENTY])
def test_values_are_the_same_bits_in_memory_and_in_the_file(
    classifier: Classifier, tmp_path: Path, limit: int
) -> None:
    plain = PrefixCache(PLENTY).prepare(classifier, TEXTS)
    cache = PrefixCache(limit, SpillFile(tmp_path / "spill", PLENTY))

    for _ in range(2):  # cold, then warm
        features = cache.prepare(classifier, TEXTS)
        assert all(torch.equal(a, b) for a, b in zip(features, plain, strict=True))

    stats = cache.stats
    assert (stats.cached, stats.computed, stats.too_many) == (len(TEXTS), len(TEXTS), 0)
    assert stats.bytes <= limit
    assert stats.bytes + stats.spilled_bytes == BYTES
    assert (stats.spilled == 0) is (limit == PLENTY)


def test_what_fits_into_neither_is_computed_again(classifier: Classifier, tmp_path: Path) -> None:
    cache = PrefixCache(BYTES // 4, SpillFile(tmp_path, BYTES // 4))

    features = cache.prepare(classifier, TEXTS)

    stats = cache.stats
    assert 0 < stats.spilled < stats.cached < len(TEXTS)
    assert max(stats.bytes, stats.spilled_bytes) <= BYTES // 4
    logits = logits_of(classifier, fetch(features, range(len(TEXTS))))
    torch.testing.assert_close(logits, whole(classifier, TEXTS), atol=1e-5, rtol=0)
    assert cache.stats.too_many == len(TEXTS) - stats.cached


def test_another_prefix_takes_the_file_over(
    make_config: MakeConfig, encoders: dict[str, Path], classifier: Classifier, tmp_path: Path
) -> None:
    lora = Lora(rank=3, layers="last:2")
    other = load_classifier(make_config(str(encoders["bert"]), lora=lora, max_tokens=16))
    cache = PrefixCache(0, SpillFile(tmp_path, BYTES))
    ours = cache.prepare(classifier, TEXTS)
    before = [feature.clone() for feature in ours]

    theirs = cache.prepare(other, TEXTS)

    assert (cache.stats.cached, cache.stats.spilled_bytes) == (len(TEXTS), BYTES)
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))  # still readable
    assert not torch.allclose(ours[0], theirs[0])
    cache.clear()
    assert (cache.stats.cached, cache.stats.spilled, cache.stats.spilled_bytes) == (0, 0, 0)
