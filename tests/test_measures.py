"""Every measure on maps whose score is known, and against slow loops written from its definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from howyouseeme import InputError
from howyouseeme.evaluate import (
    THRESHOLDS,
    bootstrap,
    box_hits,
    box_ious,
    deletion,
    energy,
    grid_share,
    insertion,
    inside,
    intersection_over_union,
    largest_region,
    pointing,
    rank_correlation,
    road,
    structural_similarity,
)

SIZE = 64
BOX = (16, 24, 40, 56)  # x0, y0, x1, y1: 24 x 32 of 64 x 64, 3/16 of it
AREA = 3 / 16


def perfect() -> np.ndarray:
    found = np.zeros((SIZE, SIZE))
    found[24:56, 16:40] = 1
    return found


def inverted() -> np.ndarray:
    return 1 - perfect()


def uniform() -> np.ndarray:
    return np.ones((SIZE, SIZE))


def pixel(y: int, x: int) -> np.ndarray:
    found = np.zeros((SIZE, SIZE))
    found[y, x] = 1
    return found


EMPTY = np.zeros((SIZE, SIZE))
NEGATIVE = -np.ones((SIZE, SIZE))
OF_A_MAP: list[Callable[[np.ndarray], object]] = [
    lambda saliency: pointing(saliency, [BOX]),
    lambda saliency: energy(saliency, [BOX]),
    lambda saliency: grid_share(saliency, 0),
    lambda saliency: box_ious(saliency, [BOX]),
]


# -- pointing, energy, grids ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saliency", "tolerance", "score"),
    [
        (perfect(), 0, 1),
        (inverted(), 0, 0),
        (pixel(24, 16), 0, 1),  # the first pixel of the box
        (pixel(23, 16), 0, 0),
        (pixel(24, 15), 0, 0),
        (pixel(24 - 15, 16), 15, 1),  # just near enough
        (pixel(24 - 16, 16), 15, 0),
        (pixel(24, 16 - 15), 15, 1),
        (pixel(24, 0), 15, 0),
        (pixel(55, 39), 0, 1),  # the last pixel of the box
        (pixel(55, 40), 0, 0),
        (pixel(63, 30), 8, 1),
        (pixel(63, 30), 7, 0),
        (perfect() - 2 * inverted(), 0, 1),
        (EMPTY, 15, 0),
        (NEGATIVE, 15, 0),
    ],
)
def test_pointing(saliency: np.ndarray, tolerance: float, score: float) -> None:
    assert pointing(saliency, [BOX], tolerance) == score


def test_pointing_looks_at_the_maximum_alone() -> None:
    assert pointing(0.99 * perfect() + pixel(0, 0), [BOX]) == 0
    assert pointing(0.99 * inverted() + pixel(30, 30), [BOX]) == 1


def test_pointing_at_any_of_several_boxes_is_a_hit() -> None:
    assert pointing(pixel(2, 60), [BOX, (58, 0, 64, 4)], 0) == 1
    assert pointing(pixel(2, 10), [BOX, (58, 0, 64, 4)], 0) == 0


def test_pointing_at_several_places_counts_the_share_that_hits() -> None:
    assert pointing(pixel(0, 0) + pixel(30, 30), [BOX], 0) == 0.5
    assert pointing(uniform(), [BOX], 0) == AREA
    assert pointing(uniform(), [BOX], 2) == 28 * 36 / SIZE**2


@pytest.mark.parametrize(
    ("saliency", "score"),
    [
        (perfect(), 1),
        (inverted(), 0),
        (uniform(), AREA),
        (pixel(55, 39), 1),
        (pixel(56, 39), 0),
        (pixel(55, 40), 0),
        (3 * pixel(30, 30) + pixel(0, 0), 0.75),
        (perfect() - 5 * inverted(), 1),
        (EMPTY, 0),
        (NEGATIVE, 0),
    ],
)
def test_energy(saliency: np.ndarray, score: float) -> None:
    assert energy(saliency, [BOX]) == pytest.approx(score)
    assert energy(torch.tensor(7 * saliency), [BOX]) == pytest.approx(score)


def test_energy_counts_once_where_boxes_overlap() -> None:
    assert energy(uniform(), [BOX, BOX, (16, 24, 20, 30)]) == pytest.approx(AREA)
    assert energy(uniform(), [BOX, (40, 24, 64, 56)]) == pytest.approx(2 * AREA)


def test_inside_rounds_and_cuts_off() -> None:
    covered = inside([(-3.0, 0.6, 2.4, 900.0)], (4, 5))
    assert covered.tolist() == [[False] * 5, *[[True, True, False, False, False]] * 3]


@pytest.mark.parametrize("cell", range(4))
def test_grid_share(cell: int) -> None:
    down, right = divmod(cell, 2)
    there = np.zeros((8, 6))
    there[down * 4 : down * 4 + 4, right * 3 : right * 3 + 3] = 1
    assert grid_share(there, cell) == 1
    assert grid_share(1 - there, cell) == 0
    assert grid_share(np.ones((8, 6)), cell) == pytest.approx(0.25)
    assert grid_share(there - 4 * (1 - there), cell) == 1
    assert grid_share(3 * there + (1 - there), cell) == pytest.approx(0.5)


def test_grid_share_of_other_grids() -> None:
    assert grid_share(np.arange(6.0).reshape(1, 6), 2, rows=1, columns=3) == pytest.approx(9 / 15)
    with pytest.raises(InputError, match="no cell 4"):
        grid_share(uniform(), 4)
    with pytest.raises(InputError, match="5 x 4 pixels"):
        grid_share(np.ones((5, 4)), 0)


@pytest.mark.parametrize("measure", OF_A_MAP)
def test_what_is_no_map_is_refused(measure: Callable[[np.ndarray], object]) -> None:
    with pytest.raises(InputError, match="NaN"):
        measure(np.full((4, 4), np.nan))
    with pytest.raises(InputError, match=r"\[height, width\]"):
        measure(np.ones((1, 4, 4)))


@pytest.mark.parametrize("boxes", [[], [1, 2, 3, 4], [[1, 2, 3]]])
def test_what_is_no_box_is_refused(boxes: list[object]) -> None:
    with pytest.raises(InputError, match=r"\[n, 4\]"):
        pointing(uniform(), boxes)  # type: ignore[arg-type]


# -- boxes ----------------------------------------------------------------------------------------


def naive_region(mask: np.ndarray, diagonal: bool) -> tuple[int, int, int, int] | None:
    """Flood each region in turn."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    best: list[tuple[int, int]] = []
    for first in sorted(left):
        if first not in left:
            continue
        left.remove(first)
        region, open_ = [first], [first]
        while open_:
            y, x = open_.pop()
            for dy, dx in itertools.product((-1, 0, 1), repeat=2):
                there = (y + dy, x + dx)
                if there in left and (diagonal or not dy or not dx):
                    left.remove(there)
                    region.append(there)
                    open_.append(there)
        if len(region) > len(best):
            best = region
    if not best:
        return None
    y, x = np.array(best).T
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.4, 0.55, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (17, 23)])
def test_largest_region_is_what_a_flood_finds(
    shape: tuple[int, int], density: float, diagonal: bool
) -> None:
    random = np.random.default_rng(0)
    for _ in range(10):
        mask = random.random(shape) < density
        assert largest_region(mask, diagonal) == naive_region(mask, diagonal)


