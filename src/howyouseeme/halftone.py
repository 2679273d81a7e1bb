"""Evidence at one value as a few nodes, as a halftone shows a picture by a few dots.

Where a walk would spread to more nodes than it can afford, about `most` of each sample are on their way at
a time. The unit is a step, the `most`-th part of all the evidence on its way. Where a convolution hands
evidence on, each place deals for itself: it lays what its inputs get end to end, and puts a comb with teeth
one step apart upon it; an input gets a step for each tooth that meets it. Where several calls meet, a
dither pattern decides: a node that carries a step is kept as it is, one with a third of a step is kept in
one of three places of the pattern, with a whole one. Where the comb begins a pattern tells too. So on
average nothing is lost, nothing favoured, and the same evidence makes the same dots, wherever it stands in
a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import isfinite, prod
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from . import crew
from .backtrack import signs
from .links import Convolution, Diagonal, Link, Matrix, Pad
from .tape import Value, at_hand

__all__ = [
    "Arrivals",
    "Dots",
    "Heap",
    "as_convolution",
    "by_place",
    "ended",
    "excite",
    "limits",
    "move",
    "precision",
    "seen_by",
]

#: So many edges at a time are looked at of calls for which there is no kernel.
_CHUNK = 1 << 22

#: A dot takes a kernel as much time as so many edges, beside its own.
_DOT = 300

#: Index, evidence and sign of dots.
Arrays: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]

_TINY = np.finfo(np.float64).tiny


class Dots:
    """n nodes of a value; one that was reached in several ways may be there several times.

    - `index` [n]: flat, row-major place in the value;
    - `evidence` [n];
    - `sign` [n]: +1 where what made the node large is asked for, -1 where what made it small;
    - `size` [batch]: the absolute evidence of each sample, once it is known.

    `arrays` are the first three as kernels take them: most are never needed as tensors.
    """

    __slots__ = ("_arrays", "_tensors", "size")

    def __init__(
        self, index: Tensor, evidence: Tensor, sign: Tensor, size: np.ndarray | None = None
    ) -> None:
        self._tensors: tuple[Tensor, Tensor, Tensor] | None = (index, evidence, sign)
        self._arrays: Arrays | None = None
        self.size = size

    @classmethod
    def of(cls, arrays: Arrays, size: np.ndarray | None = None) -> Dots:
        """What a kernel wrote."""
        made = cls.__new__(cls)
        made._tensors, made._arrays, made.size = None, arrays, size
        return made

    @property
    def arrays(self) -> Arrays:
        if self._arrays is None:
            self._arrays = (self.index.numpy(), self.evidence.numpy(), self.sign.numpy())
        return self._arrays

    @property
    def at_hand(self) -> bool:
        """Whether kernels can take them."""
        return self._arrays is not None or at_hand(self.index)

    def _all(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._tensors is None:
            index, evidence, sign = map(torch.from_numpy, self.arrays)
            self._tensors = index, evidence, sign
        return self._tensors

    @property
    def index(self) -> Tensor:
        return self._all()[0]

    @property
    def evidence(self) -> Tensor:
        return self._all()[1]

    @property
    def sign(self) -> Tensor:
        return self._all()[2]

    @property
    def precision(self) -> torch.dtype:
        """Of the evidence."""
        if self._arrays is None:
            return self.evidence.dtype
        return torch.float64 if self._arrays[1].dtype == np.float64 else torch.float32

    def __len__(self) -> int:
        return len(self.index if self._arrays is None else self._arrays[0])

    def pick(self, which: Tensor | slice) -> Dots:
        return Dots(self.index[which], self.evidence[which], self.sign[which])


def precision(value: Value) -> torch.dtype:
    """Evidence is float64 where activations are, and float32 elsewhere: half precision loses it."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


