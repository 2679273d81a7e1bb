"""Evidence at one value as a few nodes, as a halftone shows a picture by a few dots.

Where a walk would spread to more nodes than it can afford, it keeps at most `most` of each sample: those
that carry at least a step, the `most`-th part of all, as they are. Of the weaker ones a fixed dither
pattern keeps as many as they are worth, each with the evidence of one step: a node with a third of a step
is kept in one of three places of the pattern. So on average nothing is lost, nothing favoured, and the
same evidence makes the same dots, wherever it stands in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backtrack import signs
from .links import Convolution, Diagonal, Link, Matrix
from .tape import Value

__all__ = ["Dots", "Heap", "excite", "heap_of", "precision"]

#: So many edges at a time are looked at of calls for which there is no kernel.
_CHUNK = 1 << 22


@dataclass(frozen=True, eq=False, slots=True)
class Dots:
    """n nodes of a value, each at most once.

    - `index` [n]: flat, row-major place in the value;
    - `evidence` [n];
    - `sign` [n]: +1 where what made the node large is asked for, -1 where what made it small.
    """

    index: Tensor
    evidence: Tensor
    sign: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def pick(self, which: Tensor | slice) -> Dots:
        return Dots(self.index[which], self.evidence[which], self.sign[which])


def precision(value: Value) -> torch.dtype:
    """Evidence is float64 where activations are, and float32 elsewhere: half precision loses it."""
    return torch.float64 if value.data.dtype == torch.float64 else torch.float32


class Heap:
    """Where the evidence of one value's nodes adds up until all of it has arrived.

    >>> heap = Heap(value, batch=1)
    >>> heap.add(torch.tensor([3, 7]), torch.tensor([0.5, 1.0]))
    >>> heap.draw(most=1000, seed=0).index
    tensor([3, 7])

    `axis` is that of the value's channels, whose nodes of one place lie side by side; None where few of a
    place are reached: then each node is a place of its own.
    """

    def __init__(self, value: Value, batch: int, axis: int | None = 1) -> None:
        shape = value.shape
        self.value, self.batch = value, batch
        if axis is not None:
            axis = axis % len(shape) if len(shape) > 1 else None
        self.channels = shape[axis] if axis is not None else 1
        self.inner = prod(shape[axis + 1 :]) if axis is not None else value.numel
        self.places = value.numel // max(self.channels, 1)
        self.compiled = value.data.device.type == "cpu"
        self.evidence = torch.zeros(value.numel, dtype=precision(value), device=value.data.device)
        if self.compiled:
            self.marks = np.zeros(self.places, np.uint8)
            self.touched = np.empty(self.places, np.int64)
            self.count = np.zeros(1, np.int64)

    def add(self, index: Tensor, evidence: Tensor) -> None:
        """Add evidence [n] to the nodes at flat indices [n]."""
        evidence = evidence.to(self.evidence.dtype)
        if not self.compiled:
            self.evidence.index_add_(0, index, evidence)
            return
        from . import kernels  # noqa: PLC0415 - takes a while

        kernels.add(index.numpy(), evidence.numpy(), self.channels, self.inner, *self.target)

    @property
    def target(self) -> tuple[Any, ...]:
        """What kernels write to."""
        return self.evidence.numpy(), self.marks, self.touched, self.count

    def dense(self) -> Tensor:
        """The evidence in the shape of the value."""
        if not self.compiled:
            return torch.reshape(self.evidence, self.value.shape)
        split = self.evidence.reshape(-1, self.inner, self.channels)
        return torch.reshape(split.mT, self.value.shape)

    def draw(self, most: int | None, seed: int) -> Dots:
        """The halftone with at most about `most` nodes a sample, or all; `seed` chooses the pattern."""
        dither = _dither(seed)
        if not self.compiled:
            return self._drawn(most, dither)
        from . import kernels  # noqa: PLC0415

        touched = self.touched[: self.count[0]]
        activation, layout = _memory(self.value.data, (-1, self.channels, self.inner))
        every = len(touched) * self.channels
        expected = every if most is None else min(every, 2 * most * self.batch + 1024)
        for room in (expected, every):  # a pattern may meet more than it should
            index = np.empty(room, np.int64)
            evidence, sign = (np.empty(room, self.evidence.numpy().dtype) for _ in range(2))
            count = kernels.draw(
                *(self.evidence.numpy(), touched, self.places, self.channels, self.inner),
                *(self.batch, float(most or np.inf), dither, activation, layout),
                *(index, evidence, sign),
            )
            if count >= 0:
                break
        return Dots(*(torch.from_numpy(item[:count]) for item in (index, evidence, sign)))

    @property
    def by_node(self) -> bool:
        """Whether each node is a place of its own."""
        return self.channels == 1

    def _drawn(self, most: int | None, dither: np.ndarray) -> Dots:
        """The same by PyTorch, for other devices."""
        index = self.evidence.nonzero()[:, 0]
        evidence = self.evidence[index]
        each = self.value.numel // self.batch
        sample = torch.div(index, each, rounding_mode="floor")
        if most is not None:
            size = evidence.abs()
            total, there = (
                size.new_zeros(self.batch, dtype=torch.float64).index_add_(0, sample, item.double())
                for item in (size, torch.ones_like(size))
            )
            step = torch.where(there > most, total / most, 0)[sample]
            row, rest = index // (self.channels * self.inner), index % (self.channels * self.inner)
            channel, inside = rest // self.inner, rest % self.inner
            place = (row * self.inner + inside) % max(self.places // self.batch, 1)
            multiply_c, multiply_p, shift = (int(item) for item in dither)
            pattern = (place * multiply_p + shift + channel * multiply_c) & 0xFFFFFFFF
            step = step.to(size.dtype)
            kept = size > (pattern >> 8).to(size.dtype) * 2.0**-24 * step
            evidence = torch.where(size < step, signs(evidence) * step, evidence)
            index, evidence = index[kept], evidence[kept]
        at = torch.unravel_index(index, self.value.shape)
        return Dots(index, evidence, signs(self.value.data[at]).to(evidence.dtype))


@lru_cache(maxsize=4096)
def _dither(seed: int) -> np.ndarray:
    """The factors of a channel and a place, and a shift, of a lattice modulo 2^32: uint32 [3]."""
    words = np.random.SeedSequence(seed).generate_state(3)
    return words | np.array([1, 1, 0], np.uint32)


def _memory(tensor: Tensor, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The memory of a CPU tensor, and where in it the tensor in that shape begins, and its strides."""
    if tensor.dtype not in {torch.float32, torch.float64}:
        tensor = tensor.float()
    view = tensor.reshape(shape)
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    flat = view.as_strided((max(last + 1, 0),), (1,), view.storage_offset())
    return flat.numpy(), np.array([0, *view.stride()], np.int64)


