"""Programs: what is needed of a trace, as one function without decisions."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .tracer import Instruction, Part, Slot

__all__ = ["Program"]


class Program:
    """One part of a trace as a function: from the slots `given` to those `wanted`.

    >>> program = Program(part, given, wanted, tracer.memory, tracer.constants)
    >>> made = program(tensors)                 # None where a look finds other contents than the trace's

    Of the calls, those stay that the result depends on, in their order, as a straight line of Python.
    """

    def __init__(
        self,
        part: Part,
        given: Sequence[int],
        wanted: Sequence[int],
        memory: Sequence[int],
        constants: dict[int, Tensor],
    ) -> None:
        looks = part.guards
        self.expected = [look.expected for look in looks]
        self.wanted = len(wanted)
        returned = [*wanted, *(look.slot for look in looks)]
        varying = [item for item in part.instructions if not _makes(item, constants)]
        self.instructions = _needed(varying, returned, memory)
        self._run = _module(self.instructions, given, returned, constants)
        self._always = [position for position, slot in enumerate(wanted) if slot in constants]

    def __call__(self, given: Iterable[Tensor]) -> list[Tensor] | None:
        """The wanted tensors, or None if a look finds something else."""
        made: list[Tensor] = list(self._run(*given))
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
