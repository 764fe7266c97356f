"""Small runs that many tests use: their run.toml and their records."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anabranch.protocols.config import RunConfig, parse

TABLE_RUN = """
name = "tiny"
seed = 3

[task]
kind = "tabular-classification"
labels = ["no", "yes"]

[data.columns]
a = { type = "number", mean = 1.0, std = 2.0 }
b = { type = "number" }
y = { type = "label" }

[model]
base = "mlp"
hidden = [5, 7]

[lora]
rank = 3
alpha = 6.0
targets = ["hidden.*"]

[training]
batch_size = 8
learning_rate = 0.05
local_epochs = 2

[federation]
rounds = 2
"""

TEXT_RUN = """
name = "tiny-text"
seed = 3

[task]
kind = "text-classification"
labels = ["heart", "bone"]

[data.columns]
text = { type = "text" }
y = { type = "label" }

[model]
base = "minilm"
max_tokens = 16

[lora]
rank = 2
alpha = 4.0
layers = "last:1"

[training]
batch_size = 4
learning_rate = 0.001

[federation]
rounds = 2
"""

PRIVATE = """
[privacy]
epsilon = 8.0
"""


def table_run(*replacements: tuple[str, str], extra: str = "") -> RunConfig:
    """Return TABLE_RUN with text replaced and tables added."""
    return parse(table_text(*replacements, extra=extra), source="run.toml")


def table_text(*replacements: tuple[str, str], extra: str = "") -> str:
    """Return the TOML of `table_run`; a replacement that finds nothing is a mistake."""
    text = TABLE_RUN
    for old, new in replacements:
        if old not in text:
            raise ValueError(f"{old!r} is not in the run")
        text = text.replace(old, new)
    if (
        "method = " not in text
    ):  # the default trains one factor a round, which many expectations do not want
        text = text.replace("[federation]", '[federation]\nmethod = "fedavg"')
    return text + extra


def write_table(path: Path, *, n: int = 40, seed: int = 0, shift: float = 0.0) -> Path:
    """Write a CSV of two numbers and a label that depends on both."""
    rng = np.random.default_rng(seed)
    x = rng.normal(shift, 1.0, (n, 2))
    labels = np.where(x[:, 0] * 2 - x[:, 1] + rng.normal(0, 0.3, n) > 0, "yes", "no")
    rows = [f"{a:.5f},{b:.5f},{y}" for (a, b), y in zip(x, labels, strict=True)]
    path.write_text("a,b,y\n" + "\n".join(rows) + "\n")
    return path


def write_site(folder: Path, name: str, data: Path) -> Path:
    """Write site.toml for records that lie elsewhere."""
    folder.mkdir(parents=True)
    (folder / "site.toml").write_text(f'name = "{name}"\ndata = "{data}"\n')
    return folder
