"""A task as its device gets it."""

from __future__ import annotations

import math

import msgspec

from anabranch.edge.gateway.config import GatewayFile
from anabranch.edge.gateway.published import Shelf
from anabranch.edge.gateway.replies import reference, seed_of
from anabranch.edge.gateway.secure import Plan, digest_of
from anabranch.edge.gateway.tasks import SPARE, Offer, asked_of
from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime.bundle_manifest import MANIFEST, SIGNATURE
from anabranch.protocols.tables import Uplink


def task_of(file: GatewayFile, shelf: Shelf, offer: Offer, plan: Plan | None) -> edge_pb2.Task:
    """Return the task; with a `plan` its delta goes into a secure sum, in fp32."""
    row, asked = offer.round, asked_of(offer.round)
    config, mechanism = asked.assignment.config, asked.mechanism
    bundle = shelf.bundle(row["bundle"])
    task = edge_pb2.Task(
        id=offer.task["id"],
        run=row["run"],
        round=row["number"],
        bundle=bundle.manifest.name,
        bundle_version=bundle.manifest.version,
        manifest=reference(bundle.named(MANIFEST)),
        signature=reference(bundle.named(SIGNATURE)),
        adapter=edge_pb2.FileRef(
            name="adapter", sha256=bytes.fromhex(row["adapter"]), size=row["adapter_bytes"]
        ),
        training=msgspec.json.encode(config.training),
        part=msgspec.json.encode(asked.assignment.part),
        uplink=msgspec.json.encode(config.uplink if plan is None else Uplink()),
        proximal_mu=config.federation.proximal_mu,
        seed=seed_of(config.seed, offer.task["id"]),
        deadline_unix=int(row["deadline"]),
        chunk_bytes=file.limits.chunk_bytes,
        max_upload_bytes=asked.max_bytes,
    )
    if mechanism is not None:
        task.privacy.noise_multiplier = mechanism.noise_multiplier
        task.privacy.sample_rate = mechanism.sample_rate
        task.privacy.clipping_norm = mechanism.clipping_norm
        task.privacy.delta = mechanism.delta
    if plan is not None:
        shapes = asked.assignment.part.shapes(asked.spec).values()
        task.max_upload_bytes = SPARE + 4 * sum(math.prod(shape) for shape in shapes)
        task.secure.minimum = plan.minimum
        task.secure.threshold = plan.table.threshold
        task.secure.colluding = plan.table.colluding
        task.secure.range = plan.table.range
        task.secure.weighting = plan.weighting
        task.secure.roster = digest_of(plan)
        task.secure.roster_signature = plan.signature.encode()
    return task
