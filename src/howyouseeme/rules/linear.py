"""Fully connected layers, means and sums: y = W x + b."""

from __future__ import annotations

import torch
from torch import Tensor

from ..links import Matrix, Separable
from ..tape import Call, Value
from . import Refusal, Step, rule


def _times(x: Value, weight: Tensor, output: Value, bias: Tensor | None) -> Step:
    return Step([(x, Matrix(x.shape, output.shape, weight))], bias)


@rule("aten.addmm")
def addmm(call: Call, output: Value) -> Step:
    """y = beta · b + alpha · x W"""
    bias, x, weight = call.args[:3]
    alpha, beta = call.kwargs.get("alpha", 1), call.kwargs.get("beta", 1)
    if not isinstance(x, Value) or isinstance(weight, Value) or isinstance(bias, Value):
        raise Refusal("only a computed input times a constant weight is supported")
    if alpha != 1:  # else spare a copy of the weight
        weight = alpha * weight
    return _times(x, weight.T, output, bias if beta == 1 else beta * bias)


@rule("aten.mm")
def mm(call: Call, output: Value) -> Step:
    """y = x W"""
    x, weight = call.args[:2]
    if not isinstance(x, Value) or isinstance(weight, Value):
        raise Refusal("only a computed input times a constant weight is supported")
    return _times(x, weight.T, output, None)


@rule("aten.bmm")
def bmm(call: Call, output: Value) -> Step:
    """y = x W with the same W for the whole batch: a linear layer on a transposed input"""
    x, weight = call.args[:2]
    if not isinstance(x, Value) or isinstance(weight, Value):
        raise Refusal("only a computed input times a constant weight is supported")
    if weight.shape[0] > 1 and weight.stride(0) != 0:
        raise Refusal("only one matrix for the whole batch is supported")
    return _times(x, weight[0].T, output, None)


@rule("aten.linear")
def linear(call: Call, output: Value) -> Step:
    """y = x Wᵀ + b, where a device does not split it into addmm"""
    x, weight, bias = call.args[0], call.args[1], call.argument(2, "bias")
    if not isinstance(x, Value) or isinstance(weight, Value) or isinstance(bias, Value):
        raise Refusal("only a computed input times a constant weight is supported")
    return _times(x, weight, output, bias)


def _axes(x: Value, dims: int | list[int] | None) -> list[int]:
    if isinstance(dims, int):
        dims = [dims]
    return [d % x.data.dim() for d in dims] if dims else list(range(x.data.dim()))


@rule("aten.mean")
def mean(call: Call, output: Value) -> Step:
    """y = sum of x over the axes / their size: global average pooling"""
    x = call.args[0]
    matrices = {}
    for axis in _axes(x, call.argument(1, "dim")):
        size = x.shape[axis]
        matrices[axis] = torch.full((1, size), 1 / size, dtype=x.data.dtype, device=x.data.device)
    return Step([(x, Separable(x.shape, output.shape, matrices))])


@rule("aten.sum")
def sum_(call: Call, output: Value) -> Step:
    """y = sum of x over the axes"""
    x = call.args[0]
    matrices = {
        axis: torch.ones(1, x.shape[axis], dtype=x.data.dtype, device=x.data.device)
        for axis in _axes(x, call.argument(1, "dim"))
    }
    return Step([(x, Separable(x.shape, output.shape, matrices))])
