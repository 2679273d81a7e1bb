"""Points, blur and outliers, held against what their definitions say in slow loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from howyouseeme.maps import (
    Point,
    Points,
    gaussian_blur,
    inliers,
    levels,
    scale_to_one,
    strongest_points,
)


def places(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, shape)))


# -- points -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_points_give_as_many_coordinates_as_there_are_axes(axes: int) -> None:
    position = np.arange(2 * axes, dtype=np.float32).reshape(2, axes)
    points = Points(position, np.array([2.0, 1.0], np.float32))
    assert points[1] == Point(tuple(position[1].tolist()), 1.0)
    assert list(points[0]) == [*position[0].tolist(), 2.0]
    assert points[0].x == points.x[0] == position[0, -1]
    assert [point.strength for point in points] == [2.0, 1.0]
    assert len(points) == 2


def test_a_point_of_a_picture_has_y_and_x() -> None:
    points = Points(np.array([[3.5, 7.0]], np.float32), np.array([0.25], np.float32))
    y, x, strength = points[0]
    assert (y, x, strength) == (points[0].y, points[0].x, points[0].strength) == (3.5, 7.0, 0.25)
    assert points.y.tolist() == [3.5]


def naive_points(evidence: Tensor, count: int) -> list[tuple[tuple[int, ...], float]]:
    found = [(at, float(evidence[at])) for at in places(tuple(evidence.shape)) if evidence[at] > 0]
    return sorted(found, key=lambda item: -item[1])[:count]  # stable: ties stay in order of place


@pytest.mark.parametrize("shape", [(7,), (5, 6), (3, 4, 5)])
@pytest.mark.parametrize("count", [1, 4, 1000])
@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_strongest_points_are_sorted_and_ties_go_by_place(
    shape: tuple[int, ...], count: int, levels: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    evidence = torch.randint(-levels, levels + 1, shape, generator=generator).double()
    place, value = strongest_points(evidence, count)
    found = [(tuple(at), v) for at, v in zip(place.tolist(), value.tolist(), strict=True)]
    assert found == naive_points(evidence, count)


@pytest.mark.parametrize("evidence", [torch.zeros(3, 4), -torch.ones(3, 4)])
def test_nothing_above_zero_gives_no_points(evidence: Tensor) -> None:
    place, value = strongest_points(evidence, 10)
    assert place.shape == (0, 2)
    assert value.shape == (0,)


def test_a_tie_at_the_cut_keeps_the_first_places() -> None:
    place, _ = strongest_points(torch.ones(4, 4), 3)
    assert place.tolist() == [[0, 0], [0, 1], [0, 2]]


# -- outliers -----------------------------------------------------------------------------------------


def naive_inliers(evidence: Tensor, radius: float, share: float) -> Tensor:
    shape = tuple(evidence.shape)
    reach = radius * math.sqrt(sum(size**2 for size in shape))
    there = [at for at in places(shape) if evidence[at] > 0]
    kept = evidence.clone()
    for at in places(shape):
        near = sum(math.dist(at, other) <= reach for other in there)
        if near <= share * len(there):
            kept[at] = 0
    return kept


@pytest.mark.parametrize("shape", [(30,), (9, 14), (20, 6), (5, 6, 7), (1, 8)])
@pytest.mark.parametrize(("radius", "share"), [(0.1, 0.05), (0.2, 0.2), (0.05, 0.3)])
def test_inliers_agree_with_counting(shape: tuple[int, ...], radius: float, share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    sparse = torch.rand(shape, generator=generator).double()
    sparse[torch.rand(shape, generator=generator) > 0.3] = 0
    torch.testing.assert_close(
        inliers(sparse, radius, share), naive_inliers(sparse, radius, share), rtol=0, atol=0
    )


def test_a_lonely_pixel_is_dropped_and_a_cluster_stays() -> None:
    evidence = torch.zeros(100, 100)
    evidence[10:16, 10:16] = 1.0
    evidence[90, 90] = 5.0
    kept = inliers(evidence)
    assert kept[90, 90] == 0
    assert torch.equal(kept[10:16, 10:16], evidence[10:16, 10:16])


def test_a_neighbour_at_exactly_the_radius_counts() -> None:
    # 30 x 40 has the diagonal 50: a tenth of it is 5, the distance of (0, 0) and (3, 4).
    evidence = torch.zeros(30, 40)
    evidence[0, 0] = evidence[3, 4] = 1.0
    evidence[25, 35] = 1.0
    kept = inliers(evidence, radius=0.1, share=0.5)
    assert kept.nonzero().tolist() == [[0, 0], [3, 4]]


def test_an_empty_map_stays_empty() -> None:
    assert not inliers(torch.zeros(5, 5)).any()


# -- blur ---------------------------------------------------------------------------------------------


def naive_blur(evidence: Tensor, sigma: float) -> Tensor:
    """From the definition: every element spread by a product of normalised Gaussians, cut at 4 sigma."""
    reach = max(int(4 * sigma + 0.5), 1)
    line = [math.exp(-0.5 * (d / sigma) ** 2) for d in range(-reach, reach + 1)]
    weight = {d: value / sum(line) for d, value in zip(range(-reach, reach + 1), line, strict=True)}
    shape = tuple(evidence.shape)
    blurred = torch.zeros_like(evidence)
    for at in places(shape):
        for source in places(shape):
            factors = [weight.get(a - b, 0.0) for a, b in zip(at, source, strict=True)]
            blurred[at] += math.prod(factors) * float(evidence[source])
    return blurred


@pytest.mark.parametrize("shape", [(25,), (8, 11), (4, 5, 6)])
@pytest.mark.parametrize("sigma", [0.2, 1.0, 3.3])
def test_gaussian_blur_agrees_with_its_definition(shape: tuple[int, ...], sigma: float) -> None:
    generator = torch.Generator().manual_seed(2)
    evidence = torch.randn(shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(gaussian_blur(evidence, sigma), naive_blur(evidence, sigma))


def test_blur_keeps_the_sum_away_from_the_border() -> None:
    evidence = torch.zeros(41, 41, dtype=torch.float64)
    evidence[20, 20] = 3.0
    blurred = gaussian_blur(evidence, 2.0)
    assert float(blurred.sum()) == pytest.approx(3.0)
    assert int(blurred.argmax()) == 20 * 41 + 20
    torch.testing.assert_close(blurred, blurred.T)
    torch.testing.assert_close(blurred, blurred.flip(0))


# -- scale --------------------------------------------------------------------------------------------


def test_scale_to_one_is_the_positive_part_over_its_maximum() -> None:
    scaled = scale_to_one(torch.tensor([-3.0, 0.0, 1.0, 4.0]))
    assert scaled.tolist() == [0.0, 0.0, 0.25, 1.0]


@pytest.mark.parametrize("evidence", [torch.zeros(3), -torch.ones(3)])
def test_scale_to_one_of_nothing_is_zero(evidence: Tensor) -> None:
    assert scale_to_one(evidence).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("tiny", [1e-44, 1e-38, 1e-30])
def test_scale_to_one_stays_within_one(tiny: float) -> None:
    scaled = scale_to_one(torch.tensor([0.0, tiny]))
    assert torch.isfinite(scaled).all()
    assert scaled.max() <= 1


@pytest.mark.parametrize("seed", range(5))
def test_levels_are_the_share_of_the_evidence_below(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    evidence = torch.randint(-3, 6, (5, 7), generator=generator).double()  # many ties
    found = levels(evidence)
    positive = evidence.clamp(min=0)
    for value, level in zip(evidence.flatten(), found.flatten(), strict=True):
        below = sum(float(other) for other in positive.flatten() if other <= value)
        assert float(level) == pytest.approx(below / float(positive.sum()) if value > 0 else 0)


def test_levels_keep_the_order_and_hold_what_they_say() -> None:
    evidence = torch.rand(30, 40, generator=torch.Generator().manual_seed(1)).double() ** 3
    found = levels(evidence)
    assert torch.equal(found.flatten().argsort(), evidence.flatten().argsort())
    for level in (0.1, 0.5, 0.9):
        held = float(evidence[found >= level].sum() / evidence.sum())
        assert 1 - level <= held + 1e-12
        assert held <= 1 - level + float(evidence.max() / evidence.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [0.0, 1e-16, 1e-9, 1.0])
def test_levels_tell_apart_what_differs_by_a_rounding(apart: float, dtype: torch.dtype) -> None:
    """Values that share all bits but the lowest ones, zeros of both signs, and numbers close to them."""
    generator = torch.Generator().manual_seed(2)
    steps = torch.randint(0, 4, (200, 90), generator=generator).double()
    near = (1 + torch.rand(200, 90, generator=generator).double() * apart * 8) * steps
    evidence = torch.cat([near, near * 1e-308, near * -0.0]).to(dtype)
    found, flat = levels(evidence).flatten().numpy(), evidence.clamp(min=0).flatten().numpy()
    rising = np.sort(flat)
    total = rising.cumsum()
    expected = total[np.searchsorted(rising, flat, side="right") - 1] / total[-1]
    assert np.array_equal(found, expected)


def test_levels_of_nothing_are_zero() -> None:
    assert not levels(-torch.ones(3, 4)).any()


def test_points_can_be_sliced() -> None:
    points = Points(np.arange(10.0).reshape(5, 2), np.arange(5.0)[::-1])
    assert [point.strength for point in points[:2]] == [4.0, 3.0]
    assert points[1:3][0] == points[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_on_a_device_are_those_of_the_cpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ties = torch.randint(-3, 9, (40, 30), generator=torch.Generator().manual_seed(0)).to(dtype)
    maps = [ties, torch.zeros(4, 4, dtype=dtype), torch.zeros(0, dtype=dtype), ties.sin()]
    expected = [levels(one) for one in maps]
    monkeypatch.setattr("howyouseeme.maps.at_hand", lambda tensor: False)
    for one, level in zip(maps, expected, strict=True):
        torch.testing.assert_close(levels(one), level)
