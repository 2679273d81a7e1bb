"""Where the places of a feature map lie in the input: against what each network does to a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import howyouseeme as hysm
from howyouseeme import Explainer, shown
from howyouseeme.backtrack import Plan, plan
from howyouseeme.places import Layout, layouts, onto_input, spatial
from howyouseeme.tape import Value, record


class Does(nn.Module):
    """A function as a network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def layout(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...] = (1, 2, 12, 16)
) -> tuple[Layout, Value, Plan]:
    """The layout of what the function makes of a picture."""
    tape = record(Does(function).eval(), [torch.randn(shape)])
    way = plan(tape, tape.output)
    return layouts(way, tape.inputs[0]).get(tape.output, {}), tape.output, way


def kernel(size: int, channels: int = 2) -> Tensor:
    return torch.ones(3, channels, size, size)


KEPT = {
    "itself": (lambda x: x * 2, range(12), range(16)),
    "a same convolution": (lambda x: F.conv2d(x, kernel(3), padding=1), range(12), range(16)),
    "a valid convolution": (lambda x: F.conv2d(x, kernel(5)), range(2, 10), range(2, 14)),
    "a dilated one": (
        lambda x: F.conv2d(x, kernel(3), dilation=2), range(2, 10), range(2, 14),
    ),
    "a stride": (
        lambda x: F.conv2d(x, kernel(2), stride=2),
        [0.5 + 2 * i for i in range(6)], [0.5 + 2 * i for i in range(8)],
    ),
    # Padded on both sides, the windows' middles are 0, 2, 4 ...: half a pixel to the left.
    "a padded stride": (
        lambda x: F.conv2d(x, kernel(3), stride=2, padding=1),
        [0.5 + 2 * i for i in range(6)], [0.5 + 2 * i for i in range(8)],
    ),
    "padding on one side": (
        lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), kernel(3), stride=2),
        [0.5 + 2 * i for i in range(6)], [0.5 + 2 * i for i in range(8)],
    ),
    "max-pooling": (
        lambda x: F.max_pool2d(x, 2), [0.5 + 2 * i for i in range(6)], [0.5 + 2 * i for i in range(8)],
    ),
    "a pool without the last row": (
        lambda x: F.max_pool2d(x[:, :, :, :15], 3, 2),
        [1 + 2 * i for i in range(5)], [1 + 2 * i for i in range(7)],
    ),
    "a mask": (lambda x: torch.where(x > 0.4, x, 0.0), range(12), range(16)),
    "pooling undone": (
        lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
        range(12), range(16),
    ),
    "average pooling": (
        lambda x: F.avg_pool2d(x, 4), [1.5 + 4 * i for i in range(3)], [1.5 + 4 * i for i in range(4)],
    ),
    "enlarging": (
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
        [i // 2 for i in range(24)], [i // 2 for i in range(32)],
    ),
    "a crop": (lambda x: x[:, :, 3:9, 5:], range(3, 9), range(5, 16)),
    "a flip": (lambda x: x.flip(3), range(12), range(15, -1, -1)),
    "padding to a size": (lambda x: F.pad(x, (0, 8, 4, 0)), range(-4, 12), range(24)),
    "halves changed over": (
        lambda x: torch.cat([x[..., 10:], x[..., :10]], 3), range(12), [*range(10, 16), *range(10)],
    ),
    "a copy beside it": (
        lambda x: torch.cat([x, x.flip(3)], 3), range(12), [*range(16), *range(15, -1, -1)],
    ),
    "a roll": (lambda x: x.roll(3, 2), [9, 10, 11, *range(9)], range(16)),
    "channels shuffled": (
        lambda x: x.reshape(1, 2, 1, 12, 16).transpose(1, 2).reshape(1, 2, 12, 16) * 1,
        range(12), range(16),
    ),
    "branches": (lambda x: torch.cat([x * 2, x.relu()], 1), range(12), range(16)),
    "one after the other": (
        lambda x: F.conv2d(F.max_pool2d(F.conv2d(x, kernel(3)), 2), kernel(3, 3)),
        [3.5 + 2 * i for i in range(3)], [3.5 + 2 * i for i in range(5)],
    ),
}  # fmt: skip


