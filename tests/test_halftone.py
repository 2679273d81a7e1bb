"""Halftones against their definition, and what kernels do against the links' edges."""

from __future__ import annotations

from itertools import groupby, product
from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor

from howyouseeme import crew, halftone
from howyouseeme.halftone import Arrivals, Dots, Heap, ended, excite, move
from howyouseeme.links import Convolution, Diagonal, Link, Matrix, Pad
from howyouseeme.tape import Value


def value(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Value:
    """Activations of both signs, and zeros."""
    data = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Value(data.masked_fill(data.abs() < 0.2, 0).to(dtype), 0)


def filled(held: Value, batch: int, seed: int = 1) -> tuple[Heap, Tensor]:
    """A heap with evidence at two thirds of the nodes, half of it added twice; and the evidence."""
    random = torch.Generator().manual_seed(seed)
    evidence = torch.randn(held.numel, generator=random, dtype=torch.float64) ** 3
    evidence[torch.rand(held.numel, generator=random) < 1 / 3] = 0
    heap = Heap(held, batch)
    index = torch.randperm(held.numel, generator=random)
    for part in (index, index[::2]):
        heap.add(part, evidence[part])
    evidence[index[::2]] *= 2
    return heap, evidence.to(heap.evidence.dtype)


def naive(
    evidence: Tensor, shape: tuple[int, ...], batch: int, steps: np.ndarray, seed: int
) -> dict[int, float]:
    """Each sample by itself, node by node, from the definition."""
    channel_factor, place_factor, shift = (int(i) for i in halftone._dither(seed))
    each, kept = prod(shape) // batch, {}
    channels, inner = shape[1], prod(shape[2:])
    real = evidence.numpy().dtype.type
    for sample in range(batch):
        mine = evidence[sample * each : (sample + 1) * each].numpy()
        step = real(steps[sample])
        for i, found in enumerate(mine):
            row, rest = divmod(i, channels * inner)
            channel, inside = divmod(rest, inner)
            place = row * inner + inside
            pattern = (place * place_factor + shift + channel * channel_factor) % 2**32
            if abs(found) > real(pattern >> 8) * real(2.0**-24) * step:
                size = max(abs(found), step)
                kept[sample * each + i] = float(size if found > 0 else -size)
    return kept


#: The steps with which all go on.
ALL = np.zeros(2)

SHAPES = [(2, 5, 6, 7), (2, 30), (2, 3, 40)]


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("most", [1, 9, 40, None])
def test_a_halftone_is_its_definition(
    shape: tuple[int, ...], most: int | None, dtype: torch.dtype, compiled: bool
) -> None:
    held = value(shape, dtype=dtype)
    heap, evidence = filled(held, batch=2)
    torch.testing.assert_close(heap.dense().flatten(), evidence)
    steps = evidence.reshape(2, -1).abs().double().sum(1).numpy() / (most or np.inf)
    expected = naive(heap.dense().flatten(), shape, 2, steps, seed=3)
    dots = heap.draw(steps, 3) if compiled else heap._drawn(steps, halftone._dither(3))
    found = dict(zip(dots.index.tolist(), dots.evidence.tolist(), strict=True))
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(found) == len(dots)
    signs = torch.where(held.data.flatten()[dots.index] < 0, -1.0, 1.0)
    assert torch.equal(dots.sign.double(), signs.double())


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_favoured(shape: tuple[int, ...]) -> None:
    """Over many patterns each node has on average the evidence that it has."""
    held, times = value(shape), 600
    total = torch.zeros(held.numel, dtype=torch.float64)
    counts = []
    heap, evidence = filled(held, batch=2)
    steps = evidence.reshape(2, -1).abs().sum(1).numpy() / 20
    for seed in range(times):
        dots = heap.draw(steps, seed)
        total.index_add_(0, dots.index, dots.evidence)
        counts.append(len(dots))
    assert float((total / times - evidence).abs().max()) < 5 * steps.max() / 2 / times**0.5
    assert np.mean(counts) <= 2 * 20
    assert max(counts) < 2 * 20 * 3


def test_a_heap_that_is_not_in_order_reads_the_right_signs() -> None:
    held = value((2, 5, 6, 7))
    last = Value(held.data.contiguous(memory_format=torch.channels_last), 0)
    heap, _ = filled(held, batch=2)
    other, _ = filled(last, batch=2)
    steps = np.array([0.1, 0.2])
    one, two = heap.draw(steps, 0), other.draw(steps, 0)
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


def arrived(source: Value, link: Link, dots: Dots, most: int | None = None, seed: int = 0) -> Dots:
    """The dots that a link makes of others, as they come."""
    child = Value(torch.zeros(link.out_shape, dtype=torch.float64), 1)
    arrivals = Arrivals(2, most)
    arrivals.bring(child, dots)
    steps = arrivals.steps()
    arrivals.take(child, steps)
    excite([(source, link)], dots, arrivals, steps, seed)
    return arrivals.take(source, steps, seed)


def check(source: Value, link: Link) -> None:
    child = Value(torch.zeros(link.out_shape, dtype=torch.float64), 1)
    dots, arrivals = some_dots(child.numel, 2), Arrivals(2)
    rates = excite([(source, link)], dots, arrivals, ALL)
    expected, gone = by_edges(source, link, dots)
    found = arrivals.dense(source)
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-10, atol=1e-12)
    assert ended(child, dots, 2, rates).sum() == pytest.approx(float(gone), rel=1e-10, abs=1e-12)
    assert rates.shape == dots.evidence.shape
    for row in range(0, len(dots), 7):  # each dot has its own rate, in the order of the dots
        one = dots.pick(slice(row, row + 1))
        alone = excite([(source, link)], one, Arrivals(2), ALL)
        torch.testing.assert_close(rates[row : row + 1], alone, rtol=1e-10, atol=1e-12)


