"""Which operand of a product is the gate, that scales, and which the signal, that is scaled."""

from __future__ import annotations

from ..tape import Value
from .registry import family_of

_BOUNDED = {"aten.sigmoid", "aten.hardsigmoid", "aten._softmax", "aten._safe_softmax"}
_CLAMPED = {"aten.hardtanh", "aten.clamp"}
_MOVING = frozenset({"movement", "pooling", "branches"})


def is_bounded(operand: Value, through: frozenset[str] = _MOVING) -> bool:
    """True for what a sigmoid made, or a softmax, or a clamp to 0..1, and calls of those families
    changed since: moved, pooled or scaled."""
    call = operand.call
    while call is not None and call.name not in _BOUNDED | _CLAMPED:
        if family_of(call.name) not in through or len(call.inputs) != 1:
            return False
        call = call.inputs[0].call
    if call is None:
        return False
    return call.name in _BOUNDED or bool(operand.data.min() >= 0 and operand.data.max() <= 1)


def is_attention(operand: Value) -> bool:
    """True for weights of attention; heads may have been mixed since, by a linear layer."""
    return is_bounded(operand, _MOVING | {"linear", "convolution"})


def gate_rank(operand: Value, other: Value) -> int:
    """How much an operand of a product looks like the gate: what a sigmoid made, else the smaller."""
    return 2 * is_bounded(operand) + (operand.numel < other.numel)
