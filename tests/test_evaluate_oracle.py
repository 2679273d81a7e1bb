"""The oracle against all paths of tiny networks, one by one; and what coverage claims, by the same count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from ledger import account
from torch import Tensor, nn

import howyouseeme as hysm
from howyouseeme import InputError
from howyouseeme.backtrack import Plan, plan
from howyouseeme.evaluate.oracle import compare, top_paths, total, weigh
from howyouseeme.tape import Value, record


class Residual(nn.Module):
    """A residual add, batch norm with a negative scale, and a value that is added to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2)
        self.second = nn.Conv2d(2, 2, 1)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm(self.first(x)), 0.1)
        x = self.second(x) + x + x
        return self.head(x.mean((2, 3)))


class Branches(nn.Module):
    """Two convolutions side by side, then the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 1, 2), nn.Conv2d(2, 2, 2)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x).relu(), self.right(x).tanh()], 1)
        return self.head(F.max_pool2d(x, 2).flatten(1))


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 3)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (plain, (1, 1, 3, 3)),
    "residual": (Residual, (1, 1, 3, 3)),
    "branches": (Branches, (1, 2, 3, 3)),
}


def network(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    make, shape = NETWORKS[name]
    torch.manual_seed(seed)
    model = make().double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.tensor([-0.8, 1.3]))
                module.running_mean.normal_()
    return model, torch.randn(shape, dtype=torch.float64)


@torch.no_grad()
def recorded(model: nn.Module, image: Tensor) -> Plan:
    tape = record(model, [image])
    return plan(tape, tape.output)


@pytest.fixture(params=list(product(NETWORKS, (0, 1))), ids=lambda p: f"{p[0]}-{p[1]}")
def way(request: pytest.FixtureRequest) -> Plan:
    return recorded(*network(*request.param))


# -- the naive reference: every path, by recursion --------------------------------------------------

Nodes = tuple[tuple[Value, int], ...]


@torch.no_grad()
def matrices(way: Plan) -> dict[Value, list[tuple[Value, Tensor, bool]]]:
    """For each value its sources, each with the matrix of its link: one column for each unit input."""
    found: dict[Value, list[tuple[Value, Tensor, bool]]] = {}
    for value, step in way.steps:
        found[value] = []
        for source, link in step.links:
            units = torch.eye(source.numel, dtype=torch.float64)
            columns = [link.forward(unit.reshape(source.shape)).reshape(-1) for unit in units]
            found[value].append((source, torch.stack(columns, 1), link.one_to_one))
    return found


def contributions(way: Plan, node: int) -> Iterator[tuple[float, Nodes]]:
    """Every path with a product of weights that isn't 0."""
    links = matrices(way)

    def follow(weight: float, nodes: Nodes) -> Iterator[tuple[float, Nodes]]:
        value, j = nodes[-1]
        if value not in links:
            yield weight * float(value.data.reshape(-1)[j]), nodes
            return
        for source, matrix, _ in links[value]:
            for i in range(source.numel):
                w = float(matrix[j, i])
                if w != 0:
                    yield from follow(weight * w, (*nodes, (source, i)))

    yield from follow(1.0, ((way.start, node),))


def excitations(way: Plan, node: int) -> Iterator[tuple[float, Nodes]]:
    """Every path with a share above 0, as excitation backprop defines it."""
    links = matrices(way)

    def follow(share: float, sign: int, nodes: Nodes) -> Iterator[tuple[float, Nodes]]:
        value, j = nodes[-1]
        if value not in links:
            yield share, nodes
            return
        alone = len(links[value]) == 1 and links[value][0][2]
        excited = []
        for source, matrix, _ in links[value]:
            for i in range(source.numel):
                w, a = float(matrix[j, i]), float(source.data.reshape(-1)[i])
                if alone and w != 0:
                    excited.append((1.0, sign if w > 0 else -sign, source, i))
                elif not alone and sign * w * a > 0:
                    excited.append((sign * w * a, 1 if a > 0 else -1, source, i))
        z = sum(c for c, *_ in excited)
        for c, asked, source, i in excited:
            yield from follow(share * c / z, asked, (*nodes, (source, i)))

    yield from follow(1.0, 1, ((way.start, node),))


