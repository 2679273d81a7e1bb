"""Pictures made to be looked at, from plain arrays: no network and no torch in here.

Points are in image pixels, and whole numbers are pixel centres: (0, 0) is the middle of the top
left pixel.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .errors import InputError

if TYPE_CHECKING:
    from .regions import Box

_MOST_TILES = 6  # in one row of the layers strip

_PANEL_SIDE = 500  # a panel has about the area of a square of this side, whatever its shape
_LONGEST_SIDE = 1500
_STRIP = 1 << 18  # pixels that are painted at once: all those of a large photo would take gigabytes
_BOXES_SIDE = 600  # the longer side at least, of a photo with boxes
_WIDE = 2.0  # photos wider than this are put under each other: side by side they would be ribbons
_LEAST_WIDTH = 600  # of the picture between its margins, so that a title fits over a narrow photo
_MARGIN = 32
_GAP = 20

_STRIP_KEY = "colour: evidence by place, summed over channels; dots: the strongest single nodes"

_WHITE = (255, 255, 255)
_INK = (28, 28, 32)
_MUTED = (104, 104, 112)
_EDGE = (222, 222, 226)
_BOX = (255, 214, 10)
_COLORMAP = "inferno"  # perceptually uniform, and readable with any colour vision


@dataclass(frozen=True)
class Subject:
    """What an explanation picture shows."""

    image: Image.Image
    points_y: np.ndarray
    points_x: np.ndarray
    strength: np.ndarray  # of each point, descending
    attention: np.ndarray  # [H, W], 0 to 1
    saliency: np.ndarray  # [H, W], 0 to 1
    label: str
    probability: float | None
    method: str
    box: Box | None = None  # asked about: x0, y0, x1, y1


@dataclass(frozen=True)
class LayerView:
    """Where one stage of the network looks."""

    name: str
    map: np.ndarray  # [h, w], 0 to 1
    points_y: np.ndarray  # the top nodes, in image pixels
    points_x: np.ndarray
    strength: np.ndarray
    # Left, top, right and bottom edge of what the map covers, in image pixels: a network that crops
    # its input does not see all of it.
    box: Box
    places: tuple[int, ...]  # rows and columns of the stage; the map may be drawn finer than that
    which: np.ndarray  # of the layer's nodes: those in padding have no place in the image


def explanation_picture(subject: Subject) -> Image.Image:
    """The photo, and over it the points, the attention and the saliency, under a title."""
    panel_size, columns, width = _layout(subject.image.size)
    points, points_text = _points_panel(subject, panel_size)
    panel = _resize(subject.image.convert("RGB"), panel_size)
    photo = panel if subject.box is None else _boxed(panel, subject.box, subject.image.size)
    panels = [
        (photo, "photo" if subject.box is None else "photo, and the box"),
        (points, points_text),
        (paint_map(panel, subject.attention), "attention: where it looked"),
        (paint_map(panel, subject.saliency), "saliency: what answers for it"),
    ]

    zoom = _zoom(width)
    small = _font(round(16 * zoom))
    line = round(32 * zoom)
    title_height, under_height, between = round(60 * zoom), line, round(10 * zoom)
    rows = math.ceil(len(panels) / columns)
    block = panel_size[1] + under_height + between
    height = 2 * _MARGIN + title_height + rows * block + line
    canvas = Image.new("RGB", (width + 2 * _MARGIN, height), _WHITE)
    pen = ImageDraw.Draw(canvas)

    _write_title(pen, subject.label, subject.probability, width)
    used = columns * panel_size[0] + (columns - 1) * _GAP
    left = _MARGIN + (width - used) // 2  # only a narrow photo leaves room at its sides
    for i, (picture, text) in enumerate(panels):
        x = left + (i % columns) * (panel_size[0] + _GAP)
        y = _MARGIN + title_height + (i // columns) * block
        canvas.paste(picture, (x, y))
        # A white photo has an edge too.
        pen.rectangle((x - 1, y - 1, x + panel_size[0], y + panel_size[1]), outline=_EDGE)
        place = (x, y + panel_size[1] + round(8 * zoom))
        pen.text(place, _fit(text, small, panel_size[0]), font=small, fill=_INK)

    foot = height - _MARGIN - round(20 * zoom)
    caption = f"method: {subject.method}"
    key = _key(small)
    key_left = _MARGIN + width - key.width
    caption = _fit(caption, small, key_left - _MARGIN - 16)
    pen.text((_MARGIN, foot), caption, font=small, fill=_MUTED)
    canvas.paste(key, (key_left, foot))
    return canvas


def frames(subject: Subject, layers: Sequence[LayerView]) -> list[tuple[str, str, Image.Image]]:
    """One picture for each map, all of one size: its name, what it shows, and the picture."""
    photo = subject.image.convert("RGB")
    panel_size, _, _ = _layout(photo.size)
    panel = _resize(photo, panel_size)
    points, points_text = _points_panel(subject, panel_size)
    found = [
        ("photo", "as it was given", panel),
        ("points", points_text, points),
        ("attention", "where the network looked", paint_map(panel, subject.attention)),
        ("saliency", "which pixels answer for it, by levels", paint_map(panel, subject.saliency)),
    ]
    for layer in layers:
        size = " × ".join(str(side) for side in reversed(layer.places))
        says = f"{size} places; colour: evidence by place; dots: the strongest nodes"
        found.append((layer.name, says, _tile(panel, layer, photo.size)))
    return found


def layers_strip(image: Image.Image, layers: Sequence[LayerView]) -> Image.Image:
    """The photo with the map of each stage over it, from the pixels to the class.

    As wide as the explanation picture of the same photo, so that the two can be stacked.
    """
    photo = image.convert("RGB")
    panel_size, _, width = _layout(photo.size)
    aspect = photo.width / photo.height
    arrow = 26  # the space between two tiles holds the arrow that gives the direction
    # A panorama gets fewer tiles a row, or they would be too low to see anything in.
    most = _MOST_TILES if aspect <= _WIDE else max(3, round(_MOST_TILES * _WIDE / aspect))
    rows = math.ceil(len(layers) / most)
    columns = math.ceil(len(layers) / rows)
    room = (width - (columns - 1) * arrow) / columns
    # Never larger than a panel, or the tiles of a needle would be endless.
    tile_width = max(1, int(min(room, panel_size[0] * (0.6 if columns < 3 else 1))))
    tile_size = (tile_width, max(1, round(tile_width / aspect)))
    tile = _resize(photo, tile_size)

    zoom = _zoom(width)
    name_font, small_font = _font(round(16 * zoom)), _font(round(13 * zoom))
    text_height, between = round(44 * zoom), round(20 * zoom)
    block = tile_size[1] + text_height + between
    foot = _MARGIN + rows * block
    height = foot + round(20 * zoom) + _MARGIN
    canvas = Image.new("RGB", (width + 2 * _MARGIN, height), _WHITE)
    pen = ImageDraw.Draw(canvas)
    used = columns * tile_width + (columns - 1) * arrow
    left = _MARGIN + (width - used) // 2
    for i, layer in enumerate(layers):
        x = left + (i % columns) * (tile_width + arrow)
        y = _MARGIN + (i // columns) * block
        canvas.paste(_tile(tile, layer, photo.size), (x, y))
        name = _fit(layer.name, name_font, tile_width)
        below = y + tile_size[1]
        pen.text((x, below + round(6 * zoom)), name, font=name_font, fill=_INK)
        size = " × ".join(str(side) for side in reversed(layer.places))
        size = _fit(size, small_font, tile_width)
        pen.text((x, below + round(28 * zoom)), size, font=small_font, fill=_MUTED)
        if i + 1 < len(layers):
            middle, reach = (x + tile_width + arrow / 2, y + tile_size[1] / 2), 5
            corners = [(-reach / 2, -reach), (reach / 2, 0), (-reach / 2, reach)]
            stroke = [(middle[0] + dx, middle[1] + dy) for dx, dy in corners]
            pen.line(stroke, fill=_MUTED, width=2, joint="curve")
    pen.text((_MARGIN, foot), _fit(_STRIP_KEY, small_font, width), font=small_font, fill=_MUTED)
    return canvas


def boxes_picture(image: Image.Image, boxes: Sequence[tuple[Box, str, str]]) -> Image.Image:
    """The photo with boxes, the first on top: each (x0, y0, x1, y1 in its pixels), its label, its text.

    >>> boxes_picture(photo, [((30, 23, 165, 182), "tabby", "tabby 93.0%")])

    Boxes of one label have one colour. A small photo is enlarged, so that the texts can be read.
    """
    photo = image.convert("RGB")
    scale = max(1.0, _BOXES_SIDE / max(photo.size))
    picture = _resize(photo, (round(photo.width * scale), round(photo.height * scale)))
    pen = ImageDraw.Draw(picture)
    line = max(2, round(max(picture.size) / 250))
    font = _font(max(14, round(max(picture.size) / 40)))
    labels = list(dict.fromkeys(label for _, label, _ in boxes))
    spread = np.arange(len(labels)) / max(len(labels) - 1, 1)
    colours = dict(zip(labels, map(tuple, shades(1 - 0.7 * spread).tolist()), strict=True))
    for box, label, _ in reversed(boxes):
        draw_box(pen, box, colours[label], line, scale)
    taken: list[tuple[int, int, int, int]] = []
    for box, label, text in boxes:
        colour = colours[label]
        written = _fit(text, font, picture.width - 8)
        size = math.ceil(font.getlength(written)) + 8, round(font.size * 1.35)
        place = _free([round(side * scale) for side in box], size, picture.size, taken)
        taken.append(place)
        pen.rectangle(place, fill=colour)
        ink = _INK if sum(colour) > 380 else _WHITE
        at = (place[0] + 4, place[1] + round(font.size * 0.1))
        pen.text(at, written, font=font, fill=ink)
    return picture


def frame_picture(
    photo: Image.Image,
    saliency: np.ndarray,
    text: str,
    box: Box | None = None,
) -> Image.Image:
    """A photo under its saliency [height, width], 0..1, as large as it is, with a text in its corner.

    >>> frame_picture(frame, saliency, "tabby  93.0%")

    `box`, x0, y0, x1, y1 in its pixels, is what was asked about.
    """
    picture = paint_map(photo.convert("RGB"), saliency)
    if box is not None:
        picture = _boxed(picture, box, picture.size)
    font = _font(max(12, round(min(picture.size) / 20)))
    edge = round(font.size / 2)
    written = _fit(text, font, picture.width - 3 * edge)
    pen = ImageDraw.Draw(picture)
    high, wide = round(1.4 * font.size), math.ceil(font.getlength(written))
    pen.rectangle((0, 0, wide + 2 * edge, high), fill=_INK)
    pen.text((edge, high / 2), written, font=font, fill=_WHITE, anchor="lm")
    return picture


def draw_box(
    pen: ImageDraw.ImageDraw,
    box: Sequence[float],
    colour: str | tuple[int, ...],
    width: int,
    scale: float = 1.0,
) -> None:
    """Draw a box x0, y0, x1, y1, of which x1 and y1 are exclusive, on a picture of so many times its size.

    >>> draw_box(ImageDraw.Draw(photo), (30, 23, 165, 182), "white", width=2)
    """
    x0, y0, x1, y1 = (round(side * scale) for side in box)
    pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=width)


def _boxed(panel: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """A panel with a box in pixels of a photo of that size."""
    picture = panel.copy()
    line = max(2, round(max(picture.size) / 150))
    draw_box(ImageDraw.Draw(picture), box, _BOX, line, panel.width / size[0])
    return picture


def _free(
    box: Sequence[int],
    size: tuple[int, int],
    picture: tuple[int, int],
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int]:
    """Where the text of a box goes: above it, in its corner, below it, or further down, where none is yet."""
    (x0, y0, _, y1), (wide, tall) = box, size
    left = max(0, min(x0, picture[0] - wide))
    tops = [y0 - tall, y0, y1, *range(y0 + tall, picture[1] - tall, tall)]
    places = [(left, top, left + wide, top + tall) for top in tops if 0 <= top <= picture[1] - tall]
    for place in places:
        if all(
            place[2] <= other[0]
            or other[2] <= place[0]
            or place[3] <= other[1]
            or other[3] <= place[1]
            for other in taken
        ):
            return place
    return places[0] if places else (left, 0, left + wide, tall)


def stack_pictures(*pictures: Image.Image) -> Image.Image:
    """The pictures under each other, centred on white."""
    width = max(picture.width for picture in pictures)
    canvas = Image.new("RGB", (width, sum(picture.height for picture in pictures)), _WHITE)
    top = 0
    for picture in pictures:
        canvas.paste(picture, ((width - picture.width) // 2, top))
        top += picture.height
    return canvas


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A picture as the bytes of a file; `kind` and `options` are those of Pillow's save.

    >>> encoded(picture, "JPEG", quality=85)
    """
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def data_uri(picture: Image.Image, kind: str = "PNG", **options: Any) -> str:
    """A picture as an address that holds it, for HTML; arguments are those of `encoded`.

    >>> data_uri(picture)
    'data:image/png;base64,...'
    """
    content = base64.b64encode(encoded(picture, kind, **options)).decode()
    return f"data:image/{kind.lower()};base64,{content}"


