"""The inner loops of the walk, compiled for the CPU by numba.

A value is looked at as [outer, channels, inner] here ([batch, channel, height · width], say): it has
`outer` · `inner` places with `channels` nodes each. Node c of place p lies at p · channels + c of a heap,
so that the nodes of one place are neighbours, and at the flat, row-major index of the value elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

__all__ = ["add", "convolve", "draw", "meet", "places_first"]

# Sums in an order that vector units like. NaN and infinity keep their meaning.
_FAST = {"contract", "reassoc", "nsz", "arcp"}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as machine code, which is kept on disk wherever a place can be found for it."""
    options: dict[str, Any] = {"nogil": True, "fastmath": _FAST, "error_model": "numpy"}
    try:
        made = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the home directory can be written to
        made = numba.njit(**options)(function)
    return made  # type: ignore[no-any-return]


@_compiled
def add(  # type: ignore[no-untyped-def]
    index, evidence, channels, inner, heap, marks, touched, count
) -> None:
    """Add the evidence of nodes [n] to a heap, and their places to those touched."""
    for n in range(len(index)):
        if evidence[n] == 0:
            continue
        row, rest = divmod(index[n], channels * inner)
        c, s = divmod(rest, inner)
        place = row * inner + s
        heap[place * channels + c] += evidence[n]
        if not marks[place]:
            marks[place] = 1
            touched[count[0]] = place
            count[0] += 1


@_compiled
def places_first(index, channels, plane, key) -> bool:  # type: ignore[no-untyped-def]
    """Where nodes [n] of a value [batch, channels, plane] lie in a heap; whether they are in that order."""
    ordered = True
    for n in range(len(index)):
        row, rest = divmod(index[n], channels * plane)
        c, s = divmod(rest, plane)
        key[n] = (row * plane + s) * channels + c
        ordered &= n == 0 or key[n - 1] <= key[n]
    return ordered


