"""Pooling: a maximum goes back to where it was, an average to its window; and interpolation."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ..links import Selection, Separable
from ..tape import Call, Value
from . import Step, rule


def _pooled(x: Value, output: Value, at: Tensor, dims: int) -> Step:
    """`at` holds, for each output, the flat position of its maximum within its own plane."""
    space = prod(x.shape[-dims:])
    planes = torch.arange(x.numel // space, device=at.device).reshape(-1, 1) * space
    index = at.reshape(len(planes), -1) + planes
    return Step([(x, Selection(x.shape, output.shape, index))])


@rule(
    "aten.max_pool2d_with_indices",
    "aten.max_pool3d_with_indices",
    "aten.adaptive_max_pool2d",
    "aten.adaptive_max_pool3d",
)
def max_pool(call: Call, output: Value) -> Step:
    """y = max of x over a window; the lowest index wins a tie"""
    x, at = call.args[0], call.outputs[1]
    assert at is not None
    return _pooled(x, output, at.data, 3 if "3d" in call.name else 2)


@rule("aten.max_pool1d")
def max_pool1d(call: Call, output: Value) -> Step:
    """As `max_pool`; PyTorch's fast 1-d call keeps no positions, so they are found again."""
    x = call.args[0]
    _, at = torch.nn.functional.max_pool1d_with_indices(x.data, *call.args[1:], **call.kwargs)
    return _pooled(x, output, at, 1)


def _reduced(x: Value, axes: list[int], output: Value) -> Step:
    """Where the maximum over the axes was; the lowest index wins a tie."""
    rest = [axis for axis in range(x.data.dim()) if axis not in axes]
    order = [*rest, *axes]
    rows = prod(x.shape[axis] for axis in rest)
    place = torch.arange(x.numel, device=x.data.device).reshape(x.shape)
    place, data = (item.permute(order).reshape(rows, -1) for item in (place, x.data))
    first = (data == data.amax(1, keepdim=True)).to(torch.int8).argmax(1, keepdim=True)
    return Step([(x, Selection(x.shape, output.shape, place.gather(1, first)))])


@rule("aten.amax", "aten.max")
def amax(call: Call, output: Value) -> Step:
    """y = max of x over axes: global max pooling"""
    x = call.args[0]
    if len(call.args) > 1 and isinstance(call.args[1], (Value, Tensor)):
        from .branches import maximum  # noqa: PLC0415 - torch.max(x, y) is a branch

        return maximum(call, output)
    dims: Any = call.argument(1, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    axes = [d % x.data.dim() for d in dims] if dims else list(range(x.data.dim()))
    return _reduced(x, axes, output)


def _separable(call: Call, output: Value, dims: int) -> Step:
    """Any linear call that treats the last `dims` axes one by one: read its matrices off.

    The call is run on pictures that vary along one axis only. Row i of the identity along an axis
    gives column i of that axis's matrix, times what the other axes make of ones.
    """
    x = call.args[0]
    dtype = torch.float64 if x.data.device.type != "mps" else torch.float32

    def run(picture: Tensor) -> Tensor:
        result: Tensor = call.op(picture[None], *call.args[1:], **call.kwargs)[0]
        return result

    space = x.shape[-dims:]
    ones = run(torch.ones(1, *space, dtype=dtype, device=x.data.device))[0]
    # A place where every axis's window lies inside the picture: its total is never 0.
    centre = torch.unravel_index(ones.argmax(), ones.shape)
    matrices = {}
    for axis in range(dims):
        eye = torch.eye(space[axis], dtype=dtype, device=x.data.device)
        shape = [space[axis], *(space[a] if a == axis else 1 for a in range(dims))]
        result = run(eye.reshape(shape).expand(space[axis], *space))
        line: list[Any] = [slice(None), *centre]
        line[axis + 1] = slice(None)
        matrix = result[tuple(line)].T
        if axis:
            matrix = matrix / ones[centre]
        matrices[x.data.dim() - dims + axis] = matrix.to(x.data.dtype)
    return Step([(x, Separable(x.shape, output.shape, matrices))])


@rule(
    "aten.avg_pool2d",
    "aten._adaptive_avg_pool2d",
    "aten.adaptive_avg_pool2d",
    "aten.upsample_bilinear2d",
    "aten._upsample_bilinear2d_aa",
)
def average2d(call: Call, output: Value) -> Step:
    """y = weighted mean of x over a window of each axis"""
    return _separable(call, output, 2)


@rule("aten.avg_pool1d", "aten.adaptive_avg_pool1d", "aten.upsample_linear1d")
def average1d(call: Call, output: Value) -> Step:
    """As `average2d`, along one axis"""
    return _separable(call, output, 1)


@rule("aten.avg_pool3d", "aten._adaptive_avg_pool3d", "aten.upsample_trilinear3d")
def average3d(call: Call, output: Value) -> Step:
    """As `average2d`, along three axes"""
    return _separable(call, output, 3)
