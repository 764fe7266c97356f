"""Per-record gradients of one micro-batch: their norms, and their sum under one factor each.

Notation: R records; one trained tensor has n values and, for record r, the gradient g_r (n,).

    matrix    g_r itself, as a row: (R, n)
    ghost     not g_r but what it is made of. For y_t = W x_t with output gradients e_t,
              g_r = Σ_t e_t x_tᵀ, so
                  ‖g_r‖²    = Σ_{t,t'} (e_t · e_t')(x_t · x_t')       T = 1: ‖e‖² ‖x‖²
                  Σ_r c_r g_r = (c e)ᵀ x                              one matmul over all tokens
              (Goodfellow 2015, arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679, eq. 4)

A ghost pays T² (in + out) for a norm where the matrix pays T in · out, and keeps no (R, n):
it wins for T² << in · out (Bu, Mao, Xu 2022, arXiv:2205.10683, "mixed ghost clipping"). Dot
products of ghosts are taken in float64: where the gradients of tokens cancel, float32 could
report a norm that is too small.

Values of a tensor stand in the order of its slot (flat.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from anabranch.client.tuning.examples import Examples, collate
from anabranch.client.tuning.flat import Slot
from anabranch.protocols.errors import PrivacyError

PACKED_VALUES = 1 << 22  # R × values of all tensors up to which they are copied into one matrix
COLUMNS = 1 << 16  # values of a row that are turned to float64 at once
SMALL = 1 << 12  # values of a weight below which a ghost saves nothing


@dataclass(frozen=True, eq=False)
class Matrix:
    """Gradients as rows, (R, n)."""

    rows: Tensor

    def norms(self) -> Tensor:
        """Return ‖g_r‖, (R,)."""
        norms: Tensor = torch.linalg.vector_norm(self.rows, dim=1)
        return norms

    def add(self, total: Tensor, factors: Tensor) -> None:
        """Add Σ_r c_r g_r to `total` (n,), for `factors` c (R,); in its type."""
        if total.dtype == self.rows.dtype:
            total.addmv_(self.rows.t(), factors)
            return
        factors = factors.to(total)
        for at in range(0, len(total), COLUMNS):
            columns = slice(at, at + COLUMNS)
            total[columns].addmv_(self.rows[:, columns].to(total).t(), factors)

    def without(self, records: Tensor) -> Matrix:
        """Return the same with gradients of 0 for `records`, a mask (R,)."""
        return Matrix(self.rows.masked_fill(records[:, None], 0.0))


@dataclass(frozen=True, eq=False)
class Ghost:
    """Gradients of a weight (out, in) as its inputs and its output gradients."""

    inputs: Tensor  # (R, T, in)
    errors: Tensor  # (R, T, out)

    def norms(self) -> Tensor:
        """Return ‖g_r‖, (R,)."""
        if self.inputs.shape[1] == 1:
            # float64: the square of a small error is 0 in float32, and its input may be large.
            long = torch.linalg.vector_norm(self.inputs.flatten(1), dim=1, dtype=torch.float64)
            wide = torch.linalg.vector_norm(self.errors.flatten(1), dim=1, dtype=torch.float64)
            norms: Tensor = (long * wide).to(self.inputs.dtype)
            return norms
        inputs, errors = self.inputs.double(), self.errors.double()
        products = torch.bmm(errors, errors.mT) * torch.bmm(inputs, inputs.mT)
        return products.sum((1, 2)).clamp_min(0).sqrt().to(self.inputs.dtype)

    def add(self, total: Tensor, factors: Tensor) -> None:
        """Add Σ_r c_r g_r to `total` (n,), for `factors` c (R,); in its type."""
        out, width = self.errors.shape[2], self.inputs.shape[2]
        scaled = (self.errors.to(total) * factors.to(total)[:, None, None]).view(-1, out)
        total.view(out, width).addmm_(scaled.t(), self.inputs.reshape(-1, width).to(total))

    def without(self, records: Tensor) -> Ghost:
        """Return the same with gradients of 0 for `records`, a mask (R,)."""
        mask = records[:, None, None]
        return Ghost(self.inputs.masked_fill(mask, 0.0), self.errors.masked_fill(mask, 0.0))


def ghost_is_cheaper(tokens: int, width: int, out: int) -> bool:
    """Return whether a weight (out, width) over `tokens` tokens is better kept as a ghost."""
    return out * width > SMALL and 2 * tokens * tokens <= out * width


@dataclass(eq=False)
class PerRecord:
    """The gradients of `records` records by name of tensor."""

    records: int
    parts: dict[str, Matrix | Ghost] = field(default_factory=dict)

    def add(self, name: str, rows: Tensor) -> None:
        """Add gradients (R, …) of one use of a tensor to those of its other uses."""
        part = self.parts.get(name)
        if part is None:
            self.parts[name] = Matrix(rows.view(self.records, -1))
        elif isinstance(part, Matrix):
            part.rows.add_(rows.view(self.records, -1))
        else:
            raise AssertionError(f"{name}: a ghost has one use")

    def blocks(self, slots: Sequence[Slot], packed: bool) -> list[tuple[slice, Matrix | Ghost]]:
        """Return (values, gradients) that together are all slots, in their order.

        With `packed` small gradients are one block: a few calls for all tensors together.
        """
        size = slots[-1].stop * self.records
        if packed and size <= PACKED_VALUES:
            rows = [
                part.rows for slot in slots if isinstance(part := self.parts[slot.name], Matrix)
            ]
            if len(rows) == len(slots):
                return [(slice(0, slots[-1].stop), Matrix(torch.cat(rows, dim=1)))]
        return [(slice(slot.start, slot.stop), self.parts[slot.name]) for slot in slots]

    def norms(self) -> dict[str, Tensor]:
        """Return name -> ‖g_r‖ of that tensor alone, (R,)."""
        return {name: part.norms() for name, part in self.parts.items()}

    def sums(self, slots: Sequence[Slot], factors: Tensor) -> dict[str, Tensor]:
        """Return name -> Σ_r c_r g_r in the shape of the tensor, for `factors` c (R,)."""
        result = {}
        for slot in slots:
            total = factors.new_zeros(slot.stop - slot.start)
            self.parts[slot.name].add(total, factors)
            result[slot.name] = slot.shaped(total)
        return result


def from_rows(rows: Tensor, slots: Sequence[Slot]) -> PerRecord:
    """Return gradients given as rows (R, P): tensors in ascending order of names, flattened.

    Raises PrivacyError for rows of another length.
    """
    width = slots[-1].stop
    if rows.dim() != 2 or rows.shape[1] != width:
        raise PrivacyError(
            f"expected canary gradients of shape (canaries, {width}), got {tuple(rows.shape)}"
        )
    gradients, at = PerRecord(len(rows)), 0
    for slot in sorted(slots, key=lambda slot: slot.name):
        size = slot.stop - slot.start
        values = rows[:, at : at + size].reshape(len(rows), *slot.shape)
        gradients.add(slot.name, slot.ordered(values))
        at += size
    return gradients


def record_losses(model: nn.Module, batch: Examples, weights: Tensor | None) -> Tensor:
    """Return w_{y_i} × the cross-entropy of every record, (R,).

    Raises PrivacyError if no trained tensor takes part in it.
    """
    device = next(model.parameters()).device
    features, mask = collate(batch.features)
    labels = batch.labels.to(device)
    logits = model(features.to(device), None if mask is None else mask.to(device))
    losses = functional.cross_entropy(logits, labels, reduction="none")
    if not losses.requires_grad:
        raise PrivacyError("no trainable tensor takes part in the model's output: nothing to train")
    return losses if weights is None else losses * weights.to(device)[labels]


def require_per_record(
    parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, tuple[int, ...]], records: int
) -> None:
    """Raise PrivacyError unless every parameter has one gradient per record.

    `shapes` are those of the gradients that were found, (R, *shape), by name.
    """
    for name, p in parameters.items():
        found = shapes.get(name)
        if found != (records, *p.shape):
            raise PrivacyError(
                f"{name} of shape {tuple(p.shape)} has per-record gradients of shape {found} for "
                f"{records} records: it takes no part in the output, is used outside its module "
                '(a model that calls lora_A and lora_B by itself needs privacy.engine = "opacus"), '
                "or the model moves the batch axis"
            )
