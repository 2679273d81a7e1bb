from __future__ import annotations

import io
import itertools
import json
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models, transforms

from howyouseeme.errors import ImageError, InputError
from howyouseeme.images import Geometry, Preprocess, load_image, sample_photo

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int = 48, width: int = 64) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def pixel(source: object, at: tuple[int, int] = (0, 0), **options: int) -> tuple[int, ...]:
    image = load_image(source, **options)
    assert image.mode == "RGB"
    return image.getpixel(at)


# --- where a picture may come from


def test_every_source_of_the_same_file_gives_the_same_picture(tmp_path: Path) -> None:
    image = noise()
    path = tmp_path / "noise.png"
    image.save(path)
    data = path.read_bytes()
    prefixed = io.BytesIO(b"skipped" + data)
    prefixed.seek(len(b"skipped"))
    with path.open("rb") as file:
        for source in (path, str(path), data, file, prefixed, image):
            assert load_image(source).tobytes() == image.tobytes()


def test_an_opened_picture_is_neither_changed_nor_shared() -> None:
    image = noise()
    loaded = load_image(image)
    loaded.putpixel((0, 0), RED)
    assert image.getpixel((0, 0)) != RED


# --- what a file may hold


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), WHITE)
    upright.paste(RED, (0, 0, 8, 8))
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(back[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert load_image(encoded(stored, "PNG", exif=exif)).tobytes() == upright.tobytes()


def test_a_photo_with_unreadable_exif_is_still_a_photo() -> None:
    image = noise()
    data = encoded(image, "PNG", exif=b"Exif\0\0II*\0\xff")
    with pytest.warns(UserWarning, match="The given data has damaged EXIF data"):
        assert load_image(data).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("mode", "clear", "half"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 0, 0, 51)),
        ("RGBa", (0, 0, 0, 0), (51, 0, 0, 51)),
        ("LA", (0, 0), (0, 51)),
        ("La", (0, 0), (0, 51)),
    ],
)
def test_transparency_lies_over_white(
    mode: str, clear: tuple[int, ...], half: tuple[int, ...]
) -> None:
    image = Image.new(mode, (2, 1), clear)
    image.putpixel((1, 0), half)
    assert pixel(image) == WHITE
    mixed = pixel(image, (1, 0))
    assert mixed[1] == 204  # a fifth of black (green of red) over white
    assert mixed[0] == (255 if mode.startswith("RGB") else 204)


def test_palettes_and_transparent_palettes() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    plain, cut = encoded(image, "PNG"), encoded(image, "PNG", transparency=0)
    assert pixel(plain) == RED
    assert pixel(cut) == WHITE
    assert pixel(cut, (1, 0)) == pixel(plain, (1, 0)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_a_transparent_colour_lies_over_white(mode: str) -> None:
    black = (0, 0, 0) if mode == "RGB" else 0
    data = encoded(Image.new(mode, (2, 2), black), "PNG", transparency=black)
    assert pixel(data) == WHITE


def test_one_bit_and_grey_and_cmyk() -> None:
    checker = Image.new("1", (2, 1))
    checker.putpixel((1, 0), 1)
    assert [pixel(encoded(checker, "PNG"), (x, 0)) for x in (0, 1)] == [(0, 0, 0), WHITE]
    assert pixel(encoded(Image.new("L", (2, 2), 77), "PNG")) == (77, 77, 77)
    red, green, blue = pixel(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert red > 250
    assert max(green, blue) < 5


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind: str) -> None:
    deep = np.array([[0, 128, 129, 32896, 65407, 65535]], np.uint16)
    data = b"P5 6 1 65535\n" + deep.astype(">u2").tobytes()
    image = load_image(data if kind == "PPM" else encoded(Image.fromarray(deep), kind))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 128, 255, 255]