def test_largest_region_follows_a_spiral() -> None:
    rows = ["#######", "......#", "#####.#", "#...#.#", "#.###.#", "#.....#", "#######"]
    mask = np.array([[pixel == "#" for pixel in row] for row in rows])
    assert largest_region(mask) == (0, 0, 7, 7)
    mask[0, 6] = False  # cut from its first row, which is 6 pixels, the rest being longer
    assert largest_region(mask) == (0, 1, 7, 7)


def test_overlap() -> None:
    boxes = [BOX, (0, 0, 16, 24), (16, 24, 28, 56), (0, 0, 64, 64), (28, 40, 52, 72)]
    # The last shares a quarter, 192 pixels, of 768 each.
    expected = [1, 0, 0.5, AREA, 192 / (2 * 768 - 192)]
    np.testing.assert_allclose(intersection_over_union(BOX, boxes), expected)


def test_box_of_a_perfect_map_fits_at_all_thresholds() -> None:
    assert box_ious(perfect(), [BOX]).tolist() == [1.0] * len(THRESHOLDS)
    assert box_ious(5 * perfect() - 3 * inverted(), [BOX]).tolist() == [1.0] * len(THRESHOLDS)


def test_box_of_other_maps() -> None:
    assert box_ious(inverted(), [BOX]).tolist() == pytest.approx([AREA] * len(THRESHOLDS))
    assert box_ious(pixel(30, 30), [BOX]).tolist() == pytest.approx([1 / 768] * len(THRESHOLDS))
    for nothing in (uniform(), EMPTY, NEGATIVE):  # nothing stands out
        assert not box_ious(nothing, [BOX]).any()


