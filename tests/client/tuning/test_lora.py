import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier, weights_digest
from anabranch.client.tuning.examples import collate
from anabranch.client.tuning.lora import (
    LoraLinear,
    load_adapter,
    merge,
    merged_weights,
    read_adapter,
    trainable_parameters,
    unmerge,
)
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import IncompatibleAdapter, ModelError
from anabranch.protocols.tables import Lora

MakeConfig = Callable[..., RunConfig]
Randomise = Callable[..., None]
LORA = Lora(rank=3, alpha=12, targets=("query", "*.intermediate.dense"), layers="last:2")
SIZE = st.integers(1, 9)


@pytest.fixture
def classifier(make_config: MakeConfig, encoders: dict[str, Path]) -> Classifier:
    return load_classifier(make_config(str(encoders["bert"]), lora=LORA, max_tokens=16))


def batch_of(classifier: Classifier, texts: list[str]) -> tuple[Tensor, Tensor | None]:
    return collate(classifier.encode(texts))


def train(classifier: Classifier, texts: list[str], steps: int = 3) -> None:
    x, mask = batch_of(classifier, texts)
    labels = torch.arange(len(texts)) % classifier.num_labels
    parameters = trainable_parameters(classifier).values()
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(classifier.train().logits(x, mask), labels)
        loss.backward()
        optimizer.step()


@given(SIZE, SIZE, st.integers(1, 4), st.floats(0.5, 32), st.booleans())
def test_a_lora_layer_computes_w_x_plus_b_plus_s_b_a_x(
    inside: int, outside: int, rank: int, alpha: float, bias: bool
) -> None:
    base = nn.Linear(inside, outside, bias=bias)
    layer = LoraLinear(base, rank, alpha, torch.Generator().manual_seed(0))
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(5, inside)

    update = (alpha / rank) * layer.lora_B.weight @ layer.lora_A.weight
    expected = x @ (base.weight + update).T + (base.bias if bias else 0)

    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_factors_start_as_peft_starts_them() -> None:
    layer = LoraLinear(nn.Linear(500, 7), 4, 8, torch.Generator().manual_seed(0))
    bound = 1 / math.sqrt(500)

    assert layer.lora_A.weight.abs().max() <= bound
    assert layer.lora_A.weight.detach().std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not layer.lora_B.weight.any()


def test_an_untrained_adapter_changes_nothing(
    make_config: MakeConfig, encoders: dict[str, Path], texts: list[str], classifier: Classifier
) -> None:
    config = make_config(str(encoders["bert"]), lora=Lora(rank=0), max_tokens=16)
    bare = load_classifier(config)
    x, mask = batch_of(bare, texts)

    adapted = classifier.run(x, mask, 0, classifier.num_stages)

    torch.testing.assert_close(adapted, bare.prefix(x, mask))
    assert not classifier.logits(x, mask).any()  # the head starts at zero


def test_only_what_the_spec_names_is_trained(classifier: Classifier) -> None:
    modules = [f"encoder.layer.{i}.{m}" for i in (1, 2) for m in ("attention.self.query",)]
    modules += [f"encoder.layer.{i}.intermediate.dense" for i in (1, 2)]
    factors = [f"{m}.lora_{f}.weight" for m in modules for f in "AB"]

    assert classifier.spec.targets == tuple(sorted(modules))
    assert list(trainable_parameters(classifier)) == sorted([*factors, "head.weight", "head.bias"])
    assert classifier.spec.shapes["encoder.layer.2.intermediate.dense.lora_A.weight"] == (3, 24)
    assert classifier.spec.shapes["encoder.layer.2.intermediate.dense.lora_B.weight"] == (40, 3)
    assert classifier.spec.shapes["head.weight"] == (3, 24)
    assert sum(p.requires_grad for p in classifier.parameters()) == len(factors) + 2
    assert (classifier.spec.rank, classifier.spec.scaling) == (3, 4.0)


@pytest.mark.parametrize(
    ("lora", "cut", "cached", "adapted"),
    [
        (Lora(targets=("query",)), 1, 0, 3),
        (Lora(targets=("query",), layers="last:1"), 3, 2, 1),
        (Lora(targets=("encoder.layer.1.*.dense",)), 2, 1, 3),
        (Lora(rank=0), 5, 3, 0),
        (Lora(rank=0, modules_to_save=("encoder.layer.2.output",)), 3, 2, 0),
        (Lora(targets=("query",), layers="last:1", modules_to_save=("embeddings",)), 0, 0, 1),
    ],
)
def test_the_cut_lies_below_the_first_trained_module(
    make_config: MakeConfig,
    encoders: dict[str, Path],
    lora: Lora,
    cut: int,
    cached: int,
    adapted: int,
) -> None:
    classifier = load_classifier(make_config(str(encoders["bert"]), lora=lora, max_tokens=16))

    assert classifier.cut == cut
    assert classifier.cached_layers == cached
    assert len(classifier.spec.targets) == adapted


