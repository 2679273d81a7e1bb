"""Operators of ONNX that look through windows: convolution, pooling and resizing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UnsupportedCallError
from .operators import Attributes, operator, padded

__all__: list[str] = []


_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _shared(totals: Sequence[int], automatic: str) -> tuple[list[int], list[int]]:
    """Padding shared by both sides of each axis: before and after, an odd rest as auto_pad says."""
    less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (less, more) if automatic == "SAME_UPPER" else (more, less)


def _window(attributes: Attributes, x: Tensor, kernel: Sequence[int]) -> tuple[list[int], ...]:
    """Stride, dilation, padding before and padding after, each along all axes of space."""
    count = len(kernel)
    strides = attributes.get("strides", [1] * count)
    dilations = attributes.get("dilations", [1] * count)
    pads = attributes.get("pads", [0] * 2 * count)
    automatic = attributes.only("auto_pad", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
    before, after = pads[:count], pads[count:]
    if automatic.startswith("SAME"):
        totals = [
            max((math.ceil(side / stride) - 1) * stride + (size - 1) * dilation + 1 - side, 0)
            for side, stride, size, dilation in zip(
                x.shape[2:], strides, kernel, dilations, strict=True
            )
        ]
        before, after = _shared(totals, automatic)
    elif automatic == "VALID":
        before = after = [0] * count
    return strides, dilations, before, after


@operator("Conv")
def _conv(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = weight.shape[2:]
    strides, dilations, before, after = _window(attributes, x, kernel)
    if before != after:
        x, before = padded(x, before, after), [0] * len(kernel)
    convolve = _CONV[len(kernel) - 1]
    return convolve(x, weight, bias, strides, before, dilations, attributes.get("group", 1))


@operator("ConvTranspose")
def _conv_transpose(
    attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    kernel = weight.shape[2:]
    automatic = attributes.only("auto_pad", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
    strides, dilations, before, after = _window(attributes, x, kernel)
    extra = attributes.get("output_padding", [0] * len(kernel))
    sides = attributes.get("output_shape")
    if sides is None and automatic.startswith("SAME"):
        sides = [side * stride for side, stride in zip(x.shape[2:], strides, strict=True)]
    if sides is not None:
        reach = [
            stride * (side - 1) + more + (size - 1) * dilation + 1
            for side, stride, more, size, dilation in zip(
                x.shape[2:], strides, extra, kernel, dilations, strict=True
            )
        ]
        extra = [
            more + max(side - whole, 0)
            for more, side, whole in zip(extra, sides[-len(kernel) :], reach, strict=True)
        ]
        totals = [
            max(whole - side, 0) for whole, side in zip(reach, sides[-len(kernel) :], strict=True)
        ]
        before, after = _shared(totals, automatic)
    convolve = _CONV_TRANSPOSE[len(kernel) - 1]
    groups = attributes.get("group", 1)
    if before == after:
        return convolve(x, weight, bias, strides, before, extra, groups, dilations)
    # A transposed convolution's padding cuts its output.
    y = convolve(x, weight, bias, strides, [0] * len(kernel), extra, groups, dilations)
    return padded(y, [-side for side in before], [-side for side in after])


def _ceiled(x: Tensor, kernel: Any, strides: Any, dilations: Any, before: Any, after: Any) -> Any:
    """Padding after that lets a window begin wherever one may, as ceil_mode=1 asks."""
    further = []
    for side, size, stride, dilation, low, high in zip(
        x.shape[2:], kernel, strides, dilations, before, after, strict=True
    ):
        length = side + low + high
        reach = (size - 1) * dilation + 1
        outputs = math.ceil((length - reach) / stride) + 1
        if (outputs - 1) * stride >= side + low:  # it would begin in the padding
            outputs -= 1
        further.append(max((outputs - 1) * stride + reach - length, 0))
    return further


@operator("MaxPool")
def _max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    kernel = attributes.get("kernel_shape")
    if attributes.outputs > 1:
        raise UnsupportedCallError("the indices of the maxima are not supported.")
    strides, dilations, before, after = _window(attributes, x, kernel)
    if attributes.get("ceil_mode", 0):
        further = _ceiled(x, kernel, strides, dilations, before, after)
        after = [one + more for one, more in zip(after, further, strict=True)]
    # PyTorch pads both ends alike, and no more than half a window.
    wide = any(2 * side > size for side, size in zip(before, kernel, strict=True))
    if before != after or wide:
        x, before = padded(x, before, after, -math.inf), [0] * len(kernel)
    return _MAX_POOL[len(kernel) - 1](x, kernel, strides, before, dilations)


@operator("AveragePool")
def _average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    kernel = attributes.get("kernel_shape")
    strides, dilations, before, after = _window(attributes, x, kernel)
    pool = _AVERAGE_POOL[len(kernel) - 1]
    counts_padding = bool(attributes.get("count_include_pad", 0))
    ceil = bool(attributes.get("ceil_mode", 0))
    if any(one != 1 for one in dilations):
        raise UnsupportedCallError("dilations are not supported in an average.")
    further = _ceiled(x, kernel, strides, dilations, before, after) if ceil else [0] * len(kernel)
    half = all(2 * side <= size for side, size in zip(before, kernel, strict=True))
    if before == after and half and not any(further):
        return pool(x, kernel, strides, before, False, counts_padding)
    ends = [one + more for one, more in zip(after, further, strict=True)]
    total: Tensor = pool(padded(x, before, ends), kernel, strides) * math.prod(kernel)
    inside = torch.ones_like(x[:1, :1])
    if counts_padding:  # of the padding that was asked for, and not of what ceil_mode adds
        inside, ends = padded(inside, before, after, 1.0), further
        before = [0] * len(kernel)
    count: Tensor = pool(padded(inside, before, ends), kernel, strides) * math.prod(kernel)
    return total / count


@operator("GlobalAveragePool")
def _global_average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def _global_max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


@operator("Upsample", "Resize")
def _resize(
    attributes: Attributes,
    x: Tensor,
    second: Tensor | None = None,
    third: Tensor | None = None,
    fourth: Tensor | None = None,
) -> Tensor:
    # Upsample and the first Resize are (x, scales), later ones (x, region, scales, sizes).
    old = attributes.opset < 11
    scales, sizes = (second, None) if old else (third, fourth)
    mode = attributes.only("mode", "nearest", "linear", "cubic")
    place = attributes.only(
        "coordinate_transformation_mode",
        *(
            "half_pixel",
            "pytorch_half_pixel",
            "align_corners",
            "asymmetric",
            "half_pixel_symmetric",
        ),
    )
    place = "asymmetric" if old else place
    attributes.only("antialias", 0)
    attributes.only("exclude_outside", 0)
    attributes.only("keep_aspect_ratio_policy", "stretch")
    axes = [axis % x.dim() for axis in attributes.get("axes", range(x.dim()))]
    shape = [x.shape[axis] for axis in axes]
    if sizes is not None and sizes.numel():
        wanted = sizes.tolist()
        factors = [new / side for new, side in zip(wanted, shape, strict=True)]
    else:
        given = attributes.get("scales") if scales is None else scales.tolist()
        # Rounded, for a scale such as 0.6 is not quite that in float32.
        wanted = [
            math.floor(round(side * scale, 4)) for side, scale in zip(shape, given, strict=True)
        ]
        factors = given
    for axis, side, new, factor in zip(axes, shape, wanted, factors, strict=True):
        if factor == 1:
            continue
        at = _read(place, side, new, factor).to(x.device)
        if mode == "nearest":
            x = x.index_select(axis, _rounded(attributes, at, old).clamp(0, side - 1).long())
            continue
        low = at.floor()
        part = (at - low).to(x.dtype).reshape(-1, *[1] * (x.dim() - axis - 1))
        if mode == "linear":
            taps = {0: 1 - part, 1: part}
        else:
            sharp = attributes.get("cubic_coeff_a", -0.75)
            taps = {tap: _cubic((tap - part).abs(), sharp) for tap in (-1, 0, 1, 2)}
        near = {tap: x.index_select(axis, (low + tap).clamp(0, side - 1).long()) for tap in taps}
        x, *others = (near[tap] * weight for tap, weight in taps.items())
        for other in others:
            x = x + other
    return x


def _read(place: str, side: int, new: int, factor: float) -> Tensor:
    """Where in an axis of `side` each element of the resized one is read [new]."""
    at = torch.arange(new, dtype=torch.float64)
    if place == "align_corners":
        return at * ((side - 1) / (new - 1)) if new > 1 else at * 0
    if place == "asymmetric":
        return at / factor
    if place == "pytorch_half_pixel" and new == 1:
        return at * 0
    at = (at + 0.5) / factor - 0.5
    if place == "half_pixel_symmetric":  # about the centre, where the scale gives no whole number
        at = at + side / 2 * (1 - new / (side * factor))
    return at


def _cubic(apart: Tensor, sharp: float) -> Tensor:
    """Keys's kernel, at distances up to 2."""
    near = ((sharp + 2) * apart - (sharp + 3)) * apart**2 + 1
    far = ((apart - 5) * apart + 8) * apart * sharp - 4 * sharp
    return torch.where(apart <= 1, near, far)


