"""ONNX's operators on numbers of few bits, of the specification and of onnxruntime (com.microsoft).

What is quantised stays a float that holds a whole number, q = x / scale + zero, so that the steps can be
walked back: an operator is made of what its inputs stand for, of the operator on floats, and of rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import UnsupportedCallError
from .operators import DTYPES, OPERATORS, Attributes, operator

__all__: list[str] = []


def _along(item: Tensor, x: Tensor, axis: int) -> Tensor:
    """A scale or zero point, one for all or one for each place along an axis, to broadcast against x."""
    if item.numel() == 1:
        return item.reshape(())
    return item.reshape(-1, *[1] * (x.dim() - axis % x.dim() - 1))


def _real(x: Tensor, scale: Tensor | None, zero: Tensor | None, axis: int = 0) -> Tensor:
    """What a tensor stands for: (x - zero) · scale.

    It is made once for all who ask: evidence of branches meets where they part, and there the sign has to
    be that of what the number stands for, which x, shifted by its zero point, has not.
    """
    known = getattr(x, "_stands_for", None)
    if known is not None and all(map(_same, known[:2], (scale, zero))):
        real: Tensor = known[2]
        return real
    real = x.to(torch.float32 if scale is None else scale.dtype)
    if zero is not None:
        real = real - _along(zero, x, axis).to(real.dtype)
    real = real if scale is None else real * _along(scale, x, axis)
    if x.is_floating_point():  # an activation, and no weight that stays
        x._stands_for = scale, zero, real  # type: ignore[attr-defined]
    return real


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _few(x: Tensor, scale: Tensor, zero: Tensor, axis: int = 0) -> Tensor:
    """The whole number that stands for x, in the range of the type of the zero point."""
    if zero.dtype not in {torch.uint8, torch.int8, torch.int16, torch.int32}:
        raise UnsupportedCallError("only whole numbers of 8, 16 or 32 bits are supported.")
    bounds, start = torch.iinfo(zero.dtype), _along(zero, x, axis).to(x.dtype)
    whole = (x / _along(scale, x, axis)).round()
    return torch.clamp(whole, bounds.min - start, bounds.max - start) + start


@operator("QuantizeLinear")
def _quantize(
    attributes: Attributes, x: Tensor, scale: Tensor, zero: Tensor | None = None
) -> Tensor:
    attributes.only("block_size", 0)
    if zero is None:
        zero = torch.zeros((), dtype=DTYPES.get(attributes.get("output_dtype") or 2))
    return _few(x, scale, zero, attributes.get("axis", 1))


@operator("DequantizeLinear")
def _dequantize(
    attributes: Attributes, x: Tensor, scale: Tensor, zero: Tensor | None = None
) -> Tensor:
    attributes.only("block_size", 0)
    return _real(x, scale, zero, attributes.get("axis", 1))


@operator("DynamicQuantizeLinear")
def _quantize_dynamically(attributes: Attributes, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Its range is what this image gave: a number, which nothing is walked back through.
    low, high = min(float(x.amin()), 0.0), max(float(x.amax()), 0.0)
    scale = torch.tensor((high - low) / 255 if high > low else 1.0, dtype=x.dtype)
    zero = (-low / scale).round().clamp(0, 255).to(torch.uint8)
    return _few(x, scale, zero), scale, zero


# -- sums -----------------------------------------------------------------------------------------


@operator("QLinearConv")
def _conv(
    attributes: Attributes,
    x: Tensor, x_scale: Tensor, x_zero: Tensor,
    w: Tensor, w_scale: Tensor, w_zero: Tensor,
    y_scale: Tensor, y_zero: Tensor,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    shift = None if bias is None else bias * (x_scale * w_scale)
    y = OPERATORS["Conv"](attributes, _real(x, x_scale, x_zero), _real(w, w_scale, w_zero), shift)
    return _few(y, y_scale, y_zero)


@operator("ConvInteger")
def _conv_integer(
    attributes: Attributes,
    x: Tensor,
    w: Tensor,
    x_zero: Tensor | None = None,
    w_zero: Tensor | None = None,
) -> Tensor:
    y: Tensor = OPERATORS["Conv"](attributes, _real(x, None, x_zero), _real(w, None, w_zero))
    return y


@operator("QLinearMatMul")
def _matmul(
    attributes: Attributes,
    a: Tensor, a_scale: Tensor, a_zero: Tensor,
    b: Tensor, b_scale: Tensor, b_zero: Tensor,
    y_scale: Tensor, y_zero: Tensor,
) -> Tensor:  # fmt: skip
    return _few(_real(a, a_scale, a_zero, -2) @ _real(b, b_scale, b_zero, -1), y_scale, y_zero)


@operator("MatMulInteger")
def _matmul_integer(
    attributes: Attributes,
    a: Tensor,
    b: Tensor,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
) -> Tensor:
    return _real(a, None, a_zero, -2) @ _real(b, None, b_zero, -1)


@operator("com.microsoft.QGemm")
def _gemm(
    attributes: Attributes,
    a: Tensor, a_scale: Tensor, a_zero: Tensor,
    b: Tensor, b_scale: Tensor, b_zero: Tensor | None,
    c: Tensor | None = None,
    y_scale: Tensor | None = None, y_zero: Tensor | None = None,
) -> Tensor:  # fmt: skip
    column = 0 if attributes.get("transB", 0) else 1
    # Its constant is counted in steps of both scales and alpha.
    shift = None if c is None else c * (attributes.get("alpha", 1.0) * a_scale * b_scale)
    real = _real(a, a_scale, a_zero), _real(b, b_scale, b_zero, column)
    y: Tensor = OPERATORS["Gemm"](attributes, *real, shift)
    return y if y_scale is None or y_zero is None else _few(y, y_scale, y_zero)


# -- everything else: what it does to floats ------------------------------------------------------


def _of_one(name: str) -> Callable[..., Tensor]:
    def function(
        attributes: Attributes, x: Tensor, x_scale: Tensor, x_zero: Tensor | None,
        y_scale: Tensor, y_zero: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        attributes.only("channels_last", 0)
        y = OPERATORS[name](attributes, _real(x, x_scale, x_zero))
        return _few(y, y_scale, _told(y_zero))

    return function


def _of_two(name: str) -> Callable[..., Tensor]:
    def function(
        attributes: Attributes, a: Tensor, a_scale: Tensor, a_zero: Tensor | None,
        b: Tensor, b_scale: Tensor, b_zero: Tensor | None,
        y_scale: Tensor, y_zero: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        y = OPERATORS[name](attributes, _real(a, a_scale, a_zero), _real(b, b_scale, b_zero))
        return _few(y, y_scale, _told(y_zero))

    return function


def _told(zero: Tensor | None) -> Tensor:
    if zero is None:
        raise UnsupportedCallError("it has no zero point, which tells the type.")
    return zero


for _name in ("AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Softmax"):
    operator(f"com.microsoft.QLinear{_name}")(_of_one(_name))
for _name in ("Add", "Mul"):
    operator(f"com.microsoft.QLinear{_name}")(_of_two(_name))


@operator("com.microsoft.QLinearConcat")
def _concat(attributes: Attributes, scale: Tensor, zero: Tensor, *parts: Tensor) -> Tensor:
    triples = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    real = [_real(*triple) for triple in triples]
    return _few(torch.cat(real, attributes.get("axis")), scale, zero)
