"""A slow, obviously right reference: what each call is, as a matrix.

Every function here is a plain loop written from the definition of the call, in float64, and shares
no code with howyouseeme (nor with PyTorch's kernels). It returns a `Map`: the matrix J with one row
for each output element and one column for each input element, both in row-major order, and the
bias, so that `output = J @ input + bias`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

Shape = Sequence[int]
Array = np.ndarray


class Map(NamedTuple):
    """`output = matrix @ input + bias`."""

    matrix: Array
    bias: Array


def size(shape: Shape) -> int:
    return math.prod(shape)


def places(shape: Shape) -> list[tuple[int, ...]]:
    """Every multi-index of a tensor, in row-major order."""
    return list(product(*map(range, shape)))


def flat(place: Shape, shape: Shape) -> int:
    """The row-major position of a multi-index."""
    position = 0
    for at, length in zip(place, shape, strict=True):
        assert 0 <= at < length
        position = position * length + at
    return position


def empty(in_shape: Shape, out_shape: Shape) -> Map:
    return Map(np.zeros((size(out_shape), size(in_shape))), np.zeros(size(out_shape)))


def compose(last: Map, first: Map) -> Map:
    """The map of `last` after `first`."""
    return Map(last.matrix @ first.matrix, last.matrix @ first.bias + last.bias)


# -- convolution ----------------------------------------------------------------------------------


def convolution(
    in_shape: Shape,
    weight: Array,
    bias: Array | None = None,
    *,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    groups: int = 1,
) -> Map:
    """y[n, o, p] = b[o] + sum over i, t of w[o, i, t] x[n, first of the group + i, p s - pad + t d]

    s is the stride and d the dilation.
    """
    samples, channels, *space = in_shape
    outputs, group_in, *kernel = weight.shape
    out_space = [
        (n + 2 * pad - d * (k - 1) - 1) // s + 1
        for n, k, s, pad, d in zip(space, kernel, stride, padding, dilation, strict=True)
    ]
    out_shape = (samples, outputs, *out_space)
    result = empty(in_shape, out_shape)
    for row, (n, o, *p) in enumerate(places(out_shape)):
        first = o // (outputs // groups) * group_in
        for i, *t in places((group_in, *kernel)):
            q = [
                at * s - pad + tap * d
                for at, tap, s, pad, d in zip(p, t, stride, padding, dilation, strict=True)
            ]
            if all(0 <= at < length for at, length in zip(q, space, strict=True)):
                result.matrix[row, flat((n, first + i, *q), in_shape)] += weight[(o, i, *t)]
        result.bias[row] = 0 if bias is None else bias[o]
    assert channels == group_in * groups
    return result


def transposed_convolution(
    in_shape: Shape,
    weight: Array,
    bias: Array | None = None,
    *,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    groups: int = 1,
    output_padding: Shape = (0, 0, 0),
) -> Map:
    """Each input element stamps the kernel on the output: x[n, i, q] on y[n, o, q s - pad + t d]"""
    samples, channels, *space = in_shape
    _, group_out, *kernel = weight.shape
    out_space = [
        (n - 1) * s - 2 * pad + d * (k - 1) + extra + 1
        for n, k, s, pad, d, extra in zip(
            space, kernel, stride, padding, dilation, output_padding[: len(space)], strict=True
        )
    ]
    out_shape = (samples, group_out * groups, *out_space)
    result = empty(in_shape, out_shape)
    for column, (n, i, *q) in enumerate(places(in_shape)):
        first = i // (channels // groups) * group_out
        for o, *t in places((group_out, *kernel)):
            p = [
                at * s - pad + tap * d
                for at, tap, s, pad, d in zip(q, t, stride, padding, dilation, strict=True)
            ]
            if all(0 <= at < length for at, length in zip(p, out_space, strict=True)):
                result.matrix[flat((n, first + o, *p), out_shape), column] += weight[(i, o, *t)]
    if bias is not None:
        for row, (_, o, *_rest) in enumerate(places(out_shape)):
            result.bias[row] = bias[o]
    return result


# -- linear ---------------------------------------------------------------------------------------


def linear(in_shape: Shape, weight: Array, bias: Array | None = None) -> Map:
    """y[..., o] = b[o] + sum over i of w[o, i] x[..., i]"""
    *lead, inputs = in_shape
    outputs = weight.shape[0]
    result = empty(in_shape, (*lead, outputs))
    for row, (*n, o) in enumerate(places((*lead, outputs))):
        for i in range(inputs):
            result.matrix[row, flat((*n, i), in_shape)] = weight[o, i]
        result.bias[row] = 0 if bias is None else bias[o]
    return result


def total(in_shape: Shape, axes: Sequence[int], mean: bool = False) -> Map:
    """The sum, or the mean, over some axes."""
    rest = [axis for axis in range(len(in_shape)) if axis not in axes]
    out_shape = [in_shape[axis] for axis in rest]
    share = 1 / size([in_shape[axis] for axis in axes]) if mean else 1
    result = empty(in_shape, out_shape)
    for column, place in enumerate(places(in_shape)):
        result.matrix[flat([place[axis] for axis in rest], out_shape), column] = share
    return result


# -- pooling --------------------------------------------------------------------------------------


def windows(length: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> list[int]:
    """Where each window starts; in ceil mode none starts in the padding on the right."""
    starts = []
    count = (length + 2 * padding - kernel) / stride
    for i in range((math.ceil(count) if ceil_mode else math.floor(count)) + 1):
        start = i * stride - padding
        if not ceil_mode or start < length:
            starts.append(start)
    return starts


def average_pool(
    in_shape: Shape,
    kernel: Shape,
    *,
    stride: Shape,
    padding: Shape,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Map:
    """The sum over a window, by the number of its elements that count."""
    dims = len(kernel)
    lead, space = in_shape[:-dims], in_shape[-dims:]
    starts = [
        windows(*axis, ceil_mode) for axis in zip(space, kernel, stride, padding, strict=True)
    ]
    out_shape = (*lead, *map(len, starts))
    result = empty(in_shape, out_shape)
    for row, place in enumerate(places(out_shape)):
        begin = [starts[axis][at] for axis, at in enumerate(place[-dims:])]
        # A window may reach into the padding, but not past its end.
        end = [min(b + k, n + p) for b, k, n, p in zip(begin, kernel, space, padding, strict=True)]
        padded = size([e - b for b, e in zip(begin, end, strict=True)])
        inside = [
            q
            for q in product(*map(range, begin, end))
            if all(0 <= at < n for at, n in zip(q, space, strict=True))
        ]
        divisor = divisor_override or (padded if count_include_pad else len(inside))
        for q in inside:
            result.matrix[row, flat((*place[:-dims], *q), in_shape)] = 1 / divisor
    return result


def adaptive_windows(length: int, outputs: int) -> list[range]:
    return [
        range(math.floor(i * length / outputs), math.ceil((i + 1) * length / outputs))
        for i in range(outputs)
    ]


def adaptive_average_pool(in_shape: Shape, out_space: Shape) -> Map:
    dims = len(out_space)
    lead, space = in_shape[:-dims], in_shape[-dims:]
    out_shape = (*lead, *out_space)
    result = empty(in_shape, out_shape)
    for row, place in enumerate(places(out_shape)):
        window = list(
            product(
                *(
                    adaptive_windows(n, o)[at]
                    for n, o, at in zip(space, out_space, place[-dims:], strict=True)
                )
            )
        )
        for q in window:
            result.matrix[row, flat((*place[:-dims], *q), in_shape)] = 1 / len(window)
    return result


def strongest(x: Array, candidates: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The place of the largest element; the first of equals in row-major order."""
    best = min(candidates)
    for place in sorted(candidates):
        if x[place] > x[best]:
            best = place
    return best