def test_the_transparent_level_of_sixteen_bits() -> None:
    deep = Image.fromarray(np.array([[5000, 65535 // 5]], np.uint16))
    data = encoded(deep, "PNG")
    level = b"tRNS" + struct.pack(">H", 5000)  # as a chunk, behind the header
    data = data[:33] + struct.pack(">I4sHI", 2, b"tRNS", 5000, zlib.crc32(level)) + data[33:]
    assert [pixel(data, (x, 0)) for x in (0, 1)] == [WHITE, (51, 51, 51)]


def test_floating_point_pictures() -> None:
    image = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert np.asarray(load_image(encoded(image, "TIFF")))[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(ImageError, match=r"0 to 255; scale them"):
        load_image(encoded(Image.fromarray(np.array([[0, 255]], np.float32)), "TIFF"))


def test_integers_without_a_known_white_are_refused() -> None:
    with pytest.raises(ImageError, match="32-bit integers"):
        load_image(encoded(Image.fromarray(np.array([[0, 255]], np.int32)), "TIFF"))


def tiff(samples: np.ndarray, bits: int, kind: int, meaning: int, extra: Sequence[int]) -> bytes:
    """A TIFF of one row of pixels [width, samples], in kinds that Pillow doesn't write."""
    width, count = samples.shape
    tags: dict[int, Sequence[int]] = {256: [width], 257: [1], 258: [bits] * count, 262: [meaning]}
    tags |= {273: [8], 277: [count], 278: [1], 279: [samples.nbytes]}
    tags |= {338: extra, 339: [kind] * count} if extra else {339: [kind] * count}
    data, entries = samples.tobytes(), b""
    for tag, values in tags.items():
        packed = struct.pack(f"<{len(values)}H", *values)
        at = struct.pack("<I", 8 + len(data)) if len(packed) > 4 else packed.ljust(4, b"\0")
        data += packed if len(packed) > 4 else b""
        entries += struct.pack("<HHI", tag, 3, len(values)) + at
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("deep", [np.uint16([0, 13107, 65535]), np.float32([0, 0.2, 1])])
def test_a_tiff_may_have_its_white_at_zero(deep: np.ndarray) -> None:
    data = encoded(Image.fromarray(deep[None]), "TIFF", tiffinfo={262: 0})
    assert Image.open(io.BytesIO(data)).tag_v2[262] == 0
    assert np.asarray(load_image(data))[0, :, 0].tolist() == [255, 204, 0]


def test_signed_integers_are_named() -> None:
    levels = np.array([[-1000], [3000]], np.int16)
    with pytest.raises(ImageError, match="signed 16-bit integers, whose black and white are not"):
        load_image(tiff(levels, 16, 2, 1, []))


def test_more_bands_than_a_picture_has() -> None:
    levels = np.arange(20, dtype=np.uint8).reshape(4, 5)
    data = tiff(levels, 8, 1, 2, [0, 0])
    for source in (data, Image.open(io.BytesIO(data))):
        with pytest.raises(
            ImageError, match=r"has 5 bands, and a picture at most 4: give .* tensor"
        ):
            load_image(source)
    assert load_image(tiff(levels, 8, 1, 5, [0])).size == (4, 1)  # CMYK and another


def test_of_several_pages_the_first_is_taken() -> None:
    pages = [Image.new("L", (8, 8), level) for level in (50, 100, 150)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    with pytest.warns(UserWarning, match="The given data has 3 pages, of which the first is taken"):
        assert pixel(data) == (50, 50, 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = Image.open(io.BytesIO(data))
        opened.seek(1)
        assert pixel(opened) == (100, 100, 100)  # which somebody has chosen
        copies = {"append_images": pages[1:], "tiffinfo": {254: 1}}  # thumbnails say so
        data = encoded(pages[0], "TIFF", save_all=True, **copies)
        assert Image.open(io.BytesIO(data)).n_frames == 3
        assert pixel(data) == (50, 50, 50)


def test_the_first_page_is_whole_though_the_next_is_not() -> None:
    page = Image.new("L", (8, 8), 50)
    data = encoded(page, "TIFF", save_all=True, append_images=[page])
    for end in range(len(data) - 150, len(data)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert pixel(data[:end]) == (50, 50, 50)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert pixel(data) == RED


# --- files that hold no picture


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no file .*gone\.png"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="can't be opened"):
        load_image("bad\0name.png")
    with pytest.raises(ImageError, match="can't be opened"):
        load_image(f"{'long' * 80}.png")
    with pytest.raises(ImageError, match=r"https://x\.org/cat\.jpg is an address: download it"):
        load_image("https://x.org/cat.jpg")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    for path in (Path("/dev/zero"), tmp_path / "x.jpg"):
        with pytest.raises(ImageError, match="is a pipe or a device; save what"):
            load_image(path)


def test_empty_files(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(ImageError, match=r"empty\.png is empty"):
        load_image(path)
    with pytest.raises(ImageError, match="The given data is empty"):
        load_image(b"")


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_text("Not a picture.")
    with pytest.raises(ImageError, match=r"notes\.jpg is not a picture"):
        load_image(path)
    with path.open() as text, pytest.raises(ImageError, match=r"notes\.jpg is open in text mode"):
        load_image(text)
    path = path.replace(tmp_path / "walk.MP4")
    with pytest.raises(ImageError, match=r"explained by `howyouseeme watch`"):
        load_image(path)


def test_twelve_bits_are_scaled_too() -> None:
    packed = np.array([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x00], np.uint8)  # 0, 4095, 2048, 0
    data = tiff(packed[:, None], 8, 1, 1, [])
    for tag, before, after in ((256, 6, 4), (258, 8, 12)):  # width, bits
        data = data.replace(
            struct.pack("<HHIHH", tag, 3, 1, before, 0), struct.pack("<HHIHH", tag, 3, 1, after, 0)
        )
    assert np.asarray(load_image(data))[0, :, 0].tolist() == [0, 255, 128, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_files_cut_short(tmp_path: Path, kind: str, share: float) -> None:
    data = encoded(noise(), kind)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=r"cut\.img is damaged or cut short \("):
        load_image(path)


def test_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("1", (100, 100)), "PNG")
    with pytest.raises(ImageError, match=r"100 x 100 .* limit of 9999.*--max-pixels"):
        load_image(data, max_pixels=9999)
    assert load_image(data, max_pixels=10_000).size == (100, 100)
    # Pillow alone would only warn about the first of these limits.
    for limit in (9999, 100):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ImageError, match=f"the limit of {limit}"):
            load_image(data)
        assert load_image(data, max_pixels=10_000).size == (100, 100)
        assert limit == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(data).size == (100, 100)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    header = bytearray(encoded(Image.new("1", (8, 8)), "BMP"))
    header[18:26] = (60_000).to_bytes(4, "little") * 2
    with pytest.raises(ImageError, match="60000 x 60000 pixels, more than the limit"):
        load_image(bytes(header))


def test_pillows_limit_survives_many_threads() -> None:
    before = Image.MAX_IMAGE_PIXELS
    data = encoded(noise(), "PNG")
    threads = [
        threading.Thread(target=lambda: [load_image(data) for _ in range(20)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == Image.MAX_IMAGE_PIXELS


# --- arrays and tensors


def test_arrays_of_every_shape() -> None:
    rgb = np.asarray(noise())
    grey = rgb[:, :, 0]
    assert np.array_equal(load_image(rgb), rgb)
    assert np.array_equal(load_image(np.moveaxis(rgb, 2, 0)), rgb)
    for array in (grey, grey[:, :, None]):
        assert np.array_equal(load_image(array), np.repeat(grey[:, :, None], 3, axis=2))
    clear = np.dstack([rgb, np.zeros_like(grey)])
    assert pixel(clear) == WHITE
    assert np.array_equal(load_image(rgb[::-1, ::-2]), rgb[::-1, ::-2])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_arrays(dtype: type) -> None:
    array = np.array([[0, 0.2, 0.5, 1]], dtype)
    assert np.asarray(load_image(array))[0, :, 0].tolist() == [0, 51, 128, 255]


def test_rounding_errors_at_the_ends_are_forgiven() -> None:
    assert pixel(np.full((2, 2), 1 + 1e-6)) == WHITE
    assert pixel(np.full((2, 2), -1e-6)) == (0, 0, 0)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_arrays(order: str) -> None:
    array = np.array([[[0, 257, 65535]]], order)
    assert pixel(array) == (0, 1, 255)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((2, 2), np.nan), "NaN or infinity"),
        (np.full((2, 2), np.inf), "NaN or infinity"),
        (np.full((2, 2), 1.1), "from 1.1 to 1.1; scale them"),
        (np.full((2, 2), -0.1), "from -0.1 to -0.1"),
        (np.zeros((2, 2), np.int64), "is of int64"),
        (np.zeros((2, 2), bool), "is of bool"),
        (np.zeros((2, 2), complex), "is of complex128"),
        (np.zeros(4, np.uint8), r"shape \(4,\) is not one picture"),
        (np.zeros((1, 4, 4, 3), np.uint8), "is not one picture"),
        (np.zeros((4, 4, 2), np.uint8), "is not one picture"),
        (np.zeros((1, 8, 8), np.uint8), "is not one picture"),
        (np.zeros((3, 8, 3), np.uint8), "first or last"),
        (np.zeros((3, 8, 4), np.uint8), "first or last"),
        (np.zeros((3, 8, 1), np.uint8), "first or last"),
        (np.zeros((0, 4, 3), np.uint8), "has no pixels"),
        (np.zeros((0, 4)), "has no pixels"),
    ],
)
def test_arrays_that_are_no_pictures(array: np.ndarray, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(array)


def test_tensors() -> None:
    rgb = np.asarray(noise())
    levels = torch.from_numpy(rgb.copy()).permute(2, 0, 1)
    for tensor in (levels, levels / 255, (levels.double() / 255).requires_grad_()):
        assert np.array_equal(load_image(tensor), rgb)
    assert np.array_equal(np.asarray(load_image(levels[:1]))[..., 2], rgb[..., 0])
    assert pixel(torch.full((1, 2, 2), 0.2, dtype=torch.bfloat16)) == (51, 51, 51)
    assert load_image(torch.zeros(3, 3, 3)).size == (3, 3)  # a tensor's channels are first


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1, 3, 8, 8), r"\(1, 3, 8, 8\) is not one picture"),
        (torch.zeros(8, 8, 3), "is not one picture"),
        (torch.zeros(8, 8), "is not one picture"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r"torch\.int64 is not a picture"),
        (torch.zeros(3, 8, 8, dtype=torch.bool), r"torch\.bool is not a picture"),
        (torch.full((3, 8, 8), torch.nan), "NaN or infinity"),
        (torch.full((3, 8, 8), 2.0), "from 2 to 2"),
        (torch.zeros(3, 0, 8), "has no pixels"),
    ],
)
def test_tensors_that_are_no_pictures(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(tensor)


def test_other_things_that_are_no_pictures() -> None:
    with pytest.raises(ImageError, match="A list is not a picture"):
        load_image([[0, 1], [1, 0]])
    with pytest.raises(ImageError, match=r"no pixels \(0 x 5\)"):
        load_image(Image.new("RGB", (0, 5)))


# --- preprocessing


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "crop", "resize"),
    [
        ((300, 451), 224, 256),  # (height, width) of the picture
        ((451, 300), 224, 232),
        ((100, 133), 224, 256),  # enlarged
        ((97, 301), 288, 200),  # padded above and below
        ((301, 97), 299, 200),  # padded left and right, by an odd number
        ((256, 256), 224, 256),
    ],
)
def test_the_crop_is_torchvisions(
    size: tuple[int, int], crop: int, resize: int, interpolation: str
) -> None:
    presets = pytest.importorskip("torchvision.transforms._presets")
    modes = pytest.importorskip("torchvision.transforms").InterpolationMode
    image = load_image(sample_photo("cat")).resize((size[1], size[0]))
    theirs = presets.ImageClassification(
        crop_size=crop, resize_size=resize, interpolation=modes(interpolation)
    )(image)
    ours, geometry = Preprocess(
        (crop, crop),
        "crop",
        resize,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation=interpolation,
    )(image)
    assert ours.shape == theirs.shape == (3, crop, crop)
    assert ours.dtype == torch.float32
    # Pillow may run its two passes, and so round, in another order; a shift by a pixel would
    # change this photo by several levels on average.
    levels = (ours - theirs).abs() * 255 * 0.229
    assert levels.max() < 2.1
    assert levels.mean() < 0.2
    assert geometry.image_size == size


def test_squash_and_the_order_of_the_arithmetic() -> None:
    image = Image.new("RGB", (30, 20), (255, 127, 0))
    tensor, geometry = Preprocess((10, 40), mean=(127,) * 3, std=(128,) * 3, scale=1.0)(image)
    assert tensor[:, 5, 5].tolist() == [1.0, 0.0, -127 / 128]
    assert geometry == Geometry((20, 30), (10, 40), (2.0, 0.75), (0.0, 0.0))
    tensor, _ = Preprocess((4, 4), mean=(1, 2, 3), std=(1, 2, 4), scale=1.0, channels="bgr")(image)
    assert tensor[:, 0, 0].tolist() == [-1.0, 62.5, 63.0]
    assert tensor.is_contiguous()


def test_a_very_long_picture_needs_no_long_memory() -> None:
    tensor, _ = Preprocess((224, 224), "crop", 256)(Image.new("RGB", (200_000, 1), RED))
    assert tensor[0].min() == 1


def test_only_rgb_is_taken() -> None:
    with pytest.raises(ImageError, match="mode is L, not RGB; use load_image"):
        Preprocess((4, 4))(Image.new("L", (4, 4)))


def test_one_channel() -> None:
    preprocess = Preprocess((8, 12), mean=(0.5,), std=(0.25,), channels="grey")
    tensor, _ = preprocess(Image.new("RGB", (24, 16), (51, 51, 51)))
    assert tensor.shape == (1, 8, 12)
    assert tensor.unique().tolist() == pytest.approx([(0.2 - 0.5) / 0.25])
    grey = noise(8, 12).convert("L").convert("RGB")
    assert preprocess.undo(preprocess(grey)[0]).tobytes() == grey.tobytes()
    with pytest.raises(InputError, match=r"\(3, 8, 12\) is not \[1, h, w\]"):
        preprocess.undo(torch.zeros(3, 8, 12))


def test_one_grey_in_three_channels() -> None:
    single, three = (Preprocess((8, 12), channels=channels) for channels in ("grey", "grey3"))
    picture = noise(8, 12)
    made = three(picture)[0]
    assert torch.equal(made, single(picture)[0].expand(3, -1, -1))
    assert three.undo(made).tobytes() == picture.convert("L").convert("RGB").tobytes()


def test_one_number_stands_for_all_channels() -> None:
    one = Preprocess((4, 4), mean=(0.5,), std=(0.2,))
    assert one == Preprocess((4, 4), mean=(0.5,) * 3, std=(0.2,) * 3)


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
def test_undo_gives_the_picture_back(channels: str) -> None:
    image = noise(8, 12)
    preprocess = Preprocess(
        (8, 12), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), scale=1 / 255, channels=channels
    )
    tensor, _ = preprocess(image)
    assert preprocess.undo(tensor.requires_grad_()).tobytes() == image.tobytes()
    assert preprocess.undo(tensor * 1000).getextrema() == ((0, 255),) * 3
    with pytest.raises(InputError, match=r"\(1, 3, 8, 12\) is not"):
        preprocess.undo(tensor[None])


def test_the_description_is_complete_and_fits_json() -> None:
    described = json.loads(json.dumps(Preprocess((224, 200), "crop", 256).describe()))
    assert described == {
        "size": [224, 200],
        "resize": "crop",
        "crop_from": 256,
        "mean": [0, 0, 0],
        "std": [1, 1, 1],
        "scale": 1 / 255,
        "channels": "rgb",
        "interpolation": "bilinear",
        "fill": 0,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize": "stretch"}, "resize can't be 'stretch'; choose from squash, crop, fit"),
        ({"channels": "hsv"}, "channels can't be"),
        ({"interpolation": "magic"}, "interpolation can't be"),
        ({"size": (0, 4)}, "from 1 up"),
        ({"size": 28}, r"\(height, width\), such as \(224, 224\), not 28"),
        ({"size": (3, 28, 28)}, r"not \(3, 28, 28\)"),
        ({"mean": 0.5}, r"mean has one number for all .* 3 for rgb, not 0\.5"),
        ({"std": (1.0, 1.0)}, r"std has .* not \(1\.0, 1\.0\)"),
        ({"mean": (0.0,) * 3, "channels": "grey"}, "mean has .* 1 for grey"),
        ({"resize": "crop", "crop_from": 0}, "from 1 up"),
        ({"resize": "crop"}, "needs crop_from"),
        ({"resize": "fit", "crop_from": 8}, "no meaning for it"),
        ({"fill": 256}, "0 to 255, not 256"),
        ({"fill": None}, "0 to 255, not None"),
        ({"fill": 114.5}, "0 to 255, not 114.5"),
        ({"std": (1, 0, 1)}, "can't be zero"),
        ({"scale": 0}, "can't be zero"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Preprocess(**{"size": (4, 4), **settings})


def test_a_picture_that_is_fitted_in() -> None:
    """As Ultralytics' LetterBox: in proportion, the rest shared by both sides, the odd pixel after."""
    picture = Image.new("RGB", (200, 101), (255, 255, 255))
    tensor, geometry = Preprocess((64, 64), "fit", fill=114)(picture)
    white = (tensor[0] > 0.99).nonzero()
    assert white.min(0).values.tolist() == [16, 0]  # 32 rows of 64
    assert white.max(0).values.tolist() == [47, 63]
    assert torch.allclose(tensor[:, :16], torch.tensor(114 / 255), atol=1e-6)
    assert geometry.box_to_image((0, 16, 64, 48)) == pytest.approx((0, 0, 200, 101))
    assert geometry.box_to_image((32, 0, 64, 64)) == pytest.approx((100, 0, 200, 101))
    kept = geometry.cut(torch.ones(64, 64))
    assert torch.equal(kept, (tensor[0] > 0.99).float())
    assert geometry.pads
    assert geometry.shows(np.array([[15, 9], [16, 9], [47, 0], [48, 0]])).tolist() == [
        *(False, True, True, False)
    ]
    assert not Preprocess((64, 64))(picture)[1].pads


# --- the way back


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess((64, 48)),
        Preprocess((48, 48), "crop", 60),
        Preprocess((80, 50), "crop", 64),  # padded along y
        Preprocess((500, 700), "crop", 800),  # enlarged
        Preprocess((160, 160), "fit"),  # padded along y
        Preprocess((200, 300), "fit"),  # padded along x
    ],
)
def test_a_dot_is_found_where_it_was_drawn(preprocess: Preprocess) -> None:
    height, width, at_y, at_x = 240, 320, 100, 180
    y, x = np.mgrid[:height, :width]
    dot = 255 * np.exp(-((y - at_y) ** 2 + (x - at_x) ** 2) / (2 * 12**2))
    tensor, geometry = preprocess(load_image(dot.astype(np.uint8)))
    map = tensor[0].numpy()
    total = map.sum()
    input_y = (map.sum(1) * np.arange(map.shape[0])).sum() / total
    input_x = (map.sum(0) * np.arange(map.shape[1])).sum() / total
    found_y, found_x = geometry.points_to_image(np.array([input_y]), np.array([input_x]))
    assert found_y == pytest.approx(at_y, abs=0.1)
    assert found_x == pytest.approx(at_x, abs=0.1)
    back = geometry.map_to_image(map)
    assert back.shape == (height, width)
    assert back.dtype == np.float32
    assert np.unravel_index(back.argmax(), back.shape) == pytest.approx((at_y, at_x), abs=4)


def test_points_are_centres_and_stay_inside() -> None:
    y, x = Geometry((20, 10), (10, 20), (2.0, 0.5), (0.0, 0.0)).points_to_image(
        np.array([0, 9]), np.array([0, 19])
    )
    assert y.tolist() == [0.5, 18.5]
    assert x.tolist() == [0.0, 9.0]  # -0.25 and 9.25 before they were clipped


def test_a_constant_map_is_constant_in_the_crop_and_zero_outside() -> None:
    _, geometry = Preprocess((50, 50), "crop", 100)(Image.new("RGB", (400, 200)))
    back = geometry.map_to_image(np.ones((50, 50)))
    expected = np.zeros((200, 400))
    expected[50:150, 150:250] = 1
    assert back == pytest.approx(expected, abs=1e-6)


def test_maps_are_averaged_where_the_picture_is_smaller() -> None:
    map = np.zeros((40, 40))
    map[::2] = 1  # stripes, which plain sampling would turn into all or nothing
    back = Geometry((10, 10), (40, 40), (0.25, 0.25), (0.0, 0.0)).map_to_image(map)
    assert back == pytest.approx(np.full((10, 10), 0.5), abs=0.1)


def test_maps_are_interpolated_where_the_picture_is_larger() -> None:
    back = Geometry((8, 1), (2, 1), (4.0, 1.0), (0.0, 0.0)).map_to_image(np.array([[0], [1]]))
    assert back[:, 0].tolist() == [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]


def test_identity() -> None:
    geometry = Geometry.identity((3, 5))
    map = np.arange(15, dtype=np.float32).reshape(3, 5)
    assert np.array_equal(geometry.map_to_image(map), map)
    y, x = geometry.points_to_image(np.array([2]), np.array([4]))
    assert (y.item(), x.item()) == (2, 4)
    with pytest.raises(InputError, match=r"map is \(5, 3\), but the model's input is \(3, 5\)"):
        geometry.map_to_image(map.T)


# --- the photos


@pytest.mark.parametrize(
    ("name", "size"), [("cat", (451, 300)), ("coffee", (600, 400)), ("rocket", (640, 427))]
)
def test_sample_photos(name: str, size: tuple[int, int]) -> None:
    path = sample_photo(name)
    assert load_image(path).size == size
    assert path.stat().st_size < 120_000


def test_unknown_sample_photo() -> None:
    assert sample_photo() == sample_photo("cat")
    with pytest.raises(InputError, match="'dog'; choose from cat, coffee, rocket"):
        sample_photo("dog")


def test_the_centre_of_a_squashed_picture() -> None:
    size = (60, 60)
    picture = load_image(sample_photo("cat"))
    larger, _ = Preprocess((80, 80))(picture)
    cut, geometry = Preprocess(size, resize="squash", crop_from=80)(picture)
    # Pillow resizes only the part that is cut, which may differ by a level.
    assert (cut - larger[:, 10:70, 10:70]).abs().max() < 2 / 255
    y, x = geometry.points_to_image(np.array([0, 59]), np.array([0, 59]))
    assert np.allclose(y, (np.array([10, 69]) + 0.5) * picture.height / 80 - 0.5)
    assert np.allclose(x, (np.array([10, 69]) + 0.5) * picture.width / 80 - 0.5)


# --- inputs in another range than the model's

TO_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
TO_LEVELS = {"scale": 1.0, "mean": (127.0,), "std": (128.0,)}
TO_CAFFE = {"scale": 1.0, "mean": (104.0, 117.0, 124.0), "channels": "bgr"}
TO_PLAIN = {"scale": 1 / 255}
TO_WHITE = {"scale": 1.0}


def photos() -> torch.Tensor:
    """Three photos as [3, 3, 64, 64] in 0..1."""
    plain = Preprocess((64, 64))
    return torch.stack(
        [plain(load_image(sample_photo(name)))[0] for name in ("cat", "coffee", "rocket")]
    )


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        (TO_IMAGENET, 1),
        (TO_IMAGENET, 255),
        (TO_LEVELS, 1),
        (TO_LEVELS, 255),
        (TO_CAFFE, 1),
        (TO_PLAIN, 255),
        (TO_WHITE, 1),
    ],
)
def test_unnormalised_inputs_are_told(settings: dict, factor: int) -> None:
    preprocess = Preprocess((64, 64), **settings)
    inputs = photos() * factor
    told = preprocess.misfit(inputs)
    assert told is not None
    assert told.startswith(f"go from {inputs.min():.3g} to {inputs.max():.3g}, and ")


