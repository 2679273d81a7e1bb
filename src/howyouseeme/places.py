"""Where in the input a place of a feature map lies.

A place moves with the calls that made it: a stride spreads places, a crop shifts them, a flip turns
them around. `layouts` follows them through the links of a plan, axis by axis.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from .backtrack import Plan
from .links import (
    Convolution,
    Diagonal,
    Link,
    Matrix,
    Moves,
    Pad,
    Permutation,
    Selection,
    Separable,
)
from .tape import Value

__all__ = ["Layout", "Line", "layouts", "onto_input", "spatial"]

#: Positions along an axis: float64 [size].
Line = np.ndarray

#: For an axis of a value, the axis of the input along which it runs, and where each of its indices
#: lies on that, in pixels of the input: the centre of what it saw.
Layout = dict[int, tuple[int, Line]]


def layouts(plan: Plan, source: Value) -> dict[Value, Layout]:
    """For each value that depends on an input [batch, channel, ...], the axes whose places are known.

    >>> layouts(plan(tape, tape.output), tape.inputs[0])[value][2]     # height
    (2, array([ 15.5,  47.5,  79.5, ...]))

    An axis is missing where its places mixed with others (tokens of a flattened map, a spectrum).
    """
    if source in plan.layouts:
        return plan.layouts[source]
    start: Layout = {
        axis: (axis, np.arange(size, dtype=float))
        for axis, size in enumerate(source.shape[2:], start=2)
    }
    found = {source: start}
    # Where the same elements lay, in the same order, when the most was known of them.
    known: dict[Value, tuple[torch.Size, Layout]] = {}
    for value, step in reversed(plan.steps):
        options = []
        for item, link in step.links:
            if item not in found:
                continue
            layout = _carried(link, found[item], step.apart)
            shape, before = known.get(item, (item.shape, found[item]))
            if isinstance(link, Diagonal) and len(before) > len(layout):
                again = _carried(Diagonal(shape, value.shape), before)
                layout = again if len(again) > len(layout) else layout
                if len(before) > len(layout):
                    known[value] = shape, before
            options.append(layout)
        if step.apart and value.shape[:1] != source.shape[:1] and options:
            options = [max(options, key=len)]  # views, one behind the other: the first is told
        if options:
            partly = step.apart or any(isinstance(link, Moves) for _, link in step.links)
            found[value] = _merged(options) if partly else _common(options)
    plan.layouts[source] = {
        value: {axis: place for axis, place in layout.items() if not _unknown(place)}
        for value, layout in found.items()
    }
    return plan.layouts[source]


def spatial(plan: Plan) -> dict[Value, int]:
    """The values with a place for each axis of an input and one axis of channels: which axis that is."""
    found = {}
    for source in plan.inputs:
        for value, layout in layouts(plan, source).items():
            axes = set(range(1, len(value.shape))) - set(layout)
            if len(layout) == len(source.shape) - 2 > 0 and len(axes) == 1 and 0 not in layout:
                found[value] = axes.pop()
    return found


def onto_input(evidence: Tensor, layout: Layout, size: torch.Size) -> Tensor | None:
    """A map [batch, ...] over the axes of a layout, drawn over the input: [batch, *size].

    Linear between the places, constant beyond the last. None if an axis of the input has no places.
    """
    order = {of: (axis, line) for axis, (of, line) in layout.items()}
    if sorted(order) != list(range(2, 2 + len(size))):
        return None
    axes = [order[of][0] for of in sorted(order)]
    drawn = evidence.permute(0, *[sorted(layout).index(axis) + 1 for axis in axes])
    for axis, pixels in enumerate(size):
        matrix = _interpolation(order[axis + 2][1].astype(float).tobytes(), pixels).to(drawn)
        # Which puts the new axis last: in turn, all.
        drawn = torch.tensordot(drawn, matrix, dims=([1], [1]))
    return drawn


@lru_cache(maxsize=16)
def _interpolation(places: bytes, pixels: int) -> Tensor:
    """The matrix [pixels, places] float64 that draws a line through the values at the places of a `Line`.

    What places have that lie at the same spot (copies side by side) adds up.
    """
    line = np.frombuffer(places)
    spots, of = np.unique(line, return_inverse=True)
    unit, pixel = np.eye(len(spots)), np.arange(pixels)
    matrix = np.stack([np.interp(pixel, spots, column) for column in unit], 1)
    return torch.from_numpy(matrix[:, of])


def _common(options: list[Layout]) -> Layout:
    """What branches of one picture agree on; where they see different parts of it, no place is known: NaN."""
    first = max(options, key=len)
    if len(options) == 1:
        return first
    return {
        axis: place if _agree(axis, place, options) else (place[0], np.full(len(place[1]), np.nan))
        for axis, place in first.items()
    }


def _unknown(place: tuple[int, Line]) -> bool:
    return bool(np.isnan(place[1]).all())


def _agree(axis: int, place: tuple[int, Line], options: list[Layout]) -> bool:
    """Whether all who know an axis have most of its places where these are, within the distance of two."""
    of, line = place
    for option in options:
        other_of, other = option.get(axis, place)
        if other_of == of and other is line:  # as most are: no more than this is asked of them
            continue
        if other_of != of or _unknown((of, other)):
            return False
        if np.array_equal(line, other):
            continue
        apart = np.abs(line - other)
        apart = apart[~np.isnan(apart)]
        if len(apart) and np.median(apart) > max(_spacing(line), _spacing(other)):
            return False
    return True


def _spacing(line: Line) -> float:
    """The largest distance between neighbouring places that differ; anything if all are the same."""
    places = np.unique(line[~np.isnan(line)])
    return float(np.diff(places).max()) if len(places) > 1 else np.inf


def _merged(options: list[Layout]) -> Layout:
    """Branches of one picture agree on where its places are, or (side by side) each knows some."""
    merged = {}
    for axis, (of, line) in _common(options).items():
        gaps = np.isnan(line)
        if gaps.all() or not gaps.any():
            merged[axis] = of, line
            continue
        known = line
        for option in options:
            if axis in option:
                known = np.where(np.isnan(known), option[axis][1], known)
        merged[axis] = of, _filled(known)
    return merged


def _carried(link: Link, layout: Layout, apart: bool = False) -> Layout:
    """The layout of a link's output, given that of its input; `apart` from it may lie those of others."""
    carried = {}
    for axis, (out, position) in _centres(link, set(layout), apart).items():
        of, line = layout[axis]
        if position is None:
            carried[out] = of, line
        elif len(position) > 1:
            carried[out] = of, _read(line, position)
    return carried


