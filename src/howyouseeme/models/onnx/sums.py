"""Operators of ONNX that add up: products of matrices, norms and reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UnsupportedCallError
from .operators import Attributes, Function, Operator, operator

__all__: list[str] = []


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


@operator("RMSNormalization")
def _rms_norm(attributes: Attributes, x: Tensor, scale: Tensor) -> Tensor:
    shape = x.shape[attributes.get("axis", -1) % x.dim() :]
    return F.rms_norm(x, shape, scale.expand(shape), attributes.get("epsilon", 1e-5))


@operator("LpNormalization")
def _lp_norm(attributes: Attributes, x: Tensor) -> Tensor:
    power, axis = attributes.only("p", 2, 1), attributes.get("axis", -1)
    length = x.abs().sum(axis, True) if power == 1 else x.square().sum(axis, True).sqrt()
    return x / length.clamp(min=torch.finfo(x.dtype).tiny)  # of nothing but zeros, zeros


@operator("MeanVarianceNormalization")
def _mean_variance_norm(attributes: Attributes, x: Tensor) -> Tensor:
    axes = attributes.get("axes", [0, 2, 3])
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)


@operator("LRN")
def _lrn(attributes: Attributes, x: Tensor) -> Tensor:
    size = attributes.get("size")
    if size % 2 == 0:  # PyTorch's window lies one channel lower then
        raise UnsupportedCallError(f"size={size} is not supported, only odd ones.")
    alpha, beta = attributes.get("alpha", 1e-4), attributes.get("beta", 0.75)
    return F.local_response_norm(x, size, alpha, beta, attributes.get("bias", 1.0))


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
    "ReduceLogSum": lambda x, axes, keepdim: x.sum(axes, keepdim=keepdim).log(),
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceMax": torch.amax,
    "ReduceMean": torch.mean,
    "ReduceMin": torch.amin,
    "ReduceProd": _prod,
    "ReduceSum": lambda x, axes, keepdim: x.sum(axes, keepdim=keepdim, dtype=x.dtype),
    "ReduceSumSquare": lambda x, axes, keepdim: x.square().sum(axes, keepdim=keepdim),
}
for _name, _function in _REDUCTIONS.items():
    operator(_name)(_reduction(_function))


@operator("CumSum")
def _cumulative_sum(attributes: Attributes, x: Tensor, axis: Tensor) -> Tensor:
    along, reverse = int(axis), attributes.get("reverse", 0)
    x = x.flip(along) if reverse else x
    total = x.cumsum(along, dtype=x.dtype)
    if attributes.get("exclusive", 0):
        total = torch.cat(
            [torch.zeros_like(x.narrow(along, 0, 1)), total.narrow(along, 0, x.shape[along] - 1)],
            along,
        )
    return total.flip(along) if reverse else total