def max_pool(
    x: Array,
    kernel: Shape,
    *,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    ceil_mode: bool = False,
) -> Map:
    dims = len(kernel)
    lead, space = x.shape[:-dims], x.shape[-dims:]
    starts = [
        windows(n, d * (k - 1) + 1, s, p, ceil_mode)
        for n, k, s, p, d in zip(space, kernel, stride, padding, dilation, strict=True)
    ]
    out_shape = (*lead, *map(len, starts))
    result = empty(x.shape, out_shape)
    for row, place in enumerate(places(out_shape)):
        window = [
            tuple(
                starts[axis][at] + tap * dilation[axis]
                for axis, (at, tap) in enumerate(zip(place[-dims:], taps, strict=True))
            )
            for taps in places(kernel)
        ]
        inside = [q for q in window if all(0 <= a < n for a, n in zip(q, space, strict=True))]
        best = strongest(x, [(*place[:-dims], *q) for q in inside])
        result.matrix[row, flat(best, x.shape)] = 1
    return result


def fractional_max_pool(x: Array, kernel: Shape, out_space: Shape, draws: Array) -> Map:
    """The largest place of each window; `draws` [samples, channels, axes] say where they lie (Graham, 2014)."""
    out_shape = (*x.shape[:2], *out_space)
    result = empty(x.shape, out_shape)
    for row, (n, c, *place) in enumerate(places(out_shape)):
        begin = []
        for axis, (at, count, k) in enumerate(zip(place, out_space, kernel, strict=True)):
            size_, draw = x.shape[2 + axis], float(draws[n, c, axis])
            step = (size_ - k) / (count - 1) if count > 1 else 0.0
            last = at == count - 1
            begin.append(size_ - k if last else int((at + draw) * step) - int(draw * step))
        window = [
            (n, c, *(b + tap for b, tap in zip(begin, taps, strict=True)))
            for taps in places(kernel)
        ]
        result.matrix[row, flat(strongest(x, window), x.shape)] = 1
    return result


