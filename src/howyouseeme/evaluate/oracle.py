"""The strongest paths through a network, exactly: slow, and the measure of what a walk loses.

>>> plan, trail, row, given = explanation.walk_again[0]()
>>> for path in top_paths(plan, start_node, k=20): ...
>>> compare(explanation, k=20)

A path runs from an element of the target to an element of the input, along the links of the plan. How
much weighs a path? Two answers:

- `contribution`: the product of the weights along it, times the activation of its pixel. Summed over all
  paths, with the biases, that is the target itself. Paths are compared by its absolute value.
- `excitation`: the product, over its nodes, of the share that the next one has in what excites the
  node, (w · a)⁺ / sum of (w · a)⁺ over all its inputs. That is the way of excitation backprop and of the
  coverage: the shares of all paths that reach the pixels add up to 1, less what ends on the way.
  Where a value has one source, element by element (activation, batch norm, pooling by maximum), the share is
  1. A node that is negative, or is made small by a negative scale after it, is excited by what makes it so.

Every weight is at most what can follow it, so a best-first search with exact bounds finds the k strongest
paths without looking at the others. The bounds take every edge of the network once, which is what makes it
slow: some 10 million edges a second.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..backtrack import Plan, signs
from ..errors import InputError
from ..explanation import Explanation
from ..links import Link
from ..rules import Step
from ..tape import Value

__all__ = ["Comparison", "OraclePath", "Weight", "compare", "top_paths", "total", "weigh"]

Weight = Literal["contribution", "excitation"]

#: Edges looked at in one go.
_CHUNK = 1_000_000


@dataclass(frozen=True, eq=False)
class OraclePath:
    """One path: its weight (a contribution with its sign, or a share), and its nodes, target first.

    >>> path = top_paths(plan(tape, tape.output), 281, k=1)[0]
    >>> path.weight, [index for value, index in path.nodes]
    """

    weight: float
    nodes: tuple[tuple[Value, int], ...]


class Comparison(NamedTuple):
    """Sums of the weights, a contribution without its sign, of three sets of paths.

    >>> walk, best, every = compare(explanation, k=20)

    - `walk`: the paths that the walk took to its k strongest pixels;
    - `best`: the k strongest paths to k different pixels;
    - `all`: every path.
    """

    walk: float
    best: float
    all: float


@torch.no_grad()
def top_paths(
    plan: Plan, node: int, k: int = 20, by: Weight = "contribution", apart: bool = False
) -> list[OraclePath]:
    """The k strongest paths from an element of the plan's start to the inputs, strongest first.

    >>> for path in top_paths(plan(tape, tape.output), 281, k=5):
    ...     print(path.weight, [index for value, index in path.nodes])

    Args:
        plan: of a small network.
        node: a flat index into `plan.start`.
        by: what a path weighs, see above.
        apart: only the strongest path to each input element.

    Fewer are returned where fewer paths have a weight other than 0.

    Raises:
        InputError: there is no such node, or k is below 1.
    """
    if k < 1:
        raise InputError(f"The {k} strongest paths are none: give 1 or more.")
    bound = _bounds(plan, node, by, largest=True)
    taken: list[OraclePath] = []
    seen: set[tuple[Value, int, int]] = set()
    tie = count()  # of equally strong paths the one found first
    first = _Prefix(plan.start, node, 0, 1.0, 1.0, None)
    queue = [(-float(bound[plan.start][0, node]), next(tie), first)]
    while queue and len(taken) < k:
        found, _, prefix = heapq.heappop(queue)
        if found == 0:
            break
        step = plan.step(prefix.value)
        # The strongest way to a node is found first, and the others end in the same pixels.
        if apart:
            here = (prefix.value, prefix.element, prefix.state if step else 0)
            if here in seen:
                continue
            seen.add(here)
        if step is None:
            taken.append(_finished(prefix, by))
            continue
        for source, edges in _outgoing(
            prefix.value, step, _one(prefix.value, prefix.element), prefix.state, by
        ):
            ahead = bound[source][edges.state, edges.to] * edges.weight * prefix.weight
            for at in torch.nonzero(ahead[0] > 0)[:, 0].tolist():
                grown = _Prefix(
                    source,
                    int(edges.to[0, at]),
                    int(edges.state[0, at]),
                    prefix.weight * float(edges.weight[0, at]),
                    prefix.sign * float(edges.sign[0, at]),
                    prefix,
                )
                heapq.heappush(queue, (-float(ahead[0, at]), next(tie), grown))
    return taken


def total(plan: Plan, node: int, by: Weight = "contribution") -> float:
    """The weights of all paths from an element of the plan's start to the inputs, added up.

    >>> total(plan(tape, tape.output), 281, by="excitation")        # 1 at most
    0.31

    Contributions are added without their signs.

    Raises:
        InputError: there is no such node.
    """
    return float(_bounds(plan, node, by, largest=False)[plan.start][0, node])


@torch.no_grad()
def weigh(plan: Plan, nodes: Sequence[tuple[Value, int]], by: Weight = "contribution") -> float:
    """What a path weighs, given its nodes from the target to the pixel; 0 where an edge is missing.

    >>> weigh(plan, top_paths(plan, 281)[0].nodes)

    Where several edges join two nodes, the strongest is taken. Contributions have their sign.
    """
    prefix = _Prefix(*nodes[0], 0, 1.0, 1.0, None)
    for (value, index), (source, wanted) in pairwise(nodes):
        step = plan.step(value)
        options = [
            _Prefix(
                source,
                wanted,
                int(edges.state[0, at]),
                prefix.weight * float(edges.weight[0, at]),
                prefix.sign * float(edges.sign[0, at]),
                prefix,
            )
            for to, edges in (
                _outgoing(value, step, _one(value, index), prefix.state, by) if step else ()
            )
            if to is source
            for at in torch.nonzero(edges.to[0] == wanted)[:, 0].tolist()
        ]
        if not options:
            return 0.0
        prefix = max(options, key=lambda option: option.weight)
    return _finished(prefix, by).weight


def compare(
    explanation: Explanation, image: int = 0, k: int = 20, by: Weight = "contribution"
) -> Comparison:
    """How much of what the k strongest paths carry did the walk find?

    >>> found = compare(explanation)
    >>> found.walk / found.best                    # 1: the walk took the strongest paths
    >>> found.best / found.all                     # how much k paths can tell at all

    The walk's paths are those to its k strongest pixels, `explanation.path`. For small networks.

    Raises:
        IndexError: there is no such image.
        InputError: nothing speaks for the target in that image.
    """
    plan, trail, row, given = explanation.walk_again[image]()
    evidence = trail.evidence[given][row]
    strongest = evidence.sum(0).reshape(-1).sort(descending=True, stable=True)
    pixels = strongest.indices[:k][strongest.values[:k] > 0]
    if not len(pixels):
        raise InputError("The walk reached no pixel: there are no paths to compare.")
    plane = evidence[0].numel()
    channel = evidence.reshape(len(evidence), -1)[:, pixels].argmax(0)
    hops = trail.paths(given, row * evidence.numel() + channel * plane + pixels)
    walked = [weigh(plan, [(hop.value, hop.index) for hop in path], by) for path in hops]
    start = hops[0][0].index
    best = top_paths(plan, start, len(hops), by, apart=True)
    return Comparison(
        sum(map(abs, walked)), sum(abs(path.weight) for path in best), total(plan, start, by)
    )


# -- edges ----------------------------------------------------------------------------------------


class _Prefix(NamedTuple):
    """A path on its way: where it is, how strong it has become, and where it came from."""

    value: Value
    element: int
    state: int  # 0: asked for what makes the node large, 1: for what makes it small
    weight: float
    sign: float
    before: _Prefix | None


class _Edges(NamedTuple):
    """Edges of n nodes to one source, each [n, m]; the weight is 0 where there is none."""

    to: Tensor
    weight: Tensor
    sign: Tensor
    state: Tensor


def _one(value: Value, index: int) -> Tensor:
    """One node of a value [1], where the value is."""
    return torch.tensor([index], device=value.device)


def _outgoing(
    value: Value, step: Step, nodes: Tensor, state: int, by: Weight
) -> Iterator[tuple[Value, _Edges]]:
    """The edges of nodes [n] to each source of their value."""
    raw = [(source, *_flat(link, nodes)) for source, link in step.links]
    if by == "contribution":
        for source, index, weight in raw:
            yield source, _Edges(index, weight.abs(), signs(weight), torch.zeros_like(index))
        return
    asked = -1.0 if state else 1.0
    if step.moves:
        for (source, index, weight), (_, link) in zip(raw, step.links, strict=True):
            there = link.edges(nodes).index.reshape(len(nodes), -1) >= 0
            next_state = (asked * signs(weight) < 0).long()
            yield source, _Edges(index, there.double(), torch.ones_like(weight), next_state)
        return
    excited = [
        (asked * weight * source.flat[index].double()).clamp(min=0) for source, index, weight in raw
    ]
    z = torch.stack([part.sum(1) for part in excited]).sum(0)[:, None] if excited else nodes
    for (source, index, _), part in zip(raw, excited, strict=True):
        share = torch.where(z > 0, part / z, 0)
        activation = source.flat[index].double()
        yield source, _Edges(index, share, torch.ones_like(share), (activation < 0).long())


def _flat(link: Link, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Index and weight [n, m] of the edges, 0 and 0 where there is none."""
    edges = link.edges(nodes)
    index = edges.index.reshape(len(nodes), -1)
    weight = edges.weight.reshape(len(nodes), -1).double()
    return index.clamp(min=0), weight.masked_fill(index < 0, 0)


