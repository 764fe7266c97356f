"""What the federations of this benchmark train: records as files, and the text of each run.toml.

heart       Fed-Heart-Disease: four hospitals, logistic regression
wide        the same records and a perceptron whose delta has the wanted size; one step a
            round, so that what a round lasts is the network path
tiny        the same records, logistic regression, one step a round
coding      the demo's clinical coding: MiniLM, LoRA in its last two layers, four hospitals
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from anabranch.protocols.config import parse
from anabranch.simulations.demo.run import write_data
from benchmarks.fed_heart.data import HOSPITALS, NUM_FEATURES, data_folder, load, published_split

CODING_SHARE = 0.25  # of the demo's records: what its --quick takes
COLUMNS = [f"x{i:02}" for i in range(NUM_FEATURES)]
LABELS = ("healthy", "disease")
PLAIN_SGD = 'optimizer = "sgd"\nlearning_rate = 0.01\nmomentum = 0.0'
STEP = f"{PLAIN_SGD}\nbatch_size = 8\nlocal_steps = 1"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One federation's work: the records of each site, and the run."""

    name: str
    records: Mapping[str, Path]
    toml: str


def heart_records(folder: Path) -> dict[str, Path]:
    """Write the training records of the four hospitals, scaled as published; site -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    split = published_split(load(data_folder()))
    paths = {}
    for name, examples in zip(HOSPITALS, split.train, strict=True):
        paths[name] = folder / f"{name}.csv"
        with paths[name].open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow([*COLUMNS, "label"])
            for x, y in zip(examples.features, examples.labels, strict=True):
                rows.writerow([*x.tolist(), LABELS[int(y)]])
    return paths


def heart(rounds: int) -> str:
    """Return a run of logistic regression over the hospitals, one epoch a round."""
    training = f"{PLAIN_SGD}\nbatch_size = 4"
    return _run("heart", 'base = "logistic"', "rank = 0", training, rounds)


def tiny(rounds: int, name: str) -> str:
    """Return a run of logistic regression, one step a round."""
    return _run(name, 'base = "logistic"', "rank = 0", STEP, rounds)


def wide(delta_bytes: int, rounds: int) -> str:
    """Return a run whose float32 delta has about `delta_bytes`.

    A square layer of width w is trained in full, and the head of two labels: (w + 1)(w + 2)
    numbers of 4 bytes.
    """
    width = round(math.sqrt(delta_bytes / 4 + 0.25) - 1.5)
    model = f'base = "mlp"\nhidden = [{width}, {width}]'
    lora = 'rank = 0\nmodules_to_save = ["hidden.1"]'
    return _run(f"wide-{delta_bytes}", model, lora, STEP, rounds)


def coding(folder: Path, rounds: int) -> Task:
    """Write a part of the records of the demo's hospitals; its run without privacy."""
    text = files("anabranch.simulations.demo").joinpath("federated.toml").read_text()
    text = re.sub(r"(?m)^rounds = .+$", f"rounds = {rounds}", text)
    data = write_data(folder, parse(text.encode(), source="coding"), 0, CODING_SHARE)
    return Task(name="coding", records=dict(data.sites), toml=text)


def _run(name: str, model: str, lora: str, training: str, rounds: int) -> str:
    """Return a run.toml over the hospitals' records; every hospital takes part in every round."""
    labels = ", ".join(f'"{label}"' for label in LABELS)
    columns = "\n".join(f'{column} = {{ type = "number" }}' for column in COLUMNS)
    return f"""name = "{name}"
seed = 1

[task]
kind = "tabular-classification"
labels = [{labels}]

[data.columns]
{columns}
label = {{ type = "label" }}

[model]
{model}

[lora]
{lora}

[training]
{training}

[federation]
rounds = {rounds}
quorum = {len(HOSPITALS)}
cohort = {len(HOSPITALS)}
deadline_s = 300.0
client_evaluation = false
"""
