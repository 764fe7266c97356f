"""What closes the gap between the demo's private run and its run without privacy.

Every variant is the demo's private run (simulations/demo/private.toml) with one or two fields
changed; the figure is the best accuracy over rounds on the demo's VALIDATION records. Test
records are not read. `val.without_privacy` is the demo's other run, by the same measure.
Noise is fresh in every run: differences below about one point mean nothing.
"""

from __future__ import annotations

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
PACKAGES = ("torch", "opacus", "flwr", "transformers")
Changes = Mapping[str, Mapping[str, object]]  # table of run.toml -> field -> value


def lora(rank: int, layers: str = "last:1") -> dict[str, object]:
    """Return the fields of [lora] for a rank; 0 is the head alone."""
    return {"rank": rank, "alpha": max(2.0 * rank, 1.0), "layers": layers}


VARIANTS: dict[str, Changes] = {
    "as_in_the_demo": {},
    "rank_0_head_alone": {"lora": lora(0)},
    "rank_16": {"lora": lora(16)},
    "last_2_layers": {"lora": lora(4, "last:2")},
    "batch_128": {"training": {"batch_size": 128}},
    "rounds_4": {"federation": {"rounds": 4}},
    "clipping_flat": {"privacy": {"clipping": "flat"}},
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
        for name, config in configs.items():
            accuracy, seconds = best_accuracy(config, data)
            figures.append(
                Figure(figure=name, value=100 * accuracy, unit="%", note=f"{seconds:.0f} s")
            )
            print(f"{name:32} {100 * accuracy:.1f} %", flush=True)
    head = header("demo_search", packages=PACKAGES, threads=THREADS, seed=SEED, quick=chosen.quick)
    report(head, figures, chosen.json)


if __name__ == "__main__":
    main()
