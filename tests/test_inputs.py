"""What comes in: several inputs, one axis or three, and every precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ledger import account
from torch import Tensor, nn

import howyouseeme as hysm
from howyouseeme import targets
from howyouseeme.backtrack import plan
from howyouseeme.errors import InputError
from howyouseeme.explanation import Explanation
from howyouseeme.images import Preprocess

METHODS: dict[str, dict[str, Any]] = {"evidence": {}, "seed": {"outliers": False}, "exact": {}}

# -- several inputs -------------------------------------------------------------------------------


class Both(nn.Module):
    """A picture, what is known besides, and an index: each contributes to the scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
        self.known = nn.Linear(4, 6)
        self.kind = nn.Embedding(3, 6)
        self.head = nn.Linear(12, 5)

    def forward(self, image: Tensor, known: Tensor, kind: Tensor) -> Tensor:
        x = torch.cat(
            [self.conv(image).mean((2, 3)), (self.known(known) + self.kind(kind)).relu()], 1
        )
        return self.head(x)


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(batch, 3, 12, 10, generator=generator)
    return image, torch.randn(batch, 4, generator=generator), torch.arange(batch) % 3


def test_every_input_gets_its_points_and_nothing_is_lost() -> None:
    net, given = Both().double().eval(), inputs()
    given = tuple(x.double() if x.is_floating_point() else x for x in given)
    explanation = hysm.explain(net, given, method="exact")
    by_image, by_known = explanation.inputs  # the index is no input of floats
    torch.testing.assert_close(explanation.evidence, by_image.evidence)
    assert by_image.evidence.shape == (2, 12, 10)
    assert by_known.evidence.shape == (2, 4)
    tape = hysm.record(net, given)
    with torch.no_grad():
        for i, target in enumerate(explanation.target):
            assert target is not None
            way = plan(tape, tape.output)
            ledger = account(way, torch.tensor([5 * i + target]))
            found = by_image.evidence[i].sum() + by_known.evidence[i].sum()
            assert ledger.inputs == pytest.approx(float(found), rel=1e-9)
            assert ledger.total == pytest.approx(float(net(*given)[i, target]), rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_points_and_paths_of_every_input(method: str) -> None:
    explanation = hysm.explain(Both().eval(), inputs(), method=method, **METHODS[method])
    by_image, by_known = explanation.inputs
    assert any(len(points) for points in by_image.points)
    assert any(len(points) for points in by_known.points)
    for part, axes in ((by_image, 2), (by_known, 1)):
        for i in range(2):
            assert part.points[i].position.shape[1] == axes
            if not len(part.points[i]):
                continue
            path = part.path(i, [0])[0]
            assert path.nodes[-1].call == "input"
            place = tuple(path.point.position)
            last = path.nodes[-1]
            assert (last.position or (last.channel,)) == place
    assert sum(part.coverage[0] for part in explanation.inputs) <= 1 + 1e-5
    assert by_known.to_dict(0)["points"] == [
        [int(p.position[0]), pytest.approx(p.strength, rel=1e-5)] for p in by_known.points[0]
    ]


def same(one: Explanation, other: Explanation) -> None:
    torch.testing.assert_close(one.evidence, other.evidence)
    for a, b in zip(one.inputs, other.inputs, strict=True):
        torch.testing.assert_close(a.evidence, b.evidence)


def test_one_of_a_batch_of_several_inputs() -> None:
    explainer = hysm.Explainer(Both().eval(), "exact")
    both = explainer(inputs())
    assert len(both[1].inputs) == 2
    same(both[1], explainer(tuple(x[1:] for x in inputs())))
    same(Explanation.join([both[0], both[1]]), both)


def test_samples_that_mix_are_explained_one_by_one() -> None:
    class Swapped(Both):
        def forward(self, image: Tensor, known: Tensor, kind: Tensor) -> Tensor:
            x = self.conv(image).transpose(0, 1)  # the batch is no longer the first axis
            x = torch.cat([x.mean((2, 3)).T, (self.known(known) + self.kind(kind)).relu()], 1)
            return self.head(x)

    one = hysm.explain(Swapped().eval(), inputs(), method="exact")
    other = hysm.explain(Both().eval(), inputs(), method="exact")
    same(one, other)


def test_a_single_number_beside_a_picture() -> None:
    class Scaled(nn.Module):
        def forward(self, image: Tensor, age: Tensor) -> Tensor:
            return torch.stack([image.mean((1, 2, 3)) + 3 * age, -age], 1)

    explanation = hysm.explain(
        Scaled().eval(), (torch.rand(2, 3, 4, 4), torch.tensor([0.5, 2.0])), 0, method="exact"
    )
    by_age = explanation.inputs[1]
    assert by_age.evidence.tolist() == [[1.5], [6.0]]
    assert tuple(by_age.points[1].position[0]) == (0,)
    assert by_age.path(1, [0])[0].nodes[-1].call == "input"


def test_two_pictures() -> None:
    class Compare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())

        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return self.conv(one).mean((2, 3)) - self.conv(other).mean((2, 3))

    one, other = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 6, 9)
    explanation = hysm.explain(Compare().eval(), (one, other), method="exact")
    first, second = explanation.inputs
    assert first.attention.shape == (1, 8, 8)
    assert second.attention.shape == (1, 6, 9)
    # Where pictures can be used, a tuple of single ones is still several pictures.
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    explainer = hysm.Explainer(net, preprocess=Preprocess((8, 8)))
    assert len(explainer((torch.rand(3, 9, 9), torch.rand(3, 20, 10)))) == 2


