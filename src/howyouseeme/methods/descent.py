"""The body of `evidence` with a few nodes at a time: as much work as there are nodes, not as activations.

Below the feature maps evidence spreads to ever more nodes. Here no more than so many go on from each value
where paths meet, the halftone of all (see `howyouseeme.halftone`): on average what all of them would bring.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..backtrack import Plan
from ..halftone import Arrivals, Dots, ended, excite, move, precision
from ..rules import Step
from ..tape import Value
from .at_once import at_once
from .base import Crossing, Trail

__all__ = ["descend"]


def descend(
    plan: Plan, maps: dict[Value, Tensor], nodes: int | None, batch: int, trail: Trail | None = None
) -> tuple[dict[Value, Tensor], Tensor]:
    """From the evidence at feature maps to the inputs; and the positive evidence [batch] lost on the way.

    >>> found, lost = descend(plan, maps, nodes=2000, batch=1)

    About `nodes` nodes of each sample go on from each value, all where it is None. Where evidence overflows,
    none of it is a number.
    """
    if trail is not None:
        return _descend(plan, maps, nodes, batch, trail)
    values = list(maps)

    def walk(plan: Plan, evidence: Sequence[Tensor]) -> list[Tensor]:
        found, lost = _descend(plan, dict(zip(values, evidence, strict=True)), nodes, batch)
        return [lost, *found.values()]

    lost, *found = at_once(walk, plan, values, list(maps.values()), moved=False)
    return dict(zip(plan.inputs, found, strict=True)), lost


def _descend(
    plan: Plan, maps: dict[Value, Tensor], nodes: int | None, batch: int, trail: Trail | None = None
) -> tuple[dict[Value, Tensor], Tensor]:
    arrivals = Arrivals(batch, nodes)
    for value, evidence in maps.items():
        arrivals.start(value, evidence)
    lost = np.zeros(batch)

    def ends() -> Tensor:
        return torch.from_numpy(lost).to(plan.start.device, precision(plan.start))

    spreading = _spreading(plan)
    all_of_them = np.zeros(batch)
    for layer, (value, step) in enumerate(plan.steps):
        if value not in arrivals:
            continue
        if arrivals.overflow:
            return {value: torch.full_like(value.data, torch.nan) for value in plan.inputs}, ends()
        steps = arrivals.steps() if value in spreading else all_of_them
        dots = arrivals.take(value, steps, layer)
        if trail is not None:
            trail.arrive(value, _dense(value, dots.index, dots.evidence))
        if not step.links:
            lost += ended(value, dots, batch)
        elif step.moves:
            lost += _move_on(value, step, dots, arrivals, trail)
        else:
            thin = any(source in spreading for source, _ in step.links)
            lost += _excite(
                value, step, dots, arrivals, trail, steps if thin else all_of_them, layer
            )
    # Half precision is kept till here.
    return {value: arrivals.dense(value).to(value.dtype) for value in plan.inputs}, ends()


def _spreading(plan: Plan) -> set[Value]:
    """The values behind which, on the way to the inputs, some call has several inputs for an output."""
    found: set[Value] = set()
    for value, step in reversed(plan.steps):
        if step.links and (not step.moves or any(source in found for source, _ in step.links)):
            found.add(value)
    return found


def _move_on(
    value: Value, step: Step, dots: Dots, arrivals: Arrivals, trail: Trail | None
) -> np.ndarray | float:
    """Hand evidence on where each output has one input; returned is what ended [batch], at constants."""
    if trail is not None:
        rate = _dense(value, dots.index, dots.evidence)
        for source, link in step.links:
            trail.cross(source, Crossing(value, link, rate, moved=True))
    for source, link in step.links:
        there, rest = move(link, dots)
        if len(there) or len(step.links) == 1:
            arrivals.bring(source, there)
        if rest is None:
            return 0.0
        dots = rest
    return ended(value, dots, arrivals.batch)


def _excite(
    value: Value,
    step: Step,
    dots: Dots,
    arrivals: Arrivals,
    trail: Trail | None,
    steps: np.ndarray,
    layer: int,
) -> np.ndarray:
    """Hand evidence on to several inputs each; returned is what ended [batch], as nothing speaks for it."""
    rates = excite(step.links, dots, arrivals, steps, layer)
    if trail is not None:
        rate = _dense(value, dots.index, rates)
        sign = dots.sign.new_zeros(value.numel).index_copy_(0, dots.index, dots.sign)
        sign = sign.reshape(value.shape)
        for source, link in step.links:
            trail.cross(source, Crossing(value, link, rate, sign))
    return ended(value, dots, arrivals.batch, rates)


def _dense(value: Value, index: Tensor, numbers: Tensor) -> Tensor:
    """Numbers [n] at the nodes [n], added up, 0 elsewhere, in the shape of the value."""
    return numbers.new_zeros(value.numel).index_add_(0, index, numbers).reshape(value.shape)
