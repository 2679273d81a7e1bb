"""Where paths meet: add, sub, products with a gate, the larger of two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..links import Diagonal, Link, Selection
from ..tape import Call, Value
from .gates import gate_rank
from .registry import Refusal, Step, rule_of

rule = rule_of("branches")


def broadcast(x: Value, shape: torch.Size, weight: Tensor | None = None) -> Link:
    """The link of y = weight · x where x is broadcast to `shape`."""
    if x.shape == shape:
        if weight is not None and weight.shape != shape:
            weight = weight.expand(shape)
        return Diagonal(shape, shape, weight)
    index = torch.arange(x.numel, device=x.device).reshape(x.shape).expand(shape)
    return Selection(x.shape, shape, index, None if weight is None else weight.expand(shape))


def contents(item: Any, like: Tensor) -> Tensor:
    """An operand's contents: value, constant tensor or number; of masks and whole numbers as floats."""
    if isinstance(item, Value):
        return item.data
    if not isinstance(item, Tensor):
        return like.new_tensor(item)
    return item if item.is_floating_point() or item.is_complex() else item.to(like.dtype)


def _sum(output: Value, terms: Sequence[tuple[Any, Any]]) -> Step:
    """y = sum of factor · term, whatever is constant being bias; a factor is a number or a tensor."""
    links: list[tuple[Value, Link]] = []
    bias: Tensor | None = None
    for term, factor in terms:
        if isinstance(term, Value):
            one = not isinstance(factor, Tensor) and factor == 1
            weight = None if one else contents(factor, output.data)
            links.append((term, broadcast(term, output.shape, weight)))
        else:
            constant = factor * contents(term, output.data)
            bias = constant if bias is None else bias + constant
    return Step(links, bias)


def _product(a: Any, b: Any, output: Value) -> list[tuple[Any, Tensor]]:
    """a · b as terms of `_sum`: the signal times its gate; half each where neither is a gate."""
    a_data, b_data = contents(a, output.data), contents(b, output.data)
    if not isinstance(b, Value):
        return [(a, b_data)]
    if not isinstance(a, Value):
        return [(b, a_data)]
    rank_a, rank_b = gate_rank(a, b), gate_rank(b, a)
    if rank_a > rank_b:
        return [(b, a_data)]
    if rank_b > rank_a:
        return [(a, b_data)]
    return [(a, b_data / 2), (b, a_data / 2)]


@rule("aten.add")
def add(call: Call, output: Value) -> Step:
    """y = a + alpha · b: a residual connection"""
    alpha = call.argument(2, "alpha", 1)
    return _sum(output, [(call.args[0], 1), (call.args[1], alpha)])


@rule("aten.sub")
def sub(call: Call, output: Value) -> Step:
    """y = a - alpha · b"""
    alpha = call.argument(2, "alpha", 1)
    return _sum(output, [(call.args[0], 1), (call.args[1], -alpha)])


@rule("aten.rsub")
def rsub(call: Call, output: Value) -> Step:
    """y = b - alpha · a"""
    alpha = call.argument(2, "alpha", 1)
    return _sum(output, [(call.args[1], 1), (call.args[0], -alpha)])


@rule("aten.mul")
def mul(call: Call, output: Value) -> Step:
    """y = a · b: through a gate to the gated signal; half each where neither is a gate"""
    a, b = call.args[:2]
    return _sum(output, _product(a, b, output))


@rule("aten.div")
def div(call: Call, output: Value) -> Step:
    """y = a / b: the numerator is the signal, the denominator its gate; of a constant / b, b is the signal"""
    a, b = call.args[:2]
    if call.kwargs.get("rounding_mode"):
        raise Refusal("division with rounding is not supported")
    if not isinstance(a, Value):
        return _sum(output, _inverse(b, output.data))
    return _sum(output, [(a, 1 / contents(b, output.data))])


def _inverse(b: Value, quotient: Tensor) -> list[tuple[Any, Any]]:
    """constant / b as terms of `_sum`: the line through it at 1, or at -1 where b < 0."""
    slope = -quotient * torch.where(b.data < 0, -1.0, 1.0).to(quotient.dtype)
    slope = slope.masked_fill(b.data == 0, 0)  # what isn't taken, as another is there
    return [(b, slope), (quotient - slope * b.data, 1)]


@rule("aten.addcmul")
def addcmul(call: Call, output: Value) -> Step:
    """y = x + value · a · b, the product as in `mul`"""
    x, a, b = call.args[:3]
    value = call.kwargs.get("value", 1)
    terms = [(term, value * factor) for term, factor in _product(a, b, output)]
    return _sum(output, [(x, 1), *terms])


@rule("aten.addcdiv")
def addcdiv(call: Call, output: Value) -> Step:
    """y = x + value · a / b, the quotient as in `div`"""
    x, a, b = call.args[:3]
    factor = call.kwargs.get("value", 1) / contents(b, output.data)
    if isinstance(b, Value) and not isinstance(a, Value):
        return _sum(output, [(x, 1), *_inverse(b, factor * a)])
    return _sum(output, [(x, 1), (a, factor)])


@rule("aten.lerp")
def lerp(call: Call, output: Value) -> Step:
    """y = (1 - w) · a + w · b, where w is a gate; the signal, between two constants"""
    a, b, weight = call.args[:3]
    if isinstance(weight, Value) and not isinstance(a, Value) and not isinstance(b, Value):
        return _sum(output, [(a, 1), (weight, b - a)])
    weight = contents(weight, output.data)
    return _sum(output, [(a, 1 - weight), (b, weight)])


@rule("aten.glu")
def glu(call: Call, output: Value) -> Step:
    """y = a · sigmoid(b), a and b being the halves of x: b is the gate"""
    x = call.args[0]
    axis = call.argument(1, "dim", -1)
    place = torch.arange(x.numel, device=x.device).reshape(x.shape)
    gate = x.data.chunk(2, axis)[1].sigmoid()
    return Step([(x, Selection(x.shape, output.shape, place.chunk(2, axis)[0], gate))])


@rule("aten.maximum", "aten.minimum", "aten.fmax", "aten.fmin")
def maximum(call: Call, output: Value) -> Step:
    """y = max(a, b): the larger one; the first wins a tie"""
    return one_of(output, call.args[:2])


def one_of(output: Value, terms: Sequence[Any]) -> Step:
    """y = one of several terms at each place: the first that has y there."""
    links: list[tuple[Value, Link]] = []
    taken = torch.zeros_like(output.data, dtype=torch.bool)
    bias = torch.zeros_like(output.data)
    for term in terms:
        chosen = (contents(term, output.data) == output.data) & ~taken
        taken |= chosen
        if isinstance(term, Value):
            links.append((term, broadcast(term, output.shape, chosen.to(output.dtype))))
        else:
            bias = torch.where(chosen, output.data, bias)
    return Step(links, bias)
