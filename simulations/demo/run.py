"""The demo: what federation buys, what privacy costs, and a model that fits on a phone.

    records ─► linear probe ─► four hospitals alone ─► pooled ─► federated
            ─► federated with DP ─► release (int8) ─► table, report.html, summary.json

Every row of the table is chosen on validation categories and measured once on test
categories that no model has seen. The run folder is that of the private run; the run
without privacy is in its folder `without-privacy`. With `secure` both runs are made once more
under secure aggregation, and these count: the run folder's, and `secure-without-privacy`.
"""

from __future__ import annotations

import csv
import io
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from anabranch.client.data.records import Records, load_records
from anabranch.client.models import MODELS, require_device
from anabranch.client.tuning.metrics import confusion, evaluate
from anabranch.edge.runtime.classify import Model
from anabranch.protocols.config import RunConfig, parse
from anabranch.protocols.tables import Device
from anabranch.server import outcome
from anabranch.server.charts import Comparison, comparison_svg
from anabranch.server.evaluation import logits
from anabranch.server.outcome import Finished
from anabranch.server.store import RunFolder
from anabranch.simulations import baselines
from anabranch.simulations.demo import icd
from anabranch.simulations.experiment import Experiment, federate
from anabranch.storage.files import write_atomic

CONFIGURATIONS = ("alone", "federated", "private")  # the TOML files of this folder
SECURE = b"\n[secure_aggregation]\nminimum = 3\n"
# One step of rate 0.1 on a gradient of norm 1 at most. Adam divides by how large updates are, so
# the grid has to be fine beside them; the private run's steps are larger.
RANGE = b"range = 0.1\n"
QUICK_SHARE = 0.25  # of the records
QUICK = {"rounds": 3, "int8_tolerance": 0.05}  # hardly trained, so near the borders everywhere
EXAMPLES = (
    "Chest pain spreading to the left arm, blocked coronary artery",
    "Wheezing and shortness of breath after a cold",
    "Broken wrist after a fall on ice",
    "High blood pressure in the seventh month of pregnancy",
    "Itchy red rash on both forearms",
)


class Stages(Protocol):
    """Where the demo tells how far it is."""

    def stage(self, name: str, total: int) -> None:
        """Begin a stage."""

    def advance(self) -> None:
        """Finish one step of it."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The demo's records, as files and in memory."""

    sites: Mapping[str, Path]
    train: Mapping[str, Records]
    validation: Records
    test: Records
    validation_file: Path

    @property
    def pooled(self) -> Records:
        """Return all hospitals' training records together."""
        texts = [text for one in self.train.values() for text in one.inputs]
        return Records(texts, np.concatenate([one.labels for one in self.train.values()]))