def adaptive_max_pool(x: Array, out_space: Shape) -> Map:
    dims = len(out_space)
    lead, space = x.shape[:-dims], x.shape[-dims:]
    out_shape = (*lead, *out_space)
    result = empty(x.shape, out_shape)
    for row, place in enumerate(places(out_shape)):
        window = product(
            *(
                adaptive_windows(n, o)[at]
                for n, o, at in zip(space, out_space, place[-dims:], strict=True)
            )
        )
        best = strongest(x, [(*place[:-dims], *q) for q in window])
        result.matrix[row, flat(best, x.shape)] = 1
    return result


def maximum_over(x: Array, axes: Sequence[int]) -> Map:
    """The maximum over some axes; the lowest index wins a tie."""
    rest = [axis for axis in range(x.ndim) if axis not in axes]
    out_shape = [x.shape[axis] for axis in rest]
    result = empty(x.shape, out_shape)
    for row, kept in enumerate(places(out_shape)):
        window = [p for p in places(x.shape) if [p[axis] for axis in rest] == list(kept)]
        result.matrix[row, flat(strongest(x, window), x.shape)] = 1
    return result


# -- interpolation --------------------------------------------------------------------------------


def along_axes(in_shape: Shape, lines: Sequence[Array]) -> Map:
    """A map whose weight is a product of one weight for each of the last axes."""
    dims = len(lines)
    lead = in_shape[:-dims]
    out_shape = (*lead, *(line.shape[0] for line in lines))
    result = empty(in_shape, out_shape)
    for row, place in enumerate(places(out_shape)):
        for q in places(in_shape[-dims:]):
            weight = 1.0
            for line, at, source in zip(lines, place[-dims:], q, strict=True):
                weight *= line[at, source]
            result.matrix[row, flat((*place[:-dims], *q), in_shape)] = weight
    return result


def linear_line(length: int, outputs: int, align_corners: bool, factor: float | None) -> Array:
    """Linear interpolation along one axis: between the two nearest pixel centres."""
    line = np.zeros((outputs, length))
    for i in range(outputs):
        if align_corners:
            at = i * (length - 1) / (outputs - 1) if outputs > 1 else 0.0
        else:
            at = max((i + 0.5) * (1 / factor if factor else length / outputs) - 0.5, 0.0)
        below = min(math.floor(at), length - 1)
        above = min(below + 1, length - 1)
        line[i, below] += 1 - (at - below)
        line[i, above] += at - below
    return line


def interpolation(
    in_shape: Shape,
    out_space: Shape,
    align_corners: bool = False,
    factors: Sequence[float | None] = (None, None, None),
) -> Map:
    dims = len(out_space)
    return along_axes(
        in_shape,
        [
            linear_line(n, o, align_corners, f)
            for n, o, f in zip(in_shape[-dims:], out_space, factors[:dims], strict=True)
        ],
    )


