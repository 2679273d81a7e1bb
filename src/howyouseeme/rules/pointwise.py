"""Calls that work on each element alone: activations, normalisation with fixed statistics.

An activation y = f(x) is frozen to the line through (0, f(0)) and (x, y): all of y - f(0) is due to
x. Its slope has the sign that turns *most* into *least* where f falls. Where f has no value at 0 (log, 1/x),
the line goes through another point: (1, f(1)), or (-1, f(-1)) on that side of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..links import Diagonal, Link, Selection
from ..tape import Call, Value
from .branches import one_of
from .registry import Refusal, Step, rule_of

rule = rule_of("pointwise")


def secant(call: Call, output: Value, at_zero: Tensor | None = None) -> Step:
    """The step of any elementwise call: y = s x + f(0), with the slope s = (y - f(0)) / x.

    >>> @rule("aten.expm1", replace=True)
    ... def expm1(call, output):
    ...     return secant(call, output)

    `at_zero` is f(0) where it can't be had by calling f on a zero. Where f has no value at 0 (log, 1/x) the line
    goes through another point, (1, f(1)) for one; where f(0) is not finite all the same, it counts as 0.

    Raises:
        Refusal: the call has more than one computed input, or one that is broadcast.
    """
    x = call.inputs[0]
    if any(value is not x for value in call.inputs):
        raise Refusal("only one computed input is supported")
    if x.shape != output.shape:
        raise Refusal("an input that is broadcast is not supported")
    if at_zero is None:
        if (anchor := _anchor(call)) is not None:
            return _through(anchor, call, x, output)
        if call.name not in _THROUGH_ZERO:
            at_zero = _at(call, x, output, 0.0)
    zero = None if at_zero is None else at_zero.nan_to_num(0.0, 0.0, 0.0)

    def slope() -> Tensor:
        if call.name == "aten.relu":  # without what it overwrote, perhaps
            return output.data.sign()
        risen = output.data if zero is None else output.data - zero
        return (risen / x.data).masked_fill(x.data == 0, 0)

    def bias() -> Tensor:  # where x is infinite, as a mask makes it, no line leads there
        assert zero is not None
        return torch.where(x.data.isfinite(), zero, output.data)

    link = Diagonal(x.shape, output.shape, slope, call.name in _RISING)
    return Step([(x, link)], None if zero is None else bias)


def _at(call: Call, x: Value, output: Value, place: float) -> Tensor:
    """f(place)"""
    there = torch.full((), place, dtype=x.dtype, device=output.device)
    made = call.op(*(there if a is x else a for a in call.args), **call.kwargs)
    found: Tensor = made[output.output] if isinstance(made, tuple) else made
    return found


def _anchor(call: Call) -> float | None:
    """Where a line of a function goes through that has no value at 0; None for all others."""
    if call.name == "aten.pow":
        power = call.args[1]
        return 1.0 if isinstance(power, (int, float)) and power < 0 else None
    return _ANCHORS.get(call.name)


def _through(anchor: float, call: Call, x: Value, output: Value) -> Step:
    """The line through (a, f(a)) and (x, y), or (-a, f(-a)) where x < 0; where x is a, to a point beside it."""
    here, other, near = (
        _at(call, x, output, place) for place in (anchor, -anchor, anchor * (1 + 1 / 64))
    )
    place = torch.where(x.data < 0, -anchor, anchor).to(output.dtype)
    start = torch.where(x.data < 0, other, here)
    beside = (near - here) * (64 / anchor)
    slope = torch.where(x.data == place, beside, (output.data - start) / (x.data - place))
    slope = slope.nan_to_num(0.0, 0.0, 0.0).masked_fill(x.data == 0, 0)
    return Step([(x, Diagonal(x.shape, output.shape, slope))], output.data - slope * x.data)


#: For functions that have no value at 0, a place where they have one.
_ANCHORS = {
    "aten.logit": 0.5,
    **{f"aten.{name}": 1.0 for name in "acosh lgamma log log10 log2 reciprocal rsqrt".split()},
}


#: Calls whose output is 0 where their input is, with any further arguments.
_THROUGH_ZERO = {
    f"aten.{name}"
    for name in (
        "abs fake_quantize_per_channel_affine_cachemask gelu hardswish leaky_relu mish relu relu6 "
        "silu tanh"
    ).split()
}


#: Calls whose output is above f(0) where their input is above 0, and below where it is below.
_RISING = {
    f"aten.{name}"
    for name in (
        "asinh atan erf expm1 gelu hardsigmoid hardswish hardtanh log_sigmoid_forward mish relu relu6 "
        "sigmoid sign silu sinh softplus softshrink tanh"
    ).split()
}

for _name in (
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams copysign deg2rad erfinv "
    "fake_quantize_per_channel_affine_cachemask fake_quantize_per_tensor_affine_cachemask "
    "floor_divide fmod frac heaviside i0 lgamma rad2deg remainder special_entr "
    "abs acos acosh asin asinh atan atanh ceil celu cos cosh elu erf erfc "
    "exp exp2 expm1 floor gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu log log10 log1p "
    "log2 log_sigmoid_forward logit mish pow reciprocal relu relu6 round rsqrt sgn sigmoid "
    "sign silu sin sinc sinh softplus softshrink sqrt square tan tanh threshold trunc"
).split():
    rule(f"aten.{_name}")(secant)


@rule("aten._fused_moving_avg_obs_fq_helper")
def observed_fake_quantize(call: Call, output: Value) -> Step:
    """y = x rounded to steps: x · (y / x), with the steps that were observed taken as constants"""
    x = call.args[0]
    slope = (output.data / x.data).masked_fill(x.data == 0, 0)
    return Step([(x, Diagonal(x.shape, output.shape, slope))])


@rule("aten.nan_to_num")
def nan_to_num(call: Call, output: Value) -> Step:
    """y = x where that is a number, a constant elsewhere"""
    x = call.args[0]
    kept = (x.data == output.data) & (x.data != 0)
    weight = kept.to(output.dtype)
    return Step([(x, Diagonal(x.shape, output.shape, weight))], output.data.masked_fill(kept, 0))


@rule("aten.clamp", "aten.clamp_max", "aten.clamp_min")
def clamp(call: Call, output: Value) -> Step:
    """y = x between two bounds: an activation where they are constant, else what y is, x or a bound"""
    x, *bounds = (*call.args, *call.kwargs.values())
    if not any(isinstance(bound, Value) for bound in bounds):
        return secant(call, output)
    return one_of(output, [item for item in (x, *bounds) if item is not None])


@rule("aten._softmax", "aten._safe_softmax")
def softmax(call: Call, output: Value) -> Step:
    """y = exp(x) / z, with z, the sum of exp over the classes, taken as a constant"""
    x = call.args[0]
    z = x.data.logsumexp(call.argument(1, "dim"), keepdim=True)
    return secant(call, output, at_zero=(-z).exp().to(output.dtype).expand(output.shape))


@rule("aten._log_softmax")
def log_softmax(call: Call, output: Value) -> Step:
    """y = x - log z, with z, the sum of exp over the classes, taken as a constant"""
    x = call.args[0]
    return Step([(x, Diagonal(x.shape, output.shape))], output.data - x.data)


@rule("aten.neg")
def neg(call: Call, output: Value) -> Step:
    """y = -x"""
    x = call.args[0]
    return Step([(x, Diagonal(x.shape, output.shape, x.data.new_full((), -1.0)))])


@rule("aten.prelu", "aten._prelu_kernel", "aten.rrelu_with_noise")
def prelu(call: Call, output: Value) -> Step:
    """y = x where x > 0, w · x elsewhere"""
    if len(call.inputs) > 1:
        raise Refusal("only a constant slope is supported")
    return secant(call, output, at_zero=call.args[0].data.new_zeros(()))


def _normed(
    x: Value | Tensor,
    output: Value,
    bias: Value | Tensor | None,
    shape: Sequence[int],
    scale: Tensor | Callable[[], Tensor],
    shift: Tensor | Callable[[], Tensor],
    rising: bool | Tensor = False,
) -> Step:
    """y = scale x + shift, and plus the bias in a shape where that was computed."""
    if not isinstance(x, Value):
        raise Refusal("only the norm of a computed input is supported")
    links: list[tuple[Value, Link]] = [(x, Diagonal(x.shape, output.shape, scale, rising))]
    if isinstance(bias, Value):
        at = torch.arange(bias.numel, device=bias.device).reshape(*shape).expand(output.shape)
        links.append((bias, Selection(bias.shape, output.shape, at)))
    return Step(links, shift)


def _fixed(item: Value | Tensor | None) -> Tensor | None:
    """A bias that is constant; None for one that has a link of its own."""
    return None if isinstance(item, Value) else item


def _weight(item: Value | Tensor | None) -> Tensor | None:
    """A weight, which is a gate where it was computed."""
    return item.data if isinstance(item, Value) else item


def _along(x: Value) -> list[int]:
    """The shape in which a vector over axis 1 broadcasts against x."""
    return [1, -1, *[1] * (len(x.shape) - 2)]


def _per_channel(item: Tensor | None, x: Value, default: float) -> Tensor:
    """A vector over axis 1, ready to broadcast against x."""
    if item is None:
        item = x.data.new_full((x.shape[1],), default)
    return item.reshape(_along(x))


@rule(
    "aten.native_batch_norm",
    "aten.cudnn_batch_norm",
    "aten.miopen_batch_norm",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_no_training",
    "aten._batch_norm_no_update",
)
def batch_norm(call: Call, output: Value) -> Step:
    """y = w (x - mean) / sqrt(var + eps) + b, per channel"""
    x, weight, bias, mean, var = call.args[:5]
    weight, eps = _weight(weight), call.args[-1]
    has_mode = call.name in {
        "aten.native_batch_norm",
        "aten.cudnn_batch_norm",
        "aten.miopen_batch_norm",
        "aten._native_batch_norm_legit",
    }
    own = has_mode and call.args[5]  # the statistics of this input: instance norm
    if own:
        saved_mean, saved_rstd = call.outputs[1:3]
        if saved_mean is None or saved_rstd is None or call.name != "aten.native_batch_norm":
            raise Refusal("batch norm with the statistics of the input keeps none on this device")
        mean, spread = saved_mean.data, saved_rstd.data
    else:
        if isinstance(mean, Value) or isinstance(var, Value) or mean is None:
            raise Refusal("batch norm without running statistics is not supported")
        spread = var

    def scale() -> Tensor:
        rstd = spread if own else (spread + eps).rsqrt()
        return _per_channel(weight, x, 1.0) * _per_channel(rstd, x, 1.0)

    def shift() -> Tensor:
        return _per_channel(_fixed(bias), x, 0.0) - _per_channel(mean, x, 0.0) * scale()

    rising = weight is None or (weight > 0).all()
    return _normed(x, output, bias, _along(x), scale, shift, rising)


@rule("aten.native_layer_norm")
def layer_norm(call: Call, output: Value) -> Step:
    """y = w (x - mean) / std + b, with this input's mean and std taken as constants"""
    x, _, weight, bias = call.args[:4]
    weight, fixed = _weight(weight), _fixed(bias)
    if not isinstance(x, Value):
        raise Refusal("only the norm of a computed input is supported")
    mean, rstd = call.outputs[1:3]
    assert mean is not None
    assert rstd is not None
    scale = rstd.data if weight is None else rstd.data * weight
    shift = -mean.data * scale
    shape = () if bias is None else bias.shape
    return _normed(x, output, bias, shape, scale, shift if fixed is None else shift + fixed)


@rule("aten._fused_rms_norm")
def rms_norm(call: Call, output: Value) -> Step:
    """y = w x / rms, with this input's root mean square taken as a constant"""
    x, weight = call.args[0], _weight(call.argument(2, "weight"))
    rstd = call.outputs[1]
    assert rstd is not None
    scale = rstd.data if weight is None else rstd.data * weight
    return Step([(x, Diagonal(x.shape, output.shape, scale))])


@rule("aten.native_group_norm")
def group_norm(call: Call, output: Value) -> Step:
    """y = w (x - mean) / std + b, with each group's mean and std taken as constants"""
    x, weight, bias = call.args[:3]
    weight = _weight(weight)
    samples, channels, groups = call.args[3], call.args[4], call.args[6]
    mean, rstd = (
        item.data.reshape(samples, groups, 1)
        .expand(samples, groups, channels // groups)
        .reshape(samples, channels, *[1] * (len(x.shape) - 2))
        for item in call.outputs[1:3]
        if item is not None
    )
    scale = rstd * _per_channel(weight, x, 1.0)
    shift = _per_channel(_fixed(bias), x, 0.0) - mean * scale
    return _normed(x, output, bias, _along(x), scale, shift)