def excite(
    value: Value,
    links: Sequence[tuple[Value, Link]],
    dots: Dots,
    heaps: dict[Value, Heap],
    batch: int,
) -> tuple[Tensor, Tensor]:
    """Hand the evidence of dots on to the inputs that made them what they are, in proportion.

    e[i] = sum over j of e[j] · (o[j] w[j, i] a[i])⁺ / z[j], z[j] being the sum over all i. Returned are
    each dot's rate e[j] / z[j] [n], and the positive evidence of each sample [batch] that ended.
    """
    if not len(dots):
        for source, _ in links:
            heap_of(source, heaps, batch)
        return dots.evidence, dots.evidence.new_zeros(batch)
    if value.data.device.type == "cpu":
        source, link = links[0]
        convolution = _as_convolution(link) if len(links) == 1 else None
        if convolution is not None:
            one_each = convolution.groups == convolution.in_shape[1] > 1
            axis = -1 if isinstance(link, Matrix) else 1
            heap = heap_of(source, heaps, batch, None if one_each else axis)
            # Another call may have made it, which sees other nodes side by side.
            seen = convolution.in_shape[1], prod(convolution.in_shape[2:])
            if heap.by_node or (heap.channels, heap.inner) == seen:
                return _convolve(heap, convolution, dots)
        factors = [_factor(source, link) for source, link in links]
        if len(links) == 2 and None not in factors:
            return _meet(value, links, factors, dots, heaps, batch)
    most = max(_CHUNK // sum(link.fan_in() for _, link in links), 1)
    parts = [
        _excite(links, dots.pick(slice(first, first + most)), heaps, batch, value.numel // batch)
        for first in range(0, len(dots), most)
    ]
    return torch.cat([rate for rate, _ in parts]), torch.stack([ended for _, ended in parts]).sum(0)


def _factor(source: Value, link: Link) -> float | None:
    """The one factor of a term of a sum, where it has one and lies in memory as it is indexed."""
    if not isinstance(link, Diagonal) or not source.data.is_contiguous():
        return None
    if source.data.dtype not in {torch.float32, torch.float64} or link.in_shape != link.out_shape:
        return None
    if link.plain:
        return 1.0
    weight = link.weight
    return float(weight) if weight is not None and weight.dim() == 0 else None


def _meet(
    value: Value,
    links: Sequence[tuple[Value, Link]],
    factors: Sequence[float | None],
    dots: Dots,
    heaps: dict[Value, Heap],
    batch: int,
) -> tuple[Tensor, Tensor]:
    from . import kernels  # noqa: PLC0415

    rates = torch.empty_like(dots.evidence)
    ended, shares = rates.new_zeros(batch), rates.new_empty(2, len(rates))
    kernels.meet(
        *(source.flat.numpy() for source, _ in links),
        np.array(factors, rates.numpy().dtype),
        *(dots.index.numpy(), dots.evidence.numpy(), dots.sign.numpy()),
        *(value.numel // batch, np.array(limits(rates.dtype)), ended.numpy(), rates.numpy()),
        shares.numpy(),
    )
    for (source, _), share in zip(links, shares, strict=True):
        heap_of(source, heaps, batch).add(dots.index, share)
    return rates, ended


def heap_of(value: Value, heaps: dict[Value, Heap], batch: int, axis: int | None = 1) -> Heap:
    """The heap of a value, made if there is none yet."""
    if value not in heaps:
        heaps[value] = Heap(value, batch, axis)
    return heaps[value]


def limits(dtype: torch.dtype) -> tuple[float, float]:
    """What speaks for a node is rounding below the first; evidence divided by it overflows above the second."""
    known = torch.finfo(dtype)
    return known.tiny / known.eps, known.max / 1024


def _excite(
    links: Sequence[tuple[Value, Link]],
    dots: Dots,
    heaps: dict[Value, Heap],
    batch: int,
    each: int,
) -> tuple[Tensor, Tensor]:
    """By the links' edges."""
    contributions = []
    z: Any = 0
    for source, link in links:
        edges = link.edges(dots.index)
        index = edges.index.reshape(len(dots), -1)
        weight = edges.weight.reshape(index.shape)
        hole = index < 0
        activation = _read(source.data, index.clamp(min=0)).to(dots.evidence.dtype)
        speaks = (dots.sign[:, None] * weight.to(activation.dtype) * activation).clamp(min=0)
        speaks = speaks.masked_fill(hole, 0)
        contributions.append((source, index, speaks))
        z = z + speaks.sum(1)
    least, most = limits(dots.evidence.dtype)
    dead = (z <= least) | (dots.evidence.abs() > z * most)
    rate = dots.evidence / z.masked_fill(dead, torch.inf)
    for source, index, speaks in contributions:
        share = (speaks * rate[:, None]).reshape(-1)
        there = share != 0
        heap_of(source, heaps, batch).add(index.reshape(-1)[there], share[there])
    ended = rate.new_zeros(batch)
    sample = torch.div(dots.index[dead], each, rounding_mode="floor")
    ended.index_add_(0, sample, dots.evidence[dead].clamp(min=0))
    return rate, ended


def _read(tensor: Tensor, index: Tensor) -> Tensor:
    """The elements at flat, row-major indices."""
    if tensor.is_contiguous():
        return tensor.reshape(-1)[index]
    return tensor[torch.unravel_index(index, tensor.shape)]


def _by_place(dots: Dots, channels: int, plane: int) -> tuple[Dots, np.ndarray | None]:
    """Dots of a value [batch, channel, ...], those of one place one after the other; and their order."""
    from . import kernels  # noqa: PLC0415

    key = np.empty(len(dots), np.int64)
    if kernels.places_first(dots.index.numpy(), channels, plane, key):
        return dots, None
    order = np.argsort(key)
    return dots.pick(torch.from_numpy(order)), order


def _as_convolution(link: Link) -> Convolution | None:
    """A convolution over one or two axes that does the same; None if there is none."""
    if isinstance(link, Convolution):
        return None if link.back or link.weight.dim() > 4 else link
    if not isinstance(link, Matrix) or len(link.in_shape) < 2:
        return None
    outputs, inputs = link.weight.shape
    rows = prod(link.in_shape[:-1])  # places of one pixel
    weight = link.weight[:, :, None, None]
    return Convolution((rows, inputs, 1, 1), (rows, outputs, 1, 1), weight, (1,), (0,), (1,), 1)


def _convolve(heap: Heap, link: Convolution, dots: Dots) -> tuple[Tensor, Tensor]:
    from . import kernels  # noqa: PLC0415

    dots, order = _by_place(dots, link.out_shape[1], prod(link.out_shape[2:]))
    in_shape, out_shape = list(link.in_shape), list(link.out_shape)
    kernel = list(link.weight.shape[2:])
    options = [kernel, list(link.stride), list(link.padding), list(link.dilation)]
    while len(kernel) < 2:  # one axis is as good as two, the first of one pixel
        for shape in (in_shape, out_shape):
            shape.insert(2, 1)
        for option, neutral in zip(options, (1, 1, 0, 1), strict=True):
            option.insert(0, neutral)
    window = [item for option in options for item in option]
    activation, layout = _memory(heap.value.data, in_shape)
    weight = link.weight.to(heap.evidence.dtype).reshape(-1).numpy()
    rates = torch.empty_like(dots.evidence)
    ended = np.zeros(in_shape[0])
    kernels.convolve(
        *(activation, layout, np.array(in_shape), weight, np.array(out_shape), np.array(window)),
        *(link.groups, dots.index.numpy(), dots.evidence.numpy(), dots.sign.numpy()),
        *(np.array(limits(heap.evidence.dtype)), heap.by_node, *heap.target, ended, rates.numpy()),
    )
    if order is not None:
        rates = torch.empty_like(rates).index_copy_(0, torch.from_numpy(order), rates)
    # Rows of a matrix lie within the samples.
    return rates, torch.from_numpy(ended.reshape(heap.batch, -1).sum(1)).to(dots.evidence.dtype)
