"""Pictures in, model inputs out, and the way back from input pixels to the picture's own."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import ImageError, InputError

Source = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray | torch.Tensor

_INTERPOLATION: dict[Literal["bilinear", "bicubic"], Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

# How many channels the model's input has.
_CHANNELS = {"rgb": 3, "bgr": 3, "grey": 1}

# Pillow's limit on pixels is a global, so only one thread at a time may lift it.
_OPENING = threading.Lock()


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
            raise ImageError(
                f"{_sentence(what)} is not a picture that can be read; convert it to JPEG or PNG."
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
    return _upright_rgb(image, what)


def _upright_rgb(image: Image.Image, what: str) -> Image.Image:
    if 0 in image.size:
        raise ImageError(f"{_sentence(what)} has no pixels ({image.width} x {image.height}).")
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
        upright = _eight_bit_grey(upright, image.format, what)
    if upright.has_transparency_data:
        # Premultiplied modes ("La", "RGBa") turn only into their plain ones.
        colour = upright.convert({"La": "LA"}.get(upright.mode, "RGBA")).convert("RGBA")
        white = Image.new("RGBA", colour.size, "white")
        return Image.alpha_composite(white, colour).convert("RGB")
    return upright.convert("RGB")


def _eight_bit_grey(image: Image.Image, kind: str | None, what: str) -> Image.Image:
    """Pillow's own conversion clips at 255, so deep greys are scaled here."""
    values = np.asarray(image)
    if image.mode == "I":
        # These two formats end at 16 bits, which older Pillows and PPM hold in 32.
        if kind not in ("PNG", "PPM"):
            raise ImageError(
                f"{_sentence(what)} holds 32-bit integers, whose white is not known; "
                "save it with 8 or 16 bits."
            )
        values = values.astype(np.uint16)
    grey = _eight_bit(values, what)
    if "transparency" in image.info:
        grey = np.where(values == image.info["transparency"], np.uint8(255), grey)
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


