"""Gradients in pieces equal torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.edge.export.decompositions import Rewritten, convolution_backward
from anabranch.protocols.errors import ModelError


@settings(max_examples=60, deadline=None)
@given(
    dims=st.integers(1, 2),
    size=st.integers(5, 9),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
    dilation=st.integers(1, 2),
    rows=st.integers(1, 3),
)
def test_convolution_backward_is_torchs(
    dims: int, size: int, kernel: int, stride: int, padding: int, dilation: int, rows: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 2, *[size] * dims)
    weight = torch.randn(3, 2, *[kernel] * dims)
    rest = [[v] * dims for v in (stride, padding, dilation)]
    y = torch.ops.aten.convolution(x, weight, None, *rest, False, [0] * dims, 1)
    args: Any = (torch.randn_like(y), x, weight, [3], *rest, False, [0] * dims, 1, [True] * 3)
    got = convolution_backward(*args)
    for ours, theirs in zip(got, torch.ops.aten.convolution_backward(*args), strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_convolution_backward_gives_only_what_is_wanted_and_knows_what_it_cannot() -> None:
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(4, 2, 3, 3)
    y = torch.nn.functional.conv2d(x, weight, groups=2)
    rest = ([1, 1], [0, 0], [1, 1])
    args = (torch.randn_like(y), x, weight, [4], *rest)
    of_x, of_weight, of_bias = convolution_backward(*args, False, [0, 0], 2, [True, False, False])
    theirs = torch.ops.aten.convolution_backward(*args, False, [0, 0], 2, [True, False, False])
    assert torch.allclose(of_x, theirs[0], atol=1e-4)
    assert of_weight is of_bias is None
    for transposed, wanted in ((False, [True, True, False]), (True, [True, False, False])):
        result = convolution_backward(*args, transposed, [0, 0], 2, wanted)
        assert result is NotImplemented


@given(scale=st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e6]))
@settings(deadline=None)
def test_normalize_is_torchs(scale: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 5) * scale).requires_grad_()
    with Rewritten():
        ours = torch.nn.functional.normalize(x, dim=-1)
    theirs = torch.nn.functional.normalize(x, dim=-1)
    assert torch.allclose(ours, theirs, rtol=1e-5)
    if scale > 1e-12:
        factors = torch.randn(3, 5)
        a, b = [torch.autograd.grad((y * factors).sum(), x)[0] for y in (ours, theirs)]
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 / scale)


def test_other_norms_are_refused() -> None:
    with Rewritten(), pytest.raises(ModelError, match="by an L1 norm"):
        torch.nn.functional.normalize(torch.ones(2, 2), p=1.0)