def _centres(link: Link, axes: set[int], apart: bool = False) -> dict[int, tuple[int, Line | None]]:
    """For axes of a link's input, the output's axis that runs along it, and what of it that sees.

    That is the fractional index of the middle of each window; None where nothing moved.
    """
    if isinstance(link, Convolution):
        return {axis: (axis, _window(link, axis - 2)) for axis in axes if axis >= 2}
    if isinstance(link, Separable):
        return _separable(link, axes)
    if isinstance(link, Moves):
        return _moved(link, axes, apart)
    if isinstance(link, Matrix):
        same = link.in_shape[:-1] == link.out_shape[:-1]
        return {axis: (axis, None) for axis in axes if same and axis < len(link.in_shape) - 1}
    return _reshaped(link, axes) if isinstance(link, Diagonal) else {}


def _window(link: Convolution, axis: int) -> Line | None:
    """The centre of each window of a convolution."""
    count, stride, pad = link.out_shape[axis + 2], link.stride[axis], link.padding[axis]
    reach = link.dilation[axis] * (link.weight.shape[axis + 2] - 1) / 2
    if link.back:
        return (np.arange(count) + pad - reach) / stride
    if stride == 1 and pad == reach:
        return None
    return _centred(np.arange(count) * stride - pad + reach, stride, link.in_shape[axis + 2])


def _centred(centre: Line, stride: float, size: int) -> Line:
    """Windows that cover an axis from edge to edge lie in its middle.

    With a stride of two the padding is never the same on both sides, and half a pixel a stage adds up
    to half a place; training undoes that shift, as maps that are enlarged from edge to edge show.
    """
    if len(centre) * stride < size:
        return centre
    centred: Line = centre - centre.mean() + (size - 1) / 2
    return centred


def _separable(link: Separable, axes: set[int]) -> dict[int, tuple[int, Line | None]]:
    kept: dict[int, tuple[int, Line | None]] = {}
    dropped = link.matrices.keys() if len(link.out_shape) < len(link.in_shape) else set()
    for axis in axes - dropped:
        out = axis - sum(other < axis for other in dropped)
        kept[axis] = out, None
        if axis in link.matrices:
            matrix = link.matrices[axis].double().cpu().numpy()
            centre = matrix @ np.arange(matrix.shape[1]) / np.maximum(matrix.sum(1), 1e-12)
            if len(centre) > 1:
                centre = _centred(centre, float(np.median(np.diff(centre))), matrix.shape[1])
            kept[axis] = out, centre
    return kept


def _padded(link: Pad, axis: int, apart: bool) -> Line | None:
    """Padding lies where the line would go on; cropping leaves the rest where it is.

    Where another input may lie instead (`apart`) nothing is known.
    """
    behind = 2 * (len(link.in_shape) - 1 - axis)
    before, after = (*link.margins, *[0] * behind, 0, 0)[behind : behind + 2]
    if not before and not after:
        return None
    place = np.arange(link.out_shape[axis], dtype=float) - before
    if apart:
        return np.where((place >= 0) & (place < link.in_shape[axis]), place, np.nan)
    return place + _uneven(max(before, 0), max(after, 0))


