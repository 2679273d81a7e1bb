"""Calls that the tape takes apart: each is recorded as the simpler calls that it is made of.

What a call is made of is written in plain PyTorch, and gives what the call gives, to rounding. So it
needs no rule of its own: the rules know its parts.

    @made_of("aten.addmv")
    def addmv(c, a, b, *, beta=1, alpha=1):
        return beta * c + alpha * (a @ b[:, None]).squeeze(1)

A function that returns `NotImplemented` leaves the call whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

__all__ = ["decompositions", "made_of"]

Parts = Callable[..., Any]

#: So many differences are worth their memory; more distances are told by products, if they can be.
_MOST = 2**24

_PARTS: dict[str, Parts] = {}


def made_of(*names: str) -> Callable[[Parts], Parts]:
    """Register what calls are made of."""

    def register(function: Parts) -> Parts:
        _PARTS.update(dict.fromkeys(names, function))
        return function

    return register


def decompositions() -> dict[str, Parts]:
    """The registry: a call's name to what it is made of."""
    return _PARTS


# -- products -------------------------------------------------------------------------------------


@made_of("aten.mv")
def mv(a: Tensor, b: Tensor) -> Tensor:
    """a b, b being a vector"""
    return (a @ b[:, None]).squeeze(1)


@made_of("aten.dot")
def dot(a: Tensor, b: Tensor) -> Tensor:
    """a · b, of two vectors"""
    return (a[None] @ b[:, None]).reshape(())


