"""Adapters on disk, whatever their format: a frame (`*.adapter`) or a PEFT folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch

from anabranch.client.files import read_run
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.lora import load_adapter, merged_weights
from anabranch.client.tuning.peft_folder import read_about, read_peft, write_peft
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import ConfigError, ModelError
from anabranch.protocols.spec import require_same_spec
from anabranch.storage.files import write_atomic

FRAME = ".adapter"


def read_any(path: Path) -> Adapter:
    """Return the adapter in a frame or a PEFT folder that we wrote. Raises ModelError."""
    if path.is_dir():
        return read_peft(path, read_about(path).spec)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path}: {error.strerror or error}; expected a *.adapter file or a PEFT folder"
        ) from None
    return wire.decode_adapter(data)


def write_any(
    target: Path, adapter: Adapter, *, base_name: str = "", labels: Sequence[str] = ()
) -> None:
    """Write a frame if `target` ends in .adapter, else a PEFT folder; never overwrite."""
    _require_absent(target)
    if target.suffix == FRAME:
        write_atomic(target, wire.encode(adapter))
    else:
        write_peft(target, adapter, base_name=base_name, labels=labels)


def convert(source: Path, target: Path) -> None:
    """Write the adapter in `source` to `target` in the format that its name asks for."""
    labels = read_about(source).labels if source.is_dir() else ()
    write_any(target, read_any(source), labels=labels)


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return what `anabranch adapter show` prints."""
    spec = adapter.spec
    return {
        "base": spec.base,
        "tokenizer": spec.tokenizer,
        "spec": spec.digest(),
        "rank": spec.rank,
        "alpha": spec.alpha,
        "values": spec.num_values,
        "tensors": [
            {"name": name, "shape": list(shape), "norm": _norm(adapter.arrays[name])}
            for name, shape in spec.tensors
        ],
    }


def difference(first: Adapter, second: Adapter) -> dict[str, Any]:
    """Return norm and largest entry of first − second by tensor; both must have one spec."""
    require_same_spec(first.spec, second.spec)
    gaps = {name: a - second.arrays[name] for name, a in first.arrays.items()}
    largest = {name: float(np.abs(gap).max(initial=0)) for name, gap in gaps.items()}
    return {
        "max": max(largest.values(), default=0.0),
        "tensors": [
            {"name": name, "norm": _norm(gap), "max": largest[name]} for name, gap in gaps.items()
        ],
    }


def merge_into(target: Path, source: Path, run: Path) -> None:
    """Write the base of `run` with the adapter merged into it: target/model.safetensors.

    Raises IncompatibleAdapter if the adapter is for another base, ConfigError if `target`
    exists.
    """
    _require_absent(target)
    classifier = load_classifier(read_run(run))
    load_adapter(classifier, read_any(source))
    tensors = {name: t.detach().contiguous() for name, t in merged_weights(classifier).items()}
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_atomic(target / "model.safetensors", data)


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))


def _require_absent(target: Path) -> None:
    if target.exists():
        raise ConfigError(f"{target} exists: give a path that does not, nothing is overwritten")