@pytest.mark.parametrize("settings", [TO_IMAGENET, TO_LEVELS, TO_CAFFE, TO_PLAIN, TO_WHITE])
def test_normalised_inputs_are_not(settings: dict) -> None:
    preprocess = Preprocess((64, 64), **settings)
    for name in ("cat", "coffee", "rocket"):
        photo = load_image(sample_photo(name))
        assert preprocess.misfit(preprocess(photo)[0][None]) is None
        dark, bright = photo.point(lambda v: v // 30), photo.point(lambda v: 160 + v // 12)
        for picture in (dark, bright):  # 0..8 and 160..181
            assert preprocess.misfit(preprocess(picture)[0][None]) is None
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    middle = (
        torch.tensor(preprocess.mean)[:, None, None] / torch.tensor(preprocess.std)[:, None, None]
    )
    spread = 64 * preprocess.scale / torch.tensor(preprocess.std)[:, None, None]
    assert (
        preprocess.misfit(noise * spread + 127 * preprocess.scale / preprocess.std[0] - middle)
        is None
    )
    assert preprocess.misfit(torch.zeros(1, 3, 8, 8)) is None


# -- preprocessing, measured


def steps(*before: Any, after: Sequence[Any] = ()) -> Any:
    norm = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return transforms.Compose([*before, transforms.ToTensor(), *after, norm])


BICUBIC = transforms.InterpolationMode.BICUBIC
LIKE = {
    "squash": (steps(transforms.Resize((48, 64))), ((48, 64), "squash", None, "bilinear")),
    "bicubic": (steps(transforms.Resize((48, 64), BICUBIC)), ((48, 64), "squash", None, "bicubic")),
    "crop": (
        steps(transforms.Resize(256), transforms.CenterCrop(224)),
        ((224, 224), "crop", 256, "bilinear"),
    ),
    "crop of a tensor": (
        steps(after=[transforms.Resize(73), transforms.CenterCrop((64, 48))]),
        ((64, 48), "crop", 73, "bilinear"),
    ),
    "crop of a square": (
        steps(transforms.Resize((300, 300)), transforms.CenterCrop(256)),
        ((256, 256), "squash", 300, "bilinear"),
    ),
    "larger than pictures": (
        steps(transforms.Resize((400, 500))),
        ((400, 500), "squash", None, "bilinear"),
    ),
}


@pytest.mark.parametrize("name", LIKE)
def test_a_function_is_measured(name: str) -> None:
    prepare, (size, resize, crop_from, interpolation) = LIKE[name]
    found = Preprocess.like(prepare)
    assert (found.size, found.resize, found.crop_from) == (size, resize, crop_from)
    assert (found.interpolation, found.channels) == (interpolation, "rgb")
    picture = load_image(sample_photo("coffee"))
    levels = (found(picture)[0] - prepare(picture)).abs() * 255 * 0.225
    assert float(levels.mean()) < 1


def test_a_function_is_measured_whatever_the_default_device_is() -> None:
    prepare = steps(transforms.Resize((32, 32)))
    usual = Preprocess.like(prepare)
    with torch.device("meta"):
        assert Preprocess.like(prepare) == usual


def test_swapped_channels_are_measured() -> None:
    prepare = steps(transforms.Resize((32, 32)))
    found = Preprocess.like(lambda picture: prepare(picture).flip(0) * 3)
    assert found.channels == "bgr"
    picture = load_image(sample_photo("coffee"))
    torch.testing.assert_close(found(picture)[0], prepare(picture).flip(0) * 3, rtol=0, atol=0.2)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("crop", [(), (transforms.CenterCrop((48, 64)),)])
def test_greys_are_measured(crop: tuple[Any, ...], count: Any) -> None:
    size = 72 if crop else (48, 64)
    prepare = transforms.Compose(
        [
            *(transforms.Grayscale(count), transforms.Resize(size), *crop, transforms.ToTensor()),
            transforms.Normalize((0.4, 0.5, 0.6)[:count], (0.2, 0.3, 0.4)[:count]),
        ]
    )
    found = Preprocess.like(prepare)
    assert (found.size, found.channels) == ((48, 64), "grey" if count == 1 else "grey3")
    assert (found.resize, found.crop_from) == (("crop", 72) if crop else ("squash", None))
    picture = load_image(sample_photo("coffee"))
    levels = (found(picture)[0] - prepare(picture)).abs() * 255 * 0.2
    assert float(levels.mean()) < 1


@pytest.mark.parametrize(
    "prepare",
    [
        steps(transforms.RandomHorizontalFlip(1.0), transforms.Resize((32, 32))),
        steps(transforms.CenterCrop(64)),  # the crop of larger pictures is a smaller part
        steps(transforms.Pad(30), transforms.Resize((32, 32))),
        steps(transforms.Resize((32, 32)), transforms.RandomInvert(1.0)),
        steps(transforms.GaussianBlur(9, 4.0), transforms.Resize((128, 128))),
        steps(after=[transforms.Resize((32, 32), antialias=False)]),
        *(
            steps(transforms.Resize((side, side)), transform)
            for side in (32, 96, 224)
            for transform in (
                transforms.GaussianBlur(3, 1.0),
                transforms.GaussianBlur(3, 0.5),
                transforms.RandomAdjustSharpness(2, 1.0),
            )
        ),
        *(
            steps(transforms.Resize((64, 64)), transforms.Resize((side, side)))
            for side in (32, 224)
        ),
        steps(transforms.Resize((64, 64), transforms.InterpolationMode.LANCZOS)),
        transforms.Compose([transforms.Grayscale(), transforms.ToTensor()]),
        lambda picture: transforms.functional.to_tensor(picture.resize((64, 48)).getchannel("R")),
        lambda picture: torch.zeros(3, 8, 8),
        lambda picture: torch.zeros(8),
    ],
)
def test_a_function_that_does_something_else_is_refused(prepare: Any) -> None:
    with pytest.raises(InputError, match=r"else than to resize, cut and .* are Resize\(\("):
        Preprocess.like(prepare)


_COUNTED = itertools.count()


@pytest.mark.parametrize(
    "transform",
    [
        transforms.RandomHorizontalFlip(0.1),
        transforms.RandomGrayscale(0.1),
        transforms.ColorJitter(0.05),
        lambda picture: picture.rotate(180 * (next(_COUNTED) > 8)),
    ],
)
def test_a_random_function_is_refused(transform: Any) -> None:
    """Also where what changes is seldom, or is drawn from a generator of its own."""
    torch.manual_seed(0)
    prepare = steps(transform, transforms.Resize((32, 32)))
    with pytest.raises(InputError, match="is random: it makes different tensors of the same"):
        Preprocess.like(prepare)


def test_what_draws_numbers_for_nothing_is_not_random() -> None:
    prepare = steps(transforms.RandomHorizontalFlip(0.0), transforms.Resize((32, 32)))
    assert Preprocess.like(prepare).size == (32, 32)


@pytest.mark.parametrize("side", [32, 96, 224])
@pytest.mark.parametrize("mode", [transforms.InterpolationMode.BILINEAR, BICUBIC])
@pytest.mark.parametrize("of_tensors", [True, False])
def test_resizings_are_told_apart_at_every_size(side: int, mode: Any, of_tensors: bool) -> None:
    resize = transforms.Resize((side, side), mode)
    found = Preprocess.like(steps(after=[resize]) if of_tensors else steps(resize))
    assert (found.size, found.interpolation) == ((side, side), mode.value)


def test_every_weight_of_torchvision_is_measured_as_it_says() -> None:
    for name in ("resnet50", "inception_v3", "efficientnet_b0", "swin_t", "regnet_y_16gf"):
        for weights in models.get_model_weights(name):
            preset = weights.transforms()
            found = Preprocess.like(preset)
            assert found.size == tuple(preset.crop_size * 2)
            assert found.crop_from == preset.resize_size[0]
            assert found.interpolation == preset.interpolation.value


def test_settings_are_plain_numbers_whatever_they_were_given_as() -> None:
    mean = tuple(np.array([0.5, 0.25, 0.125], np.float32))
    given = Preprocess(
        (np.int64(32), 24),
        "crop",
        35 / 0.875,
        mean,
        [2],
        torch.tensor(0.5),
        fill=np.uint8(7),  # type: ignore[arg-type]
    )
    plain = Preprocess((32, 24), "crop", 40, (0.5, 0.25, 0.125), (2.0, 2.0, 2.0), 0.5, fill=7)
    assert given == plain
    assert json.dumps(given.describe()) == json.dumps(plain.describe())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": (32.5, 32)}, "size is in whole pixels, and 32.5"),
        ({"size": ("32", 32)}, "size is in whole pixels, and '32'"),
        ({"size": (32, 32), "scale": None}, "scale is a number, not None"),
        ({"size": (32, True)}, "size is in whole pixels, and True"),
        ({"size": (32, 32), "crop_from": 40.5}, "crop_from is in whole pixels, and 40.5"),
        ({"size": (32, 32), "mean": ("a",)}, "mean has one number for all channels"),
        ({"size": (32, 32), "fill": True}, "fill is a level of grey"),
    ],
)
def test_what_is_no_setting(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Preprocess(**settings)
