"""What an adapter is made of: the names and shapes of its tensors, and the base it belongs to.

Notation, for a frozen linear layer W of shape (out, in):

    h = W x + s · B A x        A: (rank, in)   B: (out, rank)   s = alpha / rank

An `AdapterSpec` names every trainable tensor: the factors `<module>.lora_A.weight` and
`<module>.lora_B.weight` of each adapted layer, and dense tensors (the head, and any module
trained in full). Arrays are float32, in C order, and always matched by name.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.errors import IncompatibleAdapter

Arrays = Mapping[str, NDArray[np.float32]]
Shape = tuple[int, ...]

LORA_A = ".lora_A.weight"
LORA_B = ".lora_B.weight"

# Names are shown in errors and become keys of files, so: no blanks, no control characters.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,255}")
DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_DIMENSIONS = 8
MAX_SIZE = 2**31 - 1  # of one dimension, and the largest rank


class AdapterSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an adapter is made of, and the base model it belongs to.

    Checked on construction, also when it comes from a peer: names are plain, unique and
    ascending, every dimension is at least 1, and each target has its two factors with the
    spec's rank. Raises IncompatibleAdapter naming the first thing that is wrong.
    """

    base: str  # SHA-256 of the frozen base weights, hex
    tokenizer: str  # SHA-256 of the tokenizer, hex; "" for images and tables
    rank: int
    alpha: float
    targets: tuple[str, ...]  # names of the adapted linear layers, ascending
    tensors: tuple[tuple[str, Shape], ...]  # (name, shape) of every trainable tensor, ascending

    def __post_init__(self) -> None:
        # One value, one encoding: 16 and 16.0 would give two digests, NumPy integers none.
        fix = msgspec.structs.force_setattr
        fix(self, "alpha", float(self.alpha))
        fix(self, "targets", tuple(self.targets))
        fix(self, "tensors", tuple((n, tuple(int(d) for d in s)) for n, s in self.tensors))
        _require_plain_spec(self)
        _require_factors(self)

    @property
    def scaling(self) -> float:
        """Return s = alpha / rank, the factor on B A (1 for an adapter without factors)."""
        return self.alpha / self.rank if self.rank else 1.0

    @property
    def shapes(self) -> dict[str, Shape]:
        """Return name -> shape."""
        return dict(self.tensors)

    @property
    def num_values(self) -> int:
        """Return the number of trainable values."""
        return sum(math.prod(shape) for _, shape in self.tensors)

    def factors(self) -> Iterator[tuple[str, str, str]]:
        """Yield (module, name of A, name of B) of every adapted layer."""
        for module in self.targets:
            yield module, module + LORA_A, module + LORA_B

    def digest(self) -> str:
        """Return the SHA-256 of the canonical JSON of this spec: its identity."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


def require_same_spec(expected: AdapterSpec, got: AdapterSpec) -> None:
    """Raise IncompatibleAdapter, naming the first difference, unless the specs are equal."""
    if expected is got or expected == got:
        return
    for field, what in (("base", "base model"), ("tokenizer", "tokenizer")):
        ours, theirs = getattr(expected, field), getattr(got, field)
        if ours != theirs:
            raise IncompatibleAdapter(
                f"adapter is for {what} {theirs[:12] or 'none'}…, expected {ours[:12] or 'none'}…: "
                f"load the same {what} on both sides"
            )
    for field in ("rank", "alpha"):
        if getattr(expected, field) != getattr(got, field):
            raise IncompatibleAdapter(
                f"adapter has {field} {getattr(got, field)}, expected {getattr(expected, field)}"
            )
    for module in sorted(set(expected.targets) ^ set(got.targets)):
        ours = "a target" if module in expected.targets else "no target"
        raise IncompatibleAdapter(f"{module}: expected {ours} of the adapter; use one [lora] table")
    require_same_shapes(expected.shapes, got.shapes)


def require_same_shapes(expected: Mapping[str, Shape], got: Mapping[str, Shape]) -> None:
    """Raise IncompatibleAdapter, naming the first difference, unless the shapes are equal."""
    if expected == got:
        return
    for name in sorted(expected.keys() | got.keys()):
        a, b = expected.get(name, "absent"), got.get(name, "absent")
        if a != b:
            raise IncompatibleAdapter(f"{name}: expected shape {a}, got {b}")


def shown(text: str, limit: int = 80) -> str:
    """Return text that came from a peer so that it is safe in an error or a log: ASCII, short."""
    return ascii(text if len(text) <= limit else text[:limit] + "…")


def _require_plain_spec(spec: AdapterSpec) -> None:
    """Refuse digests, numbers, names and shapes that no adapter can have."""
    if not DIGEST.fullmatch(spec.base):
        raise IncompatibleAdapter(f"base: expected 64 hex digits, got {shown(spec.base)}")
    if spec.tokenizer and not DIGEST.fullmatch(spec.tokenizer):
        raise IncompatibleAdapter(
            f"tokenizer: expected 64 hex digits or nothing, got {shown(spec.tokenizer)}"
        )
    if not 0 <= spec.rank <= MAX_SIZE:
        raise IncompatibleAdapter(f"rank: expected 0 to {MAX_SIZE}, got {spec.rank}")
    if not (math.isfinite(spec.alpha) and spec.alpha > 0):
        raise IncompatibleAdapter(f"alpha: expected a number > 0, got {spec.alpha}")
    if not spec.tensors:
        raise IncompatibleAdapter("tensors: expected at least one, got none")
    _require_ascending("targets", spec.targets)
    _require_ascending("tensors", [name for name, _ in spec.tensors])
    for name, shape in spec.tensors:
        if len(shape) > MAX_DIMENSIONS or not all(1 <= size <= MAX_SIZE for size in shape):
            raise IncompatibleAdapter(
                f"{name}: expected at most {MAX_DIMENSIONS} dimensions of 1 to {MAX_SIZE}, "
                f"got shape {shown(str(shape))}"
            )


def _require_ascending(what: str, names: Sequence[str]) -> None:
    for name in names:
        if not NAME.fullmatch(name):
            raise IncompatibleAdapter(
                f"{what}: {shown(name)} is no name (letters, digits and _.-, at most 256)"
            )
    for before, after in pairwise(names):
        if before == after:
            raise IncompatibleAdapter(f"{what}: {shown(after)} appears twice")
        if before > after:
            raise IncompatibleAdapter(f"{what}: {shown(after)} must come before {shown(before)}")


def _require_factors(spec: AdapterSpec) -> None:
    """Refuse a target without its factors (rank, in) and (out, rank), and factors without one."""
    shapes = spec.shapes
    expected = {name for _, a, b in spec.factors() for name in (a, b)}
    if spec.targets and spec.rank == 0:
        raise IncompatibleAdapter(f"rank 0 has no factors, but target {shown(spec.targets[0])}")
    for _, a, b in spec.factors():
        for name, axis, form in ((a, 0, "(rank, in)"), (b, 1, "(out, rank)")):
            shape = shapes.get(name)
            if shape is None:
                raise IncompatibleAdapter(f"{name}: missing, but its module is a target")
            if len(shape) != 2 or shape[axis] != spec.rank:
                raise IncompatibleAdapter(
                    f"{name}: expected shape {form} with rank {spec.rank}, got {shape}"
                )
    for name in shapes:
        if name.endswith((LORA_A, LORA_B)) and name not in expected:
            raise IncompatibleAdapter(f"{name}: a factor, but its module is not a target")
