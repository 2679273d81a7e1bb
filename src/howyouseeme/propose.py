"""What is worth looking at in a picture, before anybody asks for a class: a saliency map and regions.

The network runs once, recorded, and the walks back from its likeliest classes are united, each
weighted by its probability. Their evidence at the last feature map tells coarsely where something
is, that at the stage of stride 8 finely what is there: saliency is their product. The first regions
are the windows that fit it best as a whole. After them come in turn things, what the network
describes alike at that stage, and windows that hold more saliency than their surroundings do, large
ones and small ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from . import backtrack
from .backtrack import Plan
from .draw import draw_box, paint_map, percent
from .errors import InputError, ModelError
from .forward import answered
from .images import Geometry, Source, load_image
from .likeness import likeness
from .localize import object_map
from .maps import gaussian_blur, levels, scale_to_one
from .methods.base import Trail
from .methods.evidence import Evidence
from .models import Model, Prepare, as_network
from .places import spatial
from .regions import Box, components, edges, held, merged, overlaps, suppress
from .tape import Value

__all__ = ["Proposals", "Proposer", "Region"]

_CELLS = 28  # maps are brought to so many cells a side
_LEVEL = 0.35  # of its maximum, for the box of a class
_LEVELS = (0.15, 0.25, 0.35, 0.45, 0.55)  # for windows that fit a map as a whole
_OBJECTS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35)  # the same for the map of objects
_FIRST = 2  # so many regions are such windows; then all sizes have their turn
_FRAMED = (0.1, 0.1, 0.9, 0.9)  # people put what they take a picture of in its middle
_PARTS = 100  # of all that were merged, so many of the last may go first
_ANSWERS = 5  # a class that isn't among so many first ones may not be there
_THIN = 2  # cells: what is thinner is an edge
_SIZES = ((0.02, 22), (0.05, 26), (0.12, 20), (0.3, 14), (0.6, 8), (1.0, 4))  # up to a share: turns


@dataclass(frozen=True)
class Region:
    """A part of the picture that is worth looking at.

    >>> region = proposals.regions[0]
    >>> region.box, region.share
    ((64.4, 0.0, 386.6, 257.1), 0.916)

    - `box`: (x0, y0, x1, y1) in pixels of the picture, x1 and y1 exclusive;
    - `share`: 0..1, how much of the saliency lies in it.
    """

    box: Box
    share: float


@dataclass(frozen=True, eq=False)
class Proposals:
    """What `Proposer` found in one picture.

    >>> proposals = Proposer("efficientnet-lite0")("photo.jpg", count=10)
    >>> proposals.saliency.shape, len(proposals.regions)
    ((300, 451), 10)

    - `saliency`: float32 [height, width] of the picture, 0..1, its maximum being 1;
    - `regions`: the most promising first; no two overlap by more than half.

    How they are found: docs/propose.md. Saliency is the evidence of the likeliest classes at the last feature
    map times that at the stage of stride 8. The first regions are the windows that fit it best. After them come
    in turn windows that hold more of it than their surroundings do, and parts of the feature map of stride 8,
    merged by Ward's rule (Ward 1963): the grouping of selective search (Uijlings et al. 2013) by features in
    place of colours.
    """

    saliency: np.ndarray
    regions: tuple[Region, ...]

    def picture(self, image: Source, boxes: int = 5) -> Image.Image:
        """The picture under its saliency, with the first boxes; the first of all is the widest line.

        >>> proposals.picture("photo.jpg").save("proposals.png")

        Raises:
            ImageError: the picture can't be read.
        """
        picture = paint_map(load_image(image), self.saliency)
        pen = ImageDraw.Draw(picture)
        thin = max(1, round(min(picture.size) / 250))
        for rank, region in reversed(list(enumerate(self.regions[:boxes]))):
            draw_box(pen, region.box, "white", thin if rank else 3 * thin)
        return picture

    def to_dict(self, image: str) -> dict[str, Any]:
        """The regions of the image of that name, ready for JSON.

        >>> json.dumps(proposals.to_dict("photo.jpg"))
        """
        height, width = self.saliency.shape
        return {
            "image": {"name": image, "size": [height, width]},
            "regions": [
                {"box": [round(side, 1) for side in region.box], "share": round(region.share, 4)}
                for region in self.regions
            ],
        }


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a network sees in a picture, in cells: three maps [cells, cells] in 0..1, and its features.

    - `where`: where something is; `fine`: what is there; `objects`: how far it reaches;
    - `features` [channel, cells, cells]: how each place is described at the stage of stride 8;
    - `chances` [classes]: the probability of each;
    - `order`: the classes, the likeliest first;
    - `geometry`: where the network's input lies in the picture.
    """

    where: Tensor
    fine: Tensor
    objects: Tensor
    features: Tensor
    chances: Tensor
    order: list[int]
    geometry: Geometry