def antialiased(in_shape: Shape, out_space: Shape) -> Map:
    """Interpolation with a triangle as wide as an output pixel, as Pillow does."""
    lines = []
    for length, outputs in zip(in_shape[-2:], out_space, strict=True):
        scale = length / outputs
        width = max(scale, 1.0)
        line = np.zeros((outputs, length))
        for i in range(outputs):
            centre = (i + 0.5) * scale
            for j in range(length):
                line[i, j] = max(0.0, 1 - abs(j + 0.5 - centre) / width)
            line[i] /= line[i].sum()
        lines.append(line)
    return along_axes(in_shape, lines)


def nearest(in_shape: Shape, out_space: Shape, exact: bool = False) -> Map:
    dims = len(out_space)
    lead, space = in_shape[:-dims], in_shape[-dims:]
    out_shape = (*lead, *out_space)
    result = empty(in_shape, out_shape)
    for row, place in enumerate(places(out_shape)):
        q = [
            math.floor((at + (0.5 if exact else 0)) * n / o)
            for at, n, o in zip(place[-dims:], space, out_space, strict=True)
        ]
        result.matrix[row, flat((*place[:-dims], *q), in_shape)] = 1
    return result


# -- element by element ---------------------------------------------------------------------------


def elementwise(x: Array, function: Callable[[float], float]) -> Map:
    """The line from (0, f(0)) to (x, f(x)), for each element; from ±1 where f has no value at 0."""
    try:
        zero = function(0.0)
    except (ValueError, ZeroDivisionError):
        return _from_one(x, function)
    slopes = [(function(v) - zero) / v if v else 0.0 for v in x.reshape(-1).tolist()]
    return Map(np.diag(slopes), np.full(x.size, zero))


def _from_one(x: Array, function: Callable[[float], float]) -> Map:
    """The line from (1, f(1)) to (x, f(x)), or from (-1, f(-1)) where x < 0; from 1/2 if there is no end at 1."""
    values = x.reshape(-1).tolist()
    slopes = []
    for v in values:
        start = math.copysign(1.0, v)
        try:
            value = function(start)
        except (ValueError, ZeroDivisionError):
            start, value = 0.5, function(0.5)
        slopes.append((function(v) - value) / (v - start))
    return Map(
        np.diag(slopes),
        np.array([function(v) - s * v for v, s in zip(values, slopes, strict=True)]),
    )


def scaled(x: Array, scale: Array, shift: Array) -> Map:
    """y = scale x + shift, where both broadcast against x."""
    return Map(
        np.diag(np.broadcast_to(scale, x.shape).reshape(-1)),
        np.broadcast_to(shift, x.shape).reshape(-1).copy(),
    )


def normalised(
    x: Array,
    groups: dict[tuple[int, ...], list[tuple[int, ...]]],
    weight: Callable[[tuple[int, ...]], float],
    bias: Callable[[tuple[int, ...]], float],
    eps: float,
) -> Map:
    """y = w (x - mean) / sqrt(var + eps) + b, mean and var of each group taken as constants."""
    result = empty(x.shape, x.shape)
    for members in groups.values():
        values = [float(x[place]) for place in members]
        mean = math.fsum(values) / len(values)
        var = math.fsum((value - mean) ** 2 for value in values) / len(values)
        for place in members:
            at = flat(place, x.shape)
            slope = weight(place) / math.sqrt(var + eps)
            result.matrix[at, at] = slope
            result.bias[at] = bias(place) - mean * slope
    return result


