"""Adapters on disk in PEFT's format, so that the real `peft` loads them over the same base.

    adapter_config.json          PEFT's LoraConfig: rank, alpha, full names of the adapted layers
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight, … .lora_B.weight
    head.safetensors             the other trained tensors under our names: head.weight, head.bias
    anabranch.json               spec (with the digest of the base), labels, pooling

An adapter of rank 0 has no factors: the two PEFT files are then absent. Nothing is ever
unpickled: *.bin and *.pt files are not opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import IncompatibleAdapter, ModelError
from anabranch.protocols.spec import LORA_A, LORA_B, AdapterSpec, require_same_spec
from anabranch.storage.files import write_atomic

CONFIG = "adapter_config.json"
FACTORS = "adapter_model.safetensors"
HEAD = "head.safetensors"
ABOUT = "anabranch.json"
PREFIX = "base_model.model."  # PEFT's name for the base inside its wrappers

# Variants of LoRA that compute something else than W x + s B A x, and the value that means "off".
OFF: Mapping[str, Any] = {
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "modules_to_save": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}

FloatArrays = dict[str, NDArray[np.float32]]


class About(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """anabranch.json: what PEFT's own files do not say."""

    format: int = 1
    spec: AdapterSpec
    labels: tuple[str, ...]  # order = index of the logit
    pooling: str


def write_peft(
    folder: Path,
    adapter: Adapter,
    *,
    base_name: str,
    labels: Sequence[str],
    pooling: str = "mean",
) -> None:
    """Write `adapter` as a PEFT folder; files appear whole, anabranch.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    factors = {n: a for n, a in adapter.arrays.items() if _is_factor(n)}
    rest = {n: a for n, a in adapter.arrays.items() if not _is_factor(n)}
    if factors:
        config = _peft_config(adapter.spec, base_name)
        write_atomic(folder / CONFIG, json.dumps(config, indent=2).encode() + b"\n")
        write_atomic(folder / FACTORS, _pack({PREFIX + n: a for n, a in factors.items()}))
    write_atomic(folder / HEAD, _pack(rest))
    about = About(spec=adapter.spec, labels=tuple(labels), pooling=pooling)
    write_atomic(folder / ABOUT, msgspec.json.format(msgspec.json.encode(about), indent=2) + b"\n")


def read_about(folder: Path) -> About:
    """Return anabranch.json; raise ModelError if it is missing or malformed."""
    try:
        return msgspec.json.decode(_read(folder, ABOUT), type=About)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{folder / ABOUT}: {error}") from None


def read_peft(folder: Path, spec: AdapterSpec, *, foreign: bool = False) -> Adapter:
    """Return the adapter in `folder`, which must be for `spec`.

    `foreign` accepts a folder that `peft` itself wrote: it does not say which base weights it
    was trained over (the caller vouches for that), and without head.safetensors the head is
    zero. Raises ModelError for missing, pickled or malformed files and for LoRA variants that
    compute something else; IncompatibleAdapter for another base, other names or shapes, NaN.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder: expected an adapter folder in PEFT's format")
    if not foreign:
        require_same_spec(spec, read_about(folder).spec)
    arrays: FloatArrays = {}
    if spec.targets:
        _require_config(folder, spec)
        for name, array in _unpack(folder, FACTORS).items():
            if not name.startswith(PREFIX):
                raise IncompatibleAdapter(
                    f"{folder / FACTORS}: {name} does not begin with {PREFIX}"
                )
            arrays[name.removeprefix(PREFIX)] = array
    if foreign and not (folder / HEAD).exists():
        head = {n: s for n, s in spec.tensors if n.startswith("head.")}
        arrays |= {name: np.zeros(shape, np.float32) for name, shape in head.items()}
    else:
        arrays |= _unpack(folder, HEAD)
    return Adapter(spec, arrays)


def _is_factor(name: str) -> bool:
    return name.endswith((LORA_A, LORA_B))


def _peft_config(spec: AdapterSpec, base_name: str) -> dict[str, Any]:
    """Return the LoraConfig that makes PEFT build the same layers."""
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(spec.targets),
        "init_lora_weights": True,
        **OFF,
    }


def _require_config(folder: Path, spec: AdapterSpec) -> None:
    """Raise unless adapter_config.json describes plain LoRA of the spec's rank and alpha."""
    try:
        config = json.loads(_read(folder, CONFIG))
    except ValueError as error:
        raise ModelError(f"{folder / CONFIG} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ModelError(f'{folder / CONFIG}: expected an object with peft_type "LORA"')
    for key, off in OFF.items():
        value = config.get(key, off)
        if value != off and value:
            raise ModelError(
                f"{folder / CONFIG}: {key} = {value!r} is not supported, expected {off}"
            )
    for key, ours in (("r", spec.rank), ("lora_alpha", spec.alpha)):
        if config.get(key) != ours:
            raise IncompatibleAdapter(
                f"{folder / CONFIG}: {key} is {config.get(key)}, expected {ours}"
            )


def _pack(arrays: Mapping[str, NDArray[np.float32]]) -> bytes:
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def _unpack(folder: Path, name: str) -> FloatArrays:
    """Return the tensors of a safetensors file as float32 (half precision widens exactly)."""
    try:
        tensors = safetensors.torch.load(_read(folder, name))
    except SafetensorError as error:
        raise ModelError(f"{folder / name} is not a safetensors file: {error}") from None
    for key, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise IncompatibleAdapter(
                f"{folder / name}: {key}: expected float32, got {tensor.dtype}"
            )
    return {key: tensor.float().numpy() for key, tensor in tensors.items()}


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        pickled = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt")))
        hint = f"; {pickled[0]} is a pickle, which can run code, and is not read" if pickled else ""
        raise ModelError(f"{folder} has no {name}{hint}") from None
