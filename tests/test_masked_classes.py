"""Classes that a network leaves out, by a logit of minus infinity: as if there were only the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import howyouseeme as hysm
from howyouseeme import Explainer, InputError, ModelError

KEPT = [0, 2, 3]


def _indexed(y: Tensor, mask: Tensor) -> Tensor:
    y = y.clone()
    y[:, mask < 0] = -torch.inf
    return y


def _spread(y: Tensor, mask: Tensor) -> Tensor:
    some = mask == 0
    return torch.full_like(y, -torch.inf).scatter(
        1, some.nonzero()[:, 0].expand(len(y), -1), y[:, some]
    )


MASKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_fill": lambda y, mask: y.masked_fill(mask < 0, -torch.inf),
    "add": lambda y, mask: y + mask,
    "where": lambda y, mask: torch.where(mask < 0, torch.tensor(-torch.inf).to(y), y),
    "index_put": _indexed,
    "scatter": _spread,
    "softmax": lambda y, mask: (y + mask).softmax(1),
    "log_softmax": lambda y, mask: y.masked_fill(mask < 0, -torch.inf).log_softmax(1),
}


class Net(nn.Module):
    """Six classes, of which `finish` leaves some out."""

    def __init__(self, finish: Callable[[Tensor, Tensor], Tensor], kept: list[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Linear(8, 6)
        mask = torch.full((6,), -torch.inf)
        mask[kept] = 0
        self.register_buffer("mask", mask)
        self.finish = finish

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.head(self.features(x).mean((2, 3))), self.mask)


def _others(y: Tensor, mask: Tensor) -> Tensor:
    return y[:, mask == 0]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("together", [None, 2])
@pytest.mark.parametrize("method", ["evidence", "exact", "seed"])
@pytest.mark.parametrize("way", MASKED)
def test_it_is_explained_as_if_it_had_the_others_alone(
    way: str, method: str, together: int | None, images: Tensor
) -> None:
    found = Explainer(Net(MASKED[way], KEPT).eval(), method, together=together)(images)
    expected = Explainer(Net(_others, KEPT).eval(), method, together=together)(images)
    assert found.target == tuple(KEPT[i] for i in expected.target if i is not None)
    assert found.probability == pytest.approx(expected.probability)
    assert found.evidence.abs().max() > 0
    torch.testing.assert_close(found.evidence, expected.evidence)
    torch.testing.assert_close(found.saliency, expected.saliency)


def test_one_class_that_is_left_stands_against_nobody(images: Tensor) -> None:
    found = hysm.explain(Net(MASKED["add"], [4]).eval(), images)
    expected = hysm.explain(Net(MASKED["add"], list(range(6))).eval(), images, lambda y: y[:, 4])
    assert found.label == ("class 4", "class 4")
    torch.testing.assert_close(found.evidence, expected.evidence)


@pytest.mark.parametrize("way", ["masked_fill", "add", "softmax"])
def test_a_class_that_is_left_out_has_nothing_to_explain(way: str, images: Tensor) -> None:
    with pytest.raises(InputError, match="Net leaves class 1 out: its score is minus infinity"):
        hysm.explain(Net(MASKED[way], KEPT).eval(), images, 1)


def test_it_is_replayed(images: Tensor) -> None:
    net = Net(MASKED["masked_fill"], KEPT).eval()
    explainer = Explainer(net, replay=True)
    for one in (images[:1], images[1:], images[:1]):
        torch.testing.assert_close(explainer(one).evidence, hysm.explain(net, one).evidence)


def test_what_is_no_mask_is_told() -> None:
    """A logarithm of 0, and what overflows."""
    net = Net(lambda y, mask: (y.relu() * 0).log(), KEPT).eval()
    with pytest.raises(ModelError, match=r"NaN or infinity, first made by aten\.log"):
        hysm.explain(net, torch.rand(1, 3, 12, 12))
    net = Net(lambda y, mask: y.masked_fill(mask < 0, -torch.inf) * 0, KEPT).eval()
    with pytest.raises(ModelError, match=r"NaN or infinity, first made by aten\.mul"):
        hysm.explain(net, torch.rand(1, 3, 12, 12))


def test_overflow_beside_a_mask_is_told() -> None:
    net = Net(lambda y, mask: (y.log() * 0 + y.abs().neg() * 1e38 * 1e38) + mask, KEPT).eval()
    with pytest.raises(ModelError, match="NaN or infinity"):
        hysm.explain(net, torch.rand(1, 3, 12, 12))
    net = Net(lambda y, mask: (y.abs() + 1).neg() * 1e38 * 1e38 + mask, KEPT).eval()
    with pytest.raises(ModelError, match=r"NaN or infinity, first made by aten\.mul"):
        hysm.explain(net, torch.rand(1, 3, 12, 12))


def test_what_overflows_is_found_at_once_in_a_deep_network() -> None:
    """Each of its values is looked at once, however many paths lead there."""

    def deep(y: Tensor, mask: Tensor) -> Tensor:
        y = (y.abs() + 1).neg() * 1e38 * 1e38
        for _ in range(40):
            y = y + torch.nn.functional.leaky_relu(y)
        return y

    with pytest.raises(ModelError, match=r"NaN or infinity, first made by aten\.mul"):
        hysm.explain(Net(deep, KEPT).eval(), torch.rand(1, 3, 12, 12))