def test_training_moves_the_adapter_and_leaves_the_base_unchanged(
    classifier: Classifier, texts: list[str]
) -> None:
    before = read_adapter(classifier)
    train(classifier, texts)
    after = read_adapter(classifier)

    delta = after.minus(before, num_examples=len(texts))
    assert all(array.any() for array in delta.arrays.values())
    assert classifier.compute_base_digest() == classifier.base_digest == classifier.spec.base


def test_a_write_to_a_frozen_weight_changes_the_digest(classifier: Classifier) -> None:
    layer = classifier.base.get_submodule("encoder.layer.2.attention.self.query")
    assert isinstance(layer, LoraLinear)
    layer.base.weight = nn.Parameter(layer.base.weight + 1e-3, requires_grad=False)

    assert classifier.compute_base_digest() != classifier.base_digest


def test_modules_trained_in_full_are_own_copies_of_the_shared_base(
    make_config: MakeConfig, encoders: dict[str, Path], texts: list[str]
) -> None:
    lora = Lora(rank=0, modules_to_save=("encoder.layer.2.output", "LayerNorm"))
    config = make_config(str(encoders["bert"]), lora=lora, max_tokens=16)
    classifier, other = load_classifier(config), load_classifier(config)
    name = "encoder.layer.2.output.dense.weight"
    before = read_adapter(other)
    train(classifier, texts)

    assert classifier.spec.shapes[name] == (24, 40)
    assert (read_adapter(classifier).arrays[name] != before.arrays[name]).any()
    assert (read_adapter(other).arrays[name] == before.arrays[name]).all()
    assert classifier.compute_base_digest() == classifier.base_digest == other.base_digest


def test_there_is_no_dropout_in_training(classifier: Classifier, texts: list[str]) -> None:
    x, mask = batch_of(classifier, texts)
    evaluated = classifier.run(x, mask, 0, classifier.num_stages)
    classifier.train()

    assert classifier.training
    assert torch.equal(classifier.run(x, mask, 0, classifier.num_stages), evaluated)
    assert not any(m.training for m in classifier.base.modules() if isinstance(m, nn.Dropout))
    assert all(
        m.lora_A.training and m.lora_B.training
        for m in classifier.base.modules()
        if isinstance(m, LoraLinear)
    )


def test_the_seed_decides_the_adapter(make_config: MakeConfig, encoders: dict[str, Path]) -> None:
    def first(seed: int) -> Adapter:
        config = make_config(str(encoders["bert"]), lora=LORA, max_tokens=16, seed=seed)
        return read_adapter(load_classifier(config))

    one, same, other = first(1), first(1), first(2)

    assert all((one.arrays[n] == same.arrays[n]).all() for n in one.arrays)
    assert any((one.arrays[n] != other.arrays[n]).any() for n in one.arrays)


def test_load_undoes_training_and_read_returns_copies(
    classifier: Classifier, texts: list[str], randomise: Randomise
) -> None:
    randomise(classifier)
    x, mask = batch_of(classifier, texts)
    saved, logits = read_adapter(classifier), classifier.logits(x, mask)
    train(classifier, texts)
    assert not torch.equal(classifier.logits(x, mask), logits)

    load_adapter(classifier, saved)

    assert torch.equal(classifier.logits(x, mask), logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "f" * 64}, "adapter is for base model ffffffffffff…, expected"),
        ({"tokenizer": "f" * 64}, "adapter is for tokenizer ffffffffffff…, expected"),
        ({"alpha": 6.0}, "adapter has alpha 6.0, expected 12"),
    ],
)
def test_an_adapter_for_something_else_is_refused_and_nothing_changes(
    classifier: Classifier, randomise: Randomise, change: dict[str, object], message: str
) -> None:
    ours = read_adapter(classifier)
    randomise(classifier)
    before = read_adapter(classifier)
    other = Adapter(msgspec.structs.replace(ours.spec, **change), ours.arrays)

    with pytest.raises(IncompatibleAdapter, match=message):
        load_adapter(classifier, other)

    after = read_adapter(classifier)
    assert all((before.arrays[n] == after.arrays[n]).all() for n in before.arrays)