def _uneven(before: int, after: int) -> float:
    """One more on one side makes strides fit, and moves nothing: what was there stays in the middle."""
    return (before - after) / 2 if abs(before - after) == 1 else 0.0


def _reshaped(link: Diagonal, axes: set[int]) -> dict[int, tuple[int, Line | None]]:
    """An axis stays itself if it has the same size, and as much behind it; cut in equal parts, these are it."""
    if link.in_shape == link.out_shape:
        return {axis: (axis, None) for axis in axes}
    outputs = {
        (size, prod(link.out_shape[axis + 1 :])): axis for axis, size in enumerate(link.out_shape)
    }
    kept: dict[int, tuple[int, Line | None]] = {}
    for axis in axes:
        here = link.in_shape[axis], prod(link.in_shape[axis + 1 :])
        if here[0] > 1 and here in outputs:
            kept[axis] = outputs[here], None
            continue
        for (count, behind), out in outputs.items():
            each = behind // here[1]  # places in a part
            if 1 < count < here[0] and count * each == here[0] and behind == each * here[1]:
                kept[axis] = out, np.arange(count) * each + (each - 1) / 2
    return kept


def _moved(link: Moves, axes: set[int], apart: bool) -> dict[int, tuple[int, Line | None]]:
    if isinstance(link, Pad):
        return {axis: (axis, _padded(link, axis, apart)) for axis in axes}
    if isinstance(link, Permutation):
        return {axis: (link.axes.index(axis), None) for axis in axes}
    return _selected(link, axes) if isinstance(link, Selection) else {}


def _selected(link: Selection, axes: set[int]) -> dict[int, tuple[int, Line | None]]:
    """As the selection itself tells, or as it looks."""
    if link.centres is not None:
        kept: dict[int, tuple[int, Line | None]] = {}
        for axis in axes & link.centres.keys():
            centre = link.centres[axis].numpy()
            if len(centre) > 1:
                stride = float(np.median(np.diff(centre)))
                kept[axis] = axis, _centred(centre, stride, link.in_shape[axis])
        return kept
    if link.in_shape == link.out_shape:
        own = torch.arange(len(link.index), device=link.index.device)
        if bool(((link.index == own) | (link.index < 0)).all()):  # a mask, which moves nothing
            return {axis: (axis, None) for axis in axes}
    return _read_off(link, axes)


def _read_off(link: Selection, axes: set[int]) -> dict[int, tuple[int, Line | None]]:
    """Along lines through two elements; an axis that looks different from each is lost."""
    kept: dict[int, tuple[int, Line | None]] = {}
    index = link.index.reshape(link.out_shape)
    every = max(len(link.index) // _LOOKED_AT, 1)
    there = torch.nonzero(link.index[::every] >= 0)[:, 0] * every
    if not len(there) or not link.out_shape:
        return kept
    points = there[[len(there) // 2, len(there) // 5]]
    lines = []
    for point in torch.stack(torch.unravel_index(points, link.out_shape), 1).tolist():
        for out in range(len(link.out_shape)):
            place = [*point[:out], slice(None), *point[out + 1 :]]
            lines.append((out, index[tuple(place)].cpu().numpy()))
    for axis in axes:
        size, behind = link.in_shape[axis], prod(link.in_shape[axis + 1 :])
        along: dict[int, list[Line]] = {}
        for out, line in lines:
            position = np.where(line < 0, np.nan, line // behind % size)
            if _varies(position):
                along.setdefault(out, []).append(position)
        if len(along) != 1:
            continue
        out, seen = along.popitem()
        if len(seen) == 2 and _same(*seen):
            kept[axis] = out, np.where(np.isnan(seen[0]), seen[1], seen[0])
    return kept


#: So many elements are looked at to find two that are no padding.
_LOOKED_AT = 4099


def _varies(position: Line) -> bool:
    known = position[~np.isnan(position)]
    return bool((known != known[:1]).any())


def _same(one: Line, other: Line) -> bool:
    return bool(((one == other) | np.isnan(one) | np.isnan(other)).all())


def _filled(position: Line) -> Line:
    """As `_padded`, for padding that shows as places without a source."""
    known = np.nonzero(~np.isnan(position))[0]
    if len(known) in {1, len(position)}:
        alone: Line = np.nan_to_num(position, nan=float(position[known[0]]))
        return alone
    index = np.arange(len(position))
    upper = np.searchsorted(known, index).clip(1, len(known) - 1)
    rank = upper - 1 + (index - known[upper - 1]) / (known[upper] - known[upper - 1])
    return _read(position[known], rank + _uneven(known[0], len(position) - 1 - known[-1]))


def _read(line: Line, position: Line) -> Line:
    """A line read at fractional indices, on the line through the nearest two also beyond its ends."""
    lower = np.floor(np.nan_to_num(position)).clip(0, max(len(line) - 2, 0)).astype(int)
    upper = (lower + 1).clip(max=len(line) - 1)
    read: Line = line[lower] + (position - lower) * (line[upper] - line[lower])
    return read
