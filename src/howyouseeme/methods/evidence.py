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
   positive, its maximum being 1, bilinear in between), unless the answer is that of a few places alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backtrack import Plan, multipliers
from ..errors import InputError
from ..links import Convolution, Diagonal
from ..places import layouts, onto_input, spatial
from ..tape import Value
from .base import Crossing, Method, Trail, Walked, one_hot, per_sample
from .descent import descend
from .excitation import Arrived, Excitation

__all__ = ["Evidence"]

#: Where fewer of the places have a say than this share, they are what was asked for, as with the cell of a
#: detector that found a box: they tell where that is, and not where in its sight the evidence lies.
_FEW = 0.25

#: Of all that speaks for an answer, what is left at least when what speaks against it is taken off.
_LEFT = 0.1

#: Calls that take the highest of many places.
_MAXIMA = {
    *("aten.amax", "aten.max", "aten.max_pool1d", "aten.max_pool2d_with_indices"),
    *("aten.max_pool3d_with_indices", "aten.adaptive_max_pool2d", "aten.adaptive_max_pool3d"),
}

#: Elements of the largest activation of a stack of walks: more take no less time each.
_STACK = 2**23

#: So many walks by a few nodes have their head as a stack: a network's last map may be large.
_HEADS = 8


@dataclass(frozen=True)
class Evidence(Method):
    """Evidence by excitation below an exact head.

    >>> Explainer(model, Evidence(nodes=2000))
    >>> Explainer(model, "evidence", nodes=2000)             # the same

    The formulas are in docs/method.md. The head is exact, as in `Exact`; the body is excitation backprop (Zhang
    et al. 2016, arXiv 1608.00507), or LRP's z-plus rule (Bach et al. 2015, doi:10.1371/journal.pone.0130140),
    with signed evidence. Evidence is in logits.

    Args:
        contrast: set the class against its rivals. Without it the question is 'what speaks for this
            class', with it 'why this class and not the others'.
        focus: weigh each pixel by the evidence of its place at the last feature map.
        likeness: weigh each pixel, in levels of saliency, by how far the network describes its place
            like those where the evidence is (`howyouseeme.likeness`).
        nodes: go on from about so many nodes at each value, the halftone of all, which takes less time
            and shows single pixels less finely (2000 is a good number); None goes on from all.

    Raises:
        InputError: `nodes` is no whole number from 1 on, or another parameter is neither True nor False.
    """

    contrast: bool = True
    focus: bool = True
    likeness: bool = True
    nodes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.nodes, int) and not isinstance(self.nodes, bool)
        if self.nodes is not None and not (number and self.nodes >= 1):
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
        if not plan.stacks:
            yield from super().walk_each(plan, targets)
            return
        values = [*plan.inputs, *(value for value, _ in plan.steps)]
        size = max(_STACK // max(value.numel for value in values), 1)
        if self.nodes is not None:
            size = _HEADS
        groups = [targets[i : i + size] for i in range(0, len(targets), size)]
        plan.expect(len(groups))
        for group in groups:
            seeds = torch.cat([one_hot(plan, nodes) for nodes in group])
            walked = self._walk(plan, seeds, len(group))
            yield from (walked.of(i) for i in range(len(group)))

    @torch.no_grad()
    def _walk(self, plan: Plan, alone: Tensor, batch: int, trail: Trail | None = None) -> Walked:
        """From the class of each sample, 1 in `alone` and all else 0; `batch` may be that of a stack."""
        waiting = self._head(plan, alone, batch, trail)
        maps = {value: item.evidence for value, item in waiting.items() if value.call is not None}
        if self.nodes is None:
            found, lost = self._body(plan, waiting, batch, trail)
        else:
            found, lost = self._descend(plan, waiting, batch, trail)
        found, total = _above_rounding(found, lost, batch)
        walked = Walked.relative(found, total)
        if self.focus:
            few = _few(plan, alone, maps)
            walked.strength = {
                value: item * _places(plan, maps, value, batch, few)
                for value, item in found.items()
            }
        if trail is not None:
            trail.evidence.update(walked.strength)
        return walked

    def _head(
        self, plan: Plan, alone: Tensor, batch: int, trail: Trail | None
    ) -> dict[Value, Arrived]:
        """Exact evidence at the last feature maps."""
        seed = _against_rivals(plan, alone) if self.contrast else alone
        maps = _feature_maps(plan)
        maps -= _scores_themselves(plan, seed, maps)
        reached = {}
        for value, multiplier in multipliers(plan, seed, until=maps.__contains__):
            if value in maps or value.call is None:
                # What counts for nothing may be infinite, as where a mask has put it.
                evidence = (multiplier * value.data).masked_fill_(multiplier == 0, 0)
                reached[value] = Arrived(evidence)
        if self.contrast and seed is alone:
            _leave_some([item for value, item in reached.items() if value in maps], batch)
        if trail is not None:  # a path starts at the class, not at a rival that it speaks against
            for value, multiplier in multipliers(plan, alone, until=maps.__contains__):
                trail.arrive(value, alone if value is plan.start else multiplier * value.data)
                step = None if value in maps else plan.step(value)
                for source, link in step.links if step is not None else ():
                    trail.cross(source, Crossing(value, link, multiplier))
        return reached

    def _descend(
        self, plan: Plan, waiting: dict[Value, Arrived], batch: int, trail: Trail | None
    ) -> tuple[dict[Value, Tensor], Tensor]:
        """The same as `_body` by a few nodes; each of a stack by itself."""
        evidence = {value: item.evidence for value, item in waiting.items()}
        if not plan.stacks or batch == 1:
            return descend(plan, evidence, self.nodes, batch, trail)
        each = [
            descend(
                plan, {value: item[i : i + 1] for value, item in evidence.items()}, self.nodes, 1
            )
            for i in range(batch)
        ]
        found = {value: torch.cat([one[value] for one, _ in each]) for value in each[0][0]}
        return found, torch.cat([lost for _, lost in each])

    def _body(
        self, plan: Plan, waiting: dict[Value, Arrived], batch: int, trail: Trail | None
    ) -> tuple[dict[Value, Tensor], Tensor]:
        """From the feature maps to the inputs; and the positive evidence [batch] lost on the way."""
        lost = torch.zeros(batch, dtype=plan.start.dtype, device=plan.start.device)
        most = lost.new_zeros(())
        for item in waiting.values():
            most = most + item.evidence.abs().sum()
        excitation = Excitation(most, trail, plan.shared)
        for value, step in plan.steps:
            arrived = waiting.pop(value, None)
            if arrived is None or not value.numel:  # no channels of a split, say
                continue
            if trail is not None:
                trail.arrive(value, arrived.evidence)
            sent, ended = excitation.hand_on(value, step, arrived)
            if ended is not None:
                lost += _positive(ended, batch)
            for source, part in sent:
                part.evidence = part.evidence.to(source.dtype)
                if isinstance(part.orientation, Tensor):
                    part.orientation = part.orientation.to(source.dtype)
                waiting[source] = waiting[source].plus(part) if source in waiting else part
            if plan.spends:
                value.drop()
        return {value: arrived.evidence for value, arrived in waiting.items()}, lost


def _places(
    plan: Plan, maps: dict[Value, Tensor], source: Value, batch: int, few: Tensor | None
) -> Tensor:
    """[batch, 1, ...], 0..1: the evidence of each place of the feature maps, drawn over an input.

    Where they lie is told by `layouts`; ones if there is none whose places are known, and for the samples
    that ask `few` of them [batch].
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
    each = (-1, *[1] * (weight.dim() - 1))
    most = per_sample(weight, len(weight)).max(1).values.reshape(each)
    weight = weight / most.clamp(min=torch.finfo(weight.dtype).tiny)
    if few is not None and len(few) == len(weight):  # and there are not several views of an image
        weight = weight.masked_fill(few.reshape(each), 1)
    return weight


def _few(plan: Plan, alone: Tensor, maps: dict[Value, Tensor]) -> Tensor | None:
    """[batch]: whether few of the places of the feature maps have a say in the answer; None if never.

    Whether they have, and not whether they make use of it in this image: gates count as open. Evidence lies
    only where there is a say, so that most answers are told by that alone, without another walk.
    """
    if len({len(item) for item in maps.values()}) != 1 or not bool(_narrow(maps, plan).any()):
        return None
    reached = {}
    for value, item in multipliers(plan, alone, until=maps.__contains__, gates=False):
        highest = value not in maps and value.call is not None and value.call.name in _MAXIMA
        if highest and item.dim() > 1 and int(item.flatten(1).count_nonzero(1).max()) > 1:
            return None  # a head of many maxima, each of which might have been anywhere
        if value in maps:
            reached[value] = item
    narrow = _narrow(reached, plan)
    return narrow if bool(narrow.any()) else None


def _narrow(maps: dict[Value, Tensor], plan: Plan) -> Tensor:
    """[batch]: whether what is there lies in less than the share `_FEW` of the places of maps that have any."""
    there, places = torch.zeros((), device="cpu"), torch.zeros((), device="cpu")
    axes = spatial(plan)
    for value, item in maps.items():
        axis = axes.get(value, 1)
        said = (item != 0).any(axis).reshape(len(item), -1)  # [batch, places]
        there = there.to(item.device) + said.sum(1)
        places = places.to(item.device) + said.any(1) * said.shape[1]
    return there < _FEW * places


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
    they beat, so that something is left to see of it: half of its lead over the mean at least. Classes
    that the network leaves out, at minus infinity, are none of all.
    """
    scores, seed = plan.start.data, alone
    if scores.dim() == 1 and int((seed > 0).sum()) == 1:  # without the batch
        scores, seed = scores[None], seed[None]
    table = scores.dim() > 1 and scores.numel() == scores.shape[0] * scores.shape[1]
    if not plan.exclusive or not table or scores.shape[1] < 2:
        return alone
    rivals = scores.masked_fill(seed > 0, -torch.inf).softmax(1)
    there = scores.isfinite()
    scores, count = scores.masked_fill(~there, 0), there.sum(1, keepdim=True)
    mean = scores.sum(1, keepdim=True) / count
    lead, best = ((scores * one).sum(1, keepdim=True) - mean for one in (seed, rivals))
    weight = torch.where(best > 0, (lead / best).clamp(0, 1), 1) / 2
    contrast = seed - weight * rivals - (1 - weight) / count * there
    return torch.where(count > 1, contrast, seed).reshape(alone.shape)


def _leave_some(maps: Sequence[Arrived], batch: int) -> None:
    """Let what speaks against an answer weigh less where it would leave nearly nothing of what speaks for it.

    Why this class and not that, where the network says that. Of a class among many `_against_rivals` sees to it.
    """
    if not maps:
        return
    parts = [per_sample(item.evidence, batch) for item in maps]
    most, less = (
        torch.stack([part.clamp(**side).sum(1) for part in parts]).sum(0)
        for side in ({"min": 0}, {"max": 0})
    )
    weight = ((_LEFT - 1) * most / torch.where(less < 0, less, -torch.inf)).clamp(max=1)
    weight = torch.where(less < 0, weight, 1)
    for item, part in zip(maps, parts, strict=True):
        weighed = torch.where(part < 0, part * weight[:, None], part)
        item.evidence = weighed.reshape(item.evidence.shape)


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
