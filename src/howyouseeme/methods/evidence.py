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

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..backtrack import Plan, multipliers, signs
from ..errors import InputError
from ..links import Convolution, Diagonal, Link, Matrix, Moves
from ..places import layouts, onto_input, spatial
from ..rules import Step
from ..tape import Value, at_hand
from .base import Crossing, Method, Trail, Walked, one_hot, per_sample
from .descent import descend

__all__ = ["Evidence"]

#: Elements of the largest activation of a stack of walks: more take no less time each.
_STACK = 2**23

#: Links that add up: what they give is in memory of its own.
_SUMS = Convolution | Matrix

#: Nodes of no more inputs are summed up for each sign: the difference of both takes more calls.
_FEW = 96

#: Numbers further apart than this, at 1, are of half precision.
_COARSE = 1e-5


@dataclass(frozen=True)
class Evidence(Method):
    """Evidence by excitation below an exact head.

    Args:
        contrast: set the class against its rivals. Without it the question is 'what speaks for this
            class', with it 'why this class and not the others'.
        focus: weigh each pixel by the evidence of its place at the last feature map.
        likeness: weigh each pixel, in levels of saliency, by how far the network describes its place
            like those where the evidence is (`howyouseeme.likeness`).
        nodes: go on from about so many nodes at each value, the halftone of all, which takes less time
            and shows single pixels less finely (2000 is a good number); None goes on from all.
    """

    contrast: bool = True
    focus: bool = True
    likeness: bool = True
    nodes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes is not None and (not isinstance(self.nodes, int) or self.nodes < 1):
            raise InputError(
                f"nodes={self.nodes!r} is no number of nodes: give 1 or more, or None for all."
            )

    @property
    def surroundings(self) -> float:
        """More where only some of the pixels are reached: the dots of a halftone want a look from afar."""
        return super().surroundings if self.nodes is None else 3.0

    def walk(self, plan: Plan, nodes: Tensor, trail: Trail | None = None) -> Walked:
        return self._walk(plan, one_hot(plan, nodes), len(nodes), trail)

    def walk_each(self, plan: Plan, targets: Sequence[Tensor]) -> Iterator[Walked]:
        if self.nodes is not None or not plan.stacks:
            yield from super().walk_each(plan, targets)
            return
        values = [*plan.inputs, *(value for value, _ in plan.steps)]
        size = max(_STACK // max(value.numel for value in values), 1)
        groups = [targets[i : i + size] for i in range(0, len(targets), size)]
        plan.shared = {} if len(groups) > 1 else None
        for group in groups:
            seeds = torch.cat([one_hot(plan, nodes) for nodes in group])
            walked = self._walk(plan, seeds, len(group))
            yield from (walked.of(i) for i in range(len(group)))

    @torch.no_grad()
    def _walk(self, plan: Plan, alone: Tensor, batch: int, trail: Trail | None = None) -> Walked:
        """From the class of each sample, 1 in `alone` and all else 0; `batch` may be that of a stack."""
        waiting = self._head(plan, alone, trail)
        maps = {value: item.evidence for value, item in waiting.items() if value.call is not None}
        if self.nodes is None:
            found, lost = self._body(plan, waiting, batch, trail)
        else:
            evidence = {value: item.evidence for value, item in waiting.items()}
            found, lost = descend(plan, evidence, self.nodes, batch, trail)
        found, total = _above_rounding(found, lost, batch)
        walked = Walked.relative(found, total, trail)
        if self.focus:
            walked.strength = {
                value: item * _places(plan, maps, value, batch) for value, item in found.items()
            }
        if trail is not None:
            trail.evidence.update(walked.strength)
        return walked

    def _head(self, plan: Plan, alone: Tensor, trail: Trail | None) -> dict[Value, _Arrived]:
        """Exact evidence at the last feature maps."""
        seed = _against_rivals(plan, alone) if self.contrast else alone
        maps = _feature_maps(plan)
        maps -= _scores_themselves(plan, seed, maps)
        reached = {}
        for value, multiplier in multipliers(plan, seed, until=maps.__contains__):
            if value in maps or value.call is None:
                # What counts for nothing may be infinite, as where a mask has put it.
                evidence = (multiplier * value.data).masked_fill_(multiplier == 0, 0)
                reached[value] = _Arrived(evidence)
        if trail is not None:  # a path starts at the class, not at a rival that it speaks against
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
        lost = torch.zeros(batch, dtype=plan.start.dtype, device=plan.start.device)
        most = sum(float(item.evidence.abs().sum()) for item in waiting.values())
        for value, step in plan.steps:
            arrived = waiting.pop(value, None)
            if arrived is None or not value.numel:  # no channels of a split, say
                continue
            if trail is not None:
                trail.arrive(value, arrived.evidence)
            sent, ended = _hand_on(value, step, arrived, most, trail, plan.shared)
            if ended is not None:
                lost += _positive(ended, batch)
            for source, part in sent:
                part.evidence = part.evidence.to(source.dtype)
                if isinstance(part.orientation, Tensor):
                    part.orientation = part.orientation.to(source.dtype)
                waiting[source] = waiting[source].plus(part) if source in waiting else part
        return {value: arrived.evidence for value, arrived in waiting.items()}, lost


def _places(plan: Plan, maps: dict[Value, Tensor], source: Value, batch: int) -> Tensor:
    """[batch, 1, ...], 0..1: the evidence of each place of the feature maps, drawn over an input.

    Where they lie is told by `layouts`; ones if there is none whose places are known.
    """
    if len(source.shape) < 3:
        return source.data.new_ones(())
    count = batch if plan.stacks else len(source.data)
    weight, drawn = source.data.new_zeros(count, 1, *source.shape[2:]), False
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


def _above_rounding(
    found: dict[Value, Tensor], lost: Tensor, batch: int
) -> tuple[dict[Value, Tensor], Tensor]:
    """The evidence at the inputs, and all that speaks for the answer [batch], found or lost.

    Less than what the strongest is rounded by is none.
    """
    exact = min(torch.finfo(lost.dtype).eps, torch.finfo(torch.float32).eps)
    least = torch.zeros_like(lost)
    for item in found.values():
        if item.numel():
            least = torch.maximum(least, 16 * exact * per_sample(item.abs(), batch).amax(1))
    least = least.nan_to_num(0, 0, 0)  # evidence that has overflowed stays what it is
    kept = {
        value: item.masked_fill(item.abs() <= least.reshape(-1, *[1] * (item.dim() - 1)), 0)
        for value, item in found.items()
    }
    total = lost + sum(_positive(item, batch) for item in kept.values())
    return kept, total.masked_fill(total <= least, 0)


def _positive(evidence: Tensor, batch: int) -> Tensor:
    """[batch]: the positive evidence of each sample."""
    return per_sample(evidence.clamp(min=0), batch).sum(1)


def _against_rivals(plan: Plan, alone: Tensor) -> Tensor:
    """1 at the class, where `alone` has it, minus its rivals and the mean of all classes, which weigh 1 together.

    Rivals weigh in by their probability, and together half. They weigh less against a class that
    they beat, so that something is left to see of it: half of its lead over the mean at least.
    """
    scores, seed = plan.start.data, alone
    if scores.dim() == 1 and int((seed > 0).sum()) == 1:  # without the batch
        scores, seed = scores[None], seed[None]
    table = scores.dim() > 1 and scores.numel() == scores.shape[0] * scores.shape[1]
    if not plan.exclusive or not table or scores.shape[1] < 2:
        return alone
    rivals = scores.masked_fill(seed > 0, -torch.inf).softmax(1)
    mean = scores.mean(1, keepdim=True)
    lead, best = ((scores * one).sum(1, keepdim=True) - mean for one in (seed, rivals))
    weight = torch.where(best > 0, (lead / best).clamp(0, 1), 1) / 2
    contrast = seed - weight * rivals - (1 - weight) / scores.shape[1]
    return contrast.reshape(alone.shape)


def _feature_maps(plan: Plan) -> set[Value]:
    """The values with places in them that a convolution made, through one-to-one calls only.

    Where one place is all that is left, a convolution is a fully connected layer. And where the start is
    such a map itself (a detector's scores, a neuron), the evidence there would be but the score: the head
    takes one convolution more. Where it is not known which places of the picture a map shows, it is one by
    its shape, [batch, channel, ...], as the convolution made it.
    """
    weighed: set[Value] = set()
    for value, step in plan.steps:
        for source, link in step.links:
            if value in weighed or not link.one_to_one:
                weighed.add(source)
    made: set[Value] = set()
    shaped: set[Value] = set()  # as a convolution shapes them
    for value, step in reversed(plan.steps):
        for source, link in step.links:
            if source in made if link.one_to_one else isinstance(link, Convolution):
                made.add(value)
                same = source in shaped and isinstance(link, Diagonal)
                if not link.one_to_one or (same and link.in_shape == link.out_shape):
                    shaped.add(value)
    axes = {value: 1 for value in shaped if len(value.shape) > 2} | spatial(plan)
    return {
        value
        for value in made & weighed & axes.keys()
        if value.numel > value.shape[0] * value.shape[axes[value]]
    }


def _scores_themselves(plan: Plan, seed: Tensor, maps: set[Value]) -> set[Value]:
    """Those maps of which no more than one node of each sample counts: a detector's scores, say.

    The evidence there would be but the score, and none if that is below zero.
    """
    if len(plan.start.shape) == 2 and plan.start.shape[1] > 1:
        return set()  # classes, which all have a say
    found: set[Value] = set()
    while True:
        kept = maps - found
        more = {
            value
            for value, multiplier in multipliers(plan, seed, until=kept.__contains__)
            if value in kept and int(multiplier.flatten(1).count_nonzero(1).max()) <= 1
        }
        if not more:
            return found
        found |= more


@dataclass
class _Arrived:
    """Evidence at a value, and which way each node is asked: +1 what made it large, -1 what small.

    No orientation means the sign of the activation itself; that is +1 wherever there is evidence if
    `above` says so. 1.0 stands for +1 at all nodes.
    """

    evidence: Tensor
    orientation: Tensor | float | None = None
    above: bool = False

    def plus(self, other: _Arrived) -> _Arrived:
        """Where paths meet; their orientations agree with the activation's sign or cease to count."""
        return _Arrived(self.evidence + other.evidence, above=self.above and other.above)

    def asked(self, value: Value) -> Tensor | float:
        """The orientation of each node, or 1.0 for all."""
        if self.orientation is not None:
            return self.orientation
        return 1.0 if self.above or not value.signed else signs(value.data)


def _hand_on(
    value: Value,
    step: Step,
    arrived: _Arrived,
    most: float,
    trail: Trail | None,
    shared: dict[Any, Any] | None,
) -> tuple[list[tuple[Value, _Arrived]], Tensor | None]:
    """The evidence of a value's inputs, given its own; and what ended here, at a constant.

    `most` is the absolute evidence at the feature maps: no node below them can get more.
    """
    if not step.links:
        return [], arrived.evidence
    if step.moves:
        if trail is not None:
            for source, link in step.links:
                trail.cross(source, Crossing(value, link, arrived.evidence, moved=True))
        if len(step.links) > 1:  # each takes a part of the places
            return _distribute(value, step, arrived)
        source, link = step.links[0]
        ended = link.ended(arrived.evidence) if isinstance(link, Moves) else None
        if isinstance(link, Diagonal) and not link.rising:
            assert link.weight is not None
            cut = link.weight == 0  # nothing passes here: the output is the bias
            if not at_hand(cut) or bool(cut.any()):
                whole = link.back(arrived.evidence)
                ended = whole * cut
                arrived = replace(arrived, evidence=whole - ended)
        return [(source, _move(value, link, arrived, step.bias is not None))], ended
    return _excite(value, step, arrived, most, trail, shared)


def _distribute(
    value: Value, step: Step, arrived: _Arrived
) -> tuple[list[tuple[Value, _Arrived]], Tensor | None]:
    """Through a call whose outputs come from one of several inputs each, such as cat."""
    rest: Tensor | None = arrived.evidence
    sent = []
    for source, link in step.links:
        sent.append((source, _move(value, link, arrived)))
        if step.bias is not None and rest is not None and isinstance(link, Moves):
            rest = link.ended(rest)
    return sent, rest if step.bias is not None else None


def _move(value: Value, link: Link, arrived: _Arrived, shifted: bool = False) -> _Arrived:
    """Through a call with one input for each output: all the evidence goes there.

    Asked is what made the output as it is, also where a constant that was added changed its sign.
    """
    orientation = arrived.orientation
    if isinstance(link, Moves):
        spread = link.unweighted().transposed()
        evidence = spread.forward(arrived.evidence)
        if orientation is None and link.weight is None:
            return _Arrived(evidence)
        orientation = arrived.asked(value)
        if link.weight is not None:
            orientation = orientation * signs(link.weight).reshape(value.shape)
        # Where one element went to several places, those with more evidence have more to say.
        return _Arrived(evidence, signs(spread.forward(orientation * arrived.evidence.abs())))
    assert isinstance(link, Diagonal)
    if orientation is None and (shifted or not link.plain):
        orientation = arrived.asked(value)
    if isinstance(orientation, Tensor) and link.in_shape != link.out_shape:
        shape = torch.broadcast_shapes(orientation.shape, value.shape)
        orientation = link.back(orientation.expand(shape))
    if orientation is not None and not link.rising:
        assert link.weight is not None
        orientation = orientation * signs(link.weight)
    return _Arrived(link.back(arrived.evidence), orientation)


def _excite(
    value: Value,
    step: Step,
    arrived: _Arrived,
    most: float,
    trail: Trail | None,
    shared: dict[Any, Any] | None,
) -> tuple[list[tuple[Value, _Arrived]], Tensor | None]:
    """e[i] = sum over j of e[j] · (o[j] w[j, i] a[i])⁺ / z[j], z[j] being the sum over all i."""
    evidence = arrived.evidence
    orientation = asking = arrived.asked(value)
    if all(isinstance(link, Diagonal) for _, link in step.links):
        return _excite_same_place(value, step, evidence, orientation, most, trail)
    # One sign a channel, as batch norm leaves it.
    one_each = (1, *value.shape[1:2], *[1] * (len(value.shape) - 2))
    by_channel = isinstance(asking, Tensor) and asking.shape == one_each
    mixed = _mixed(step, both=isinstance(asking, Tensor) and asking.numel() > 1 and not by_channel)
    if mixed is not None:
        source, link = step.links[0]
        rounded = bool(_rounded(mixed, source.data))
        with _unrounded(rounded):
            share, half_rates, gone = _excite_mixed(
                value, step, evidence, asking, mixed, shared, rounded
            )
        if trail is not None:
            trail.cross(source, Crossing(value, link, 2 * half_rates, _each(orientation, value)))
        return [(source, _Arrived(share, above=not source.signed))], gone
    links, turns = step.links, b""
    if isinstance(asking, Tensor) and by_channel:  # turn the filters around, and walk once
        turned = [link.turned(asking) for _, link in links if isinstance(link, Convolution)]
        if len(turned) == len(links):
            links = [(source, link) for (source, _), link in zip(links, turned, strict=True)]
            turns = b"" if shared is None else (asking < 0).cpu().numpy().tobytes()
            asking = 1.0
    shares: list[Tensor | None] = [None] * len(links)
    above = [True] * len(links)
    rates: Tensor | None = None
    ended: Tensor | None = None
    for sign, asked in _by_sign(evidence, asking):
        parts, z = _excitation(links, sign, shared, (value, sign, turns))
        if z is None:  # nothing can excite it
            ended = asked if ended is None else ended + asked
            continue
        # What other links give may be what they got.
        made = all(isinstance(link, _SUMS) for _, link in links)
        z, spare = (z, made and shared is None) if sign > 0 else (-z, True)
        rate, gone = _rates(asked, z, _lowest(asked, most), spare)
        rates = rate if rates is None else rates + rate
        if gone is not None:
            ended = gone if ended is None else ended + gone
        for i, pairs in enumerate(parts):
            for part, half, is_above in pairs:
                share = part.transposed().forward(rate if sign > 0 else -rate)
                share = share.mul_(half) if made else share * half
                above[i] &= is_above
                shares[i] = _plus(shares[i], share, made)
    if trail is not None:
        flow = torch.zeros_like(evidence) if rates is None else rates
        for source, link in step.links:
            trail.cross(source, Crossing(value, link, flow, _each(orientation, value)))
    sent = [
        (source, _Arrived(_nothing(link, evidence) if share is None else share, above=only))
        for (source, link), share, only in zip(step.links, shares, above, strict=True)
    ]
    return sent, ended


def _excite_same_place(
    value: Value,
    step: Step,
    evidence: Tensor,
    orientation: Tensor | float,
    most: float,
    trail: Trail | None,
) -> tuple[list[tuple[Value, _Arrived]], Tensor | None]:
    """`_excite` where each input has one node at the same place, as in a sum."""
    parts: list[Tensor] = []
    for source, link in step.links:
        part = link.forward(source.data)
        parts.append((part if _is_one(orientation) else part * orientation).clamp(min=0))
    z = sum(parts[1:], start=parts[0])
    rates, ended = _rates(evidence, z, _lowest(evidence, most), spare=len(parts) > 1)
    sent = []
    for (source, link), part in zip(step.links, parts, strict=True):
        assert isinstance(link, Diagonal)
        above = not source.signed or (_is_one(orientation) and link.rising)
        sent.append((source, _Arrived(link.back(part * rates), above=above)))
        if trail is not None:
            trail.cross(source, Crossing(value, link, rates, _each(orientation, value)))
    return sent, ended


def _is_one(orientation: Tensor | float) -> bool:
    return not isinstance(orientation, Tensor) and orientation == 1.0


def _nothing(link: Link, evidence: Tensor) -> Tensor:
    """No evidence at the input of a link, for as many samples as there are at its output."""
    return evidence.new_zeros(link.transposed().shape_of(evidence))


def _by_sign(evidence: Tensor, orientation: Tensor | float) -> Iterator[tuple[float, Tensor]]:
    """The signs that there are among orientations, or may be, each with the evidence of its nodes."""
    if not isinstance(orientation, Tensor):
        yield orientation, evidence
        return
    least, most = -1.0, 1.0
    if at_hand(orientation):
        least, most = (float(end) for end in orientation.aminmax())
    for sign in (1.0, -1.0):
        if least <= sign <= most:
            one = least == most
            yield sign, evidence if one else evidence * (sign * orientation).clamp(min=0)


def _each(orientation: Tensor | float, value: Value) -> Tensor:
    """The orientation of each node of a value."""
    if isinstance(orientation, Tensor):
        return orientation.to(value.data).expand(value.shape)
    return value.data.new_full((), orientation).expand(value.shape)


def _mixed(step: Step, both: bool) -> Convolution | Matrix | None:
    """The link of a call whose products have both signs, or are asked for both; None for others.

    None too where numbers are too coarse for the difference of nearly equal sums.
    """
    if len(step.links) > 1 or callable(step.bias):
        return None
    source, link = step.links[0]
    if not isinstance(link, _SUMS) or not (source.signed or both):
        return None
    if not both and link.fan_in() <= _FEW:
        return None
    coarse = torch.finfo(source.dtype).eps > _COARSE
    return None if coarse or _rounded(link, source.data) is None else link


_PRECISION = threading.Lock()
_unrounded_walks = 0  # how many there are now, which share the setting


def _rounded(link: Convolution | Matrix, tensor: Tensor) -> bool | None:
    """Whether a GPU rounds the factors of a call to TF32; None if there is no saying, or no helping it."""
    if not tensor.is_cuda or tensor.dtype != torch.float32:
        return False
    try:
        if torch.backends.cuda.matmul.allow_tf32:  # which is not to be set back and forth
            return None
        with _PRECISION:
            rounds = bool(_unrounded_walks) or torch.backends.cudnn.allow_tf32
        return isinstance(link, Convolution) and rounds
    except RuntimeError:  # settings that differ between kinds of calls
        return None


@contextmanager
def _unrounded(rounded: bool) -> Iterator[None]:
    """Convolutions in float32 proper, if they are `rounded`."""
    global _unrounded_walks  # noqa: PLW0603
    if not rounded:
        yield
        return
    with _PRECISION:
        if not _unrounded_walks:
            torch.backends.cudnn.allow_tf32 = False
        _unrounded_walks += 1
    try:
        yield
    finally:
        with _PRECISION:
            _unrounded_walks -= 1
            if not _unrounded_walks:
                torch.backends.cudnn.allow_tf32 = True


def _excite_mixed(
    value: Value,
    step: Step,
    evidence: Tensor,
    orientation: Tensor | float,
    link: Convolution | Matrix,
    shared: dict[Any, Any] | None,
    rounded: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`_excite` where products have both signs: the share of the input, half of e / z, what ended.

    (o w a)⁺ is half of o w a + |w a|, and the call itself has added up w a: one sum forward and two
    back take the place of up to four and four. Where the call was `rounded`, it is added up once more.
    """
    source, key = step.links[0][0], (value, "mixed")
    if shared is not None and key in shared:
        magnitude, size, plain, whole, least = shared[key]
    else:
        magnitude, plain = link.magnitude(), value.data
        size = source.data.abs() if source.signed else source.data
        whole = magnitude.forward(size)
        # Below these, twice z is rounding.
        limits = torch.finfo(whole.dtype)
        floor, rounding = whole.new_full((), limits.tiny / limits.eps), 128 * limits.eps
        if step.bias is not None:
            assert isinstance(step.bias, Tensor)
            floor = floor + step.bias.abs() * rounding
        if rounded:  # the call's own sum is too
            plain = link.forward(source.data)
        elif step.bias is not None:
            plain = plain - step.bias
        least = torch.add(floor, whole, alpha=rounding)
        if shared is not None:
            shared[key] = magnitude, size, plain, whole, least
    # Fresh memory takes longer to get than to fill: what no other walk is to share is written over.
    own = shared is None and whole.shape == evidence.shape
    fresh = shared is None and (rounded or step.bias is not None)
    into = plain if own and fresh else None
    if isinstance(orientation, Tensor):
        z = torch.addcmul(whole, orientation, plain, out=into)
    else:
        z = torch.add(whole, plain, out=into)
    rates, ended = _rates(evidence, z, least, spare=True)
    turned = rates
    if isinstance(orientation, Tensor):
        turned = torch.mul(orientation, rates, out=whole if own else None)
    share = link.transposed().forward(turned).mul_(source.data)
    share.addcmul_(magnitude.transposed().forward(rates), size)
    return share, rates, ended


def _lowest(evidence: Tensor, most: float) -> float | Tensor:
    """Below this z is rounding, and evidence, of no more than `most` a node, divided by it would overflow."""
    limits = torch.finfo(evidence.dtype)
    least = limits.tiny / limits.eps
    if most / (limits.max / 1024) <= least or not evidence.numel():
        return least
    highest = evidence.abs()
    if evidence.dim() > 1:  # of each sample, whatever others have
        highest = highest.amax(tuple(range(1, evidence.dim())), keepdim=True)
    return (highest / (limits.max / 1024)).clamp(min=least)


def _rates(
    evidence: Tensor, z: Tensor, least: Tensor | float, spare: bool = False
) -> tuple[Tensor, Tensor | None]:
    """e / z, or 0 where z is not above the least; and the evidence of these nodes, if there are any.

    The memory of z is used for them if it is to `spare`: fresh memory takes longer to get than to fill.
    """
    if not z.numel():
        return evidence / z, None
    fits = (z.shape, z.dtype) == (evidence.shape, evidence.dtype)
    above, floor = (z - least, 0.0) if isinstance(least, Tensor) else (z, least)
    # Masks cost time on a CPU: first see whether one is needed.
    if at_hand(z) and bool(above.amin() > floor):
        return torch.div(evidence, z, out=z) if spare and fits else evidence / z, None
    # Infinity in their place, by calls that take a fraction of the time of comparisons.
    if above is z:
        z = torch.threshold_(z, floor, torch.inf) if spare else torch.threshold(z, floor, torch.inf)
    else:
        z = torch.maximum(z, torch.threshold_(above, floor, torch.inf), out=above)
    ended = torch.ops.aten.threshold_backward(evidence, z, torch.finfo(z.dtype).max)
    return torch.div(evidence, z, out=z) if fits else evidence / z, ended


def _excitation(
    links: Sequence[tuple[Value, Link]], sign: float, shared: dict[Any, Any] | None, key: Any
) -> tuple[list[list[tuple[Link, Tensor, bool]]], Tensor | None]:
    """What excites each node, part by part, and all of it, z: the same for every class."""
    if shared is not None and key in shared:
        parts, z = shared[key]
        return parts, z
    parts = [_parts(source, link, sign) for source, link in links]
    made, z = all(isinstance(link, _SUMS) for _, link in links), None
    for part, half, _ in chain(*parts):
        z = _plus(z, part.forward(half), made)
    if shared is not None:
        shared[key] = parts, z
    return parts, z


def _plus(total: Tensor | None, more: Tensor, made: bool) -> Tensor:
    """Both together, in the memory of the total where it was `made` for it."""
    if total is None:
        return more
    return total.add_(more) if made else total + more


def _parts(source: Value, link: Link, sign: float) -> list[tuple[Link, Tensor, bool]]:
    """The weights and activations whose products have the sign: same signs make +, others make -.

    With them, whether these activations are those above zero.
    """
    pairs = [(link.positive if sign > 0 else link.negative, source.positive, True)]
    if source.signed:
        pairs.append((link.negative if sign > 0 else link.positive, source.negative, False))
    return [(part, half, above) for make, half, above in pairs if (part := make()) is not None]
