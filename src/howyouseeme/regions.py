"""From maps to boxes: the level sets of a map, their connected parts, and overlaps of boxes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Box", "components", "edges", "overlaps", "suppress"]

#: x0, y0, x1, y1; x1 and y1 exclusive.
Box = tuple[float, float, float, float]


def components(mask: Tensor) -> Tensor:
    """Number the connected parts of a mask [height, width] from 1 on, in no order; 0 is outside.

    >>> components(heat > 0.5).unique()

    Cells touch along their sides and corners. Numbers need not follow each other.
    """
    first = torch.arange(1, mask.numel() + 1, device=mask.device, dtype=torch.float64)
    labels = first.reshape(mask.shape) * mask
    while True:  # the largest number spreads over its part
        grown = F.max_pool2d(labels[None], 3, stride=1, padding=1)[0] * mask
        if torch.equal(grown, labels):
            return labels.long()
        labels = grown


def edges(heat: Tensor, mask: Tensor, level: float) -> Box:
    """The box around the cells of a mask, its edges where the map crosses the level.

    >>> edges(heat, heat > 0.5, 0.5)          # in cells: (0, 0, width, height) is all of the map

    Between a cell above the level and the next one below, the map is taken as linear. `mask` holds
    some of the cells [height, width] that are above the level; it isn't empty.
    """
    found = []
    for axis in (0, 1):
        there = mask.any(axis).nonzero()[:, 0]
        profile = torch.where(mask, heat, -torch.inf).amax(axis), heat.amax(axis)
        ends = []
        for end, step in ((int(there[0]), -1), (int(there[-1]), 1)):
            reach, beside = 0.5, end + step
            if 0 <= beside < len(profile[1]) and float(profile[1][beside]) < level:
                inner, outer = float(profile[0][end]), float(profile[1][beside])
                reach = (inner - level) / (inner - outer)
            ends.append(end + 0.5 + step * reach)
        found.append(ends)
    (x0, x1), (y0, y1) = found
    return x0, y0, x1, y1


def overlaps(boxes: Tensor, box: Tensor) -> Tensor:
    """Intersection over union of each of some boxes [n, 4] with one box [4]: [n]

    >>> overlaps(torch.tensor([[0., 0., 2., 2.]]), torch.tensor([1., 0., 3., 2.]))
    tensor([0.3333])
    """
    low = torch.maximum(boxes[:, :2], box[:2])
    high = torch.minimum(boxes[:, 2:], box[2:])
    shared = (high - low).clamp(min=0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
    return shared / (areas - shared)


def suppress(boxes: Tensor, scores: Tensor, most: float, count: int) -> Tensor:
    """The indices of the best boxes [n, 4] of which no two overlap by more than `most`, best first.

    >>> kept = suppress(boxes, scores, most=0.5, count=100)

    Greedy; equal scores [n] are taken in the order given. At most `count` are returned.
    """
    waiting = scores.sort(descending=True, stable=True).indices
    kept: list[Tensor] = []
    while len(waiting) and len(kept) < count:
        kept.append(waiting[0])
        waiting = waiting[overlaps(boxes[waiting], boxes[waiting[0]]) <= most]
    return torch.stack(kept) if kept else waiting
