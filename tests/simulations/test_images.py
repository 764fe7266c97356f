"""Folders of real images through a whole federation: 1,797 handwritten digits at two sites."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from anabranch.edge.runtime.classify import Model
from anabranch.simulations.simulate import simulate

RUN = """
name = "digits"
seed = 1

[task]
kind = "image-classification"
labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]

[data.columns]
image = { type = "image" }
label = { type = "label" }

[model]
base = "vit"
image_size = 8
patch = 2
width = 48
depth = 2
heads = 2

[lora]
rank = 8
targets = ["query", "value"]
modules_to_save = ["*.mlp", "patch", "position"]

[training]
learning_rate = 0.004
batch_size = 32
local_epochs = 3

[federation]
rounds = 8
quorum = 2
"""
EXPERIMENT = """
run = "run.toml"
test = "test"
[sites]
large = "large"
small = "small"
"""


def write_folders(folder: Path) -> None:
    """Write PNGs: a fifth for the test, the rest to two sites, one twice as large."""
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = "test" if i % 5 == 0 else "small" if i % 3 == 0 else "large"
        path = folder / part / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels / 16 * 255).astype(np.uint8)).save(path)


def test_two_sites_learn_digits_and_release_a_model_for_images(tmp_path: Path) -> None:
    write_folders(tmp_path)
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "experiment.toml").write_text(EXPERIMENT)

    summary = simulate(tmp_path / "experiment.toml", tmp_path / "out")

    assert summary["accuracy"]["federated"] > 0.85
    assert summary["release"] is not None, summary["release_refused"]
    model = Model.open(tmp_path / "out" / "release", precision="fp32")
    digit = load_digits().images[0] / 16
    assert model.classify(digit[None, None].astype(np.float32))[0][0] == "0"
