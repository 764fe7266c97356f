from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from anabranch.client.privacy import DpPlan
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.convolution import ConvolutionalNetwork
from anabranch.client.tuning.examples import Examples, collate
from anabranch.client.tuning.lora import load_adapter, merge, read_adapter, trainable_parameters
from anabranch.client.tuning.private import fit_private
from anabranch.client.tuning.training import Schedule, fit
from anabranch.edge.export.joint import step_graph
from anabranch.edge.export.onnx import TOLERANCE, export_classifier
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError, ModelError
from anabranch.protocols.tables import Engine, Lora, Training

MakeConfig = Callable[..., RunConfig]
Randomise = Callable[..., None]
WHOLE = Lora(rank=0, modules_to_save=("*",))
SIZES = {"image_size": 8, "channels": 3}


def images(count: int, size: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).random((count, channels, size, size), np.float32)


def made(make_config: MakeConfig, lora: Lora = WHOLE, **sizes: int) -> Classifier:
    return load_classifier(make_config("cnn", "image-classification", lora=lora, **SIZES | sizes))


def plain(classifier: Classifier, size: int, channels: int = 3) -> nn.Sequential:
    """Return the same network as its users write it, with the same weights."""
    padding = 1 if size < 16 else 0
    side = size
    for _ in range(2):
        side = (side + 2 * padding - 2) // 2
    module = nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, padding=padding), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=padding), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * side * side, 128), nn.ReLU(), nn.Linear(128, 3)),
    )
    base = classifier.base
    names = ("conv1", "conv2", "dense")
    layers = [*(base.get_submodule(name) for name in names), classifier.head]
    for own, layer in zip((module[0], module[3], module[7], module[9]), layers, strict=True):
        own.load_state_dict(layer.state_dict())
    return module


@settings(max_examples=15, deadline=None)
@given(size=st.integers(8, 32), channels=st.sampled_from([1, 3]))
def test_every_image_size_is_classified_as_by_the_plain_network(
    make_config: MakeConfig, randomise: Randomise, size: int, channels: int
) -> None:
    classifier = made(make_config, image_size=size, channels=channels)
    randomise(classifier)
    x, mask = collate(classifier.encode(images(3, size, channels)))
    labels = torch.tensor([0, 1, 2])
    reference = plain(classifier, size, channels)

    logits = classifier(classifier.prefix(x, mask), mask)
    functional.cross_entropy(logits, labels).backward()
    functional.cross_entropy(reference(x), labels).backward()

    assert mask is None
    torch.testing.assert_close(logits, reference(x), atol=1e-4, rtol=1e-5)
    ours = trainable_parameters(classifier)
    for name, place in (("conv1", 0), ("conv2", 3), ("dense", 7), ("head", 9)):
        theirs = reference[place].weight.grad
        torch.testing.assert_close(ours[f"{name}.weight"].grad, theirs, atol=1e-4, rtol=1e-4)


def test_32_pixels_in_colour_and_ten_labels_have_154_thousand_values() -> None:
    base = ConvolutionalNetwork(3, 32)
    count = sum(p.numel() for p in base.parameters()) + 128 * 10 + 10

    assert count == 153_962


@pytest.mark.parametrize(
    ("lora", "cut", "shape"),
    [
        (WHOLE, 0, (3, 8, 8)),
        (Lora(rank=0, modules_to_save=("conv2",)), 1, (16, 4, 4)),
        (Lora(targets=("dense",)), 2, (32, 2, 2)),
        (Lora(rank=0, modules_to_save=("dense",)), 2, (32, 2, 2)),
        (Lora(rank=0), 3, (128,)),
    ],
)
def test_prefix_and_rest_are_the_whole(
    make_config: MakeConfig,
    randomise: Randomise,
    lora: Lora,
    cut: int,
    shape: tuple[int, ...],
) -> None:
    classifier = made(make_config, lora)
    randomise(classifier)
    x, mask = collate(classifier.encode(images(5)))
    whole = classifier.logits(x, mask)
    below = classifier.prefix(x, mask)

    assert (classifier.cut, classifier.cached_layers) == (cut, 0)
    assert below.shape[1:] == shape
    assert (whole.std(dim=0) > 1e-3).all()
    torch.testing.assert_close(classifier(below, mask), whole)


def test_the_base_is_that_of_the_seed(make_config: MakeConfig) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = (
        load_classifier(make_config("cnn", "image-classification", lora=WHOLE, seed=seed, **SIZES))
        for seed in (1, 1, 2)
    )

    assert one.spec == same.spec
    assert one.base_digest != other.base_digest
    assert torch.equal(torch.get_rng_state(), before)