def test_box_takes_the_largest_region_and_the_best_true_box() -> None:
    two = perfect()
    two[0:4, 0:4] = 1
    assert box_ious(two, [BOX]).min() == 1
    assert box_ious(two, [(0, 0, 4, 4)]).max() == 0
    assert box_ious(two, [(0, 0, 4, 4), BOX]).min() == 1


def test_box_thresholds_run_from_the_lowest_to_the_highest_value() -> None:
    found = 10 + perfect() + pixel(30, 30)  # 10 around, 11 in the box, 12 at its peak
    ious = box_ious(found, [BOX], thresholds=[0.1, 0.5, 0.51, 1.0])
    assert ious.tolist() == pytest.approx([1, 1, 1 / 768, 1 / 768])


def test_threshold_is_the_best_of_the_other_half() -> None:
    even, odd = [0.6, 0.0, 0.4], [0.0, 0.8, 0.4]
    # Even images are best at the first threshold, which finds none of the odd ones, and the other way.
    assert box_hits([even, odd, even, odd]).tolist() == [False] * 4
    # At .4 the odd ones are best at the last threshold, which finds the even ones, too.
    late = [0.0, 0.35, 0.4]
    assert box_hits([even, late, even, late], 0.4).tolist() == [True, False, True, False]
    # Halves that agree: their own thresholds would not be found better.
    assert box_hits([even, even, odd, odd]).tolist() == [True, True, False, False]
    assert box_hits([even, odd], half=[True, False]).tolist() == [False, False]


@pytest.mark.parametrize("half", [None, [True]])
def test_threshold_needs_another_half(half: list[bool] | None) -> None:
    with pytest.raises(InputError, match="each half"):
        box_hits([[0.5]], half=half)


# -- insertion, deletion, ROAD --------------------------------------------------------------------

#: An image that is 1 in the box and 0 elsewhere, and a 'network' that answers with what the box holds.
IMAGE = torch.tensor(perfect()).float().expand(3, -1, -1).contiguous()


def box_only(batch: Tensor) -> Tensor:
    there = batch[:, :, 24:56, 16:40].mean((1, 2, 3))
    return torch.stack([1 - there, there], 1)


def constant(batch: Tensor) -> Tensor:
    return torch.full((len(batch), 2), 0.5)


def outside_of_the_box_first() -> np.ndarray:
    return inverted() + 0.5 * perfect()


def test_deletion_is_the_area_under_a_line_known_beforehand() -> None:
    # The box is 3 of 16 steps. In each, a third of it falls to the mean, 3/16; then nothing more.
    at = [1 - (1 - AREA) * min(step / 3, 1) for step in range(17)]
    expected = sum(at[1:] + at[:-1]) / 32
    assert deletion(box_only, IMAGE, 1, perfect()) == pytest.approx(expected, rel=1e-5)
    at = [1 - (1 - AREA) * max(step - 13, 0) / 3 for step in range(17)]
    expected = sum(at[1:] + at[:-1]) / 32
    worst = deletion(box_only, IMAGE, 1, outside_of_the_box_first())
    assert worst == pytest.approx(expected, rel=1e-5)


def test_insertion_is_the_area_under_a_line_known_beforehand() -> None:
    none = insertion(
        box_only, IMAGE, 1, perfect(), steps=1
    )  # half of the blurred and the whole image
    low = 2 * none - 1
    assert 0.1 < low < 0.4
    at = [low + (1 - low) * min(step / 3, 1) for step in range(17)]
    found = insertion(box_only, IMAGE, 1, perfect())
    assert found == pytest.approx(sum(at[1:] + at[:-1]) / 32, rel=0.02)
    at = [low + (1 - low) * max(step - 13, 0) / 3 for step in range(17)]
    found = insertion(box_only, IMAGE, 1, outside_of_the_box_first())
    assert found == pytest.approx(sum(at[1:] + at[:-1]) / 32, rel=0.02)


