"""Measures on maps, boxes and a `predict` function.

>>> saliency = explanation.saliency[0]                     # [height, width]
>>> pointing(saliency, boxes), energy(saliency, boxes)     # boxes [n, 4]: x0, y0, x1, y1

Three things are common to all of them:

- A *map* is [height, width], a tensor or an array, the evidence for one class at each pixel. Only its
  positive part counts; a map with none scores the worst that there is, and one with NaN is refused.
- *Boxes* are [n, 4]: x0, y0, x1, y1 in pixels of the map, x1 and y1 exclusive, n at least 1. They are all
  boxes of the class in that image.
- `predict` takes a batch [n, channel, height, width] and returns probabilities [n, classes].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..errors import InputError

__all__ = [
    "IOUS",
    "THRESHOLDS",
    "Interval",
    "bootstrap",
    "box_hits",
    "box_ious",
    "deletion",
    "energy",
    "grid_share",
    "insertion",
    "inside",
    "intersection_over_union",
    "largest_region",
    "pointing",
    "rank_correlation",
    "road",
    "structural_similarity",
]

Array = np.ndarray[Any, np.dtype[Any]]

#: A map: [height, width].
Map = ArrayLike | Tensor

#: From a batch [n, channel, height, width] to probabilities [n, classes].
Predict = Callable[[Tensor], Tensor]

#: The thresholds that boxes are tried at, as shares of the map's range.
THRESHOLDS: tuple[float, ...] = tuple(np.linspace(0.05, 0.95, 37).tolist())

#: The overlaps at which a box counts as found (Choe et al. 2020, MaxBoxAccV2).
IOUS: tuple[float, ...] = (0.3, 0.5, 0.7)


# -- maps and boxes -------------------------------------------------------------------------------


def pointing(saliency: Map, boxes: ArrayLike, tolerance: float = 15) -> float:
    """Is the strongest place inside a box, or no further from it than `tolerance` pixels?

    >>> pointing(saliency, [[30, 23, 165, 182]])
    1.0

    1 or 0; where several pixels share the maximum, the share of them that hit. The distance is taken
    along each axis. A map without positive evidence points nowhere: 0. Pointing game, Zhang et al. 2016
    (arXiv 1608.00507).
    """
    positive, corners = _positive(saliency), _boxes(boxes)
    highest = positive.max()
    if highest <= 0:
        return 0.0
    y, x = (axis[:, None] for axis in np.nonzero(positive == highest))
    x0, y0, x1, y1 = corners.T
    near_x = (x >= x0 - tolerance) & (x <= x1 - 1 + tolerance)
    near_y = (y >= y0 - tolerance) & (y <= y1 - 1 + tolerance)
    return float((near_x & near_y).any(1).mean())


def energy(saliency: Map, boxes: ArrayLike) -> float:
    """The share of the map's evidence that lies inside the boxes, 0..1.

    >>> energy(saliency, [[30, 23, 165, 182]])
    0.84

    Energy-based pointing game, Wang et al. 2020 (Score-CAM, arXiv 1910.01279). Where boxes overlap,
    evidence counts once; a map without positive evidence has 0.
    """
    positive = _positive(saliency)
    return _share(positive, inside(boxes, positive.shape))


def inside(boxes: ArrayLike, shape: Sequence[int]) -> Array:
    """Which pixels lie inside any of the boxes: bool [height, width].

    >>> inside([[30, 23, 165, 182]], (224, 224)).mean()

    Edges are rounded to whole pixels; what reaches out of the map is cut off.
    """
    covered = np.zeros(tuple(shape), dtype=bool)
    for x0, y0, x1, y1 in np.rint(_boxes(boxes)).astype(int).clip(min=0):
        covered[y0:y1, x0:x1] = True
    return covered


def grid_share(saliency: Map, cell: int, rows: int = 2, columns: int = 2) -> float:
    """In a grid of images, the share of the evidence inside the cell of the asked class, 0..1.

    >>> grid_share(saliency, cell=3)             # the lower right of 2 x 2; chance is 0.25

    Cells count from 0 along the rows. GridPG, Böhle et al. 2021 (CoDA Nets, arXiv 2104.00032), Rao et
    al. 2022 (arXiv 2205.10435). A map without positive evidence has 0.

    Raises:
        InputError: the map can't be cut into such cells, or has no such cell.
    """
    positive = _positive(saliency)
    height, width = positive.shape
    if height % rows or width % columns or not 0 <= cell < rows * columns:
        raise InputError(
            f"A map of {height} x {width} pixels has no cell {cell} of {rows} x {columns} cells of one size."
        )
    down, right = divmod(cell, columns)
    tall, wide = height // rows, width // columns
    there = np.zeros(positive.shape, dtype=bool)
    there[down * tall : (down + 1) * tall, right * wide : (right + 1) * wide] = True
    return _share(positive, there)


# -- boxes from maps ------------------------------------------------------------------------------


def largest_region(mask: ArrayLike, diagonal: bool = False) -> tuple[int, int, int, int] | None:
    """The box x0, y0, x1, y1 of the largest connected region of a bool mask [height, width].

    >>> largest_region(saliency > 0.3)
    (28, 20, 170, 185)

    x1 and y1 are exclusive. Pixels that touch at a corner belong together only if `diagonal`. Of equally
    large regions that with the first pixel, row by row; None if there is no pixel.
    """
    there = np.asarray(mask, dtype=bool)
    height, width = there.shape
    # Runs of each row are the nodes, those that touch in the next row their neighbours.
    edge = np.zeros((height, 1), dtype=np.int8)
    change = np.diff(there.astype(np.int8), axis=1, prepend=edge, append=edge)
    row, start = np.nonzero(change == 1)
    stop = np.nonzero(change == -1)[1]
    if not len(row):
        return None
    run = np.cumsum(change[:, :width] == 1).reshape(height, width) - 1
    shifts = (0, 1, -1) if diagonal else (0,)
    pairs = []
    for shift in shifts:
        upper = slice(max(shift, 0), width + min(shift, 0))
        lower = slice(max(-shift, 0), width + min(-shift, 0))
        touch = there[:-1, upper] & there[1:, lower]
        pairs.append(np.stack([run[:-1, upper][touch], run[1:, lower][touch]]))
    region = _components(len(row), np.concatenate(pairs, axis=1))
    sizes = np.bincount(region, weights=stop - start)
    mine = region == sizes.argmax()
    return (
        int(start[mine].min()),
        int(row[mine].min()),
        int(stop[mine].max()),
        int(row[mine].max()) + 1,
    )


def _components(count: int, edges: Array) -> Array:
    """For each of `count` nodes the first node that it is connected to, by `edges` [2, n]."""
    parent = np.arange(count)
    while edges.shape[1]:
        low, high = np.sort(edges, axis=0)
        np.minimum.at(parent, high, low)
        while True:
            above = parent[parent]
            if np.array_equal(above, parent):
                break
            parent = above
        edges = parent[edges]
        edges = edges[:, edges[0] != edges[1]]
    return parent


def intersection_over_union(box: ArrayLike, boxes: ArrayLike) -> Array:
    """The overlap of a box with each of several: [n], 0..1.

    >>> intersection_over_union((0, 0, 10, 10), [[0, 0, 10, 5]])
    array([0.5])
    """
    mine, corners = _boxes(np.reshape(box, (1, 4)))[0], _boxes(boxes)
    wide = np.minimum(mine[2], corners[:, 2]) - np.maximum(mine[0], corners[:, 0])
    tall = np.minimum(mine[3], corners[:, 3]) - np.maximum(mine[1], corners[:, 1])
    both = wide.clip(min=0) * tall.clip(min=0)
    areas = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    union: Array = (mine[2] - mine[0]) * (mine[3] - mine[1]) + areas - both
    overlap: Array = both / union.clip(min=np.finfo(float).tiny)
    return overlap


def box_ious(saliency: Map, boxes: ArrayLike, thresholds: Sequence[float] = THRESHOLDS) -> Array:
    """At each threshold the overlap [thresholds] of the largest region's box with the best true box.

    >>> box_ious(saliency, boxes).max()

    The map is scaled from its minimum 0 to its maximum 1; a region is what reaches the threshold, pixels
    that touch at an edge. Overlap is intersection over union. An empty or uniform map has no region: 0.
    After Choe et al. 2020 (arXiv 2001.07437).
    """
    positive = _positive(saliency)
    scaled = positive - positive.min()
    highest = scaled.max()
    ious = np.zeros(len(thresholds))
    if highest <= 0:
        return ious
    scaled = scaled / highest
    for i, threshold in enumerate(thresholds):
        found = largest_region(scaled >= threshold)
        if found is not None:
            ious[i] = intersection_over_union(found, boxes).max()
    return ious


def box_hits(curves: ArrayLike, iou: float = 0.5, half: ArrayLike | None = None) -> Array:
    """Is the box found, the threshold being the best of the other half? bool [images]

    >>> box_hits([box_ious(saliency, boxes) for saliency, boxes in ...]).mean()

    Args:
        curves: [images, thresholds], the overlaps of `box_ious`.
        iou: the overlap that it takes.
        half: [images], False or True: which half an image is in; every second one, by default.

    For each half the threshold is chosen that finds most in the other (of equals the lowest), so no
    image has a say in its own threshold. The mean is MaxBoxAcc, over `IOUS` as well MaxBoxAccV2, of Choe et
    al. 2020 (arXiv 2001.07437), but that these choose on the images that they score.

    Raises:
        InputError: a half has no image.
    """
    found = np.asarray(curves, dtype=float) >= iou
    side = np.arange(len(found)) % 2 == 1 if half is None else np.asarray(half, dtype=bool)
    if side.all() or not side.any():
        raise InputError(
            "Choosing the threshold on one half of the images takes at least one image in each half."
        )
    hits = np.zeros(len(found), dtype=bool)
    for mine in (side, ~side):
        hits[mine] = found[mine][:, found[~mine].mean(0).argmax()]
    return hits


# -- does the answer follow the evidence? ---------------------------------------------------------


def insertion(
    predict: Predict,
    image: Tensor,
    target: int,
    saliency: Map,
    steps: int = 16,
    blur: float = 25,
) -> float:
    """The probability of the class, averaged while pixels come back into a blurred image; high is good.

    >>> insertion(lambda x: model(x).softmax(1), image, 281, saliency)

    Args:
        image: [channel, height, width], ready for the model.
        steps: in so many equal steps the pixels come, those with most evidence first; equal ones row by row.
        blur: the standard deviation of the Gaussian, in pixels, mirrored at the border.

    The area under the curve, 0..1, by the trapezoid rule. RISE, Petsiuk et al. 2018 (arXiv 1806.07421).

    Raises:
        InputError: there are no steps, or no blur.
    """
    if not blur > 0:
        raise InputError(f"A blur of {blur:g} pixels leaves the image as it is: give more than 0.")
    return _area(predict, image, target, saliency, steps, _blurred(image, blur), True)


def deletion(predict: Predict, image: Tensor, target: int, saliency: Map, steps: int = 16) -> float:
    """The probability of the class, averaged while pixels become the image's mean colour; low is good.

    >>> deletion(lambda x: model(x).softmax(1), image, 281, saliency)

    As `insertion`, with the pixels with most evidence leaving first.
    """
    mean = image.mean((1, 2), keepdim=True).expand_as(image)
    return _area(predict, image, target, saliency, steps, mean, False)


def _area(
    predict: Predict,
    image: Tensor,
    target: int,
    saliency: Map,
    steps: int,
    without: Tensor,
    inserting: bool,
) -> float:
    if steps < 1:
        raise InputError(f"Pixels can't go in {steps} steps: give 1 or more.")
    rank = _ranks(saliency, image)
    batch = []
    for step in range(steps + 1):
        first = rank < rank.numel() * step // steps
        batch.append(torch.where(first if inserting else ~first, image, without))
    curve = _probability(predict, torch.stack(batch), target)
    return float((curve[1:] + curve[:-1]).mean() / 2)


def road(
    predict: Predict,
    image: Tensor,
    target: int,
    saliency: Map,
    shares: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    noise: float = 0.01,
    seed: int = 0,
) -> float:
    """Half of what the probability falls further if the most rather than the least evident pixels go.

    >>> road(lambda x: model(x).softmax(1), image, 281, saliency)

    Args:
        image: [channel, height, width], ready for the model.
        shares: of all pixels, that are removed; the result is the mean over them.
        noise: its standard deviation, as a share of that of the image.

    -0.5..0.5, high is good, 0 what an uninformed map gets. What is removed is filled in from its
    surroundings, so that the shape of the hole tells nothing: ROAD, Rong et al. 2022 (arXiv
    2202.00449), combined as in grad-cam's ROADCombined. Its linear equations are solved to a few percent
    of the image's contrast: from coarse to fine, ten sweeps at each size.
    """
    rank = _ranks(saliency, image)
    count = rank.numel()
    most = [rank < round(count * share) for share in shares]
    least = [rank >= count - round(count * share) for share in shares]
    removed = torch.stack(most + least)[:, None]
    filled = _filled(image.expand(len(removed), *image.shape), removed)
    generator = torch.Generator("cpu").manual_seed(seed)
    grain = torch.randn(image.shape, generator=generator, device="cpu").to(image)
    grain = grain * image.std() * noise
    curve = _probability(predict, torch.where(removed, filled + grain, image), target)
    return float((curve[len(shares) :] - curve[: len(shares)]).mean() / 2)


def _filled(images: Tensor, removed: Tensor, sweeps: int = 10) -> Tensor:
    """[n, channel, height, width] with the pixels removed [n, 1, height, width] drawn from the others.

    Each becomes the mean of its neighbours, those at a corner counting half.
    """
    known = (~removed).to(images)
    height, width = images.shape[2:]
    if min(height, width) > 1:
        pool = torch.nn.functional.avg_pool2d
        share = pool(known, 2, ceil_mode=True, count_include_pad=False)
        coarse = pool(images * known, 2, ceil_mode=True, count_include_pad=False)
        coarse = coarse / share.clamp(min=1e-6)
        below = _filled(coarse, share == 0, sweeps)
        guess = torch.nn.functional.interpolate(below, size=(height, width), mode="bilinear")
    else:
        total = known.sum((2, 3), keepdim=True)
        guess = ((images * known).sum((2, 3), keepdim=True) / total.clamp(min=1)).expand_as(images)
    filled = torch.where(removed, guess, images)
    for _ in range(sweeps):
        padded = torch.nn.functional.pad(filled, (1, 1, 1, 1), mode="replicate")
        rows = padded[..., :-2, :] + padded[..., 2:, :] + 2 * padded[..., 1:-1, :]
        around = rows[..., :-2] + rows[..., 2:] + 2 * rows[..., 1:-1] - 4 * filled
        filled = torch.where(removed, around / 12, filled)
    return filled


def _ranks(saliency: Map, image: Tensor) -> Tensor:
    """[height, width]: how many pixels come before each."""
    positive = _positive(saliency)
    if positive.shape != tuple(image.shape[1:]):
        raise InputError(
            f"The map has {positive.shape[0]} x {positive.shape[1]} pixels, the image "
            f"{' x '.join(map(str, image.shape[1:]))}."
        )
    order = np.argsort(-positive.ravel(), kind="stable")
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return torch.from_numpy(rank).reshape(positive.shape).to(image.device)


@torch.no_grad()
def _probability(predict: Predict, batch: Tensor, target: int) -> Array:
    found: Array = predict(batch)[:, target].double().cpu().numpy()
    return found


def _blurred(image: Tensor, sigma: float) -> Tensor:
    reach = int(3 * sigma + 0.5)
    offset = torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel = (kernel / kernel.sum()).reshape(1, 1, -1)
    for axis in (1, 2):
        moved = image.movedim(axis, -1)
        size = moved.shape[-1]
        # Mirrored without the edge pixel twice, however far the kernel reaches.
        at = torch.arange(-reach, size + reach, device=image.device).abs() % max(2 * size - 2, 1)
        at = torch.minimum(at, (2 * size - 2 - at).clamp(min=0)) if size > 1 else at * 0
        rows = moved[..., at].reshape(-1, 1, size + 2 * reach)
        blurred = torch.nn.functional.conv1d(rows, kernel).reshape(moved.shape)
        image = blurred.movedim(-1, axis)
    return image


# -- comparing ------------------------------------------------------------------------------------


def rank_correlation(one: Map, other: Map) -> float:
    """Spearman's rank correlation of two maps, -1..1.

    >>> first, second = explainer.top(photo, k=2)
    >>> rank_correlation(first.saliency[0], second.saliency[0])      # low: the maps tell classes apart

    Equal values share their mean rank; here negative evidence counts, too. Two uniform maps correlate
    by 1, a uniform one with any other by 0.

    Raises:
        InputError: the maps differ in shape.
    """
    a, b = _map(one), _map(other)
    if a.shape != b.shape:
        raise InputError(f"The maps have different shapes, {a.shape} and {b.shape}.")
    x, y = _mean_ranks(a), _mean_ranks(b)
    spread = float(np.sqrt((x**2).sum() * (y**2).sum()))
    if spread == 0:
        return float(not x.any() and not y.any())
    return float((x * y).sum()) / spread


def _mean_ranks(values: Array) -> Array:
    """Ranks, equal values sharing theirs, minus their mean."""
    _, which, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Array = (last - (counts + 1) / 2)[which.ravel()]
    return ranks - (values.size - 1) / 2


def structural_similarity(one: Map, other: Map, sigma: float = 1.5) -> float:
    """How much two maps look alike, -1..1, 1 being the same: SSIM.

    >>> structural_similarity(saliency, saliency_of_a_randomised_network)      # low is good

    Each map's positive part is divided by its maximum; where both are empty, they are the same. Means and
    variances are taken in windows of 2 · round(3.5 sigma) + 1 pixels, weighted by a Gaussian of
    `sigma` pixels; windows that reach over the border don't count. Wang et al. 2004 (Image quality
    assessment), with their constants; used so by Adebayo et al. 2018 (Sanity checks for saliency maps,
    arXiv 1810.03292). Mind that places where both maps are 0 are alike: sparse maps have a high one.

    Raises:
        InputError: the maps differ in shape, or are smaller than a window.
    """
    a, b = (_scaled(torch.from_numpy(_positive(item))) for item in (one, other))
    if a.shape != b.shape:
        raise InputError(f"The maps have different shapes, {tuple(a.shape)} and {tuple(b.shape)}.")
    reach = int(3.5 * sigma + 0.5)
    if min(a.shape) < 2 * reach + 1:
        raise InputError(
            f"A map of {a.shape[0]} x {a.shape[1]} pixels is smaller than a window of "
            f"{2 * reach + 1} x {2 * reach + 1}: give a smaller sigma."
        )
    offset = torch.arange(-reach, reach + 1, dtype=a.dtype, device=a.device)
    line = torch.exp(-0.5 * (offset / sigma) ** 2)
    down = (line / line.sum()).reshape(1, 1, -1, 1)
    moments = torch.stack([a, b, a * a, b * b, a * b])[:, None]
    for window in (down, down.mT):
        moments = torch.nn.functional.conv2d(moments, window)
    x, y, xx, yy, xy = moments[:, 0]
    small, tiny = 0.03**2, 0.01**2
    alike = (2 * x * y + tiny) * (2 * (xy - x * y) + small)
    return float((alike / ((x * x + y * y + tiny) * (xx - x * x + yy - y * y + small))).mean())


def _scaled(positive: Tensor) -> Tensor:
    highest = positive.max()
    return positive / highest if highest > 0 else positive


class Interval(NamedTuple):
    """A mean, and the bounds of its confidence interval, in the unit of what it is of.

    >>> mean, low, high = bootstrap(hits)
    >>> mean, low, high = found.summary["evidence"]["energy"]    # of an Evaluation
    """

    mean: float
    low: float
    high: float


def bootstrap(
    values: ArrayLike, level: float = 0.95, samples: int = 2000, seed: int = 0
) -> Interval:
    """The mean over images [n] with its confidence interval, by drawing images with replacement.

    >>> bootstrap([1, 0, 1, 1])
    Interval(mean=0.75, low=0.25, high=1.0)

    Percentile bootstrap (Efron 1979). The same `seed` draws the same images, whatever the values. Values
    of [n, m] are m measures of each image, averaged.

    Raises:
        InputError: there are no values.
    """
    given = np.asarray(values, dtype=float)
    if not given.size:
        raise InputError("A mean of no values has no confidence interval.")
    each = given.reshape(len(given), -1).mean(1)
    draws = np.random.default_rng(seed).integers(0, len(each), (samples, len(each)))
    low, high = np.quantile(each[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(each.mean()), float(low), float(high))


# -- in -------------------------------------------------------------------------------------------


def _map(saliency: Map) -> Array:
    if isinstance(saliency, Tensor):
        saliency = saliency.detach().double().cpu().numpy()
    values = np.asarray(saliency, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise InputError(f"A map has the shape [height, width], not {list(values.shape)}.")
    if not np.isfinite(values).all():
        raise InputError("The map has NaN or infinite values.")
    return values


def _positive(saliency: Map) -> Array:
    return _map(saliency).clip(min=0)


def _boxes(boxes: ArrayLike) -> Array:
    corners = np.asarray(boxes, dtype=np.float64)
    if corners.ndim != 2 or corners.shape[1] != 4 or not len(corners):
        raise InputError(
            f"Boxes have the shape [n, 4], x0, y0, x1, y1, n at least 1, not {list(corners.shape)}."
        )
    return corners


def _share(positive: Array, where: Array) -> float:
    total = float(positive.sum())
    return float(positive[where].sum()) / total if total > 0 else 0.0
