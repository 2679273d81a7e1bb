"""All measures of one image, and what they come to over many."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .measures import (
    IOUS,
    Array,
    Interval,
    Predict,
    bootstrap,
    box_hits,
    box_ious,
    deletion,
    energy,
    grid_share,
    insertion,
    inside,
    pointing,
    rank_correlation,
    road,
    structural_similarity,
)

__all__ = [
    "MEASURES",
    "SURE",
    "Explain",
    "Grid",
    "Item",
    "Measure",
    "Settings",
    "make_grids",
    "score_grid",
    "score_image",
    "summarise",
    "values",
]

#: From an input [channel, height, width] and a class to a map [height, width].
Explain = Callable[[Tensor, int], Tensor]

#: Grids are made of images that the network is so sure of.
SURE = 0.9

#: Maps smaller than a window of `structural_similarity` are not compared.
SSIM_WINDOW = 11


class Measure(NamedTuple):
    """One column of a table."""

    key: str
    title: str
    high_is_good: bool


MEASURES = (
    Measure("pointing", "pointing", True),
    Measure("energy", "energy", True),
    Measure("box", "box IoU .5", True),
    Measure("box_mean", "mean .3 .5 .7", True),
    Measure("small_pointing", "small: pointing", True),
    Measure("small_box", "small: box", True),
    Measure("insertion", "insertion", True),
    Measure("deletion", "deletion", False),
    Measure("road", "ROAD", True),
    Measure("grid", "GridPG", True),
    Measure("second_class", "2nd class", False),
    Measure("randomised", "randomised", False),
    Measure("time", "time", False),
)


@dataclass(frozen=True, eq=False)
class Item:
    """One image as the network gets it.

    >>> item = found.items[0]                                # of an Evaluation
    >>> item.name, item.target, item.input.shape
    ('cat.jpg', 285, torch.Size([3, 224, 224]))

    - `input` [channel, height, width];
    - `target` and `second`: the classes that the network finds likeliest, and `probability` of the first;
    - `boxes` [n, 4] of the target in pixels of the input, x0, y0, x1, y1; None where they aren't known.
    """

    name: str
    input: Tensor
    target: int
    second: int | None
    probability: float
    boxes: Array | None = None

    @property
    def covered(self) -> float | None:
        """The share of the image inside the boxes."""
        if self.boxes is None:
            return None
        return float(inside(self.boxes, self.input.shape[1:]).mean())

    @property
    def small(self) -> bool:
        """Whether the boxes cover less than a quarter."""
        return self.covered is not None and self.covered < 0.25

    @property
    def scale(self) -> float:
        """How much smaller than 224 pixels the image is, 1 at most: distances shrink with it."""
        return min(1.0, min(self.input.shape[1:]) / 224)


@dataclass(frozen=True, eq=False)
class Grid:
    """Four images of different classes, 2 x 2, and the cells that are asked for."""

    name: str
    input: Tensor
    targets: tuple[int, ...]
    cells: tuple[int, ...] = (0, 3)


@dataclass(frozen=True)
class Settings:
    """How much is measured of each image.

    >>> evaluate(model, photos, settings=Settings(steps=8, road=False))

    - `steps`: of insertion and deletion, 1 or more: in so many equal parts pixels come and go;
    - `road`: whether ROAD is measured;
    - `second`: whether *2nd class* is, which takes an explanation of the class that is second likeliest;
    - `randomised`: whether *randomised* is, which takes one of the network with its last layer shuffled.

    What the measures tell, and whose they are: docs/evaluate.md.
    """

    steps: int = 16
    road: bool = True
    second: bool = True
    randomised: bool = True


def make_grids(items: Sequence[Item], count: int, seed: int = 0) -> list[Grid]:
    """Grids of images that the network is sure of, drawn at random: `count`, or none.

    >>> grids = make_grids(items, 20)

    None where less than four classes have images with a probability of at least 0.9.
    """
    sure = [item for item in items if item.probability >= SURE]
    if len({item.target for item in sure}) < 4:
        return []
    random = np.random.default_rng(seed)
    grids: list[Grid] = []
    while len(grids) < count:
        four = [sure[i] for i in random.choice(len(sure), 4, replace=False)]
        if len({item.target for item in four}) == 4:
            rows = [torch.cat([a.input, b.input], 2) for a, b in (four[:2], four[2:])]
            name = "+".join(item.name for item in four)
            grids.append(Grid(name, torch.cat(rows, 1), tuple(item.target for item in four)))
    return grids


def score_image(
    predict: Predict,
    explain: Explain,
    item: Item,
    settings: Settings | None = None,
    forgetful: Explain | None = None,
    bare: Predict | None = None,
) -> dict[str, Any]:
    """All measures of one image, ready for JSON.

    >>> score_image(predict, lambda x, target: explainer(x[None], target).saliency[0], item)["energy"]

    `predict` is that of the measures. `forgetful` explains the same network with its last layer
    randomised. `bare` is the forward pass that the time is a multiple of, `predict` by default.
    Distances (15 px around a box, a blur of 25 px) hold for 224 pixels, and shrink with smaller inputs.
    """
    settings = settings or Settings()
    forward = _seconds(lambda: (bare or predict)(item.input[None]).cpu())
    maps: list[Tensor] = []
    seconds = _seconds(lambda: maps.append(explain(item.input, item.target)))
    saliency = maps[0]
    asked = (predict, item.input, item.target, saliency, settings.steps)
    found: dict[str, Any] = {"forward": forward, "seconds": seconds, "time": seconds / forward}
    if item.boxes is not None:
        found["pointing"] = pointing(saliency, item.boxes, 15 * item.scale)
        found["energy"] = energy(saliency, item.boxes)
        found["boxes"] = [round(iou, 4) for iou in box_ious(saliency, item.boxes).tolist()]
    found["insertion"] = insertion(*asked, blur=25 * item.scale)
    found["deletion"] = deletion(*asked)
    if settings.road:
        found["road"] = road(*asked[:4])
    if settings.second and item.second is not None:
        found["second_class"] = rank_correlation(saliency, explain(item.input, item.second))
    if settings.randomised and forgetful is not None and min(saliency.shape) >= SSIM_WINDOW:
        found["randomised"] = structural_similarity(saliency, forgetful(item.input, item.target))
    return found


@torch.no_grad()
def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def score_grid(explain: Explain, grid: Grid) -> dict[str, Any]:
    """The share of the evidence in the asked cell, averaged over the cells asked for.

    >>> score_grid(explain, grid)
    {'grid': 0.97}
    """
    shares = [grid_share(explain(grid.input, grid.targets[cell]), cell) for cell in grid.cells]
    return {"grid": float(np.mean(shares))}


def values(
    items: Sequence[Item], images: Sequence[dict[str, Any]], grids: Sequence[dict[str, Any]] = ()
) -> dict[str, dict[str, float]]:
    """Each measure of each image or grid that has it: {measure: {name of the image: value}}.

    >>> values(items, [score_image(predict, explain, item) for item in items])["energy"]["cat.jpg"]

    The thresholds for boxes are chosen within these images, on every second for the others; that takes
    two images with boxes.
    """
    found: dict[str, dict[str, float]] = {measure.key: {} for measure in MEASURES}
    for item, scores in zip(items, images, strict=True):
        for key in found.keys() & scores.keys():
            found[key][item.name] = scores[key]
        if item.small and "pointing" in scores:
            found["small_pointing"][item.name] = scores["pointing"]
    for i, scores in enumerate(grids):
        found["grid"][str(i)] = scores["grid"]
    boxed = [
        (item, scores["boxes"])
        for item, scores in zip(items, images, strict=True)
        if "boxes" in scores
    ]
    if len(boxed) > 1:
        hits = [box_hits([curve for _, curve in boxed], iou) for iou in IOUS]
        for (item, _), hit in zip(boxed, np.stack(hits, 1).astype(float), strict=True):
            found["box"][item.name] = float(hit[IOUS.index(0.5)])
            found["box_mean"][item.name] = float(hit.mean())
            if item.small:
                found["small_box"][item.name] = float(hit[IOUS.index(0.5)])
    return found


def summarise(
    items: Sequence[Item], images: Sequence[dict[str, Any]], grids: Sequence[dict[str, Any]] = ()
) -> dict[str, Interval | None]:
    """Each measure's mean over the images with its 95 % interval; None where there is nothing to it.

    >>> summarise(items, [score_image(predict, explain, item) for item in items])["energy"]
    Interval(mean=0.84, low=0.81, high=0.87)

    Raises:
        InputError: two images have one name.
    """
    if len({item.name for item in items}) < len(items):
        raise InputError("Two images have one name: give each its own.")
    return intervals(values(items, images, grids))


def intervals(values: Mapping[str, Mapping[str, float]]) -> dict[str, Interval | None]:
    """The mean of each measure over its images with its 95 % interval; None where there is no image.

    >>> intervals({"energy": {"cat.jpg": 0.8, "dog.jpg": 0.9}})["energy"].mean
    """
    return {key: bootstrap(list(each.values())) if each else None for key, each in values.items()}
