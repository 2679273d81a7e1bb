from __future__ import annotations

import subprocess
import sys
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from howyouseeme import draw
from howyouseeme.draw import (
    LayerView,
    Subject,
    explanation_picture,
    layers_strip,
    percent,
    stack_pictures,
)
from howyouseeme.errors import InputError

NONE = np.zeros(0)


def make_photo(width: int = 300, height: int = 200) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    rgb = [255 * x / width, 255 * y / height, 128 + 60 * np.sin(x / 9) * np.cos(y / 7)]
    return Image.fromarray(np.stack(rgb, axis=-1).astype(np.uint8))


def make_subject(photo: Image.Image | None = None, **changes: object) -> Subject:
    photo = photo or make_photo()
    shape = (photo.height, photo.width)
    dark = np.zeros(shape)
    subject = Subject(photo, NONE, NONE, NONE, dark, dark, "tabby cat", 0.9, "evidence")
    return replace(subject, **changes)  # type: ignore[arg-type]


def panel(picture: Image.Image, photo: Image.Image, number: int) -> np.ndarray:
    """One of the four panels, cut out of the picture of a photo that is not wide."""
    (width, height), columns, whole = draw._layout(photo.size)
    zoom = draw._zoom(whole)
    row, column = divmod(number, columns)
    left = draw._MARGIN + (whole - columns * (width + draw._GAP) + draw._GAP) // 2
    left += column * (width + draw._GAP)
    top = draw._MARGIN + round(60 * zoom) + row * (height + round(32 * zoom) + round(10 * zoom))
    return np.asarray(picture.crop((left, top, left + width, top + height)), dtype=float)


def changed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a - b).sum(axis=-1) > 30


@pytest.mark.parametrize(
    "size",
    [
        (300, 200),
        (200, 300),
        (60, 900),
        (900, 60),
        (32, 32),
        (1, 1),
        (6000, 1000),
        (1000, 1),
        (1, 500),
    ],
)
def test_any_shape_gives_a_picture_of_reasonable_size(size: tuple[int, int]) -> None:
    photo = make_photo(*size)
    rng = np.random.default_rng(0)
    y, x = rng.uniform(0, size[1], 300), rng.uniform(0, size[0], 300)
    attention = np.full((size[1], size[0]), 0.5)
    subject = make_subject(photo, points_y=y, points_x=x, strength=y + 1, attention=attention)
    picture = explanation_picture(subject)
    assert picture.mode == "RGB"
    assert 600 <= picture.width <= 2600
    assert picture.height <= 2600
    box = (0, 0, *size)
    strip = layers_strip(
        photo, [LayerView("stem", np.ones((7, 7)), y, x, y + 1, box, (7, 7), np.arange(len(y)))] * 3
    )
    assert strip.width == picture.width
    assert strip.height <= picture.height


def test_first_panel_is_the_photo() -> None:
    photo = make_photo(32, 32)
    shown = panel(explanation_picture(make_subject(photo)), photo, 0)
    step = shown.shape[0] // 32
    assert shown.shape[0] == 32 * step
    blocks = np.asarray(photo, dtype=float).repeat(step, axis=0).repeat(step, axis=1)
    assert np.array_equal(shown, blocks)  # a tiny photo keeps its pixels, all of the same size


def test_points_are_where_they_belong() -> None:
    photo = make_photo()
    without = explanation_picture(make_subject(photo))
    point = {"points_y": [20], "points_x": [250], "strength": [3.0]}
    subject = make_subject(photo, **{k: np.array(v, dtype=float) for k, v in point.items()})
    picture = explanation_picture(subject)
    for number in (0, 2, 3):
        assert np.array_equal(panel(picture, photo, number), panel(without, photo, number))
    rows, columns = np.nonzero(changed(panel(picture, photo, 1), panel(without, photo, 1)))
    scale = panel(picture, photo, 1).shape[1] / photo.width
    assert rows.mean() == pytest.approx(20.5 * scale, abs=0.7)
    assert columns.mean() == pytest.approx(250.5 * scale, abs=0.7)
    assert 8 <= np.ptp(rows) <= 40  # visible, and still a point


