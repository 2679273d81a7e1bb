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
from math import prod

import torch
from torch import Tensor

from ..backtrack import Plan, multipliers, signs, spatial
from ..errors import InputError
from ..links import Convolution, Diagonal, Link, Selection
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
    nodes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes is not None and (not isinstance(self.nodes, int) or self.nodes < 1):
            raise InputError(
                f"nodes={self.nodes!r} is no number of nodes: give 1 or more, or None for all."
            )

    @torch.no_grad()
    def walk(self, plan: Plan, nodes: Tensor, trail: Trail | None = None) -> Walked:
        batch = len(nodes)
        waiting = self._head(plan, nodes, trail)
        maps = [item.evidence for value, item in waiting.items() if value.call is not None]
        found, lost = self._body(plan, waiting, batch, trail)
        total = lost + sum(_positive(item, batch) for item in found.values())
        walked = Walked.relative(found, total, trail)
        if self.focus:
            walked.strength = {value: item * _places(maps, item) for value, item in found.items()}
        if trail is not None:
            trail.evidence.update(walked.strength)
        return walked

    def _head(self, plan: Plan, nodes: Tensor, trail: Trail | None) -> dict[Value, _Arrived]:
        """Exact evidence at the last feature maps."""
        maps = _feature_maps(plan)
        reached = {}
        seed = _against_rivals(plan, nodes) if self.contrast else one_hot(plan, nodes)
        for value, multiplier in multipliers(plan, seed, until=maps.__contains__):
            evidence = multiplier * value.data
            if value in maps or value.call is None:
                reached[value] = _Arrived(evidence)
        if trail is not None:  # a path starts at the class, not at a rival that it speaks against
            alone = one_hot(plan, nodes)
            for value, multiplier in multipliers(plan, alone, until=maps.__contains__):
                trail.arrive(value, alone if value is plan.start else multiplier * value.data)
                step = None if value in maps else plan.step(value)
                for source, link in step.links if step is not None else ():
                    trail.cross(source, Crossing(value, link, multiplier))
        return reached

    def _body(
        self, plan: Plan, waiting: dict[Value, _Arrived], batch: int, trail: Trail | None
    ) -> tuple[dict[Value, Tensor], Tensor]:
        """From the feature maps to the inputs; and the positive evidence [batch] lost on the way."""
        lost = torch.zeros(batch, dtype=plan.start.data.dtype, device=plan.start.data.device)
        for value, step in plan.steps:
            if value not in waiting:
                continue
            arrived = waiting.pop(value)
            if self.nodes is not None:
                lost += _positive(arrived.keep(self.nodes, batch), batch)
            if trail is not None:
                trail.arrive(value, arrived.evidence)
            sent, ended = _hand_on(value, step, arrived, trail)
            lost += _positive(ended, batch)
            for source, part in sent:
                part.evidence = part.evidence.to(source.data.dtype)
                waiting[source] = waiting[source].plus(part) if source in waiting else part
        return {value: arrived.evidence for value, arrived in waiting.items()}, lost


def _places(maps: list[Tensor], like: Tensor) -> Tensor:
    """[batch, 1, ...], 0..1: the evidence of each place of the feature maps, at the size of `like`.

    Maps with other axes than `like` (a spectrum made of a wave) have no place in it.
    """
    maps = [evidence for evidence in maps if evidence.dim() == like.dim()]
    if not maps:
        return torch.ones_like(like[:, :1])
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[like.dim()]
    weight = torch.zeros_like(like[:, :1])
    for evidence in maps:
        place = evidence.sum(1, keepdim=True).clamp(min=0)
        weight += torch.nn.functional.interpolate(place, size=like.shape[2:], mode=mode)
    most = per_sample(weight, len(like)).max(1).values.reshape(-1, *[1] * (like.dim() - 1))
    return weight / most.clamp(min=torch.finfo(weight.dtype).tiny)


def _positive(evidence: Tensor | None, batch: int) -> Tensor | float:
    """[batch]: the positive evidence of each sample."""
    return 0.0 if evidence is None else per_sample(evidence.clamp(min=0), batch).sum(1)


def _against_rivals(plan: Plan, nodes: Tensor) -> Tensor:
    """1 at the class, minus its rivals and the mean of all classes, which weigh 1 together.

    Rivals weigh in by their probability, and together half. They weigh less against a class that
    they beat, so that something is left to see of it: half of its lead over the mean at least.
    """
    scores = plan.start.data
    seed = one_hot(plan, nodes)
    if not plan.exclusive or scores.dim() != 2 or scores.shape[1] < 2:
        return seed
    rivals = scores.masked_fill(seed > 0, -torch.inf).softmax(1)
    mean = scores.mean(1)
    lead, best = (scores * seed).sum(1) - mean, (scores * rivals).sum(1) - mean
    weight = torch.where(best > 0, (lead / best).clamp(0, 1), 1)[:, None] / 2
    return seed - weight * rivals - (1 - weight) / scores.shape[1]


