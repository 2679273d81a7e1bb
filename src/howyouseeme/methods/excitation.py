"""Excitation: a node hands its evidence to the inputs that made it what it is.

    e[i] = sum over j of e[j] · (o[j] w[j, i] a[i])⁺ / z[j],     z[j] = sum over i of (o[j] w[j, i] a[i])⁺

with o[j] = +1 where the question is what made node j large, and -1 where it is what made it small
(excitation backprop, Zhang et al. 2016; LRP's z-plus rule, Bach et al. 2015, with signs). One call at a
time: `Excitation.hand_on`. How the sums are made depends on what is there to add up:

- calls that move evidence (a max-pool, an activation) have one input for each output, which gets it all;
- where all terms lie at the same place (a sum of branches), they are shared out as they are;
- products of one sign are one call forward and one back, with the weights and activations of that sign;
- products of both signs are made of what the call itself has summed: (o w a)⁺ is half of o w a + |w a|.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backtrack import signs
from ..halftone import limits
from ..links import Convolution, Diagonal, Link, Matrix, Moves
from ..rounding import rounds, unrounded
from ..rules import Step
from ..tape import Value, at_hand
from .base import Crossing, Trail

__all__ = ["Arrived", "Excitation", "Sent"]

#: Links that add up: what they give is in memory of its own, while others may give what they got.
_SUMS = Convolution | Matrix

#: Nodes of no more inputs that are all asked alike are summed up for each sign: their sums take less
#: time than the calls that make the difference of both.
_FEW_INPUTS = 96

#: Numbers further apart than this, at 1, are of half precision.
_COARSE = 1e-5

#: What goes to each input of a call; and the evidence that ended there, if any did.
Sent = tuple[list[tuple[Value, "Arrived"]], Tensor | None]


@dataclass
class Arrived:
    """Evidence at a value, and which way each node is asked: +1 what made it large, -1 what small.

    No orientation means the sign of the activation itself; that is +1 wherever there is evidence if
    `above` says so. 1.0 stands for +1 at all nodes.
    """

    evidence: Tensor
    orientation: Tensor | float | None = None
    above: bool = False

    def plus(self, other: Arrived) -> Arrived:
        """Where paths meet; their orientations agree with the activation's sign or cease to count."""
        return Arrived(self.evidence + other.evidence, above=self.above and other.above)

    def asked(self, value: Value) -> Tensor | float:
        """The orientation of each node, or 1.0 for all."""
        if self.orientation is not None:
            return self.orientation
        return 1.0 if self.above or not value.signed else signs(value.data)


class _Sums(NamedTuple):
    """What a call with products of both signs adds up, whatever is asked of it."""

    magnitude: Convolution | Matrix
    size: Tensor  # |a|
    plain: Tensor  # sum of w a
    whole: Tensor  # sum of |w a|
    least: Tensor  # below it, twice z is rounding