KEPT |= {
    "pixels put into channels": (
        lambda x: F.pixel_unshuffle(x, 2),
        [2 * i + 0.5 for i in range(6)],
        [2 * i + 0.5 for i in range(8)],
    ),
    "the same by views": (
        lambda x: x.view(1, 2, 3, 4, 4, 4).permute(0, 3, 5, 1, 2, 4).reshape(1, 32, 3, 4),
        [1.5, 5.5, 9.5],
        [1.5, 5.5, 9.5, 13.5],
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_places_of_one_call(name: str) -> None:
    function, rows, columns = KEPT[name]
    found, value, _ = layout(function)
    assert {axis: of for axis, (of, _) in found.items()} == {2: 2, 3: 3}
    assert found[2][1].tolist() == pytest.approx(list(rows))
    assert found[3][1].tolist() == pytest.approx(list(columns))
    assert tuple(len(found[axis][1]) for axis in (2, 3)) == tuple(value.shape[2:])


def test_a_transposed_picture_has_its_columns_where_its_rows_were() -> None:
    found, _, way = layout(lambda x: x.transpose(2, 3)[:, :, 4:] * 1)
    assert {axis: of for axis, (of, _) in found.items()} == {2: 3, 3: 2}
    assert found[2][1].tolist() == list(range(4, 16))
    assert spatial(way)[way.start] == 1


def test_channels_may_come_last() -> None:
    _, value, way = layout(lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (2,)))
    assert value.shape == (1, 12, 16, 2)
    assert spatial(way)[value] == 3


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.flatten(2) * 1,
        lambda x: x.mean((2, 3)),
        lambda x: x.reshape(1, 2, 16, 12) * 1,
        lambda x: x.flatten(2)[:, :, torch.arange(192).roll(7)].reshape(1, 2, 12, 16),
    ],
)
def test_places_that_are_mixed_have_no_layout(function: Callable[[Tensor], Tensor]) -> None:
    found, value, way = layout(function)
    assert len(found) < 2
    assert value not in spatial(way)


def test_what_a_pool_took_does_not_move_its_places() -> None:
    """The layout is that of the windows, the same for every picture of a batch."""
    one, _, _ = layout(lambda x: F.max_pool2d(x, 3, 2, 1))
    two, _, _ = layout(lambda x: F.max_pool2d(x, 3, 2, 1), (5, 2, 12, 16))
    assert all((one[axis][1] == two[axis][1]).all() for axis in (2, 3))


def test_drawn_over_the_input_by_lines_between_the_places() -> None:
    places = {
        2: (3, np.array([1.0, 3.0])),  # the map's rows run along the input's columns
        3: (2, np.array([2.0, 0.0])),  # and its columns up the rows
    }
    found = onto_input(torch.tensor([[[10.0, 20.0], [30.0, 40.0]]]), places, torch.Size([3, 5]))
    assert found is not None
    torch.testing.assert_close(
        found[0],
        torch.tensor([[20.0, 20, 30, 40, 40], [15.0, 15, 25, 35, 35], [10.0, 10, 20, 30, 30]]),
    )
    assert onto_input(torch.ones(1, 2), {2: places[2]}, torch.Size([3, 5])) is None


class Arranged(nn.Module):
    """Finds bright pixels, after having arranged the picture anew."""

    def __init__(self, arrange: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.arrange = arrange
        self.conv = nn.Conv2d(3, 2, 4, stride=4)
        nn.init.constant_(self.conv.weight, 0.1)
        nn.init.zeros_(self.conv.bias)
        self.conv.weight.data[0] = -0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.arrange(x)).relu().mean((2, 3))


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x,
        lambda x: x.flip(2, 3),
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, 8:, :24],
        lambda x: x.roll((8, -4), (2, 3)),
        lambda x: F.pad(x, (0, 24, 0, 24)),
        lambda x: torch.cat([x[..., 16:], x[..., :16]], 3),
        lambda x: torch.cat([x, x.flip(3)], 3),
    ],
    ids="as_it_is flipped transposed cropped rolled padded swapped copied".split(),
)
def test_focus_falls_on_what_the_network_saw(arrange: Callable[[Tensor], Tensor]) -> None:
    picture = torch.zeros(1, 3, 32, 32)
    picture[:, :, 12:16, 4:8] = 1.0  # all of it there, so that a wrong place would dim it
    picture[:, :, 24:26, 16:18] = 0.2
    found = hysm.explain(Arranged(arrange).eval(), picture, 1).evidence[0]
    plain = hysm.explain(Arranged(arrange).eval(), picture, 1, focus=False).evidence[0]
    assert found[12:16, 4:8].sum() > 0.5 * plain[12:16, 4:8].sum()
    weak = found[24:26, 16:18].sum() / plain[24:26, 16:18].sum()
    strong = found[12:16, 4:8].sum() / plain[12:16, 4:8].sum()
    assert weak < 0.3 * strong


def test_the_strip_of_layers_shows_places_where_they_are() -> None:
    """A network that flips its input looks at the other side of its own maps."""
    picture = torch.zeros(1, 3, 32, 32)
    picture[:, :, 12:16, 4:8] = 1.0
    explanation = hysm.explain(Arranged(lambda x: x.flip(3)).eval(), picture, 1)
    pixels, *stages = explanation.layer_views(0, shown.stages(explanation.layers()))
    assert pixels.name == "pixels"
    assert stages
    for view in [pixels, *stages]:
        y, x = np.unravel_index(view.map.argmax(), view.map.shape)
        assert abs(y - 13.5) <= 2
        assert abs(x - 5.5) <= 2
        assert abs(view.points_y[0] - 13.5) <= 2
        assert abs(view.points_x[0] - 5.5) <= 2


