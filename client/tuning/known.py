"""Which layers the fast path computes per-record gradients of.

Embeddings, convolutions, bare parameters, LayerNorms over several axes, subclasses of known
layers and weights that two modules share are none of them: fits that train these use Opacus.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

from anabranch.client.tuning.lora import LoraLinear


def unknown_tensors(classifier: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Return the names of trained tensors that no layer known here holds, ascending.

    Known are LoraLinear on a frozen nn.Linear, nn.Linear, and nn.LayerNorm over one axis: these
    very classes, without hooks, buffers or a forward of their own, each tensor in one of them.
    """
    known = {id(p) for _, parts in known_layers(classifier) for p in parts}
    holders = Counter(id(p) for m in classifier.modules() for p in m.parameters(recurse=False))
    return sorted(
        name for name, p in parameters.items() if id(p) not in known or holders[id(p)] != 1
    )


def known_layers(classifier: nn.Module) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Return every layer that the fast path knows, with the tensors it has gradients for."""
    found: list[tuple[nn.Module, list[nn.Parameter]]] = []
    adapted = [m for m in classifier.modules() if isinstance(m, LoraLinear)]
    inside = {part for m in adapted for part in (m.base, m.lora_A, m.lora_B)}
    for module in classifier.modules():
        if isinstance(module, LoraLinear):
            frozen = not any(p.requires_grad for p in module.base.parameters())
            parts = (module.base, module.lora_A, module.lora_B)
            if type(module) is LoraLinear and frozen and all(_is_plain_linear(m) for m in parts):
                found.append((module, [*module.lora_A.parameters(), *module.lora_B.parameters()]))
        elif module not in inside:
            norm = type(module) is nn.LayerNorm and len(module.normalized_shape) == 1
            if _is_plain_linear(module) or (norm and _is_plain(module)):
                found.append((module, list(module.parameters(recurse=False))))
    return found


def _is_plain_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and _is_plain(module)


def _is_plain(module: nn.Module) -> bool:
    """Return whether a call of the layer does what its class says, and no more."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    extra = (*hooks, "_buffers", "_modules")
    return not any(getattr(module, name) for name in extra) and "forward" not in vars(module)