@_compiled
def draw(  # type: ignore[no-untyped-def]
    heap,
    touched,
    places,
    channels,
    inner,
    samples,
    most,
    dither,
    activation,
    layout,
    index,
    evidence,
    sign,
):
    """Draw the halftone of a heap; return how many dots it has, or -1 where there is no room for them.

    `layout` holds where in the memory `activation` the value begins, and the strides of its three axes.
    """
    zero, one, unit = heap.dtype.type(0), heap.dtype.type(1), heap.dtype.type(2.0**-24)
    each = max(places // samples, 1)
    total, there = np.zeros(samples, np.float64), np.zeros(samples, np.float64)
    for place in touched:
        sum_, nodes = zero, zero
        for c in range(place * channels, (place + 1) * channels):
            sum_ += abs(heap[c])
            nodes += one if heap[c] != zero else zero
        total[place // each] += sum_
        there[place // each] += nodes
    n = 0
    for place in touched:
        sample, inside = divmod(place, each)
        step = heap.dtype.type(total[sample] / most if there[sample] > most else 0.0)
        first = np.uint32(np.uint32(inside) * dither[1] + dither[2])
        hits = 0
        for c in range(channels):  # most places have none, which is told fast
            pattern = np.uint32(first + np.uint32(c) * dither[0]) >> np.uint32(8)
            hits += abs(heap[place * channels + c]) > np.int32(pattern) * unit * step
        if hits == 0:
            continue
        row, s = divmod(place, inner)
        at = layout[0] + row * layout[1] + s * layout[3]
        for c in range(channels):
            found = heap[place * channels + c]
            pattern = np.uint32(first + np.uint32(c) * dither[0]) >> np.uint32(8)
            if abs(found) <= np.int32(pattern) * unit * step:
                continue
            if abs(found) < step:
                found = step if found > zero else -step
            if n == len(index):
                return -1
            index[n] = (row * channels + c) * inner + s
            evidence[n] = found
            sign[n] = -one if activation[at + c * layout[2]] < zero else one
            n += 1
    return n


@_compiled
def meet(  # type: ignore[no-untyped-def]
    first, second, factors, index, evidence, sign, each, limits, ended, rates, shares
) -> None:
    """Share out the evidence of dots [n] of a sum between its two terms: shares [2, n]."""
    zero = evidence.dtype.type(0)
    for n in range(len(index)):
        a = max(sign[n] * factors[0] * first[index[n]], zero)
        b = max(sign[n] * factors[1] * second[index[n]], zero)
        z = a + b
        if z <= limits[0] or abs(evidence[n]) > z * limits[1]:
            ended[index[n] // each] += max(evidence[n], zero)
            rates[n], shares[0, n], shares[1, n] = zero, zero, zero
        else:
            rates[n] = evidence[n] / z
            shares[0, n], shares[1, n] = a * rates[n], b * rates[n]


@_compiled
def convolve(  # type: ignore[no-untyped-def] # noqa: PLR0912, PLR0915 - calls inside would cost time
    activation,
    layout,
    in_shape,
    weight,
    out_shape,
    window,
    groups,
    index,
    evidence,
    sign,
    limits,
    by_node,
    heap,
    marks,
    touched,
    count,
    ended,
    rates,
) -> None:
    """Hand the evidence of dots [n] at a convolution's output on to its input's heap.

    `in_shape` and `out_shape` are [batch, channel, height, width]; `window` holds kernel, stride, padding
    and dilation, each for y and x; `layout` where in the memory `activation` the input begins, and its
    strides. Dots of one place and group that follow each other share the work. Evidence ends where all that
    speaks for a dot is below limits[0], rounding, or evidence divided by it above limits[1]. `by_node` tells
    that each node is a place of its own in the heap.
    """  # fmt: skip
    height, width, channels_in = in_shape[2], in_shape[3], in_shape[1]
    channels_out, out_width = out_shape[1], out_shape[3]
    per_plane, plane_in = out_shape[2] * out_width, height * width
    kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, step_y, step_x = window
    group_in, group_out = channels_in // groups, channels_out // groups
    taps = kernel_y * kernel_x
    size = group_in * taps
    zero = heap.dtype.type(0)
    patch, speaks, flow = (
        np.zeros(size, heap.dtype), np.zeros(size, heap.dtype), np.zeros(size, heap.dtype),
    )  # fmt: skip
    offset = np.zeros(taps, np.int64)
    where = np.full(taps, -1, np.int64)  # the input's place at each tap, -1 beyond its edges
    here = -1
    for n in range(len(index) + 1):
        key = -2
        if n < len(index):
            row, rest = divmod(index[n], channels_out * per_plane)
            out, s = divmod(rest, per_plane)
            key = (row * groups + out // group_out) * per_plane + s
        if key != here:
            if here >= 0:  # what the dots of one place have collected goes out
                first = (here // per_plane) % groups * group_in
                for t in range(taps):
                    place = where[t]
                    if place < 0:
                        continue
                    if by_node:
                        sample, inside = divmod(place, plane_in)
                        for c in range(group_in):
                            node = (sample * channels_in + first + c) * plane_in + inside
                            heap[node] += flow[c * taps + t]
                            if not marks[node]:
                                marks[node] = 1
                                touched[count[0]] = node
                                count[0] += 1
                        continue
                    for c in range(group_in):
                        heap[place * channels_in + first + c] += flow[c * taps + t]
                    if not marks[place]:
                        marks[place] = 1
                        touched[count[0]] = place
                        count[0] += 1
            if n == len(index):
                break
            here = key
            flow[:] = zero
            y, x = divmod(s, out_width)
            corner = layout[0] + row * layout[1] + (out // group_out) * group_in * layout[2]
            for t in range(taps):
                in_y = y * stride_y - pad_y + t // kernel_x * step_y
                in_x = x * stride_x - pad_x + t % kernel_x * step_x
                inside = 0 <= in_y < height and 0 <= in_x < width
                where[t] = (row * height + in_y) * width + in_x if inside else -1
                offset[t] = in_y * layout[3] + in_x * layout[4]
            for c in range(group_in):
                for t in range(taps):
                    there = where[t] >= 0
                    patch[c * taps + t] = activation[corner + offset[t]] if there else zero
                corner += layout[2]
        filter_ = weight[out * size : (out + 1) * size]
        asked = sign[n]
        z = zero
        for k in range(size):
            term = asked * filter_[k] * patch[k]
            term = term if term > zero else zero
            speaks[k] = term
            z += term
        if z <= limits[0] or abs(evidence[n]) > z * limits[1]:
            ended[row] += max(evidence[n], zero)
            rates[n] = zero
            continue
        rates[n] = rate = evidence[n] / z
        for k in range(size):
            flow[k] += rate * speaks[k]