@dataclass(frozen=True)
class Geometry:
    """Where the pixels of a model's input lie in the picture that it was made from.

    >>> tensor, geometry = preprocess(image)
    >>> y, x = geometry.points_to_image(np.array([112.0]), np.array([112.0]))
    >>> heat = geometry.map_to_image(attention)              # [H, W], over the picture

    Sizes are (height, width); `scale` and `offset` are (along y, along x), in picture pixels: the
    input's pixel i covers the picture from i * scale + offset to (i + 1) * scale + offset.
    """

    image_size: tuple[int, int]
    input_size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]

    @classmethod
    def identity(cls, size: tuple[int, int]) -> Geometry:
        """The geometry of an input that is itself the picture, `size` = (height, width).

        >>> Geometry.identity((224, 224))
        """
        return cls(size, size, (1.0, 1.0), (0.0, 0.0))

    def points_to_image(self, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Picture coordinates (y, x) of the input's pixel centres (y, x), arrays of one shape.

        >>> geometry.points_to_image(np.array([0]), np.array([0]))

        Whole numbers are pixel centres on both sides, and results are clipped to 0..H-1, 0..W-1.
        """
        image_y, image_x = (
            np.clip((np.asarray(at) + 0.5) * scale + offset - 0.5, 0, side - 1)
            for at, scale, offset, side in zip(
                (y, x), self.scale, self.offset, self.image_size, strict=True
            )
        )
        return image_y, image_x

    def box_to_image(self, box: Sequence[float]) -> tuple[float, float, float, float]:
        """A box (x0, y0, x1, y1) in pixels of the input, in pixels of the picture; cut at its edges.

        >>> geometry.box_to_image((10, 10, 20, 20))
        """
        x0, y0, x1, y1 = (
            min(max(side * self.scale[axis] + self.offset[axis], 0.0), self.image_size[axis])
            for side, axis in zip(box, (1, 0, 1, 0), strict=True)
        )
        return x0, y0, x1, y1

    @property
    def pads(self) -> bool:
        """Whether the input reaches beyond the picture."""
        return any(
            offset < 0 or offset + scale * given > side + scale / 2
            for offset, scale, given, side in zip(
                self.offset, self.scale, self.input_size, self.image_size, strict=True
            )
        )

    def cut(self, map: Tensor) -> Tensor:
        """A map over the input [h, w] with zeros in the padding, where the input shows nothing of the picture.

        >>> geometry.cut(evidence)
        """
        for axis, side in enumerate(self.image_size):
            place = (torch.arange(map.shape[axis]) + 0.5) * self.scale[axis] + self.offset[axis]
            inside = ((place > 0) & (place < side)).to(map)
            map = map * (inside[:, None] if axis == 0 else inside)
        return map

    def shows(self, place: np.ndarray) -> np.ndarray:
        """Whether places of the input [n, 2] lie in the picture, and not in padding: [n].

        >>> geometry.shows(np.array([[0.0, 0.0]]))
        """
        at = (place + 0.5) * np.array(self.scale) + np.array(self.offset)
        inside: np.ndarray = ((at > 0) & (at < np.array(self.image_size))).all(1)
        return inside

    def map_to_image(self, map: np.ndarray) -> np.ndarray:
        """A map over the input [h, w], resampled over the picture: [H, W] float32.

        >>> geometry.map_to_image(attention)

        Bilinear, averaged where the picture is the smaller one; zero where the model didn't look.
        Raises:
            InputError: the map isn't of the input's size.
        """
        if map.shape != self.input_size:
            raise InputError(f"The map is {map.shape}, but the model's input is {self.input_size}.")
        if self == Geometry.identity(self.input_size):
            return map.astype(np.float32)
        rows, columns = (
            _resampling(*axis)
            for axis in zip(self.image_size, self.input_size, self.scale, self.offset, strict=True)
        )
        # By PyTorch: numpy's threads would get in the way of its.
        drawn = torch.from_numpy(map.astype(np.float32))
        resampled: np.ndarray = (rows @ drawn @ columns.T).numpy()
        return resampled


@lru_cache(maxsize=8)
def _resampling(outputs: int, inputs: int, scale: float, offset: float) -> Tensor:
    """[outputs, inputs] float32: how much of each input pixel goes into each output pixel."""
    position = (np.arange(outputs) + 0.5 - offset) / scale
    distance = np.abs(position[:, None] - np.arange(inputs) - 0.5)
    weights: np.ndarray = np.maximum(1 - distance / max(1.0, 1 / scale), 0, dtype=np.float32)
    inside = (position >= 0) & (position < inputs)
    weights[inside] /= weights[inside].sum(axis=1, keepdims=True)
    weights[~inside] = 0
    return torch.from_numpy(weights)


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes a model's input.

    >>> preprocess = Preprocess((224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    >>> tensor, geometry = preprocess(load_image("cat.jpg"))

    `size`: the input's (height, width). `resize`: "squash" the whole picture into it; "fit" it in,
    its sides in proportion, and pad it on both sides, as YOLO networks are trained ("letterbox"); or
    "crop" its centre after the shorter side was brought to `crop_from` pixels, padded where that is
    too small; with "squash" and `crop_from`, the centre is cut of the picture squashed to `crop_from`
    pixels along its input's shorter side. Padding is grey of the level `fill`, 0..255. Then (value * scale - mean) / std, for values 0..255; `mean` and `std` are
    in the order of `channels`, or one number for all of them. With "grey" the input is [1, h, w].
    Antialiased, with the arithmetic of Pillow and torchvision.

    Raises:
        InputError: settings that make no sense.
    """

    size: tuple[int, int]
    resize: Literal["squash", "crop", "fit"] = "squash"
    crop_from: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1 / 255
    channels: Literal["rgb", "bgr", "grey"] = "rgb"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    fill: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("resize", ("squash", "crop", "fit")),
            ("channels", tuple(_CHANNELS)),
            ("interpolation", tuple(_INTERPOLATION)),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name} can't be {getattr(self, name)!r}; choose from {', '.join(allowed)}."
                )
        if not isinstance(self.size, tuple) or len(self.size) != 2:
            raise InputError(f"size is (height, width), such as (224, 224), not {self.size!r}.")
        for name in ("mean", "std"):
            values, count = getattr(self, name), _CHANNELS[self.channels]
            if not isinstance(values, Sequence) or len(values) not in {1, count}:
                raise InputError(
                    f"{name} has one number for all channels, as in (0.5,), or one for each: "
                    f"{count} for {self.channels}, not {values!r}."
                )
            if len(values) < count:
                object.__setattr__(self, name, (*values, *values, *values))
        if min(self.size) < 1 or (self.crop_from is not None and self.crop_from < 1):
            crop = "" if self.crop_from is None else f" cut from {self.crop_from}"
            raise InputError(
                f"The size {self.size[0]} x {self.size[1]}{crop} is none: sizes go from 1 up."
            )
        if self.resize == "crop" and self.crop_from is None:
            raise InputError("resize='crop' needs crop_from, the shorter side before the crop.")
        if self.resize == "fit" and self.crop_from is not None:
            raise InputError(
                "resize='fit' shows the whole picture: crop_from has no meaning for it."
            )
        if type(self.fill) is not int or not 0 <= self.fill <= 255:
            raise InputError(f"fill is a level of grey, 0 to 255, not {self.fill!r}.")
        if self.scale == 0 or 0 in self.std:
            raise InputError("scale and std can't be zero: they would wipe out the picture.")

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, Geometry]:
        """The model's input, [channel, h, w] float32, and where its pixels lie in the picture.

        >>> tensor, geometry = preprocess(load_image("cat.jpg"))

        Raises:
            ImageError: the picture isn't RGB: `load_image` makes it so.
        """
        if image.mode != "RGB":
            raise ImageError(f"The picture's mode is {image.mode}, not RGB; use load_image on it.")
        sides = (image.height, image.width)
        y, x = (self._axis(axis, sides) for axis in (0, 1))
        # Resizing only the box that the crop will show gives the pixels of resizing all and cropping
        # then (to a level of 255: Pillow rounds between its two passes, whose order may differ),
        # and never holds a very long picture at full length.
        part = image.resize(
            (x.length, y.length),
            _INTERPOLATION[self.interpolation],
            box=(x.low, y.low, x.high, y.high),
        )
        canvas = Image.new("RGB", (self.size[1], self.size[0]), (self.fill,) * 3)
        canvas.paste(part, (x.start, y.start))
        if self.channels == "grey":
            canvas = canvas.convert("L")
        levels = torch.from_numpy(np.array(canvas)).reshape(*self.size, -1).permute(2, 0, 1).float()
        tensor = (self._reorder(levels) * self.scale - self._column(self.mean)) / self._column(
            self.std
        )
        geometry = Geometry(
            image_size=(image.height, image.width),
            input_size=self.size,
            scale=(y.scale, x.scale),
            offset=(y.offset, x.offset),
        )
        return tensor.contiguous(), geometry

    @classmethod
    def like(cls, prepare: Callable[[Image.Image], torch.Tensor]) -> Preprocess:
        """The `Preprocess` that does what a function from pictures to inputs [channel, h, w] does.

        >>> preprocess = Preprocess.like(torchvision.models.ResNet50_Weights.DEFAULT.transforms())

        What it does is measured, for such functions have many switches: black, white and red pictures
        give the scale and the order of the channels, and a picture of ramps the resizing and the crop;
        noise of another size, whether that is all.

        Raises:
            InputError: it fails, or does something else than to resize, cut and scale.
        """
        y, x = np.mgrid[0 : _RAMPS[0], 0 : _RAMPS[1]]
        ramps = np.stack([y / y.max(), x / x.max(), (x + y) / (x.max() + y.max())], 2)
        flat = [np.full_like(ramps, color) for color in ((0, 0, 0), (1, 1, 1), (1, 0, 0))]
        noise = np.random.default_rng(0).random((389, 520, 3))
        pictures = [
            Image.fromarray((255 * item).astype(np.uint8)) for item in (*flat, ramps, noise)
        ]
        name = getattr(prepare, "__name__", type(prepare).__name__)
        try:
            black, white, red, sloped, fine = (
                torch.as_tensor(prepare(picture)).float() for picture in pictures
            )
        except Exception as error:  # it is the user's code
            raise InputError(
                f"The preprocessing {name} failed on a picture of 8-bit RGB ({type(error).__name__}: {error})."
            ) from error
        found = [
            (_apart(one(pictures[3])[0], sloped, one), _apart(one(pictures[4])[0], fine, one), one)
            for one in _candidates(black, white, red, sloped)
        ]
        slope, detail, best = min(found, key=lambda item: item[:2], default=(0.0, 255.0, None))
        if best is not None and slope < 1 and detail < 3:  # resizings round at other moments
            return best
        raise InputError(
            f"The preprocessing {name} does something else than to resize, cut and scale an RGB picture "
            "to [3, height, width], or [1, height, width] of its greys, so that it isn't known where pixels come from: give it "
            "as howyouseeme.Preprocess(...), or give the tensors that it makes."
        )

    def misfit(self, inputs: torch.Tensor) -> str | None:
        """What is wrong with the range of a model's input [..., channel, h, w]; None if it fits.

        >>> preprocess.misfit(torch.rand(1, 3, 224, 224))   # "go from 0 to 1, and ..."

        Judged is what can't be chance: values far beyond all that pictures become, or far smaller,
        or all in 0..1 where darker pixels would be negative.
        """
        low, high = float(inputs.min()), float(inputs.max())
        mean, std = self._column(self.mean), self._column(self.std)
        ends = torch.stack([(level * self.scale - mean) / std for level in (0, 255)])
        least, most = float(ends.min()), float(ends.max())
        reach, peak = max(-least, most), max(-low, high)
        unnormalised = low >= 0 and high <= 1 and least < -0.5
        if low == high or not (unnormalised or peak > 10 * reach or peak < reach / 10):
            return None
        if inputs.ndim >= 3 and inputs.shape[-3] == len(self.mean):
            # Whole levels of grey: a picture that really is that bright, or that dark.
            levels = (inputs.float() * std.to(inputs.device) + mean.to(inputs.device)) / self.scale
            if peak <= reach * 1.01 and bool(((levels - levels.round()).abs() < 0.02).all()):
                return None
        return (
            f"go from {low:.3g} to {high:.3g}, and those of pictures from {least:.3g} to {most:.3g}"
        )

    def undo(self, tensor: torch.Tensor) -> Image.Image:
        """The picture that the model saw, as RGB, from its input [channel, h, w].

        >>> preprocess.undo(tensor).show()

        Values that no picture has are clipped.

        Raises:
            InputError: the tensor has another shape.
        """
        count = _CHANNELS[self.channels]
        if tensor.ndim != 3 or tensor.shape[0] != count:
            raise InputError(f"An input of shape {tuple(tensor.shape)} is not [{count}, h, w].")
        values = tensor.detach().float().cpu() * self._column(self.std) + self._column(self.mean)
        levels = (self._reorder(values) / self.scale).round().clamp(0, 255).to(torch.uint8)
        return Image.fromarray(levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())

    def describe(self) -> dict[str, Any]:
        """All settings, ready for JSON: a record of what was done.

        >>> json.dumps(preprocess.describe())
        """
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def _axis(self, axis: int, sides: tuple[int, int]) -> _Axis:
        # The rounding is torchvision's, of the resized side as of the crop; when it is to fit, Ultralytics'.
        side, shorter, wanted = sides[axis], min(sides), self.size[axis]
        if self.resize == "fit":
            ratio = min(self.size[0] / sides[0], self.size[1] / sides[1])
            resized = max(round(side * ratio), 1)
        elif self.crop_from is None:
            resized = wanted
        elif self.resize == "squash":
            resized = self.crop_from * wanted // min(self.size)
        else:
            resized = int(self.crop_from * side / shorter)
        margin = round((resized - wanted) / 2) if resized >= wanted else -((wanted - resized) // 2)
        return _Axis(side=side, resized=resized, margin=margin, length=min(resized, wanted))

    def _reorder(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flip(0) if self.channels == "bgr" else tensor

    @staticmethod
    def _column(values: tuple[float, ...]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32)[:, None, None]


# Height and width neither the same nor multiples of anything, so that no two resizings agree.
_RAMPS = (331, 457)


def _apart(mine: torch.Tensor, theirs: torch.Tensor, preprocess: Preprocess) -> float:
    """The mean difference in levels of 255; some cut an odd rest one pixel away from where others do."""
    if mine.shape != theirs.shape:
        return 255.0
    levels = [
        (mine.roll((y, x), (1, 2)) - theirs)[:, 1:-1, 1:-1].abs().mean((1, 2))
        for y in (-1, 0, 1)
        for x in (-1, 0, 1)
    ]
    return float((torch.stack(levels).cpu() * torch.tensor(preprocess.std)).mean(1).min())


def _candidates(
    black: torch.Tensor, white: torch.Tensor, red: torch.Tensor, sloped: torch.Tensor
) -> Iterator[Preprocess]:
    """What may have made these of black, of white, of red, and of ramps (down, right, and both)."""
    if sloped.ndim != 3 or len(sloped) not in {1, 3} or min(sloped.shape[1:]) < 2:
        return
    low, high = black.mean((1, 2)), white.mean((1, 2))
    uneven = torch.stack([one.amax((1, 2)) - one.amin((1, 2)) for one in (black, white)])
    if not bool((high > low).all()) or not bool((uneven < 1e-3 * (high - low)).all()):
        return
    std, size = 255 / (high - low), (sloped.shape[1], sloped.shape[2])
    level = (sloped - low[:, None, None]) / (high - low)[:, None, None]
    channels: Literal["rgb", "bgr", "grey"] = "grey"
    if len(level) == 3:
        channels = "rgb" if float(red[0].mean()) > float(low[0] + high[0]) / 2 else "bgr"
        down, right = (level if channels == "rgb" else level.flip(0))[:2]
    else:  # all three ramps at once, as ITU-R 601 weighs red, green and blue
        both = (_RAMPS[0] - 1) / (sum(_RAMPS) - 2)
        down, right = level[0] / (0.299 + 0.114 * both), level[0] / (0.587 + 0.114 * (1 - both))
    # How many pixels of the input the picture was resized to, by the slope of each ramp at its middle.
    resized = []
    for line, side in zip((down.mean(1), right.mean(0)), _RAMPS, strict=True):
        margin = len(line) // 4
        inner = np.arange(margin, len(line) - margin)
        slope = float(np.polyfit(inner, line.numpy()[inner], 1)[0])
        if slope <= 0:
            return
        resized.append(side / (side - 1) / slope)
    crop = min(resized)
    squash = sum(resized[i] * min(size) / size[i] for i in range(2)) / 2
    near = range(-2, 3)
    resizings: list[tuple[Literal["squash", "crop"], int | None]] = [
        ("squash", None),
        *(("crop", round(crop) + step) for step in near),
        *(("squash", round(squash) + step) for step in near),
    ]
    for resize, crop_from in resizings:
        for interpolation in _INTERPOLATION:
            if crop_from is None or crop_from > 0:
                yield Preprocess(
                    size,
                    resize=resize,
                    crop_from=crop_from,
                    mean=tuple((0 - low * std).tolist()),
                    std=tuple(std.tolist()),
                    scale=1.0,
                    channels=channels,
                    interpolation=interpolation,
                )


@dataclass(frozen=True)
class _Axis:
    """One side of a picture, resized and then cut (or, with a negative margin, padded)."""

    side: int
    resized: int
    margin: int
    length: int

    @property
    def scale(self) -> float:
        return self.side / self.resized

    @property
    def offset(self) -> float:
        return self.margin * self.scale

    @property
    def start(self) -> int:
        return max(-self.margin, 0)

    @property
    def low(self) -> float:
        return max(self.offset, 0.0)

    @property
    def high(self) -> float:
        return min(self.low + self.length * self.scale, self.side)