def run_demo(
    texts: Sequence[str],
    output: Path,
    *,
    seed: int,
    threads: int,
    device: Device,
    progress: Stages,
    quick: bool = False,
    secure: bool = False,
) -> tuple[dict[str, Any], list[tuple[str, float]]]:
    """Run the whole demo; return summary.json and the int8 model's codes of `texts`.

    `quick` takes a part of the records and few rounds: it shows that everything works, not
    what it can reach. `secure` adds a run under secure aggregation, and makes the run with DP
    under it, too. Raises ConfigError if `output` is not empty or the device is not there.
    """
    started = time.monotonic()
    require_device(device)
    torch.set_num_threads(threads)
    alone_toml, plain_toml, private_toml = (run_toml(n, seed, quick) for n in CONFIGURATIONS)
    secure_toml = plain_toml + SECURE + RANGE
    private_toml += SECURE if secure else b""
    plain, private = parse(plain_toml, source="federated"), parse(private_toml, source="private")
    folder = RunFolder.create(output, private_toml)
    progress.stage("records", 1)
    data = write_data(output / "data", plain, seed, QUICK_SHARE if quick else 1.0)
    progress.advance()

    predictions = _baselines(parse(alone_toml, source="alone"), data, device, progress)
    nested = RunFolder.create(output / "without-privacy", plain_toml)
    open_run = _federate(plain, plain_toml, data, nested, "federated", device, progress)
    private_run = _federate(
        private, private_toml, data, folder, "federated with DP", device, progress
    )
    sums: list[dict[str, Any]] = []
    runs = {"federated": open_run, "federated_dp": private_run}
    if secure:
        config = parse(secure_toml, source="federated, secure")
        nested = RunFolder.create(output / "secure-without-privacy", secure_toml)
        name = "federated, secure aggregation"
        runs["federated_secure"] = _federate(
            config, secure_toml, data, nested, name, device, progress, sums
        )
    for name, one in runs.items():
        predictions[name] = logits(one.config, one.result.best_adapter, data.test, device=device)

    progress.stage("release", 1)
    made = outcome.release(private_run, data.test, threads=threads)
    metrics = {name: evaluate(p, data.test.labels) for name, p in predictions.items()}
    summary = outcome.summary_of(private_run, seconds=time.monotonic() - started)
    summary |= {
        "accuracy": _rows(metrics, "accuracy"),
        "macro_f1": _rows(metrics, "macro_f1"),
        "best_local": max(m["accuracy"] for n, m in metrics.items() if n.startswith("local.")),
        "without_privacy": {
            "bytes_up": open_run.result.bytes_up,
            "bytes_down": open_run.result.bytes_down,
            "rounds": len(open_run.result.history),
            "best_round": open_run.result.best_round,
        },
        "secure_aggregation": _secure(runs, metrics, sums) if secure else None,
        "target_epsilon": private.privacy.epsilon if private.privacy else None,
        "num_test": len(data.test),
        "release": outcome.release_summary(made),
    }
    guesses = predictions["federated_dp"].argmax(1)
    matrix = confusion(guesses, data.test.labels, len(private.task.labels)).tolist()
    at_sites = _accuracy_by_hospital(predictions, data)
    _report(private_run, open_run, summary, made, matrix, metrics, data, at_sites)
    folder.summarise(summary)
    coded = Model.open(output / "release", threads=threads).classify(texts)
    progress.advance()
    return summary, coded


def run_toml(name: str, seed: int, quick: bool = False) -> bytes:
    """Return alone.toml, federated.toml or private.toml of this folder with another seed."""
    text = files(__package__).joinpath(f"{name}.toml").read_text()
    for field, value in {"seed": seed, **(QUICK if quick else {})}.items():
        text = re.sub(rf"^{field} = .+$", f"{field} = {value}", text, flags=re.MULTILINE)
    return text.encode()


def write_data(folder: Path, config: RunConfig, seed: int, share: float) -> Data:
    """Write the hospitals' files and the coordinator's, then read them back as a site would."""
    built = icd.build(seed, share)
    parts = {**built.train, "validation": built.validation, "test": built.test}
    paths = {}
    for name, records in parts.items():
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["text", "chapter"])
        writer.writerows((one.text, config.task.labels[one.label]) for one in records)
        paths[name] = folder / f"{name}.csv"
        write_atomic(paths[name], text.getvalue().encode())
    read = {name: load_records(path, config) for name, path in paths.items()}
    return Data(
        sites={name: paths[name] for name in built.train},
        train={name: read[name] for name in built.train},
        validation=read["validation"],
        test=read["test"],
        validation_file=paths["validation"],
    )


def _baselines(
    config: RunConfig, data: Data, device: Device, progress: Stages
) -> dict[str, NDArray[np.float32]]:
    """Return test logits of majority, linear probe, every hospital alone, and pooled."""
    pooled, labels = data.pooled, len(config.task.labels)
    predictions = {"majority": baselines.majority(pooled, data.test, labels)}
    progress.stage("linear probe", 1)
    predictions["linear_probe"] = baselines.linear_probe(
        config, pooled, data.validation, data.test, MODELS, device
    )
    progress.advance()
    alone = {f"local.{name}": records for name, records in data.train.items()}
    for name, records in {**alone, "pooled": pooled}.items():
        progress.stage(name.replace("local.", "alone: "), config.federation.rounds)
        adapter = baselines.train_alone(
            config, name, records, data.validation, MODELS, device, lambda _, __: progress.advance()
        )
        predictions[name] = logits(config, adapter, data.test, device=device)
    return predictions


def _federate(
    config: RunConfig,
    toml: bytes,
    data: Data,
    folder: RunFolder,
    name: str,
    device: Device,
    progress: Stages,
    sums: list[dict[str, Any]] | None = None,
) -> Finished:
    """Return a finished run; `sums` is given what its events say of every secure sum."""
    progress.stage(name, config.federation.rounds)

    def on_event(kind: str, **fields: Any) -> None:
        if kind == "round_evaluated":
            progress.advance()
        if kind == "secure_sum" and sums is not None:
            sums.append(fields)

    experiment = Experiment(
        config=config,
        run_toml=toml,
        sites=data.sites,
        validation=data.validation_file,
        device=device,
    )
    return federate(experiment, data.train, folder, on_event)


