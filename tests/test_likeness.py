"""How far a thing reaches, against the definition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import howyouseeme.likeness
from howyouseeme import Explainer, Explanation
from howyouseeme.likeness import Likeness, spread

Array = np.ndarray


class Net(nn.Module):
    """Stages of stride 2, 4 and 8 over 32 x 48 pixels; `seen` is what the one of stride 4 ends with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU(), nn.Conv2d(b, b, 3, 1, 1), nn.ReLU())
            for a, b in ((3, 6), (6, 8), (8, 10))
        )
        self.head = nn.Linear(10, 4)
        self.seen = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i == 1:
                self.seen = x.detach()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def naive_spread(seen: Array, features: Array) -> Array:
    """Place by place, as defined."""
    centred = features - features.mean(1, keepdims=True)
    count = len(seen)
    alike = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            one, other = centred[:, i], centred[:, j]
            norms = np.linalg.norm(one) * np.linalg.norm(other)
            alike[i, j] = max(0.0, float(one @ other) / norms)
        alike[i] /= alike[i].sum()
    for _ in range(2):
        seen = np.array([sum(alike[i, j] * seen[j] for j in range(count)) for i in range(count)])
    return seen


def naive_levels(counted: Array) -> Array:
    found = [counted[counted <= one].sum() / counted.sum() for one in counted.flat]
    return np.reshape(found, counted.shape)


def naive_reach(saliency: Array, features: Array, stride: int) -> Array:
    """Averaged around each place, spread, and drawn by lines between the places."""
    (height, width), (rows, columns) = saliency.shape, features.shape[1:]
    at_y, at_x = (stride * np.arange(n) + (stride - 1) / 2 for n in (rows, columns))
    seen = np.zeros((rows, columns))
    for i, y in enumerate(at_y):
        for j, x in enumerate(at_x):
            down = [p for p in range(height) if abs(p - y) <= stride / 2]
            across = [p for p in range(width) if abs(p - x) <= stride / 2]
            seen[i, j] = saliency[np.ix_(down, across)].mean()
    alike = naive_spread(seen.ravel(), features.reshape(len(features), -1)).reshape(rows, columns)
    drawn = np.stack([np.interp(np.arange(width), at_x, row) for row in alike])
    drawn = np.stack([np.interp(np.arange(height), at_y, column) for column in drawn.T], 1)
    return (drawn - drawn.min()) / (drawn.max() - drawn.min())


def test_what_is_seen_is_spread_to_places_alike() -> None:
    random = np.random.default_rng(0)
    seen, features = random.random(12), random.normal(size=(5, 12))
    got = spread(torch.tensor(seen), torch.tensor(features))
    assert np.allclose(got.numpy(), naive_spread(seen, features))


def test_saliency_weighs_evidence_by_likeness(pictures: Tensor) -> None:
    net = Net().eval()
    explanation = Explainer(net, together=True)(pictures, target=2)
    described = net.seen.numpy()
    plain = Explainer(net, likeness=False, together=True)(pictures, target=2)
    for i, counted in enumerate(explanation.counted):
        features = described[i]
        reach = naive_reach(naive_levels(counted.numpy()), features, 4)
        expected = naive_levels(counted.numpy() ** 0.8 * reach)
        assert np.abs(explanation.saliency[i].numpy() - expected).max() < 1e-4
        assert np.abs(plain.saliency[i].numpy() - naive_levels(counted.numpy())).max() < 1e-4
        assert np.abs(plain.saliency[i].numpy() - expected).max() > 0.05


def test_the_reach_is_that_of_the_stage_before_the_last(pictures: Tensor) -> None:
    net = Net().eval()
    explanation = Explainer(net, together=True)(pictures)
    for i, alike in enumerate(explanation.alike):
        assert alike is not None
        assert torch.equal(alike.features, net.seen[i])
        assert [line.tolist() for line in alike.lines] == [
            [4 * place + 1.5 for place in range(count)] for count in (8, 12)
        ]


def test_a_batch_keeps_each_pictures_likeness(pictures: Tensor) -> None:
    explainer = Explainer(Net().eval())
    together = explainer(pictures)
    joined = Explanation.join([explainer(pictures[i : i + 1]) for i in (0, 1)])
    for i in (0, 1):
        for one in (explainer(pictures[i : i + 1]), together[i], joined[i]):
            assert torch.equal(one.saliency[0], together.saliency[i])
            assert one.alike[0] is not None
            assert torch.equal(one.alike[0].features, together.alike[i].features)  # type: ignore[union-attr]


