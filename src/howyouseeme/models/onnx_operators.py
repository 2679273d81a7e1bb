"""What each operator of ONNX does, in PyTorch: one small function for each.

A function takes the `Attributes` of its node and then its inputs, None for one that is left out,
and returns a tensor, or several where the node has several outputs. It makes the calls that a
PyTorch network would make, for those have rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedCallError

__all__ = ["DTYPES", "OPERATORS", "Attributes", "operator", "to_tensor"]


# onnx.TensorProto's numbers for the types of elements.
DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


class Attributes:
    """What a node says besides its inputs, and the opset that tells what it means."""

    def __init__(self, node: Any, opset: int) -> None:
        import onnx  # noqa: PLC0415

        values = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        self._values = {name: _plain(value) for name, value in values.items()}
        self.opset = opset
        self.outputs = sum(bool(name) for name in node.output)

    def get(self, name: str, default: Any = None) -> Any:
        return self._values.get(name, default)

    def only(self, name: str, *allowed: Any) -> Any:
        """The attribute, whose default is the first of the values that are supported."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise UnsupportedCallError(
                f"{name}={value!r} is not supported, only {', '.join(map(repr, allowed))}."
            )
        return value


Operator = Callable[..., Any]
Function = Callable[..., Any]  # of PyTorch
OPERATORS: dict[str, Operator] = {}


def operator(*names: str) -> Callable[[Operator], Operator]:
    """Register what a node does: a function of its `Attributes` and its inputs (None if left out)."""

    def register(function: Operator) -> Operator:
        for name in names:
            if name in OPERATORS:
                raise ValueError(f"The ONNX operator {name} is registered already.")
            OPERATORS[name] = function
        return function

    return register


def to_tensor(proto: Any) -> Tensor:
    import onnx  # noqa: PLC0415

    array = onnx.numpy_helper.to_array(proto)
    dtype = DTYPES.get(proto.data_type)
    if dtype is None:
        kind = onnx.TensorProto.DataType.Name(proto.data_type)
        raise UnsupportedCallError(f"{proto.name or 'a constant'} holds {kind}.")
    if dtype == torch.bfloat16:
        array = array.astype(np.float32)
    return torch.tensor(array).to(dtype)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return to_tensor(value) if hasattr(value, "raw_data") else value


# -- convolution and pooling ----------------------------------------------------------------------

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


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
        less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
        before, after = (less, more) if automatic == "SAME_UPPER" else (more, less)
    elif automatic == "VALID":
        before = after = [0] * count
    return strides, dilations, before, after


def _padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    pairs = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
    return F.pad(x, pairs, value=value) if any(pairs) else x


