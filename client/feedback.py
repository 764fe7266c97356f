"""Error feedback: what the codec left out of one delta is added to the next.

Notation: D a site's delta, Q(x) what the coordinator decodes of x, e the memory (0 at first).

    u = D + e        send Q(u)        e <- u − Q(u)

so that the sum of all that was sent, plus the memory, is the sum of all deltas (Seide et al.,
2014; Karimireddy et al., 2019, arXiv:1901.09847: EF-SGD). D is the delta as it
would leave, after the noise of a private run: what is kept and sent is post-processing.

A memory belongs to the factor that was frozen when it arose: e_B stands for the product e_B A.
Where the coordinator has changed A since, by a re-gauge or a round that trained A, the memory
is carried into the new coordinates by least squares:

    e_B <- argmin ‖X A_new − e_B A_old‖_F = e_B · A_old A_new⁺
    e_A <- argmin ‖B_new X − B_old e_A‖_F = B_new⁺ B_old · e_A      (⁺: pseudo-inverse)

The product is unchanged if the rows of A_old lie in those of A_new, as after a re-gauge; what
lies outside cannot be said in the new coordinates and is dropped. Where the frozen factor is the
same bit for bit, so is the memory. With both factors trained there is no frozen one, and
memories stay in the coordinates of the factors: RunConfig refuses error feedback with methods
that write both anew.

What is not in a round's part (the other factor, other ranks, dense tensors) waits in the memory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import MalformedMessage, ModelError, ProtocolError
from anabranch.protocols.part import Factors
from anabranch.protocols.spec import AdapterSpec, require_same_spec
from anabranch.protocols.tables import Uplink
from anabranch.storage.files import write_atomic

Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Memory:
    """What codecs have left out so far, and the factors in whose coordinates it is."""

    left: Adapter  # e: zeros where nothing was left out
    frozen: Adapter  # its A are those of e_B, its B those of e_A; dense tensors are not used

    def __post_init__(self) -> None:
        require_same_spec(self.left.spec, self.frozen.spec)


def send(
    delta: Delta,
    received: Adapter,
    uplink: Uplink,
    rng: np.random.Generator,
    folder: Path,
    run: str,
) -> tuple[bytes, dict[str, bytes]]:
    """Return the frame to upload, and the files that change with it: path in `folder` -> bytes.

    `received` is the adapter as it came from the coordinator, before training. Without
    error_feedback nothing is read, and no file changes. With it, the memory of `run` in the
    site's `folder` is read, and its successor returned: whoever sends the frame writes it, once.
    Raises ModelError for a memory that cannot be read or belongs to another adapter, and what
    wire.encode raises.
    """
    if not uplink.error_feedback:
        return wire.encode(delta, codec=uplink.codec, keep=uplink.keep, rng=rng), {}
    path = memory_path(folder, run)
    memory = load(path, delta.spec) or empty(delta.spec)
    frame, memory = compress(delta, received, uplink, rng, memory)
    return frame, {path.relative_to(folder).as_posix(): written(memory)}


def compress(
    delta: Delta, received: Adapter, uplink: Uplink, rng: np.random.Generator, memory: Memory
) -> tuple[bytes, Memory]:
    """Return the frame of Q(delta + memory) and the memory after it. Changes no argument."""
    spec, part = delta.spec, delta.part
    require_same_spec(spec, received.spec)
    memory = carry(memory, received, part.factors)
    waiting = part.take(spec, memory.left.arrays)
    wanted = {name: array + waiting[name] for name, array in delta.arrays.items()}
    whole = Delta(spec, wanted, delta.num_examples, part=part, steps=delta.steps)
    frame = wire.encode(whole, codec=uplink.codec, keep=uplink.keep, rng=rng)
    sent = wire.decode_delta(frame, spec, part, codec=uplink.codec, keep=uplink.keep)
    over = part.spread(spec, {name: u - sent.arrays[name] for name, u in wanted.items()})
    touched, masks = part.names(spec), part.mask(spec)
    left = {
        name: np.where(masks.get(name, np.array(name in touched)), over[name], array)
        for name, array in memory.left.arrays.items()
    }
    return frame, Memory(Adapter(spec, left), memory.frozen)


def carry(memory: Memory, received: Adapter, factors: Factors) -> Memory:
    """Return the memory in the coordinates of `received`, for a round that trains `factors`."""
    spec = memory.left.spec
    require_same_spec(spec, received.spec)
    left, frozen = dict(memory.left.arrays), dict(memory.frozen.arrays)
    for _, a, b in spec.factors():
        if factors == "B":
            left[b] = carried(left[b], frozen[a], received.arrays[a])
        elif factors == "A":
            left[a] = carried(left[a].T, frozen[b].T, received.arrays[b].T).T
        if factors in ("B", "both"):
            frozen[a] = received.arrays[a]
        if factors in ("A", "both"):
            frozen[b] = received.arrays[b]
    return Memory(Adapter(spec, left), Adapter(spec, frozen))


def carried(error: Float, before: Float, now: Float) -> Float:
    """Return the X for which X · now is nearest to error · before, in float64; (out, rank).

    The same array if before and now are the same, or there is no error.
    """
    if not error.any() or np.array_equal(before, now):
        return error
    noise = max(now.shape) * float(np.finfo(np.float32).eps)  # directions that are rounding
    inverse = np.linalg.pinv(now.astype(np.float64), rtol=noise)
    return (error.astype(np.float64) @ (before.astype(np.float64) @ inverse)).astype(np.float32)


def empty(spec: AdapterSpec) -> Memory:
    """Return the memory of a site that has left nothing out yet."""
    nothing = Adapter(spec, {name: np.zeros(shape, np.float32) for name, shape in spec.tensors})
    return Memory(nothing, nothing)


def memory_path(folder: Path, run: str) -> Path:
    """Return where a run's memory lies: its name is a hash, as `run` comes from a peer."""
    return folder / "feedback" / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}.memory"


def save(path: Path, memory: Memory) -> None:
    """Write a memory, whole or not at all."""
    write_atomic(path, written(memory))


def written(memory: Memory) -> bytes:
    """Return a memory as its file has it: two adapter frames (docs/wire-format.md), left first."""
    left, frozen = wire.encode(memory.left), wire.encode(memory.frozen)
    return len(left).to_bytes(8, "little") + left + frozen


def load(path: Path, spec: AdapterSpec) -> Memory | None:
    """Return the memory in `path`, or None if there is none. Raises ModelError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path, error.strerror or "cannot be read") from None
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        if len(data) < end:
            raise MalformedMessage(f"{len(data)} bytes, expected more than {end}: cut")
        left, frozen = (wire.decode_adapter(one, spec) for one in (data[8:end], data[end:]))
    except ProtocolError as error:
        raise _unusable(path, str(error)) from None
    return Memory(left, frozen)


def _unusable(path: Path, why: str) -> ModelError:
    """Return an error that names the file inside the site's folder, not where that folder lies."""
    return ModelError(
        f"{path.parent.name}/{path.name} in the site's folder: {why}. Restore the file, or remove "
        "it to go on without what earlier rounds left out"
    )
