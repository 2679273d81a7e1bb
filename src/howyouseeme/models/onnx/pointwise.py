"""Operators of ONNX that work on each element alone, and softmax."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import Attributes, Function, Operator, operator

__all__: list[str] = []


def _pointwise(function: Function) -> Operator:
    return lambda attributes, *inputs: function(*inputs)


_POINTWISE: dict[str, Function] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Add": torch.add,
    "And": torch.logical_and,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseNot": torch.bitwise_not,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
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
    "Sinh": torch.sinh,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "Where": torch.where,
    "Xor": torch.logical_xor,
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
    alone = slope.dim() == 0 or slope.numel() == slope.shape[0]
    columns = slope.dim() == 1 and x.dim() > 2 and len(slope) == x.shape[-1]  # as NumPy broadcasts
    if slope.numel() == 1 or (alone and slope.numel() == x.shape[1] and not columns):
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


@operator("Mod")
def _mod(attributes: Attributes, x: Tensor, other: Tensor) -> Tensor:
    return torch.fmod(x, other) if attributes.get("fmod", 0) else torch.remainder(x, other)


@operator("ThresholdedRelu")
def _thresholded_relu(attributes: Attributes, x: Tensor) -> Tensor:
    return F.threshold(x, attributes.get("alpha", 1.0), 0.0)


@operator("Shrink")
def _shrink(attributes: Attributes, x: Tensor) -> Tensor:
    bias, limit = attributes.get("bias", 0.0), attributes.get("lambd", 0.5)
    return torch.where(x > limit, x - bias, torch.where(x < -limit, x + bias, torch.zeros_like(x)))


@operator("IsInf")
def _is_infinite(attributes: Attributes, x: Tensor) -> Tensor:
    above, below = attributes.get("detect_positive", 1), attributes.get("detect_negative", 1)
    return (torch.isposinf(x) & bool(above)) | (torch.isneginf(x) & bool(below))
