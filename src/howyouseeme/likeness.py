"""How far a thing reaches: places that a network describes alike.

Evidence lights up what tells a class, a cat's face and not its back. But the network describes the
places of one thing alike, best at the stage before the last, where it knows of things and still of
places. What is seen there is spread to places by their likeness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .backtrack import Plan
from .links import Convolution
from .places import Layout, Line, layouts, onto_input, spatial
from .tape import Value

__all__ = ["Likeness", "likeness", "spread"]

#: More places than these, 32 x 32, are averaged in windows: each is compared with all others.
_MOST = 1024


@dataclass(frozen=True, eq=False)
class Likeness:
    """How the network describes the places of one picture.

    >>> alike = likeness(plan(tape, tape.output), tape.inputs[0])[0]
    >>> alike.reach(saliency)                  # [height, width], 0..1

    `features` [channel, y, x]; `lines`: where in the input the places lie, along y and x.
    """

    features: Tensor
    lines: tuple[Line, Line]

    def reach(self, saliency: Tensor) -> Tensor:
        """What is seen over the input [height, width], spread to what is alike: the same shape, 0..1.

        Ones where nothing is seen, or all places are alike: there is nothing to tell a thing by.
        """
        seen = _at_places(saliency.float(), self.lines)
        alike = spread(seen.flatten(), self.features.to(seen).flatten(1)).reshape(1, *seen.shape)
        layout: Layout = {axis: (axis, line) for axis, line in enumerate(self.lines, start=2)}
        drawn = onto_input(alike, layout, saliency.shape)
        assert drawn is not None  # there are places along both axes
        low, high = drawn.min(), drawn.max()
        # Less were rounding. It is not looked at, as a device would be waited for.
        told = high - low > 1e-5 * high
        return torch.where(told, (drawn[0] - low) / (high - low), 1).to(saliency)


def likeness(plan: Plan, given: Value) -> tuple[Likeness | None, ...]:
    """For each picture of an input [batch, channel, height, width] how its places are described.

    >>> likeness(plan(tape, tape.output), tape.inputs[0])[0].features.shape
    torch.Size([672, 14, 14])

    It is at the last feature map of the stage before the last, that of half the coarsest stride. None
    where the network has none, or the input is no picture.
    """
    batch = given.shape[0] if given.shape else 1
    stage = _stage(plan, given) if len(given.shape) == 4 else None
    if stage is None:
        return (None,) * batch
    value, layout = stage
    features, lines = value.data.float(), (layout[2][1], layout[3][1])
    window = int(np.ceil((features[0, 0].numel() / _MOST) ** 0.5))
    if window > 1:
        features = F.avg_pool2d(features, window, ceil_mode=True)
        lines = _averaged(lines[0], window), _averaged(lines[1], window)
    # A copy, so that the tape need not be kept for a part of it.
    return tuple(Likeness(one.clone(), lines) for one in features[:batch])


def spread(seen: Tensor, features: Tensor) -> Tensor:
    """What is seen at each place, spread twice to places by the likeness of their features: [places]

    >>> spread(saliency_of_places, features)          # [places], [channel, places]

    Likeness is the cosine of the features, less their mean over all places; 0 where it is negative.
    """
    scale = features.abs().max().clamp(min=torch.finfo(features.dtype).tiny)
    features = features / scale
    features = features - features.mean(1, keepdim=True)
    length = features.norm(dim=0)
    features = features / torch.where(length > 1e-5, length, torch.inf)  # less is rounding
    alike = (features.T @ features).clamp_(min=0)
    whole = alike.sum(1).clamp(min=1e-6)
    return (alike @ ((alike @ seen) / whole)) / whole


def _stage(plan: Plan, given: Value) -> tuple[Value, Layout] | None:
    """The last feature map of the stage before the last, and where its places lie."""
    known, channels = layouts(plan, given), spatial(plan)
    made: set[Value] = set()  # what the network found, not what was done to the pixels before
    for value, step in reversed(plan.steps):
        if any(source in made or isinstance(link, Convolution) for source, link in step.links):
            made.add(value)
    strides: dict[Value, float] = {}
    spacing: dict[int, float] = {}  # by line, most of which are the same object
    for value, _ in plan.steps:  # the last call first
        apart = channels.get(value) == 1 and len(value.shape) == 4 and min(value.shape[2:]) > 1
        if apart and value in made:
            line = known.get(value, {}).get(2)
            one_each = given.shape[0] in {1, value.shape[0]}  # of several views the first
            if one_each and line is not None and line[0] == 2 and 3 in known[value]:
                if id(line[1]) not in spacing:
                    spacing[id(line[1])] = float(np.abs(np.diff(line[1])).mean())
                strides[value] = spacing[id(line[1])]
    strides = {value: stride for value, stride in strides.items() if stride}  # 0: all in one place
    if not strides:
        return None
    wanted = max(strides.values()) / 2
    off = {value: round(abs(float(np.log2(s / wanted))), 1) for value, s in strides.items()}
    nearest = [value for value in strides if off[value] == min(off.values())]
    chosen = min(nearest, key=lambda value: value.shape[2])  # larger ones of a stage are padded
    return chosen, known[chosen]


def _averaged(line: Line, window: int) -> Line:
    """The middle of each window of an axis; the last may be shorter."""
    return np.array([line[at : at + window].mean() for at in range(0, len(line), window)])


def _at_places(heat: Tensor, lines: Sequence[Line]) -> Tensor:
    """A map of pixels [height, width], averaged around places given by their lines along each axis."""
    for axis, line in enumerate(lines):
        size = heat.shape[axis]
        step = float(np.abs(np.diff(line)).mean()) if len(line) > 1 else 2.0 * size
        reach = max(step / 2, 0.5)
        apart = np.abs(np.arange(size) - line.clip(0, size - 1)[:, None])
        window = torch.from_numpy((apart <= reach).astype(float)).to(heat)
        window = window / window.sum(1, keepdim=True)
        heat = torch.tensordot(window, heat, dims=([1], [axis])).movedim(0, axis)
    return heat
