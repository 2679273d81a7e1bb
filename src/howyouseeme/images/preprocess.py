"""How a picture becomes a model's input."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from ..errors import ImageError, InputError
from .geometry import Geometry

__all__ = ["Preprocess"]

_INTERPOLATION: dict[Literal["bilinear", "bicubic"], Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

# How many channels the model's input has.
_CHANNELS = {"rgb": 3, "bgr": 3, "grey": 1, "grey3": 3}
_Channels = Literal["rgb", "bgr", "grey", "grey3"]


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
    in the order of `channels`, or one number for all of them. With "grey" the input is [1, h, w],
    and with "grey3" that thrice, for networks that take RGB.
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
    channels: _Channels = "rgb"
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
        self._set("size", tuple(_whole("size", side) for side in self.size))
        if self.crop_from is not None:
            self._set("crop_from", _whole("crop_from", self.crop_from))
        scale = _number(self.scale)
        if scale is None:
            raise InputError(f"scale is a number, not {self.scale!r}.")
        self._set("scale", scale)
        for name in ("mean", "std"):
            values, count = getattr(self, name), _CHANNELS[self.channels]
            numbers = list(map(_number, values)) if isinstance(values, Sequence) else [None]
            if None in numbers or len(numbers) not in {1, count}:
                raise InputError(
                    f"{name} has one number for all channels, as in (0.5,), or one for each: "
                    f"{count} for {self.channels}, not {values!r}."
                )
            self._set(name, tuple(numbers) * (count // len(numbers)))
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
        if (
            isinstance(self.fill, bool)
            or not isinstance(self.fill, Integral)
            or not 0 <= self.fill <= 255
        ):
            raise InputError(f"fill is a level of grey, 0 to 255, not {self.fill!r}.")
        self._set("fill", int(self.fill))
        if self.scale == 0 or 0 in self.std:
            raise InputError("scale and std can't be zero: they would wipe out the picture.")

    def _set(self, name: str, value: Any) -> None:
        """A setting as a plain number or tuple, whatever kind of number it was given as."""
        object.__setattr__(self, name, value)

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
        if self.channels.startswith("grey"):
            canvas = canvas.convert("L")
        if self.channels == "grey3":
            canvas = canvas.convert("RGB")
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

        It may also be an image processor of transformers. What it does is measured, for such functions have many switches: black, white and red pictures
        give the scale and the order of the channels, and a picture of ramps the resizing and the crop;
        noise of another size, fine and coarse, whether that is all. What is random in it shows in calls on one picture.

        Raises:
            InputError: it fails, is random, or does something else than to resize, cut and scale.
        """
        y, x = np.mgrid[0 : _RAMPS[0], 0 : _RAMPS[1]]
        ramps = np.stack([y / y.max(), x / x.max(), (x + y) / (x.max() + y.max())], 2)
        flat = [np.full_like(ramps, color) for color in ((0, 0, 0), (1, 1, 1), (1, 0, 0))]
        pictures = [
            Image.fromarray((255 * item).astype(np.uint8)) for item in (*flat, ramps, *_noises())
        ]
        name = getattr(prepare, "__name__", type(prepare).__name__)
        try:
            drawn = _drawn()
            black, white, red, sloped, *noisy = (
                _made(prepare, picture).float() for picture in pictures
            )
            small = pictures[4].resize((65, 48))
            first = _made(prepare, small)
            varies = any(
                not torch.equal(_made(prepare, small), first)
                for _ in range(_CALLS if _drawn() == drawn else 8 * _CALLS)
            )
        except Exception as error:  # it is the user's code
            raise InputError(
                f"The preprocessing {name} failed on a picture of 8-bit RGB ({type(error).__name__}: {error})."
            ) from error
        if varies:
            raise InputError(
                f"The preprocessing {name} is random: it makes different tensors of the same picture; give the "
                "transforms for evaluation, not those for training."
            )
        found: tuple[float, Preprocess | None] = 1.0, None  # resizings round at other moments
        for one in _candidates(black, white, red, sloped):
            most = 0.0
            for picture, made in zip(pictures[3:], (sloped, *noisy), strict=True):
                most = max(most, _apart(one(picture)[0], made, one))
                if most >= found[0]:
                    break
            else:
                found = most, one
        if found[1] is not None:
            return found[1]
        raise InputError(
            f"The preprocessing {name} does something else than to resize, cut and scale an RGB picture or its greys "
            "to [3, height, width], or greys to [1, height, width], so that it isn't known where pixels come from (of "
            "torchvision understood are Resize((height, width)), Resize(side) with a CenterCrop after it, Grayscale, "
            "ToTensor and Normalize): give it as howyouseeme.Preprocess(...), or give the tensors that it makes."
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
        return torch.tensor(values, dtype=torch.float32, device="cpu")[:, None, None]


def _whole(name: str, number: Any) -> int:
    """A number of pixels, of whatever kind, as Python's."""
    known = None if isinstance(number, bool) else _number(number)
    if known is None or not known.is_integer():
        raise InputError(f"{name} is in whole pixels, and {number!r} is no number of them.")
    return int(known)


def _number(number: Any) -> float | None:
    """A number of whatever kind as Python's; None for anything else."""
    try:
        return None if isinstance(number, str) else float(number)
    except (TypeError, ValueError):
        return None


# Height and width neither the same nor multiples of anything, so that no two resizings agree.
_RAMPS = (331, 457)


#: How often what draws no random numbers that can be seen is called on one picture.
_CALLS = 8


def _drawn() -> tuple[Any, ...]:
    """Where the generators of random numbers are that transforms draw from."""
    other = np.random.get_state(legacy=False)["state"]
    drawn = random.getstate(), bytes(torch.get_rng_state().numpy())
    return *drawn, bytes(other["key"]), other["pos"]


def _noises() -> Iterator[np.ndarray]:
    """Pictures in cells of so many pixels: blurs of large and of small inputs show in some of them."""
    generator = np.random.default_rng(0)
    for cell in (1, 4, 12):
        cells = generator.random((389 // cell + 1, 520 // cell + 1, 3))
        yield np.kron(cells, np.ones((cell, cell, 1)))[:389, :520]


def _apart(mine: torch.Tensor, theirs: torch.Tensor, preprocess: Preprocess) -> float:
    """The mean difference in levels of 255; some cut an odd rest one pixel away from where others do."""
    if mine.shape != theirs.shape:
        return 255.0
    levels = [
        (mine.roll((y, x), (1, 2)) - theirs)[:, 1:-1, 1:-1].abs().mean((1, 2))
        for y in (-1, 0, 1)
        for x in (-1, 0, 1)
    ]
    return float((torch.stack(levels) * torch.tensor(preprocess.std, device="cpu")).mean(1).min())


def _made(prepare: Callable[[Image.Image], Any], picture: Image.Image) -> torch.Tensor:
    """What a function makes of a picture, on the CPU; image processors of transformers make a dict of batches."""
    made = prepare(picture)
    made = made["pixel_values"][0] if isinstance(made, Mapping) else made
    return torch.as_tensor(made, device="cpu")


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
    reds = ((red.mean((1, 2)) - low) / (high - low)).tolist()
    channels: _Channels = "grey" if len(level) == 1 else "grey3"
    if channels == "grey3" and max(reds) > 0.5:  # as a grey, red is 0.299
        channels = "rgb" if reds[0] > 0.5 else "bgr"
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