def group_norm(x: Array, count: int, weight: Array, bias: Array, eps: float) -> Map:
    per_group = x.shape[1] // count
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for place in places(x.shape):
        groups.setdefault((place[0], place[1] // per_group), []).append(place)
    return normalised(x, groups, lambda p: weight[p[1]], lambda p: bias[p[1]], eps)


def layer_norm(x: Array, dims: int, weight: Array, bias: Array, eps: float) -> Map:
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for place in places(x.shape):
        groups.setdefault(place[:-dims], []).append(place)
    return normalised(x, groups, lambda p: weight[p[-dims:]], lambda p: bias[p[-dims:]], eps)


def batch_statistics_norm(x: Array, weight: Array, bias: Array, eps: float) -> Map:
    """Batch norm with the statistics of this very batch."""
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for place in places(x.shape):
        groups.setdefault((place[1],), []).append(place)
    return normalised(x, groups, lambda p: weight[p[1]], lambda p: bias[p[1]], eps)


# -- movement -------------------------------------------------------------------------------------


def probed(function: Callable[..., Array], inputs: Sequence[Array], varied: int = 0) -> Map:
    """The map of a call that only moves elements: run it on a one-hot picture for each input.

    Bias is what comes out when every input is zero.
    """
    zeros = [np.zeros_like(x) for x in inputs]
    background = function(*zeros).reshape(-1)
    matrix = np.zeros((background.size, inputs[varied].size))
    for column, place in enumerate(places(inputs[varied].shape)):
        hot = [zero.copy() for zero in zeros]
        hot[varied][place] = 1
        matrix[:, column] = function(*hot).reshape(-1) - background
    return Map(matrix, background)


def gathered(
    x: Array, sent: Array, pairs: Sequence[tuple[Shape, Shape]], how: str, own: bool
) -> list[Map]:
    """What is made of all that is sent to a place, and of x there: the maps from x and from what is sent.

    `pairs` say to which place of x each place of `sent` goes; x counts if it is its `own`, or alone there.
    """
    maps = [empty(x.shape, x.shape), empty(sent.shape, x.shape)]
    for row, place in enumerate(places(x.shape)):
        terms = [(1, flat(source, sent.shape)) for to, source in pairs if tuple(to) == place]
        if own or not terms:
            terms = [(0, row), *terms]
        values = [float((x, sent)[which].reshape(-1)[at]) for which, at in terms]
        best = values.index((min if how == "amin" else max)(values))
        for i, (which, at) in enumerate(terms):
            maps[which].matrix[row, at] += {
                "sum": 1.0,
                "mean": 1 / len(terms),
                "prod": math.prod(values[:i] + values[i + 1 :]) / len(terms),
                "amax": float(i == best),
                "amin": float(i == best),
            }[how]
    return maps


# -- products of matrices -------------------------------------------------------------------------


def product_from_left(weight: Array, in_shape: Shape) -> Map:
    """y[..., i, j] = sum over k of w[..., i, k] x[..., k, j], for x of `in_shape`."""
    *lead, inner, columns = in_shape
    result = empty(in_shape, (*lead, weight.shape[-2], columns))
    for row, (*n, i, j) in enumerate(places((*lead, weight.shape[-2], columns))):
        for k in range(inner):
            result.matrix[row, flat((*n, k, j), in_shape)] = weight[(*n, i, k)]
    return result


def product_from_right(in_shape: Shape, weight: Array) -> Map:
    """y[..., i, j] = sum over k of x[..., i, k] w[..., k, j], for x of `in_shape`."""
    *lead, rows, inner = in_shape
    result = empty(in_shape, (*lead, rows, weight.shape[-1]))
    for row, (*n, i, j) in enumerate(places((*lead, rows, weight.shape[-1]))):
        for k in range(inner):
            result.matrix[row, flat((*n, i, k), in_shape)] = weight[(*n, k, j)]
    return result


def softmax_row(scores: Sequence[float]) -> list[float]:
    """exp(s) / sum of exp(s); nothing where all are -inf."""
    most = max(scores)
    if most == -math.inf:
        return [0.0] * len(scores)
    powers = [math.exp(score - most) for score in scores]
    return [power / math.fsum(powers) for power in powers]


def attention_weights(
    query: Array,
    key: Array,
    *,
    scale: float | None = None,
    mask: Array | None = None,
    causal: bool = False,
) -> Array:
    """softmax over k of scale · q[i] · k[j] + mask[i, j]; a boolean mask tells what may be seen."""
    *lead, length, size_ = query.shape
    others = key.shape[-2]
    scale = 1 / math.sqrt(size_) if scale is None else scale
    result = np.zeros((*lead, length, others))
    mask = None if mask is None else np.broadcast_to(mask, result.shape)
    for *n, i in places((*lead, length)):
        scores = []
        for j in range(others):
            score = scale * math.fsum(
                float(a) * float(b) for a, b in zip(query[(*n, i)], key[(*n, j)], strict=True)
            )
            if causal and j > i:
                score = -math.inf
            if mask is not None and mask.dtype == bool:
                score = score if mask[(*n, i, j)] else -math.inf
            elif mask is not None:
                score += mask[(*n, i, j)]
            scores.append(score)
        result[(*n, i)] = softmax_row(scores)
    return result


def softmax(x: Array, axis: int) -> Map:
    """y = exp(x) / z with a constant z: the line from (0, 1 / z) to (x, y), for each element."""
    moved = np.moveaxis(x, axis, -1)
    z = np.zeros(moved.shape[:-1])
    for place in places(z.shape):
        z[place] = math.fsum(math.exp(v) for v in moved[place])
    zero = np.broadcast_to(1 / np.expand_dims(z, axis), x.shape)
    slope = [
        (math.exp(v) - 1) * nought / v if v else 0.0
        for v, nought in zip(x.reshape(-1), zero.reshape(-1), strict=True)
    ]
    return Map(np.diag(slope), zero.reshape(-1).copy())


# -- sums whose weights are the input's -----------------------------------------------------------


def weighted_total(
    x: Array, axes: Sequence[int], weights: Callable[[list[float]], Sequence[float]]
) -> Map:
    """y = sum of w · x over some axes; `weights` makes the w of a group from its elements."""
    rest = [axis for axis in range(x.ndim) if axis not in axes]
    out_shape = [x.shape[axis] for axis in rest]
    result = empty(x.shape, out_shape)
    for row, kept in enumerate(places(out_shape)):
        group = [p for p in places(x.shape) if [p[axis] for axis in rest] == list(kept)]
        for place, weight in zip(group, weights([float(x[p]) for p in group]), strict=True):
            result.matrix[row, flat(place, x.shape)] = weight
    return result


# -- cubic interpolation --------------------------------------------------------------------------


def cubic(distance: float, a: float) -> float:
    """The cubic convolution kernel of Keys."""
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def cubic_line(length: int, outputs: int, align_corners: bool) -> Array:
    """Cubic interpolation along one axis (a = -3/4), the border repeated."""
    line = np.zeros((outputs, length))
    for i in range(outputs):
        if align_corners:
            at = i * (length - 1) / (outputs - 1) if outputs > 1 else 0.0
        else:
            at = (i + 0.5) * length / outputs - 0.5
        below = math.floor(at)
        for tap in range(below - 1, below + 3):
            line[i, min(max(tap, 0), length - 1)] += cubic(at - tap, -0.75)
    return line


def bicubic(in_shape: Shape, out_space: Shape, align_corners: bool) -> Map:
    pairs = zip(in_shape[-2:], out_space, strict=True)
    return along_axes(in_shape, [cubic_line(n, o, align_corners) for n, o in pairs])


def bicubic_antialiased(in_shape: Shape, out_space: Shape) -> Map:
    """Cubic interpolation (a = -1/2) with a kernel that an output pixel widens, as Pillow does."""
    lines = []
    for length, outputs in zip(in_shape[-2:], out_space, strict=True):
        scale = length / outputs
        width = max(scale, 1.0)
        line = np.zeros((outputs, length))
        for i in range(outputs):
            centre = (i + 0.5) * scale
            for j in range(length):
                line[i, j] = cubic((j + 0.5 - centre) / width, -0.5)
            line[i] /= line[i].sum()
        lines.append(line)
    return along_axes(in_shape, lines)


# -- regions --------------------------------------------------------------------------------------


def bilinear_taps(y: float, x: float, height: int, width: int) -> dict[tuple[int, int], float]:
    """The four places around a position and their weights; none more than a pixel outside."""
    if y < -1 or y > height or x < -1 or x > width:
        return {}
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    taps: dict[tuple[int, int], float] = {}
    for i in (math.floor(y), min(math.floor(y) + 1, height - 1)):
        for j in (math.floor(x), min(math.floor(x) + 1, width - 1)):
            taps[i, j] = max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j))
    return taps


