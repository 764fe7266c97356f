"""Configurations and terms of noised secure sums, for the tests of all who have a part in them."""

from __future__ import annotations

from typing import Any

import msgspec

from anabranch.protocols.config import RunConfig
from anabranch.protocols.messages import Assignment
from anabranch.protocols.secagg.agreed_noise import noise_of, values_of
from anabranch.protocols.secagg.contribution import WEIGHT_UNIT
from anabranch.protocols.secagg.noise import DistributedNoise, ring_limit
from anabranch.protocols.secagg.terms import Terms
from anabranch.protocols.spec import AdapterSpec
from tests.simulations.rig import SPEC

RECORD: dict[str, Any] = {
    "name": "sums",
    "task": {"kind": "tabular-classification", "labels": ["no", "yes"]},
    "data": {"columns": {"x": {"type": "number"}, "y": {"type": "label"}}, "min_rows": 200},
    "model": {"base": "logistic"},
    "lora": {"rank": 0},
    "federation": {"rounds": 10, "weighting": "uniform"},
    "training": {
        "optimizer": "sgd",
        "momentum": 0.0,
        "learning_rate": 0.5,
        "batch_size": 20,
        "local_steps": 1,
    },
    "privacy": {"epsilon": 4.0, "delta": 1e-5, "noise": "distributed"},
    "secure_aggregation": {},
}
CLIENT: dict[str, Any] = {
    **{name: value for name, value in RECORD.items() if name not in ("privacy", "training")},
    "client_privacy": {"epsilon": 6.0, "population": 500, "clipping_norm": 0.8},
}


def config(base: dict[str, Any], **changes: Any) -> RunConfig:
    """Return a run; `training__momentum=0.9` changes a field of a table, None leaves one out."""
    document = msgspec.json.decode(msgspec.json.encode(base))
    for path, value in changes.items():
        *tables, field = path.split("__")
        place = document
        for table in tables:
            place = place.setdefault(table, {})
        if value is None:
            place.pop(field, None)
        else:
            place[field] = value
    return msgspec.convert(document, RunConfig)


def noise(run: RunConfig, spec: AdapterSpec = SPEC) -> DistributedNoise:
    """Return the noise of a run that has some."""
    found = noise_of(run, values_of(spec))
    assert found is not None
    return found


def terms(
    run: RunConfig, members: int = 5, spec: AdapterSpec = SPEC, number: int = 1, **changes: Any
) -> Terms:
    """Return the terms of a sum of one round's whole deltas."""
    secure = run.secure_aggregation
    assert secure is not None
    ring, limit = ring_limit(noise(run, spec), members, secure)
    fields: dict[str, Any] = {
        "run": "sums-1",
        "round": number,
        "instance": "a1" * 32,
        "config": run.digest(),
        "model": "b1" * 32,
        "roster": "c1" * 32,
        "members": tuple(f"site-{i:02d}" for i in range(members)),
        "minimum": secure.minimum,
        "threshold": secure.threshold,
        "colluding": secure.colluding,
        "ring": ring.bits,
        "limit": limit,
        "weight": WEIGHT_UNIT,
        "values": values_of(spec),
        "counters": 3,
        "keystream": "chacha20",
    }
    return Terms(**fields | changes)


def assignment(run: RunConfig, number: int = 1) -> Assignment:
    """Return the question of a round."""
    return Assignment(run="sums-1", round=number, config=run)
