"""*How You See Me* as published: one node at a time, the strongest first.

R. Gandikota and D. Mishra, How You See Me, arXiv 1811.08152.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .. import crew
from ..backtrack import Plan, signs
from ..errors import InputError
from ..halftone import as_convolution, by_place, seen_by
from ..links import Convolution, Diagonal, Link, Matrix
from ..maps import inliers
from ..nodes import Nodes
from ..rules import Step
from ..tape import Value, at_hand
from .at_once import at_once
from .base import Crossing, Method, Trail, Walked

__all__ = ["Seed"]

Position = Literal["contribution", "activation"]

#: Edges looked at in one go; bounds the memory of a step to some 100 MB.
_CHUNK = 4_000_000


@dataclass(frozen=True)
class Seed(Method):
    """The published rules.

    >>> Explainer(model, Seed(k=10))
    >>> Explainer(model, "seed", k=10)                       # the same

    R. Gandikota and D. Mishra, How You See Me, arXiv 1811.08152. Evidence is counted in paths.

    - Fully connected layer: the `k` inputs that excite the node most (weight x activation, only
      those above zero).
    - Convolution: contributions (weight x activation) in the receptive field, summed over positions,
      give the strongest channel; in it, the strongest position.
    - Pooling: the maximum activation in the receptive field.
    - Pixels with too few others around them are dropped as outliers.

    What the paper leaves open is decided as follows. A branch (residual add, max of two) goes to the
    strongest summand; concatenation, reshaping and the like to where the value came from. Batch norm
    and activations stay in place. A negative scale or weight turns *strongest* into *weakest* from there on. A gate is not
    entered. A node that is reached twice counts twice. The lowest index wins every tie.

    Args:
        k: nodes taken at each fully connected layer.
        position: 'contribution' (weight x activation) or 'activation': what makes a position
            strongest inside the channel.
        outliers: drop points with at most 5 % of all points within 10 % of the image's diagonal.

    Raises:
        InputError: `k` is no whole number from 1 on, `position` is none of the two, or `outliers` is neither
            True nor False.
    """

    k: int = 20
    position: Position = "contribution"
    outliers: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.k, int) or self.k < 1:
            raise InputError(f"k={self.k!r} is no number of nodes: give 1 or more.")
        if self.position not in get_args(Position):
            raise InputError(
                f"position={self.position!r} is not known: {' or '.join(get_args(Position))}."
            )

    blur = 1 / 11

    def clean(self, evidence: Tensor) -> Tensor:
        """Drop outliers, if asked to."""
        return torch.stack([inliers(item) for item in evidence]) if self.outliers else evidence

    @torch.no_grad()
    def walk(self, plan: Plan, nodes: Tensor, trail: Trail | None = None) -> Walked:
        if trail is not None:
            return self._walk(plan, nodes, trail)

        def walk(plan: Plan, given: Sequence[Tensor]) -> list[Tensor]:
            walked = self._walk(plan, given[0])
            return [*walked.strength.values(), *walked.share.values()]

        found = at_once(walk, plan, [plan.start], [nodes], moved=True)
        strength, share = found[: len(plan.inputs)], found[len(plan.inputs) :]
        return Walked(
            dict(zip(plan.inputs, strength, strict=True)),
            dict(zip(plan.inputs, share, strict=True)),
        )

    def _walk(self, plan: Plan, nodes: Tensor, trail: Trail | None = None) -> Walked:
        waiting = {plan.start: [Nodes.start(nodes)]}
        for value, step in plan.steps:
            if value not in waiting:
                continue
            here = Nodes.merge(waiting.pop(value))
            if trail is not None:
                trail.arrive(value, here.dense(here.count, value.data))
            for source, sent in self._send(step, here):
                waiting.setdefault(source, []).append(sent.nodes)
                if trail is not None:
                    trail.cross(source, _Chosen(value, sent, here))
        strength, share = {}, {}
        for value in plan.inputs:
            empty = nodes.new_empty(0)
            here = Nodes.merge(waiting.get(value, [Nodes.start(empty)]))
            strength[value] = here.dense(here.count, value.data)
            share[value] = here.dense(here.share, value.data)
            if trail is not None:
                trail.arrive(value, strength[value])
        return Walked(strength, share)

    def _send(self, step: Step, here: Nodes) -> list[tuple[Value, _Sent]]:
        """Choose the inputs that each node goes back to."""
        source, link = step.links[0] if len(step.links) == 1 else (None, None)
        if source is not None and isinstance(link, Diagonal) and link.rising:  # stays in place
            child = torch.arange(len(here), device=here.index.device)
            return [(source, _Sent(child, torch.zeros_like(here.count), here))]
        options = [self._choose(source, link, here) for source, link in step.links]
        if len(options) > 1:  # branches: each offers one place at most, the strongest is taken
            options = _strongest_branch(options, len(here))
        return [
            (source, sent)
            for (source, _), sent in zip(step.links, options, strict=True)
            if len(sent.child)
        ]

    def _choose(self, source: Value, link: Link, here: Nodes) -> _Sent:
        if len(here) and at_hand(here.index):
            exact = {torch.float32, torch.float64}
            if isinstance(link, Matrix) and link.weight.dtype in exact and at_hand(link.weight):
                return self._choose_inputs(source, link, here)
            convolution = as_convolution(link) if isinstance(link, Convolution) else None
            if convolution is not None:
                return self._choose_node(source, convolution, here)
        if not source.numel:  # no channels of a split, say
            here = here.pick(slice(0))
        rows = max(_CHUNK // link.fan_in(), 1)
        return _Sent.join(
            [
                self._choose_some(
                    source, link, here, torch.arange(first, last, device=here.index.device)
                )
                for first in range(0, max(len(here), 1), rows)
                for last in [min(first + rows, len(here))]
            ]
        )

    def _choose_node(self, source: Value, link: Convolution, here: Nodes) -> _Sent:
        """The same for a convolution, by a kernel."""
        from .. import kernels  # noqa: PLC0415 - takes a while

        dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
        order = torch.from_numpy(by_place(link, here.index.numpy()))
        index, sign = here.index[order], here.sign[order].to(dtype)
        chosen = torch.empty_like(index)
        found, total, turns = (torch.zeros_like(sign) for _ in range(3))
        seen = (*seen_by(link, source, dtype), self.position == "activation")
        made = [item.numpy() for item in (index, sign, chosen, found, total, turns)]
        crew.run(
            lambda first, last: kernels.strongest(*seen, *(item[first:last] for item in made)),
            crew.shares(len(index), link.fan_in()),
        )
        kept = chosen >= 0
        child, chosen = order[kept], chosen[kept]
        contribution, all_, turn = (item[kept].double() for item in (found, total, turns))
        part = torch.where(all_ > 0, contribution.clamp(min=0) / all_, 0)
        nodes = Nodes(chosen, here.count[child], here.sign[child] * turn, here.share[child] * part)
        return _Sent(child, contribution, nodes)

    def _choose_inputs(self, source: Value, link: Matrix, here: Nodes) -> _Sent:
        """The same for a fully connected layer, by a kernel."""
        from .. import kernels  # noqa: PLC0415

        outputs, inputs = link.weight.shape
        sign, wide = here.sign.to(link.weight.dtype), (len(here), min(self.k, inputs))
        chosen, found, total = (
            torch.full(wide, -1, device="cpu"),
            sign.new_zeros(wide),
            torch.zeros_like(sign),
        )
        seen = (source.flat.reshape(-1, inputs).numpy(), link.weight.detach().numpy())
        made = [item.numpy() for item in (here.index, sign, chosen, found, total)]
        crew.run(
            lambda first, last: kernels.most_exciting(*seen, *(item[first:last] for item in made)),
            crew.shares(len(here), inputs),
        )
        child, rank = (chosen >= 0).nonzero(as_tuple=True)
        column, contribution = chosen[child, rank], found[child, rank].double()
        output = here.index[child]
        row = torch.div(output, outputs, rounding_mode="floor")
        nodes = Nodes(
            row * inputs + column,
            here.count[child],
            here.sign[child] * signs(link.weight[output % outputs, column]).double(),
            here.share[child] * contribution / total.double()[child],
        )
        return _Sent(child, contribution, nodes)

    def _choose_some(self, source: Value, link: Link, here: Nodes, some: Tensor) -> _Sent:
        edges = link.edges(here.index[some])
        flat = edges.index.flatten(1) if edges.index.dim() > 1 else edges.index[:, None]
        weight = edges.weight.reshape(flat.shape)
        hole = flat < 0
        activation = source.flat[flat.clamp(min=0)].masked_fill(hole, 0)
        asked = here.sign[some, None].to(activation.dtype)
        contribution = asked * weight * activation
        if edges.index.dim() == 3:
            criterion = activation if self.position == "activation" else contribution
            chosen = _strongest_place(contribution, criterion, hole, edges.index.shape)
        elif edges.index.dim() == 2:
            chosen = _top(contribution, self.k)
        else:
            chosen = torch.zeros_like(flat)
        taken = chosen >= 0
        row = torch.arange(len(some), device=some.device)[:, None].expand(chosen.shape)[taken]
        column = chosen[taken]
        kept = ~hole[row, column]
        row, column = row[kept], column[kept]
        found = contribution[row, column].double()
        all_ = contribution.clamp(min=0).sum(1)[row].double()
        part = torch.where(all_ > 0, found.clamp(min=0) / all_, 0)
        if edges.index.dim() == 1:
            part = torch.ones_like(part)
        child = some[row]
        nodes = Nodes(
            flat[row, column],
            here.count[child],
            here.sign[child] * signs(weight[row, column]).double(),
            here.share[child] * part,
        )
        return _Sent(child, found, nodes)


class _Sent(NamedTuple):
    """Nodes of a source, the position [n] in the child's nodes each comes from, its contribution."""

    child: Tensor
    contribution: Tensor
    nodes: Nodes

    def pick(self, which: Tensor) -> _Sent:
        return _Sent(self.child[which], self.contribution[which], self.nodes.pick(which))

    @staticmethod
    def join(parts: list[_Sent]) -> _Sent:
        return _Sent(
            torch.cat([part.child for part in parts]),
            torch.cat([part.contribution for part in parts]),
            Nodes.join([part.nodes for part in parts]),
        )


