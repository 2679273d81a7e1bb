"""Calls that read a feature map between its places: RoI align, and sampling on a grid."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from ..links import Selection, Sparse
from ..links.matrices import sparse
from ..tape import Call, Value
from .branches import contents
from .registry import Refusal, Step, rule_of

rule = rule_of("regions")


def _bilinear(at: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two places [..., 2] on either side of positions along an axis, and their weights [..., 2].

    Places that lie outside have the weight 0.
    """
    low = at.floor()
    places = torch.stack([low, low + 1], -1)
    weights = torch.stack([low + 1 - at, at - low], -1)
    inside = (places >= 0) & (places < size)
    return places.clamp(0, size - 1).long(), weights * inside


def _roi_axis(start: Tensor, length: Tensor, bins: int, size: int, samples: Tensor) -> Tensor:
    """[regions, bins, size]: the mean over each bin's samples, along one axis."""
    most = int(samples.max()) if len(samples) else 1
    step = torch.arange(most, device=start.device, dtype=start.dtype)
    one = length / bins
    bin_ = torch.arange(bins, device=start.device, dtype=start.dtype)
    at = (
        start[:, None, None]
        + bin_[:, None] * one[:, None, None]
        + (step + 0.5) * (one / samples)[:, None, None]
    )  # [regions, bins, samples]
    used = (at >= -1) & (at <= size) & (step < samples[:, None, None])
    places, weights = _bilinear(at.clamp(0, size - 1), size)
    weights = weights * used[..., None] / samples[:, None, None, None].to(start.dtype)
    matrix = start.new_zeros(len(start), bins, size)
    return matrix.scatter_add_(2, places.flatten(2), weights.flatten(2))


@rule("torchvision.roi_align")
def roi_align(call: Call, output: Value) -> Step:
    """y = mean of x, bilinear in between, over a grid of samples in each bin of a fixed region"""
    x, regions, scale, height, width, ratio, aligned = call.args
    if not isinstance(x, Value):
        raise Refusal("only regions of computed features are supported")
    regions = contents(regions, x.data).to(torch.promote_types(x.dtype, torch.float32))
    image = regions[:, 0].long()
    left, top, right, bottom = (regions[:, 1:] * scale - (0.5 if aligned else 0.0)).unbind(1)
    matrices = []
    for start, end, bins, size in (
        (top, bottom, height, x.shape[2]),
        (left, right, width, x.shape[3]),
    ):
        length = end - start if aligned else (end - start).clamp(min=1)
        samples = torch.full_like(image, ratio) if ratio > 0 else (length / bins).ceil().long()
        # A region without extent has no samples, and counts as 0.
        matrices.append(_roi_axis(start, length, bins, size, samples.clamp(min=1)))
        if ratio <= 0:
            matrices[-1] = matrices[-1] * (samples > 0)[:, None, None]
    rows, columns = (matrix.to_sparse() for matrix in matrices)
    entries = _outer(rows, columns, image, x.shape[0])
    link = Sparse(
        x.shape,
        output.shape,
        entries.to(x.dtype) if x.dtype.itemsize >= 4 else entries,
        channels=x.shape[1],
        parts=(x.shape[0], len(regions)),
    )
    return Step([(x, link)])


@rule("torchvision.roi_pool")
def roi_pool(call: Call, output: Value) -> Step:
    """y = max of x over each bin of a fixed region, 0 where a bin is empty"""
    x, regions, at = call.args[0], call.args[1], call.outputs[1]
    if not isinstance(x, Value):
        raise Refusal("only regions of computed features are supported")
    assert at is not None
    channels, space = x.shape[1], x.shape[2:].numel()
    image = contents(regions, x.data)[:, 0].long().reshape(-1, 1, 1, 1)
    plane = image * channels + torch.arange(channels, device=x.device).reshape(1, -1, 1, 1)
    index = torch.where(at.data < 0, -1, plane * space + at.data)
    return Step([(x, Selection(x.shape, output.shape, index))])


