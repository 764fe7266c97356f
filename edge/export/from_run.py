"""From a run to a bundle: run.toml, and the adapter that was released or that round 1 starts from.

Devices that train for a gateway need a bundle before there is a release: any bundle of the run's
base, [lora] and labels does, for a task brings its own adapter.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from anabranch.client.data.records import load_records
from anabranch.client.files import read_run
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.client.tuning.peft_folder import read_peft
from anabranch.edge.export.bundle import OnStage, Request, make_bundle
from anabranch.edge.runtime.bundle_manifest import Manifest as BundleManifest
from anabranch.edge.runtime.manifest import Manifest, read_manifest, verify
from anabranch.edge.runtime.trust import load_private
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ReleaseError


def export_run(
    run: Path,
    target: Path,
    *,
    request: Request,
    records: Path,
    key: Path,
    on_stage: OnStage = lambda _: None,
) -> BundleManifest:
    """Make a signed bundle of the release in `run`, measured on the held-out `records`.

    The base is loaded as run.toml names it, the adapter from the release; both must be what
    the release's manifest says. If `run` is a run.toml itself, the adapter is the one that every
    run of it starts from. An empty `request.name` becomes the run's. Raises as `make_bundle`,
    ReleaseError if the release was changed, DataError for bad records, and BundleError for a key
    that cannot be used.
    """
    signing_key = load_private(key)  # first: a wrong path should not cost minutes
    begins = run.is_file()
    config = read_run(run if begins else run / "run.toml")
    released = None if begins else _released(run, config)
    # min_rows is what a site must have to train; a few held-out records are a coarse measure.
    few = msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, min_rows=1))
    held_out = load_records(records, few)
    classifier = load_classifier(config)
    adapter = read_adapter(classifier) if released is None else _read(run, classifier, released)
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


def _released(run: Path, config: RunConfig) -> Manifest:
    """Return the manifest of the release, whose files and configuration are what it says."""
    released = read_manifest(run / "release")
    verify(run / "release", released)
    if released.config != config.digest():
        raise ReleaseError(
            f"{run}: run.toml is not the configuration that was released: restore the run folder"
        )
    return released


def _read(run: Path, classifier: Classifier, released: Manifest) -> Adapter:
    adapter = read_peft(run / "release" / "adapter", classifier.spec)
    if wire.digest(wire.encode(adapter)) != released.adapter:
        raise ReleaseError(
            f"{run / 'release' / 'adapter'}: is not the adapter that the release's manifest names"
        )
    return adapter