def _feature_maps(plan: Plan) -> set[Value]:
    """The values with places in them that a convolution made, through one-to-one calls only.

    Where one place is all that is left, a convolution is a fully connected layer.
    """
    made: set[Value] = set()
    for value, step in reversed(plan.steps):
        for source, link in step.links:
            if source in made if link.one_to_one else isinstance(link, Convolution):
                made.add(value)
    return {value for value in made & spatial(plan) if prod(value.shape[2:]) > 1}


@dataclass
class _Arrived:
    """Evidence at a value, and which way each node is asked: +1 what made it large, -1 what small.

    No orientation means the sign of the activation itself.
    """

    evidence: Tensor
    orientation: Tensor | None = None

    def plus(self, other: _Arrived) -> _Arrived:
        """Where paths meet; their orientations agree with the activation's sign or cease to count."""
        return _Arrived(self.evidence + other.evidence)

    def keep(self, count: int, batch: int) -> Tensor | None:
        """Drop all but the `count` nodes of each sample with the most evidence; return the rest."""
        rows = per_sample(self.evidence, batch)
        if rows.shape[1] <= count:
            return None
        order = rows.abs().sort(dim=1, descending=True, stable=True).indices[:, count:]
        kept = rows.scatter(1, order, 0)
        self.evidence = kept.reshape(self.evidence.shape)
        return rows - kept


def _hand_on(
    value: Value, step: Step, arrived: _Arrived, trail: Trail | None
) -> tuple[list[tuple[Value, _Arrived]], Tensor | None]:
    """The evidence of a value's inputs, given its own; and what ended here, at a constant."""
    if not step.links:
        return [], arrived.evidence
    if len(step.links) == 1 and step.links[0][1].one_to_one:
        source, link = step.links[0]
        if trail is not None:
            trail.cross(source, Crossing(value, link, arrived.evidence, moved=True))
        ended = None
        if isinstance(link, Selection):
            ended = arrived.evidence.reshape(-1).masked_fill(link.index >= 0, 0)
            ended = ended.reshape(value.shape)
        return [(source, _move(value, link, arrived))], ended
    return _excite(value, step, arrived, trail)


def _move(value: Value, link: Link, arrived: _Arrived) -> _Arrived:
    """Through a call with one input for each output: all the evidence goes there."""
    orientation = arrived.orientation
    if isinstance(link, Selection):
        spread = Selection(link.in_shape, link.out_shape, link.index).transposed()
        evidence = spread.forward(arrived.evidence)
        if orientation is None and link.weight is None:
            return _Arrived(evidence)
        orientation = signs(value.data) if orientation is None else orientation
        if link.weight is not None:
            orientation = orientation * signs(link.weight).reshape(value.shape)
        # Where one element went to several places, those with more evidence have more to say.
        return _Arrived(evidence, signs(spread.forward(orientation * arrived.evidence.abs())))
    assert isinstance(link, Diagonal)
    if link.weight is not None:
        orientation = signs(value.data) if orientation is None else orientation
        orientation = orientation.reshape(link.in_shape) * signs(link.weight)
    elif orientation is not None:
        orientation = orientation.reshape(link.in_shape)
    return _Arrived(arrived.evidence.reshape(link.in_shape), orientation)


def _excite(
    value: Value, step: Step, arrived: _Arrived, trail: Trail | None
) -> tuple[list[tuple[Value, _Arrived]], Tensor]:
    """e[i] = sum over j of e[j] · (o[j] w[j, i] a[i])⁺ / z[j], z[j] being the sum over all i."""
    evidence = arrived.evidence
    orientation = signs(value.data) if arrived.orientation is None else arrived.orientation
    shares = [torch.zeros_like(source.data) for source, _ in step.links]
    rates = torch.zeros_like(evidence)
    for sign in (1.0, -1.0):
        asked = torch.where(orientation == sign, evidence, 0)
        if sign < 0 and not bool((asked != 0).any()):
            continue
        parts = [_parts(source, link, sign) for source, link in step.links]
        z = sum(sign * part.forward(half) for pairs in parts for part, half in pairs)
        if not isinstance(z, Tensor):
            continue  # nothing can excite it
        limits = torch.finfo(z.dtype)
        # Below these z is rounding, and evidence divided by it would overflow.
        sound = (z > limits.tiny / limits.eps) & (asked.abs() < z * (limits.max / 1024))
        rate = torch.where(sound, asked / z, 0)
        rates += rate
        for share, pairs in zip(shares, parts, strict=True):
            for part, half in pairs:
                share.add_(sign * half * part.transposed().forward(rate))
    if trail is not None:
        for source, link in step.links:
            trail.cross(source, Crossing(value, link, rates, orientation))
    sent = [
        (source, _Arrived(share)) for (source, _), share in zip(step.links, shares, strict=True)
    ]
    return sent, evidence.masked_fill(rates != 0, 0)


def _parts(source: Value, link: Link, sign: float) -> list[tuple[Link, Tensor]]:
    """The weights and activations whose products have the sign: same signs make +, others make -."""
    above, below = source.data.clamp(min=0), source.data.clamp(max=0)
    pairs = [(link.positive(), above), (link.negative(), below)]
    if sign < 0:
        pairs = [(link.positive(), below), (link.negative(), above)]
    return [(part, half) for part, half in pairs if part is not None and bool((half != 0).any())]
