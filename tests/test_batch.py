"""Images of one batch don't disturb each other, and the same question has the same answer."""

from __future__ import annotations

from dataclasses import astuple
from functools import cache

import networks
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import howyouseeme as hysm
from howyouseeme.errors import InputError

METHODS = {"evidence": {}, "seed": {"outliers": False}}
both_methods = pytest.mark.parametrize("method", METHODS)
both_types = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


class Small(nn.Module):
    """Some of everything: strides, batch norm, a max-pool, a residual, a gate, an average."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1)
        self.gate = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.stem(x)).relu(), 2)
        x = x + self.deep(x).relu()
        x = x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.head(x.mean((2, 3)))


class Crossed(Small):
    """The same, with the images on the second axis for a while."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).transpose(0, 1).relu().transpose(0, 1)
        x = F.max_pool2d(x, 2)
        x = x + self.deep(x).relu()
        x = x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.head(x.mean((2, 3)))


def small(kind: type[Small] = Small) -> Small:
    torch.manual_seed(3)
    model = kind()
    nn.init.normal_(model.norm.weight)  # some scales are negative
    return model.eval()


def residual() -> nn.Module:
    torch.manual_seed(3)
    return pytest.importorskip("torchvision.models").resnet18().eval()


@cache
def network(name: str, dtype: torch.dtype) -> nn.Module:
    made = {
        "small": small,
        "residual": residual,
        "efficientnet": networks.efficientnet,
        "squeezenet": networks.squeezenet,
    }
    return made[name]().to(dtype)


def images(name: str, dtype: torch.dtype) -> Tensor:
    """Eight different ones: photos, parts and mirrors of them, and noise."""
    if name == "small":
        return torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(5)).to(dtype)
    photos = [networks.photo(kind, 224) for kind in ("cat", "coffee", "rocket")]
    noise = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(5)) * 255
    upside_down = [photo.flip(2) for photo in photos]
    batch = torch.cat([*photos, *upside_down, photos[0].flip(3), noise.double()])
    batch = batch - 127 if name == "squeezenet" else (batch - 127) / 128
    if name == "residual":
        batch = F.interpolate(batch, (97, 97))  # an odd one: no image but the first is aligned
    return batch.to(dtype)


def assert_same_points(found: hysm.Explanation, expected: hysm.Explanation) -> None:
    """The same places in the same order, with the same strengths to 1e-5: of images that went together.

    In float32 PyTorch itself rounds a batch and a single image differently: there a strength may be off
    by a millionth of the strongest one, and two places change ranks if no more than that lies between
    them.
    """
    (mine,), (theirs,) = found.points, expected.points
    assert found.target == expected.target
    assert len(mine) > 0
    assert len(mine) == len(theirs)
    assert found.coverage == pytest.approx(expected.coverage, rel=1e-5)
    rounding = 0.0 if found.evidence.dtype == torch.float64 else 1e-6 * float(theirs.strength.max())
    np.testing.assert_allclose(mine.strength, theirs.strength, rtol=1e-5, atol=rounding)
    if not rounding:
        assert np.array_equal(mine.position, theirs.position)
        return
    at = {tuple(place): strength for place, strength in zip(*astuple(theirs), strict=True)}
    weakest = theirs.strength.min()
    for place, strength in zip(*astuple(mine), strict=True):
        # Who is missing was as weak as the weakest that was kept.
        assert at.get(tuple(place), weakest) == pytest.approx(strength, rel=1e-5, abs=rounding)
    assert len(set(map(tuple, mine.position)) & set(at)) >= 0.99 * len(at)


@both_methods
@pytest.mark.parametrize("name", ["small", "residual", "squeezenet", "efficientnet"])
def test_each_image_gets_what_it_gets_alone_to_the_bit(name: str, method: str) -> None:
    batch = images(name, torch.float32)
    explainer = hysm.Explainer(network(name, torch.float32), method, **METHODS[method])
    together = explainer(batch)
    for i in range(8):
        alone = explainer(batch[i : i + 1])
        assert len(alone.points[0]) > 0
        assert np.array_equal(together.points[i].position, alone.points[0].position)
        assert np.array_equal(together.points[i].strength, alone.points[0].strength)
        assert torch.equal(together[i].evidence, alone.evidence)
        assert together[i].coverage == alone.coverage
        assert together[i].probability == alone.probability


