"""Where paths meet: add, sub, products with a gate, the larger of two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..links import Diagonal, Link, Selection
from ..tape import Call, Value
from . import Refusal, Step, find_rule, rule


def broadcast(x: Value, shape: torch.Size, weight: Tensor | None = None) -> Link:
    """The link of y = weight · x where x is broadcast to `shape`."""
    if x.shape == shape:
        if weight is not None and weight.shape != shape:
            weight = weight.expand(shape)
        return Diagonal(shape, shape, weight)
    index = torch.arange(x.numel, device=x.data.device).reshape(x.shape).expand(shape)
    return Selection(x.shape, shape, index, None if weight is None else weight.expand(shape))


def _tensor(item: Any, like: Tensor) -> Tensor:
    """An operand's contents: value, constant tensor or number."""
    if isinstance(item, Value):
        return item.data
    return item if isinstance(item, Tensor) else like.new_tensor(item)


def _weighted_sum(output: Value, terms: Sequence[tuple[Any, float]]) -> Step:
    """y = sum of factor · term, whatever is constant being bias."""
    links: list[tuple[Value, Link]] = []
    bias: Tensor | None = None
    for term, factor in terms:
        if isinstance(term, Value):
            weight = None if factor == 1 else output.data.new_tensor(factor)
            links.append((term, broadcast(term, output.shape, weight)))
        else:
            constant = factor * _tensor(term, output.data)
            bias = constant if bias is None else bias + constant
    return Step(links, bias)


@rule("aten.add")
def add(call: Call, output: Value) -> Step:
    """y = a + alpha · b: a residual connection"""
    alpha = call.argument(2, "alpha", 1)
    return _weighted_sum(output, [(call.args[0], 1), (call.args[1], alpha)])


@rule("aten.sub")
def sub(call: Call, output: Value) -> Step:
    """y = a - alpha · b"""
    alpha = call.argument(2, "alpha", 1)
    return _weighted_sum(output, [(call.args[0], 1), (call.args[1], -alpha)])


@rule("aten.rsub")
def rsub(call: Call, output: Value) -> Step:
    """y = b - alpha · a"""
    alpha = call.argument(2, "alpha", 1)
    return _weighted_sum(output, [(call.args[1], 1), (call.args[0], -alpha)])


_BOUNDED = {"aten.sigmoid", "aten.hardsigmoid", "aten._softmax"}
_CLAMPED = {"aten.hardtanh", "aten.clamp"}


def _is_bounded(operand: Value) -> bool:
    """True for what a sigmoid made, or a clamp to 0..1, moved, pooled or scaled since as may be."""
    call = operand.call
    while call is not None and call.name not in _BOUNDED | _CLAMPED:
        find = find_rule(call.name)
        family = find.__module__.rsplit(".", 1)[-1] if find is not None else ""
        if family not in {"movement", "pooling", "branches"} or len(call.inputs) != 1:
            return False
        call = call.inputs[0].call
    if call is None:
        return False
    inside = operand.data.min() >= 0 and operand.data.max() <= 1
    return call.name in _BOUNDED or bool(inside)


def _gate_rank(operand: Value, other: Value) -> int:
    """How much an operand of a product looks like the gate: what a sigmoid made, else the smaller."""
    return 2 * _is_bounded(operand) + (operand.numel < other.numel)


@rule("aten.mul")
def mul(call: Call, output: Value) -> Step:
    """y = a · b: through a gate to the gated signal; half each where neither is a gate"""
    a, b = call.args[:2]
    if not isinstance(a, Value) or not isinstance(b, Value):
        signal, factor = (a, b) if isinstance(a, Value) else (b, a)
        return Step([(signal, broadcast(signal, output.shape, _tensor(factor, output.data)))])
    rank_a, rank_b = _gate_rank(a, b), _gate_rank(b, a)
    if rank_a > rank_b:
        return Step([(b, broadcast(b, output.shape, a.data))])
    if rank_b > rank_a:
        return Step([(a, broadcast(a, output.shape, b.data))])
    return Step(
        [
            (a, broadcast(a, output.shape, b.data / 2)),
            (b, broadcast(b, output.shape, a.data / 2)),
        ]
    )


@rule("aten.div")
def div(call: Call, output: Value) -> Step:
    """y = a / b: the numerator is the signal, the denominator its gate"""
    a, b = call.args[:2]
    if call.kwargs.get("rounding_mode"):
        raise Refusal("division with rounding is not supported")
    if not isinstance(a, Value):  # constant / x
        divisor = b
        return Step([(divisor, broadcast(divisor, output.shape, output.data / divisor.data))])
    return Step([(a, broadcast(a, output.shape, 1 / _tensor(b, output.data)))])


@rule("aten.maximum", "aten.minimum")
def maximum(call: Call, output: Value) -> Step:
    """y = max(a, b): the larger one; the first wins a tie"""
    links: list[tuple[Value, Link]] = []
    taken = torch.zeros_like(output.data, dtype=torch.bool)
    bias = torch.zeros_like(output.data)
    for term in call.args[:2]:
        chosen = (_tensor(term, output.data) == output.data) & ~taken
        taken |= chosen
        if isinstance(term, Value):
            links.append((term, broadcast(term, output.shape, chosen.to(output.data.dtype))))
        else:
            bias = torch.where(chosen, output.data, bias)
    return Step(links, bias)