def test_strong_points_are_larger_brighter_and_on_top() -> None:
    photo = Image.new("RGB", (300, 200), (120, 120, 120))
    y, x = np.array([100.0, 100.0, 100.5]), np.array([60.0, 240.0, 60.5])
    strength = np.array([1.0, 0.05, 0.05])  # the third is under the first
    with_points = make_subject(photo, points_y=y, points_x=x, strength=strength)
    shown = panel(explanation_picture(with_points), photo, 1)
    marked = changed(shown, panel(explanation_picture(make_subject(photo)), photo, 1))
    half = shown.shape[1] // 2
    assert marked[:, :half].sum() > 4 * marked[:, half:].sum() > 0
    scale = shown.shape[1] / 300
    strong, weak = (shown[int(100.5 * scale), int(column * scale)] for column in (60.5, 240.5))
    assert strong.sum() > weak.sum() + 100
    # The order in which the points are given makes no difference.
    turned = make_subject(photo, points_y=y[::-1], points_x=x[::-1], strength=strength[::-1])
    assert np.array_equal(panel(explanation_picture(turned), photo, 1), shown)


def test_a_white_photo_has_an_edge() -> None:
    photo = Image.new("RGB", (300, 200), "white")
    picture = np.asarray(explanation_picture(make_subject(photo)).convert("L"), dtype=int)
    dark = picture < 240
    (width, height), *_ = draw._layout(photo.size)
    assert (dark.sum(1) >= 2 * width).sum() >= 4  # above and below both rows of panels
    assert (dark.sum(0) >= 2 * height).sum() >= 4