def test_an_input_that_does_not_matter_has_no_points() -> None:
    explanation = hysm.explain(Both().eval(), inputs(), targets.channel("conv", 2))
    by_image, by_known = explanation.inputs
    assert len(by_image.points[0])
    assert not len(by_known.points[0])
    assert by_known.coverage == (0.0, 0.0)
    assert by_known.layers(0)[0].nodes == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, k, i: (x, k[:1], i), r"Input 1 has the shape \(1, 4\).*the first one, 2"),
        (lambda x, k, i: (x, k * torch.nan, i), "Input 1 contains NaN"),
        (lambda x, k, i: (i, i), "None of the inputs is of floats"),
        (lambda x, k, i: (x, k, i, i), r"can't run on an input of the shape \(2, 3, 12, 10\), \(2"),
    ],
)
def test_inputs_that_can_not_be_used(change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hysm.explain(Both().eval(), change(*inputs()))


# -- one axis, and three --------------------------------------------------------------------------


class Finder(nn.Module):
    """Trained, as it were, to tell a pattern (class 1) from its negative (class 0), wherever it is."""

    def __init__(self, dims: int, pattern: Tensor) -> None:
        super().__init__()
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[dims](2)
        self.match = convolution(1, 2, 5, padding=2)
        self.mix = convolution(2, 2, 1)
        with torch.no_grad():
            self.match.weight.copy_(torch.stack([-pattern, pattern])[:, None])
            self.match.bias.fill_(-0.6 * float(pattern.square().sum()))
            self.mix.weight.copy_(torch.eye(2).reshape(2, 2, *[1] * dims))
            self.mix.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.pool(F.relu(self.match(x)))).relu()
        return x.flatten(2).mean(2)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_points_lie_on_the_pattern(dims: int, method: str) -> None:
    generator = torch.Generator().manual_seed(dims)
    pattern = torch.randn([5] * dims, generator=generator).sign()
    size, corner = {1: (64, (37,)), 2: (24, (3, 14)), 3: (14, (6, 2, 8))}[dims]
    x = 0.05 * torch.randn([2, 1, *[size] * dims], generator=generator)
    inside = (slice(None), 0, *(slice(at, at + 5) for at in corner))
    x[inside] += pattern
    net = Finder(dims, pattern).eval()
    assert net(x).argmax(1).tolist() == [1, 1]

    explanation = hysm.explain(net, x, method=method, **METHODS[method])
    start = torch.tensor(corner)
    for points in explanation.points:
        assert points.position.shape[1] == dims
        assert len(points)
        place = torch.from_numpy(points.position[0])
        assert bool(((place >= start) & (place < start + 5)).all())
    shape = (2, *[size] * dims)
    assert explanation.evidence.shape == explanation.attention.shape == shape
    assert explanation.saliency.shape == shape
    positive = explanation.evidence.clamp(min=0)
    kept = positive[(slice(None), *inside[2:])].flatten(1).sum(1) / positive.flatten(1).sum(1)
    assert bool((kept > 0.95).all())
    layer = explanation.layers()[-1]
    assert layer.map.dim() == dims
    node = explanation.path(0, [0])[0].nodes[-1]
    assert len(node.position) == dims
    assert len(explanation.to_dict()["points"][0]) == dims + 1
    if dims != 2:
        with pytest.raises(InputError, match="can't be drawn as a picture"):
            explanation.picture()