def roi_align(
    in_shape: Shape,
    regions: Array,
    *,
    scale: float,
    bins: tuple[int, int],
    ratio: int,
    aligned: bool,
) -> Map:
    """The mean, in each bin of each region, over a grid of samples (He et al., Mask R-CNN)."""
    _, channels, height, width = in_shape
    out_shape = (len(regions), channels, *bins)
    result = empty(in_shape, out_shape)
    shift = 0.5 if aligned else 0.0
    for row, (r, c, bin_y, bin_x) in enumerate(places(out_shape)):
        image, *corners = regions[r]
        left, top, right, bottom = (corner * scale - shift for corner in corners)
        tall, wide = bottom - top, right - left
        if not aligned:
            tall, wide = max(tall, 1.0), max(wide, 1.0)
        tall, wide = tall / bins[0], wide / bins[1]
        rows = ratio if ratio > 0 else math.ceil(tall)
        columns = ratio if ratio > 0 else math.ceil(wide)
        for i in range(rows):
            for j in range(columns):
                y = top + bin_y * tall + (i + 0.5) * tall / rows
                x = left + bin_x * wide + (j + 0.5) * wide / columns
                for (at_y, at_x), weight in bilinear_taps(y, x, height, width).items():
                    column = flat((int(image), c, at_y, at_x), in_shape)
                    result.matrix[row, column] += weight / (rows * columns)
    return result


