"""The inner loops of the walk, compiled for the CPU by numba.

A value is looked at as [outer, channels, inner] here ([batch, channel, height · width], say): it has
`outer` · `inner` places with `channels` nodes each. Nodes are told by their flat, row-major index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

__all__ = [
    "add",
    "by_place",
    "convolve",
    "crop",
    "draw",
    "ended",
    "look",
    "meet",
    "most_exciting",
    "strongest",
    "totals",
    "turn",
]

#: So many products are made in one go.
_BLOCK = 64

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
def add(index, evidence, heap, marks, touched, count) -> None:  # type: ignore[no-untyped-def]
    """Add the evidence of nodes [n] to a heap, and the nodes to those touched."""
    for n in range(len(index)):
        node = index[n]
        heap[node] += evidence[n]
        if not marks[node]:
            marks[node] = 1
            touched[count[0]] = node
            count[0] += 1


@_compiled
def totals(index, evidence, each, total) -> None:  # type: ignore[no-untyped-def]
    """Add up the absolute evidence of the nodes [n] of each sample, of `each` nodes."""
    if len(total) == 1:  # without a division each
        size = 0.0
        for n in range(len(index)):
            size += abs(evidence[n])
        total[0] += size
        return
    for n in range(len(index)):
        total[index[n] // each] += abs(evidence[n])


@_compiled
def ended(index, evidence, rates, each, total) -> None:  # type: ignore[no-untyped-def]
    """Add the positive evidence of those nodes [n] whose rate is 0 to the total of each sample, of `each` nodes.

    What came to a node in several ways is added up before it counts.
    """
    here = np.nonzero(rates == 0)[0]
    here = here[np.argsort(index[here])]
    net = 0.0
    for n in range(len(here)):
        node = index[here[n]]
        net += evidence[here[n]]
        if n + 1 == len(here) or index[here[n + 1]] != node:
            total[node // each] += max(net, 0.0)
            net = 0.0


@_compiled
def by_place(index, channels, plane, places, order) -> None:  # type: ignore[no-untyped-def]
    """The order in which nodes [n] of a value [batch, channels, plane] come place by place."""
    first = np.zeros(places + 1, np.int32)
    place = np.empty(len(index), np.int64)
    for n in range(len(index)):
        row, rest = divmod(index[n], channels * plane)
        place[n] = row * plane + rest % plane
        first[place[n] + 1] += 1
    for i in range(places):
        first[i + 1] += first[i]
    for n in range(len(index)):
        order[first[place[n]]] = n
        first[place[n]] += 1


@_compiled
def draw(  # type: ignore[no-untyped-def]
    heap, touched, channels, inner, steps, dither, activation, strides, index, evidence, sign
):
    """Draw the halftone of a heap by each sample's step; return how many dots it has.

    `strides` are those of the value's three axes in the memory `activation`.
    """
    zero, one, unit = heap.dtype.type(0), heap.dtype.type(1), heap.dtype.type(2.0**-24)
    each = max(len(heap) // len(steps), 1)
    places = max(each // max(channels, 1), 1)
    n = 0
    for node in touched:
        found, step = heap[node], steps[node // each]
        if found == zero:
            continue
        row, rest = divmod(node, channels * inner)
        c, s = divmod(rest, inner)
        place = np.uint32((row * inner + s) % places)
        pattern = np.uint32(place * dither[1] + dither[2] + np.uint32(c) * dither[0])
        if abs(found) <= np.int32(pattern >> np.uint32(8)) * unit * step:
            continue
        if abs(found) < step:
            found = step if found > zero else -step
        index[n] = node
        evidence[n] = found
        at = row * strides[0] + c * strides[1] + s * strides[2]
        sign[n] = -one if activation[at] < zero else one
        n += 1
    return n


@_compiled
def crop(index, evidence, sign, axes, inside, rest):  # type: ignore[no-untyped-def]
    """Part dots [n] into those in a tensor that stands in another, and the rest; return how many are inside.

    `axes` [axes, 3] are its sizes, those of the other, and the margin before it, the last axis first; `inside`
    and `rest` are an index, evidence and sign each, the former's being those of the inner tensor.
    """
    n_inside, n_rest = 0, 0
    for n in range(len(index)):
        above, behind, place = index[n], 1, 0
        for axis in range(len(axes)):
            size, whole, before = axes[axis]
            above, at = divmod(above, whole)
            at -= before
            if at < 0 or at >= size:
                place = -1
                break
            place += at * behind
            behind *= size
        if place >= 0:
            inside[0][n_inside], inside[1][n_inside], inside[2][n_inside] = (
                place,
                evidence[n],
                sign[n],
            )
            n_inside += 1
        else:
            rest[0][n_rest], rest[1][n_rest], rest[2][n_rest] = index[n], evidence[n], sign[n]
            n_rest += 1
    return n_inside


@_compiled
def turn(index, sign, weight, inner, turned) -> bool:  # type: ignore[no-untyped-def]
    """The signs of nodes [n] behind one weight a channel; False where a weight is 0."""
    zero = weight.dtype.type(0)
    for n in range(len(index)):
        factor = weight[index[n] // inner % len(weight)]
        if factor == zero:
            return False
        turned[n] = -sign[n] if factor < zero else sign[n]
    return True


@_compiled
def meet(  # type: ignore[no-untyped-def]
    first, second, factors, index, evidence, sign, limits, rates, shares, signs
) -> None:
    """Share out the evidence of dots [n] of a sum between its two terms: shares and signs [2, n]."""
    zero, one = evidence.dtype.type(0), evidence.dtype.type(1)
    for n in range(len(index)):
        x, y = first[index[n]], second[index[n]]
        a, b = max(sign[n] * factors[0] * x, zero), max(sign[n] * factors[1] * y, zero)
        signs[0, n] = -one if x < zero else one
        signs[1, n] = -one if y < zero else one
        z = a + b
        if z <= limits[0] or abs(evidence[n]) > z * limits[1]:
            rates[n], shares[0, n], shares[1, n] = zero, zero, zero
        else:
            rates[n] = evidence[n] / z
            shares[0, n], shares[1, n] = a * rates[n], b * rates[n]


@_compiled
def look(  # type: ignore[no-untyped-def]
    activation, strides, in_shape, window, row, first, y, x, where, offset, patch
) -> None:
    """What a convolution's output at row, y, x sees of the channels from `first` on, and where.

    `where` [taps] becomes the input's place at each tap, -1 beyond its edges; `patch` [channels · taps]
    the activations there, 0 beyond. `offset` [taps] is room to work in.
    """
    height, width = in_shape[2], in_shape[3]
    kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, step_y, step_x = window
    zero = patch.dtype.type(0)
    taps, beyond = 0, 0
    for i in range(kernel_y):
        in_y = y * stride_y - pad_y + i * step_y
        for j in range(kernel_x):
            in_x = x * stride_x - pad_x + j * step_x
            inside = 0 <= in_y < height and 0 <= in_x < width
            where[taps] = in_y * width + in_x if inside else -1
            offset[taps] = in_y * strides[2] + in_x * strides[3]
            beyond += not inside
            taps += 1
    corner = row * strides[0] + first * strides[1]
    if taps == 1 and not beyond:  # a loop of one turn takes longer than what it does
        corner += offset[0]
        for c in range(len(patch)):
            patch[c] = activation[corner]
            corner += strides[1]
        return
    if taps == 9 and not beyond:
        o0, o1, o2, o3, o4, o5, o6, o7, o8 = (
            offset[0], offset[1], offset[2], offset[3], offset[4],
            offset[5], offset[6], offset[7], offset[8],
        )  # fmt: skip
        for k in range(0, len(patch), 9):  # unsigned, no index is asked whether it is negative
            patch[k] = activation[np.uint64(corner + o0)]
            patch[k + 1] = activation[np.uint64(corner + o1)]
            patch[k + 2] = activation[np.uint64(corner + o2)]
            patch[k + 3] = activation[np.uint64(corner + o3)]
            patch[k + 4] = activation[np.uint64(corner + o4)]
            patch[k + 5] = activation[np.uint64(corner + o5)]
            patch[k + 6] = activation[np.uint64(corner + o6)]
            patch[k + 7] = activation[np.uint64(corner + o7)]
            patch[k + 8] = activation[np.uint64(corner + o8)]
            corner += strides[1]
        return
    for k in range(0, len(patch), taps):
        for t in range(taps):
            patch[k + t] = activation[corner + offset[t]] if where[t] >= 0 else zero
        corner += strides[1]


@_compiled
def strongest(  # type: ignore[no-untyped-def]
    activation,
    strides,
    in_shape,
    weight,
    out_shape,
    window,
    groups,
    by_activation,
    index,
    sign,
    chosen,
    found,
    total,
    turns,
) -> None:
    """For nodes [n] of a convolution's output the strongest node of its input (How You See Me).

    The channel is the one whose contributions, sign · weight · activation, add up to most over the window;
    the place in it that of the largest contribution, or activation. `chosen` [n] becomes its index, -1 beyond
    the edges, `found` its contribution, `total` all contributions above zero, and `turns` the sign of its weight.
    The other arguments are those of `convolve`.
    """  # fmt: skip
    channels_in, plane_in = in_shape[1], in_shape[2] * in_shape[3]
    channels_out, out_width = out_shape[1], out_shape[3]
    per_plane = out_shape[2] * out_width
    group_in, group_out = channels_in // groups, channels_out // groups
    taps = window[0] * window[1]
    size = group_in * taps
    zero = sign.dtype.type(0)
    where, offset = np.zeros(taps, np.int64), np.zeros(taps, np.int64)
    patch, terms = np.zeros(size, sign.dtype), np.zeros(size, sign.dtype)
    here = -1
    for n in range(len(index)):
        row, rest = divmod(index[n], channels_out * per_plane)
        out, s = divmod(rest, per_plane)
        first = out // group_out * group_in
        key = (row * groups + out // group_out) * per_plane + s
        if key != here:
            here = key
            y, x = divmod(s, out_width)
            look(activation, strides, in_shape, window, row, first, y, x, where, offset, patch)
        filter_ = weight[out * size : (out + 1) * size]
        speaks, asked_for = zero, sign[n]
        for k in range(size):  # one loop for vector units, which windows are too small for
            term = asked_for * filter_[k] * patch[k]
            terms[k] = term
            speaks += max(term, zero)
        channel, most = 0, zero
        for c in range(group_in):
            k = c * taps
            whole = terms[k]
            if taps == 9:  # written out, 3 x 3 takes half the time of a loop so short
                whole += (
                    terms[k + 1]
                    + terms[k + 2]
                    + terms[k + 3]
                    + terms[k + 4]
                    + terms[k + 5]
                    + terms[k + 6]
                    + terms[k + 7]
                    + terms[k + 8]
                )
            else:
                for t in range(1, taps):
                    whole += terms[k + t]
            if c == 0 or whole > most:
                channel, most = c, whole
        best, strength = -1, zero
        for t in range(taps):
            k = channel * taps + t
            asked = patch[k] if by_activation else terms[k]
            if where[t] >= 0 and (best < 0 or asked > strength):
                best, strength = t, asked
        total[n] = speaks
        chosen[n] = -1
        if best >= 0:
            k = channel * taps + best
            chosen[n] = (row * channels_in + first + channel) * plane_in + where[best]
            found[n] = terms[k]
            turns[n] = -1 if filter_[k] < zero else 1


@_compiled
def most_exciting(activation, weight, index, sign, chosen, found, total) -> None:  # type: ignore[no-untyped-def]
    """For nodes [n] of a fully connected layer's output the inputs that excite them most (How You See Me).

    `activation` [rows, inputs] is multiplied by `weight` [outputs, inputs]. `chosen` [n, k] becomes the k inputs
    with the highest contributions, sign · weight · activation, above zero, the highest first and the lowest index
    of equals, -1 where there are fewer; `found` [n, k] these contributions, and `total` [n] all above zero.
    """  # fmt: skip
    outputs, inputs = weight.shape
    k, zero = chosen.shape[1], sign.dtype.type(0)
    offered = np.zeros(_BLOCK, sign.dtype)
    for n in range(len(index)):
        row, out = divmod(index[n], outputs)
        seen, filter_ = activation[row], weight[out]
        kept, least, speaks = 0, zero, zero
        for block in range(0, inputs, _BLOCK):
            size, most = min(_BLOCK, inputs - block), zero
            for j in range(size):
                offered[j] = sign[n] * filter_[block + j] * seen[block + j]
                speaks += max(offered[j], zero)
                most = max(most, offered[j])
            if not most > least:
                continue
            for j in range(size):
                term = offered[j]
                if not term > least:
                    continue
                at = kept if kept < k else k - 1
                while at > 0 and found[n, at - 1] < term:
                    found[n, at], chosen[n, at] = found[n, at - 1], chosen[n, at - 1]
                    at -= 1
                found[n, at], chosen[n, at] = term, block + j
                kept = min(kept + 1, k)
                if kept == k:
                    least = found[n, k - 1]
        total[n] = speaks


@_compiled
def convolve(  # type: ignore[no-untyped-def] # noqa: PLR0912, PLR0915 - a call for each dot would cost time
    activation,
    strides,
    in_shape,
    weight,
    out_shape,
    window,
    groups,
    limits,
    steps,
    each,
    dither,
    order,
    index,
    evidence,
    sign,
    rates,
    index_to,
    evidence_to,
    sign_to,
):
    """Hand the evidence of dots at a convolution's output on to its input; return how many dots that are.

    -1 if there is no room for them. `order` lists the dots of this thread. `in_shape` and `out_shape` are
    [batch, channel, height, width], `strides` those of the input in the memory `activation`; `window` holds
    kernel, stride, padding and dilation, each for y and x. Dots of one place and group that follow each other
    share the work, and are dealt on together, by the comb of the sample's step, or all where that is 0; a
    sample has `each` rows.
    Evidence ends where all that speaks for a dot is below limits[0], rounding, or evidence divided by it
    above limits[1].
    """  # fmt: skip
    channels_in, plane_in = in_shape[1], in_shape[2] * in_shape[3]
    channels_out, out_width = out_shape[1], out_shape[3]
    per_plane = out_shape[2] * out_width
    group_in, group_out = channels_in // groups, channels_out // groups
    taps = window[0] * window[1]
    size = group_in * taps
    zero, one, unit = evidence.dtype.type(0), evidence.dtype.type(1), evidence.dtype.type(2.0**-24)
    patch, speaks = np.zeros(size, evidence.dtype), np.zeros(size, evidence.dtype)
    flow = np.zeros(-(-size // 16) * 16, evidence.dtype)  # blocks of one size are for vector units
    where, offset = np.zeros(taps, np.int64), np.zeros(taps, np.int64)
    here = -1
    n, row, group, s, m = 0, 0, 0, 0, 0
    for i in range(len(order) + 1):
        key = -2
        if i < len(order):
            n = order[i]
            plane, next_s = divmod(index[n], per_plane)
            next_row, out = divmod(plane, channels_out)
            key = (next_row * groups + out // group_out) * per_plane + next_s
        if key != here:
            if here >= 0:  # what the dots of one place have collected is dealt on
                step = steps[row // each]
                teeth = 1 / step if step > 0 else 0.0
                place = np.uint32((row % each) * per_plane + s)
                pattern = np.uint32(place * dither[1] + dither[2] + np.uint32(group) * dither[0])
                filled = np.int32(pattern >> np.uint32(8)) * unit
                for block in range(0, len(flow), 16):
                    length = zero
                    for k in range(16):
                        length += abs(flow[block + k])
                    # What is no number goes on as it is, for it is to be seen.
                    comb = step > 0 and length < np.inf
                    if comb and filled + length * teeth < 1:  # no tooth meets it
                        filled += length * teeth
                        continue
                    for k in range(block, block + 16):
                        given = flow[k]
                        if comb:
                            filled += abs(given) * teeth
                            hits = np.int64(filled)
                            filled -= hits
                            given = (hits * step) * (one if given > zero else -one)
                        if given == zero:
                            continue
                        if m == len(index_to):
                            return -1
                        channel = group * group_in + k // taps
                        index_to[m] = (row * channels_in + channel) * plane_in + where[k % taps]
                        evidence_to[m] = given
                        sign_to[m] = -one if patch[k] < zero else one
                        m += 1
            if i == len(order):
                break
            here, row, group, s = key, next_row, out // group_out, next_s
            flow[:] = zero
            y, x = divmod(s, out_width)
            first = group * group_in
            look(activation, strides, in_shape, window, row, first, y, x, where, offset, patch)
        filter_ = weight[out * size : (out + 1) * size]
        asked = sign[n]
        z = zero
        for k in range(size):
            term = asked * filter_[k] * patch[k]
            term = term if term > zero else zero
            speaks[k] = term
            z += term
        if z <= limits[0] or abs(evidence[n]) > z * limits[1]:
            rates[n] = zero
            continue
        rates[n] = rate = evidence[n] / z
        for k in range(size):
            flow[k] += rate * speaks[k]
    return m