@dataclass(eq=False)
class _Chosen(Crossing):
    """Backpointers: which node of the child chose a node of the source, the most often reached first."""

    def __init__(self, child: Value, sent: _Sent, here: Nodes) -> None:
        self.child = child
        # By source node, then by falling count; the first of each run is the strongest.
        order = torch.argsort(-here.count[sent.child], stable=True)
        order = order[torch.argsort(sent.nodes.index[order], stable=True)]
        self._source = sent.nodes.index[order]
        self._from = here.index[sent.child[order]]
        self._flow = sent.nodes.count[order]

    def strongest(self, source: Value, nodes: Tensor) -> tuple[Tensor, Tensor]:
        at = torch.searchsorted(self._source, nodes).clamp(max=len(self._source) - 1)
        found = self._source[at] == nodes
        flow = self._flow[at].masked_fill(~found, -torch.inf)
        return self._from[at].masked_fill(~found, -1), flow


def _strongest_place(
    contribution: Tensor, criterion: Tensor, hole: Tensor, shape: torch.Size
) -> Tensor:
    """[n, 1]: the strongest position in the channel whose contributions add up to most."""
    n, _, positions = shape
    channel = contribution.reshape(shape).sum(2).argmax(1)
    inside = criterion.masked_fill(hole, -torch.inf).reshape(shape)
    position = inside[torch.arange(n, device=channel.device), channel].argmax(1)
    return (channel * positions + position)[:, None]