class Proposer:
    """Proposes what to look at.

    >>> proposer = Proposer("efficientnet-lite0")
    >>> proposals = proposer("photo.jpg")
    >>> proposals.saliency                        # [height, width], 0..1
    >>> proposals.regions[0].box                  # x0, y0, x1, y1 in pixels

    Args:
        model: what `Explainer` takes.
        top: how many of the likeliest classes are walked back from.
        preprocess: how a photo becomes the model's input; that of the `Network` by default.

    How it works: docs/propose.md.

    Raises:
        InputError: `top` is below 1, or the model or its preprocessing is none.
        ModelError, MissingExtraError: the model of that name can't be loaded; ModelError also where the
            network's preprocessing isn't known.
    """

    def __init__(
        self,
        model: Model = "efficientnet-lite0",
        top: int = 3,
        *,
        preprocess: Prepare | None = None,
    ) -> None:
        if top < 1:
            raise InputError(f"{top} classes are none to walk back from: give 1 or more.")
        self.network = as_network(model, preprocess)
        self._prepare = self.network.photo_input
        self.top = top

    @torch.no_grad()
    def __call__(self, image: Source, count: int = 100) -> Proposals:
        """The saliency of a picture, and at most `count` regions of it.

        >>> proposer("photo.jpg", count=10).regions

        `image` is what `load_image` takes.

        Raises:
            InputError: `count` is below 1, or the network does not take such an input.
            ImageError: the picture can't be read.
            ModelError: the network is in training mode, is no classifier, has a single score or no feature
                maps, or answers with NaN or infinity.
            UnsupportedCallError: it makes calls without a rule.
        """
        if count < 1:
            raise InputError(f"{count} regions are none: give 1 or more.")
        seen = self._seen(image, None)
        heat, geometry = (seen.where * seen.fine).sqrt(), seen.geometry
        boxes = _ranked(seen, heat, count)
        shown = heat.square()
        shares = _held(shown / shown.sum().clamp(min=1e-12), boxes)
        regions = tuple(
            Region(_on_picture(box, geometry), min(1.0, float(share)))
            for box, share in zip(boxes.tolist(), shares, strict=True)
        )
        saliency = geometry.map_to_image(_over(heat, geometry).square().numpy())
        return Proposals(saliency / max(float(saliency.max()), 1e-12), regions)

    @torch.no_grad()
    def find(self, image: Source, target: int | str) -> Box:
        """The box of a class in a picture, for a tracker to start with: the largest part of its evidence.

        >>> x0, y0, x1, y1 = proposer.find("photo.jpg", "tabby")     # in pixels, x1 and y1 exclusive

        There is a box also where the network doesn't see the class: where it is not among its five
        likeliest ones, that is a `UserWarning` with its rank and probability.

        Raises:
            InputError: there is no such class, or nothing in the picture speaks for it.
            ImageError, ModelError, UnsupportedCallError: as the call.
        """
        index = self.network.class_index(target)
        seen = self._seen(image, index)
        box = _largest(seen.where)
        if box is None:
            raise InputError(
                f"Nothing in the picture speaks for {target!r}; name another class, or give a box."
            )
        chance = seen.chances[index]
        rank = seen.order.index(index) + 1
        if rank > _ANSWERS:
            warnings.warn(
                f"{self.network.label(index)} may not be in the picture: of the network's answers to it, "
                f"it is number {rank}, with a probability of {percent(float(chance))}; the box is around "
                "what looks most like it.",
                stacklevel=3,  # of torch's wrapper around this
            )
        return _on_picture(box, seen.geometry)

    def _seen(self, image: Source, target: int | None) -> _Seen:
        """What the network sees in a picture, or of a class in it, all from one recorded pass."""
        tensor, geometry = self._prepare(load_image(image))
        like = self.network.like
        tape, found, order, chances = answered(self.network, tensor.to(like))
        if len(chances) == 1:
            raise ModelError(
                f"{self.network.name} has a single score, and proposals compare classes."
            )
        plan = backtrack.plan(tape, found.start, found.exclusive)
        if target is not None:
            self.network.class_index(target, len(chances))
        likely = order[: self.top]
        asked = dict(zip(likely.tolist(), chances[likely].tolist(), strict=True))
        last, middle = self._stages(plan)
        alike = likeness(plan, plan.inputs[0])[0]
        where = torch.zeros(_CELLS, _CELLS, device="cpu")
        fine = torch.zeros(_CELLS, _CELLS, device="cpu")
        objects = torch.zeros(_CELLS, _CELLS, device="cpu")
        for index, chance in (asked if target is None else {target: 1.0}).items():
            trail = Trail()
            Evidence(focus=False).walk(plan, torch.tensor([index], device=like.device), trail)
            place = scale_to_one(_resized(trail.evidence[last][0].sum(0)))
            detail = _resized(trail.evidence[middle][0].sum(0)).clamp(min=0)
            detail = scale_to_one(gaussian_blur(detail, 1.5))
            where += chance * place
            fine += chance * detail
            heat = _over((place * detail).sqrt(), geometry)
            reach = object_map(levels(heat.double()), alike)
            objects += chance * F.adaptive_avg_pool2d(reach[None], _CELLS)[0].float()
        inside = _cut(geometry)
        return _Seen(
            where=scale_to_one(where * inside),
            fine=scale_to_one(fine * inside),
            objects=scale_to_one(objects * inside),
            features=_resized(middle.data[0]),
            chances=chances,
            order=order.tolist(),
            geometry=geometry,
        )

    def _stages(self, plan: Plan) -> tuple[Value, Value]:
        """The last feature map, and the last one of the stage of stride 8."""
        places = spatial(plan)  # the axis of the channels, by value
        maps: dict[int, Value] = {}  # by width: the last one
        for value, _ in plan.steps:
            if places.get(value) == 1 and len(value.shape) == 4 and value.shape[2] > 1:
                maps.setdefault(value.shape[2], value)
        if not maps:
            raise ModelError(f"{self.network.name} has no feature maps to look at.")
        width = plan.inputs[0].shape[2]
        return maps[min(maps)], maps[min(maps, key=lambda size: abs(size - width / 8))]


