"""Programs: what is needed of a trace, as one function without decisions."""

from __future__ import annotations

import operator
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..rounding import unrounded
from .graph import Graph, makes_graphs
from .tracer import Guard, Instruction, Part, Slot, Tracer

__all__ = ["Program"]

aten = torch.ops.aten

_FAILURES = (RuntimeError, IndexError, TypeError, ValueError)


class Program:
    """One part of a trace as a function: from the slots `given` to those `wanted`.

    >>> program = Program(part, given, wanted, tracer)
    >>> made = program(tensors)                 # None where a look finds other contents than the trace's

    Of the calls, those stay that the result depends on, in their order, as a straight line of Python. On a GPU
    they become one graph, and what they make lies where it lay before (`lasts`), so that the next call writes
    over it.
    """

    def __init__(
        self,
        part: Part,
        given: Sequence[int],
        wanted: Sequence[int],
        tracer: Tracer,
    ) -> None:
        looks = part.guards
        self.wanted = len(wanted)
        constants, memory = tracer.constants, tracer.memory
        returned = [*wanted, *(look.slot for look in looks)]
        varying = [item for item in part.instructions if not _makes(item, constants)]
        self.instructions = _needed(varying, returned, memory)
        self._graph: Graph | None = None
        # Whether it is to become a graph with the first call.
        self._unready = there = _in_one_place(self.instructions, looks, tracer)
        # What a graph is given is another graph's, which may be followed by this one more than once.
        own = (*returned, *constants, *(given if there else ()))
        kept = {memory[slot] for slot in own} | tracer.lent
        self.instructions = _overwriting(self.instructions, kept, tracer)
        self.expected = [look.expected for look in looks]
        where = tracer.device if there else None
        graph, root, made = _calls(self.instructions, given, returned, constants, where)
        if looks and there:  # the device is waited for once, and not for each
            made[self.wanted :] = [
                _all_as_expected(graph, root, made[self.wanted :], looks, tracer)
            ]
            self.expected = [True]
        graph.output(made)
        self._module = fx.GraphModule(root, graph)
        self._always = [position for position, slot in enumerate(wanted) if slot in constants]

    @property
    def lasts(self) -> bool:
        """Whether what was made lies where it will lie the next time."""
        return self._graph is not None

    def __call__(self, given: Sequence[Tensor], steady: int = 0) -> list[Tensor] | None:
        """The wanted tensors, or None if a look finds something else.

        The first `steady` of what is given always lie in the same place.
        """
        return self.looked_at(self.started(given, steady))

    def started(self, given: Sequence[Tensor], steady: int = 0) -> list[Tensor] | None:
        """The same before the looks; a GPU goes on with it by itself."""
        try:
            return self._make(given, steady)
        except _FAILURES:  # which the looks, that are yet to be compared, would have kept it from
            return None

    def looked_at(self, made: list[Tensor] | None) -> list[Tensor] | None:
        """What was started, if the looks find what they found."""
        if made is None:
            return None
        looks = made[self.wanted :]
        found = (tensor.tolist() for tensor in looks)
        if any(found != expected for found, expected in zip(found, self.expected, strict=True)):
            return None
        for position in self._always:  # the program's own, not to be written to
            made[position] = made[position].clone()
        return made[: self.wanted]

    def _make(self, given: Sequence[Tensor], steady: int) -> list[Tensor]:
        if self._unready:
            self._unready = False
            self._graph = Graph.of(self._run, given, steady)
        return list((self._run if self._graph is None else self._graph)(given))

    def _run(self, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        try:
            return tuple(self._module(*given))
        finally:
            _round(True)


_UNROUNDED = threading.local()


def _round(rounded: bool) -> None:
    """Set how convolutions go on from here: see `howyouseeme.rounding`."""
    stack: ExitStack | None = getattr(_UNROUNDED, "stack", None)
    if stack is not None:
        stack.close()
    _UNROUNDED.stack = None
    if not rounded:
        _UNROUNDED.stack = ExitStack()
        _UNROUNDED.stack.enter_context(unrounded())


def _in_one_place(
    instructions: Sequence[Instruction], looks: Sequence[Guard], tracer: Tracer
) -> bool:
    """Whether all is on one GPU, but for what is always the same."""
    slots = {
        slot for item in instructions for slot in (*item.reads, *item.outs) if slot is not None
    }
    places = {tracer.kinds[slot].device for slot in slots - tracer.fixed.keys()}
    places |= {tracer.kinds[look.slot].device for look in looks}
    return makes_graphs(tracer.device) and places <= {tracer.device}


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


def _calls(
    instructions: Sequence[Instruction],
    given: Sequence[int],
    returned: Sequence[int],
    constants: dict[int, Tensor],
    where: torch.device | None,
) -> tuple[fx.Graph, dict[str, Tensor], list[fx.Node]]:
    """The instructions as a graph of calls, its constants, and what it has of the slots to be returned.

    Constants are `where` all else is; if that is given, also after a network has got other memory for them.
    """
    root: dict[str, Tensor] = {}
    graph = fx.Graph()
    node = {slot: graph.placeholder(f"given{slot}") for slot in given}

    def find(slot: int) -> fx.Node:
        if slot not in node:
            constant = constants[slot]
            root[f"constant{slot}"] = constant if where is None else constant.detach().to(where)
            node[slot] = graph.get_attr(f"constant{slot}")
        return node[slot]

    def fill(item: Any) -> Any:
        return find(item.index) if isinstance(item, Slot) else item

    rounded = True
    for item in instructions:
        args, kwargs = pytree.tree_map(fill, (item.args, item.kwargs))
        if rounded == item.unrounded:
            rounded = not item.unrounded
            graph.call_function(_round, (rounded,))
        made = graph.call_function(item.op, args, kwargs)
        for position, out in enumerate(item.outs):
            if out is not None and out not in node:
                one = (made, position)
                node[out] = graph.call_function(operator.getitem, one) if item.listed else made
    return graph, root, [find(slot) for slot in returned]


def _all_as_expected(
    graph: fx.Graph,
    root: dict[str, Tensor],
    found: Sequence[fx.Node],
    looks: Sequence[Guard],
    tracer: Tracer,
) -> fx.Node:
    """Whether all looks find what is expected, told by calls: one element, true or false."""
    same = []
    for node, look in zip(found, looks, strict=True):
        kind, name = tracer.kinds[look.slot], f"expected{look.slot}"
        expected = torch.tensor(look.expected, dtype=kind.dtype, device=kind.device)
        root[name] = expected.reshape(kind.shape)
        equal = graph.call_function(aten.eq.Tensor, (node, graph.get_attr(name)))
        same.append(graph.call_function(aten.all.default, (equal,)))
    return graph.call_function(
        aten.all.default, (graph.call_function(aten.stack.default, (same,)),)
    )
