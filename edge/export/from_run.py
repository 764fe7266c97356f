"""From a run's folder to a bundle: run.toml, and the adapter that was released."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from anabranch.client.data.records import load_records
from anabranch.client.files import read_run
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.peft_folder import read_peft
from anabranch.edge.export.bundle import OnStage, Request, make_bundle
from anabranch.edge.runtime.bundle_manifest import Manifest
from anabranch.edge.runtime.manifest import read_manifest, verify
from anabranch.edge.runtime.trust import load_private
from anabranch.protocols import wire
from anabranch.protocols.errors import ReleaseError


def export_run(
    run: Path,
    target: Path,
    *,
    request: Request,
    records: Path,
    key: Path,
    on_stage: OnStage = lambda _: None,
) -> Manifest:
    """Make a signed bundle of the release in `run`, measured on the held-out `records`.

    The base is loaded as run.toml names it, the adapter from the release; both must be what
    the release's manifest says. An empty `request.name` becomes the run's. Raises as
    `make_bundle`, ReleaseError if the release was changed, DataError for bad records, and
    BundleError for a key that cannot be used.
    """
    signing_key = load_private(key)  # first: a wrong path should not cost minutes
    config = read_run(run / "run.toml")
    released = read_manifest(run / "release")
    verify(run / "release", released)
    if released.config != config.digest():
        raise ReleaseError(
            f"{run}: run.toml is not the configuration that was released: restore the run folder"
        )
    held_out = load_records(records, config)
    classifier = load_classifier(config)
    adapter = read_peft(run / "release" / "adapter", classifier.spec)
    if wire.digest(wire.encode(adapter)) != released.adapter:
        raise ReleaseError(
            f"{run / 'release' / 'adapter'}: is not the adapter that the release's manifest names"
        )
    return make_bundle(
        classifier,
        adapter,
        config,
        target,
        request=replace(request, name=request.name or config.name),
        inputs=held_out.inputs,
        labels=held_out.labels,
        signing_key=signing_key,
        on_stage=on_stage,
    )