def test_many_places_are_averaged(pictures: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(howyouseeme.likeness, "_MOST", 30)
    net = Net().eval()
    alike = Explainer(net)(pictures[:1]).alike[0]
    assert alike is not None
    assert alike.features.shape == (8, 4, 6)  # of 8 x 12 places
    assert torch.allclose(alike.features[:, 1, 2], net.seen[0, :, 2:4, 4:6].mean((1, 2)), atol=1e-6)
    assert alike.lines[0].tolist() == [3.5, 11.5, 19.5, 27.5]
    assert alike.lines[1][-1] == 43.5


def test_a_last_window_may_be_shorter(pictures: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(howyouseeme.likeness, "_MOST", 11)  # windows of 3 x 3
    net = Net().eval()
    alike = Explainer(net)(pictures[:1]).alike[0]
    assert alike is not None
    assert alike.features.shape == (8, 3, 4)
    assert torch.allclose(alike.features[:, 2, 0], net.seen[0, :, 6:8, 0:3].mean((1, 2)), atol=1e-6)
    assert alike.lines[0].tolist() == [5.5, 17.5, 27.5]


def test_a_strip_of_places_has_a_reach() -> None:
    """One place across, as windows leave of a narrow picture."""
    features = torch.eye(3)[:, :, None]
    alike = Likeness(features, (np.array([1.5, 5.5, 9.5]), np.array([3.5])))
    seen = torch.zeros(12, 8)
    seen[8:] = 1
    reach = alike.reach(seen)
    assert reach.shape == (12, 8)
    assert (reach[10:] == 1).all()
    assert (reach[:2] == reach.min()).all()


class Prepared(nn.Module):
    """Normalises by itself, and looks at a picture and its mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 0.5) / 0.25
        return self.net(torch.cat([x, x.flip(3)])).mean(0, keepdim=True)


def test_pixels_are_no_features(pictures: Tensor) -> None:
    model = Prepared().eval()
    alike = Explainer(model)(pictures[:1]).alike[0]
    assert alike is not None
    assert torch.equal(alike.features, model.net.seen[0])
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 32 * 48, 4)).eval()
    assert Explainer(net)(pictures[:1], target=1).alike == (None,)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_likeness_knows_no_scale(scale: float) -> None:
    random = np.random.default_rng(0)
    seen, features = torch.tensor(random.random(12)), torch.tensor(random.normal(size=(5, 12)))
    assert torch.allclose(spread(seen, features * scale), spread(seen, features))


def test_rounding_is_no_likeness() -> None:
    lines = np.arange(1.0, 20, 4), np.arange(1.0, 24, 4)
    noise = torch.randn(6, 5, 6, generator=torch.Generator().manual_seed(0))
    reach = Likeness(100 + 1e-5 * noise, lines).reach(torch.rand(20, 24))
    assert (reach == 1).all()
    assert (Likeness(noise, lines).reach(torch.ones(20, 24)) == 1).all()


def flat(classes: int = 4) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 48, classes))


def signal() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())


@pytest.mark.parametrize(("make", "shape"), [(flat, (1, 3, 32, 48)), (signal, (1, 3, 30))])
def test_without_feature_maps_or_a_picture_nothing_is_weighed(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    net, given = make().eval(), torch.rand(shape)
    explanation = Explainer(net)(given, target=1)
    assert explanation.alike == (None,)
    plain = Explainer(net, likeness=False)(given, target=1)
    assert torch.equal(explanation.saliency, plain.saliency)


def test_where_all_places_are_alike_nothing_is_weighed() -> None:
    alike = Likeness(torch.ones(5, 2, 3), (np.array([1.0, 3.0]), np.array([1.0, 3.0, 5.0])))
    assert (alike.reach(torch.rand(4, 6)) == 1).all()


@pytest.mark.parametrize("method", ["seed", "exact"])
def test_other_methods_weigh_nothing(pictures: Tensor, method: str) -> None:
    explanation = Explainer(Net().eval(), method=method)(pictures[:1], target=2)
    expected = naive_levels(explanation.counted[0].numpy())
    assert np.abs(explanation.saliency[0].numpy() - expected).max() < 1e-5


def test_low_precision_is_compared_in_full(pictures: Tensor) -> None:
    explanation = Explainer(Net().eval().bfloat16())(pictures[:1].bfloat16(), target=2)
    assert explanation.alike[0] is not None
    assert explanation.alike[0].features.dtype == torch.float32
    assert bool(torch.isfinite(explanation.saliency).all())
    assert explanation.saliency.max() == 1