@operator("Conv")
def _conv(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = weight.shape[2:]
    strides, dilations, before, after = _window(attributes, x, kernel)
    if before != after:
        x, before = _padded(x, before, after), [0] * len(kernel)
    convolve = _CONV[len(kernel) - 1]
    return convolve(x, weight, bias, strides, before, dilations, attributes.get("group", 1))


@operator("ConvTranspose")
def _conv_transpose(
    attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    attributes.only("auto_pad", "NOTSET", "VALID")
    attributes.only("output_shape", None)
    kernel = weight.shape[2:]
    strides, dilations, before, after = _window(attributes, x, kernel)
    extra = attributes.get("output_padding", [0] * len(kernel))
    convolve = _CONV_TRANSPOSE[len(kernel) - 1]
    groups = attributes.get("group", 1)
    if before == after:
        return convolve(x, weight, bias, strides, before, extra, groups, dilations)
    # A transposed convolution's padding cuts its output.
    y = convolve(x, weight, bias, strides, [0] * len(kernel), extra, groups, dilations)
    return _padded(y, [-side for side in before], [-side for side in after])


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
    if before != after or any(
        2 * side > size for side, size in zip(before, kernel, strict=True)
    ):  # PyTorch refuses padding beyond half a window
        x, before = _padded(x, before, after, -math.inf), [0] * len(kernel)
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
    total: Tensor = pool(_padded(x, before, ends), kernel, strides) * math.prod(kernel)
    inside = torch.ones_like(x[:1, :1])
    if counts_padding:  # of the padding that was asked for, and not of what ceil_mode adds
        inside, ends = _padded(inside, before, after, 1.0), further
        before = [0] * len(kernel)
    count: Tensor = pool(_padded(inside, before, ends), kernel, strides) * math.prod(kernel)
    return total / count


@operator("GlobalAveragePool")
def _global_average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def _global_max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


# -- linear ---------------------------------------------------------------------------------------


@operator("Gemm")
def _gemm(attributes: Attributes, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.t() if attributes.get("transA", 0) else a
    b = b.t() if attributes.get("transB", 0) else b
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    if c is not None and alpha == beta == 1:
        return torch.addmm(c, a, b)
    product = a @ b if alpha == 1 else alpha * (a @ b)
    return product if c is None else product + beta * c


@operator("MatMul")
def _matmul(attributes: Attributes, a: Tensor, b: Tensor) -> Tensor:
    return a @ b


@operator("Einsum")
def _einsum(attributes: Attributes, *inputs: Tensor) -> Tensor:
    return torch.einsum(attributes.get("equation"), *inputs)


# -- normalisation --------------------------------------------------------------------------------


@operator("BatchNormalization")
def _batch_norm(
    attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    attributes.only("training_mode", 0)
    attributes.only("spatial", 1)
    return F.batch_norm(x, mean, variance, scale, bias, eps=attributes.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def _instance_norm(attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, x.shape[1], scale, bias, attributes.get("epsilon", 1e-5))


@operator("GroupNormalization")
def _group_norm(attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = attributes.get("num_groups")
    if attributes.opset < 21:  # then one of each for a whole group
        scale, bias = (one.repeat_interleave(x.shape[1] // groups) for one in (scale, bias))
    return F.group_norm(x, groups, scale, bias, attributes.get("epsilon", 1e-5))


@operator("LayerNormalization")
def _layer_norm(
    attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Any:
    axis, epsilon = attributes.get("axis", -1) % x.dim(), attributes.get("epsilon", 1e-5)
    shape = x.shape[axis:]
    bias = None if bias is None else bias.expand(shape)
    y = F.layer_norm(x, shape, scale.expand(shape), bias, epsilon)
    if attributes.outputs == 1:
        return y
    variance, mean = torch.var_mean(x, tuple(range(axis, x.dim())), correction=0, keepdim=True)
    return y, mean, (variance + epsilon).rsqrt()


@operator("LRN")
def _lrn(attributes: Attributes, x: Tensor) -> Tensor:
    size = attributes.get("size")
    if size % 2 == 0:  # PyTorch's window lies one channel lower then
        raise UnsupportedCallError(f"size={size} is not supported, only odd ones.")
    alpha, beta = attributes.get("alpha", 1e-4), attributes.get("beta", 0.75)
    return F.local_response_norm(x, size, alpha, beta, attributes.get("bias", 1.0))


# -- pointwise ------------------------------------------------------------------------------------


def _pointwise(function: Function) -> Operator:
    return lambda attributes, *inputs: function(*inputs)


_POINTWISE: dict[str, Function] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "Mish": F.mish,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Where": torch.where,
}
for _name, _function in _POINTWISE.items():
    operator(_name)(_pointwise(_function))


@operator("Div")
def _div(attributes: Attributes, a: Tensor, b: Tensor) -> Tensor:
    whole = not a.is_floating_point()
    return torch.div(a, b, rounding_mode="trunc") if whole else a / b


@operator("Pow")
def _pow(attributes: Attributes, x: Tensor, exponent: Tensor) -> Tensor:
    # One number as a number: x ** 2 has a cheaper call than a tensor of exponents.
    single = exponent.numel() == 1 and exponent.dim() <= x.dim()
    return torch.pow(x, exponent.item() if single else exponent).to(x.dtype)


@operator("Sum")
def _sum(attributes: Attributes, first: Tensor, *others: Tensor) -> Tensor:
    return sum(others, first)


@operator("Mean")
def _mean(attributes: Attributes, *inputs: Tensor) -> Tensor:
    return sum(inputs[1:], inputs[0]) / len(inputs)


@operator("Max")
def _max(attributes: Attributes, first: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        first = torch.maximum(first, other)
    return first


@operator("Min")
def _min(attributes: Attributes, first: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        first = torch.minimum(first, other)
    return first


@operator("Clip")
def _clip(
    attributes: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    least = attributes.get("min") if low is None else low.item()
    most = attributes.get("max") if high is None else high.item()
    return x if least is None and most is None else x.clamp(least, most)


@operator("LeakyRelu")
def _leaky_relu(attributes: Attributes, x: Tensor) -> Tensor:
    return F.leaky_relu(x, attributes.get("alpha", 0.01))


@operator("PRelu")
def _prelu(attributes: Attributes, x: Tensor, slope: Tensor) -> Tensor:
    if slope.numel() in (1, x.shape[1]) and (slope.dim() == 0 or slope.numel() == slope.shape[0]):
        return F.prelu(x, slope.reshape(-1))
    return x.clamp(min=0) + slope * x.clamp(max=0)


@operator("Elu")
def _elu(attributes: Attributes, x: Tensor) -> Tensor:
    return F.elu(x, attributes.get("alpha", 1.0))


@operator("Celu")
def _celu(attributes: Attributes, x: Tensor) -> Tensor:
    return F.celu(x, attributes.get("alpha", 1.0))


@operator("Selu")
def _selu(attributes: Attributes, x: Tensor) -> Tensor:
    alpha = attributes.get("alpha", 1.67326319217681884765625)
    gamma: float = attributes.get("gamma", 1.05070102214813232421875)
    return F.elu(x, alpha) * gamma


@operator("Gelu")
def _gelu(attributes: Attributes, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=attributes.only("approximate", "none", "tanh"))


@operator("Softplus")
def _softplus(attributes: Attributes, x: Tensor) -> Tensor:
    return F.softplus(x)


@operator("Swish")
def _swish(attributes: Attributes, x: Tensor) -> Tensor:
    alpha = attributes.get("alpha", 1.0)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@operator("HardSigmoid")
def _hard_sigmoid(attributes: Attributes, x: Tensor) -> Tensor:
    alpha, beta = float(attributes.get("alpha", 0.2)), float(attributes.get("beta", 0.5))
    return (x * alpha + beta).clamp(0, 1)


def _softmax_like(function: Function) -> Operator:
    def softmax(attributes: Attributes, x: Tensor) -> Any:
        if attributes.opset >= 13:
            return function(x, dim=attributes.get("axis", -1))
        # It was over all axes from this one on.
        axis = attributes.get("axis", 1) % x.dim()
        return function(x.flatten(axis), dim=axis).reshape(x.shape)

    return softmax


operator("Softmax")(_softmax_like(torch.softmax))
operator("LogSoftmax")(_softmax_like(torch.log_softmax))


# -- reductions -----------------------------------------------------------------------------------


def _reduction(function: Function) -> Operator:
    def reduce(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Any:
        chosen = attributes.get("axes") if axes is None else axes.tolist()
        if not chosen and attributes.get("noop_with_empty_axes", 0):
            return x
        every = tuple(chosen) if chosen else tuple(range(x.dim()))
        return function(x, every, keepdim=bool(attributes.get("keepdims", 1)))

    return reduce


def _prod(x: Tensor, axes: Sequence[int], keepdim: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keepdim)
    return x


_REDUCTIONS: dict[str, Function] = {
    "ReduceL1": lambda x, axes, keepdim: x.abs().sum(axes, keepdim=keepdim),
    "ReduceL2": lambda x, axes, keepdim: x.square().sum(axes, keepdim=keepdim).sqrt(),
    "ReduceMax": torch.amax,
    "ReduceMean": torch.mean,
    "ReduceMin": torch.amin,
    "ReduceProd": _prod,
    "ReduceSum": lambda x, axes, keepdim: x.sum(axes, keepdim=keepdim, dtype=x.dtype),
    "ReduceSumSquare": lambda x, axes, keepdim: x.square().sum(axes, keepdim=keepdim),
}
for _name, _function in _REDUCTIONS.items():
    operator(_name)(_reduction(_function))


@operator("ArgMax")
def _argmax(attributes: Attributes, x: Tensor) -> Tensor:
    attributes.only("select_last_index", 0)
    return x.argmax(attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1)))


# -- movement -------------------------------------------------------------------------------------


@operator("Reshape")
def _reshape(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sides = shape.tolist()
    if not attributes.get("allowzero", 0):
        sides = [x.shape[axis] if side == 0 else side for axis, side in enumerate(sides)]
    return x.reshape(sides)


@operator("Flatten")
def _flatten(attributes: Attributes, x: Tensor) -> Tensor:
    axis = attributes.get("axis", 1)
    axis += x.dim() if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), -1)


@operator("Transpose")
def _transpose(attributes: Attributes, x: Tensor) -> Tensor:
    return x.permute(attributes.get("perm", list(reversed(range(x.dim())))))


@operator("Squeeze")
def _squeeze(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = attributes.get("axes") if axes is None else axes.tolist()
    return x.squeeze() if chosen is None else x.squeeze(tuple(chosen))


@operator("Unsqueeze")
def _unsqueeze(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = attributes.get("axes") if axes is None else axes.tolist()
    dims = x.dim() + len(chosen)
    for axis in sorted(axis % dims for axis in chosen):
        x = x.unsqueeze(axis)
    return x


@operator("Concat")
def _concat(attributes: Attributes, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, attributes.get("axis"))


@operator("Split")
def _split(attributes: Attributes, x: Tensor, sizes: Tensor | None = None) -> Sequence[Tensor]:
    axis = attributes.get("axis", 0)
    given = attributes.get("split") if sizes is None else sizes.tolist()
    if given is None:
        given = math.ceil(x.shape[axis] / attributes.get("num_outputs", attributes.outputs))
    return torch.split(x, given, axis)


@operator("Slice")
def _slice(
    attributes: Attributes,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first = attributes.get("starts") if starts is None else starts.tolist()
    last = attributes.get("ends") if ends is None else ends.tolist()
    chosen = attributes.get("axes", [*range(len(first))]) if axes is None else axes.tolist()
    strides = [1] * len(first) if steps is None else steps.tolist()
    for axis, start, end, step in zip(chosen, first, last, strides, strict=True):
        # Python means the same by its slices, of which PyTorch takes only those that go forwards.
        index = range(x.shape[axis])[start:end:step]
        if step < 0:
            x = x.index_select(axis, torch.tensor(index, dtype=torch.int64, device=x.device))
        else:
            x = x.narrow(axis, index.start, max(index.stop - index.start, 0))
            x = (
                x
                if step == 1
                else x[(slice(None),) * (axis % x.dim()) + (slice(None, None, step),)]
            )
    return x


@operator("Gather")
def _gather(attributes: Attributes, x: Tensor, index: Tensor) -> Tensor:
    axis = attributes.get("axis", 0) % x.dim()
    index = torch.where(index < 0, index + x.shape[axis], index)
    chosen = x.index_select(axis, index.reshape(-1))
    return chosen.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


@operator("Pad")
def _pad(
    attributes: Attributes,
    x: Tensor,
    pads: Tensor | None = None,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    mode = attributes.only("mode", "constant", "reflect", "edge", "wrap")
    sides = attributes.get("pads") if pads is None else pads.tolist()
    chosen = [*range(x.dim())] if axes is None else [axis % x.dim() for axis in axes.tolist()]
    before, after = [0] * x.dim(), [0] * x.dim()
    for place, axis in enumerate(chosen):
        before[axis], after[axis] = sides[place], sides[place + len(chosen)]
    if mode == "constant":
        fill = attributes.get("value", 0.0) if value is None else value.item()
        return _padded(x, before, after, fill)
    for axis, (low, high) in enumerate(zip(before, after, strict=True)):
        if low or high:
            side = x.shape[axis]
            at = torch.arange(-low, side + high, device=x.device)
            if mode == "edge":
                at = at.clamp(0, side - 1)
            elif mode == "wrap":
                at = at % side
            else:  # there and back again
                at = side - 1 - (side - 1 - at % max(2 * side - 2, 1)).abs()
            x = x.index_select(axis, at)
    return x


@operator("Expand")
def _expand(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, shape.tolist()))


@operator("Tile")
def _tile(attributes: Attributes, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(repeats.tolist())


@operator("DepthToSpace")
def _depth_to_space(attributes: Attributes, x: Tensor) -> Tensor:
    size = attributes.get("blocksize")
    if attributes.only("mode", "DCR", "CRD") == "CRD":
        return F.pixel_shuffle(x, size)
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, size, size, channels // size**2, height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, height * size, width * size)


@operator("SpaceToDepth")
def _space_to_depth(attributes: Attributes, x: Tensor) -> Tensor:
    size = attributes.get("blocksize")
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, channels, height // size, size, width // size, size)
    order = (3, 5, 1) if attributes.only("mode", "DCR", "CRD") == "DCR" else (1, 3, 5)
    return blocks.permute(0, *order, 2, 4).reshape(batch, -1, height // size, width // size)


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
    mode = attributes.only("mode", "nearest", "linear")
    place = attributes.only(
        "coordinate_transformation_mode",
        *("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"),
    )
    place = "asymmetric" if old else place
    attributes.only("antialias", 0)
    attributes.only("exclude_outside", 0)
    attributes.only("keep_aspect_ratio_policy", "stretch")
    attributes.only("axes", None)
    if sizes is not None and sizes.numel():
        wanted = sizes.tolist()
        factors = [new / side for new, side in zip(wanted, x.shape, strict=True)]
    else:
        given = attributes.get("scales") if scales is None else scales.tolist()
        # Rounded, for a scale such as 0.6 is not quite that in float32.
        wanted = [
            math.floor(round(side * scale, 4)) for side, scale in zip(x.shape, given, strict=True)
        ]
        factors = given
    for axis, (side, new, factor) in enumerate(zip(x.shape, wanted, factors, strict=True)):
        if factor == 1:
            continue
        at = torch.arange(new, dtype=torch.float64, device=x.device)
        if place == "align_corners":
            at = at * ((side - 1) / (new - 1)) if new > 1 else at * 0
        elif place == "asymmetric":
            at = at / factor
        elif place == "pytorch_half_pixel" and new == 1:
            at = at * 0
        else:
            at = (at + 0.5) / factor - 0.5
        if mode == "nearest":
            x = x.index_select(axis, _rounded(attributes, at, old).clamp(0, side - 1).long())
        else:
            low = at.floor()
            part = (at - low).to(x.dtype).reshape(-1, *[1] * (x.dim() - axis - 1))
            left, right = (
                x.index_select(axis, index.clamp(0, side - 1).long()) for index in (low, low + 1)
            )
            x = left * (1 - part) + right * part
    return x


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


# -- constants, shapes and types ------------------------------------------------------------------


@operator("Constant")
def _constant(attributes: Attributes) -> Tensor:
    for name, dtype in {
        "value": None,
        "value_float": torch.float32,
        "value_floats": torch.float32,
        "value_int": torch.int64,
        "value_ints": torch.int64,
    }.items():
        value = attributes.get(name)
        if value is not None:
            return value if dtype is None else torch.tensor(value, dtype=dtype)
    raise UnsupportedCallError("it is neither a tensor nor a number.")


@operator("ConstantOfShape")
def _constant_of_shape(attributes: Attributes, shape: Tensor) -> Tensor:
    value = attributes.get("value")
    filled = torch.zeros(1) if value is None else value
    return filled.to(shape.device).expand(shape.tolist()).clone()


@operator("Shape")
def _shape(attributes: Attributes, x: Tensor) -> Tensor:
    sides = list(x.shape)[attributes.get("start", 0) : attributes.get("end")]
    return torch.tensor(sides, dtype=torch.int64, device=x.device)


@operator("Size")
def _size(attributes: Attributes, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), device=x.device)


@operator("Range")
def _range(attributes: Attributes, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    numbers = (one.item() for one in (start, limit, delta))
    return torch.arange(*numbers, dtype=start.dtype, device=start.device)


@operator("Cast")
def _cast(attributes: Attributes, x: Tensor) -> Tensor:
    dtype = DTYPES.get(attributes.get("to"))
    if dtype is None:
        raise UnsupportedCallError(f"the type {attributes.get('to')} is not supported.")
    return x.to(dtype)


@operator("CastLike")
def _cast_like(attributes: Attributes, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


@operator("Dropout")
def _dropout(
    attributes: Attributes, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None
) -> Any:
    if training is not None and training.item():
        raise UnsupportedCallError("it is in training mode.")
    return x if attributes.outputs == 1 else (x, torch.ones_like(x, dtype=torch.bool))


@operator("Mod")
def _mod(attributes: Attributes, x: Tensor, other: Tensor) -> Tensor:
    return torch.fmod(x, other) if attributes.get("fmod", 0) else torch.remainder(x, other)


@operator("ScatterND")
def _scatter_nd(attributes: Attributes, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    add = attributes.only("reduction", "none", "add") == "add"
    return x.index_put(indices.unbind(-1), updates, accumulate=add)
