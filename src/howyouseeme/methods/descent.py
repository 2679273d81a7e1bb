"""The body of `evidence` with a few nodes at a time: as much work as there are nodes, not as activations.

Below the feature maps evidence spreads to ever more nodes. Here no more than so many go on from each value
where paths meet, the halftone of all (see `howyouseeme.halftone`): on average what all of them would bring.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backtrack import Plan, signs
from ..halftone import Dots, Heap, excite, heap_of, precision
from ..links import Diagonal, Link
from ..rules import Step
from ..tape import Value
from .base import Crossing, Trail

__all__ = ["descend"]


def descend(
    plan: Plan, maps: dict[Value, Tensor], nodes: int | None, batch: int, trail: Trail | None = None
) -> tuple[dict[Value, Tensor], Tensor]:
    """From the evidence at feature maps to the inputs; and the positive evidence [batch] lost on the way.

    >>> found, lost = descend(plan, maps, nodes=2000, batch=1)

    About `nodes` nodes of each sample go on from each value, all where it is None.
    """
    heaps: dict[Value, Heap] = {}
    moved: dict[Value, list[Dots]] = {}  # arrived through calls with one input for each output
    for value, evidence in maps.items():
        index = evidence.reshape(-1).nonzero()[:, 0]
        heap_of(value, heaps, batch).add(index, evidence.reshape(-1)[index])
    lost = torch.zeros(batch, dtype=precision(plan.start), device=plan.start.data.device)
    spreading = _spreading(plan)
    for layer, (value, step) in enumerate(plan.steps):
        dots = _arrived(value, heaps, moved, batch, nodes if value in spreading else None, layer)
        if dots is None:
            continue
        if trail is not None:
            trail.arrive(value, _dense(value, dots.index, dots.evidence))
        lost += _hand_on(value, step, dots, heaps, moved, batch, trail)
    found = {}
    for value in plan.inputs:
        for dots in moved.pop(value, ()):
            heap_of(value, heaps, batch).add(dots.index, dots.evidence)
        if value in heaps:  # half precision is kept till here
            found[value] = heaps[value].dense().to(value.data.dtype)
    return found, lost


def _spreading(plan: Plan) -> set[Value]:
    """The values behind which, on the way to the inputs, some call has several inputs for an output."""
    found: set[Value] = set()
    for value, step in reversed(plan.steps):
        if step.links and (not step.moves or any(source in found for source, _ in step.links)):
            found.add(value)
    return found


def _arrived(
    value: Value,
    heaps: dict[Value, Heap],
    moved: dict[Value, list[Dots]],
    batch: int,
    most: int | None,
    layer: int,
) -> Dots | None:
    """All that has arrived at a value. Where paths met, asked is what made a node as it is."""
    parts = moved.pop(value, [])
    if len(parts) == 1 and value not in heaps:
        return parts[0]
    if not parts and value not in heaps:
        return None
    for dots in parts:
        heap_of(value, heaps, batch).add(dots.index, dots.evidence)
    return heaps.pop(value).draw(most, layer)


def _hand_on(
    value: Value,
    step: Step,
    dots: Dots,
    heaps: dict[Value, Heap],
    moved: dict[Value, list[Dots]],
    batch: int,
    trail: Trail | None,
) -> Tensor | float:
    """Hand evidence on to a value's inputs; returned is what of it ended here [batch], at constants."""
    if not step.links:
        return _of_samples(value, dots.index, dots.evidence, batch)
    if step.moves:
        rest: Dots | None = dots
        for source, link in step.links:
            if trail is not None:
                rate = _dense(value, dots.index, dots.evidence)
                trail.cross(source, Crossing(value, link, rate, moved=True))
            if rest is not None:
                there, rest = _move(link, rest)
                moved.setdefault(source, []).append(there)
        return 0.0 if rest is None else _of_samples(value, rest.index, rest.evidence, batch)
    rates, lost = excite(value, step.links, dots, heaps, batch)
    if trail is not None:
        rate, sign = (_dense(value, dots.index, item) for item in (rates, dots.sign))
        for source, link in step.links:
            trail.cross(source, Crossing(value, link, rate, sign))
    return lost


def _move(link: Link, dots: Dots) -> tuple[Dots, Dots | None]:
    """Through a call with one input for each output: all the evidence goes there; and what does not."""
    if isinstance(link, Diagonal) and link.rising:
        return dots, None
    edges = link.edges(dots.index)
    ends = (edges.index < 0) | (edges.weight == 0)  # nothing passes: the output is a constant
    sign = dots.sign * signs(edges.weight).to(dots.sign.dtype)
    there = Dots(edges.index, dots.evidence, sign)
    if not bool(ends.any()):
        return there, None
    return there.pick(~ends), dots.pick(ends)


def _of_samples(value: Value, index: Tensor, evidence: Tensor, batch: int) -> Tensor:
    """The positive evidence of each sample [batch] among nodes [n]."""
    sample = torch.div(index, value.numel // batch, rounding_mode="floor")
    return evidence.new_zeros(batch).index_add_(0, sample, evidence.clamp(min=0))


def _dense(value: Value, index: Tensor, numbers: Tensor) -> Tensor:
    """Numbers [n] at the nodes [n], 0 elsewhere, in the shape of the value."""
    return numbers.new_zeros(value.numel).index_add_(0, index, numbers).reshape(value.shape)
