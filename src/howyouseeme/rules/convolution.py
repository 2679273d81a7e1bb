"""Convolutions: 1-d to 3-d, any stride, padding, dilation and groups, transposed or not."""

from __future__ import annotations

from ..links import Convolution
from ..tape import Call, Value
from . import Refusal, Step, rule


@rule("aten.convolution", "aten._convolution")
def convolution(call: Call, output: Value) -> Step:
    """y[o, p] = b[o] + sum over channels i and taps t of w[o, i, t] · x[i, p · stride - pad + t]"""
    x, weight, bias, stride, padding, dilation, transposed, _, groups = call.args[:9]
    if not isinstance(x, Value) or isinstance(weight, Value) or isinstance(bias, Value):
        raise Refusal("only a computed input with a constant kernel is supported")
    link = Convolution(x.shape, output.shape, weight, stride, padding, dilation, groups, transposed)
    dims = weight.dim() - 2
    return Step([(x, link)], None if bias is None else bias.reshape(1, -1, *[1] * dims))
