"""Pictures from nearly anything, as 8-bit RGB."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Mapping
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from ..errors import ImageError, InputError
from ..files import VIDEOS, is_address

__all__ = ["Source", "load_image", "sample_photo"]

Source = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray | torch.Tensor

# Pillow's limit on pixels is a global, so only one thread at a time may lift it.
_OPENING = threading.Lock()

# Tags of a TIFF: what a page is, its bits, how they are meant, how many samples a pixel has, and their kind.
_PAGE, _BITS, _MEANING, _SAMPLES, _KIND = 254, 258, 262, 277, 339
_WHITE_IS_ZERO, _CMYK, _SIGNED, _SMALLER_COPY, _MASK = 0, 5, 2, 1, 4

# Nobody counts further, and a small file can have very many.
_MOST_PAGES = 1000


def load_image(source: Source, *, max_pixels: int | None = None) -> Image.Image:
    """A picture from nearly anything, as 8-bit RGB, the right way up.

    >>> image = load_image("cat.jpg")
    >>> image = load_image(np.zeros((480, 640, 3), np.uint8))
    >>> image = load_image(torch.rand(3, 224, 224))

    `source` is a path, the bytes of a file, a file opened in binary mode (read from where it
    stands), a PIL image, a numpy array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (also [3, H, W]
    where that can't be mistaken) of uint8, uint16 or floats in 0..1, or a tensor [3, H, W] or
    [1, H, W] of uint8 or floats in 0..1.

    EXIF orientation is applied, transparency is laid over white, 16-bit values are scaled to 8,
    and of an animation the first frame is taken (of an opened PIL image: the frame it stands at).
    Of a TIFF of several pages it is the first, with a warning.

    `max_pixels` is the most pixels that a file may hold; None: `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        ImageError: the source is missing, empty, damaged, too large, no picture, or an array of
            another shape, type or range.
    """
    match source:
        case Image.Image():
            return _upright_rgb(source, "the given image")
        case np.ndarray():
            return _from_channels_last(_channels_last(source))
        case torch.Tensor():
            return _from_channels_last(_tensor_channels_last(source))
        case bytes():
            return _decode(io.BytesIO(source), "the given data", max_pixels)
        case str() if is_address(source):
            raise ImageError(f"{source} is an address: download it first, and give the file.")
        case str() | os.PathLike():
            return _read_file(Path(source), max_pixels)
    if hasattr(source, "read"):
        return _read_stream(source, max_pixels)
    raise ImageError(
        f"A {type(source).__name__} is not a picture; give a path, bytes, a binary file, "
        "a PIL image, a numpy array or a tensor."
    )


def sample_photo(name: str = "cat") -> Path:
    """The path of a photo that comes with the package.

    >>> load_image(sample_photo("coffee"))

    Names: cat, coffee, rocket. Where they come from: `data/README.md` beside them.
    Raises:
        InputError: another name.
    """
    folder = Path(str(files("howyouseeme") / "data" / "photos"))
    photos = {path.stem: path for path in sorted(folder.glob("*.jpg"))}
    if name not in photos:
        raise InputError(f"There is no sample photo {name!r}; choose from {', '.join(photos)}.")
    return photos[name]


def _read_file(path: Path, max_pixels: int | None) -> Image.Image:
    if os.path.isdir(path):
        raise ImageError(f"{path} is a folder; name a picture in it.")
    if os.path.exists(path) and not os.path.isfile(path):  # which may never end, or never begin
        raise ImageError(f"{path} is a pipe or a device; save what comes from it as a file.")
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise ImageError(f"There is no file {path}; check its name and folder.") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{path} can't be opened ({error}); check its name and rights.") from error
    with file:
        return _decode(file, str(path), max_pixels)


def _read_stream(stream: BinaryIO, max_pixels: int | None) -> Image.Image:
    what = str(getattr(stream, "name", "the given file"))
    data = stream.read()
    if not isinstance(data, bytes):
        raise ImageError(f"{what} is open in text mode; open it with mode 'rb'.")
    return _decode(io.BytesIO(data), what, max_pixels)


def _decode(stream: BinaryIO, what: str, max_pixels: int | None) -> Image.Image:
    if not stream.read(1):
        raise ImageError(f"{_sentence(what)} is empty; give a file that holds a picture.")
    with _OPENING:
        # The limit is lifted while the header is read, and then applied here: Pillow would only
        # warn up to twice its limit, and has no limit for one call.
        pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(stream)
        except UnidentifiedImageError as error:
            advice = "convert it to JPEG or PNG"
            if Path(what).suffix.lower() in VIDEOS:
                advice = "a video's frames are explained by `howyouseeme watch`"
            raise ImageError(
                f"{_sentence(what)} is not a picture that can be read; {advice}."
            ) from error
        except Exception as error:  # a decoder may raise anything on a damaged file
            raise _damaged(what, error) from error
        finally:
            Image.MAX_IMAGE_PIXELS = pillow_limit
    limit = pillow_limit if max_pixels is None else max_pixels
    if limit is not None and image.width * image.height > limit:
        raise ImageError(
            f"{_sentence(what)} has {image.width} x {image.height} pixels, more than the limit of "
            f"{limit}; make it smaller, or raise the limit (max_pixels, --max-pixels) if you trust it."
        )
    pages = _pages(image)
    if pages > 1:
        more = " or more" if pages == _MOST_PAGES else ""
        warnings.warn(
            f"{_sentence(what)} has {pages}{more} pages, of which the first is taken; "
            "save another as a file of its own to have that one.",
            stacklevel=4,
        )
    return _upright_rgb(image, what)


def _pages(image: Image.Image) -> int:
    """How many pages a TIFF has, not counting those that say that they are smaller copies or masks of others."""
    if not isinstance(image, TiffImageFile):
        return 1
    pages = 0
    try:
        for page in islice(ImageSequence.Iterator(image), _MOST_PAGES):
            pages += not bool(_tags(page).get(_PAGE, 0) & (_SMALLER_COPY | _MASK))
    except Exception:  # as above: the first page may still be whole
        pass
    image.seek(0)
    return pages


def _tags(image: Image.Image) -> Mapping[int, Any]:
    """Those of a TIFF; none of anything else."""
    return image.tag_v2 if isinstance(image, TiffImageFile) else {}


def _upright_rgb(image: Image.Image, what: str) -> Image.Image:
    if 0 in image.size:
        raise ImageError(f"{_sentence(what)} has no pixels ({image.width} x {image.height}).")
    tags = _tags(image)
    bands = tags.get(_SAMPLES, 1)
    if bands > 4 and tags.get(_MEANING) != _CMYK:  # which may have spot colours beside
        raise ImageError(
            f"{_sentence(what)} has {bands} bands, and a picture at most 4: "
            "give the network's input as a tensor instead."
        )
    try:
        image.load()
    except Exception as error:  # as above
        raise _damaged(what, error) from error
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception as error:  # the pixels are whole, so the picture is still worth having
        warnings.warn(
            f"{_sentence(what)} has damaged EXIF data ({error}); it is taken as upright.",
            stacklevel=3,
        )
        upright = image
    if upright.mode == "F" or upright.mode.startswith("I"):
        upright = _eight_bit_grey(upright, image, what)
    if upright.has_transparency_data:
        # Premultiplied modes ("La", "RGBa") turn only into their plain ones.
        colour = upright.convert({"La": "LA"}.get(upright.mode, "RGBA")).convert("RGBA")
        white = Image.new("RGBA", colour.size, "white")
        return Image.alpha_composite(white, colour).convert("RGB")
    return upright.convert("RGB")


def _eight_bit_grey(upright: Image.Image, image: Image.Image, what: str) -> Image.Image:
    """Pillow's own conversion clips at 255, so deep greys are scaled here, and only inverts 8 bits."""
    values, tags = np.asarray(upright), _tags(image)
    if upright.mode == "I":
        # These two formats end at 16 bits, which older Pillows and PPM hold in 32.
        if image.format not in ("PNG", "PPM"):
            signed = tags.get(_KIND) == (_SIGNED,) and tags.get(_BITS) == (16,)
            raise ImageError(
                f"{_sentence(what)} holds {'signed 16' if signed else '32'}-bit integers, whose "
                "black and white are not known; scale them to unsigned ones of 8 or 16 bits, or "
                "to floats in 0..1."
            )
        values = values.astype(np.uint16)
    if tags.get(_BITS) == (12,):  # unpacked, but not scaled
        values = ((values.astype(np.uint32) * 65535 + 2047) // 4095).astype(np.uint16)
    grey = _eight_bit(values, what)
    if tags.get(_MEANING) == _WHITE_IS_ZERO:
        grey = 255 - grey
    if "transparency" in upright.info:
        grey = np.where(values == upright.info["transparency"], np.uint8(255), grey)
    return Image.fromarray(grey)


def _channels_last(array: np.ndarray) -> np.ndarray:
    """[H, W] or [H, W, C] from an array that may have its three channels first."""
    if array.ndim != 3 or array.shape[0] != 3:
        return array
    if array.shape[2] in (1, 3, 4):
        raise ImageError(
            f"An array of shape {array.shape} may have its channels first or last; "
            "give a tensor for first, or PIL.Image.fromarray(array) for last."
        )
    return np.moveaxis(array, 0, 2)


def _tensor_channels_last(tensor: torch.Tensor) -> np.ndarray:
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise ImageError(
            f"A tensor of shape {tuple(tensor.shape)} is not one picture; "
            "give [3, H, W] or [1, H, W]."
        )
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise ImageError(f"A tensor of {tensor.dtype} is not a picture; give uint8 or float 0..1.")
    if tensor.is_floating_point():
        tensor = tensor.float()  # numpy has no bfloat16
    return tensor.detach().permute(1, 2, 0).cpu().numpy()


def _from_channels_last(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ImageError(
            f"An array of shape {array.shape} is not one picture; "
            "give [H, W], [H, W, 3] or [H, W, 4]."
        )
    if array.size == 0:
        raise ImageError(f"An array of shape {array.shape} has no pixels.")
    levels = np.ascontiguousarray(_eight_bit(array, "the given array"))
    return _upright_rgb(Image.fromarray(levels), "the given array")


def _eight_bit(values: np.ndarray, what: str) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # in either byte order
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if values.dtype.kind != "f":
        raise ImageError(
            f"{_sentence(what)} is of {values.dtype}; give uint8, uint16, or floats in 0..1."
        )
    if not np.isfinite(values).all():
        raise ImageError(f"{_sentence(what)} holds NaN or infinity; give floats in 0..1.")
    # Judged after rounding to a level, so that 1.0000001 from a resize is still white.
    levels = np.rint(values.astype(np.float32) * 255)
    if levels.min() < 0 or levels.max() > 255:
        raise ImageError(
            f"{_sentence(what)} holds floats from {values.min():.4g} to {values.max():.4g}; "
            "scale them to 0..1, or give uint8 for 0..255."
        )
    return levels.astype(np.uint8)


def _damaged(what: str, error: Exception) -> ImageError:
    return ImageError(
        f"{_sentence(what)} is damaged or cut short ({error}); copy or download it again."
    )


def _sentence(what: str) -> str:
    return f"T{what[1:]}" if what.startswith("the given ") else what