def test_texts_of_boxes_leave_each_other_room(monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[tuple[int, int, int, int]] = []
    original = draw._free

    def free(*given: object) -> tuple[int, int, int, int]:
        placed.append(original(*given))  # type: ignore[arg-type]
        return placed[-1]

    monkeypatch.setattr(draw, "_free", free)
    boxes = [((20.0, 5.0, 200.0, 150.0), "one", "one 90.0%"),
             ((20.0, 5.0, 190.0, 140.0), "two", "two 8.0%"),
             ((22.0, 8.0, 60.0, 20.0), "three", "three 1.0%")]  # fmt: skip
    draw.boxes_picture(make_photo(), boxes)
    assert len(placed) == 3
    for i, one in enumerate(placed):
        for other in placed[:i]:
            apart = one[2] <= other[0] or other[2] <= one[0]
            assert apart or one[3] <= other[1] or other[3] <= one[1]


def test_boxes_of_one_label_have_one_colour() -> None:
    photo = Image.new("RGB", (600, 400))
    boxes = [((x, 100, x + 90, 200), label, f"{number} {label} {90 - number}.0%")
             for number, (x, label) in enumerate([(10, "person"), (210, "person"), (410, "dog")])]  # fmt: skip
    picture = draw.boxes_picture(photo, boxes)
    first, second, other = (picture.getpixel((round(box[0]), 150)) for box, *_ in boxes)
    assert first == second != (0, 0, 0)
    assert first != other != (0, 0, 0)


def test_no_points_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    monkeypatch.setattr(draw, "_fit", lambda text, font, width: texts.append(text) or text)
    explanation_picture(make_subject())
    assert "no points: nothing speaks for it" in texts


def test_the_strongest_points_are_drawn_last() -> None:
    strength = np.arange(1, 2001, dtype=float)[::-1]
    dots = draw._dots(strength % 200, strength % 300, strength, (300, 200), (600, 400))
    assert len(dots) == 2000
    assert dots[-1, 0] == pytest.approx((2000 % 300 + 0.5) * 2)
    assert dots[0, 0] == pytest.approx(1.5 * 2)
    assert np.all(np.diff(dots[:, 2]) >= 0)
    assert dots[-1, 2] == 1


def test_one_outlier_does_not_hide_the_others() -> None:
    strength = np.array([1000.0] + [1.0] * 199)
    dots = draw._dots(np.zeros(200), np.zeros(200), strength, (300, 200), (600, 400))
    assert dots[:, 2].min() == 1


def test_points_without_a_place_or_strength_are_left_out() -> None:
    y, x = np.array([1, np.nan, 2, 3, 4.0]), np.array([1, 1, np.inf, 3, 4.0])
    strength = np.array([1, 1, 1, 0, np.nan])
    dots = draw._dots(y, x, strength, (300, 200), (300, 200))
    assert len(dots) == 1
    explanation_picture(make_subject(points_y=y, points_x=x, strength=strength))


@pytest.mark.parametrize("size", [(300, 200), (300, 400)])
@pytest.mark.parametrize(("name", "number"), [("attention", 2), ("saliency", 3)])
def test_maps_are_where_they_belong(name: str, number: int, size: tuple[int, int]) -> None:
    photo = make_photo(*size)
    heat = np.zeros(size[::-1])
    heat[10:30, 240:280] = 1
    picture = explanation_picture(make_subject(photo, **{name: heat}))
    without = explanation_picture(make_subject(photo))
    for other in {0, 1, 2, 3} - {number}:
        assert np.array_equal(panel(picture, photo, other), panel(without, photo, other))
    rows, columns = np.nonzero(
        changed(panel(picture, photo, number), panel(without, photo, number))
    )
    scale = panel(picture, photo, number).shape[1] / photo.width
    assert rows.mean() == pytest.approx(20 * scale, abs=2)
    assert columns.mean() == pytest.approx(260 * scale, abs=2)


def test_photo_stays_readable_under_the_strongest_attention() -> None:
    stripes = np.zeros((200, 300, 3), dtype=np.uint8)
    stripes[:, ::20] = stripes[:, 1::20] = 255
    photo = Image.fromarray(stripes)
    picture = explanation_picture(make_subject(photo, attention=np.ones((200, 300))))
    shown = panel(picture, photo, 2)
    assert np.ptp(shown.mean(axis=(0, 2))) > 30


@pytest.mark.parametrize("cells", [True, False])
def test_strips_leave_the_pixels_as_they_are(monkeypatch: pytest.MonkeyPatch, cells: bool) -> None:
    random = np.random.default_rng(0)
    photo = Image.fromarray(random.integers(0, 256, (90, 131, 3), dtype=np.uint8))
    heat, box = random.random((7, 9), dtype=np.float32), (10, 20, 100, 80)
    whole = draw.paint_map(photo, heat, box, cells=cells)
    monkeypatch.setattr(draw, "_STRIP", 131 * 4)  # 90 isn't a multiple
    assert draw.paint_map(photo, heat, box, cells=cells).tobytes() == whole.tobytes()


def test_a_large_photo_takes_little_more_than_its_map() -> None:
    photo, heat = Image.new("RGB", (2000, 1500)), np.ones((1500, 2000), np.float32)
    draw.paint_map(photo, heat)  # what only the first call takes
    tracemalloc.start()
    draw.paint_map(photo, heat)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * heat.nbytes


def test_broken_values_in_a_map_are_survived() -> None:
    attention = np.full((200, 300), np.nan)
    attention[0, :2] = np.inf, -np.inf
    shown = explanation_picture(make_subject(attention=attention))
    assert changed(panel(shown, make_photo(), 2), panel(shown, make_photo(), 0)).any()


def test_impossible_input_is_named() -> None:
    with pytest.raises(InputError, match="rows and columns"):
        explanation_picture(make_subject(attention=np.ones((3, 4, 5))))


@pytest.mark.parametrize("size", [(300, 200), (60, 900)])
def test_long_words_stay_inside(size: tuple[int, int]) -> None:
    long = "tabby " * 100
    photo = make_photo(*size)
    picture = explanation_picture(make_subject(photo, label=long, method=long))
    ink = np.asarray(picture).min(axis=(0, 2)) < 250
    assert ink.nonzero()[0].max() < picture.width - draw._MARGIN + 2
    strip = np.asarray(layers_strip(photo, [view(0, name=long, box=(0, 0, *size))]))
    assert (strip[:, : draw._MARGIN] == 255).all()
    assert (strip[:, -draw._MARGIN :] == 255).all()


def test_label_probability_and_method_are_written() -> None:
    usual = np.asarray(explanation_picture(make_subject()))
    for change in ({"label": "dog"}, {"probability": None}, {"method": "x"}):
        other = np.asarray(explanation_picture(make_subject(**change)))
        assert other.shape == usual.shape
        assert (other != usual).any(), change
    nan = explanation_picture(make_subject(probability=float("nan")))
    assert nan == explanation_picture(make_subject(probability=None))


def test_drawing_changes_nothing_that_it_was_given() -> None:
    photo = make_photo().convert("P")  # any mode will do
    before = photo.tobytes()
    attention = np.random.default_rng(0).uniform(0, 1, (200, 300))
    kept = attention.copy()
    subject = make_subject(photo, attention=attention)
    assert explanation_picture(subject) == explanation_picture(subject)
    assert photo.mode == "P"
    assert photo.tobytes() == before
    assert np.array_equal(attention, kept)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0.0%"), (0.0004, "<0.1%"), (0.5, "50.0%"), (0.99996, ">99.9%"), (1, "100.0%")],
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


def view(number: int, **changes: Any) -> LayerView:
    box = (0.0, 0.0, 300.0, 200.0)  # all of a photo, as it is made here
    layer = LayerView(f"stage {number}", np.zeros((4, 6)), NONE, NONE, NONE, box, (4, 6), NONE)
    return replace(layer, **changes)


def test_many_layers_wrap_into_rows() -> None:
    photo = make_photo()
    heights = {n: layers_strip(photo, [view(i) for i in range(n)]).height for n in (6, 7, 12, 13)}
    assert heights[6] < heights[7]
    assert heights[12] < heights[13]
    assert heights[12] < 2 * heights[6]  # two rows of six


def test_a_line_under_the_layers_says_what_they_show() -> None:
    strip = layers_strip(
        make_photo(60, 900), [view(0, box=(0, 0, 60, 900))]
    )  # as narrow as strips get
    assert draw._fit(draw._STRIP_KEY, draw._font(13), draw._LEAST_WIDTH) == draw._STRIP_KEY
    ink = np.asarray(strip).min(axis=(1, 2)) < 250
    assert 0 < strip.height - 1 - ink.nonzero()[0].max() - draw._MARGIN < 20


def test_layers_go_from_left_to_right() -> None:
    photo = Image.new("RGB", (300, 200), (120, 120, 120))
    plain = np.asarray(layers_strip(photo, [view(i) for i in range(4)]), dtype=float)
    hot = [view(0), view(1, map=np.ones((4, 6))), view(2), view(3)]
    columns = np.nonzero(changed(np.asarray(layers_strip(photo, hot), dtype=float), plain))[1]
    assert plain.shape[1] / 4 < columns.min() < columns.max() < plain.shape[1] / 2


def test_a_map_keeps_the_cells_of_its_own_resolution() -> None:
    photo = Image.new("RGB", (300, 200), (120, 120, 120))
    cells = np.linspace(0, 1, 24).reshape(4, 6)
    top = int(draw._MARGIN + 5)
    colours = np.unique(np.asarray(layers_strip(photo, [view(0, map=cells)]))[top], axis=0)
    assert len(colours) == 6 + 1  # the first row of the map, and the white beside it


def test_a_map_covers_only_what_the_network_saw() -> None:
    photo = Image.new("RGB", (300, 200), (120, 120, 120))
    hot = view(0, map=np.ones((7, 7)), places=(7, 7), box=(50, 0, 250, 200))
    tiles = [draw._tile(photo, layer, photo.size) for layer in (hot, view(0))]
    seen, plain = (np.asarray(tile, dtype=float) for tile in tiles)
    expected = np.zeros((200, 300), dtype=bool)
    expected[:, 50:250] = True
    assert np.array_equal(changed(seen, plain), expected)


def test_top_nodes_are_marked_where_they_are() -> None:
    photo = Image.new("RGB", (300, 200), (120, 120, 120))
    place = {"points_y": [24.5], "points_x": [274.5], "strength": [1.0]}
    marked = view(0, **{k: np.array(v) for k, v in place.items()})
    plain = np.asarray(layers_strip(photo, [view(0)]), dtype=float)
    dots = changed(np.asarray(layers_strip(photo, [marked]), dtype=float), plain)
    rows, columns = np.nonzero(dots)
    tile = np.nonzero(plain[draw._MARGIN + 5].min(axis=-1) < 250)[0]
    scale = len(tile) / 300
    assert columns.mean() - tile[0] + 0.5 == pytest.approx(275 * scale, abs=1)
    assert rows.mean() - draw._MARGIN + 0.5 == pytest.approx(25 * scale, abs=1)


def test_the_class_itself_only_tints_the_photo() -> None:
    photo = make_photo()
    middle = {"points_y": np.array([99.5]), "points_x": np.array([149.5]), "strength": np.ones(1)}
    one = view(0, map=np.ones((1, 1)), places=(1, 1), **middle)
    many = replace(one, map=np.ones((2, 2)), places=(2, 2))
    tiles = [np.asarray(draw._tile(photo, layer, photo.size)) for layer in (one, many)]
    contrast = [tile.std(axis=(0, 1)).mean() for tile in tiles]
    assert contrast[0] > 1.5 * contrast[1]


def test_stacking() -> None:
    red, blue = Image.new("RGB", (10, 4), "red"), Image.new("RGB", (6, 3), "blue")
    stacked = stack_pictures(red, blue)
    assert stacked.mode == "RGB"
    assert stacked.size == (10, 7)
    assert stacked.getpixel((0, 3)) == (255, 0, 0)
    assert stacked.getpixel((2, 4)) == (0, 0, 255)
    assert stacked.getpixel((1, 4)) == (255, 255, 255)


def test_import_is_light_and_drawing_leaves_pyplot_alone() -> None:
    code = """
import sys
import tracemalloc
from howyouseeme import draw
assert not {"torch", "matplotlib"} & set(sys.modules), "import"
import numpy as np
from PIL import Image
one = np.ones(1)
photo = Image.new("RGB", (8, 8))
draw.explanation_picture(draw.Subject(photo, one, one, one, *np.ones((2, 8, 8)), "a", 1, "b"))
assert not {"torch", "matplotlib.pyplot"} & set(sys.modules), "drawing"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
