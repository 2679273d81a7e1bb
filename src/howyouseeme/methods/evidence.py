"""The default: exact in the head, excitation below it, and a look from both ends.

1. *Head.* From the class back to the last feature map all calls are taken as one linear map and
   decided at once, with signs. The class stands against its rivals: half of their average, weighted
   by probability, and half of the plain average of all classes are subtracted (less of the former for
   a class that they beat). The result is the evidence of each node of the last feature map, for or
   against.
2. *Body.* Each node hands its evidence to the inputs that made it what it is, in proportion to their
   contribution: the positive ones to a node that is positive, the negative ones to one that is
   negative (excitation backprop, Zhang et al. 2016; LRP's z-plus rule, Bach et al. 2015). Batch norm
   and activations pass it on, a negative scale turning *most* into *least*. Evidence that meets in a
   node adds up, with its sign.
3. *Focus.* What single nodes lose, places keep: the evidence of the last feature map, summed over
   channels, tells well where the class is, and coarsely; the pixels tell finely what there is to see,
   for this class and for others. A pixel's evidence is multiplied by that of its place (where that is
   positive, its maximum being 1, bilinear in between).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backtrack import Plan, multipliers, signs
from ..errors import InputError
from ..halftone import Dots, Heap, excite, heap_of, precision
from ..links import Convolution, Diagonal, Link
from ..places import layouts, onto_input, spatial
from ..rules import Step
from ..tape import Value
from .base import Crossing, Method, Trail, Walked, one_hot, per_sample

__all__ = ["Evidence"]


@dataclass(frozen=True)
class Evidence(Method):
    """Evidence by excitation below an exact head.

    Args:
        contrast: set the class against its rivals. Without it the question is 'what speaks for this
            class', with it 'why this class and not the others'.
        focus: weigh each pixel by the evidence of its place at the last feature map.
        nodes: keep only so many nodes at each value, those with the most evidence; None keeps all.
    """

    contrast: bool = True
    focus: bool = True
    nodes: int | None = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes is not None and (not isinstance(self.nodes, int) or self.nodes < 1):
            raise InputError(
                f"nodes={self.nodes!r} is no number of nodes: give 1 or more, or None for all."
            )

    @torch.no_grad()
    def walk(self, plan: Plan, nodes: Tensor, trail: Trail | None = None) -> Walked:
        batch = len(nodes)
        maps = self._head(plan, nodes, trail)
        found, lost = self._body(plan, maps, batch, trail)
        total = lost + sum(_positive(item, batch) for item in found.values())
        walked = Walked.relative(found, total, trail)
        if self.focus:
            maps = {value: item for value, item in maps.items() if value.call is not None}
            walked.strength = {
                value: item * _places(plan, maps, value) for value, item in found.items()
            }
        if trail is not None:
            trail.evidence.update(walked.strength)
        return walked

    def _head(self, plan: Plan, nodes: Tensor, trail: Trail | None) -> dict[Value, Tensor]:
        """Exact evidence at the last feature maps, and at inputs that are reached without one."""
        maps = _feature_maps(plan)
        reached = {}
        seed = _against_rivals(plan, nodes) if self.contrast else one_hot(plan, nodes)
        for value, multiplier in multipliers(plan, seed, until=maps.__contains__):
            if value in maps or value.call is None:
                reached[value] = multiplier * value.data
        if trail is not None:  # a path starts at the class, not at a rival that it speaks against
            alone = one_hot(plan, nodes)
            for value, multiplier in multipliers(plan, alone, until=maps.__contains__):
                trail.arrive(value, alone if value is plan.start else multiplier * value.data)
                step = None if value in maps else plan.step(value)
                for source, link in step.links if step is not None else ():
                    trail.cross(source, Crossing(value, link, multiplier))
        return reached

    def _body(
        self, plan: Plan, maps: dict[Value, Tensor], batch: int, trail: Trail | None
    ) -> tuple[dict[Value, Tensor], Tensor]:
        """From the feature maps to the inputs; and the positive evidence [batch] lost on the way."""
        heaps: dict[Value, Heap] = {}
        moved: dict[Value, list[Dots]] = {}  # arrived through calls with one input for each output
        for value, evidence in maps.items():
            index = evidence.reshape(-1).nonzero()[:, 0]
            heap_of(value, heaps, batch).add(index, evidence.reshape(-1)[index])
        lost = torch.zeros(batch, dtype=precision(plan.start), device=plan.start.data.device)
        spreading = _spreading(plan)
        for layer, (value, step) in enumerate(plan.steps):
            dots = _arrived(value, heaps, moved, batch, self.nodes if value in spreading else None, layer)
            if dots is None:
                continue
            if trail is not None:
                trail.arrive(value, _dense(value, dots.index, dots.evidence))
            lost += _hand_on(value, step, dots, heaps, moved, batch, trail)
        found = {}
        for value in plan.inputs:
            for dots in moved.pop(value, ()):
                heap_of(value, heaps, batch).add(dots.index, dots.evidence)
            if value in heaps:
                found[value] = heaps[value].dense()
        return found, lost


def _places(plan: Plan, maps: dict[Value, Tensor], source: Value) -> Tensor:
    """[batch, 1, ...], 0..1: the evidence of each place of the feature maps, drawn over an input.

    Where they lie is told by `layouts`; ones if there is none whose places are known.
    """
    if source.data.dim() < 3:
        return source.data.new_ones(())
    weight, drawn = torch.zeros_like(source.data[:, :1]), False
    known = layouts(plan, source)
    for value, evidence in maps.items():
        if len(evidence) != len(weight):  # views of an image, one after the other
            continue
        layout = known.get(value, {})
        mixed = [axis for axis in range(1, evidence.dim()) if axis not in layout]
        place = evidence.sum(mixed).clamp(min=0) if mixed else evidence.clamp(min=0)
        over = onto_input(place, layout, source.shape[2:])
        if over is not None:
            weight += over[:, None]
            drawn = True
    if not drawn:
        return torch.ones_like(weight)
    most = per_sample(weight, len(weight)).max(1).values.reshape(-1, *[1] * (weight.dim() - 1))
    return weight / most.clamp(min=torch.finfo(weight.dtype).tiny)


def _positive(evidence: Tensor | None, batch: int) -> Tensor | float:
    """[batch]: the positive evidence of each sample."""
    return 0.0 if evidence is None else per_sample(evidence.clamp(min=0), batch).sum(1)


def _against_rivals(plan: Plan, nodes: Tensor) -> Tensor:
    """1 at the class, minus its rivals and the mean of all classes, which weigh 1 together.

    Rivals weigh in by their probability, and together half. They weigh less against a class that
    they beat, so that something is left to see of it: half of its lead over the mean at least.
    """
    scores, seed = plan.start.data, one_hot(plan, nodes)
    if scores.dim() == 1 and len(nodes) == 1:  # without the batch
        scores, seed = scores[None], seed[None]
    table = scores.dim() > 1 and scores.numel() == scores.shape[0] * scores.shape[1]
    if not plan.exclusive or not table or scores.shape[1] < 2:
        return seed.reshape(plan.start.shape)
    rivals = scores.masked_fill(seed > 0, -torch.inf).softmax(1)
    mean = scores.mean(1, keepdim=True)
    lead, best = ((scores * one).sum(1, keepdim=True) - mean for one in (seed, rivals))
    weight = torch.where(best > 0, (lead / best).clamp(0, 1), 1) / 2
    contrast = seed - weight * rivals - (1 - weight) / scores.shape[1]
    return contrast.reshape(plan.start.shape)


def _feature_maps(plan: Plan) -> set[Value]:
    """The values with places in them that a convolution made, through one-to-one calls only.

    Where one place is all that is left, a convolution is a fully connected layer. And where the start is
    such a map itself (a detector's scores, a neuron), the evidence there would be but the score: the head
    takes one convolution more.
    """
    weighed: set[Value] = set()
    for value, step in plan.steps:
        for source, link in step.links:
            if value in weighed or not link.one_to_one:
                weighed.add(source)
    made: set[Value] = set()
    for value, step in reversed(plan.steps):
        for source, link in step.links:
            if source in made if link.one_to_one else isinstance(link, Convolution):
                made.add(value)
    axes = spatial(plan)
    return {
        value
        for value in made & weighed & axes.keys()
        if value.numel > value.shape[0] * value.shape[axes[value]]
    }


def _spreading(plan: Plan) -> set[Value]:
    """The values behind which, on the way to the inputs, some call has several inputs for an output."""
    found: set[Value] = set()
    for value, step in reversed(plan.steps):
        moves = len(step.links) == 1 and step.links[0][1].one_to_one
        if step.links and (not moves or step.links[0][0] in found):
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
    if len(step.links) == 1 and step.links[0][1].one_to_one:
        source, link = step.links[0]
        if trail is not None:
            rate = _dense(value, dots.index, dots.evidence)
            trail.cross(source, Crossing(value, link, rate, moved=True))
        there, ended = _move(link, dots)
        moved.setdefault(source, []).append(there)
        if ended is None:
            return 0.0
        return _of_samples(value, dots.index[ended], dots.evidence[ended], batch)
    rates, lost = excite(value, step.links, dots, heaps, batch)
    if trail is not None:
        rate, sign = (_dense(value, dots.index, item) for item in (rates, dots.sign))
        for source, link in step.links:
            trail.cross(source, Crossing(value, link, rate, sign))
    return lost


def _move(link: Link, dots: Dots) -> tuple[Dots, Tensor | None]:
    """Through a call with one input for each output: all the evidence goes there; and which ends here."""
    if isinstance(link, Diagonal) and link.rising:
        return dots, None
    edges = link.edges(dots.index)
    ends = (edges.index < 0) | (edges.weight == 0)  # nothing passes: the output is a constant
    sign = dots.sign * signs(edges.weight).to(dots.sign.dtype)
    there = Dots(edges.index, dots.evidence, sign)
    if not bool(ends.any()):
        return there, None
    return there.pick(~ends), ends


def _of_samples(value: Value, index: Tensor, evidence: Tensor, batch: int) -> Tensor:
    """The positive evidence of each sample [batch] among nodes [n]."""
    sample = torch.div(index, value.numel // batch, rounding_mode="floor")
    return evidence.new_zeros(batch).index_add_(0, sample, evidence.clamp(min=0))


def _dense(value: Value, index: Tensor, numbers: Tensor) -> Tensor:
    """Numbers [n] at the nodes [n], 0 elsewhere, in the shape of the value."""
    return numbers.new_zeros(value.numel).index_add_(0, index, numbers).reshape(value.shape)
