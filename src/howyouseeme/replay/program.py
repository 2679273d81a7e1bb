"""Programs: what is needed of a trace, as one function without decisions."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .tracer import Instruction, Part, Slot, Tracer

__all__ = ["Program"]

aten = torch.ops.aten

_FAILURES = (RuntimeError, IndexError, TypeError, ValueError)


class Program:
    """One part of a trace as a function: from the slots `given` to those `wanted`.

    >>> program = Program(part, given, wanted, tracer)
    >>> made = program(tensors)                 # None where a look finds other contents than the trace's

    Of the calls, those stay that the result depends on, in their order, as a straight line of Python.
    """

    def __init__(
        self,
        part: Part,
        given: Sequence[int],
        wanted: Sequence[int],
        tracer: Tracer,
    ) -> None:
        looks = part.guards
        self.expected = [look.expected for look in looks]
        self.wanted = len(wanted)
        returned = [*wanted, *(look.slot for look in looks)]
        constants, memory = tracer.constants, tracer.memory
        varying = [item for item in part.instructions if not _makes(item, constants)]
        kept = {memory[slot] for slot in (*returned, *constants)} | tracer.lent
        self.instructions = _overwriting(_needed(varying, returned, memory), kept, tracer)
        self._run = _module(self.instructions, given, returned, constants)
        self._always = [position for position, slot in enumerate(wanted) if slot in constants]

    def __call__(self, given: Iterable[Tensor]) -> list[Tensor] | None:
        """The wanted tensors, or None if a look finds something else."""
        try:
            made: list[Tensor] = list(self._run(*given))
        except _FAILURES:  # which the looks, that are compared below, would have kept it from
            return None
        looks = made[self.wanted :]
        found = (tensor.tolist() for tensor in looks)
        if any(found != expected for found, expected in zip(found, self.expected, strict=True)):
            return None
        for position in self._always:  # the program's own, not to be written to
            made[position] = made[position].clone()
        return made[: self.wanted]


def _makes(item: Instruction, constants: dict[int, Tensor]) -> bool:
    """Whether all that an instruction makes is constant."""
    return bool(item.outs) and all(out is None or out in constants for out in item.outs)


def _needed(
    instructions: Sequence[Instruction], wanted: Sequence[int], memory: Sequence[int]
) -> list[Instruction]:
    """What the `wanted` slots depend on, in order."""
    slots, written = set(wanted), {memory[slot] for slot in wanted}
    kept = []
    for item in reversed(instructions):
        if slots.isdisjoint(item.outs) and written.isdisjoint(item.writes):
            continue
        kept.append(item)
        slots.update(item.reads)
        written.update(memory[slot] for slot in item.reads)
    return kept[::-1]


#: Calls that may write over their first argument.
_OVERWRITING = {
    getattr(aten, name).__getattr__(overload): getattr(aten, f"{name}_").__getattr__(overload)
    for overload, names in {
        "default": "abs addcmul clamp neg relu sign threshold",
        "Tensor": "add div mul sub",
        "Scalar": "masked_fill",
    }.items()
    for name in names.split()
}


def _overwriting(
    instructions: Sequence[Instruction], kept: set[int], tracer: Tracer
) -> list[Instruction]:
    """The same where calls write over an argument that is not read again, as fresh memory takes longer to get
    than to fill; not to what is `kept`."""
    last = {tracer.memory[slot]: at for at, item in enumerate(instructions) for slot in item.reads}
    made = list(instructions)
    for at, item in enumerate(instructions):
        first = item.args[0] if item.args else None
        if item.op in _OVERWRITING and isinstance(first, Slot):
            memory, kind = tracer.memory[first.index], tracer.kinds[first.index]
            over = 0 in kind.strides or kind != tracer.kinds[item.outs[0] or 0]
            again = (
                last[memory] > at or [tracer.memory[slot] for slot in item.reads].count(memory) > 1
            )
            if not over and not again and memory not in kept:
                made[at] = replace(item, op=_OVERWRITING[item.op], writes=[memory])
    return made


def _module(
    instructions: Sequence[Instruction],
    given: Sequence[int],
    returned: Sequence[int],
    constants: dict[int, Tensor],
) -> fx.GraphModule:
    graph = fx.Graph()
    node = {slot: graph.placeholder(f"given{slot}") for slot in given}
    root: dict[str, Tensor] = {}

    def find(slot: int) -> fx.Node:
        if slot not in node:
            root[f"constant{slot}"] = constants[slot]
            node[slot] = graph.get_attr(f"constant{slot}")
        return node[slot]

    def fill(item: Any) -> Any:
        return find(item.index) if isinstance(item, Slot) else item

    for item in instructions:
        args, kwargs = pytree.tree_map(fill, (item.args, item.kwargs))
        made = graph.call_function(item.op, args, kwargs)
        for position, out in enumerate(item.outs):
            if out is not None and out not in node:
                one = (made, position)
                node[out] = graph.call_function(operator.getitem, one) if item.listed else made
    graph.output([find(slot) for slot in returned])
    return fx.GraphModule(root, graph)
