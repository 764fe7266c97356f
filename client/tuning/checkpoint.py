"""Where a fit stands after some of its steps, on disk: what a later process goes on from.

    header   8 bytes: length of the JSON, little-endian
    JSON     Head: what it is a state of, the step, losses, what the accountant was told
    tensors  safetensors: "value/<name>" what is trained, "moment/<i>/<key>" of the optimiser
    digest   32 bytes: SHA-256 of all that is before it

Whoever goes on gets the same numbers as one who was never stopped: values and moments are here
bit for bit, the order of batches is drawn again from its seed and wound forward, and the learning
rate follows from the step. A fit draws no other random numbers; the noise of a private one
(private.py) is fresh in every process.

A state is used only for the inputs that it was made of: `inputs` is a digest of all that decides
the fit (what was asked, the values it began with, the records in their order, the code). Any
other state, and one that cannot be read, is as good as none: the fit begins at its first step.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from anabranch.protocols.errors import AnabranchError
from anabranch.storage.files import write_atomic

SECONDS = 30.0  # between two states on disk
DIGEST = hashlib.sha256().digest_size

Watch = Callable[[str, int, int], None]  # (activity, step, steps); AnabranchError ends the round
Ran = tuple[tuple[float, float, int], ...]  # (σ, q, steps) that an accountant was told

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """A fit after `step` steps. Tensors may be live: they are copied when they are written."""

    step: int
    tensors: Mapping[str, Tensor]
    losses: tuple[tuple[float, int], ...] = ()  # of every batch; none in a private fit
    ran: Ran = ()  # of a private fit
    clipping_norm: float | None = None  # of a private fit: the C of the next step


class Progress(Protocol):
    """What a fit tells of its steps, and where it may go on from."""

    def resumed(self) -> State | None:
        """Return the state to go on from; None: from the first step."""

    def after(self, step: int, steps: int, state: Callable[[], State]) -> None:
        """Take note that `step` of `steps` are taken; what it raises ends the fit."""


class Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The JSON of a state."""

    inputs: str
    step: int
    losses: tuple[tuple[float | None, int], ...]  # None: not finite, which JSON has no word for
    ran: Ran
    clipping_norm: float | None


@dataclass(kw_only=True, eq=False)
class Steps:
    """Progress in a file, and in the eyes of whoever watches.

    A state is written when `seconds` have passed since the last one: of slow steps each one. It
    is readable by its owner alone: without privacy it tells about records. A state that cannot
    be written is logged and does not end the fit: the one before it is still there.
    """

    path: Path | None  # None: nothing is kept
    inputs: str
    watch: Watch | None = None
    seconds: float = SECONDS
    activity: str = "training"
    clock: Callable[[], float] = time.monotonic
    stopped: AnabranchError | None = field(default=None, init=False)  # what the watch raised

    def __post_init__(self) -> None:
        self._written = self.clock()

    def resumed(self) -> State | None:
        """Return the state in the file, if it is one of these inputs."""
        return None if self.path is None else read(self.path, self.inputs)

    def after(self, step: int, steps: int, state: Callable[[], State]) -> None:
        """Write the state if it is time; let the watch end the fit, with its state kept."""
        try:
            if self.watch is not None:
                self.watch(self.activity, step, steps)
        except AnabranchError as error:
            self.stopped = error
            self._write(state())
            raise
        if self.clock() - self._written >= self.seconds:
            self._write(state())

    def _write(self, state: State) -> None:
        if self.path is None:
            return
        try:
            write_atomic(self.path, encode(state, self.inputs), 0o600)
        except OSError as error:
            log.warning("the state after step %d cannot be written: %s", state.step, error)
        self._written = self.clock()


def read(path: Path, inputs: str) -> State | None:
    """Return the state of these inputs in the file; None if there is none that can be used."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s cannot be read, the fit begins again: %s", path.name, error)
        return None
    state = decode(data, inputs)
    if state is None:
        log.warning("%s is damaged or of other inputs: the fit begins again", path.name)
    return state


def encode(state: State, inputs: str) -> bytes:
    """Return the bytes of a state."""
    head = msgspec.json.encode(
        Head(
            inputs=inputs,
            step=state.step,
            losses=state.losses,
            ran=state.ran,
            clipping_norm=state.clipping_norm,
        )
    )
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.tensors.items()}
    data = len(head).to_bytes(8, "little") + head + safetensors.torch.save(tensors)
    return data + hashlib.sha256(data).digest()


def decode(data: bytes, inputs: str) -> State | None:
    """Return the state in `data`; None if it is damaged, or of other inputs."""
    body, digest = data[:-DIGEST], data[-DIGEST:]
    if len(data) < DIGEST + 8 or hashlib.sha256(body).digest() != digest:
        return None
    end = 8 + int.from_bytes(body[:8], "little")
    try:
        head = msgspec.json.decode(body[8:end], type=Head)
        if head.inputs != inputs:
            return None
        tensors = safetensors.torch.load(body[end:])
    except (msgspec.DecodeError, UnicodeDecodeError, SafetensorError):
        return None
    return State(
        step=head.step,
        tensors=tensors,
        losses=tuple((math.nan if loss is None else loss, n) for loss, n in head.losses),
        ran=head.ran,
        clipping_norm=head.clipping_norm,
    )


def tensors_of(
    values: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return what is trained and what the optimiser remembers of it, by name; nothing is copied."""
    found: dict[str, Tensor] = {f"value/{name}": p.detach() for name, p in values.items()}
    for i, p in enumerate(_stepped(optimizer)):
        for key, moment in optimizer.state.get(p, {}).items():
            if moment is not None:  # SGD without momentum
                found[f"moment/{i}/{key}"] = moment
    return found


@torch.no_grad()
def put_back(
    tensors: Mapping[str, Tensor],
    values: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Give a fit the values and the moments of `tensors_of`, bit for bit."""
    for name, value in values.items():
        value.copy_(tensors[f"value/{name}"])
    stepped = _stepped(optimizer)
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "moment":
            i, _, key = rest.partition("/")
            p = stepped[int(i)]
            device = "cpu" if key == "step" else p.device  # AdamW counts its steps on the host
            optimizer.state[p][key] = tensor.to(device)


def _stepped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