@pytest.mark.parametrize("batch", [1, 3])
def test_views_stacked_along_the_batch(batch: int) -> None:
    """No place of theirs is a place of the image: they are explained, without focus."""
    net = Arranged(lambda x: x).eval()

    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net(torch.cat([x, x.flip(3)])).reshape(2, len(x), -1).mean(0)

    explanation = hysm.explain(Views().eval(), torch.rand(batch, 3, 32, 32), 1)
    assert all(len(points) for points in explanation.points)


def test_a_number_beside_the_picture() -> None:
    class Both(Arranged):
        def forward(self, x: Tensor, number: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + number[:, None]

    net = Both(lambda x: x).eval()
    explanation = hysm.explain(net, (torch.rand(2, 3, 32, 32), torch.rand(2)), 1)
    assert len(explanation.inputs) == 2


def test_nothing_comes_through_a_scale_of_zero() -> None:
    """What batch norm makes of a channel scaled by 0 is its bias, whatever the image."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)
    )
    nn.init.zeros_(net[1].weight)
    nn.init.ones_(net[1].bias)
    explanation = hysm.explain(net.eval(), torch.rand(1, 3, 8, 8), focus=False)
    assert not explanation.evidence.any()
    assert explanation.coverage == (0.0,)


class Features(nn.Module):
    """A small classifier whose picture, or a map on the way, goes through something that changes nothing."""

    def __init__(self, first: Any = None, between: Any = None) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.between = first, between
        self.low, self.high = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.head = nn.Linear(8, 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.low(x if self.first is None else self.first(x)).relu()
        x = self.high(x if self.between is None else self.between(x)).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.flatten(2).unflatten(2, x.shape[2:]),
        lambda x: x.flatten(1).view(x.shape),
        lambda x: (x.flatten(1) * 2).view(x.shape) / 2,
    ],
)
@pytest.mark.parametrize("where", ["first", "between"])
def test_what_is_reshaped_and_back_is_where_it_was(where: str, change: Any) -> None:
    x = torch.randn(1, 3, 24, 20, generator=torch.Generator().manual_seed(1))
    plain = Explainer(Features())(x)
    there = Explainer(Features(**{where: change}))(x)
    torch.testing.assert_close(there.evidence, plain.evidence)
    torch.testing.assert_close(there.saliency, plain.saliency)


def mixed(x: Tensor) -> Tensor:
    """The same, by products with the identity: where places lie isn't known after it."""
    eye = torch.eye(x.shape[2])
    return torch.einsum("ij,bcjw->bciw", eye, x)


@pytest.mark.parametrize("where", ["first", "between"])
def test_a_map_whose_places_are_not_known_is_one_all_the_same(where: str) -> None:
    """Only the focus is lost, which needs to know where they lie."""
    x = torch.randn(1, 3, 24, 20, generator=torch.Generator().manual_seed(1))
    plain = Explainer(Features(), focus=False)(x)
    there = Explainer(Features(**{where: mixed}))(x)
    torch.testing.assert_close(there.evidence, plain.evidence)
    assert not torch.allclose(plain.evidence, Explainer(Features(), "exact")(x).evidence, rtol=0.1)


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: torch.cat([a, b], 1),
        lambda a, b: torch.cat([a + b, a], 1),
        lambda a, b: torch.cat([(a - b).abs(), b], 1),
        lambda a, b: torch.cat([torch.maximum(a, b), a], 1),
    ],
)
def test_halves_that_are_compared_keep_what_each_showed(join: Any) -> None:
    """Branches that see different parts of a picture do not agree on where a place is: no focus falls."""

    class Compared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.see, self.judge = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(8, 4, 3, padding=1)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            left, right = (self.see(half).relu() for half in x.chunk(2, -1))
            return self.head(self.judge(join(left, right)).relu().mean((2, 3)))

    torch.manual_seed(0)
    model = Compared().eval()
    x = torch.randn(1, 3, 16, 32)
    focused, not_focused = (Explainer(model, focus=focus)(x) for focus in (True, False))
    assert not_focused.evidence[..., 16:].abs().sum() > 0
    torch.testing.assert_close(focused.evidence, not_focused.evidence)


def test_branches_of_different_strides_agree() -> None:
    """Enlarged maps, side inputs and shortcuts lie within a place of each other: the focus stays."""

    def forward(x: Tensor) -> Tensor:
        fine, coarse = (nn.functional.avg_pool2d(x, size) for size in (2, 8))
        larger = nn.functional.interpolate(coarse, scale_factor=4)
        smooth = nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")
        return torch.cat([fine + larger, fine * 1 + smooth], 1)

    found, _, _ = layout(forward, (1, 2, 32, 24))
    assert sorted(found) == [2, 3]
    assert found[2][1].tolist() == pytest.approx((np.arange(16) * 2 + 0.5).tolist(), abs=4)