@pytest.mark.parametrize("blur", [1.0, 25.0, 80.0])
def test_blur_leaves_what_is_flat(blur: float) -> None:
    flat = torch.full((3, SIZE, SIZE), 0.25)
    assert insertion(box_only, flat, 1, perfect(), blur=blur) == pytest.approx(0.25, rel=1e-4)


def test_strong_blur_leaves_nothing_but_the_mean() -> None:
    whole = insertion(lambda x: x.mean((1, 2, 3))[:, None], IMAGE, 0, perfect(), steps=1, blur=200)
    assert whole == pytest.approx(AREA, rel=0.03)


def test_answers_that_do_not_change_give_what_they_are() -> None:
    assert insertion(constant, IMAGE, 1, perfect()) == pytest.approx(0.5)
    assert deletion(constant, IMAGE, 1, perfect()) == pytest.approx(0.5)
    assert road(constant, IMAGE, 1, perfect()) == 0


def test_only_the_order_of_the_evidence_matters() -> None:
    random = np.random.default_rng(0).random((SIZE, SIZE))
    for measure in (insertion, deletion, road):
        assert measure(box_only, IMAGE, 1, random) == measure(box_only, IMAGE, 1, 9 * random**3)


def test_road_tells_right_from_wrong() -> None:
    right = road(box_only, IMAGE, 1, perfect() + 0.01 * uniform())
    wrong = road(box_only, IMAGE, 1, outside_of_the_box_first())
    assert right > 0.3
    assert wrong == pytest.approx(-right, abs=0.01)


def test_road_fills_holes_from_their_surroundings() -> None:
    # A slope is what the mean of neighbours continues: whatever is removed comes back.
    slope = torch.linspace(0, 1, SIZE).expand(3, SIZE, SIZE).contiguous()
    seen: list[Tensor] = []

    def remember(batch: Tensor) -> Tensor:
        seen.append(batch)
        return constant(batch)

    random = np.random.default_rng(0).random((SIZE, SIZE))
    hole = perfect() + 0.01 * random
    road(remember, slope, 1, hole, shares=[AREA], noise=0)
    assert float((seen[0][0] - slope).abs().max()) < 0.05
    road(remember, slope, 1, random, shares=[0.5], noise=0)
    assert float((seen[1] - slope).abs().mean()) < 0.02


def test_road_removes_as_many_as_it_says() -> None:
    counts: list[list[int]] = []

    def count(batch: Tensor) -> Tensor:
        counts.append((batch != IMAGE).any(1).sum((1, 2)).tolist())
        return constant(batch)

    random = np.random.default_rng(0).random((SIZE, SIZE))
    road(count, IMAGE, 1, random, shares=[0.25, 0.5], noise=0.1)
    assert counts[0] == [1024, 2048, 1024, 2048]


def test_map_and_image_have_one_size() -> None:
    for measure in (insertion, deletion, road):
        with pytest.raises(InputError, match="8 x 8 pixels"):
            measure(constant, IMAGE, 1, np.ones((8, 8)))


# -- comparing ------------------------------------------------------------------------------------


def test_rank_correlation_of_known_maps() -> None:
    ramp = np.arange(12.0).reshape(3, 4)
    assert rank_correlation(ramp, np.exp(ramp)) == pytest.approx(1)
    assert rank_correlation(ramp, -(ramp**3)) == pytest.approx(-1)
    assert rank_correlation(ramp, np.ones((3, 4))) == 0
    assert rank_correlation(np.ones((3, 4)), np.zeros((3, 4))) == 1
    # By hand: ranks 1 2 3 4 and 2.5 2.5 1 4; both have the mean 2.5.
    assert rank_correlation([[1, 2, 3, 4]], [[5, 5, 0, 9]]) == pytest.approx(
        1.5 / (5 * 4.5) ** 0.5 * 1
    )
    with pytest.raises(InputError, match="shapes"):
        rank_correlation(ramp, ramp.T)


def test_rank_correlation_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    one, other = random.integers(-3, 4, (2, 9, 9))
    expected = stats.spearmanr(one.ravel(), other.ravel()).statistic
    assert rank_correlation(one, other) == pytest.approx(expected)


