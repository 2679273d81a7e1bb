"""Halftones against their definition, and what kernels do against the links' edges."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor

from howyouseeme import halftone
from howyouseeme.halftone import Dots, Heap, excite
from howyouseeme.links import Convolution, Diagonal, Link, Matrix
from howyouseeme.tape import Value


def value(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Value:
    """Activations of both signs, and zeros."""
    data = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Value(data.masked_fill(data.abs() < 0.2, 0).to(dtype), 0)


def filled(held: Value, axis: int | None, batch: int, seed: int = 1) -> tuple[Heap, Tensor]:
    """A heap with evidence at two thirds of the nodes, half of it added twice; and the evidence."""
    random = torch.Generator().manual_seed(seed)
    evidence = torch.randn(held.numel, generator=random, dtype=torch.float64) ** 3
    evidence[torch.rand(held.numel, generator=random) < 1 / 3] = 0
    heap = Heap(held, batch, axis)
    index = torch.randperm(held.numel, generator=random)
    for part in (index, index[::2]):
        heap.add(part, evidence[part])
    evidence[index[::2]] *= 2
    return heap, evidence.to(heap.evidence.dtype)


def naive(
    evidence: Tensor, shape: tuple[int, ...], axis: int | None, batch: int, most: int, seed: int
) -> dict[int, float]:
    """Each sample by itself, node by node, from the definition."""
    channel_factor, place_factor, shift = (int(i) for i in halftone._dither(seed))
    each, kept = prod(shape) // batch, {}
    inner = prod(shape[axis % len(shape) + 1 :]) if axis is not None else each
    channels = shape[axis] if axis is not None else 1
    real = evidence.numpy().dtype.type
    for sample in range(batch):
        mine = evidence[sample * each : (sample + 1) * each].numpy()
        few = np.count_nonzero(mine) <= most
        step = real(0) if few else real(np.abs(mine).astype(np.float64).sum() / most)
        for i, found in enumerate(mine):
            row, rest = divmod(i, channels * inner)
            channel, inside = divmod(rest, inner)
            place = row * inner + inside
            pattern = (place * place_factor + shift + channel * channel_factor) % 2**32
            if abs(found) > real(pattern >> 8) * real(2.0**-24) * step:
                size = max(abs(found), step)
                kept[sample * each + i] = float(size if found > 0 else -size)
    return kept


SHAPES = [
    ((2, 5, 6, 7), 1),
    ((2, 5, 6, 7), None),
    ((2, 4, 3, 8), -1),
    ((2, 30), -1),
    ((2, 3, 40), 1),
]


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("most", [1, 9, 40, 10_000])
def test_a_halftone_is_its_definition(
    shape: tuple[int, ...], axis: int | None, most: int, dtype: torch.dtype, compiled: bool
) -> None:
    held = value(shape, dtype=dtype)
    heap, evidence = filled(held, axis, batch=2)
    torch.testing.assert_close(heap.dense().flatten(), evidence)
    expected = naive(heap.dense().flatten(), shape, axis, 2, most, seed=3)
    if compiled:
        dots = heap.draw(most, seed=3)
    else:
        heap.evidence = heap.dense().flatten()
        dots = heap._drawn(most, halftone._dither(3))
    found = dict(zip(dots.index.tolist(), dots.evidence.tolist(), strict=True))
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(found) == len(dots)
    signs = torch.where(held.data.flatten()[dots.index] < 0, -1.0, 1.0)
    assert torch.equal(dots.sign.double(), signs.double())


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_nothing_is_favoured(shape: tuple[int, ...], axis: int | None) -> None:
    """Over many patterns each node has on average the evidence that it has."""
    held, times = value(shape), 600
    total = torch.zeros(held.numel, dtype=torch.float64)
    counts = []
    heap, evidence = filled(held, axis, batch=2)
    for seed in range(times):
        dots = heap.draw(20, seed)
        total.index_add_(0, dots.index, dots.evidence)
        counts.append(len(dots))
    step = float(evidence.reshape(2, -1).abs().sum(1).max()) / 20
    assert float((total / times - evidence).abs().max()) < 5 * step / 2 / times**0.5
    assert np.mean(counts) <= 2 * 20
    assert max(counts) < 2 * 20 * 3


def test_a_heap_that_is_not_in_order_reads_the_right_signs() -> None:
    held = value((2, 5, 6, 7))
    last = Value(held.data.contiguous(memory_format=torch.channels_last), 0)
    heap, _ = filled(held, 1, batch=2)
    other, _ = filled(last, 1, batch=2)
    one, two = heap.draw(30, 0), other.draw(30, 0)
    assert torch.equal(one.index, two.index)
    assert torch.equal(one.sign, two.sign)


CONVOLUTIONS = [
    (channels, kernel, stride, padding, dilation, groups, size)
    for (channels, groups), (kernel, padding), stride, dilation, size in product(
        [((4, 6), 1), ((4, 6), 2), ((4, 4), 4), ((4, 8), 4)],
        [((3, 3), (1, 1)), ((1, 1), (0, 0)), ((2, 3), (0, 2))],
        [(1, 1), (2, 1)],
        [(1, 1), (1, 2)],
        [(7, 6)],
    )
]


def by_edges(source: Value, link: Link, dots: Dots) -> tuple[Tensor, Tensor]:
    """Node by node, from the definition: evidence at the source, and what ended."""
    evidence, ended = torch.zeros(source.numel, dtype=torch.float64), 0.0
    flat = source.data.reshape(-1)
    for j, e, o in zip(dots.index, dots.evidence, dots.sign, strict=True):
        edges = link.edges(j[None])
        there = edges.index.flatten() >= 0
        index, weight = edges.index.flatten()[there], edges.weight.flatten()[there]
        speaks = (o * weight * flat[index]).clamp(min=0)
        if float(speaks.sum()) > 0:
            evidence[index] += e * speaks / speaks.sum()
        else:
            ended += max(float(e), 0)
    return evidence, torch.tensor(ended, dtype=torch.float64)


def some_dots(count: int, seed: int) -> Dots:
    random = torch.Generator().manual_seed(seed)
    index = torch.randperm(count, generator=random)[: max(count // 3, 1)]
    evidence = torch.randn(len(index), generator=random, dtype=torch.float64)
    sign = torch.where(torch.rand(len(index), generator=random) < 0.3, -1.0, 1.0).double()
    return Dots(index, evidence, sign)


def check(source: Value, link: Link) -> None:
    child = Value(torch.zeros(link.out_shape, dtype=torch.float64), 1)
    dots = some_dots(child.numel, 2)
    heaps: dict[Value, Heap] = {}
    rates, ended = excite(child, [(source, link)], dots, heaps, batch=2)
    expected, gone = by_edges(source, link, dots)
    torch.testing.assert_close(heaps[source].dense().flatten(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ended.sum(), gone, rtol=1e-10, atol=1e-12)
    assert rates.shape == dots.evidence.shape
    for row in range(0, len(dots), 7):  # each dot has its own rate, in the order of the dots
        alone, _ = excite(child, [(source, link)], dots.pick(slice(row, row + 1)), {}, batch=2)
        torch.testing.assert_close(rates[row : row + 1], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolutions(options: tuple, layout: torch.memory_format) -> None:
    (inputs, outputs), kernel, stride, padding, dilation, groups, size = options
    source = value((2, inputs, *size))
    source = Value(source.data.contiguous(memory_format=layout), 0)
    random = torch.Generator().manual_seed(4)
    weight = torch.randn(outputs, inputs // groups, *kernel, generator=random, dtype=torch.float64)
    out = torch.nn.functional.conv2d(source.data, weight, None, stride, padding, dilation, groups)
    check(
        source,
        Convolution(source.shape, out.shape, weight, stride, padding, dilation, groups),
    )


def test_a_convolution_of_one_axis() -> None:
    source, weight = value((2, 3, 11)), value((4, 3, 3), 5).data
    out = torch.nn.functional.conv1d(source.data, weight, None, 2, 1)
    check(source, Convolution(source.shape, out.shape, weight, (2,), (1,), (1,), 1))


def test_a_matrix() -> None:
    source, weight = value((2, 5, 6)), value((4, 6), 5).data
    check(source, Matrix(source.shape, (2, 5, 4), weight))


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 6, 6), (2, 1, 6)])
def test_calls_that_see_other_nodes_side_by_side_share_a_heap(shape: tuple[int, ...]) -> None:
    """A value that goes around a matrix, as in a transformer without norms, and through a convolution."""
    source, heaps = value(shape), {}
    expected = torch.zeros(source.numel, dtype=torch.float64)
    links: list[Link] = [
        Diagonal(source.shape, source.shape),
        Matrix(source.shape, (*shape[:-1], 4), value((4, 6), 5).data),
        Convolution(source.shape, (2, 4, 6), value((4, shape[1], 3), 6).data, (1,), (1,), (1,), 1),
    ]
    for first in (1, -1):
        heaps.clear()
        expected.zero_()
        for link in links[::first]:
            child = Value(torch.zeros(link.out_shape, dtype=torch.float64), 1)
            dots = some_dots(child.numel, 2)
            excite(child, [(source, link)], dots, heaps, batch=2)
            expected += by_edges(source, link, dots)[0]
        torch.testing.assert_close(
            heaps[source].dense().flatten(), expected, rtol=1e-10, atol=1e-12
        )


def test_nothing_is_handed_on_where_nothing_arrived() -> None:
    source = value((2, 3, 4, 4))
    none = Dots(torch.empty(0, dtype=torch.long), *torch.empty(2, 0, dtype=torch.float64))
    weight = value((3, 4, 3, 3), 5).data
    for back in (True, False):  # by edges, and by the kernel
        link = Convolution(
            source.shape, (2, 4, 4, 4), weight if back else weight.transpose(0, 1).contiguous(),
            (1, 1), (1, 1), (1, 1), 1, back,
        )  # fmt: skip
        heaps: dict[Value, Heap] = {}
        child = Value(torch.zeros(link.out_shape, dtype=torch.float64), 1)
        rates, ended = excite(child, [(source, link)], none, heaps, batch=2)
        assert len(rates) == 0
        assert ended.tolist() == [0, 0]
        assert not heaps[source].dense().any()


@pytest.mark.parametrize("factor", [1.0, -0.5])
def test_a_sum_of_two(factor: float) -> None:
    """By its kernel as by the links' edges."""
    a, b = value((2, 3, 5, 5), 1), value((2, 3, 5, 5), 2)
    child = Value(a.data + factor * b.data, 2)
    links: list[tuple[Value, Link]] = [
        (a, Diagonal(a.shape, a.shape)),
        (b, Diagonal(b.shape, b.shape, torch.tensor(factor, dtype=torch.float64))),
    ]
    dots = some_dots(child.numel, 3)
    found: dict[Value, Heap] = {}
    expected: dict[Value, Heap] = {}
    rates, ended = excite(child, links, dots, found, batch=2)
    by, gone = halftone._excite(links, dots, expected, 2, child.numel // 2)
    torch.testing.assert_close(rates, by, rtol=1e-12, atol=0)
    torch.testing.assert_close(ended, gone, rtol=1e-12, atol=0)
    for source in (a, b):
        torch.testing.assert_close(
            found[source].dense(), expected[source].dense(), rtol=1e-12, atol=0
        )


def test_evidence_that_would_overflow_ends() -> None:
    source = Value(torch.full((1, 1, 1, 1), 1e-30, dtype=torch.float32), 0)
    link = Convolution(
        (1, 1, 1, 1), (1, 1, 1, 1), torch.full((1, 1, 1, 1), 1e-6), (1, 1), (0, 0), (1, 1), 1
    )
    child = Value(torch.ones(1, 1, 1, 1), 1)
    one = torch.ones(1)
    rates, ended = excite(
        child, [(source, link)], Dots(torch.zeros(1, dtype=torch.long), one, one), {}, 1
    )
    assert rates.tolist() == [0]
    assert ended.tolist() == [1]