def _resized(maps: Tensor) -> Tensor:
    """A map, or several [channel, y, x], of any size at _CELLS a side."""
    flat = maps.reshape(1, -1, *maps.shape[-2:]).float().cpu()
    resized = F.interpolate(flat, size=(_CELLS, _CELLS), mode="bilinear")
    return resized.reshape(*maps.shape[:-2], _CELLS, _CELLS)


def _over(heat: Tensor, geometry: Geometry) -> Tensor:
    """A map of cells over the model's input."""
    return F.interpolate(heat[None, None], size=geometry.input_size, mode="bilinear")[0, 0]


def _cut(geometry: Geometry) -> Tensor:
    """How much of each cell shows the picture, and not padding around it [cells, cells]."""
    inside = geometry.cut(torch.ones(geometry.input_size, device="cpu"))
    return F.adaptive_avg_pool2d(inside[None], _CELLS)[0]


def _shown(geometry: Geometry) -> Box:
    """The box of cells that show the picture, and not padding around it: all where nothing is padded."""
    top, left, bottom, right = (
        min(max((edge - offset) / scale / side * _CELLS, 0.0), float(_CELLS))
        for edges in ((0, 0), geometry.image_size)
        for edge, offset, scale, side in zip(
            edges, geometry.offset, geometry.scale, geometry.input_size, strict=True
        )
    )
    return left, top, right, bottom


def _on_picture(box: Sequence[float], geometry: Geometry) -> Box:
    """A box in cells, in pixels of the picture."""
    height, width = geometry.input_size
    sides = zip(box, (width, height, width, height), strict=True)
    return geometry.box_to_image([side / _CELLS * size for side, size in sides])


# Regions. Boxes are in cells.


def _ranked(seen: _Seen, heat: Tensor, count: int) -> Tensor:
    """The most promising boxes [at most count, 4], best first."""
    shown = left, top, right, bottom = _shown(seen.geometry)
    windows = _within(_windows(), shown)
    size = windows.new_tensor([right - left, bottom - top] * 2)
    framed = windows.new_tensor(_FRAMED) * size + windows.new_tensor([left, top] * 2)
    maps = ((seen.where, _LEVELS), (heat, _LEVELS), (seen.objects, _OBJECTS))
    fit = overlaps(windows, framed) / 4
    for map, at in maps:
        fits = [_agreement(map > level * map.max(), windows) for level in at]
        fit += torch.stack(fits).mean(0) / len(maps)
    whole = windows[suppress(windows, fit, 0.5, _FIRST)]

    salience, share = _salience(heat, windows), _areas(windows) / size[:2].prod()
    turns = []  # (when, window)
    low = 0.0
    for high, often in _SIZES:
        mine = ((share > low) & (share <= high + 1e-6)).nonzero()[:, 0]
        best = mine[salience[mine].sort(descending=True, stable=True).indices[:600]]
        kept = best[suppress(windows[best], salience[best], 0.3, 3 * often)]
        turns += [(rank / often, window) for rank, window in enumerate(windows[kept])]
        low = high
    turns.sort(key=lambda turn: turn[0])
    standing_out = torch.stack([window for _, window in turns])
    things = _things(seen.features, heat, shown)
    return _apart(torch.cat([whole, _in_turn(things, standing_out)]), count)