def test_training_in_full_changes_every_tensor_and_lowers_the_loss(
    make_config: MakeConfig,
) -> None:
    classifier = made(make_config)
    features = classifier.encode(images(12))
    examples = Examples(features, torch.arange(12) % 3)
    before = read_adapter(classifier)
    training = Training(optimizer="adamw", learning_rate=3e-3, batch_size=6)

    fits = [
        fit(classifier, examples, training, steps=20, schedule=Schedule(total_steps=20), seed=seed)
        for seed in (0, 1)
    ]

    after = read_adapter(classifier)
    first, second = (one.loss for one in fits)
    assert first is not None
    assert second is not None
    assert second < first < 1.0986
    assert all((after.arrays[n] != before.arrays[n]).any() for n in before.arrays)
    assert all(a.flags.c_contiguous for a in after.arrays.values())
    assert classifier.compute_base_digest() == classifier.spec.base
    load_adapter(classifier, before)
    assert all(
        np.array_equal(read_adapter(classifier).arrays[n], a) for n, a in before.arrays.items()
    )


@pytest.mark.parametrize("engine", ["fast", "opacus"])
def test_a_private_step_moves_every_tensor_by_the_clipped_gradients(
    make_config: MakeConfig,
    randomise: Randomise,
    caplog: pytest.LogCaptureFixture,
    engine: Engine,
) -> None:
    classifier = made(make_config)
    randomise(classifier)
    start = read_adapter(classifier)
    examples = Examples(classifier.encode(images(5)), torch.arange(5) % 3)
    reference = plain(classifier, 8)
    training = Training(
        optimizer="sgd", momentum=0.0, learning_rate=1.0, batch_size=5, local_steps=1
    )
    plan = DpPlan(
        noise_multiplier=1e-30,
        clipping="flat",
        clipping_norm=0.5,
        sample_rate=1.0,
        steps=1,
        delta=1e-5,
        epsilon=1.0,
    )

    with caplog.at_level("INFO"):
        fit_private(classifier, examples, plan, training, steps=1, step_offset=0, engine=engine)

    after = read_adapter(classifier)
    expected = torch.zeros(sum(p.numel() for p in reference.parameters()))
    for x, y in zip(examples.features, examples.labels, strict=True):
        loss = functional.cross_entropy(reference(x[None]), y[None])
        parts = torch.autograd.grad(loss, list(reference.parameters()))
        gradient = torch.cat([g.ravel() for g in parts])
        expected += gradient * min(1.0, 0.5 / float(gradient.norm()))
    names = [
        f"{m}.{part}" for m in ("conv1", "conv2", "dense", "head") for part in ("weight", "bias")
    ]
    moved = np.concatenate([(start.arrays[n] - after.arrays[n]).ravel() for n in names])
    np.testing.assert_allclose(moved, expected.numpy() / 5, atol=1e-6)
    if engine == "fast":
        assert "gradients per record come from Opacus" in caplog.text
        assert "conv1.bias, conv1.weight" in caplog.text


def test_merging_changes_no_logit(make_config: MakeConfig, randomise: Randomise) -> None:
    classifier = made(make_config, Lora(targets=("dense",), modules_to_save=("conv2",)))
    randomise(classifier)
    x, mask = collate(classifier.encode(images(5)))
    before = classifier.logits(x, mask)

    merge(classifier)

    assert classifier.spec.targets == ("dense",)
    torch.testing.assert_close(classifier.logits(x, mask), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [WHOLE, Lora(targets=("dense",))])
def test_onnxruntime_computes_what_torch_computes(
    make_config: MakeConfig, randomise: Randomise, tmp_path: Path, lora: Lora
) -> None:
    classifier = made(make_config, lora, image_size=17)
    randomise(classifier)

    assert export_classifier(classifier, tmp_path / "model.onnx") <= TOLERANCE


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (Lora(), "lora.targets: 'query' matches nothing in the base; linear layers are dense"),
        (Lora(targets=("conv1",)), "'conv1' matches nothing in the base; linear layers are dense"),
        (Lora(targets=("dense",), layers="last:1"), "the base has 0 blocks"),
        (
            Lora(targets=("dense",), modules_to_save=("*",)),
            "dense is matched by lora.targets and, through dense, by lora.modules_to_save",
        ),
    ],
)
def test_what_the_network_does_not_have_is_refused(
    make_config: MakeConfig, lora: Lora, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        made(make_config, lora)


def test_images_of_another_shape_are_refused(make_config: MakeConfig) -> None:
    with pytest.raises(DataError, match=r"shape \(1, 8, 8\), the model expects \(3, 8, 8\)"):
        made(make_config).encode(images(2)[:, :1])


def test_it_reads_images_and_nothing_else(make_config: MakeConfig) -> None:
    with pytest.raises(ModelError, match=r"model.base = 'cnn' does not do text-classification"):
        load_classifier(make_config("cnn"))


def test_devices_do_not_train_it(make_config: MakeConfig) -> None:
    with pytest.raises(ModelError, match=r"the training step uses .*max_pool2d.* no form in ONNX"):
        step_graph(made(make_config))
    with pytest.raises(ModelError, match="gradients per record are not known for Conv2d"):
        step_graph(made(make_config), clipped=True)