def percent(share: float) -> str:
    """A share as people write it; never 100% or 0% for what only comes close."""
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{100 * share:.1f}%"


# How large things are


def _layout(size: tuple[int, int]) -> tuple[tuple[int, int], int, int]:
    """Size of a panel, panels in a row, and width of the picture between its margins."""
    width, height = size
    scale = min(_PANEL_SIDE / math.sqrt(width * height), _LONGEST_SIDE / max(width, height))
    if scale >= 3:
        scale = math.floor(scale)  # whole steps keep every pixel of a tiny photo the same size
    panel = (max(1, round(width * scale)), max(1, round(height * scale)))
    columns = 1 if width / height > _WIDE else 2 if width > height else 4
    return panel, columns, max(_LEAST_WIDTH, columns * panel[0] + (columns - 1) * _GAP)


def _zoom(width: int) -> float:
    """Of the text: a wide picture will be shown smaller, and is to stay readable."""
    return min(1.4, max(1.0, width / 1500))


def _resize(photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    if size[0] >= 3 * photo.width:  # a tiny photo shows its pixels instead of a blur
        return photo.resize(size, Image.Resampling.NEAREST)
    return photo.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _mute(photo: Image.Image, *, colour: float, light: float) -> Image.Image:
    """The photo with less colour and less light, so that what is drawn on it stands out."""
    grey = photo.convert("L").convert("RGB")
    quiet = Image.blend(grey, photo, colour)
    return Image.blend(Image.new("RGB", photo.size), quiet, light)


# Points


def _points_panel(subject: Subject, size: tuple[int, int]) -> tuple[Image.Image, str]:
    """The photo under its points, and how many they are, in words."""
    photo = subject.image.convert("RGB")
    dots = _dots(subject.points_y, subject.points_x, subject.strength, photo.size, size)
    drawn = len(dots)
    text = f"the {drawn:,} strongest pixels" if drawn > 1 else "the strongest pixel"
    if not drawn:
        text = "no points: nothing speaks for it"
    muted = _mute(_resize(photo, size), colour=0.3, light=0.6)
    return _paint_dots(muted, dots, _dot_radius(size, drawn)), text


def _dots(
    points_y: np.ndarray,
    points_x: np.ndarray,
    strength: np.ndarray,
    photo_size: tuple[int, int],
    size: tuple[int, int],
) -> np.ndarray:
    """Rows of (x, y, strength from 0 to 1), weakest first."""
    y, x, s = (np.asarray(a, dtype=np.float64).ravel() for a in (points_y, points_x, strength))
    usable = np.isfinite(y) & np.isfinite(x) & np.isfinite(s) & (s > 0)
    y, x, s = y[usable], x[usable], s[usable]
    order = np.argsort(-s, kind="stable")[::-1]
    y, x, s = y[order], x[order], s[order]
    # The top 2% count as equally strong: a single outlier would turn all others to dust.
    relative = np.minimum(1, s / np.quantile(s, 0.98)) if len(s) else s
    across, down = (x + 0.5) * size[0] / photo_size[0], (y + 0.5) * size[1] / photo_size[1]
    return np.stack([across, down, relative], axis=1)


def _dot_radius(size: tuple[int, int], count: int) -> float:
    """Of the strongest point: large when there are few, small enough to see between many."""
    side = math.sqrt(size[0] * size[1])
    return side * min(0.016, max(0.005, 0.06 / math.pow(max(count, 1), 0.33)))


def _paint_dots(picture: Image.Image, dots: np.ndarray, radius: float) -> Image.Image:
    def draw(axes: Any) -> None:
        rise = np.sqrt(dots[:, 2])
        colours = _shade(0.35 + 0.65 * rise)
        colours[:, 3] = 0.5 + 0.5 * rise
        edges = np.zeros_like(colours)
        edges[:, 3] = 0.6 * rise  # a dark rim sets the strong ones off from their neighbours
        diameter = 2 * radius * (0.25 + 0.75 * rise)
        axes.scatter(
            dots[:, 0], dots[:, 1], s=diameter**2, c=colours, edgecolors=edges, linewidths=0.6
        )

    return _with_axes(picture, draw) if len(dots) else picture


def _tile(photo: Image.Image, layer: LayerView, photo_size: tuple[int, int]) -> Image.Image:
    """The photo under the map of one layer, with its top nodes marked."""
    wide, high = photo.width / photo_size[0], photo.height / photo_size[1]
    left, top, right, bottom = layer.box
    box = (round(left * wide), round(top * high), round(right * wide), round(bottom * high))
    picture = paint_map(photo, layer.map, box, cells=True)
    dots = _dots(layer.points_y, layer.points_x, layer.strength, photo_size, photo.size)
    rows, columns = layer.places
    if not len(dots) or rows * columns == 1:  # the one node of a class is nowhere in particular
        return picture
    cell = min((box[2] - box[0]) / columns, (box[3] - box[1]) / rows)
    diameter = min(9.0, max(3.0, cell * 0.3))  # smaller than a cell, which is to stay visible

    def draw(axes: Any) -> None:
        top = dots[-60:]  # a tile is small; more would hide the map
        axes.scatter(
            top[:, 0],
            top[:, 1],
            s=diameter**2,
            c="white",
            edgecolors=[(0, 0, 0, 0.75)],
            linewidths=0.1 * diameter,
        )

    return _with_axes(picture, draw)


def _with_axes(picture: Image.Image, draw: Callable[[Any], None]) -> Image.Image:
    """The picture after `draw` has drawn on it, in axes whose unit is a pixel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (half a second)
    from matplotlib.figure import Figure  # noqa: PLC0415

    width, height = picture.size
    # At 72 dots an inch, a point is a pixel. The sliver keeps int() from losing a pixel.
    figure = Figure(figsize=((width + 0.01) / 72, (height + 0.01) / 72), dpi=72)
    canvas: Any = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(
        np.asarray(picture), extent=(0, width, height, 0), interpolation="nearest", aspect="auto"
    )
    draw(axes)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


# Maps


def paint_map(
    photo: Image.Image,
    values: np.ndarray,
    box: tuple[int, int, int, int] | None = None,
    *,
    cells: bool = False,
) -> Image.Image:
    """The photo under the map: where the map is weak, the photo shows through."""
    field = np.nan_to_num(np.asarray(values, dtype=np.float32), nan=0.0, posinf=1.0, neginf=0.0)
    if field.ndim != 2 or not field.size:
        raise InputError(f"A map has rows and columns; this one has the shape {field.shape}.")
    how = Image.Resampling.NEAREST if cells else Image.Resampling.BILINEAR
    left, top, right, bottom = box or (0, 0, *photo.size)
    size = (max(1, right - left), max(1, bottom - top))
    scaled = Image.new("F", photo.size)
    scaled.paste(Image.fromarray(field).resize(size, how), (left, top))
    # A map of one cell says nothing about where, so it only tints.
    strongest = 0.25 if field.size == 1 else 0.7
    step = np.arange(256) / 255
    opacity = np.rint(255 * strongest * step**0.7).astype(int).tolist()
    painted = Image.new("RGB", photo.size)
    rows = max(1, _STRIP // photo.width)
    for row in range(0, photo.height, rows):
        strip = (0, row, photo.width, min(row + rows, photo.height))
        level = np.rint(255 * np.clip(np.asarray(scaled.crop(strip)), 0, 1)).astype(np.uint8)
        colour = Image.fromarray(level)
        mask = colour.point(opacity)
        colour.putpalette(shades(step).tobytes())
        base = _mute(photo.crop(strip), colour=0.35, light=0.8)
        painted.paste(Image.composite(colour.convert("RGB"), base, mask), strip[:2])
    return painted


def shades(level: np.ndarray) -> np.ndarray:
    """The colours [..., 3] of levels from 0 (weak) to 1 (strong), as whole numbers up to 255.

    >>> shades(np.ones(1))
    array([[247, 209,  61]], dtype=uint8)
    """
    found: np.ndarray = np.rint(_shade(level)[..., :3] * 255).astype(np.uint8)
    return found


def _shade(level: np.ndarray) -> np.ndarray:
    """RGBA of levels from 0 (weak) to 1 (strong)."""
    from matplotlib import colormaps  # noqa: PLC0415 (slow)

    # Without its ends: black gets lost in a photo, and pale yellow over a dark one looks green.
    return np.asarray(colormaps[_COLORMAP](0.15 + 0.74 * level), dtype=np.float64)


# Words


@lru_cache(maxsize=8)
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    # The font that comes with matplotlib, so that pictures look the same on every machine.
    from matplotlib import get_data_path  # noqa: PLC0415 (slow)

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{name}", size)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text on one line, cut with an ellipsis where it would be wider than `width`."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1].rstrip()
    return text + "…"


def _write_title(
    pen: ImageDraw.ImageDraw, label: str, probability: float | None, width: int
) -> None:
    size = round(30 * _zoom(width))
    bold, light = _font(size, bold=True), _font(size)
    number = ""
    if probability is not None and math.isfinite(probability):
        number = percent(probability)
    gap = round(size * 0.6)
    label = _fit(label, bold, width - light.getlength(number) - gap)
    top = _MARGIN - size // 6
    pen.text((_MARGIN, top), label, font=bold, fill=_INK)
    pen.text((_MARGIN + bold.getlength(label) + gap, top), number, font=light, fill=_MUTED)


def _key(font: ImageFont.FreeTypeFont) -> Image.Image:
    """What the colours mean: from weak to strong."""
    size = round(font.size)
    bar_width, gap = 7 * size, size // 2
    first, last = (math.ceil(font.getlength(word)) for word in ("weak", "strong"))
    key = Image.new("RGB", (first + last + bar_width + 2 * gap, 2 * size), _WHITE)
    pen = ImageDraw.Draw(key)
    pen.text((0, 0), "weak", font=font, fill=_MUTED)
    ramp = shades(np.linspace(0, 1, bar_width))[None]
    bar = Image.fromarray(np.repeat(ramp, round(size * 0.6), axis=0))
    key.paste(bar, (first + gap, round(size * 0.32)))
    pen.text((first + bar_width + 2 * gap, 0), "strong", font=font, fill=_MUTED)
    return key