def _things(features: Tensor, heat: Tensor, shown: Box) -> Tensor:
    """The boxes of what is described alike, what was merged last first: [n, 4]

    Those that hold more of the map than their surroundings do go before the others.
    """
    boxes = _within(merged(features), shown)
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).amin(1) >= _THIN]
    stands_out = _salience(heat, boxes) > 0
    stands_out[_PARTS:] = False
    return _apart(torch.cat([boxes[stands_out], boxes[~stands_out]]), 2 * _PARTS)


def _within(boxes: Tensor, shown: Box) -> Tensor:
    """Boxes [n, 4] as far as they lie in another, without those of which hardly anything is left there."""
    low, high = boxes.new_tensor(shown[:2]), boxes.new_tensor(shown[2:])
    cut = torch.cat([boxes[:, :2].clamp(low, high), boxes[:, 2:].clamp(low, high)], 1)
    return cut[(cut[:, 2:] - cut[:, :2]).amin(1) >= min(1.0, float((high - low).min()))]


def _in_turn(first: Tensor, second: Tensor) -> Tensor:
    """One of each list [n, 4] in turn; what is left of the longer one at the end."""
    both = min(len(first), len(second))
    pairs = torch.stack([first[:both], second[:both]], 1).flatten(0, 1)
    return torch.cat([pairs, first[both:], second[both:]])


def _apart(boxes: Tensor, count: int) -> Tensor:
    """The first of some boxes [n, 4] of which no two overlap by more than half: [at most count, 4]"""
    order = -torch.arange(len(boxes), device=boxes.device).float()
    return boxes[suppress(boxes, order, 0.5, count)]


def _largest(where: Tensor) -> Box | None:
    """The box of the part of the level set that holds most; None where the map is empty."""
    above = where > _LEVEL * where.max()
    if not bool(above.any()):
        return None
    labels = components(above)
    return edges(where, labels == held(labels, where).argmax(), _LEVEL * float(where.max()))


@lru_cache(maxsize=1)
def _windows() -> Tensor:
    """Windows of all sizes, from a tenth of the picture's side to all of it, all over it: [n, 4]"""
    sizes = (2.8, 4, 5.6, 8, 11, 15, 20, 24, _CELLS)
    found = []
    for width in sizes:
        for height in sizes:
            if max(width / height, height / width) > 2.9:
                continue
            x, y = (
                torch.linspace(
                    0, _CELLS - size, int(np.ceil((_CELLS - size) / (size / 4))) + 1, device="cpu"
                )
                for size in (width, height)
            )
            corner = torch.cartesian_prod(x, y)
            found.append(torch.cat([corner, corner + corner.new_tensor([width, height])], 1))
    return torch.cat(found)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def _held(heat: Tensor, boxes: Tensor) -> Tensor:
    """What of a map lies in each of some boxes [n, 4]: [n]"""
    sums = F.pad(heat.double().cumsum(0).cumsum(1), (1, 0, 1, 0))  # up to each corner
    corners = torch.stack([boxes[:, [2, 0, 2, 0]], boxes[:, [3, 3, 1, 1]]], -1)  # [n, 4, (x, y)]
    at = corners.double() / _CELLS * 2 - 1
    found = F.grid_sample(sums[None, None], at[None], mode="bilinear", align_corners=True)[0, 0]
    return (found[:, 0] - found[:, 1] - found[:, 2] + found[:, 3]).float()


def _agreement(mask: Tensor, windows: Tensor) -> Tensor:
    """Intersection over union of a mask with each window: [n]"""
    shared = _held(mask.float(), windows)
    return shared / (_areas(windows) + mask.sum() - shared)


def _salience(heat: Tensor, windows: Tensor) -> Tensor:
    """How much more there is in each window than in its surroundings, over the root of its area: [n]"""
    heat = heat / heat.sum().clamp(min=1e-12)
    centre, reach = (windows[:, :2] + windows[:, 2:]) / 2, (windows[:, 2:] - windows[:, :2]) * 0.75
    around = torch.cat([centre - reach, centre + reach], 1).clamp(0, _CELLS)
    inside, area = _held(heat, windows), _areas(windows)
    ring = (_areas(around) - area).clamp(min=1e-3 * _CELLS**2)
    return (inside - (_held(heat, around) - inside) / ring * area) / area.sqrt()