@torch.no_grad()
def _bounds(plan: Plan, node: int, by: Weight, largest: bool) -> dict[Value, Tensor]:
    """For each value and state [2, elements] the largest weight, or the sum, of what can follow."""
    if by not in get_args(Weight):
        raise InputError(f"by={by!r} is not known: {' or '.join(get_args(Weight))}.")
    if not 0 <= node < plan.start.numel:
        raise InputError(f"There is no node {node}: the target has {plan.start.numel} elements.")
    states = (0, 1) if by == "excitation" else (0,)
    ahead = {
        value: (value.flat.double().abs() if by == "contribution" else value.flat.double() * 0 + 1)
        .reshape(1, -1)
        .expand(2, -1)
        for value in plan.inputs
    }
    for value, step in reversed(plan.steps):
        found = torch.zeros(2, value.numel, dtype=torch.float64, device=value.device)
        rows = max(_CHUNK // max([1, *(link.fan_in() for _, link in step.links)]), 1)
        for nodes in torch.arange(value.numel, device=value.device).split(rows):
            for state in states:
                best = found[state, nodes]
                for source, edges in _outgoing(value, step, nodes, state, by):
                    each = edges.weight * ahead[source][edges.state, edges.to]
                    best = torch.maximum(best, each.amax(1)) if largest else best + each.sum(1)
                found[state, nodes] = best
        ahead[value] = found
    return ahead


def _finished(prefix: _Prefix, by: Weight) -> OraclePath:
    weight = prefix.weight
    if by == "contribution":
        weight *= prefix.sign * float(prefix.value.flat[prefix.element])
    nodes = []
    at: _Prefix | None = prefix
    while at is not None:
        nodes.append((at.value, at.element))
        at = at.before
    return OraclePath(weight, tuple(reversed(nodes)))