def naive_similarity(one: np.ndarray, other: np.ndarray) -> float:
    """SSIM from its definition, window by window, of maps whose maximum is 1."""
    reach = 5
    weight = np.array(
        [
            [math.exp(-(dy**2 + dx**2) / (2 * 1.5**2)) for dx in range(-reach, reach + 1)]
            for dy in range(-reach, reach + 1)
        ]
    )
    weight /= weight.sum()
    found = []
    for y in range(reach, one.shape[0] - reach):
        for x in range(reach, one.shape[1] - reach):
            place = np.s_[y - reach : y + reach + 1, x - reach : x + reach + 1]
            a, b = one[place], other[place]
            mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
            var_a = (weight * (a - mean_a) ** 2).sum()
            var_b = (weight * (b - mean_b) ** 2).sum()
            both = (weight * (a - mean_a) * (b - mean_b)).sum()
            light = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
            found.append(light * (2 * both + 0.03**2) / (var_a + var_b + 0.03**2))
    return float(np.mean(found))


def test_structural_similarity_is_what_its_definition_says() -> None:
    random = np.random.default_rng(0)
    one, other = random.random((2, 17, 14))
    one, other = one / one.max(), other / other.max()
    assert structural_similarity(one, other) == pytest.approx(naive_similarity(one, other))
    assert structural_similarity(one, 5 * other) == pytest.approx(naive_similarity(one, other))
    blend = 0.9 * one + 0.1 * other
    blend /= blend.max()
    assert structural_similarity(one, blend) == pytest.approx(naive_similarity(one, blend))


def test_structural_similarity_agrees_with_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    one, other = np.random.default_rng(0).random((2, 40, 30))
    one, other = one / one.max(), other / other.max()
    expected = metrics.structural_similarity(
        one, other, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert structural_similarity(one, other) == pytest.approx(expected)


def test_structural_similarity_of_known_maps() -> None:
    random = np.random.default_rng(0).random((SIZE, SIZE))
    assert structural_similarity(random, random) == pytest.approx(1)
    assert structural_similarity(random, 3 * random) == pytest.approx(1)
    assert structural_similarity(random - 5, -random) == 1  # both without evidence
    assert structural_similarity(uniform(), EMPTY) == pytest.approx(0.01**2 / (1 + 0.01**2))
    assert structural_similarity(random, random.T[::-1]) < 0.1
    assert structural_similarity(perfect(), 1 - perfect()) < structural_similarity(
        perfect(), perfect() + 0.1
    )


def test_structural_similarity_takes_maps_of_one_size_with_room_for_a_window() -> None:
    with pytest.raises(InputError, match="different shapes"):
        structural_similarity(np.ones((20, 30)), np.ones((30, 20)))
    with pytest.raises(InputError, match="smaller than a window of 11 x 11"):
        structural_similarity(np.ones((10, 30)), np.ones((10, 30)))
    assert structural_similarity(np.ones((7, 9)), np.ones((7, 9)), sigma=0.8) == pytest.approx(1)


def test_bootstrap_of_equal_values_is_sure() -> None:
    assert bootstrap([0.25] * 9) == (0.25, 0.25, 0.25)


def test_bootstrap_interval_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    mean, low, high = bootstrap(values)
    assert mean == pytest.approx(values.mean())
    wide = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((mean - wide, mean + wide), abs=0.1 * wide)
    narrow = bootstrap(values, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.674 * wide / 1.96, rel=0.1)


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        _, low, high = bootstrap(random.random(50), samples=300, seed=i)
        covered += low <= 0.5 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_bootstrap_draws_images_not_measures() -> None:
    values = np.random.default_rng(0).random(20)
    assert bootstrap(np.stack([values] * 3, 1)) == pytest.approx(bootstrap(values))
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values) != bootstrap(values, seed=1)
    with pytest.raises(InputError, match="no values"):
        bootstrap([])


def test_removing_takes_steps_and_a_blur() -> None:
    image, saliency = torch.rand(3, 8, 8), torch.rand(8, 8)

    def predict(x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 2, 3))[:, None].expand(-1, 2)

    with pytest.raises(InputError, match="0 steps"):
        deletion(predict, image, 0, saliency, steps=0)
    with pytest.raises(InputError, match="blur of 0"):
        insertion(predict, image, 0, saliency, blur=0)
