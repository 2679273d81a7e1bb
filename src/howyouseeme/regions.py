"""From maps to boxes: the level sets of a map, their connected parts, and overlaps of boxes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import InputError

__all__ = [
    "Box",
    "check_box",
    "components",
    "edges",
    "held",
    "merged",
    "overlaps",
    "read_box",
    "suppress",
]

#: x0, y0, x1, y1; x1 and y1 exclusive.
Box = tuple[float, float, float, float]


def read_box(text: str) -> Box:
    """A box from a text, x0, y0, x1, y1.

    >>> read_box("120,80,260,300")
    (120.0, 80.0, 260.0, 300.0)

    Raises:
        InputError: it is no four numbers.
    """
    try:
        x0, y0, x1, y1 = (float(side) for side in text.split(","))
    except ValueError:
        raise InputError(
            f"{text!r} isn't four numbers, x0,y0,x1,y1, such as 120,80,260,300."
        ) from None
    return x0, y0, x1, y1


def check_box(box: Sequence[float], size: tuple[int, int]) -> Box:
    """A box in a picture of the size (height, width), cut at its edges.

    >>> check_box((-5, 0, 20, 10), (100, 100))
    (0.0, 0.0, 20.0, 10.0)

    Raises:
        InputError: it isn't four numbers, is empty, or lies outside of the picture.
    """
    try:
        x0, y0, x1, y1 = (float(side) for side in (() if isinstance(box, str) else box))
    except (TypeError, ValueError):
        x0 = y0 = x1 = y1 = math.nan
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise InputError(f"The box {box!r} is not four numbers: x0,y0,x1,y1 in pixels.")
    told = f"{x0:g},{y0:g},{x1:g},{y1:g}"
    if x1 <= x0 or y1 <= y0:
        raise InputError(
            f"The box {told} is empty: x1 must be larger than x0, and y1 larger than y0."
        )
    height, width = size
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        raise InputError(
            f"The box {told} lies outside of the picture, which has {width} x {height} pixels."
        )
    return max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1)


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


def held(labels: Tensor, heat: Tensor) -> Tensor:
    """How much of a map lies in each part of a mask, by the number that `components` gave it; 0 outside.

    >>> labels = components(heat > 0.5)
    >>> largest = labels == held(labels, heat).argmax()
    """
    found = heat.new_zeros(heat.numel() + 1).index_add_(0, labels.flatten(), heat.flatten())
    found[0] = 0
    return found


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


def merged(features: Tensor) -> Tensor:
    """Boxes [n, 4] of what is alike: of all parts that merging neighbours makes, that of all first.

    >>> merged(features)[0]               # features [channel, height, width]; boxes in places
    tensor([ 0.,  0., 28., 28.])

    Each place begins as a part. Of all parts that touch along a side, those two are merged whose union
    adds least to the variance inside of parts: |m - n|² a b / (a + b), with their sizes a and b, and means
    m and n of the features (Ward, 1963; hierarchical grouping as in selective search, Uijlings et al. 2013,
    by features of a network in place of colours). There are height · width - 1 boxes.
    """
    width = features.shape[2]
    flat = features.detach().cpu().double().flatten(1)
    mean = dict(enumerate((flat - flat.mean(1, keepdim=True)).T.numpy()))
    size = dict.fromkeys(mean, 1)
    low = {i: np.array([i % width, i // width]) for i in mean}
    high = {i: corner + 1 for i, corner in low.items()}
    beside: dict[int, set[int]] = {i: set() for i in mean}
    for i in mean:
        for j, there in ((i + 1, i % width + 1 < width), (i + width, i + width < len(mean))):
            if there:
                beside[i].add(j)
                beside[j].add(i)

    def cost(i: int, j: int) -> float:
        apart = mean[i] - mean[j]
        return float(apart @ apart) * size[i] * size[j] / (size[i] + size[j])

    waiting = [(cost(i, j), i, j) for i in beside for j in beside[i] if i < j]
    heapq.heapify(waiting)
    found = []
    for new in range(len(beside), 2 * len(beside) - 1):
        _, i, j = heapq.heappop(waiting)
        while i not in size or j not in size:  # one of them has been merged since
            _, i, j = heapq.heappop(waiting)
        mean[new] = (mean[i] * size[i] + mean[j] * size[j]) / (size[i] + size[j])
        size[new] = size.pop(i) + size.pop(j)
        low[new], high[new] = np.minimum(low[i], low[j]), np.maximum(high[i], high[j])
        found.append(np.concatenate([low[new], high[new]]))
        beside[new] = (beside.pop(i) | beside.pop(j)) - {i, j}
        for other in beside[new]:
            beside[other] -= {i, j}
            beside[other].add(new)
            heapq.heappush(waiting, (cost(other, new), other, new))
    return torch.from_numpy(np.array(found[::-1]).reshape(-1, 4)).float()


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
