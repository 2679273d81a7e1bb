"""Pooling: a maximum goes back to where it was, an average to its window; and interpolation."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..links import Diagonal, Selection, Separable, Sparse
from ..links.matrices import sparse
from ..tape import Call, Value
from .branches import maximum
from .linear import axes_of
from .registry import Refusal, Step, rule_of

rule = rule_of("pooling")


def _pooled(
    x: Value, output: Value, at: Tensor, dims: int, pool: Callable[[Tensor], Tensor]
) -> Step:
    """`at` holds, for each output, the flat position of its maximum within its own plane."""
    centres = {axis: _centres(x, axis, dims, pool) for axis in range(-dims, 0)}
    return _from_planes(x, output, at, dims, centres)


def _from_planes(
    x: Value, output: Value, at: Tensor, dims: int, centres: dict[int, Tensor]
) -> Step:
    space = prod(x.shape[-dims:])
    planes = torch.arange(x.numel // space, device=at.device).reshape(-1, 1) * space
    index = at.reshape(len(planes), -1) + planes
    centres = {axis % len(x.shape): centre for axis, centre in centres.items()}
    return Step([(x, Selection(x.shape, output.shape, index, centres=centres))])


def _centres(x: Value, axis: int, dims: int, pool: Callable[[Tensor], Tensor]) -> Tensor:
    """The centre of each window along an axis: what a pool makes of a ramp there, and of one down."""
    size = x.shape[axis]
    ramp = torch.arange(size, dtype=torch.float64, device="cpu").reshape(size, *[1] * (-axis - 1))
    ramp = ramp.expand(1, *x.shape[-dims:])
    centre = (pool(ramp) - pool(-ramp)) / 2
    return centre.movedim(axis, 0).reshape(centre.shape[axis], -1)[:, 0]


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

    def pool(ramp: Tensor) -> Tensor:
        pooled: Tensor = call.op(ramp, *call.args[1:], **call.kwargs)[0]
        return pooled

    return _pooled(x, output, at.data, 3 if "3d" in call.name else 2, pool)


@rule("aten.fractional_max_pool2d", "aten.fractional_max_pool3d")
def fractional_max_pool(call: Call, output: Value) -> Step:
    """y = max of x over windows that lie at random, which this pass has drawn"""
    x, kernel, at = call.args[0], call.args[1], call.outputs[1]
    assert at is not None
    dims = len(kernel)
    centres = {}  # on average: they differ from channel to channel
    for axis, size in enumerate(kernel, start=-dims):
        ends = (size - 1) / 2, x.shape[axis] - 1 - (size - 1) / 2
        centres[axis] = torch.linspace(*ends, output.shape[axis], dtype=torch.float64, device="cpu")
    return _from_planes(x, output, at.data, dims, centres)


@rule("aten.max_pool1d")
def max_pool1d(call: Call, output: Value) -> Step:
    """As `max_pool`; PyTorch's fast 1-d call keeps no positions, so they are found again."""
    x = call.args[0]
    _, at = torch.nn.functional.max_pool1d_with_indices(x.data, *call.args[1:], **call.kwargs)

    def pool(ramp: Tensor) -> Tensor:
        pooled: Tensor = torch.nn.functional.max_pool1d(ramp, *call.args[1:], **call.kwargs)
        return pooled

    return _pooled(x, output, at, 1, pool)


def _extreme(call: Call, output: Value, sign: int) -> Step:
    """Where the maximum (or, with a sign of -1, the minimum) over the axes was; the first one."""
    x = call.args[0]
    axes = axes_of(x, call.argument(1, "dim"))
    rest = [axis for axis in range(len(x.shape)) if axis not in axes]
    order = [*rest, *axes]
    rows = prod(x.shape[axis] for axis in rest)
    place = torch.arange(x.numel, device=x.device).reshape(x.shape)
    place, data = (item.permute(order).reshape(rows, -1) for item in (place, sign * x.data))
    first = (data == data.amax(1, keepdim=True)).to(torch.int8).argmax(1, keepdim=True)
    return Step([(x, Selection(x.shape, output.shape, place.gather(1, first)))])


@rule("aten.amax", "aten.max")
def amax(call: Call, output: Value) -> Step:
    """y = max of x over axes: global max pooling; the lowest index wins a tie"""
    return maximum(call, output) if _is_between_two(call) else _extreme(call, output, 1)