def _rounded(attributes: Attributes, at: Tensor, old: bool) -> Tensor:
    rounding = attributes.only(
        "nearest_mode", "round_prefer_floor", "round_prefer_ceil", "floor", "ceil"
    )
    at = (at * 2**20).round() / 2**20  # 2.9999999 is 3
    if old or rounding == "floor":
        return at.floor()
    if rounding == "ceil":
        return at.ceil()
    return (at - 0.5).ceil() if rounding == "round_prefer_floor" else (at + 0.5).floor()


@operator("GridSample")
def _grid_sample(attributes: Attributes, x: Tensor, grid: Tensor) -> Tensor:
    mode = attributes.only("mode", *("linear", "bilinear", "nearest", "cubic", "bicubic"))
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    padding = attributes.only("padding_mode", "zeros", "border", "reflection")
    return F.grid_sample(x, grid, mode, padding, bool(attributes.get("align_corners", 0)))


@operator("AffineGrid")
def _affine_grid(attributes: Attributes, theta: Tensor, size: Tensor) -> Tensor:
    return F.affine_grid(theta, size.tolist(), bool(attributes.get("align_corners", 0)))


@operator("Col2Im")
def _fold(attributes: Attributes, x: Tensor, size: Tensor, kernel: Tensor) -> Tensor:
    sides, window = tuple(size.tolist()), tuple(kernel.tolist())
    if len(sides) != 2:
        raise UnsupportedCallError("only pictures are supported.")
    pads = attributes.get("pads", [0] * 4)
    if pads[:2] != pads[2:]:
        raise UnsupportedCallError(f"pads={pads!r} is not supported, only those of equal sides.")
    dilations, strides = attributes.get("dilations", [1, 1]), attributes.get("strides", [1, 1])
    return F.fold(x, sides, window, dilations, pads[:2], strides)
