"""anabranch edge train, infer (bundles), quantize: a model of the device's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.edge_trust import Home_, Trust, trusted_keys
from anabranch.cli.output import Json, emit, table

if TYPE_CHECKING:
    from anabranch.edge.runtime.bundle import Bundle
    from anabranch.edge.runtime.bundle_manifest import Precision as PrecisionName
    from anabranch.edge.runtime.home import Home
    from anabranch.edge.runtime.personal import Personalised
    from anabranch.edge.runtime.predict import Score

BundleFolder = Annotated[Path, typer.Argument(help="A bundle's folder.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]


class Engine(StrEnum):
    """What computes the gradients."""

    joint = "joint"
    ort_training = "ort-training"


class Weights(StrEnum):
    """Precision of the frozen weights."""

    fp32 = "fp32"
    int8 = "int8"
    int4 = "int4"


class Quantized(StrEnum):
    """Precision of an exported model."""

    int8 = "int8"
    int4 = "int4"


def train(
    bundle: BundleFolder,
    data: Annotated[
        Path | None, typer.Argument(help="Records: .jsonl or .csv of texts and tables, or .npz.")
    ] = None,
    home: Home_ = None,
    trust: Trust = None,
    engine: Annotated[Engine, typer.Option(help="What computes the gradients.")] = Engine.joint,
    precision: Annotated[Weights, typer.Option(help="Of the frozen weights.")] = Weights.fp32,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps; default: the bundle's.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="In place of --steps.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of records and the held-out part.")] = 0,
    threads: Threads = 1,
    memory_mb: Annotated[
        int | None, typer.Option(min=1, help="Narrows the bundle's limit of memory.")
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Bring back the adapter before.")] = False,
    as_json: Json = False,
) -> int:
    """Train a model of this device's own; it is kept only if held-out records say it is no worse.

    Nothing leaves the device. A training that was stopped goes on where it was.
    """
    if steps is not None and epochs is not None:
        raise typer.BadParameter("give --steps or --epochs, not both")
    if (data is None) != undo:
        raise typer.BadParameter("give the records in DATA, or --undo alone")
    opened, place = _open(bundle, home, trust)
    if data is None:
        return _undo(opened, place, as_json=as_json)

    import msgspec

    from anabranch.edge.runtime.data import read_records
    from anabranch.edge.runtime.personal import personalise

    records = read_records(data, opened.manifest, opened.tokenizer)
    training = opened.manifest.training
    if epochs is not None:
        training = msgspec.structs.replace(training, local_epochs=epochs, local_steps=None)
    done = personalise(
        opened,
        records,
        place,
        training=training,
        steps=steps,
        seed=seed,
        engine=engine.value,
        precision=precision.value,
        threads=threads,
        memory_bytes=None if memory_mb is None else memory_mb << 20,
    )
    emit(_result(done), _told(opened, done), as_json=as_json)
    return 0


def quantize(
    bundle: BundleFolder,
    out: Annotated[Path, typer.Argument(help="The .onnx file to write.")],
    home: Home_ = None,
    trust: Trust = None,
    precision: Annotated[Quantized, typer.Option(help="Of the weights.")] = Quantized.int8,
    released: Annotated[
        bool, typer.Option("--released", help="With the released adapter, not this device's own.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Write the device's own model as one quantized ONNX file."""
    from anabranch.edge.runtime.personal import in_use
    from anabranch.edge.runtime.personalised import export_model

    opened, place = _open(bundle, home, trust)
    own = None if released else in_use(place, opened)
    export_model(opened, own or opened.adapter, out, precision=precision.value)
    size, whose = out.stat().st_size, _whose(own is not None)
    text = f"{out}: {size / 1e6:.1f} MB, {precision.value} weights, {whose} adapter"
    result = {"model": str(out), "bytes": size, "precision": precision.value, "adapter": whose}
    emit(result, text, as_json=as_json)
    return 0


def is_bundle(folder: Path) -> bool:
    """Return whether manifest.json in `folder` says that it is a bundle, and not a release."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == "bundle"


def ranked(
    folder: Path,
    texts: Sequence[str],
    *,
    home: Path | None,
    trust: Sequence[str] | None,
    released: bool,
    precision: PrecisionName,
    threads: int,
    top: int,
) -> tuple[str, list[list[tuple[str, float]]]]:
    """Return (whose adapter answers, the `top` labels of every text) with a bundle's model."""
    from anabranch.edge.runtime.personal import in_use
    from anabranch.edge.runtime.predict import Predictor

    opened, place = _open(folder, home, trust)
    own = None if released else in_use(place, opened)
    predictor = Predictor.open(opened, precision=precision, adapter=own, threads=threads)
    return _whose(own is not None), predictor.ranked(texts, top=top)


def _open(folder: Path, home: Path | None, trust: Sequence[str] | None) -> tuple[Bundle, Home]:
    from anabranch.edge.runtime.bundle import open_bundle
    from anabranch.edge.runtime.home import Home

    place = Home.default() if home is None else Home(home)
    keys = trusted_keys(trust, home)
    return open_bundle(folder, trusted=keys, versions=place.versions), place


def _undo(bundle: Bundle, home: Home, *, as_json: bool) -> int:
    from anabranch.edge.runtime.personal import undo

    whose = _whose(undo(home, bundle) is not None)
    text = f"{bundle.manifest.name}: the {whose} adapter from before is in use again"
    emit({"adapter": whose, "undone": True}, text, as_json=as_json)
    return 0


def _whose(own: bool) -> str:
    return "personal" if own else "released"


def _result(done: Personalised) -> dict[str, Any]:
    return {
        "kept": done.kept,
        "before": _score(done.before),
        "after": _score(done.after),
        "steps": done.trained.steps,
        "resumed_at": done.trained.resumed_at,
        "seconds": done.trained.seconds,
        "losses": done.trained.losses.tolist(),
        "note": done.trained.note,
    }


def _score(score: Score) -> dict[str, float]:
    return {"records": score.records, "accuracy": score.accuracy, "loss": score.loss}


def _told(bundle: Bundle, done: Personalised) -> str:
    rows = [
        [when, f"{100 * score.accuracy:.1f}", f"{score.loss:.4f}", score.records]
        for when, score in (("before", done.before), ("after", done.after))
    ]
    outcome = (
        "kept: it is in use now (--undo brings the one before back)"
        if done.kept
        else "not kept: it is worse on the held-out records; the adapter before stays in use"
    )
    trained = done.trained
    lines = [
        table(["adapter", "accuracy %", "loss", "held-out records"], rows),
        f"\n{bundle.manifest.name}: {trained.steps} steps on {trained.delta.num_examples} records "
        f"in {trained.seconds:.1f} s; {outcome}",
    ]
    if trained.resumed_at:
        lines.append(f"went on from a saved state after step {trained.resumed_at}")
    if trained.note:
        lines.append(trained.note)
    return "\n".join(lines)
