"""Convolutions: 1-d to 3-d, any stride, padding, dilation and groups, transposed or not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import unfold

from ..links import BatchedMatrix, Convolution, Link, Selection
from ..tape import Call, Value
from .gates import is_attention
from .registry import Refusal, Step, rule_of

rule = rule_of("convolution")


@rule("aten.convolution", "aten._convolution")
def convolution(call: Call, output: Value) -> Step:
    """y[o, p] = b[o] + sum over channels i and taps t of w[o, i, t] · x[i, p · stride - pad + t]

    A kernel that weights of attention made (of experts, say) is frozen, as they are. Where kernel and
    input are both signals, as in a correlation of two images, each gets half.
    """
    x, weight, bias, stride, padding, dilation, transposed, _, groups = call.args[:9]
    links: list[tuple[Value, Link]] = []
    kernel = _contents(weight)
    signal = isinstance(weight, Value) and not is_attention(weight)
    share = 0.5 if signal and isinstance(x, Value) else 1
    if isinstance(x, Value):
        own = kernel if share == 1 else share * kernel
        link = Convolution(
            x.shape, output.shape, own, stride, padding, dilation, groups, transposed
        )
        links.append((x, link))
    if signal:
        links.append(_to_kernel(call, output, share))
    fixed: Tensor | None = None
    if isinstance(bias, Value) and not is_attention(bias):
        at = torch.arange(bias.numel, device=bias.device).reshape(_along_channels(output))
        links.append((bias, Selection(bias.shape, output.shape, at.expand(output.shape))))
    elif bias is not None:
        fixed = _contents(bias).reshape(_along_channels(output))
    return Step(links, fixed)


def _contents(item: Value | Tensor) -> Tensor:
    return item.data if isinstance(item, Value) else item


def _along_channels(output: Value) -> list[int]:
    return [1, -1, *[1] * (len(output.shape) - 2)]


def _to_kernel(call: Call, output: Value, share: float) -> tuple[Value, Link]:
    """The link of y to its kernel: each place of y is the product of all kernels with its patch."""
    x, weight, _, stride, padding, dilation, transposed, _, groups = call.args[:9]
    data = _contents(x)
    if transposed or len(stride) != 2 or len(data) != 1:
        raise Refusal("a computed kernel is supported in 2-d, not transposed, for one image alone")

    def patches() -> Tensor:
        columns = unfold(data, weight.shape[2:], dilation, padding, stride)  # [1, taps, places]
        return share * columns.reshape(groups, -1, columns.shape[-1]).mT

    return weight, BatchedMatrix(weight.shape, output.shape, patches)
