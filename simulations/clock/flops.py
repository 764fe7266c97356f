"""What one record costs a device: floating-point operations and memory, counted on the model.

One record goes through the classifier as it does in training, and every matrix product is
counted (torch.utils.flop_counter): 2 operations per weight and position. For a linear layer of W
weights over T positions, and attention of width d, that comes to

                        forward                          backward
    frozen              2 W T                            2 W T, the gradient of its input
    trained             2 W T                            4 W T, that of its weights too
    attention           4 T² d                           8 T² d

and nothing backward where nothing below asks for a gradient. What is not a matrix product (norms,
activations, the optimiser) is left out: it is a few per cent. The whole adapter is trained; a round
that trains a part of it (ffa, altqr) needs a little less.

Memory is 4 bytes per frozen value, 4 per trained one for itself, its gradient and every moment of
the optimiser, and what autograd keeps for the backward pass, times the records of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.protocols.errors import DataError

PROBES: Final = 8  # records that are counted; texts of unequal length cost unequally
COPIES: Final = {"adamw": 4, "sgd": 3}  # of a trained value: itself, gradient, moments


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one record costs, in the mean over the records that were counted."""

    prefix: float  # FLOPs below the cut
    forward: float  # FLOPs above the cut, and of the head
    backward: float  # FLOPs of the gradients of all that is trained
    fixed_bytes: int = 0  # memory of the weights and of the optimiser
    bytes_per_record: float = 0.0  # memory of one record of a batch

    @property
    def step(self) -> float:
        """Return the FLOPs of one record in one step, when its prefix is known."""
        return self.forward + self.backward

    def memory(self, batch: int) -> float:
        """Return the bytes that training on batches of `batch` records needs."""
        return self.fixed_bytes + batch * self.bytes_per_record


def work_of(
    classifier: Classifier, encoded: Sequence[Tensor], optimizer: Literal["adamw", "sgd"] = "adamw"
) -> Work:
    """Return the work of one record, the mean of up to PROBES of `encoded`, evenly taken.

    `encoded` is as Classifier.encode returns it. Values, gradients and mode of the classifier are
    the same afterwards. Raises DataError without records.
    """
    if not len(encoded):
        raise DataError("expected records to count the operations of, got none")
    number = min(PROBES, len(encoded))
    places = [int((i + 0.5) * len(encoded) / number) for i in range(number)]
    probes = [_count(classifier, encoded[i]) for i in places]
    prefix, forward, backward, kept = (sum(values) / number for values in zip(*probes, strict=True))
    trained = sum(p.numel() for p in trainable_parameters(classifier).values())
    frozen = sum(p.numel() for p in classifier.parameters()) - trained
    return Work(
        prefix=prefix,
        forward=forward,
        backward=backward,
        fixed_bytes=4 * (frozen + COPIES[optimizer] * trained),
        bytes_per_record=kept,
    )


def _count(classifier: Classifier, record: Tensor) -> tuple[int, int, int, int]:
    """Return FLOPs of (prefix, forward, backward) and the bytes kept between the last two."""
    x = record[None].to(classifier.device)
    with FlopCounterMode(display=False) as below:
        h = classifier.prefix(x, None)
    kept: dict[int, int] = {}
    parameters = trainable_parameters(classifier)
    weights = {p.untyped_storage().data_ptr() for p in classifier.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), FlopCounterMode(display=False) as above:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = classifier(h.clone(), None).sum()
        forward = above.get_total_flops()
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return (
        below.get_total_flops(),
        forward,
        above.get_total_flops() - forward,
        sum(kept.values()),
    )
