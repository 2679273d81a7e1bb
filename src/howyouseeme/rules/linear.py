"""Products of matrices, means and sums: y = W x + b."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..links import BatchedMatrix, Link, Matrix, Separable
from ..tape import Call, Value
from .branches import broadcast, contents
from .gates import is_attention
from .registry import Refusal, Step, rule_of

rule = rule_of("linear")


def _times(x: Value, weight: Tensor, output: Value, bias: Tensor | None) -> Step:
    return Step([(x, Matrix(x.shape, output.shape, weight))], bias)


def _from_left(a: Tensor, b: Value, output: Value, factor: float = 1) -> tuple[Value, Link]:
    """The link of y = factor · a b to b."""

    def weight() -> Tensor:
        full = a.reshape(-1, *a.shape[-2:])
        return full if factor == 1 else factor * full

    return b, BatchedMatrix(b.shape, output.shape, weight, columns=b.shape[-1])


def _from_right(a: Value, b: Tensor, output: Value, factor: float = 1) -> tuple[Value, Link]:
    """The link of y = factor · a b to a."""
    if b.dim() == 2 or b.shape[0] == 1 or b.stride(0) == 0:  # one matrix for all
        weight = b.reshape(-1, *b.shape[-2:])[0].T
        return a, Matrix(a.shape, output.shape, weight if factor == 1 else factor * weight)

    def weights() -> Tensor:
        return b.mT if factor == 1 else factor * b.mT

    return a, BatchedMatrix(a.shape, output.shape, weights)


def _dense(weight: Tensor) -> Tensor:
    """A weight as links take it, which may be stored without its zeros."""
    return weight if weight.layout == torch.strided else weight.to_dense()


def _product(a: Any, b: Any, output: Value, factor: float = 1) -> list[tuple[Value, Link]]:
    """The links of y = factor · a b: weights of attention are frozen, and the values the signal.

    Where both are computed, and neither is attention, each gets half: what it is worth on average
    over the orders in which the two may come (Shapley).
    """
    if not isinstance(b, Value):
        return [_from_right(a, _dense(b), output, factor)] if isinstance(a, Value) else []
    if not isinstance(a, Value):
        return [_from_left(_dense(a), b, output, factor)]
    gate_a, gate_b = is_attention(a), is_attention(b)
    if gate_a and not gate_b:
        return [_from_left(a.data, b, output, factor)]
    if gate_b and not gate_a:
        return [_from_right(a, b.data, output, factor)]
    return [
        _from_right(a, b.data, output, factor / 2),
        _from_left(a.data, b, output, factor / 2),
    ]


@rule("aten.mm", "aten.bmm")
def product(call: Call, output: Value) -> Step:
    """y = a b: through weights of attention to the values; half each where neither is attention"""
    a, b = call.args[:2]
    return Step(_product(a, b, output))


@rule("aten.addmm", "aten.baddbmm", "aten._sparse_addmm")
def sum_of_product(call: Call, output: Value) -> Step:
    """y = beta · c + alpha · a b, the product as in `product`"""
    c, a, b = call.args[:3]
    alpha, beta = call.kwargs.get("alpha", 1), call.kwargs.get("beta", 1)
    links = _product(a, b, output, alpha)
    if isinstance(c, Value):
        weight = None if beta == 1 else contents(beta, output.data)
        return Step([(c, broadcast(c, output.shape, weight)), *links])
    return Step(links, c if beta == 1 else beta * c)


@rule("aten.linear")
def linear(call: Call, output: Value) -> Step:
    """y = x Wᵀ + b, where a device does not split it into addmm"""
    x, weight, bias = call.args[0], call.args[1], call.argument(2, "bias")
    if not isinstance(x, Value) or isinstance(weight, Value) or isinstance(bias, Value):
        raise Refusal("only a computed input times a constant weight is supported")
    return _times(x, weight, output, bias)


def axes_of(x: Value, dims: int | list[int] | None) -> list[int]:
    """The axes that a reduction goes over, counted from 0."""
    if isinstance(dims, int):
        dims = [dims]
    return [d % len(x.shape) for d in dims] if dims else list(range(len(x.shape)))


@rule("aten.mean")
def mean(call: Call, output: Value) -> Step:
    """y = sum of x over the axes / their size: global average pooling"""
    x = call.args[0]
    matrices = {}
    for axis in axes_of(x, call.argument(1, "dim")):
        size = x.shape[axis]
        matrices[axis] = torch.full((1, size), 1 / size, dtype=x.dtype, device=x.device)
    return Step([(x, Separable(x.shape, output.shape, matrices))])


@rule("aten.sum")
def sum_(call: Call, output: Value) -> Step:
    """y = sum of x over the axes"""
    x = call.args[0]
    matrices = {
        axis: torch.ones(1, x.shape[axis], dtype=x.dtype, device=x.device)
        for axis in axes_of(x, call.argument(1, "dim"))
    }
    return Step([(x, Separable(x.shape, output.shape, matrices))])


@rule("aten.cumsum")
def cumsum(call: Call, output: Value) -> Step:
    """y[i] = sum of x[j] for all j up to i, along an axis"""
    x = call.args[0]
    axis = call.argument(1, "dim") % max(len(x.shape), 1)
    size = x.shape[axis] if len(x.shape) else 1
    lower = torch.ones(size, size, dtype=output.dtype, device=x.device).tril()
    return Step([(x, Separable(x.shape, output.shape, {axis: lower}))])


@rule("aten._linalg_solve_ex")
def solve(call: Call, output: Value) -> Step:
    """a y = b: y = a⁻¹ b, as a quotient: b is the signal, a its gate"""
    a, b = call.args[:2]
    if output.output != 0 or not isinstance(b, Value):
        raise Refusal("only the solution for a computed right side is supported")
    if b.shape != output.shape:
        raise Refusal("a right side that is broadcast is not supported")
    matrix = contents(a, output.data)
    left, batch = call.argument(2, "left", True), matrix.shape[:-2]
    vectors = len(b.shape) == 1 or b.shape == matrix.shape[:-1]
    if batch and not vectors:
        batch = output.shape[:-2]

    def weight() -> Tensor:
        inverse: Tensor = torch.linalg.inv(matrix).expand(*batch, *matrix.shape[-2:])
        return (inverse if left else inverse.mT).reshape(-1, *matrix.shape[-2:])

    columns = 1 if vectors or not left else b.shape[-1]
    return Step([(b, BatchedMatrix(b.shape, output.shape, weight, columns))])