def roi_pool(x: Array, regions: Array, *, scale: float, bins: Shape) -> Map:
    """The largest place in each bin of regions [n, (image, x0, y0, x1, y1)], rounded to whole places."""
    _, channels, height, width = x.shape
    out_shape = (len(regions), channels, *bins)
    result = empty(x.shape, out_shape)
    for r, c, i, j in places(out_shape):
        image = int(regions[r, 0])
        scaled = [v * scale for v in regions[r, 1:].tolist()]
        x0, y0, x1, y1 = (int(math.copysign(math.floor(abs(v) + 0.5), v)) for v in scaled)

        def bin_(k: int, start: int, end: int, count: int, size: int) -> range:
            step = max(end - start + 1, 1) / count
            low, high = math.floor(k * step) + start, math.ceil((k + 1) * step) + start
            return range(min(max(low, 0), size), min(max(high, 0), size))

        within = list(product(bin_(i, y0, y1, bins[0], height), bin_(j, x0, x1, bins[1], width)))
        if within:
            best = strongest(x[image, c], within)
            result.matrix[flat((r, c, i, j), out_shape), flat((image, c, *best), x.shape)] = 1
    return result


def settled(at: float, size: int, padding: str, align: bool) -> float:
    """A position -1..1 as a place; outside, the border or what a mirror at the edge shows."""
    at = (at + 1) / 2 * (size - 1) if align else ((at + 1) * size - 1) / 2
    if padding == "reflection":
        low, high = (0.0, size - 1.0) if align else (-0.5, size - 0.5)
        if low == high:
            return low
        while not low <= at <= high:
            at = 2 * low - at if at < low else 2 * high - at
    return at if padding == "zeros" else min(max(at, 0.0), size - 1.0)


def cubic_sample(in_shape: Shape, grid: Array, *, padding: str, align: bool) -> Map:
    """Sixteen places around each position, each as the padding says, by the kernel of Keys (a = -3/4)."""
    out_shape = (*in_shape[:2], *grid.shape[1:-1])
    result = empty(in_shape, out_shape)
    for row, (image, c, *place) in enumerate(places(out_shape)):
        lines = []
        for a, size_ in zip(grid[(image, *place)][::-1], in_shape[2:], strict=True):
            at = (float(a) + 1) / 2 * (size_ - 1) if align else ((float(a) + 1) * size_ - 1) / 2
            line = dict.fromkeys(range(size_), 0.0)
            for tap in range(math.floor(at) - 1, math.floor(at) + 3):
                centre = (
                    (2.0 * tap / (size_ - 1) - 1)
                    if align and size_ > 1
                    else (2.0 * tap + 1) / size_ - 1
                )
                shown = round(settled(centre, size_, padding, align))
                if 0 <= shown < size_:
                    line[shown] += cubic(at - tap, -0.75)
            lines.append(line)
        for i, j in product(*lines):
            column = flat((image, c, i, j), in_shape)
            result.matrix[row, column] = lines[0][i] * lines[1][j]
    return result


def grid_sample(in_shape: Shape, grid: Array, *, mode: str, padding: str, align: bool) -> Map:
    """Each output place reads its input plane at a position: by lines between places, or at the nearest."""
    out_shape = (*in_shape[:2], *grid.shape[1:-1])
    result = empty(in_shape, out_shape)
    space = in_shape[2:]
    for row, (image, c, *place) in enumerate(places(out_shape)):
        position = grid[(image, *place)][::-1]  # x comes first
        at = [settled(float(a), n, padding, align) for a, n in zip(position, space, strict=True)]
        if mode == "nearest":
            at = [float(round(a)) for a in at]
        for other in places(space):
            weight = math.prod(max(0.0, 1 - abs(a - i)) for a, i in zip(at, other, strict=True))
            result.matrix[row, flat((image, c, *other), in_shape)] += weight
    return result