@dataclass(frozen=True)
class Excitation:
    """What a walk needs to know to hand evidence on.

    - `most`: the absolute evidence at the feature maps: no node below them can get more;
    - `trail`: told of what crosses each link, if there is one;
    - `shared`: what walks from several nodes keep for each other, if there are several (see `Plan`).
    """

    most: Tensor
    trail: Trail | None = None
    shared: dict[Any, Any] | None = None
    _small: dict[torch.dtype, bool] = field(default_factory=dict)

    def hand_on(self, value: Value, step: Step, arrived: Arrived) -> Sent:
        """The evidence of a value's inputs, given its own; and what ended here, at a constant."""
        if not step.links:
            return [], arrived.evidence
        if step.moves:
            return self._move(value, step, arrived)
        orientation = arrived.asked(value)
        if all(isinstance(link, Diagonal) for _, link in step.links):
            return self._share_out(value, step, arrived.evidence, orientation)
        # One sign a channel, as batch norm leaves it.
        one_each = (1, *value.shape[1:2], *[1] * (len(value.shape) - 2))
        each = isinstance(orientation, Tensor) and orientation.numel() > 1
        by_channel = isinstance(orientation, Tensor) and orientation.shape == one_each
        mixed = _mixed(step, both=each and not by_channel)
        if mixed is not None:
            return self._excite_both(value, step, arrived.evidence, orientation, mixed)
        return self._excite(value, step, arrived.evidence, orientation, by_channel)

    def _move(self, value: Value, step: Step, arrived: Arrived) -> Sent:
        """Through a call with one input for each output, or none."""
        if self.trail is not None:
            for source, link in step.links:
                self.trail.cross(source, Crossing(value, link, arrived.evidence, moved=True))
        if len(step.links) > 1:  # each takes a part of the places
            return _distribute(value, step, arrived)
        source, link = step.links[0]
        ended = link.ended(arrived.evidence) if isinstance(link, Moves) else None
        if isinstance(link, Moves) and link.weight is not None:
            # 0 where the output is the bias.
            passes = link.weight.sign().abs_().reshape(value.shape)
            if not at_hand(passes) or (passes.numel() and not bool(passes.amin())):
                kept = arrived.evidence * passes
                ended = arrived.evidence - kept + link.ended(kept)
                arrived = replace(arrived, evidence=kept)
        if isinstance(link, Diagonal) and not link.rising:
            assert link.weight is not None
            passes = link.weight.sign().abs_()
            if not at_hand(passes) or (passes.numel() and not bool(passes.amin())):
                whole = link.back(arrived.evidence)
                kept = whole * passes
                ended = whole - kept
                arrived = replace(arrived, evidence=kept)
        # What is added to an element that moves is a tensor; where it is what lies beside it, a function.
        shifted = (
            isinstance(step.bias, Tensor) if isinstance(link, Moves) else step.bias is not None
        )
        return [(source, _moved(value, link, arrived, shifted))], ended

    def _share_out(
        self, value: Value, step: Step, evidence: Tensor, orientation: Tensor | float
    ) -> Sent:
        """Through a call whose terms all lie at the place of the output, as in a sum of branches."""
        turned = isinstance(orientation, Tensor)
        parts: list[Tensor] = []
        for source, link in step.links:
            part = link.forward(source.data)
            parts.append((part * orientation if turned else part).clamp(min=0))
        z = sum(parts[1:], start=parts[0])  # of two or more: one alone moves
        rates, ended = _rates(evidence, z, self._lowest(evidence), spare=True)
        sent = []
        for (source, link), part in zip(step.links, parts, strict=True):
            assert isinstance(link, Diagonal)
            above = not source.signed or (link.rising and not turned)
            sent.append((source, Arrived(link.back(part * rates), above=above)))
            if self.trail is not None:
                asked = _each(orientation, value)
                self.trail.cross(source, Crossing(value, link, rates, asked))
        return sent, ended

    def _excite(
        self,
        value: Value,
        step: Step,
        evidence: Tensor,
        orientation: Tensor | float,
        by_channel: bool,
    ) -> Sent:
        """Sign by sign, each with the weights and activations that make it."""
        links, asking = step.links, orientation
        turns: tuple[bool, ...] = ()
        if isinstance(asking, Tensor) and by_channel:  # turn the filters around, and walk once
            turned = [link.turned(asking) for _, link in links if isinstance(link, Convolution)]
            if len(turned) == len(links):
                links = [(source, link) for (source, _), link in zip(links, turned, strict=True)]
                if self.shared is not None:
                    turns = tuple((asking < 0).flatten().tolist())
                asking = 1.0
        made = all(isinstance(link, _SUMS) for _, link in links)
        shares: list[Tensor | None] = [None] * len(links)
        above = [True] * len(links)
        rates: Tensor | None = None
        ended: Tensor | None = None
        for sign, asked in _by_sign(evidence, asking):
            parts, z = self._exciting(links, sign, made, (value, sign, turns))
            if z is None:  # nothing can excite it
                ended = asked if ended is None else ended + asked
                continue
            z, spare = (z, made and self.shared is None) if sign > 0 else (-z, True)
            rate, gone = _rates(asked, z, self._lowest(asked), spare)
            rates = rate if rates is None else rates + rate
            if gone is not None:
                ended = gone if ended is None else ended + gone
            for i, pairs in enumerate(parts):
                for part, half, is_above in pairs:
                    share = part.transposed().forward(rate if sign > 0 else -rate)
                    share = share.mul_(half) if made else share * half
                    above[i] &= is_above
                    shares[i] = _plus(shares[i], share, made)
        if self.trail is not None:
            flow = torch.zeros_like(evidence) if rates is None else rates
            for source, link in step.links:
                asked = _each(orientation, value)
                self.trail.cross(source, Crossing(value, link, flow, asked))
        sent = [
            (source, Arrived(_nothing(link, evidence) if share is None else share, above=only))
            for (source, link), share, only in zip(step.links, shares, above, strict=True)
        ]
        return sent, ended

    def _exciting(
        self, links: Sequence[tuple[Value, Link]], sign: float, made: bool, key: Any
    ) -> tuple[list[list[tuple[Link, Tensor, bool]]], Tensor | None]:
        """What excites each node, part by part, and all of it, z: the same for every class."""
        if self.shared is not None and key in self.shared:
            parts, z = self.shared[key]
            return parts, z
        parts, z = [_parts(source, link, sign) for source, link in links], None
        for part, half, _ in chain(*parts):
            z = _plus(z, part.forward(half), made)
        if self.shared is not None:
            self.shared[key] = parts, z
        return parts, z

    def _excite_both(
        self,
        value: Value,
        step: Step,
        evidence: Tensor,
        orientation: Tensor | float,
        link: Convolution | Matrix,
    ) -> Sent:
        """Where products have both signs, or are asked for both.

        (o w a)⁺ is half of o w a + |w a|, and the call itself has added up w a: one sum forward and two
        back take the place of up to four and four. Where the call was rounded, it is added up once more.
        """
        source = step.links[0][0]
        rounded = _rounded(link, source.data)
        with unrounded(rounded):
            magnitude, size, plain, whole, least = self._sums(value, step, link, rounded)
            # Fresh memory takes longer to get than to fill: what no other walk is to share is written over.
            same = (whole.shape, whole.dtype) == (evidence.shape, evidence.dtype)
            own = self.shared is None and same
            into = plain if own and plain is not value.data else None
            if isinstance(orientation, Tensor):
                z = torch.addcmul(whole, orientation, plain, out=into)
            else:
                z = torch.add(whole, plain, out=into)
            rates, ended = _rates(evidence, z, least, spare=True)  # half of e / z
            turned = rates
            if isinstance(orientation, Tensor):
                turned = torch.mul(orientation, rates, out=whole if own else None)
            share = link.transposed().forward(turned).mul_(source.data)
            share.addcmul_(magnitude.transposed().forward(rates), size)
        if self.trail is not None:
            asked = _each(orientation, value)
            self.trail.cross(source, Crossing(value, link, 2 * rates, asked))
        return [(source, Arrived(share, above=not source.signed))], ended

    def _sums(self, value: Value, step: Step, link: Convolution | Matrix, rounded: bool) -> _Sums:
        """The sums of all products and of their sizes: the same for every class."""
        source, key = step.links[0][0], (value, "both")
        if self.shared is not None and key in self.shared:
            known: _Sums = self.shared[key]
            return known
        magnitude, plain = link.magnitude(), value.data
        size = source.data.abs() if source.signed else source.data
        whole = magnitude.forward(size)
        rounding = 128 * torch.finfo(whole.dtype).eps
        floor = whole.new_full((), limits(whole.dtype)[0])
        if step.bias is not None:
            assert isinstance(step.bias, Tensor)
            floor = floor + step.bias.abs() * rounding
        if rounded or value.rounded:  # the call's own sum is too
            plain = link.forward(source.data)
        elif step.bias is not None:
            plain = plain - step.bias
        sums = _Sums(magnitude, size, plain, whole, torch.add(floor, whole, alpha=rounding))
        if self.shared is not None:
            self.shared[key] = sums
        return sums

    def _lowest(self, evidence: Tensor) -> float | Tensor:
        """Below this z is rounding, and evidence, of no more than `most` a node, divided by it would overflow."""
        least, largest = limits(evidence.dtype)
        if evidence.dtype not in self._small:
            self._small[evidence.dtype] = bool(self.most <= least * largest)
        if self._small[evidence.dtype] or not evidence.numel():
            return least
        highest = evidence.abs()
        if evidence.dim() > 1:  # of each sample, whatever others have
            highest = highest.amax(tuple(range(1, evidence.dim())), keepdim=True)
        return (highest / largest).clamp(min=least)


