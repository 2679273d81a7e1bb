"""Norms, variances, products and logsumexp: sums of x, each element weighted by what this image made of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..links import Sparse
from ..links.matrices import sparse
from ..tape import Call, Value
from .linear import axes_of
from .registry import Refusal, Step, rule_of

rule = rule_of("reductions")


def _weighted(x: Value, output: Value, axes: list[int], weight: Tensor) -> Sparse:
    """The link of y = sum of weight · x over the axes."""
    kept = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    row = torch.arange(output.numel, device=x.device).reshape(kept).expand(x.shape)
    index = torch.stack([row.reshape(-1), torch.arange(x.numel, device=x.device)])
    entries = sparse(index, weight.reshape(-1), (output.numel, x.numel))
    return Sparse(x.shape, output.shape, entries)


def _kept(output: Tensor, x: Value, axes: list[int]) -> Tensor:
    """The output with every reduced axis kept, to broadcast against x."""
    return output.reshape([1 if axis in axes else size for axis, size in enumerate(x.shape)])


@rule("aten.linalg_vector_norm")
def norm(call: Call, output: Value) -> Step:
    """y = |x|_p over the axes = sum of x · sign(x) (|x| / y)^(p - 1)"""
    x, order = call.args[0], call.argument(1, "ord", 2)
    if not 1 <= order < float("inf"):
        raise Refusal("only a norm of order 1 and above, not of infinity, is supported")
    axes = axes_of(x, call.argument(2, "dim"))
    size = _kept(output.data, x, axes)
    weight = x.data.sign() * (x.data.abs() / size).nan_to_num(0.0) ** (order - 1)
    return Step([(x, _weighted(x, output, axes, weight))])


@rule("aten.var", "aten.std", "aten.var_mean", "aten.std_mean")
def variance(call: Call, output: Value) -> Step:
    """var = sum of x · (x - mean) / (n - 1), with the mean taken as a constant; std = var / std"""
    x = call.args[0]
    names = [argument.name for argument in call.op._schema.arguments]
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    axes = axes_of(x, given.get("dim"))
    count = x.numel // max(output.numel, 1)
    if output.output == 1:  # the mean
        weight = torch.full_like(x.data, 1 / count)
        return Step([(x, _weighted(x, output, axes, weight))])
    correction = given.get("correction")
    if correction is None:
        correction = 1 if given.get("unbiased", True) else 0
    weight = (x.data - x.data.mean(axes, keepdim=True)) / max(count - correction, 0)
    if "std" in call.name:
        weight = (weight / _kept(output.data, x, axes)).nan_to_num(0.0)
    return Step([(x, _weighted(x, output, axes, weight))])


@rule("aten.logsumexp")
def logsumexp(call: Call, output: Value) -> Step:
    """y = sum of p · x + entropy of p, with p = softmax(x) taken as a constant"""
    x = call.args[0]
    axes = axes_of(x, call.args[1])
    weight = (x.data - _kept(output.data, x, axes)).exp()
    link = _weighted(x, output, axes, weight)
    return Step([(x, link)], lambda: output.data - link.forward(x.data))


@rule("aten.prod")
def prod(call: Call, output: Value) -> Step:
    """y = product of the n elements over the axis = sum of x · (product of the others) / n

    Each element gets the same share: what it is worth on average over the orders in which the
    elements may come (Shapley).
    """
    x = call.args[0]
    axes = axes_of(x, call.argument(1, "dim"))
    rest = [axis for axis in range(len(x.shape)) if axis not in axes]
    order = [*rest, *axes]
    rows = x.data.double().permute(order).flatten(len(rest))
    one = torch.ones_like(rows[..., :1])
    before = torch.cat([one, rows[..., :-1]], -1).cumprod(-1)
    after = torch.cat([rows[..., 1:], one], -1).flip(-1).cumprod(-1).flip(-1)
    weight = (before * after / max(rows.shape[-1], 1)).to(output.dtype)
    weight = weight.reshape([x.shape[axis] for axis in order])
    back = sorted(range(len(order)), key=order.__getitem__)
    return Step([(x, _weighted(x, output, axes, weight.permute(back)))])