class Heap:
    """Where the evidence of one value's nodes adds up until all of it has arrived.

    >>> heap = Heap(value, batch=1)
    >>> heap.add(torch.tensor([3, 7]), torch.tensor([0.5, 1.0]))
    >>> heap.draw(steps=np.array([0.01]), seed=0).index
    tensor([3, 7])
    """

    def __init__(self, value: Value, batch: int) -> None:
        shape = value.shape
        self.value, self.batch = value, batch
        self.channels = shape[1] if len(shape) > 1 else 1
        self.inner = prod(shape[2:]) if len(shape) > 1 else value.numel
        self.compiled, self._real = at_hand(value.data), _real(precision(value))
        if self.compiled:  # numpy's zeros take no time until they are touched
            self.evidence = torch.from_numpy(np.zeros(value.numel, self._real))
            self.marks = np.zeros(value.numel, np.uint8)
            self.touched = np.empty(value.numel, np.int64)
            self.count = np.zeros(1, np.int64)
        else:
            self.evidence = torch.zeros(value.numel, dtype=precision(value), device=value.device)

    def fill(self, evidence: Tensor) -> None:
        """Put in the evidence of all nodes, in the shape of the value, where there is none yet."""
        self.dense().copy_(evidence)
        if self.compiled:
            self.count[0] = self.value.numel
            self.touched, self.marks[:] = np.arange(self.value.numel), 1

    def add(self, index: Tensor, evidence: Tensor) -> None:
        """Add evidence [n] to the nodes at flat indices [n]."""
        evidence = evidence.to(self.evidence.dtype)
        if self.compiled:
            self._add(index.numpy(), evidence.numpy())
        else:
            self.evidence.index_add_(0, index, evidence)

    def gather(self, dots: Dots) -> None:
        """Add the evidence of dots to their nodes."""
        if self.compiled and dots.arrays[1].dtype == self._real:
            self._add(*dots.arrays[:2])
        else:
            self.add(dots.index, dots.evidence)

    def _add(self, index: np.ndarray, evidence: np.ndarray) -> None:
        from . import kernels  # noqa: PLC0415 - takes a while

        kernels.add(index, evidence, self.evidence.numpy(), self.marks, self.touched, self.count)

    def dense(self) -> Tensor:
        """The evidence in the shape of the value."""
        return self.evidence.reshape(self.value.shape)

    def draw(self, steps: np.ndarray, seed: int) -> Dots:
        """The halftone by the step of each sample [batch], all nodes where it is 0; `seed` chooses the pattern."""
        dither = _dither(seed)
        if not self.compiled:
            return self._drawn(steps, dither)
        from . import kernels  # noqa: PLC0415

        touched = self.touched[: self.count[0]]
        activation, strides = _memory(self.value.data, (-1, self.channels, self.inner))
        dots, heap = _room(len(touched), self._real), self.evidence.numpy()
        count = kernels.draw(
            *(heap, touched, self.channels, self.inner, steps.astype(heap.dtype)),
            *(dither, activation, strides, *dots),
        )
        return _first(count, dots)

    def _drawn(self, steps: np.ndarray, dither: np.ndarray) -> Dots:
        """The same by PyTorch, for other devices."""
        index = self.evidence.nonzero()[:, 0]
        evidence = self.evidence[index]
        each = self.value.numel // self.batch
        step = torch.from_numpy(steps).to(evidence)[torch.div(index, each, rounding_mode="floor")]
        row, rest = index // (self.channels * self.inner), index % (self.channels * self.inner)
        channel, inside = rest // self.inner, rest % self.inner
        places = self.value.numel // max(self.channels * self.batch, 1)
        place = (row * self.inner + inside) % max(places, 1)
        multiply_c, multiply_p, shift = (int(item) for item in dither)
        pattern = (place * multiply_p + shift + channel * multiply_c) & 0xFFFFFFFF
        size = evidence.abs()
        kept = size > (pattern >> 8).to(size.dtype) * 2.0**-24 * step
        evidence = torch.where(size < step, signs(evidence) * step, evidence)
        index, evidence = index[kept], evidence[kept]
        at = torch.unravel_index(index, self.value.shape)
        return Dots(index, evidence, signs(self.value.data[at]).to(evidence.dtype))