def _secure(
    runs: Mapping[str, Finished],
    metrics: Mapping[str, Mapping[str, float]],
    sums: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """Return what secure aggregation changed, and what it took in a round."""
    run, other = runs["federated_secure"].result, runs["federated"].result
    change = metrics["federated_secure"]["accuracy"] - metrics["federated"]["accuracy"]
    return {
        "rounds": len(sums),
        "accuracy_difference_points": 100 * abs(change),
        "seconds_per_round": sum(one["seconds"] for one in sums) / len(sums),
        "bytes_up_per_round": run.bytes_up / len(run.history),
        "bytes_up_per_round_plain": other.bytes_up / len(other.history),
    }


def _accuracy_by_hospital(
    predictions: Mapping[str, NDArray[np.float32]], data: Data
) -> dict[str, dict[str, float]]:
    """Return series -> hospital -> accuracy on test records of the hospital's own chapters.

    "alone" is the hospital's own model, which has seen hardly anything else.
    """
    position = {chapter: label for label, chapter in enumerate(icd.CHAPTERS)}
    result: dict[str, dict[str, float]] = {}
    for site in data.sites:
        own = [position[chapter] for chapter in icd.SPECIALITIES[site]]
        rows = np.isin(data.test.labels, own)
        series = {
            "alone": f"local.{site}",
            "federated": "federated",
            "federated with DP": "federated_dp",
        }
        for name, key in series.items():
            right = predictions[key][rows].argmax(1) == data.test.labels[rows]
            result.setdefault(name, {})[site] = float(right.mean())
    return result


def _rows(metrics: Mapping[str, Mapping[str, float]], metric: str) -> dict[str, float]:
    """Return the table's rows for one metric, with the hospitals' mean as local_mean."""
    local = [m[metric] for name, m in metrics.items() if name.startswith("local.")]
    rows = {name: m[metric] for name, m in metrics.items()}
    return rows | {"local_mean": sum(local) / len(local)}


def _report(
    private: Finished,
    plain: Finished,
    summary: Mapping[str, Any],
    made: Any,
    matrix: list[list[int]],
    metrics: Mapping[str, Mapping[str, float]],
    data: Data,
    at_sites: Mapping[str, Mapping[str, float]],
) -> None:
    epsilon = summary["target_epsilon"]
    names = {
        "majority": "majority class",
        "linear_probe": "linear probe",
        **{name: name.replace("local.", "alone: ") for name in metrics if "local." in name},
        "federated": "federated",
        **({"federated_secure": "federated, secure sum"} if "federated_secure" in metrics else {}),
        "federated_dp": f"federated, ε = {epsilon:g}",
        "pooled": "pooled (upper bound)",
    }
    rows = [
        Comparison(
            name=shown,
            accuracy=metrics[name]["accuracy"],
            macro_f1=metrics[name]["macro_f1"],
            ours=name.startswith("federated"),
        )
        for name, shown in names.items()
    ]
    svg = comparison_svg(
        rows,
        title="Clinical coding by four hospitals",
        subtitle=f"accuracy on {len(data.test)} diagnosis texts of unseen categories",
    )
    write_atomic(private.folder.path / "comparison.svg", svg.encode())
    outcome.report(
        private,
        summary=summary,
        made=made,
        matrix=matrix,
        comparison=rows,
        others={"federated": plain},
        title="Clinical coding by four hospitals",
        description=(
            "Diagnosis texts to ICD-10-CM chapters. Every hospital has mostly its own "
            "speciality; categories in the test set are in no hospital's records."
        ),
        at_sites=at_sites,
        sites_evaluated_on=(
            "the test records of each hospital's own speciality; one that has hardly seen other "
            "chapters has fewer to confuse them with, and codes nothing else"
        ),
        rounds_evaluated_on=f"{len(data.validation)} validation texts of further categories",
        evaluated_on=f"{len(data.test)} diagnosis texts of unseen categories",
        confusion_of="the adapter trained with DP, on the test records",
    )