# -- the oracle -----------------------------------------------------------------------------------


def test_contributions_of_all_paths_and_biases_are_the_target(way: Plan) -> None:
    with torch.no_grad():
        ledger = account(way, torch.tensor([1]))
    assert sum(c for c, _ in contributions(way, 1)) == pytest.approx(ledger.inputs)
    assert ledger.total == pytest.approx(float(way.start.flat[1]))


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("k", [1, 7, 100_000])
def test_strongest_contributions_are_those_of_all_paths(way: Plan, node: int, k: int) -> None:
    every = sorted(contributions(way, node), key=lambda path: -abs(path[0]))
    found = top_paths(way, node, k)
    assert len(found) == min(k, len(every))
    assert [path.weight for path in found] == pytest.approx([c for c, _ in every[:k]], abs=1e-12)
    assert total(way, node) == pytest.approx(sum(abs(c) for c, _ in every))
    known = {}
    for c, nodes in every:  # parallel edges make paths of the same nodes
        known.setdefault(nodes, []).append(c)
    for path in found[:50]:
        assert any(path.weight == pytest.approx(c) for c in known[path.nodes])
        assert weigh(way, path.nodes) == pytest.approx(path.weight)


@pytest.mark.parametrize("k", [1, 7, 100_000])
def test_strongest_shares_are_those_of_all_paths(way: Plan, k: int) -> None:
    every = sorted(excitations(way, 0), key=lambda path: -path[0])
    found = top_paths(way, 0, k, "excitation")
    assert [path.weight for path in found] == pytest.approx([c for c, _ in every[:k]], abs=1e-12)
    assert total(way, 0, "excitation") == pytest.approx(sum(c for c, _ in every))
    assert total(way, 0, "excitation") <= 1 + 1e-12
    for path in found[:50]:
        assert weigh(way, path.nodes, "excitation") == pytest.approx(path.weight)


def test_strongest_path_to_each_pixel(way: Plan) -> None:
    best: dict[tuple[Value, int], float] = {}
    for c, nodes in contributions(way, 0):
        best[nodes[-1]] = max(best.get(nodes[-1], 0), abs(c))
    found = top_paths(way, 0, 1000, apart=True)
    assert {path.nodes[-1]: abs(path.weight) for path in found} == pytest.approx(best)
    assert len(found) == len(best)
    weights = [abs(path.weight) for path in found]
    assert weights == sorted(weights, reverse=True)


def test_a_path_that_is_none_weighs_nothing(way: Plan) -> None:
    picture = way.inputs[0]
    assert weigh(way, [(way.start, 0), (picture, 0)]) == 0


def test_what_cannot_be_asked_for(way: Plan) -> None:
    with pytest.raises(InputError, match="no node 99"):
        top_paths(way, 99)
    with pytest.raises(InputError, match="give 1 or more"):
        top_paths(way, 0, 0)
    with pytest.raises(InputError, match="contribution or excitation"):
        total(way, 0, by="magic")  # type: ignore[arg-type]


# -- what a walk loses ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["evidence", "seed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_walk_beats_the_oracle(name: str, method: str) -> None:
    model, image = network(name, 1)
    explanations = [hysm.explain(model, image, target=t, method=method) for t in (0, 1)]
    explanation = next(each for each in explanations if len(each.points[0]))
    for by in ("contribution", "excitation"):
        found = compare(explanation, k=4, by=by)
        assert 0 <= found.walk <= found.best + 1e-12
        assert found.best <= found.all + 1e-12


def test_a_walk_with_one_way_to_go_loses_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.fill_(2.0)
        model[3].weight.copy_(torch.tensor([[4.0, 3, 2, 1], [0, 0, 0, 0]]))
        model[3].bias.zero_()
    explanation = hysm.explain(model.eval(), torch.ones(1, 1, 2, 2), target=0, method="seed")
    found = compare(explanation, k=2)
    assert found == pytest.approx((14.0, 14.0, 20.0))


