from collections.abc import Callable

import numpy as np
import pytest
import torch

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.examples import collate
from anabranch.client.tuning.lora import merge
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError, ModelError
from anabranch.protocols.tables import Lora

MakeConfig = Callable[..., RunConfig]
Randomise = Callable[..., None]
SIZES = {"image_size": 8, "channels": 3, "patch": 2, "width": 24, "depth": 3, "heads": 4}


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).random((count, 3, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("lora", "cut", "cached"),
    [
        (Lora(layers="last:1"), 3, 2),
        (Lora(targets=("blocks.0.mlp.*",)), 1, 0),
        (Lora(rank=0), 5, 3),
        (Lora(rank=0, modules_to_save=("norm",)), 4, 3),
        (Lora(targets=("query",), modules_to_save=("patch", "position", "norm*")), 0, 0),
    ],
)
def test_prefix_and_rest_are_the_whole(
    make_config: MakeConfig, randomise: Randomise, lora: Lora, cut: int, cached: int
) -> None:
    classifier = load_classifier(make_config("vit", "image-classification", lora=lora, **SIZES))
    randomise(classifier)
    x, mask = collate(classifier.encode(images(5)))
    whole = classifier.logits(x, mask)

    assert (classifier.cut, classifier.cached_layers) == (cut, cached)
    assert mask is None
    assert whole.shape == (5, 3)
    assert (whole.std(dim=0) > 1e-3).all()
    torch.testing.assert_close(classifier(classifier.prefix(x, mask), mask), whole)


def test_merging_changes_no_logit(make_config: MakeConfig, randomise: Randomise) -> None:
    lora = Lora(targets=("query", "value", "up", "down"))
    classifier = load_classifier(make_config("vit", "image-classification", lora=lora, **SIZES))
    randomise(classifier)
    x, mask = collate(classifier.encode(images(5)))
    before = classifier.logits(x, mask)

    merge(classifier)

    assert classifier.spec.shapes["blocks.1.mlp.up.lora_B.weight"] == (48, 8)
    torch.testing.assert_close(classifier.logits(x, mask), before, atol=1e-5, rtol=0)


def test_patches_are_told_apart_by_position(make_config: MakeConfig) -> None:
    classifier = load_classifier(
        make_config("vit", "image-classification", lora=Lora(rank=0), **SIZES)
    )
    image = torch.zeros(1, 3, 8, 8)
    image[..., :2, :2] = 1
    moved = image.roll(4, dims=-1)

    assert not torch.allclose(classifier.prefix(image, None), classifier.prefix(moved, None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 3}, "model.patch = 3 does not divide model.image_size = 8"),
        ({"heads": 5}, "model.heads = 5 does not divide model.width = 24"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    make_config: MakeConfig, change: dict[str, int], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load_classifier(make_config("vit", "image-classification", **(SIZES | change)))


def test_images_of_another_shape_are_refused(make_config: MakeConfig) -> None:
    classifier = load_classifier(make_config("vit", "image-classification", **SIZES))

    with pytest.raises(DataError, match=r"shape \(1, 8, 8\), the model expects \(3, 8, 8\)"):
        classifier.encode(images(2)[:, :1])
