"""What torch computes in one piece, in pieces that can be traced and that ONNX has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anabranch.protocols.errors import ModelError

Sizes = Sequence[int]


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sizes | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    transposed: bool,
    output_padding: Sizes,
    groups: int,
    wanted: Sequence[bool],
) -> Any:
    """Return the gradients (of x, of the weight, of the bias), None where not wanted.

    Of x: the transposed convolution of `grad` with the weight. Of the weight: the convolution
    of x with `grad`, records in the place of channels, stride and dilation exchanged. Not
    decomposed (NotImplemented): a transposed convolution, and the weight of a grouped one.
    """
    if transposed or (wanted[1] and groups != 1):
        return NotImplemented
    convolve = torch.ops.aten.convolution.default
    space = range(x.dim() - 2)
    of_x = of_weight = of_bias = None
    if wanted[0]:
        covered = [
            (grad.shape[2 + i] - 1) * stride[i]
            - 2 * padding[i]
            + dilation[i] * (weight.shape[2 + i] - 1)
            + 1
            for i in space
        ]
        rest = [x.shape[2 + i] - covered[i] for i in space]
        of_x = convolve(grad, weight, None, stride, padding, dilation, True, rest, groups)
    if wanted[1]:
        swapped = convolve(
            x.transpose(0, 1),
            grad.transpose(0, 1),
            None,
            dilation,
            padding,
            stride,
            False,
            [0] * len(space),
            1,
        )
        for i in space:
            swapped = swapped.narrow(2 + i, 0, weight.shape[2 + i])
        of_weight = swapped.transpose(0, 1)
    if wanted[2]:
        of_bias = grad.sum([0, *(2 + i for i in space)])
    return of_x, of_weight, of_bias


class Rewritten(TorchFunctionMode):
    """While active, functions whose gradient works in place are computed by others."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is nn.functional.normalize:
            return _normalize(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _normalize(
    x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> Tensor:
    """Return x / max(‖x‖₂, eps) along `dim`."""
    if p != 2.0:
        raise ModelError(f"the base normalizes by an L{p:g} norm; only L2 can be exported")
    squares = (x * x).sum(dim, keepdim=True).clamp(min=eps * eps)
    return x * squares.rsqrt()