def test_another_default_device_changes_nothing() -> None:
    explanation = hysm.explain(*network("branches", 1), target=1)
    usual = [compare(explanation, k=4, by=by) for by in ("contribution", "excitation")]
    with torch.device("meta"):
        assert [compare(explanation, k=4, by=by) for by in ("contribution", "excitation")] == usual


# -- what coverage claims -------------------------------------------------------------------------


def pyramid() -> nn.Module:
    """No place is reached by more than one chosen path of different signs: counts can't cancel."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 2)
    )


def seed_coverage(way: Plan, node: int, k: int) -> float:
    """The seed method's paths one by one, each with the share that it keeps at each of its steps."""
    links = matrices(way)

    def follow(share: float, sign: int, value: Value, j: int) -> float:
        if value not in links:
            return share
        ((source, matrix, alone),) = links[value]
        w, a = matrix[j], source.data.reshape(-1)
        if alone:
            i = int(w.abs().argmax()) if bool((w != 0).any()) else j
            return follow(share, sign if w[i] >= 0 else -sign, source, i)
        each = sign * w * a
        z = float(each.clamp(min=0).sum())
        if source.data.dim() == 2:  # fully connected: the k strongest
            chosen = [i for i in each.sort(descending=True).indices[:k].tolist() if each[i] > 0]
        else:  # the strongest channel, and in it the strongest position inside the field
            field = (w != 0).reshape(source.shape)[0]
            channel = int(each.reshape(source.shape)[0].sum((1, 2)).argmax())
            plane = each.reshape(source.shape)[0, channel].masked_fill(~field[channel], -torch.inf)
            chosen = [channel * plane.numel() + int(plane.argmax())]
        return sum(
            follow(share * max(float(each[i]), 0) / z, sign if w[i] >= 0 else -sign, source, i)
            for i in chosen
            if z > 0
        )

    return follow(1.0, 1, way.start, node)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 2, 20])
def test_coverage_of_the_seed_is_the_sum_of_its_paths(seed: int, k: int) -> None:
    torch.manual_seed(seed)
    model, image = pyramid().double().eval(), torch.rand(1, 1, 3, 3, dtype=torch.float64)
    way = recorded(model, image)
    explanation = hysm.explain(model, image, target=0, method="seed", k=k, outliers=False)
    assert explanation.coverage[0] == pytest.approx(seed_coverage(way, 0, k))
    # Its paths are some of all, so the strongest of all cover at least as much.
    paths = top_paths(way, 0, 3 * k, "excitation")
    assert explanation.coverage[0] <= sum(path.weight for path in paths) + 1e-12
    assert explanation.coverage[0] <= total(way, 0, "excitation") + 1e-12


def test_coverage_of_the_seed_is_all_that_there_is_where_one_path_leads() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    image = torch.rand(1, 1, 2, 2, dtype=torch.float64)
    way = recorded(model.double().eval(), image)
    explanation = hysm.explain(model, image, target=0, method="seed", outliers=False)
    assert explanation.coverage[0] == pytest.approx(total(way, 0, "excitation"))


@pytest.mark.parametrize("method", ["evidence", "exact"])
def test_coverage_loses_what_a_bias_made(method: str) -> None:
    """Of two channels of equal weight, one is made by the pixels (3) and one by its bias (1)."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, 0.0]).reshape(2, 1, 1, 1))
        model[0].bias.copy_(torch.tensor([0.0, 1.0]))
        model[4].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    image = torch.ones(1, 1, 4, 4)
    explanation = hysm.explain(model.eval(), image, target=0, method=method)
    assert explanation.coverage[0] == pytest.approx(3 / 4)
    # By excitation from the class on: 3/4 to the first channel, and the other one ends.
    way = recorded(model, image)
    assert total(way, 0, "excitation") == pytest.approx(3 / 4)