def test_an_adapter_for_other_layers_is_refused(
    make_config: MakeConfig, encoders: dict[str, Path], classifier: Classifier
) -> None:
    lora = msgspec.structs.replace(LORA, layers="last:1")
    other = load_classifier(make_config(str(encoders["bert"]), lora=lora, max_tokens=16))

    with pytest.raises(
        IncompatibleAdapter, match=r"encoder.layer.1.attention.self.query: expected a target"
    ):
        load_adapter(classifier, read_adapter(other))


def test_a_diverged_adapter_is_not_read(classifier: Classifier) -> None:
    with torch.no_grad():
        classifier.head.bias[1] = math.nan

    with pytest.raises(IncompatibleAdapter, match=r"head.bias: 1 of 3 values are NaN or infinite"):
        read_adapter(classifier)


def test_merge_is_exact_and_unmerge_restores_every_bit(
    make_config: MakeConfig, encoders: dict[str, Path], texts: list[str], randomise: Randomise
) -> None:
    config = make_config(str(encoders["bert"]), lora=LORA, max_tokens=16)
    classifier, other = load_classifier(config), load_classifier(config)
    randomise(classifier)
    x, mask = batch_of(classifier, texts)
    adapted = classifier.logits(x, mask)

    merge(classifier)
    torch.testing.assert_close(classifier.logits(x, mask), adapted, atol=1e-5, rtol=0)
    assert classifier.compute_base_digest() == classifier.base_digest
    assert other.compute_base_digest() == other.base_digest

    unmerge(classifier)
    assert torch.equal(classifier.logits(x, mask), adapted)


def test_merged_weights_make_a_plain_copy_compute_the_same(
    make_config: MakeConfig,
    encoders: dict[str, Path],
    texts: list[str],
    classifier: Classifier,
    randomise: Randomise,
) -> None:
    randomise(classifier)
    weights = merged_weights(classifier)
    config = make_config(str(encoders["bert"]), lora=Lora(rank=0), max_tokens=16)
    plain = load_classifier(config).double().float()  # off the shared memory before writing
    plain.base.load_state_dict({n: t for n, t in weights.items() if not n.startswith("head.")})
    plain.head.load_state_dict({n[5:]: t for n, t in weights.items() if n.startswith("head.")})
    x, mask = batch_of(classifier, texts)

    torch.testing.assert_close(plain.logits(x, mask), classifier.logits(x, mask), atol=1e-5, rtol=0)
    merge(classifier)
    assert weights_digest(merged_weights(classifier)) == weights_digest(weights)


@pytest.mark.parametrize("action", [merge, trainable_parameters, read_adapter])
def test_a_merged_classifier_is_not_merged_again_nor_trained(
    classifier: Classifier, action: Callable[[Classifier], object]
) -> None:
    merge(classifier)

    with pytest.raises(ModelError, match="the adapter is merged into the base; unmerge it first"):
        action(classifier)


def test_unmerge_without_merge_is_refused(classifier: Classifier) -> None:
    with pytest.raises(ModelError, match="the adapter is not merged into the base"):
        unmerge(classifier)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            Lora(targets=("query", "q_proj")),
            r"lora.targets: 'q_proj' matches nothing in the base; linear layers are "
            r"encoder.layer.\*.attention.output.dense, encoder.layer.\*.attention.self.key, ",
        ),
        (Lora(layers="last:4"), r'lora.layers = "last:4": the base has 3 blocks'),
        (
            Lora(targets=("*.layer.0.*.query",), layers="last:1"),
            r'lora.targets: .* match no layer within lora.layers = "last:1"',
        ),
        (
            Lora(rank=0, modules_to_save=("pooler",)),
            r"lora.modules_to_save: 'pooler' matches nothing in the base",
        ),
        (
            Lora(targets=("query",), modules_to_save=("encoder.layer.2",)),
            r"encoder.layer.2.attention.self.query is matched by lora.targets and, through "
            r"encoder.layer.2, by lora.modules_to_save",
        ),
    ],
)
def test_patterns_that_fit_nothing_or_too_much_are_refused(
    make_config: MakeConfig, encoders: dict[str, Path], lora: Lora, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load_classifier(make_config(str(encoders["bert"]), lora=lora, max_tokens=16))
