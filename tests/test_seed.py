"""*How You See Me* as published: node for node, against a loop over nodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import product

import networks
import pytest
import seed_reference
import torch
from torch import Tensor, nn

import howyouseeme as hysm
from howyouseeme import kernels
from howyouseeme.backtrack import plan
from howyouseeme.links import Diagonal
from howyouseeme.maps import inliers
from howyouseeme.methods import Seed, get_method
from howyouseeme.nodes import Nodes
from howyouseeme.tape import Tape, record

Counts = dict[tuple[int, ...], int]


def reached(network: nn.Module, image: Tensor, target: int, **parameters: object) -> Counts:
    """How many paths howyouseeme brings to each element of the input."""
    return walked(record(network, [image]), target, **parameters)


def walked(tape: Tape, target: int, **parameters: object) -> Counts:
    way = plan(tape, tape.output)
    end = Seed(outliers=False, **parameters).walk(way, torch.tensor([target]))
    counts = end.strength[tape.inputs[0]][0]
    return {tuple(place): int(counts[tuple(place)]) for place in torch.nonzero(counts).tolist()}


@cache
def network(name: str) -> nn.Module:
    return getattr(networks, name)().double()


def images(name: str) -> dict[str, Tensor]:
    """Noise, smooth noise and photos, as the network takes them."""
    size = {"cifar": 32, "squeezenet": 227, "efficientnet": 224}[name]
    generator = torch.Generator().manual_seed(7)
    noise = torch.rand(1, 3, size, size, generator=generator, dtype=torch.float64) * 255
    coarse = torch.rand(1, 3, 8, 8, generator=generator, dtype=torch.float64) * 255
    raw = {
        "noise": noise.round(),
        "blobs": nn.functional.interpolate(coarse, size=(size, size), mode="bicubic"),
        **{kind: networks.photo(kind, size) for kind in ("cat", "coffee", "rocket")},
    }
    take: dict[str, Callable[[Tensor], Tensor]] = {
        "cifar": lambda image: image,
        "squeezenet": networks.squeezenet_input,
        "efficientnet": lambda image: (image - 127) / 128,
    }
    return {kind: take[name](image) for kind, image in raw.items()}


@pytest.mark.parametrize("position", ["contribution", "activation"])
@pytest.mark.parametrize(
    ("name", "k"),
    [
        *(("cifar", k) for k in (1, 5, 20)),
        ("squeezenet", 20),  # has no fully connected layer, so k makes no difference
        *(("efficientnet", k) for k in (1, 5, 20)),
    ],
)
def test_same_pixels_as_the_reference(name: str, k: int, position: str) -> None:
    model = network(name)
    reference = getattr(seed_reference, name)
    for kind, image in images(name).items():
        if k < 20 and kind not in {"noise", "cat"}:
            continue
        tape = record(model, [image])
        order = tape.output.data[0].argsort(descending=True, stable=True).tolist()
        for target in (order[0], order[1], order[-1]):  # the last: what hardly speaks for a class
            expected = reference(model, image, target, k, position).count
            found = walked(tape, target, k=k, position=position)
            assert found == expected, f"{kind}, class {target}"


@pytest.mark.parametrize("name", ["cifar", "squeezenet", "efficientnet"])
def test_the_networks_reach_pixels(name: str) -> None:
    """The test above compares something: photos reach pixels, by as many paths as the layers allow."""
    image = images(name)["cat"]
    with torch.no_grad():
        target = int(network(name)(image).argmax())
    paths = sum(reached(network(name), image, target, k=5).values())
    most = {"cifar": 125, "squeezenet": 1, "efficientnet": 5}[name]
    assert 0.5 * most <= paths <= most


def test_a_negative_batch_norm_turns_strongest_into_weakest() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = model.double().eval()
    image = torch.tensor([[[[3.0, -1.0], [5.0, 2.0]]]], dtype=torch.float64)
    assert reached(model, image, 0) == {(0, 1, 0): 1}
    model[0].weight.data.fill_(-1)
    assert reached(model, image, 0) == {(0, 0, 1): 1}


def test_the_lowest_index_wins_every_tie() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(8, 2)).double().eval()
    nn.init.ones_(linear[1].weight)
    ones = torch.ones(1, 2, 2, 2, dtype=torch.float64)
    assert reached(linear, ones, 1, k=3) == {(0, 0, 0): 1, (0, 0, 1): 1, (0, 1, 0): 1}
    conv = nn.Sequential(nn.Conv2d(2, 1, 2), nn.Flatten()).double().eval()
    nn.init.ones_(conv[0].weight)
    for position in ("contribution", "activation"):
        assert reached(conv, ones, 0, position=position) == {(0, 0, 0): 1}


def test_a_fully_connected_layer_takes_only_what_excites_the_node() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False)).double().eval()
    model[1].weight.data[:] = torch.tensor([[2.0, -1.0, 0.0, 1.0]])
    image = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    assert reached(model, image, 0, k=4) == {(0, 0, 0): 1, (0, 1, 1): 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("inputs", "k"), [(5, 8), (40, 1), (700, 20)])
def test_the_kernel_takes_the_most_exciting_inputs(inputs: int, k: int, dtype: torch.dtype) -> None:
    """Against sorting all contributions: both signs, many ties, more inputs than a block has, or fewer than k."""
    generator = torch.Generator().manual_seed(inputs)
    activation = torch.randint(-2, 4, (3, inputs), generator=generator).to(dtype)
    weight = torch.randint(-3, 4, (4, inputs), generator=generator).to(dtype)
    index, sign = torch.arange(12), torch.tensor([1, -1, 1]).repeat(4).to(dtype)
    most = min(k, inputs)
    chosen, found = torch.full((12, most), -1), torch.zeros(12, most, dtype=dtype)
    total = torch.zeros(12, dtype=dtype)
    arrays = (activation, weight, index, sign, chosen, found, total)
    kernels.most_exciting(*(item.numpy() for item in arrays))
    for n in range(12):
        contribution = (sign[n] * weight[n % 4] * activation[n // 4]).tolist()
        order = sorted(range(inputs), key=lambda i: (-contribution[i], i))
        expected = [i for i in order[:most] if contribution[i] > 0]
        assert chosen[n].tolist() == expected + [-1] * (most - len(expected))
        assert found[n, : len(expected)].tolist() == [contribution[i] for i in expected]
        assert total[n] == sum(c for c in contribution if c > 0)


def test_the_channel_is_decided_by_the_sum_and_the_position_by_the_rule() -> None:
    """Channel 1 has the largest single contribution, channel 0 the larger sum."""
    model = nn.Sequential(nn.Conv2d(2, 1, (1, 3), bias=False), nn.Flatten()).double().eval()
    model[0].weight.data[:] = torch.tensor([[[[1.0, 3.0, 2.0]], [[9.0, -4.0, -4.0]]]])
    image = torch.tensor([[[[5.0, 2.0, 2.0]], [[1.0, 1.0, 1.0]]]], dtype=torch.float64)
    assert reached(model, image, 0, position="contribution") == {(0, 0, 1): 1}
    assert reached(model, image, 0, position="activation") == {(0, 0, 0): 1}


def lonely(points: list[tuple[int, int]], height: int, width: int) -> set[tuple[int, int]]:
    """The points that the rule drops, by looking at every pair."""
    reach = 0.1 * math.hypot(height, width)
    return {
        point
        for point in points
        if sum(math.dist(point, other) <= reach for other in points) <= 0.05 * len(points)
    }


@pytest.mark.parametrize("size", [(1, 1), (9, 31), (30, 40), (64, 64), (80, 60)])
@pytest.mark.parametrize("share", [0.002, 0.02, 0.2])
def test_outliers_against_every_pair(size: tuple[int, int], share: float) -> None:
    """(30, 40) and (80, 60) have whole diagonals: points lie at the very edge of the reach."""
    generator = torch.Generator().manual_seed(size[0])
    for _ in range(5):
        evidence = torch.rand(size, generator=generator)
        cluster = torch.rand(size, generator=generator).cumsum(0).cumsum(1)
        evidence[torch.rand(size, generator=generator) > share * cluster / cluster.mean()] = 0
        evidence[0, 0] = -1  # evidence against is no point
        points = [tuple(place) for place in torch.nonzero(evidence > 0).tolist()]
        kept = inliers(evidence)
        gone = {p for p in points if kept[p] == 0}
        assert gone == lonely(points, *size)
        for p in set(points) - gone:
            assert kept[p] == evidence[p]


def test_outliers_drop_some_and_keep_some() -> None:
    evidence = torch.zeros(50, 50)
    for y, x in product(range(8), range(8)):
        evidence[y, x] = 1
    evidence[45, 45] = 100  # 1 of 65: less than 5 %
    assert inliers(evidence).sum() == 64
    assert bool((inliers(evidence)[:8, :8] == 1).all())


def test_exactly_five_percent_are_too_few() -> None:
    evidence = torch.zeros(50, 50)
    evidence[0, :19] = 0.5
    evidence[0, 8:12] = 1
    evidence[45, 45] = 1  # 1 of 20
    kept = inliers(evidence)
    assert kept[45, 45] == 0
    assert int((kept > 0).sum()) == 19


def test_outliers_are_dropped_unless_told_otherwise() -> None:
    image = images("cifar")["cat"]
    with_, without = (
        hysm.explain(network("cifar"), image, method="seed", outliers=outliers)
        for outliers in (True, False)
    )
    assert torch.equal(with_.evidence[0], inliers(without.evidence[0]))
    assert len(with_.points[0]) > 0


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"k": 0}, "k=0"),
        ({"k": -3}, "k=-3"),
        ({"position": "best"}, "'best'.*contribution or activation"),
        ({"nodes": 5}, "nodes"),
    ],
)
def test_wrong_parameters_are_named(parameters: dict[str, object], named: str) -> None:
    with pytest.raises(hysm.InputError, match=named):
        get_method("seed", **parameters)
    with pytest.raises(hysm.InputError, match=named):
        hysm.Explainer(nn.Identity().eval(), "seed", **parameters)


def test_what_rises_with_its_input_is_passed_in_place() -> None:
    """The shortcut for such calls chooses what looking at their weights would."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    norm.weight.data.uniform_(0.5, 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(1)).eval()
    tape = record(model, [torch.randn(1, 3, 6, 6)])
    method = Seed()
    passed = 0
    for value, step in plan(tape, tape.output).steps:
        source, link = step.links[0]
        if not isinstance(link, Diagonal):
            continue
        index = torch.arange(0, value.numel, 3)
        ones = torch.ones(len(index), dtype=torch.float64)
        sign = torch.where(index % 2 == 0, 1.0, -1.0).double()
        here = Nodes(index, 2 * ones, sign, ones / len(index))
        ((_, sent),) = method._send(step, here)
        looked_at = method._choose_some(source, link, here, torch.arange(len(index)))
        assert torch.equal(sent.child, looked_at.child)
        for name in ("index", "count", "sign", "share"):
            assert torch.equal(getattr(sent.nodes, name), getattr(looked_at.nodes, name)), name
        passed += 1
    assert passed == 3