def _distribute(value: Value, step: Step, arrived: Arrived) -> Sent:
    """Through a call whose outputs come from one of several inputs each, such as cat."""
    rest: Tensor | None = arrived.evidence
    sent = []
    for source, link in step.links:
        sent.append((source, _moved(value, link, arrived)))
        if step.bias is not None and rest is not None and isinstance(link, Moves):
            rest = link.ended(rest)
    return sent, rest if step.bias is not None else None


def _moved(value: Value, link: Link, arrived: Arrived, shifted: bool = False) -> Arrived:
    """Through a call with one input for each output: all the evidence goes there.

    Asked is what made the output as it is, also where a constant that was added changed its sign.
    """
    orientation = arrived.orientation
    if isinstance(link, Moves):
        spread = link.unweighted().transposed()
        evidence = spread.forward(arrived.evidence)
        if orientation is None and link.weight is None and not shifted:
            return Arrived(evidence)
        orientation = arrived.asked(value)
        if link.weight is not None:
            orientation = orientation * signs(link.weight).reshape(value.shape)
        # Where one element went to several places, those with more evidence have more to say.
        return Arrived(evidence, signs(spread.forward(orientation * arrived.evidence.abs())))
    assert isinstance(link, Diagonal)
    if orientation is None and (shifted or not link.plain):
        orientation = arrived.asked(value)
    if isinstance(orientation, Tensor) and link.in_shape != link.out_shape:
        shape = torch.broadcast_shapes(orientation.shape, value.shape)
        orientation = link.back(orientation.expand(shape))
    if orientation is not None and not link.rising:
        assert link.weight is not None
        orientation = orientation * signs(link.weight)
    return Arrived(link.back(arrived.evidence), orientation)


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

    None too for few inputs, and where numbers are too coarse for the difference of nearly equal sums.
    """
    if len(step.links) > 1 or callable(step.bias):
        return None
    source, link = step.links[0]
    if not isinstance(link, _SUMS) or not (source.signed or both):
        return None
    if not both and link.fan_in() <= _FEW_INPUTS:
        return None
    coarse = torch.finfo(source.dtype).eps > _COARSE
    return None if coarse or rounds(source.data) is None else link


def _rounded(link: Convolution | Matrix, tensor: Tensor) -> bool:
    """Whether a GPU rounds the factors of a call, and can be told not to."""
    return isinstance(link, Convolution) and bool(rounds(tensor))


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
    # Infinity in their place (so what has overflowed counts as ended too), by calls that take a fraction
    # of the time of comparisons.
    if above is z:
        z = torch.threshold_(z, floor, torch.inf) if spare else torch.threshold(z, floor, torch.inf)
    else:
        z = torch.maximum(z, torch.threshold_(above, floor, torch.inf), out=above)
    ended = torch.ops.aten.threshold_backward(evidence, z, torch.finfo(z.dtype).max)
    return torch.div(evidence, z, out=z) if fits else evidence / z, ended


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
