"""Per-record gradients by Opacus' hooks (GradSampleModule): the reference, and for all layers.

Opacus attaches a forward and a backward hook to every trained layer, keeps the layers' inputs,
and computes gradients per record beside the ordinary ones (Yousefpour et al. 2021,
arXiv:2109.12298). Clipping, noise and the step are ours for both engines (noisy.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opacus import GradSampleModule
from opacus.utils.module_utils import has_trainable_params
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.flat import slots_of
from anabranch.client.tuning.per_record import PerRecord, record_losses, require_per_record
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.tables import Engine


class OpacusGradients:
    """Computes the per-record gradients of a batch; made by `opacus_gradients`."""

    engine: Engine = "opacus"

    def __init__(
        self,
        model: GradSampleModule,
        parameters: Mapping[str, nn.Parameter],
        weights: Tensor | None,
    ) -> None:
        self._model = model
        self._parameters = dict(parameters)
        self._weights = weights
        self._slots = slots_of({name: tuple(p.shape) for name, p in parameters.items()})

    def gradients(self, batch: Examples) -> PerRecord:
        """Return the gradients of every record of `batch`.

        Raises PrivacyError if a trained tensor has none, or not one per record.
        """
        record_losses(self._model, batch, self._weights).sum().backward()
        samples: dict[str, Any] = {n: vars(p)["grad_sample"] for n, p in self._parameters.items()}
        shapes = {name: tuple(g.shape) for name, g in samples.items() if g is not None}
        require_per_record(self._parameters, shapes, len(batch))
        for p in self._parameters.values():
            p.grad = None
            vars(p)["grad_sample"] = None
        found = PerRecord(len(batch))
        for slot in self._slots:
            found.add(slot.name, slot.ordered(samples[slot.name]))
        return found


@contextmanager
def opacus_gradients(
    classifier: nn.Module, parameters: Mapping[str, nn.Parameter], weights: Tensor | None
) -> Iterator[OpacusGradients]:
    """Attach Opacus' hooks, in training mode, and leave nothing of them behind.

    Raises PrivacyError if Opacus has no gradients per record for a trained layer. With
    reduction "sum" the gradient of record i is that of its own term, whatever the batch.
    """
    modes = {module: module.training for module in classifier.modules()}
    owners = [m for m in classifier.modules() if has_trainable_params(m)]
    hooks = [owner.register_forward_pre_hook(_as_opacus_reads) for owner in owners]
    classifier.train()
    try:
        _require_supported(classifier)
        wrapped = GradSampleModule(classifier, loss_reduction="sum")
        try:
            yield OpacusGradients(wrapped, parameters, weights)
        finally:
            wrapped.to_standard_module()
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
            for name in ("activations", "max_batch_len"):  # left behind by a failed backward pass
                module.__dict__.pop(name, None)


def _as_opacus_reads(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a trained layer's inputs as Opacus takes them to be.

    Contiguous: its unfold2d reads a convolution's input by strides that assume so, and gives
    wrong gradients for channels-last ones without a word. And inputs of the lowest trained
    layers ask for a gradient: torch warns where none does.
    """
    return tuple(_readable(x) for x in inputs)


def _readable(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    x = x.contiguous()
    return x if x.requires_grad else x.detach().requires_grad_()


def _require_supported(classifier: nn.Module) -> None:
    errors = ModuleValidator.validate(classifier) + GradSampleModule.validate(classifier)
    if errors:
        raise PrivacyError(f"Opacus has no per-record gradients for this model: {errors[0]}")
