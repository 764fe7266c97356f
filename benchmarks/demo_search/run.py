"""What made the demo's private run better, and what separates it from the run without privacy.

The rows `val.first_version` … `val.as_in_the_demo` add the changes one after another; the others
change the demo's private run (simulations/demo/private.toml) in the tables they name. A figure
is the mean of the best accuracy over rounds on the demo's VALIDATION records, over REPEATS runs,
with the range, in the rows up to `val.as_in_the_demo`, and of one run in the others. Test records
are not read. Noise is fresh in every run: differences below about one point mean little.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere

import msgspec
import torch

from anabranch.protocols.config import RunConfig, parse
from anabranch.server.store import RunFolder
from anabranch.simulations.demo.run import QUICK_SHARE, Data, run_toml, write_data
from anabranch.simulations.experiment import Experiment, federate
from benchmarks.harness import Figure, header, options, report

SEED = 0
THREADS = 2
REPEATS = 2
PACKAGES = ("torch", "opacus", "flwr", "transformers")
Changes = Mapping[str, Mapping[str, object]]  # table of run.toml -> field -> value


FIRST_LORA: dict[str, object] = {
    "rank": 4,
    "alpha": 8.0,
    "targets": ("query", "value"),
    "layers": "last:1",
}
FIRST_RATES: dict[str, object] = {"learning_rate": 0.3, "head_learning_rate": 6.0}
SMALL_BATCH: dict[str, object] = {"batch_size": 512}
FEW_ROUNDS: dict[str, object] = {"rounds": 16}

LAST_OF_LADDER = "as_in_the_demo"

VARIANTS: dict[str, Changes] = {
    "first_version": {
        "lora": FIRST_LORA,
        "training": FIRST_RATES | SMALL_BATCH,
        "federation": FEW_ROUNDS,
    },
    "then_head_alone": {"training": SMALL_BATCH, "federation": FEW_ROUNDS},
    "then_full_batches": {"federation": FEW_ROUNDS},
    LAST_OF_LADDER: {},
    "batch_512": {"training": SMALL_BATCH},
    "clipping_flat_2": {  # a quarter of the rate, found the same way
        "training": {"learning_rate": 1.5},
        "privacy": {"clipping": "flat", "clipping_norm": 2.0},
    },
    "epsilon_2": {"privacy": {"epsilon": 2.0}},
    "epsilon_32": {"privacy": {"epsilon": 32.0}},
}


def changed(config: RunConfig, changes: Changes) -> RunConfig:
    """Return `config` with fields of its tables replaced."""
    tables = {
        name: msgspec.structs.replace(getattr(config, name), **fields)
        for name, fields in changes.items()
    }
    return msgspec.structs.replace(config, **tables)


def best_accuracy(config: RunConfig, data: Data) -> tuple[float, float]:
    """Return (best validation accuracy over the rounds, seconds of the federation)."""
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(
            config=config, run_toml=b"", sites=data.sites, validation=data.validation_file
        )
        run = federate(experiment, data.train, RunFolder.create(Path(folder) / "run", b""))
    accuracies = (r.coordinator.get("accuracy", 0.0) for r in run.result.history)
    return max(accuracies), run.result.seconds


def measured(name: str, config: RunConfig, data: Data, repeats: int) -> Figure:
    """Return the mean accuracy over `repeats` runs, with its range and a run's median seconds."""
    runs = [best_accuracy(config, data) for _ in range(repeats)]
    accuracies = [100 * accuracy for accuracy, _ in runs]
    seconds = statistics.median(seconds for _, seconds in runs)
    return Figure(
        figure=name,
        value=statistics.mean(accuracies),
        unit="%",
        spread=(min(accuracies), max(accuracies)) if repeats > 1 else None,
        note=f"{seconds:.0f} s",
    )


def main(argv: Sequence[str] | None = None) -> None:
    chosen = options(__doc__, argv)
    torch.set_num_threads(THREADS)
    private = parse(run_toml("private", SEED, chosen.quick), source="private")
    plain = parse(run_toml("federated", SEED, chosen.quick), source="federated")
    configs = {f"val.{name}": changed(private, c) for name, c in VARIANTS.items()}
    configs["val.without_privacy"] = plain
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder), plain, SEED, QUICK_SHARE if chosen.quick else 1.0)
        repeats = 1 if chosen.quick else REPEATS
        for name, config in configs.items():
            figures.append(measured(name, config, data, repeats))
            print(f"{name:32} {figures[-1].value:.1f} %", flush=True)
            if name == f"val.{LAST_OF_LADDER}":
                repeats = 1
    head = header("demo_search", packages=PACKAGES, threads=THREADS, seed=SEED, quick=chosen.quick)
    report(head, figures, chosen.json)


if __name__ == "__main__":
    main()