def _top(contribution: Tensor, k: int) -> Tensor:
    """[n, k]: the columns of the k highest contributions above zero, -1 where there are fewer."""
    k = min(k, contribution.shape[1])
    found, order = contribution.topk(k, dim=1)
    tied = ((contribution >= found[:, -1:]).sum(1) > k) & (found[:, -1] > 0)
    if bool(tied.any()):  # which of equals are taken topk leaves open
        rows = contribution[tied].sort(dim=1, descending=True, stable=True)
        order[tied] = rows.indices[:, :k]
    return order.masked_fill(contribution.gather(1, order) <= 0, -1)


def _strongest_branch(options: list[_Sent], count: int) -> list[_Sent]:
    best = torch.full((count,), -torch.inf, dtype=torch.float64, device=options[0].child.device)
    for sent in options:
        best.scatter_reduce_(0, sent.child, sent.contribution, "amax")
    total = torch.zeros_like(best)
    for sent in options:
        total.index_add_(0, sent.child, sent.contribution.clamp(min=0))
    free = torch.ones(count, dtype=torch.bool, device=best.device)
    taken = []
    for sent in options:
        mine = (sent.contribution == best[sent.child]) & free[sent.child]
        free[sent.child[mine]] = False
        kept = sent.pick(mine)
        part = torch.where(total > 0, best.clamp(min=0) / total, 0)[kept.child]
        nodes = replace(kept.nodes, share=kept.nodes.share * part)
        taken.append(kept._replace(nodes=nodes))
    return taken
