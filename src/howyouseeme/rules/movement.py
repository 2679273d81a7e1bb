"""Calls that only move values: where each element came from, by the arguments, or by the same call on indices."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..links import Diagonal, Link, Pad, Permutation, Selection, Sparse
from ..links.matrices import sparse
from ..tape import Call, Value
from .branches import contents
from .registry import Refusal, Step, rule_of

rule = rule_of("movement")


@rule(
    "aten.view",
    "aten._unsafe_view",
    "aten.reshape",
    "aten._reshape_alias",
    "aten.flatten",
    "aten.unflatten",
    "aten.squeeze",
    "aten.unsqueeze",
    "aten.clone",
    "aten.contiguous",
    "aten.detach",
    "aten.alias",
    "aten.lift_fresh",
    "aten.dropout",
    "aten._to_copy",
    "aten.to",
)
def same(call: Call, output: Value) -> Step:
    """y = x in row-major order: nothing moves"""
    x = call.args[0]
    return Step([(x, Diagonal(x.shape, output.shape))])


# Arguments that say what goes where; every other tensor is contents.
_PLANS = {"index", "indices", "condition", "mask", "lengths"}
# Numbers that become contents.
_FILLERS = {"aten.masked_fill", "aten.fill", "aten.scatter"}


@rule(
    *"""
    aten.numpy_T aten.movedim aten.swapaxes
    aten.select aten.index aten.index_select aten.gather aten.take_along_dim
    aten.chunk aten.unbind aten.tensor_split
    aten.stack aten.expand aten.repeat aten.roll aten.flip aten.rot90 aten.unfold
    aten.reflection_pad1d aten.reflection_pad2d aten.reflection_pad3d
    aten.replication_pad1d aten.replication_pad2d aten.replication_pad3d
    aten.pixel_shuffle aten.channel_shuffle aten.native_channel_shuffle
    aten.upsample_nearest1d aten.upsample_nearest2d aten.upsample_nearest3d
    aten._upsample_nearest_exact1d aten._upsample_nearest_exact2d aten._upsample_nearest_exact3d
    aten.where aten.masked_fill aten.copy aten.slice_scatter aten.select_scatter aten.index_put
    aten.diagonal aten.fill aten.zero aten.im2col aten._unsafe_index aten.tril aten.triu
    aten.scatter aten.index_copy aten.masked_scatter aten.masked_select aten.take aten.diag_embed
    aten.diagonal_scatter aten.block_diag aten.embedding aten.diagonal_copy
    aten._pack_padded_sequence
    """.split()
)
def movement(call: Call, output: Value) -> Step:
    """y[i] = x[j] for the j that the call itself tells; padding and constants are bias"""
    if call.kwargs.get("reduce") or (
        call.name == "aten.index_put" and call.argument(3, "accumulate", False)
    ):
        return added(call, output)
    sources: list[tuple[Value, int]] = []
    total = 1  # 0 is for what is constant, as the calls themselves pad with zeros

    def index_of(item: Any) -> Any:
        """Numbers in place of contents: each value its own range, 0 for what is constant."""
        nonlocal total
        if isinstance(item, Value):
            start = next((first for value, first in sources if value is item), None)
            if start is None:
                start = total
                sources.append((item, total))
                total += item.numel
            count = torch.arange(item.numel, device=item.device, dtype=torch.float64)
            return (count + start).reshape(item.shape)
        if isinstance(item, Tensor):
            return torch.zeros_like(item, dtype=torch.float64)
        return item

    def numbers(name: str, item: Any) -> Any:
        if name in _PLANS:
            return item
        if name == "value" and call.name in _FILLERS and not isinstance(item, Value):
            return 0 if not isinstance(item, Tensor) else torch.zeros_like(item)
        return pytree.tree_map(index_of, item, is_leaf=lambda part: isinstance(part, Value))

    names = [argument.name for argument in call.op._schema.arguments]
    args = [numbers(name, item) for name, item in zip(names, call.args, strict=False)]
    kwargs = {name: numbers(name, item) for name, item in call.kwargs.items()}
    result = call.op(*args, **kwargs)
    if isinstance(result, (list, tuple)):
        result = result[output.output]
    return _selected(output, result.reshape(-1).long(), sources)


@rule("aten.scatter_add", "aten.scatter_reduce", "aten.index_add", "aten.index_reduce")
def added(call: Call, output: Value) -> Step:
    """y = x, and at each place the sum of what is sent there; or the mean, product, largest or smallest of all"""
    x, (sent, edges) = call.args[0], _sent(call, output)
    how, own = call.argument(4, "reduce", "sum"), call.argument(5, "include_self", True)
    if how not in {"sum", "add"} or not own:
        return _reduced(output, x, sent, edges, how, own)
    links: list[tuple[Value, Link]] = []
    if isinstance(x, Value):
        links.append((x, Diagonal(x.shape, output.shape)))
    if isinstance(sent, Value):
        factor = float(call.kwargs.get("alpha", 1))
        weight = torch.full(edges.shape[1:], factor, dtype=output.dtype, device=output.device)
        entries = sparse(edges, weight, (output.numel, sent.numel))
        links.append((sent, Sparse(sent.shape, output.shape, entries)))
    bias = [link.forward(source.data) for source, link in links]
    return Step(links, output.data - torch.stack(bias).sum(0) if len(links) < 2 else None)


def _sent(call: Call, output: Value) -> tuple[Any, Tensor]:
    """What a call sends to places of the output, and [2, n]: to which place each of its elements."""
    args = call.args[1:]
    place = torch.arange(output.numel, device=output.device).reshape(output.shape)
    if call.name == "aten.index_put":
        indices, sent = args[:2]
        to = torch.ops.aten.index(place, indices)
    elif call.name.startswith("aten.index"):
        axis, index, sent = args[:3]
        to = place.index_select(axis, index)
    else:
        axis, index, sent = args[:3]
        to = place.gather(axis, index)
    shape = sent.shape if isinstance(sent, (Value, Tensor)) else torch.Size()
    start = torch.arange(shape.numel(), device=output.device).reshape(shape)
    if call.name.startswith("aten.scatter"):  # which may send less than all
        start = start[tuple(slice(size) for size in to.shape[: len(shape)])]
    return sent, torch.stack([to.reshape(-1), start.expand(to.shape).reshape(-1)])


def _reduced(output: Value, x: Any, sent: Any, edges: Tensor, how: str, own: bool) -> Step:
    """y = what is made of all that is sent to a place, and of x there; without `own`, if nothing is sent."""
    y = output.data.reshape(-1)
    here = torch.arange(output.numel, device=output.device)
    if not own:
        here = here[torch.ones_like(here, dtype=torch.bool).index_fill(0, edges[0], False)]
    parts = [(x, torch.stack([here, here])), (sent, edges)]
    data = [contents(item, y).reshape(-1)[start] for item, (_, start) in parts]
    weights = _weights(how, torch.cat(data), torch.cat([here, edges[0]]), y)
    chosen = how in {"amax", "amin"}
    links: list[tuple[Value, Link]] = []
    for (item, (to, start)), weight in zip(
        parts, weights.split([len(here), edges.shape[1]]), strict=True
    ):
        if not isinstance(item, Value):
            continue
        if chosen:  # at each place one of all
            taken = torch.where(weight > 0, start, -1)
            index = torch.full_like(y, -1, dtype=torch.long).scatter_reduce(0, to, taken, "amax")
            links.append((item, Selection(item.shape, output.shape, index)))
        else:
            entries = sparse(torch.stack([to, start]), weight, (output.numel, item.numel))
            links.append((item, Sparse(item.shape, output.shape, entries)))
    made = [link.forward(source.data) for source, link in links]
    bias = output.data - torch.stack(made).sum(0) if len(links) < 2 else None
    return Step(links, bias, apart=chosen)


def _weights(how: str, data: Tensor, to: Tensor, y: Tensor) -> Tensor:
    """With which weight each of the data [n], sent to places [n], is in the sum that makes y."""
    if how in {"amax", "amin"}:  # the first that is y
        order = torch.arange(len(data), device=data.device)
        found = order.masked_fill(data != y[to], len(data))
        first = torch.full_like(y, len(data), dtype=torch.long).scatter_reduce(0, to, found, "amin")
        return (first[to] == order).to(y.dtype)
    if how in {"sum", "add"}:
        return torch.ones_like(data)
    weight = 1 / torch.zeros_like(y).index_add(0, to, torch.ones_like(data))[to]
    if how in {"prod", "multiply"}:  # the product of the others, as in `prod`
        zero = data == 0
        rest = torch.ones_like(y).scatter_reduce(0, to, data.masked_fill(zero, 1), "prod")
        zeros = torch.zeros_like(y).index_add(0, to, zero.to(y.dtype))
        others = zeros[to] == zero.to(y.dtype)
        weight = weight * others * rest[to] / data.masked_fill(zero, 1)
    return weight


@rule("aten.resize_as")
def resized(call: Call, output: Value) -> Step:
    """y = memory of the size of x: what lies there is constant"""
    if isinstance(call.args[0], Value):
        raise Refusal("only memory that holds constants may get another size")
    return Step([], output.data)


@rule("aten.max_unpool2d", "aten.max_unpool3d")
def unpool(call: Call, output: Value) -> Step:
    """y = x, each element where the maximum of its window was"""
    step = movement(call, output)
    dims = len(output.shape)
    for x, link in step.links:
        assert isinstance(link, Selection)
        link.centres = {
            axis: (torch.arange(output.shape[axis], device="cpu") + 0.5)
            * x.shape[axis]
            / output.shape[axis]
            - 0.5
            for axis in range(dims - (2 if call.name.endswith("2d") else 3), dims)
        }
    return step


def _stretch(x: Value, output: Value, axis: int, first: int) -> tuple[Value, Link]:
    """The link of a stretch along an axis: x begins at `first` of the output, which may be below 0."""
    margins = [0] * (2 * (len(x.shape) - axis % len(x.shape)))
    size, whole = x.shape[axis], output.shape[axis]
    margins[-2:] = first, whole - size - first
    return x, Pad(x.shape, output.shape, margins)


@rule("aten.permute")
def permute(call: Call, output: Value) -> Step:
    """y = x with its axes in another order"""
    x, axes = call.args[:2]
    dims = len(x.shape)
    return Step([(x, Permutation(x.shape, output.shape, [axis % dims for axis in axes]))])


@rule("aten.transpose", "aten.t")
def transpose(call: Call, output: Value) -> Step:
    """As `permute`, two axes changing places"""
    x = call.args[0]
    axes = list(range(len(x.shape)))
    if len(axes) > 1:
        one, other = call.argument(1, "dim0", 0), call.argument(2, "dim1", 1)
        axes[one], axes[other] = axes[other], axes[one]
    return Step([(x, Permutation(x.shape, output.shape, axes))])


@rule("aten.cat")
def cat(call: Call, output: Value) -> Step:
    """y = several x, one behind the other along an axis"""
    parts, axis = call.args[0], call.argument(1, "dim", 0)
    dims = len(output.shape)
    if any(len(part.shape) != dims for part in parts):  # an empty vector counts as nothing
        return movement(call, output)
    links, first, constant = [], 0, []
    for part in parts:
        size = part.shape[axis]
        if isinstance(part, Value):
            links.append(_stretch(part, output, axis, first))
        elif size:
            constant.append((first, size))
        first += size

    def between() -> Tensor:
        bias = torch.zeros_like(output.data)
        for start, size in constant:
            there = output.data.narrow(axis, start, size)
            bias.narrow(axis, start, size).copy_(there)
        return bias

    return Step(links, between if constant else None, apart=True)


@rule("aten.slice")
def slice_(call: Call, output: Value) -> Step:
    """y = a stretch of x along an axis"""
    x, axis = call.args[0], call.argument(1, "dim", 0)
    if call.argument(4, "step", 1) != 1:
        return movement(call, output)
    first, size = call.argument(2, "start") or 0, x.shape[axis]
    first = min(max(first + size if first < 0 else first, 0), size)
    return Step([_stretch(x, output, axis, -first)])


@rule("aten.narrow")
def narrow(call: Call, output: Value) -> Step:
    """y = a stretch of x along an axis"""
    x, axis, first = call.args[:3]
    if not isinstance(first, int):
        return movement(call, output)
    return Step([_stretch(x, output, axis, -(first % max(x.shape[axis], 1)))])


@rule("aten.split", "aten.split_with_sizes", "aten.unsafe_split")
def split(call: Call, output: Value) -> Step:
    """y = one of the stretches that x is cut into along an axis"""
    x, sizes, axis = call.args[0], call.args[1], call.argument(2, "dim", 0)
    before = output.output * sizes if isinstance(sizes, int) else sum(sizes[: output.output])
    return Step([_stretch(x, output, axis, -before)])


@rule("aten.constant_pad_nd")
def pad(call: Call, output: Value) -> Step:
    """y = x with a constant around it, or without its edges"""
    x, margins = call.args[:2]
    link = Pad(x.shape, output.shape, margins)

    def around() -> Tensor:
        inside = link.forward(torch.ones_like(x.data)) > 0
        return output.data.masked_fill(inside, 0)

    return Step([(x, link)], around if call.argument(2, "value", 0) else None)


@rule("aten.col2im")
def fold(call: Call, output: Value) -> Step:
    """y = sum of the windows of x, each at its place: the transpose of `im2col`"""
    x = call.args[0]
    window = call.args[2:]
    places = torch.arange(1, prod(output.shape) + 1, device=x.device, dtype=torch.float64)
    windows = torch.nn.functional.unfold(places.reshape(output.shape), *window)
    selection = Selection(output.shape, x.shape, windows.long() - 1)
    return Step([(x, selection.transposed())])


def _selected(output: Value, index: Tensor, sources: list[tuple[Value, int]]) -> Step:
    """The step of y[i] = the element `index[i]` of all sources, each counted from its own start."""
    first = min((start for _, start in sources), default=0)  # what is below is constant
    links: list[tuple[Value, Link]] = []
    for value, start in sources:
        mine = (index >= start) & (index < start + value.numel)
        if not mine.any():  # all of it was overwritten or left out
            continue
        local = torch.where(mine, index - start, -1)
        links.append((value, Selection(value.shape, output.shape, local)))
    constant = (index < first).reshape(output.shape)
    return Step(links, lambda: output.data.masked_fill(~constant, 0), apart=True)


@rule("hysm.pick")
def picked(call: Call, output: Value) -> Step:
    """y = the elements of x at some places"""
    source, index = call.args
    return _selected(output, index.reshape(-1), [(source, 0)])


def _positions(geometry: tuple[tuple[int, ...], tuple[int, ...], int]) -> Tensor:
    """Where in its storage each element of a tensor lies, in row-major order."""
    shape, strides, offset = geometry
    position = torch.full((1,), offset, device="cpu")
    for size, stride in zip(shape, strides, strict=True):
        position = (position[:, None] + torch.arange(size, device="cpu") * stride).reshape(-1)
    return position


@rule("aten.as_strided")
def as_strided(call: Call, output: Value) -> Step:
    """y is another view of the memory of x"""
    x, size, stride = call.args[:3]
    offset = call.argument(3, "storage_offset")
    here = _positions((x.shape, x.data.stride(), x.data.storage_offset()))
    offset = x.data.storage_offset() if offset is None else offset
    there = _positions((tuple(size), tuple(stride), offset))
    table = torch.full((int(max(here.max(), there.max())) + 1,), -1, device="cpu")
    table[here] = torch.arange(x.numel, device="cpu")
    if bool((table[there] < 0).any()):
        raise Refusal("only a view of the elements of its argument is supported")
    return _selected(output, table[there].to(x.device), [(x, 0)])


@rule("hysm.reread")
def reread(call: Call, output: Value) -> Step:
    """A tensor after in-place writes to memory that it shares: from the last write that covers it"""
    before, writes, (mine, *theirs) = call.args
    here = _positions(mine)
    written = [_positions(geometry) for geometry in theirs]
    last = max((int(p.max()) for p in (here, *written) if p.numel()), default=-1)
    table = torch.full((last + 1,), -1, device="cpu")
    sources: list[tuple[Value, int]] = []
    total = 0
    if isinstance(before, Value):
        sources.append((before, 0))
        table[here] = torch.arange(before.numel, device="cpu")
        total = before.numel
    for write, positions in zip(writes, written, strict=True):
        sources.append((write, total))
        table[positions] = torch.arange(total, total + write.numel, device="cpu")
        total += write.numel
    return _selected(output, table[here].to(output.device), sources)