def _outer(rows: Tensor, columns: Tensor, image: Tensor, images: int) -> Tensor:
    """[regions · bins², images · places²] from matrices [regions, bins, places] along y and x."""
    region, y, i = rows.coalesce().indices()
    other, x, j = columns.coalesce().indices()
    (regions, height, places_y), (_, width, places_x) = rows.shape, columns.shape
    # Entries of the same region meet: those of `columns` lie in a row, being sorted by region.
    count = torch.bincount(other, minlength=regions)
    first = count.cumsum(0) - count
    times = count[region]
    left = torch.repeat_interleave(torch.arange(len(region), device=region.device), times)
    run = torch.arange(len(left), device=region.device) - (times.cumsum(0) - times)[left]
    right = first[region[left]] + run
    row = (region[left] * height + y[left]) * width + x[right]
    column = (image[region[left]] * places_y + i[left]) * places_x + j[right]
    weight = rows.coalesce().values()[left] * columns.coalesce().values()[right]
    size = (regions * height * width, images * places_y * places_x)
    return sparse(torch.stack([row, column]), weight, size)


def _cubic(
    at: Tensor, size: int, padding: int, aligned: bool, a: float = -0.75
) -> tuple[Tensor, Tensor]:
    """The four places [..., 4] around positions along an axis, each as the padding says, and their weights."""
    low = at.floor()
    places = torch.stack([low - 1, low, low + 1, low + 2], -1)
    near = (at[..., None] - places).abs()
    weights = torch.where(
        near <= 1,
        ((a + 2) * near - (a + 3)) * near * near + 1,
        ((a * near - 5 * a) * near + 8 * a) * near - 4 * a,
    )
    places = _padded(places, size, padding, aligned)
    inside = (places >= 0) & (places < size)
    return places.clamp(0, size - 1).long(), weights * inside


def _place(at: Tensor, size: int, aligned: bool) -> Tensor:
    """Positions -1..1 along an axis as places 0..size - 1."""
    return (at + 1) / 2 * (size - 1) if aligned else ((at + 1) * size - 1) / 2


def _padded(at: Tensor, size: int, padding: int, aligned: bool) -> Tensor:
    """Places along an axis, with what lies outside as the padding says."""
    if padding == 2:  # turned back at the outer places, or at their outer edges
        low, span = (0.0, size - 1) if aligned else (-0.5, size)
        at = (at - low).abs() % (2 * span) if span else torch.zeros_like(at)
        at = torch.minimum(at, 2 * span - at) + low
    return at if padding == 0 else at.clamp(0, size - 1)


def _corners(
    axes: list[tuple[Tensor, Tensor]], shape: torch.Size
) -> Iterator[tuple[Tensor, Tensor]]:
    """The places around each position, over all axes as one, and their weights."""
    for sides in product(range(axes[0][0].shape[-1]), repeat=len(axes)):
        place, weight = axes[0][0].new_zeros(()), axes[0][1].new_ones(())
        for side, size, (places, weights) in zip(sides, shape, axes, strict=True):
            place = place * size + places[..., side]
            weight = weight * weights[..., side]
        yield place, weight


@rule("aten.grid_sampler_2d", "aten.grid_sampler_3d", "aten.cudnn_grid_sampler")
def grid_sampler(call: Call, output: Value) -> Step:
    """y = x between its places, at fixed positions"""
    x, grid, mode, padding, aligned = (*call.args, 0, 0, True)[
        :5
    ]  # cudnn's has these and no others
    if not isinstance(x, Value):
        raise Refusal("only sampling from computed features is supported")
    grid = contents(grid, x.data).to(torch.promote_types(x.dtype, torch.float32))
    images, space = len(grid), x.shape[2:]
    axes = []
    for at, size in zip(grid.flatten(1, -2).flip(-1).unbind(-1), space, strict=True):
        place = _place(at, size, aligned)
        if mode == 2:
            axes.append(_cubic(place, size, padding, aligned))
            continue
        place = _padded(place, size, padding, aligned)
        axes.append(_bilinear(place.round() if mode == 1 else place, size))
    places, weights = map(torch.stack, zip(*_corners(axes, space), strict=True))
    image = torch.arange(images, device=places.device)[:, None]
    columns = image * space.numel() + places  # [corners, images, positions]
    rows = torch.arange(weights[0].numel(), device=places.device).expand(len(weights), -1)
    used = weights.flatten() != 0
    entries = sparse(
        torch.stack([rows.flatten(), columns.flatten()])[:, used],
        weights.flatten()[used],
        (weights[0].numel(), images * space.numel()),
    )
    link = Sparse(x.shape, output.shape, entries, channels=x.shape[1], parts=(images, images))
    return Step([(x, link)])