def convolution(
    options: tuple, layout: torch.memory_format = torch.contiguous_format
) -> tuple[Value, Convolution]:
    (inputs, outputs), kernel, stride, padding, dilation, groups, size = options
    source = value((2, inputs, *size))
    source = Value(source.data.contiguous(memory_format=layout), 0)
    random = torch.Generator().manual_seed(4)
    weight = torch.randn(outputs, inputs // groups, *kernel, generator=random, dtype=torch.float64)
    out = torch.nn.functional.conv2d(source.data, weight, None, stride, padding, dilation, groups)
    return source, Convolution(source.shape, out.shape, weight, stride, padding, dilation, groups)


def dealt(source: Value, link: Convolution, dots: Dots, most: int, seed: int) -> list[list[float]]:
    """What a convolution hands on [index, evidence], place by place, from the definition of the comb."""
    factor_c, factor_p, shift = (int(i) for i in halftone._dither(seed))
    plane, group_out = prod(link.out_shape[2:]), link.out_shape[1] // link.groups
    flat, each = source.data.reshape(-1), prod(link.out_shape) // 2

    def key(j: int) -> tuple[int, int, int]:
        channel, place = divmod(j, plane)
        row, out = divmod(channel, link.out_shape[1])
        return row, out // group_out, place

    nodes = list(zip(dots.index.tolist(), dots.evidence.tolist(), dots.sign.tolist(), strict=True))
    size = [sum(abs(e) for j, e, _ in nodes if j // each == sample) for sample in range(2)]
    if link.groups == 1:
        nodes.sort(key=lambda node: key(node[0]))
    found = []
    for (row, group, place), mine in groupby(nodes, lambda node: key(node[0])):
        flow: dict[int, float] = {}
        for j, e, o in mine:
            edges = link.edges(torch.tensor([j]))
            index, weight = edges.index.flatten(), edges.weight.flatten()
            speaks = (o * weight * flat[index.clamp(min=0)]).clamp(min=0).masked_fill(index < 0, 0)
            for i, part in zip(index.tolist(), (e * speaks / speaks.sum()).tolist(), strict=True):
                if i >= 0 and float(speaks.sum()) > 0:
                    flow[i] = flow.get(i, 0.0) + part
        step = size[row] / most
        pattern = (place * factor_p + shift + group * factor_c) % 2**32
        at = (pattern >> 8) * 2.0**-24
        for i, part in flow.items():
            before, at = int(at), at + abs(part) / step  # teeth at whole steps
            hits = int(at) - before
            if hits:
                found.append([i, hits * step if part > 0 else -hits * step])
    return found


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolutions(options: tuple, layout: torch.memory_format) -> None:
    check(*convolution(options, layout))


@pytest.mark.parametrize("most", [3, 25, 150])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_comb_is_its_definition(options: tuple, most: int) -> None:
    source, link = convolution(options)
    dots = some_dots(prod(link.out_shape), 2)
    found = arrived(source, link, dots, most, seed=5)
    expected = torch.tensor(dealt(source, link, dots, most, seed=5), dtype=torch.float64)
    assert torch.equal(found.index, expected[:, 0].long())
    torch.testing.assert_close(found.evidence, expected[:, 1], rtol=1e-10, atol=0)
    signs = torch.where(source.data.flatten()[found.index] < 0, -1.0, 1.0)
    assert torch.equal(found.sign, signs.double())


@pytest.mark.parametrize("most", [3, 25, None])
def test_a_comb_for_evidence_next_to_nothing(most: int | None) -> None:
    """One over the step would be infinite in float32."""
    source, link = convolution(CONVOLUTIONS[0])
    dots = some_dots(prod(link.out_shape), 2)
    dots = Dots(dots.index, dots.evidence * 1e-39, dots.sign)
    expected = arrived(source, link, dots, most)
    small = Value(source.data.float(), 0)
    link.weight = link.weight.float()
    dots = Dots(dots.index, dots.evidence.float(), dots.sign.float())
    found = arrived(small, link, dots, most)
    assert len(found) == pytest.approx(len(expected), rel=0.02)
    total, wanted = (float(item.evidence.double().abs().sum()) for item in (found, expected))
    assert total == pytest.approx(wanted, rel=0.02, abs=0)
    there = set(expected.index.tolist())
    assert sum(i in there for i in found.index.tolist()) >= 0.95 * len(found)


@pytest.mark.parametrize("options", CONVOLUTIONS[:2], ids=str)
def test_a_comb_lets_be_seen_what_is_no_number(options: tuple) -> None:
    """What an infinite activation makes of evidence travels on, and leads nowhere else."""
    source, link = convolution(options)
    source.data[0, 0, 3, 3] = torch.inf
    dots = some_dots(prod(link.out_shape), 2)
    found = arrived(source, link, dots, 25)
    assert bool(((found.index >= 0) & (found.index < source.numel)).all())
    assert bool(found.evidence.isnan().any())
    assert float(found.evidence.nan_to_num().abs().sum()) <= 2 * float(dots.evidence.abs().sum())


@pytest.mark.parametrize("options", CONVOLUTIONS[::5], ids=str)
def test_a_comb_favours_nothing(options: tuple) -> None:
    """Over many patterns each input has on average the evidence that is its due, and few at a time."""
    source, link = convolution(options)
    dots, times, most = some_dots(prod(link.out_shape), 2), 600, 20
    total, counts = torch.zeros(source.numel, dtype=torch.float64), []
    for seed in range(times):
        found = arrived(source, link, dots, most, seed)
        total.index_add_(0, found.index, found.evidence)
        counts.append(len(found))
    expected, _ = by_edges(source, link, dots)
    step = float(dots.evidence.abs().sum()) / most
    assert float((total / times - expected).abs().max()) < 5 * step / times**0.5
    assert np.mean(counts) <= 2 * most


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_threads_change_nothing(options: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    source, link = convolution(options)
    dots = some_dots(prod(link.out_shape), 2)
    alone = arrived(source, link, dots, 25)
    monkeypatch.setattr(crew, "_WORTH", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    index = dots.index.numpy()
    assert len(halftone._shared_out(index, np.arange(len(index)), link)) == 5
    shared = arrived(source, link, dots, 25)
    for one, other in zip(
        (alone.index, alone.evidence, alone.sign),
        (shared.index, shared.evidence, shared.sign),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("weight", ["turning", "some are 0", "one each"])
@pytest.mark.parametrize("margins", [(1, 2, 0, 1), (-1, -2, -1, 0), (0, 0, 0, 0, 2, 1)])
def test_moves(weight: str, margins: tuple[int, ...]) -> None:
    """By kernels as by the links' edges."""
    shape = (2, 5, 6, 7)
    random = torch.Generator().manual_seed(3)
    factors = torch.randn(shape if weight == "one each" else (1, 5, 1, 1), generator=random)
    if weight == "some are 0":
        factors[0, 2] = 0
    source = torch.zeros(shape)
    out = torch.nn.functional.pad(source, margins)
    for link in (Diagonal(shape, shape, factors.double()), Pad(shape, out.shape, margins)):
        dots = some_dots(prod(link.out_shape), 2)
        there, rest = move(link, dots)
        edges = link.edges(dots.index)
        passed = (edges.index >= 0) & (edges.weight != 0)
        assert torch.equal(there.index, edges.index[passed])
        assert torch.equal(there.evidence, dots.evidence[passed])
        assert torch.equal(there.sign, dots.sign[passed] * edges.weight[passed].sign())
        assert torch.equal(dots.index[:0] if rest is None else rest.index, dots.index[~passed])


def test_a_convolution_of_one_axis() -> None:
    source, weight = value((2, 3, 11)), value((4, 3, 3), 5).data
    out = torch.nn.functional.conv1d(source.data, weight, None, 2, 1)
    check(source, Convolution(source.shape, out.shape, weight, (2,), (1,), (1,), 1))


def test_a_matrix() -> None:
    source, weight = value((2, 5, 6)), value((4, 6), 5).data
    check(source, Matrix(source.shape, (2, 5, 4), weight))


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 6, 6), (2, 1, 6)])
def test_what_comes_by_several_calls_adds_up(shape: tuple[int, ...]) -> None:
    """A value that goes around a matrix, as in a transformer without norms, and through a convolution."""
    source = value(shape)
    links: list[Link] = [
        Diagonal(source.shape, source.shape),
        Matrix(source.shape, (*shape[:-1], 4), value((4, 6), 5).data),
        Convolution(source.shape, (2, 4, 6), value((4, shape[1], 3), 6).data, (1,), (1,), (1,), 1),
    ]
    for first in (1, -1):
        arrivals, expected = Arrivals(2), torch.zeros(source.numel, dtype=torch.float64)
        for link in links[::first]:
            child = Value(torch.zeros(link.out_shape, dtype=torch.float64), 1)
            dots = some_dots(child.numel, 2)
            excite([(source, link)], dots, arrivals, ALL)
            expected += by_edges(source, link, dots)[0]
        found = arrivals.dense(source)
        torch.testing.assert_close(found.flatten(), expected, rtol=1e-10, atol=1e-12)


def test_what_ends_is_netted_first() -> None:
    """Evidence for and against one node of the first sample, and two of the second."""
    index = torch.tensor([3, 3, 12, 15])
    evidence = torch.tensor([2.0, -1.5, 1.0, -4.0], dtype=torch.float64)
    held = value((2, 10))
    dots = Dots(index, evidence, torch.ones(4))
    assert ended(held, dots, 2).tolist() == [0.5, 1.0]
    stay, go = torch.tensor([0.0, 2.0, 0.0, 0.0]), torch.ones(4)
    assert ended(held, dots, 2, stay).tolist() == [2.0, 1.0]
    assert ended(held, dots, 2, go).tolist() == [0.0, 0.0]


def test_nothing_is_handed_on_where_nothing_arrived() -> None:
    source = value((2, 3, 4, 4))
    none = Dots(torch.empty(0, dtype=torch.long), *torch.empty(2, 0, dtype=torch.float64))
    weight = value((3, 4, 3, 3), 5).data
    for back in (True, False):  # by edges, and by the kernel
        link = Convolution(
            source.shape, (2, 4, 4, 4), weight if back else weight.transpose(0, 1).contiguous(),
            (1, 1), (1, 1), (1, 1), 1, back,
        )  # fmt: skip
        arrivals = Arrivals(2)
        assert len(excite([(source, link)], none, arrivals, ALL)) == 0
        assert len(arrivals.take(source, ALL)) == 0


@pytest.mark.parametrize("factor", [1.0, -0.5])
def test_a_sum_of_two(factor: float) -> None:
    """By its kernel as by the links' edges."""
    a, b = value((2, 3, 5, 5), 1), value((2, 3, 5, 5), 2)
    child = Value(a.data + factor * b.data, 2)
    links: list[tuple[Value, Link]] = [
        (a, Diagonal(a.shape, a.shape)),
        (b, Diagonal(b.shape, b.shape, torch.tensor(factor, dtype=torch.float64))),
    ]
    dots, found, expected = some_dots(child.numel, 3), Arrivals(2), Arrivals(2)
    rates = excite(links, dots, found, ALL)
    torch.testing.assert_close(rates, halftone._excite(links, dots, expected), rtol=1e-12, atol=0)
    for source in (a, b):
        there = found.take(source, ALL)
        signs = torch.where(source.data.flatten()[there.index] < 0, -1.0, 1.0)
        assert torch.equal(there.sign, signs.double())
        found.bring(source, there)
        torch.testing.assert_close(found.dense(source), expected.dense(source), rtol=1e-12, atol=0)


def test_evidence_that_would_overflow_ends() -> None:
    source = Value(torch.full((1, 1, 1, 1), 1e-30, dtype=torch.float32), 0)
    link = Convolution(
        (1, 1, 1, 1), (1, 1, 1, 1), torch.full((1, 1, 1, 1), 1e-6), (1, 1), (0, 0), (1, 1), 1
    )
    one = torch.ones(1)
    dots = Dots(torch.zeros(1, dtype=torch.long), one, one)
    assert excite([(source, link)], dots, Arrivals(1), ALL[:1]).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.float64], ids=str)
def test_dots_turn_around_behind_a_falling_scale(dtype: torch.dtype) -> None:
    weight = torch.tensor([2.0, -0.5, 1.0], dtype=dtype).reshape(1, 3, 1, 1)
    link = Diagonal((1, 3, 2, 2), (1, 3, 2, 2), weight)
    dots = Dots(torch.tensor([1, 5, 11]), torch.tensor([3.0, 4.0, 5.0]), torch.tensor([1.0, 1, -1]))
    there, rest = move(link, dots)
    assert rest is None
    assert there.index.tolist() == [1, 5, 11]
    assert there.sign.tolist() == [1, -1, -1]


def test_room_for_more_evidence_than_float32_counts() -> None:
    source = Value(torch.ones(1, 4, 8, 8), 0)
    link = Convolution(
        (1, 4, 8, 8), (1, 4, 8, 8), torch.full((4, 4, 1, 1), 1e3), (1,), (0,), (1,), 1
    )
    dots = Dots(torch.arange(200), torch.full((200,), 3e37), torch.ones(200))
    arrivals = Arrivals(1, 20)
    arrivals.bring(Value(torch.zeros(link.out_shape), 1), dots)
    assert not arrivals.overflow
    excite([(source, link)], dots, arrivals, arrivals.steps())
    assert 5 < len(arrivals.take(source, arrivals.steps())) < 60


@pytest.mark.parametrize("most", [9, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_of_a_value_is_what_its_nodes_are_one_by_one(
    shape: tuple[int, ...], most: int | None
) -> None:
    held = value(shape)
    evidence = value(tuple(reversed(shape)), 3).data.permute(*reversed(range(len(shape))))
    flat, found = evidence.reshape(-1), []
    for whole in (True, False):
        arrivals = Arrivals(2, most)
        if whole:
            arrivals.start(held, evidence)
        else:
            index = flat.nonzero()[:, 0]
            arrivals.add(held, index, flat[index])
        steps = arrivals.steps()
        found.append((steps, arrivals.take(held, steps, 1)))
    (steps, dots), (expected_steps, expected) = found
    np.testing.assert_allclose(steps, expected_steps, rtol=1e-12)
    assert torch.equal(dots.index, expected.index)
    torch.testing.assert_close(dots.evidence, expected.evidence)