@pytest.mark.parametrize("method", METHODS)
def test_an_input_without_channels(method: str) -> None:
    """A raw signal [batch, samples], as networks of speech take it."""

    class Raw(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x[:, None])

    pattern = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
    x = 0.05 * torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    x[:, 37:42] += pattern
    net = Finder(1, pattern).eval()
    found = hysm.explain(Raw(net).eval(), x, method=method, **METHODS[method])
    assert found.attention.shape == (2, 64)
    positive = found.evidence.clamp(min=0)
    assert bool((positive[:, 37:42].sum(1) > 0.95 * positive.sum(1)).all())
    for points in found.points:
        assert points.position.shape[1] == 1
        assert 37 <= int(points.position[0, 0]) < 42
    if method != "evidence":  # which follows places behind an axis of channels alone
        want = hysm.explain(net, x[:, None], method=method, **METHODS[method])
        torch.testing.assert_close(found.evidence, want.evidence)


# -- precisions -----------------------------------------------------------------------------------


class Precise(nn.Module):
    """Convolution, bicubic upscaling, attention, and a head, one half of them maybe in autocast."""

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.autocast = autocast
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU())
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 4)

    def body(self, x: Tensor) -> Tensor:
        x = F.interpolate(self.stem(x), scale_factor=1.5, mode="bicubic")
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        x = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return x + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        if self.autocast is None:
            return self.head(self.body(x).mean(1))
        with torch.autocast("cpu", dtype=self.autocast):
            x = self.body(x)
        return self.head(x.float().mean(1))


def alike(one: Tensor, other: Tensor) -> float:
    return float(F.cosine_similarity(one.flatten().double(), other.flatten().double(), 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["evidence", "exact"])
def test_half_precision_tells_the_same(dtype: torch.dtype, method: str) -> None:
    x = torch.rand(2, 3, 12, 12)
    want = hysm.explain(Precise().eval(), x, target=1, method=method)
    found = hysm.explain(Precise().to(dtype).eval(), x.to(dtype), target=1, method=method)
    assert alike(found.evidence, want.evidence) > 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_tells_the_same(dtype: torch.dtype, method: str) -> None:
    x = torch.rand(2, 3, 12, 12)
    net = Precise(dtype).eval()
    with torch.no_grad():
        answer = net(x)
    assert torch.equal(hysm.record(net, [x]).output.data, answer)
    found = hysm.explain(net, x, target=1, method=method, **METHODS[method])
    assert all(len(points) for points in found.points)
    if method != "seed":
        want = hysm.explain(Precise().eval(), x, target=1, method=method)
        assert alike(found.evidence, want.evidence) > 0.99


@pytest.mark.parametrize("method", METHODS)
def test_channels_last_changes_nothing(method: str) -> None:
    x, net = torch.rand(2, 3, 12, 12), Precise().double().eval()
    want = hysm.explain(net, x.double(), target=1, method=method, **METHODS[method])
    net = net.to(memory_format=torch.channels_last)
    last = x.double().to(memory_format=torch.channels_last)
    found = hysm.explain(net, last, target=1, method=method, **METHODS[method])
    torch.testing.assert_close(found.evidence, want.evidence)
