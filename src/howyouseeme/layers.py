"""By what way an answer reaches the pixels: the strongest nodes of each module, and paths through them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .backtrack import Plan
from .maps import Point, scale_to_one, strongest_points
from .methods.base import Hop, Trail, per_sample
from .places import Layout, layouts, spatial
from .tape import Value

__all__ = ["Layer", "Node", "Path", "Walk", "layers_of", "paths_to"]


class Walk(NamedTuple):
    """A walk with all that it passed on the way to one image.

    >>> plan, trail, row, given = explanation.walk_again[0]()

    - `plan`: its steps; `trail`: the evidence of each value on it, of a batch;
    - `row`: the image's place in that batch; `given`: the input that is explained.
    """

    plan: Plan
    trail: Trail
    row: int
    given: Value


@dataclass(frozen=True)
class Node:
    """A place in the network: one element of what a module made.

    >>> node = explanation.layers()[-1].nodes[0]
    >>> node.module, node.channel, node.position, node.share
    ('features.8', 412, (3, 4), 0.07)

    `module` is its name in `model.named_modules()`, '' for the model itself and its input; `call` is
    the ATen call that made the element, 'input' for the model's input. `position` counts from 0 along
    each spatial axis of that module's output (y, x for a picture) and is empty where it has none.
    `share` is its evidence as a part of all the positive evidence at that output; evidence against
    makes it negative.
    """

    module: str
    call: str
    channel: int
    position: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class Path:
    """The strongest path from the class to one pixel.

    >>> path = explanation.paths[0][0]
    >>> [(node.module, node.channel, node.position) for node in path.nodes]

    `nodes` starts at the target and ends at the pixel of the model's input which `point` shows in the
    user's image; each node is an input of the one before it.
    """

    point: Point
    nodes: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """What the network looks at in one module.

    >>> layer = explanation.layers()[-1]
    >>> layer.module, layer.shape
    ('features.8', (1280, 7, 7))

    - `module`: its name in `model.named_modules()`, '' for the model itself and its input;
    - `call`: the last ATen call in it, 'input' for the model's input;
    - `shape`: of its output, (channel, height, width);
    - `map` [height, width]: evidence by position, summed over channels, 0..1;
    - `nodes`: the 20 strongest with evidence above 0, strongest first;
    - `layout`: where its places lie in the model's input, by axis of its output [batch, ...].
    """

    module: str
    call: str
    shape: tuple[int, ...]
    map: Tensor
    nodes: tuple[Node, ...]
    layout: Layout = field(default_factory=dict, repr=False)


def layers_of(walk: Walk) -> list[Layer]:
    """What the network looks at in each module; see `Explanation.layers`.

    >>> layers_of(explanation.walk_again[0]())
    """
    plan, trail, row, given = walk
    last: dict[str, Value] = {}
    places = spatial(plan)
    for value, _ in reversed(plan.steps):
        there = value in trail.evidence and places.get(value) == 1 and len(value.shape) > 2
        if there and value.call is not None:
            last.pop(value.call.module, None)
            last[value.call.module] = value
    known = layouts(plan, given)
    return [
        _layer(name, value, trail.evidence[value][row], known.get(value, {}))
        for name, value in [("", given), *last.items()]
    ]


def paths_to(place: Tensor, walk: Walk) -> list[tuple[Node, ...]]:
    """The strongest path from the class to each of some pixels [n, axes] of the input, as its nodes.

    >>> paths_to(torch.tensor([[80, 120]]), explanation.walk_again[0]())
    """
    _, trail, row, given = walk
    evidence = trail.evidence[given][row]
    if evidence.dim() < 2:  # no channels: each element is a place
        evidence = evidence.reshape(1, -1)
    place = place.to(evidence.device)
    pixel = torch.zeros(len(place), dtype=torch.long, device=place.device)
    for axis, size in enumerate(evidence.shape[1:]):
        pixel = pixel * size + place[:, axis]
    plane = evidence[0].numel()
    channel = evidence.reshape(len(evidence), -1)[:, pixel].argmax(0)
    found = trail.paths(given, row * evidence.numel() + channel * plane + pixel)
    totals: dict[Value, float] = {}
    return [tuple(_node(hop, trail, row, totals) for hop in hops) for hops in found]


def _node(hop: Hop, trail: Trail, row: int, totals: dict[Value, float]) -> Node:
    call = hop.value.call
    if hop.value not in totals:
        mine = per_sample(trail.evidence[hop.value], trail.batch)[row]
        totals[hop.value] = float(mine.clamp(min=0).sum()) or 1.0
    index = torch.unravel_index(torch.tensor(hop.index, device="cpu"), hop.value.shape)
    _, *place = (int(item) for item in index) if index else (0,)
    channel, *position = place or [0]
    return Node(
        module=call.module if call is not None else "",
        call=call.name if call is not None else "input",
        channel=channel,
        position=tuple(position),
        share=hop.evidence / totals[hop.value],
    )


def _layer(name: str, value: Value, evidence: Tensor, layout: Layout, most: int = 20) -> Layer:
    place, strength = strongest_points(evidence, most)
    total = float(evidence.clamp(min=0).sum()) or 1.0
    call = value.call.name if value.call is not None else "input"
    nodes = tuple(
        Node(name, call, channel, tuple(position), share / total)
        for (channel, *position), share in zip(place.tolist(), strength.tolist(), strict=True)
    )
    heat = scale_to_one(evidence.sum(0).float()).cpu()
    return Layer(name, call, tuple(evidence.shape), heat, nodes, layout)