@pytest.mark.parametrize("size", [True, 3])
@both_types
@both_methods
@pytest.mark.parametrize("name", ["small", "efficientnet"])
def test_images_that_go_together(
    name: str, method: str, dtype: torch.dtype, size: int | bool
) -> None:
    batch = images(name, dtype)
    explainer = hysm.Explainer(network(name, dtype), method, together=size, **METHODS[method])
    together = explainer(batch)
    for i in range(8):
        assert_same_points(together[i], explainer(batch[i : i + 1]))


@pytest.mark.parametrize(
    ("together", "passes"),
    [
        (None, [2] + [1] * 8),  # first, whether images depend on one another
        (np.int64(3), [3, 3, 2]),
        (False, [1] * 8),
        (1, [1] * 8),
        (3, [3, 3, 2]),
        (8, [8]),
        (99, [8]),
        (True, [8]),
    ],
)
def test_so_many_images_share_a_pass(together: int | bool | None, passes: list[int]) -> None:
    sizes = []
    net = small().double()
    net.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    targets = [0, 1, 2, 3, 4, 0, 1, 2]
    found = hysm.explain(net, images("small", torch.float64), targets, together=together)
    assert sizes == passes
    assert found.target == tuple(targets)


@pytest.mark.parametrize("together", [0, -1, 2.5, "all"])
def test_no_number_of_images(together: object) -> None:
    with pytest.raises(InputError, match=r"is no number of images .* give 1 or more"):
        hysm.Explainer(small(), together=together)  # type: ignore[arg-type]


@both_types
@both_methods
@pytest.mark.parametrize("name", ["small", "efficientnet"])
def test_again_is_the_same_to_the_bit(name: str, method: str, dtype: torch.dtype) -> None:
    batch = images(name, dtype)[:3]
    explainer = hysm.Explainer(network(name, dtype), method, together=True, **METHODS[method])
    first, second = explainer(batch), explainer(batch)
    assert torch.equal(first.evidence, second.evidence)
    assert torch.equal(first.share, second.share)
    assert first.coverage == second.coverage
    for mine, theirs in zip(first.points, second.points, strict=True):
        assert np.array_equal(mine.position, theirs.position)
        assert np.array_equal(mine.strength, theirs.strength)


@both_methods
def test_one_target_for_each_image(method: str) -> None:
    batch = images("small", torch.float64)
    net = network("small", torch.float64)
    explainer = hysm.Explainer(net, method, together=True, **METHODS[method])
    targets = [0, 1, 2, 3, 4, 0, 1, 2]
    together = explainer(batch, targets)
    assert sum(len(points) > 0 for points in together.points) >= 4
    for i, target in enumerate(targets):
        if not len(together.points[i]):  # nothing speaks for that class
            assert not len(explainer(batch[i : i + 1], target).points[0])
            continue
        assert_same_points(together[i], explainer(batch[i : i + 1], target))


@pytest.mark.parametrize("together", [True, 2])
@pytest.mark.parametrize("size", [8, 3])
@pytest.mark.parametrize(
    ("method", "parameters"), [*METHODS.items(), ("evidence", {"nodes": 40})], ids=str
)
def test_a_model_that_moves_the_batch_to_another_axis(
    method: str, parameters: dict[str, object], size: int, together: bool | int
) -> None:
    """Its samples can't be told apart on the way, and still each gets its own points.

    With eight images there are as many of them as channels.
    """
    batch = images("small", torch.float64)[:size]
    parameters = {"method": method, "together": together, **parameters}
    plain = hysm.explain(small().double(), batch, **parameters)
    crossed = hysm.explain(small(Crossed).double(), batch, **parameters)
    for i in range(size):
        assert_same_points(crossed[i], plain[i])
    torch.testing.assert_close(crossed.evidence, plain.evidence, rtol=1e-9, atol=1e-12)