class Arrivals:
    """What has arrived at each value so far.

    >>> arrivals = Arrivals(batch=1, most=2000)
    >>> arrivals.bring(value, dots)
    >>> arrivals.take(value, arrivals.steps())
    """

    def __init__(self, batch: int, most: int | None = None) -> None:
        self.batch, self.most = batch, most
        self._heaps: dict[Value, Heap] = {}
        self._dots: dict[Value, list[Dots]] = {}
        self._size: dict[Value, np.ndarray] = {}  # absolute evidence of each sample [batch]
        self._total = np.zeros(batch)  # of all

    def start(self, value: Value, evidence: Tensor) -> None:
        """All the evidence of a value, in its shape, before any other: asked is what made each node as it is."""
        heap = self._heap(value)
        heap.fill(evidence)
        every = torch.arange(value.numel, device=value.device)
        self._note(value, Dots(every, heap.evidence, heap.evidence))  # signs are not looked at

    def add(self, value: Value, index: Tensor, evidence: Tensor) -> None:
        """Evidence [n] of the nodes at flat indices [n]: asked is what made each as it is."""
        evidence = evidence.to(precision(value))
        self._note(value, Dots(index, evidence, evidence))  # signs are not looked at
        self._heap(value).add(index, evidence)

    def bring(self, value: Value, dots: Dots) -> None:
        if dots.size is None:
            dots.size = self._note(value, dots)
        else:
            self._count(value, dots.size)
        self._dots.setdefault(value, []).append(dots)

    def __contains__(self, value: Value) -> bool:
        return value in self._size

    def take(self, value: Value, steps: np.ndarray, seed: int = 0) -> Dots:
        """All that arrived; what came in several ways as its halftone by the steps [batch].

        Where ways met, asked is what made a node as it is.
        """
        self._total = self._total - self._size.pop(value)
        parts = self._dots.pop(value, [])
        if len(parts) == 1 and value not in self._heaps:
            return parts[0]
        return self._merged(value, parts).draw(steps, seed)

    def dense(self, value: Value) -> Tensor:
        """All that arrived, in the shape of the value."""
        return self._merged(value, self._dots.pop(value, [])).dense()

    @property
    def overflow(self) -> bool:
        """Whether the evidence has become infinite, or no number."""
        return not isfinite(self._total.sum())

    def steps(self) -> np.ndarray:
        """The step of each sample [batch], now; 0 where all go on."""
        steps: np.ndarray = self._total / (self.most or np.inf)
        steps[steps < _TINY] = 0  # what has no reciprocal
        return steps

    def _note(self, value: Value, dots: Dots) -> np.ndarray:
        size, each = np.zeros(self.batch), max(value.numel // self.batch, 1)
        if dots.at_hand:
            from . import kernels  # noqa: PLC0415

            kernels.totals(*dots.arrays[:2], each, size)
        else:
            sample = torch.div(dots.index, each, rounding_mode="floor")
            total = dots.evidence.new_zeros(self.batch)
            total.index_add_(0, sample, dots.evidence.abs())
            size += total.cpu().numpy()
        self._count(value, size)
        return size

    def _count(self, value: Value, size: np.ndarray) -> None:
        self._total = self._total + size
        self._size[value] = self._size[value] + size if value in self._size else size

    def _heap(self, value: Value) -> Heap:
        if value not in self._heaps:
            self._heaps[value] = Heap(value, self.batch)
        return self._heaps[value]

    def _merged(self, value: Value, parts: list[Dots]) -> Heap:
        heap = self._heap(value)
        for dots in parts:
            heap.gather(dots)
        return self._heaps.pop(value)


@lru_cache(maxsize=4096)
def _dither(seed: int) -> np.ndarray:
    """The factors of a channel and a place, and a shift, of a lattice modulo 2^32: uint32 [3]."""
    words = np.random.SeedSequence(seed).generate_state(3)
    return words | np.array([1, 1, 0], np.uint32)


@lru_cache(maxsize=4096)
def _array(numbers: tuple[int, ...]) -> np.ndarray:
    """The same for kernels, which only read it."""
    return np.array(numbers, np.int64)


_AS_THEY_ARE = {torch.float32, torch.float64}


def _memory(tensor: Tensor, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The memory of a CPU tensor, and the strides in it of the tensor in that shape."""
    if tensor.shape == shape and tensor.dtype in _AS_THEY_ARE and tensor.is_contiguous():
        return tensor.numpy().reshape(-1), _array(tensor.stride())
    if tensor.dtype not in _AS_THEY_ARE:
        tensor = tensor.float()
    view = tensor.reshape(shape)
    strides = np.array(view.stride(), np.int64)
    if view.is_contiguous():
        return view.numpy().reshape(-1), strides
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    return view.as_strided((max(last + 1, 0),), (1,)).numpy(), strides


def _real(dtype: torch.dtype) -> type:
    """The same for numpy."""
    return np.float64 if dtype == torch.float64 else np.float32


def _room(count: int, real: Any) -> Arrays:
    """Where kernels write so many dots to."""
    return np.empty(count, np.int64), np.empty(count, real), np.empty(count, real)


def _first(count: int, arrays: Arrays, size: np.ndarray | None = None) -> Dots:
    """So many of what a kernel wrote."""
    index, evidence, sign = arrays
    return Dots.of((index[:count], evidence[:count], sign[:count]), size)


def ended(value: Value, dots: Dots, batch: int, rates: Tensor | None = None) -> np.ndarray:
    """The positive evidence of each sample [batch] that ends at these nodes; given their rates, where that is 0."""
    from . import kernels  # noqa: PLC0415

    total, each = np.zeros(batch), max(value.numel // batch, 1)
    if not dots.at_hand:  # what ends is little
        picked = dots if rates is None else dots.pick(rates == 0)
        dots, rates = Dots(picked.index.cpu(), picked.evidence.cpu(), picked.sign.cpu()), None
    index, evidence, _ = dots.arrays
    gone = np.zeros_like(evidence) if rates is None else rates.numpy()
    kernels.ended(index, evidence, gone, each, total)
    return total


def move(link: Link, dots: Dots) -> tuple[Dots, Dots | None]:
    """Through a call with one input for each output: all the evidence goes there; and what does not."""
    if isinstance(link, Diagonal) and link.rising:
        return dots, None
    if dots.at_hand:
        if isinstance(link, Pad):
            return _crop(link, dots)
        turned = _turn(link, dots) if isinstance(link, Diagonal) else None
        if turned is not None:
            return turned, None
    edges = link.edges(dots.index)
    ends = (edges.index < 0) | (edges.weight == 0)  # nothing passes: the output is a constant
    sign = dots.sign * signs(edges.weight).to(dots.sign.dtype)
    there = Dots(edges.index, dots.evidence, sign)
    if not bool(ends.any()):
        there.size = dots.size
        return there, None
    return there.pick(~ends), dots.pick(ends)


def _crop(link: Pad, dots: Dots) -> tuple[Dots, Dots | None]:
    """Dots off their padding, or in one of several tensors; and the others."""
    from . import kernels  # noqa: PLC0415

    index, evidence, sign = dots.arrays
    inside, rest = (_room(len(dots), evidence.dtype) for _ in range(2))
    count = kernels.crop(index, evidence, sign, np.array(link.axes), inside, rest)
    if count == len(dots):
        return _first(count, inside, dots.size), None
    return _first(count, inside), _first(len(dots) - count, rest)


def _turn(link: Diagonal, dots: Dots) -> Dots | None:
    """Dots behind one weight a channel, such as batch norm's; None if it is none, or some are 0."""
    weight, shape = link.weight, link.in_shape
    if weight is None or len(shape) < 2 or link.out_shape != shape:
        return None
    if weight.dim() != len(shape) or not weight.numel() == weight.shape[1] == shape[1]:
        return None
    from . import kernels  # noqa: PLC0415

    index, evidence, sign = dots.arrays
    turned = np.empty_like(sign)
    factors = weight.reshape(-1).to(dots.precision).numpy()
    if not kernels.turn(index, sign, factors, prod(shape[2:]), turned):
        return None
    return Dots.of((index, evidence, turned), dots.size)


def excite(
    links: Sequence[tuple[Value, Link]],
    dots: Dots,
    arrivals: Arrivals,
    steps: np.ndarray,
    seed: int = 0,
) -> Tensor:
    """Hand the evidence of dots on to the inputs that made them what they are, in proportion.

    e[i] = sum over j of e[j] · (o[j] w[j, i] a[i])⁺ / z[j], z[j] being the sum over all i. Returned is
    each dot's rate e[j] / z[j] [n], 0 where nothing speaks for it: there its evidence ends. `steps`
    [batch] and `seed` are those of the comb.
    """
    if not len(dots):
        for source, _ in links:
            arrivals.bring(source, dots)
        return dots.evidence
    if dots.at_hand:
        convolution = as_convolution(links[0][1]) if len(links) == 1 else None
        if convolution is not None:
            return _convolve(links[0][0], convolution, dots, arrivals, steps, seed)
        factors = [_factor(link) for _, link in links]
        if len(links) == 2 and None not in factors:
            return _meet(links, factors, dots, arrivals)
    most = max(_CHUNK // sum(link.fan_in() for _, link in links), 1)
    parts = [
        _excite(links, dots.pick(slice(first, first + most)), arrivals)
        for first in range(0, len(dots), most)
    ]
    return torch.cat(parts)


def _factor(link: Link) -> float | None:
    """The one factor of a term of a sum, where it has one."""
    if not isinstance(link, Diagonal) or link.in_shape != link.out_shape:
        return None
    if link.plain:
        return 1.0
    weight = link.weight
    return float(weight) if weight is not None and weight.dim() == 0 else None


def _meet(
    links: Sequence[tuple[Value, Link]],
    factors: Sequence[float | None],
    dots: Dots,
    arrivals: Arrivals,
) -> Tensor:
    from . import kernels  # noqa: PLC0415

    index, evidence, asked = dots.arrays
    rates = np.empty_like(evidence)
    shares, signs_ = np.empty((2, len(rates)), rates.dtype), np.empty((2, len(rates)), rates.dtype)
    real = dots.precision
    kernels.meet(
        *(source.flat.to(real).numpy() for source, _ in links),
        *(np.array(factors, rates.dtype), index, evidence, asked, _limits(real)),
        *(rates, shares, signs_),
    )
    for (source, _), share, sign in zip(links, shares, signs_, strict=True):
        arrivals.bring(source, Dots.of((index, share, sign)))
    return torch.from_numpy(rates)


def limits(dtype: torch.dtype) -> tuple[float, float]:
    """What speaks for a node is rounding below the first; evidence divided by it overflows above the second."""
    known = torch.finfo(dtype)
    return known.tiny / known.eps, known.max / 1024


@lru_cache(maxsize=4)
def _limits(dtype: torch.dtype) -> np.ndarray:
    return np.array(limits(dtype))


def _excite(links: Sequence[tuple[Value, Link]], dots: Dots, arrivals: Arrivals) -> Tensor:
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
    rate: Tensor = dots.evidence / z.masked_fill(dead, torch.inf)
    for source, index, speaks in contributions:
        share = (speaks * rate[:, None]).reshape(-1)
        there = share != 0
        arrivals.add(source, index.reshape(-1)[there], share[there])
    return rate


def _read(tensor: Tensor, index: Tensor) -> Tensor:
    """The elements at flat, row-major indices."""
    if tensor.is_contiguous():
        return tensor.reshape(-1)[index]
    return tensor[torch.unravel_index(index, tensor.shape)]


def as_convolution(link: Link) -> Convolution | None:
    """A convolution over two axes that does the same; None if there is none."""
    if isinstance(link, Matrix) and len(link.in_shape) > 1:
        outputs, inputs = link.weight.shape
        rows = prod(link.in_shape[:-1])  # places of one pixel
        weight = link.weight[:, :, None, None]
        return Convolution((rows, inputs, 1, 1), (rows, outputs, 1, 1), weight, (1,), (0,), (1,), 1)
    if not isinstance(link, Convolution) or link.back or not 3 <= link.weight.dim() <= 4:
        return None
    if link.weight.dim() == 4:
        return link
    # One axis is as good as two, the first of one pixel.
    (batch, channels, width), out = link.in_shape, link.out_shape
    return Convolution(
        (batch, channels, 1, width),
        (*out[:2], 1, out[2]),
        link.weight[:, :, None],
        (1, *link.stride),
        (0, *link.padding),
        (1, *link.dilation),
        link.groups,
    )


def by_place(link: Convolution, index: np.ndarray) -> np.ndarray:
    """The order [n] in which nodes of a convolution's output come place by place."""
    from . import kernels  # noqa: PLC0415

    plane, order = prod(link.out_shape[2:]), np.empty(len(index), np.int64)
    kernels.by_place(index, link.out_shape[1], plane, link.out_shape[0] * plane, order)
    return order


def seen_by(link: Convolution, source: Value, dtype: torch.dtype) -> tuple[Any, ...]:
    """What kernels are told of a convolution over two axes and its input."""
    window = (*link.weight.shape[2:], *link.stride, *link.padding, *link.dilation)
    weight = link.weight.to(dtype).reshape(-1).numpy()
    memory = _memory(source.data, link.in_shape)
    shapes = _array(tuple(link.in_shape)), weight, _array(tuple(link.out_shape))
    return (*memory, *shapes, _array(window), link.groups)


def _convolve(
    source: Value, link: Convolution, dots: Dots, arrivals: Arrivals, steps: np.ndarray, seed: int
) -> Tensor:
    from . import kernels  # noqa: PLC0415

    index, evidence, sign = dots.arrays
    # Dots of one place are to follow each other, unless no two have the same inputs.
    order = by_place(link, index) if link.groups == 1 else np.arange(len(index))
    work = (
        *(*seen_by(link, source, dots.precision), _limits(dots.precision)),
        *(steps, link.out_shape[0] // arrivals.batch, _dither(seed)),
    )
    rates, teeth = np.empty_like(evidence), np.inf
    if steps.any():  # of a sample whose step is 0 all go on: for them the room may be too small
        with np.errstate(over="ignore"):
            teeth = np.abs(evidence).sum(dtype=np.float64) / steps[steps > 0].min()

    def some(first: int, last: int) -> Arrays:
        mine, every = order[first:last], (last - first) * link.fan_in()
        for room in (min(every, last - first + 2 * teeth + 64), every):
            made = _room(int(room), evidence.dtype)
            found = kernels.convolve(*work, mine, index, evidence, sign, rates, *made)
            if found >= 0:
                break
        return made[0][:found], made[1][:found], made[2][:found]

    found = crew.run(some, _shared_out(index, order, link))
    arrivals.bring(source, Dots.of(found[0] if len(found) == 1 else _joined(found)))
    return torch.from_numpy(rates)


def _joined(parts: Sequence[Arrays]) -> Arrays:
    index, evidence, sign = map(np.concatenate, zip(*parts, strict=True))
    return index, evidence, sign


def _shared_out(index: np.ndarray, order: np.ndarray, link: Convolution) -> list[tuple[int, int]]:
    """First and last in the order [n] that each thread takes; those of one place and group stay together."""
    threads = crew.threads(len(index) * (link.fan_in() + _DOT))
    plane, group = prod(link.out_shape[2:]), link.out_shape[1] // link.groups

    def key(n: int) -> tuple[int, int, int]:
        channel, place = divmod(int(index[order[n]]), plane)
        row, out = divmod(channel, link.out_shape[1])
        return row, out // group, place

    cuts = [0]
    for i in range(1, threads):
        cut = max(len(index) * i // threads, cuts[-1] + 1)
        while cut < len(index) and key(cut - 1) == key(cut):
            cut += 1
        if cut < len(index):
            cuts.append(cut)
    return list(zip(cuts, [*cuts[1:], len(index)], strict=True))
