"""What all devices of a secure sum were told alike: another word of it makes other masks."""

from __future__ import annotations

from typing import Any

import pytest

from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime.secure_task import sum_config


def task_with(path: str = "", value: Any = None) -> edge_pb2.Task:
    """Return a secure task; the field at `path` has this value."""
    task = edge_pb2.Task(
        id="one",
        run="run",
        round=1,
        seed=7,
        manifest=edge_pb2.FileRef(sha256=b"m" * 32),
        adapter=edge_pb2.FileRef(sha256=b"a" * 32),
        training=b'{"optimizer":"sgd"}',
        part=b'{"factors":"AB"}',
        secure=edge_pb2.SecureSum(minimum=3, threshold=0.7, range=4.0, weighting="examples"),
    )
    *parents, last = path.split(".")
    place: Any = task
    for parent in parents:
        place = getattr(place, parent)
    if last:
        setattr(place, last, value)
    return task


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("run", "other"),
        ("round", 2),
        ("manifest.sha256", b"x" * 32),
        ("adapter.sha256", b"x" * 32),
        ("training", b'{"optimizer":"adamw"}'),
        ("part", b'{"factors":"B"}'),
        ("proximal_mu", 0.1),
        ("privacy.noise_multiplier", 1.0),
        ("privacy.sample_rate", 0.5),
        ("privacy.clipping_norm", 2.0),
        ("privacy.delta", 1e-5),
        ("secure.minimum", 4),
        ("secure.threshold", 0.8),
        ("secure.colluding", 0.1),
        ("secure.range", 2.0),
        ("secure.weighting", "uniform"),
        ("secure.roster", b"r" * 32),
    ],
)
def test_another_task_is_another_sum(path: str, value: Any) -> None:
    assert sum_config(task_with(path, value)) != sum_config(task_with())


@pytest.mark.parametrize(("path", "value"), [("id", "two"), ("seed", 8), ("chunk_bytes", 4096)])
def test_what_each_device_has_of_its_own_is_no_part_of_it(path: str, value: Any) -> None:
    assert sum_config(task_with(path, value)) == sum_config(task_with())
