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
from torch.nn.functional import grid_sample, logsigmoid

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


@made_of("aten.dot", "aten.vdot")
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


@made_of("aten.linalg_cross")
def cross(a: Tensor, b: Tensor, *, dim: int = -1) -> Tensor:
    """The vector product along an axis of three: a[1] b[2] - a[2] b[1] and so on"""
    return a.roll(-1, dim) * b.roll(-2, dim) - a.roll(-2, dim) * b.roll(-1, dim)


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


@made_of("aten.xlogy")
def xlogy(a: Tensor | float, b: Tensor | float) -> Tensor:
    """a log b, and 0 where a is"""
    of = b if isinstance(b, Tensor) else torch.full_like(torch.as_tensor(a), b)
    nought = torch.as_tensor(a, device=of.device) == 0
    return (a * torch.where(nought, 1, of).log()).masked_fill(nought, 0)


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


@made_of("aten.trace")
def trace(x: Tensor) -> Tensor:
    """The sum of the diagonal"""
    return x.diagonal().sum()


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


@made_of("aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(
    table: Tensor,
    indices: Tensor,
    offsets: Tensor,
    _scale: bool = False,
    mode: int = 0,
    _sparse: bool = False,
    weights: Tensor | None = None,
    ends: bool = False,
    left_out: int = -1,
) -> Any:
    """The sum, mean or maximum of the rows of a table in each bag, perhaps times weights"""
    bags = len(offsets) - ends
    bag = (
        torch.searchsorted(
            offsets[:bags], torch.arange(len(indices), device=indices.device), right=True
        )
        - 1
    )
    used = indices != left_out
    rows, bag = table.index_select(0, indices[used]), bag[used]
    if weights is not None:
        rows = rows * weights[used, None]
    count = torch.bincount(bag, minlength=bags)
    made = rows.new_zeros(bags, table.shape[1])
    if mode == 2:
        made = made.scatter_reduce(
            0, bag[:, None].expand_as(rows), rows, "amax", include_self=False
        )
    else:
        made = made.index_add(0, bag, rows)
    if mode == 1:
        made = made / count.clamp(min=1)[:, None]
    return made, bag, count, count.new_empty(0)


# -- losses ---------------------------------------------------------------------------------------


def _reduced(loss: Tensor, reduction: int) -> Tensor:
    """Each element, their mean or their sum, by PyTorch's numbers for these: 0, 1, 2."""
    return (loss.mean() if reduction == 1 else loss.sum()) if reduction else loss


@made_of("aten.nll_loss_forward", "aten.nll_loss2d_forward")
def nll_loss(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignored: int
) -> tuple[Tensor, Tensor]:
    """-w[c] · x[c] of the class c of each row; the mean is over the weights of these"""
    axis = min(x.dim() - 1, 1)
    left_out = target == ignored
    place = target.masked_fill(left_out, 0)
    loss = -x.gather(axis, place.unsqueeze(axis)).squeeze(axis).masked_fill(left_out, 0)
    if weight is None:
        counts = (~left_out).to(x.dtype)
    else:
        counts = weight[place].masked_fill(left_out, 0)
        loss = loss * counts
    if not reduction:
        return loss, x.new_zeros(())
    total = counts.sum()
    return (loss.sum() if reduction == 2 else loss.sum() / total), total


@made_of("aten.mse_loss")
def mse_loss(x: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    """(x - t)²"""
    return _reduced((x - target) ** 2, reduction)


@made_of("aten.smooth_l1_loss")
def smooth_l1_loss(x: Tensor, target: Tensor, reduction: int = 1, beta: float = 1) -> Tensor:
    """d² / 2 beta where d = |x - t| < beta, d - beta / 2 elsewhere"""
    apart = (x - target).abs()
    if beta:
        apart = torch.where(apart < beta, apart**2 * (0.5 / beta), apart - 0.5 * beta)
    return _reduced(apart, reduction)


@made_of("aten.huber_loss")
def huber_loss(x: Tensor, target: Tensor, reduction: int = 1, delta: float = 1) -> Tensor:
    """d² / 2 where d = |x - t| <= delta, delta (d - delta / 2) elsewhere"""
    apart = (x - target).abs()
    loss = torch.where(apart <= delta, 0.5 * apart**2, delta * (apart - 0.5 * delta))
    return _reduced(loss, reduction)


@made_of("aten.binary_cross_entropy")
def binary_cross_entropy(
    x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    """-w (t log x + (1 - t) log(1 - x)), no logarithm below -100"""
    never, always = x == 0, x == 1  # of which a line through minus infinity would make NaN
    yes = x.masked_fill(never, 1).log().clamp_min(-100).masked_fill(never, -100)
    no = (-x.masked_fill(always, 0)).log1p().clamp_min(-100).masked_fill(always, -100)
    return _reduced(_either(yes, no, target, weight), reduction)


@made_of("aten.binary_cross_entropy_with_logits")
def binary_cross_entropy_with_logits(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    positive: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    """-w (p t log sigmoid(x) + (1 - t) log sigmoid(-x))"""
    yes, no = logsigmoid(x), logsigmoid(-x)
    return _reduced(
        _either(yes if positive is None else yes * positive, no, target, weight), reduction
    )


def _either(yes: Tensor, no: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    loss = -(target * yes + (1 - target) * no)
    return loss if weight is None else loss * weight


@made_of("aten.soft_margin_loss")
def soft_margin_loss(x: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    """log(1 + exp(-t x)), also where the exponential overflows"""
    return _reduced(-logsigmoid(target * x), reduction)


@made_of("aten.multi_margin_loss")
def multi_margin_loss(
    x: Tensor,
    target: Tensor,
    p: float = 1,
    margin: float = 1,
    weight: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    """Mean over the n classes of w[c] max(0, margin - x[c] + x[j])^p, without the class c of the row"""
    axis = x.dim() - 1
    place = target.reshape(x.shape[:-1]).unsqueeze(axis)
    own = torch.zeros_like(x, dtype=torch.bool).scatter(axis, place, True)
    gap = (x - x.gather(axis, place) + margin).clamp_min(0).masked_fill(own, 0)
    gap = gap if p == 1 else gap**p
    if weight is not None:
        gap = gap * weight[place]
    return _reduced(gap.mean(axis), reduction)


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
