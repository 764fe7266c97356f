"""Make the records of this example: invented patients of three invented hospitals.

Run it once more and you get the same files: python make_records.py
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
# Hospital -> patients, mean age, share of smokers: unequal on purpose.
HOSPITALS = {"north": (420, 68.0, 0.35), "south": (260, 52.0, 0.2), "harbour": (150, 60.0, 0.5)}


def patients(n: int, age: float, smokers: float, rng: np.random.Generator) -> list[list[object]]:
    """Return rows of age, systolic pressure, smoker, readmitted."""
    ages = np.clip(rng.normal(age, 12, n), 18, 99).round()
    pressure = np.clip(rng.normal(110 + 0.4 * (ages - 40), 14), 80, 220).round()
    smoker = rng.random(n) < smokers
    score = 0.06 * (ages - 60) + 0.05 * (pressure - 120) + 1.6 * smoker - 0.6
    readmitted = rng.random(n) < 1 / (1 + np.exp(-1.5 * score))
    return [
        [int(a), int(p), "yes" if s else "no", "yes" if r else "no"]
        for a, p, s, r in zip(ages, pressure, smoker, readmitted, strict=True)
    ]


def main() -> None:
    """Write one CSV per hospital, and the coordinator's two."""
    rng = np.random.default_rng(7)
    files = {name: patients(*facts, rng) for name, facts in HOSPITALS.items()}
    files["validation"] = patients(300, 60.0, 0.35, rng)
    files["test"] = patients(600, 60.0, 0.35, rng)
    for name, rows in files.items():
        with (HERE / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["age", "systolic", "smoker", "readmitted"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