@made_of("aten.addmv")
def addmv(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta · c + alpha · a b"""
    return _plus(c, mv(a, b), beta, alpha)


@made_of("aten.addr")
def addr(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta · c + alpha · a bᵀ, of two vectors"""
    return _plus(c, a[:, None] @ b[None], beta, alpha)


@made_of("aten.addbmm")
def addbmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta · c + alpha · the sum of all a[i] b[i]"""
    return _plus(c, (a @ b).sum(0), beta, alpha)


def _plus(c: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    product = product if alpha == 1 else alpha * product
    return product + c * beta if beta else product  # what counts for nothing may be NaN


@made_of("aten._trilinear")
def trilinear(*args: Any) -> Any:
    """nn.Bilinear: y[n, o] = sum over i and j of a[n, i] · w[o, i, j] · b[n, j]"""
    a, weight, b, *axes = args
    if axes[:4] != [[1, 3], [0], [1, 2], [2, 3]]:
        return NotImplemented
    outputs, inputs, others = weight.shape
    half = (a @ weight.transpose(0, 1).reshape(inputs, outputs * others)).unflatten(
        1, (outputs, -1)
    )
    return (half @ b[:, :, None]).squeeze(2)


@made_of("aten._cdist_forward", "aten._euclidean_dist")
def cdist(a: Tensor, b: Tensor, p: float = 2, _mode: int | None = None) -> Any:
    """The distance of each row of a from each row of b: |a - b|_p"""
    if a.shape[-2] * b.shape[-2] * a.numel() // max(a.shape[-2], 1) <= _MOST:
        return _length(a[..., :, None, :] - b[..., None, :, :], p, -1)
    if p != 2:
        return NotImplemented
    squares = (a * a).sum(-1, keepdim=True) + (b * b).sum(-1)[..., None, :]
    return (squares - 2 * (a @ b.mT)).clamp_min(0).sqrt()


def _length(x: Tensor, p: float, axes: Any, *more: Any, **options: Any) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(x, p, axes, *more, **options)
    return found


@made_of("aten.norm")
def norm(
    x: Tensor, p: float | None = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """|x|_p over the axes"""
    axes = dim or None  # for this call, no axes are all
    return _length(x, 2 if p is None else p, axes, keepdim, dtype=dtype)


# -- element by element ---------------------------------------------------------------------------


@made_of("aten.logaddexp")
def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(exp a + exp b)"""
    return torch.logsumexp(_beside(a, b), 0)


@made_of("aten.hypot")
def hypot(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(a² + b²)"""
    return _length(_beside(a, b), 2, 0)


def _beside(a: Tensor, b: Tensor) -> Tensor:
    """Two operands along a new first axis, in the type that they have together."""
    dtype = torch.result_type(a, b)
    return torch.stack(torch.broadcast_tensors(a.to(dtype), b.to(dtype)))


@made_of("aten.index_fill")
def index_fill(x: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    """x, with a value at some places of an axis"""
    there = torch.zeros_like(x, dtype=torch.bool).index_fill(dim, index, True)
    return torch.where(there, value, x)


# -- sums and choices -----------------------------------------------------------------------------


@made_of("aten.nansum")
def nansum(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """The sum over the axes, without what is NaN"""
    x = x.masked_fill(x.isnan(), 0)
    return x.sum(dtype=dtype) if not dim else x.sum(dim, keepdim, dtype=dtype)


@made_of("aten.aminmax")
def aminmax(x: Tensor, *, dim: int | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The smallest and the largest"""
    axes = () if dim is None else dim
    return x.amin(axes, keepdim), x.amax(axes, keepdim)


@made_of("aten.pixel_unshuffle")
def pixel_unshuffle(x: Tensor, factor: int) -> Any:
    """The pixels of each block put into channels"""
    *rest, channels, height, width = x.shape
    down, across = height // factor, width // factor
    if down * factor != height or across * factor != width:
        return NotImplemented  # and is refused
    blocks = x.reshape(-1, channels, down, factor, across, factor).permute(0, 1, 3, 5, 2, 4)
    return blocks.reshape(*rest, channels * factor**2, down, across)


# -- regions --------------------------------------------------------------------------------------


@made_of("torchvision.deform_conv2d")
def deform_conv2d(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    *options: Any,
) -> Tensor:
    """A convolution that looks beside its grid: samples at the offsets, times mask, times weights"""
    *pairs, groups, parts, masked = options
    stride, padding, dilation = zip(pairs[::2], pairs[1::2], strict=True)
    images, channels, height, width = x.shape
    outputs, _, *kernel = weight.shape
    out = offset.shape[2:]
    taps = kernel[0] * kernel[1]
    # Where each tap looks, in pixels: [images · parts, 2, taps, *out].
    lines = [
        torch.arange(n, device=x.device, dtype=x.dtype) * s - p
        for n, s, p in zip(out, stride, padding, strict=True)
    ]
    inside = [
        torch.arange(k, device=x.device, dtype=x.dtype) * d
        for k, d in zip(kernel, dilation, strict=True)
    ]
    places = torch.stack(torch.meshgrid(*lines, indexing="ij"))[:, None]
    steps = torch.stack(torch.meshgrid(*inside, indexing="ij")).reshape(2, taps, 1, 1)
    shifts = offset.reshape(images * parts, taps, 2, *out).transpose(1, 2)
    sizes = x.new_tensor([height, width]).reshape(2, 1, 1, 1)
    grid = (2 * (places + steps + shifts) + 1) / sizes - 1
    grid = grid.flip(1).reshape(images * parts, 2, taps * out[0], out[1]).permute(0, 2, 3, 1)
    seen = x.reshape(images * parts, channels // parts, height, width)
    seen = grid_sample(seen, grid, "bilinear", "zeros", align_corners=False)
    seen = seen.reshape(images, parts, channels // parts, taps, *out)
    if masked:
        seen = seen * mask.reshape(images, parts, 1, taps, *out)
    columns = seen.reshape(images, groups, channels // groups * taps, out[0] * out[1])
    rows = weight.reshape(groups, outputs // groups, -1)
    made = (rows @ columns).reshape(images, outputs, *out)
    return made + bias.reshape(-1, 1, 1)


@made_of("torchvision.ps_roi_align")
def ps_roi_align(
    x: Tensor, regions: Tensor, scale: float, height: int, width: int, ratio: int
) -> tuple[Tensor, Tensor]:
    """RoI align where each bin reads channels of its own"""
    # There, for else nobody could have called this; torchvision is no dependency.
    full = torch.ops.torchvision.roi_align(x, regions, scale, height, width, ratio, True)
    bins = full.reshape(len(full), -1, height, width, height, width)
    own = bins.diagonal(0, 2, 4).diagonal(0, 2, 3)
    channel = torch.arange(x.shape[1], device=x.device, dtype=torch.int32)
    return own, channel.reshape(-1, height, width).expand(own.shape)


# -- recurrent layers -----------------------------------------------------------------------------


def _lstm_cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """(h, c) of the next step, from all gates before their activations."""
    i, f, g, o = gates.chunk(4, 1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


@made_of("aten.mkldnn_rnn_layer")
def lstm_layer(x: Tensor, *args: Any) -> Any:
    """One LSTM layer in one direction: over time, the first axis, step by step"""
    w_x, w_h, b_x, b_h, h, c, reverse, sizes, mode, _, _, biases, *_ = args
    if sizes or mode != 2:
        return NotImplemented
    state, cell = h.reshape(h.shape[-2:]), c.reshape(c.shape[-2:])
    given = torch.nn.functional.linear(x, w_x, b_x if biases else None)
    states = []
    for step in reversed(given.unbind()) if reverse else given.unbind():
        gates = step + torch.nn.functional.linear(state, w_h, b_h if biases else None)
        state, cell = _lstm_cell(gates, cell)
        states.append(state)
    y = torch.stack(states[::-1] if reverse else states)
    return y, state.reshape(h.shape), cell.reshape(c.shape), x.new_empty(0)


def _gates(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a + b


@made_of("aten._thnn_fused_lstm_cell")
def lstm_cell(
    x: Tensor, h: Tensor, cell: Tensor, b_x: Tensor | None = None, b_h: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of an LSTM, from the two halves of its gates"""
    gates = _gates(x, b_x) + _gates(h, b_h)
    return (*_lstm_cell(gates, cell), gates)


@made_of("aten._thnn_fused_gru_cell")
def gru_cell(
    x: Tensor, h: Tensor, state: Tensor, b_x: Tensor | None = None, b_h: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step of a GRU, from the two halves of its gates"""
    (r, z, n), (r_h, z_h, n_h) = _gates(x, b_x).chunk(3, 1), _gates(h, b_h).chunk(3, 1)
    update = (z + z_h).sigmoid()
    new = (n + (r + r_h).sigmoid() * n_h).tanh()
    return new + update * (state - new), x.new_empty(0)