@rule("aten.amin", "aten.min")
def amin(call: Call, output: Value) -> Step:
    """y = min of x over axes; the lowest index wins a tie"""
    return maximum(call, output) if _is_between_two(call) else _extreme(call, output, -1)


def _is_between_two(call: Call) -> bool:
    """torch.max(x, y) is no pooling."""
    return len(call.args) > 1 and isinstance(call.args[1], (Value, Tensor))


@rule(
    *("aten.topk", "aten.sort", "aten.kthvalue", "aten.median", "aten.nanmedian"),
    *("aten.cummax", "aten.cummin"),
)
def chosen(call: Call, output: Value) -> Step:
    """y = those elements of x that the call's second output tells: the choice is this image's"""
    x = call.args[0]
    if len(call.outputs) < 2:
        raise Refusal("only the form that tells positions, with an axis, is supported")
    at = call.outputs[1]
    assert at is not None
    if len(x.shape) == 0:
        return Step([(x, Diagonal(x.shape, output.shape))])
    names = [argument.name for argument in call.op._schema.arguments]
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    axis = given.get("dim", -1)
    index = at.data
    if index.dim() < len(x.shape):  # keepdim=False
        index = index.unsqueeze(axis)
    place = torch.arange(x.numel, device=x.device).reshape(x.shape).gather(axis, index)
    return Step([(x, Selection(x.shape, output.shape, place))])


def _matrices(call: Call, x: Value, dims: int) -> list[Tensor]:
    """The matrix [out, in] along each of the last `dims` axes, which a linear call treats one by one.

    The call is run on pictures that vary along one axis only. Row i of the identity along an axis
    gives column i of that axis's matrix, times what the other axes make of ones.
    """
    dtype = torch.float64 if x.device.type != "mps" else torch.float32

    def run(picture: Tensor) -> Tensor:
        result: Tensor = call.op(picture[None], *call.args[1:], **call.kwargs)[0]
        return result

    space = x.shape[-dims:]
    ones = run(torch.ones(1, *space, dtype=dtype, device=x.device))[0]
    # A place where every axis's window lies inside the picture: its total is never 0.
    centre = torch.unravel_index(ones.argmax(), ones.shape)
    matrices = []
    for axis in range(dims):
        eye = torch.eye(space[axis], dtype=dtype, device=x.device)
        shape = [space[axis], *(space[a] if a == axis else 1 for a in range(dims))]
        result = run(eye.reshape(shape).expand(space[axis], *space))
        line: list[Any] = [slice(None), *centre]
        line[axis + 1] = slice(None)
        matrix = result[tuple(line)].T
        matrices.append(matrix / ones[centre] if axis else matrix)
    return matrices


def _separable(call: Call, output: Value, dims: int) -> Step:
    """Any linear call without negative weights that treats the last `dims` axes one by one."""
    x = call.args[0]
    if (call.argument(6, "divisor_override") or 1) < 0:
        raise Refusal("a mean by a negative divisor is not supported")
    first = len(x.shape) - dims
    matrices = {
        first + axis: matrix.to(x.dtype) for axis, matrix in enumerate(_matrices(call, x, dims))
    }
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


@rule("aten.upsample_bicubic2d", "aten._upsample_bicubic2d_aa")
def bicubic(call: Call, output: Value) -> Step:
    """y = sum of w · x over a window of each axis, with weights of both signs"""
    x = call.args[0]
    rows, columns = (matrix.to_sparse() for matrix in _matrices(call, x, 2))
    height, width = output.shape[-2:]
    (y, i), (x_at, j) = rows.indices(), columns.indices()
    # Every entry of one matrix meets every entry of the other.
    index = torch.stack(
        [
            (y[:, None] * width + x_at).reshape(-1),
            (i[:, None] * x.shape[-1] + j).reshape(-1),
        ]
    )
    weight = (rows.values()[:, None] * columns.values()).reshape(-1).to(x.dtype)
    size = (height * width, prod(x.shape[-2:]))
    entries = sparse(index, weight, size)
    link = Sparse(x.shape, output.shape, entries, channels=prod(x.shape[:-2]))
    return Step([(x, link)])
