"""Layers with one weight per record: how gradients of single records come out of autograd.

A trainable tensor θ is expanded to (B, …): record i sees its own copy θ_i, and the gradient of
Σ_i ℓ_i with respect to the copies is the stack of the records' own gradients ∂ℓ_i/∂θ. Layers
are not touched: while `PerRecord` is active, torch's functions take weights with that leading
axis.

    linear      x (B, …, in), weight (B, out, in), bias (B, out)
    layer_norm  x (B, …, d), weight and bias (B, d)
    embedding   ids (B, …), weight (B, n, d)
    conv2d      x (B, C, H, W), weight (B, out, C, k, k) with stride = kernel, no padding
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.protocols.errors import ModelError

LAYERS = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Conv2d)


class PerRecord(TorchFunctionMode):
    """While active, linear, layer_norm, embedding and conv2d take weights per record."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        own = _OWN.get(func)
        if own is not None:
            return own(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def require_per_record(classifier: Classifier) -> None:
    """Raise ModelError naming the first trained module whose gradients per record are not known."""
    for name in trainable_parameters(classifier):
        owner = name.rpartition(".")[0]
        root = classifier if owner == "head" else classifier.base
        module = root.get_submodule(owner)
        if not isinstance(module, LAYERS) or (isinstance(module, nn.Conv2d) and not _tiles(module)):
            raise ModelError(
                f"{owner}: gradients per record are not known for {type(module).__name__}; train "
                f"Linear, LayerNorm, Embedding or Conv2d layers (stride = kernel) on devices, or "
                f"export without the clipped form"
            )


def _tiles(conv: nn.Conv2d) -> bool:
    """Return whether a convolution looks at every pixel once: patches."""
    plain = conv.groups == 1 and conv.padding == (0, 0) and conv.dilation == (1, 1)
    return plain and conv.stride == conv.kernel_size


def _linear(func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dim() == 2 and (bias is None or bias.dim() == 1):
        y: Tensor = func(x, weight, bias)
        return y
    rows = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)  # (B, N, in)
    y = rows @ weight.T if weight.dim() == 2 else torch.bmm(rows, weight.transpose(1, 2))
    if bias is not None:
        y = y + (bias.unsqueeze(1) if bias.dim() == 2 else bias)
    return y.squeeze(1) if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[-2])


def _layer_norm(
    func: Any,
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    own = [p is not None and p.dim() > len(shape) for p in (weight, bias)]
    if not any(own):
        y: Tensor = func(x, shape, weight, bias, eps)
        return y
    y = functional.layer_norm(x, shape, None, None, eps)
    ones = [1] * (x.dim() - 1 - len(shape))
    if weight is not None:
        y = y * (weight.reshape(-1, *ones, *shape) if own[0] else weight)
    if bias is not None:
        y = y + (bias.reshape(-1, *ones, *shape) if own[1] else bias)
    return y


def _embedding(
    func: Any,
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    *rest: Any,
    **options: Any,
) -> Tensor:
    y: Tensor
    if weight.dim() == 2:
        y = func(ids, weight, padding_idx, *rest, **options)
        return y
    count = weight.shape[1]
    starts = torch.arange(weight.shape[0]) * count  # record i's table begins at row i · count
    rows = ids + starts.reshape(-1, *[1] * (ids.dim() - 1))
    y = functional.embedding(rows, weight.flatten(0, 1))
    if padding_idx is None:
        return y
    return torch.where((ids == padding_idx).unsqueeze(-1), y.detach(), y)  # it has no gradient


def _conv2d(
    func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **options: Any
) -> Tensor:
    if weight.dim() == 4 and (bias is None or bias.dim() == 1):
        y: Tensor = func(x, weight, bias, *rest, **options)
        return y
    (_, channels, height, width), (kh, kw) = x.shape, weight.shape[-2:]
    across = x.reshape(-1, channels, height // kh, kh, width // kw, kw).permute(0, 2, 4, 1, 3, 5)
    patches = across.reshape(-1, (height // kh) * (width // kw), channels * kh * kw)
    flat = weight.flatten(-3)
    y = _linear(functional.linear, patches, flat, bias)  # (B, N, out)
    return y.transpose(1, 2).reshape(-1, weight.shape[-4], height // kh, width // kw)


_OWN: dict[Any, Callable[..., Tensor]] = {
    functional.linear: _linear,
    functional.layer_norm: _layer_norm,
    functional.embedding: _embedding,
    functional.conv2d: _conv2d,
    torch.conv2d: _conv2d,
}
