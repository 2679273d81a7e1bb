"""Every rule against a slow reference in matrix form, in float64 (see naive.py)."""
# ruff: noqa: E731 - a table of lambdas is what this is

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from naive import Map
from networks import Made
from torch import Tensor, nn
from torchvision import ops

from howyouseeme import rules
from howyouseeme.backtrack import plan
from howyouseeme.errors import ModelError, UnsupportedCallError
from howyouseeme.links import (
    BatchedMatrix,
    Convolution,
    Diagonal,
    Link,
    Matrix,
    Moves,
    Pad,
    Permutation,
    Selection,
    Separable,
    Sparse,
)
from howyouseeme.rules import Step, rule
from howyouseeme.rules.gates import _MOVING as MOVING
from howyouseeme.rules.registry import rule_of
from howyouseeme.tape import Call, Tape, Value, record
from howyouseeme.tape.appended import pick as picking

aten = torch.ops.aten
EXACT = {"rtol": 1e-12, "atol": 1e-12}


# -- the cases ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One way of making a call, and the maps from each input to the output that it must have.

    `run` is recorded as the forward of a model. Where a device never makes the call as such (on the
    CPU, `aten.linear` becomes `aten.addmm`), `run` is an `Alone`: a tape with this one call on it.
    """

    name: str
    label: str
    run: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    want: Callable[[], Sequence[Map | None]]  # None: nothing is walked back to that input

    def __repr__(self) -> str:
        return f"{self.name.removeprefix('aten.')}-{self.label}"

    def tape(self) -> Tape:
        if isinstance(self.run, Alone):
            return self.run.tape(self.name, self.inputs)
        return record(Made(self.run), self.inputs)


class Alone:
    """A tape with a single call on it, under whatever name."""

    def __init__(self, op: Any, *args: Any, pick: int = 0, **kwargs: Any) -> None:
        self.op, self.args, self.kwargs, self.pick = op, args, kwargs, pick

    def tape(self, name: str, inputs: tuple[Tensor, ...]) -> Tape:
        values = [Value(x, i) for i, x in enumerate(inputs)]

        def lift(item: Any) -> Any:
            if isinstance(item, (list, tuple)):
                return [lift(part) for part in item]
            return next((v for v in values if v.data is item), item)

        result = self.op(*self.args, **self.kwargs)
        call = Call(name, self.op, tuple(map(lift, self.args)), self.kwargs, 0)
        results = result if isinstance(result, (list, tuple)) else [result]
        call.outputs = tuple(Value(item, 9, call, i) for i, item in enumerate(results))
        return Tape(values, [call], call.outputs[self.pick])


CASES: list[Case] = []


def case(
    name: str,
    label: str,
    run: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    want: Callable[[], Map | Sequence[Map | None]],
) -> None:
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)

    def maps() -> Sequence[Map | None]:
        found = want()
        return [found] if isinstance(found, Map) else found

    CASES.append(Case(f"aten.{name}" if "." not in name else name, label, run, inputs, maps))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Float64 numbers of both signs, with zeros and with ties."""
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2).round(decimals=0) / 2


def weights(*shape: int, seed: int = 0) -> Tensor:
    """Float64 numbers of both signs, all different, with one zero."""
    generator = torch.Generator().manual_seed(seed + 11 * sum(shape))
    result = torch.randn(shape, generator=generator, dtype=torch.float64)
    result.view(-1)[0] = 0
    return result


def probed(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], list[Map]]:
    """The maps of a call that moves elements, from running it on one-hot pictures."""

    def run(*arrays: np.ndarray) -> np.ndarray:
        return function(*(torch.from_numpy(a.copy()) for a in arrays)).contiguous().numpy()

    def maps() -> list[Map]:
        arrays = [x.contiguous().numpy() for x in inputs]
        found = [naive.probed(run, arrays, i) for i in range(len(arrays))]
        return [found[0], *(Map(m.matrix, 0 * m.bias) for m in found[1:])]  # one bias for all

    return maps


def names_of(op: Any) -> set[str]:
    """What the arguments of a call are named, which PyTorch adds to."""
    return {argument.name for argument in op._schema.arguments}


LAST = torch.channels_last

# Convolutions: dims, channels in and out, kernel, stride, padding, dilation, groups.
for number, (space, channels, outputs, kernel, stride, padding, dilation, groups) in enumerate(
    [
        ((5,), 2, 3, (3,), (1,), (0,), (1,), 1),
        ((7,), 2, 4, (3,), (2,), (2,), (2,), 2),
        ((6,), 3, 3, (2,), (3,), (1,), (1,), 3),
        ((4, 5), 2, 3, (1, 1), (1, 1), (0, 0), (1, 1), 1),
        ((4, 5), 2, 3, (3, 3), (1, 1), (1, 1), (1, 1), 1),
        ((5, 4), 2, 3, (3, 2), (2, 1), (1, 0), (1, 2), 1),
        ((5, 6), 4, 4, (2, 3), (2, 3), (0, 1), (2, 1), 2),
        ((4, 4), 3, 6, (3, 3), (2, 2), (1, 1), (1, 1), 3),
        ((3, 3), 2, 2, (3, 3), (1, 1), (2, 2), (1, 1), 1),
        ((6, 5), 1, 2, (2, 2), (4, 3), (0, 0), (1, 1), 1),
        ((3, 4, 2), 2, 2, (2, 3, 1), (1, 2, 1), (1, 1, 0), (1, 1, 2), 1),
        ((3, 3, 4), 2, 2, (2, 2, 2), (2, 1, 2), (0, 1, 1), (1, 1, 1), 2),
    ]
):
    dims = len(space)
    x = numbers(2, channels, *space)
    w, b = weights(outputs, channels // groups, *kernel), weights(outputs)
    bias = b if number % 2 else None
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    run = [F.conv1d, F.conv2d, F.conv3d][dims - 1]
    for form in ["plain", *(["channels_last"] if dims == 2 else [])]:
        case(
            "convolution",
            f"{dims}d-{number}-{form}",
            lambda x, run=run, w=w, bias=bias, options=options: run(x, w, bias, **options),
            x.to(memory_format=LAST) if form == "channels_last" else x,
            lambda x=x, w=w, bias=bias, options=options: naive.convolution(
                x.shape, w.numpy(), None if bias is None else bias.numpy(), **options
            ),
        )

# TorchScript calls the convolution below it, with flags of the backends at the end.
SCRIPTED = numbers(2, 2, 4, 5), weights(3, 2, 3, 3), weights(3)
case(
    "_convolution",
    "torchscript",
    Alone(
        torch.ops.aten._convolution.default,
        *SCRIPTED,
        *([2, 1], [1, 0], [1, 1], False, [0, 0], 1),
        *(False, False, True, True),
    ),
    SCRIPTED[0],
    lambda: naive.convolution(
        SCRIPTED[0].shape,
        SCRIPTED[1].numpy(),
        SCRIPTED[2].numpy(),
        stride=(2, 1),
        padding=(1, 0),
        dilation=(1, 1),
        groups=1,
    ),
)

# Transposed convolutions; the last of each line is the output padding.
for number, (
    space,
    channels,
    outputs,
    kernel,
    stride,
    padding,
    dilation,
    groups,
    extra,
) in enumerate(
    [
        ((4,), 2, 3, (3,), (2,), (1,), (1,), 1, (1,)),
        ((4,), 4, 2, (2,), (3,), (0,), (2,), 2, (2,)),
        ((4,), 2, 2, (3,), (1,), (0,), (2,), 1, (1,)),
        ((3, 4), 2, 3, (3, 3), (1, 1), (0, 0), (1, 1), 1, (0, 0)),
        ((3, 4), 2, 3, (3, 2), (2, 3), (1, 0), (1, 2), 1, (1, 2)),
        ((3, 3), 4, 4, (3, 3), (2, 2), (1, 1), (1, 1), 4, (1, 0)),
        ((2, 3), 4, 6, (2, 2), (2, 2), (0, 0), (1, 1), 2, (0, 0)),
        ((2, 3, 2), 2, 2, (2, 1, 3), (2, 1, 1), (0, 0, 1), (1, 1, 1), 1, (1, 0, 0)),
    ]
):
    dims = len(space)
    x = numbers(2, channels, *space)
    w, b = weights(channels, outputs // groups, *kernel), weights(outputs)
    bias = b if number % 2 else None
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    options["output_padding"] = extra
    run = [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d][dims - 1]
    case(
        "convolution",
        f"transposed-{dims}d-{number}",
        lambda x, run=run, w=w, bias=bias, options=options: run(x, w, bias, **options),
        x,
        lambda x=x, w=w, bias=bias, options=options: naive.transposed_convolution(
            x.shape, w.numpy(), None if bias is None else bias.numpy(), **options
        ),
    )

# A computed kernel: half for the input and half for the kernel, each as if the other were constant.
for number, (stride, padding, dilation, groups) in enumerate(
    [((1, 1), (0, 0), (1, 1), 1), ((2, 1), (1, 0), (1, 2), 1), ((1, 2), (1, 1), (1, 1), 2)]
):
    x, w, b = numbers(1, 4, 5, 6), weights(6, 4 // groups, 2, 3), weights(6)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    run = lambda x, w, b, o=options: F.conv2d(x, w, b, **o)
    from_x = lambda x=x, w=w, b=b, o=options: naive.convolution(x.shape, w.numpy(), b.numpy(), **o)
    from_w = lambda x=x, w=w, o=options: naive.probed(
        lambda v: F.conv2d(x, torch.from_numpy(v.copy()), **o).numpy(), [w.numpy()]
    )
    to_bias = lambda x=x, w=w, b=b, o=options: naive.probed(
        lambda v: F.conv2d(x * 0, w, torch.from_numpy(v.copy()), **o).numpy(), [b.numpy()]
    )
    case(
        "convolution",
        f"with a kernel-{number}",
        lambda x, w, r=run, b=b: r(x, w, b),
        (x, w),
        lambda f=from_x, g=from_w: [
            Map(f().matrix / 2, f().bias),
            Map(g().matrix / 2, 0 * g().bias),
        ],
    )
    case(
        "convolution",
        f"a kernel alone-{number}",
        lambda w, b, r=run, x=x: r(x, w, b),
        (w, b),
        lambda g=from_w, t=to_bias: [g(), t()],
    )
# Weights of attention over kernels are frozen, and so is the kernel that they make.
EXPERTS = weights(2, 3 * 2 * 2 * 2)


def mixed(x: Tensor) -> Tensor:
    shares = x.mean((2, 3)).sum(1, keepdim=True).mul(torch.tensor([1.0, -2.0]).double()).sigmoid()
    return F.conv2d(x, (shares @ EXPERTS).view(3, 2, 2, 2))


x = numbers(1, 2, 4, 3)
SHARES = (x.mean((2, 3)).sum() * torch.tensor([1.0, -2.0]).double()).sigmoid()
case(
    "convolution",
    "of experts",
    mixed,
    x,
    lambda: naive.convolution(
        (1, 2, 4, 3),
        (SHARES @ EXPERTS).view(3, 2, 2, 2).numpy(),
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
    ),
)

# Linear layers.
W, B = weights(4, 3), weights(4)
for shape in [(2, 3), (1, 3), (2, 2, 3)]:
    x = numbers(*shape)
    case(
        "addmm",
        f"{len(shape)}d",
        lambda x: F.linear(x, W, B),
        x,
        lambda shape=shape: naive.linear(shape, W.numpy(), B.numpy()),
    )
    case(
        "mm",
        f"{len(shape)}d",
        lambda x: F.linear(x, W),
        x,
        lambda shape=shape: naive.linear(shape, W.numpy()),
    )
    for bias, bias_label in [(B, "bias"), (None, "no-bias")]:
        case(
            "linear",
            f"{len(shape)}d-{bias_label}",
            Alone(aten.linear.default, x, W, bias),
            x,
            lambda shape=shape, bias=bias: naive.linear(
                shape, W.numpy(), None if bias is None else bias.numpy()
            ),
        )
x = numbers(2, 3)
case(
    "addmm",
    "alpha-beta",
    lambda x: torch.addmm(B, x, W.T, beta=0.5, alpha=-3),
    x,
    lambda: naive.linear((2, 3), -3 * W.numpy(), B.numpy() / 2),
)
x = numbers(2, 3, 4)
case(
    "bmm",
    "transposed input",
    lambda x: F.linear(x.transpose(1, 2), W),
    x,
    lambda: naive.compose(
        naive.linear((2, 4, 3), W.numpy()),
        probed(lambda x: x.transpose(1, 2), numbers(2, 3, 4))()[0],
    ),
)
for name, call, mean in [("mean", torch.mean, True), ("sum", torch.sum, False)]:
    x = numbers(2, 2, 3, 4)
    for axes in [(2, 3), (-1,), (1,), (0, 1, 2, 3), (3, 1)]:
        for keep in (False, True):
            case(
                name,
                f"{axes}-{keep}",
                lambda x, call=call, axes=axes, keep=keep: call(x, axes, keepdim=keep),
                x.to(memory_format=LAST) if keep else x,
                lambda x=x, axes=axes, mean=mean: naive.total(x.shape, [a % 4 for a in axes], mean),
            )
    case(name, "all", call, x, lambda x=x, mean=mean: naive.total(x.shape, range(4), mean))

# Average pooling: kernel, stride, padding, ceil_mode, count_include_pad, divisor_override.
POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
for number, (space, kernel, stride, padding, ceil_mode, include, divisor) in enumerate(
    [
        ((4, 6), (2, 2), (2, 2), (0, 0), False, True, None),
        ((5, 6), (3, 2), (2, 1), (1, 0), False, True, None),
        ((5, 6), (3, 3), (2, 2), (1, 1), False, False, None),
        ((5, 6), (3, 3), (2, 3), (1, 1), True, True, None),
        ((6, 5), (3, 2), (2, 2), (0, 1), True, False, None),
        ((4, 4), (4, 3), (3, 3), (2, 1), True, True, None),
        ((5, 5), (3, 2), (1, 2), (1, 1), False, True, 5),
        ((5, 6), (2, 3), (2, 2), (1, 1), True, False, 7),
        ((3, 4, 3), (2, 2, 3), (1, 2, 2), (1, 0, 1), True, False, None),
        ((3, 4, 3), (2, 2, 2), (2, 2, 2), (1, 1, 1), False, True, 3),
    ]
):
    dims = len(space)
    x = numbers(2, 2, *space)
    arguments = (kernel, stride, padding, ceil_mode, include, divisor)
    for form in ["plain", *(["channels_last"] if dims == 2 else [])]:
        case(
            f"avg_pool{dims}d",
            f"{number}-{form}",
            lambda x, dims=dims, arguments=arguments: POOL[dims](x, *arguments),
            x.to(memory_format=LAST) if form == "channels_last" else x,
            lambda x=x, a=arguments: naive.average_pool(
                x.shape,
                a[0],
                stride=a[1],
                padding=a[2],
                ceil_mode=a[3],
                count_include_pad=a[4],
                divisor_override=a[5],
            ),
        )
x = numbers(2, 4, 5)
case(
    "avg_pool2d",
    "without a batch",
    lambda x: F.avg_pool2d(x, 2),
    x,
    lambda: naive.average_pool((2, 4, 5), (2, 2), stride=(2, 2), padding=(0, 0)),
)
x = numbers(2, 2, 7)
for number, (ceil_mode, include) in enumerate([(False, True), (True, True), (True, False)]):
    arguments = ([3], [2], [1], ceil_mode, include)
    want = lambda x=x, c=ceil_mode, i=include: naive.average_pool(
        x.shape, (3,), stride=(2,), padding=(1,), ceil_mode=c, count_include_pad=i
    )
    case("avg_pool1d", f"{number}", Alone(aten.avg_pool1d.default, x, *arguments), x, want)
    case("avg_pool2d", f"of 1d-{number}", lambda x, a=arguments: F.avg_pool1d(x, *a), x, want)
for space, outputs in [((5, 7), (2, 3)), ((4, 6), (2, 2)), ((2, 3), (3, 4)), ((3, 4), (3, 1))]:
    x = numbers(2, 2, *space)
    want = lambda x=x, o=outputs: naive.adaptive_average_pool(x.shape, o)
    pool = lambda x, o=outputs: F.adaptive_avg_pool2d(x, o)
    case("_adaptive_avg_pool2d", f"{space}-{outputs}", pool, x, want)
    case("_adaptive_avg_pool2d", f"{space}-{outputs}-last", pool, x.to(memory_format=LAST), want)
    alone = Alone(aten.adaptive_avg_pool2d.default, x, list(outputs))
    case("adaptive_avg_pool2d", f"{space}-{outputs}", alone, x, want)
x = numbers(2, 2, 7)
case(
    "adaptive_avg_pool1d",
    "7-3",
    Alone(aten.adaptive_avg_pool1d.default, x, [3]),
    x,
    lambda: naive.adaptive_average_pool((2, 2, 7), (3,)),
)
case(
    "_adaptive_avg_pool3d",
    "3d",
    lambda x: F.adaptive_avg_pool3d(x, (2, 3, 2)),
    numbers(2, 1, 3, 4, 4),
    lambda: naive.adaptive_average_pool((2, 1, 3, 4, 4), (2, 3, 2)),
)

# Max pooling: kernel, stride, padding, dilation, ceil_mode. The numbers have ties.
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
for number, (space, kernel, stride, padding, dilation, ceil_mode) in enumerate(
    [
        ((4, 6), (2, 2), (2, 2), (0, 0), (1, 1), False),
        ((5, 6), (3, 3), (2, 2), (1, 1), (1, 1), False),
        ((5, 6), (3, 2), (2, 3), (1, 0), (1, 1), True),
        ((6, 6), (2, 3), (1, 2), (1, 1), (2, 2), False),
        ((3, 4, 4), (2, 2, 3), (1, 2, 2), (1, 0, 1), (1, 1, 1), True),
        ((4, 3, 4), (2, 2, 2), (2, 1, 2), (0, 1, 0), (2, 1, 1), False),
    ]
):
    dims = len(space)
    arguments = (kernel, stride, padding, dilation, ceil_mode)
    for form in ["random", "constant", *(["channels_last"] if dims == 2 else [])]:
        x = numbers(2, 2, *space)
        x = torch.full_like(x, -1.5) if form == "constant" else x
        case(
            f"max_pool{dims}d_with_indices",
            f"{number}-{form}",
            lambda x, dims=dims, arguments=arguments: MAX_POOL[dims](x, *arguments),
            x.to(memory_format=LAST) if form == "channels_last" else x,
            lambda x=x, a=arguments: naive.max_pool(
                x.numpy(), a[0], stride=a[1], padding=a[2], dilation=a[3], ceil_mode=a[4]
            ),
        )
for number, (kernel, stride, padding, dilation) in enumerate([(2, 2, 0, 1), (3, 2, 1, 2)]):
    x = numbers(2, 2, 7)
    want = lambda x=x, a=(kernel, stride, padding, dilation): naive.max_pool(
        x.numpy(), a[:1], stride=a[1:2], padding=a[2:3], dilation=a[3:4]
    )
    arguments = ([kernel], [stride], [padding], [dilation])
    case("max_pool1d", f"{number}", Alone(aten.max_pool1d.default, x, *arguments), x, want)
    pool = lambda x, a=(kernel, stride, padding, dilation): F.max_pool1d(x, *a)
    case("max_pool2d_with_indices", f"of 1d-{number}", pool, x, want)
for name, pool, shape, outputs in [
    ("adaptive_max_pool2d", F.adaptive_max_pool2d, (2, 2, 5, 7), (2, 3)),
    ("adaptive_max_pool2d", F.adaptive_max_pool2d, (2, 2, 4, 3), (1, 1)),
    ("adaptive_max_pool3d", F.adaptive_max_pool3d, (2, 1, 3, 4, 5), (2, 2, 3)),
]:
    x = numbers(*shape)
    case(
        name,
        f"{outputs}",
        lambda x, pool=pool, o=outputs: pool(x, o),
        x,
        lambda x=x, o=outputs: naive.adaptive_max_pool(x.numpy(), o),
    )
for name, pool, space, kernel, outputs in [
    ("fractional_max_pool2d", F.fractional_max_pool2d, (5, 7), (2, 3), (3, 4)),
    ("fractional_max_pool2d", F.fractional_max_pool2d, (6, 6), (3, 2), (1, 5)),
    ("fractional_max_pool3d", F.fractional_max_pool3d, (4, 6, 5), (2, 2, 1), (2, 3, 3)),
]:
    x, draws = numbers(2, 2, *space), weights(2, 2, len(space)).sigmoid()
    lines = draws.flip(-1) if len(space) == 2 else draws  # in 2-d, the last axis comes first
    case(
        name,
        f"{outputs}",
        lambda x, p=pool, k=kernel, o=outputs, d=draws: p(x, k, o, _random_samples=d),
        x,
        lambda x=x, k=kernel, o=outputs, d=lines: naive.fractional_max_pool(
            x.numpy(), k, o, d.numpy()
        ),
    )
for name, label, run, axes in [
    ("amax", "space", lambda x: x.amax((2, 3)), (2, 3)),
    ("amax", "keep", lambda x: x.amax((-1, 1), keepdim=True), (1, 3)),
    ("amax", "all", lambda x: x.amax(), (0, 1, 2, 3)),
    ("max", "all", lambda x: x.max(), (0, 1, 2, 3)),
    ("max", "dim", lambda x: x.max(2).values, (2,)),
    ("max", "keep", lambda x: x.max(-1, keepdim=True)[0], (3,)),
]:
    x = numbers(2, 2, 3, 4)
    case(name, label, run, x, lambda x=x, axes=axes: naive.maximum_over(x.numpy(), axes))

# Interpolation.
for space, outputs, align, factors in [
    ((3, 4), (6, 8), False, (None, None)),
    ((3, 4), (5, 7), True, (None, None)),
    ((5, 6), (2, 4), False, (None, None)),
    ((5, 6), (3, 1), True, (None, None)),
    ((3, 4), (7, 6), False, (2.5, 1.7)),
]:
    x = numbers(2, 2, *space)
    if factors[0]:
        run = lambda x, f=factors: F.interpolate(
            x, scale_factor=f, mode="bilinear", recompute_scale_factor=False
        )
    else:
        run = lambda x, o=outputs, a=align: F.interpolate(x, o, mode="bilinear", align_corners=a)
    want = lambda x=x, o=outputs, a=align, f=factors: naive.interpolation(x.shape, o, a, f)
    case("upsample_bilinear2d", f"{space}-{outputs}-{align}", run, x, want)
    case("upsample_bilinear2d", f"{space}-{outputs}-last", run, x.to(memory_format=LAST), want)
for space, outputs in [((3, 4), (6, 5)), ((7, 6), (3, 2))]:
    case(
        "_upsample_bilinear2d_aa",
        f"{space}-{outputs}",
        lambda x, o=outputs: F.interpolate(x, o, mode="bilinear", antialias=True),
        numbers(2, 2, *space),
        lambda s=space, o=outputs: naive.antialiased((2, 2, *s), o),
    )
for align in (False, True):
    case(
        "upsample_linear1d",
        f"{align}",
        lambda x, a=align: F.interpolate(x, 7, mode="linear", align_corners=a),
        numbers(2, 2, 4),
        lambda a=align: naive.interpolation((2, 2, 4), (7,), a),
    )
    case(
        "upsample_trilinear3d",
        f"{align}",
        lambda x, a=align: F.interpolate(x, (3, 2, 4), mode="trilinear", align_corners=a),
        numbers(2, 1, 2, 3, 2),
        lambda a=align: naive.interpolation((2, 1, 2, 3, 2), (3, 2, 4), a),
    )
for exact, mode in [(False, "nearest"), (True, "nearest-exact")]:
    for space, outputs in [
        ((3,), (7,)),
        ((3, 4), (6, 5)),
        ((5, 4), (2, 3)),
        ((2, 3, 2), (3, 2, 4)),
    ]:
        prefix = "_upsample_nearest_exact" if exact else "upsample_nearest"
        case(
            f"{prefix}{len(space)}d",
            f"{space}-{outputs}",
            lambda x, o=outputs, mode=mode: F.interpolate(x, o, mode=mode),
            numbers(2, 2, *space),
            lambda s=space, o=outputs, e=exact: naive.nearest((2, 2, *s), o, e),
        )


# Element by element: the arguments of the call, and f as Python writes it.
def _sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


def _softplus(v: float) -> float:
    return math.log1p(math.exp(v))


def _clip(v: float, low: float, high: float) -> float:
    return min(max(v, low), high)


def _gelu_tanh(v: float) -> float:
    return v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def _quantized(v: float) -> float:
    return (_clip(round(v / 0.5) + 2, 0, 6) - 2) * 0.5


def _step(v: float) -> float:
    return 0.25 if v == 0 else float(v > 0)


ANY = torch.tensor([[-2.5, -1, -0.5, 0], [0.3, 0.5, 0.5, 3.7]], dtype=torch.float64)
SMALL = ANY / 4
ABOVE = ANY.abs() + 0.25
BEYOND = ANY.abs() + 1.25
ELEMENTWISE: list[tuple[str, Tensor, tuple[Any, ...], Callable[[float], float]]] = [
    ("abs", ANY, (), abs),
    ("acos", SMALL, (), math.acos),
    ("acosh", BEYOND, (), math.acosh),
    ("asin", SMALL, (), math.asin),
    ("asinh", ANY, (), math.asinh),
    ("atan", ANY, (), math.atan),
    ("atanh", SMALL, (), math.atanh),
    ("ceil", ANY, (), math.ceil),
    ("celu", ANY, (1.3,), lambda v: v if v > 0 else 1.3 * math.expm1(v / 1.3)),
    ("clamp", ANY, (-0.5, 0.7), lambda v: _clip(v, -0.5, 0.7)),
    ("clamp", ANY, (0.4, 2), lambda v: _clip(v, 0.4, 2)),
    ("clamp", ANY, (torch.tensor(-0.5), torch.tensor(2.0)), lambda v: _clip(v, -0.5, 2)),
    ("clamp_max", ANY, (0.4,), lambda v: min(v, 0.4)),
    ("clamp_min", ANY, (0.4,), lambda v: max(v, 0.4)),
    ("copysign", ANY, (-2.0,), lambda v: -abs(v)),
    ("cos", ANY, (), math.cos),
    ("cosh", ANY, (), math.cosh),
    ("deg2rad", ANY, (), math.radians),
    ("elu", ANY, (1.5,), lambda v: v if v > 0 else 1.5 * math.expm1(v)),
    ("erf", ANY, (), math.erf),
    ("erfc", ANY, (), math.erfc),
    ("erfinv", SMALL, (), lambda v: statistics.NormalDist().inv_cdf((v + 1) / 2) / math.sqrt(2)),
    ("exp", ANY, (), math.exp),
    ("exp2", ANY, (), lambda v: 2**v),
    ("expm1", ANY, (), math.expm1),
    ("fake_quantize_per_tensor_affine_cachemask", ANY, (0.5, 2, 0, 6), _quantized),
    (
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
        ANY,
        (torch.tensor(0.5), torch.tensor(2), torch.tensor(1), 0, 6),
        _quantized,
    ),
    ("floor", ANY, (), math.floor),
    ("floor_divide", ANY, (0.4,), lambda v: v // 0.4),
    ("fmod", ANY, (0.4,), lambda v: math.fmod(v, 0.4)),
    ("frac", ANY, (), lambda v: math.modf(v)[0]),
    ("gelu", ANY, (), lambda v: v / 2 * (1 + math.erf(v / math.sqrt(2)))),
    ("hardshrink", ANY, (0.5,), lambda v: v if abs(v) > 0.5 else 0),
    ("hardsigmoid", ANY, (), lambda v: _clip(v + 3, 0, 6) / 6),
    ("hardswish", ANY, (), lambda v: v * _clip(v + 3, 0, 6) / 6),
    ("hardtanh", ANY, (-1, 2), lambda v: _clip(v, -1, 2)),
    ("heaviside", ANY, (torch.tensor(0.25, dtype=torch.float64),), _step),
    (
        "i0",
        ANY,
        (),
        lambda v: math.fsum((v / 2) ** (2 * k) / math.factorial(k) ** 2 for k in range(30)),
    ),
    ("leaky_relu", ANY, (0.1,), lambda v: v if v > 0 else 0.1 * v),
    ("lgamma", ABOVE, (), math.lgamma),
    ("log", ABOVE, (), math.log),
    ("log10", ABOVE, (), math.log10),
    ("log1p", ABOVE, (), math.log1p),
    ("log2", ABOVE, (), math.log2),
    ("log_sigmoid_forward", ANY, (), lambda v: -_softplus(-v)),
    ("logit", SMALL.abs() / 2 + 0.2, (), lambda v: math.log(v / (1 - v))),
    ("nan_to_num", ANY, (), float),
    ("mish", ANY, (), lambda v: v * math.tanh(_softplus(v))),
    ("pow", ANY, (3,), lambda v: v**3),
    ("pow", ABOVE, (-0.5,), lambda v: v**-0.5),
    ("rad2deg", ANY, (), math.degrees),
    ("remainder", ANY, (0.4,), lambda v: v - 0.4 * (v // 0.4)),
    ("reciprocal", ANY + 0.1, (), lambda v: 1 / v),
    ("relu", ANY, (), lambda v: max(v, 0)),
    ("relu6", ANY, (), lambda v: _clip(v, 0, 6)),
    ("round", ANY, (), round),
    ("rsqrt", ABOVE, (), lambda v: v**-0.5),
    ("sigmoid", ANY, (), _sigmoid),
    ("sgn", ANY, (), lambda v: (v > 0) - (v < 0)),
    ("sign", ANY, (), lambda v: (v > 0) - (v < 0)),
    ("silu", ANY, (), lambda v: v * _sigmoid(v)),
    ("sin", ANY, (), math.sin),
    ("sinc", ANY + 0.1, (), lambda v: math.sin(math.pi * v) / (math.pi * v) if v else 1.0),
    ("sinh", ANY, (), math.sinh),
    ("softplus", ANY, (2,), lambda v: _softplus(2 * v) / 2),
    ("softshrink", ANY, (0.5,), lambda v: math.copysign(max(abs(v) - 0.5, 0), v)),
    ("special_entr", ABOVE, (), lambda v: -v * math.log(v) if v else 0.0),
    ("sqrt", ABOVE, (), math.sqrt),
    ("square", ANY, (), lambda v: v * v),
    ("tan", ANY, (), math.tan),
    ("tanh", ANY, (), math.tanh),
    ("threshold", ANY, (0.4, -2), lambda v: v if v > 0.4 else -2),
    ("trunc", ANY, (), math.trunc),
]
for number, (name, x, arguments, function) in enumerate(ELEMENTWISE):
    want = lambda x=x, f=function: naive.elementwise(x.numpy(), f)
    op = getattr(aten, name)
    if name == "relu6":  # PyTorch makes it a hardtanh
        case(name, "alone", Alone(op.default, x), x, want)
        continue
    if name == "square":  # PyTorch makes it a power
        case(name, "alone", Alone(op.default, x), x, want)
        continue
    case(
        name,
        f"{number}",
        lambda x, op=op, a=arguments: r if isinstance(r := op(x, *a), Tensor) else r[0],
        x,
        want,
    )
    if hasattr(aten, f"{name}_"):
        in_place = getattr(aten, f"{name}_")
        run = lambda x, op=in_place, a=arguments: op(x, *a)
        case(name, f"{number}-in place", run, x, want)
    one = x[1, 3]
    want = lambda one=one, f=function: naive.elementwise(one.numpy(), f)
    case(name, f"{number}-scalar", CASES[-1].run, one, want)
case(
    "fake_quantize_per_channel_affine_cachemask",
    "plain",
    lambda x: torch.fake_quantize_per_channel_affine(
        x, torch.full((4,), 0.5), torch.tensor([2] * 4).int(), 1, 0, 6
    ),
    ANY,
    lambda: naive.elementwise(ANY.numpy(), _quantized),
)
case(
    "_fused_moving_avg_obs_fq_helper",
    "plain",
    lambda x: torch.fused_moving_avg_obs_fake_quant(
        x,
        *(torch.tensor([0]), torch.tensor([1]), torch.tensor(-1.0), torch.tensor(2.0)),
        *(torch.tensor([0.5]), torch.tensor([2]).int(), 0.01, 0, 6, 0),
    ),
    ANY,
    lambda: naive.elementwise(ANY.numpy(), _quantized),
)
case(
    "gelu",
    "tanh",
    lambda x: F.gelu(x, approximate="tanh"),
    ANY,
    lambda: naive.elementwise(ANY.numpy(), _gelu_tanh),
)
case(
    "pow",
    "of a number",
    lambda x: 2**x,
    ANY,
    lambda: naive.elementwise(ANY.numpy(), lambda v: 2**v),
)
SLOPES = torch.tensor([0.5, -2.0], dtype=torch.float64)
for name, run in [
    ("_prelu_kernel", lambda x: F.prelu(x, SLOPES)),
    ("prelu", Alone(aten.prelu.default, PRELU := numbers(2, 2, 3), SLOPES)),
]:
    case(
        name,
        "two channels",
        run,
        PRELU,
        lambda: naive.scaled(
            PRELU.numpy(),
            np.where(PRELU.numpy() > 0, 1, SLOPES.numpy()[:, None]) * (PRELU.numpy() != 0),
            np.zeros(()),
        ),
    )
case(
    "rrelu_with_noise",
    "eval",
    lambda x: F.rrelu(x, 0.1, 0.3),
    ANY,
    lambda: naive.elementwise(ANY.numpy(), lambda v: v if v > 0 else 0.2 * v),
)

# Normalisation.
MEAN, VAR = weights(3), weights(3, seed=1).abs() + 0.5
SCALE, SHIFT = weights(3, seed=2), weights(3, seed=3)


def batch_norm_map(shape: Sequence[int], scale: Tensor, shift: Tensor) -> Map:
    def column(t: Tensor) -> np.ndarray:
        return t.numpy().reshape(-1, *[1] * (len(shape) - 2))

    slope = column(scale) / np.sqrt(column(VAR) + 1e-3)
    return naive.scaled(np.zeros(shape), slope, column(shift) - column(MEAN) * slope)


ONE, NOUGHT = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
for shape in [(2, 3), (2, 3, 4), (2, 3, 2, 4), (1, 3, 2, 2, 2)]:
    for scale, shift in [(SCALE, SHIFT), (None, None)]:
        form = {"memory_format": LAST} if len(shape) == 4 and scale is None else {}
        case(
            "native_batch_norm",
            f"{len(shape)}d-{scale is not None}",
            lambda x, w=scale, b=shift: F.batch_norm(x, MEAN, VAR, w, b, eps=1e-3),
            numbers(*shape).to(**form) if form else numbers(*shape),
            lambda s=shape, w=scale, b=shift: batch_norm_map(
                s, ONE if w is None else w, NOUGHT if b is None else b
            ),
        )
NORM = numbers(2, 3, 2, 2)
for name, op, mode in [
    ("cudnn_batch_norm", aten.native_batch_norm.default, (False,)),
    ("miopen_batch_norm", aten.native_batch_norm.default, (False,)),
    ("_native_batch_norm_legit", aten._native_batch_norm_legit.default, (False,)),
    ("_native_batch_norm_legit_no_training", aten._native_batch_norm_legit_no_training.default, ()),
    ("_batch_norm_no_update", aten._batch_norm_no_update.default, ()),
]:
    case(
        name,
        "alone",
        Alone(op, NORM, SCALE, SHIFT, MEAN, VAR, *mode, 0.1, 1e-3),
        NORM,
        lambda: batch_norm_map(NORM.shape, SCALE, SHIFT),
    )
case(
    "native_batch_norm",
    "statistics of the batch",
    lambda x: F.batch_norm(x, None, None, SCALE, SHIFT, training=True, eps=1e-3),
    NORM,
    lambda: naive.batch_statistics_norm(NORM.numpy(), SCALE.numpy(), SHIFT.numpy(), 1e-3),
)
case(
    "native_batch_norm",
    "instance norm",
    lambda x: F.instance_norm(x, weight=SCALE, bias=SHIFT, eps=1e-3),
    NORM,
    lambda: naive.group_norm(NORM.numpy(), 3, SCALE.numpy(), SHIFT.numpy(), 1e-3),
)
for groups, shape in [(1, (2, 4, 3)), (2, (2, 4, 2, 3)), (4, (1, 4, 2, 2))]:
    w, b, x = weights(4), weights(4, seed=1), numbers(*shape)
    for form in ["plain", *(["channels_last"] if len(shape) == 4 else [])]:
        case(
            "native_group_norm",
            f"{groups}-{shape}-{form}",
            lambda x, g=groups, w=w, b=b: F.group_norm(x, g, w, b, eps=1e-3),
            x.to(memory_format=LAST) if form == "channels_last" else x,
            lambda x=x, g=groups, w=w, b=b: naive.group_norm(
                x.numpy(), g, w.numpy(), b.numpy(), 1e-3
            ),
        )
case(
    "native_group_norm",
    "no weight",
    lambda x: F.group_norm(x, 2, eps=1e-3),
    numbers(2, 4, 3),
    lambda: naive.group_norm(numbers(2, 4, 3).numpy(), 2, np.ones(4), np.zeros(4), 1e-3),
)
for dims in (1, 2):
    shape = (3, 4)[-dims:]
    w, b, x = weights(*shape), weights(*shape, seed=1), numbers(2, 2, 3, 4)
    case(
        "native_layer_norm",
        f"{dims}",
        lambda x, s=shape, w=w, b=b: F.layer_norm(x, s, w, b, eps=1e-3),
        x,
        lambda x=x, d=dims, w=w, b=b: naive.layer_norm(x.numpy(), d, w.numpy(), b.numpy(), 1e-3),
    )
    case(
        "native_layer_norm",
        f"{dims}-no weight",
        lambda x, s=shape: F.layer_norm(x, s, eps=1e-3),
        x,
        lambda x=x, d=dims, s=shape: naive.layer_norm(x.numpy(), d, np.ones(s), np.zeros(s), 1e-3),
    )

# Weights that were computed scale, as gates do, and biases that were get their own share.
W3, B3 = weights(3, seed=4), weights(3, seed=5)
ROWS4 = numbers(2, 2, 3)


def to_channels(shape: Sequence[int], axis: int) -> Map:
    """A vector, broadcast along an axis."""
    line = [1] * len(shape)
    line[axis] = 3
    return naive.probed(lambda b: np.broadcast_to(b.reshape(line), shape), [np.zeros(3)])


for name, run, x, axis, want in [
    (
        "native_batch_norm",
        lambda x, w, b: F.batch_norm(x, MEAN, VAR, w, b, eps=1e-3),
        NORM,
        1,
        lambda: batch_norm_map(NORM.shape, W3, NOUGHT),
    ),
    (
        "native_group_norm",
        lambda x, w, b: F.group_norm(x, 3, w, b, eps=1e-3),
        NORM,
        1,
        lambda: naive.group_norm(NORM.numpy(), 3, W3.numpy(), np.zeros(3), 1e-3),
    ),
    (
        "native_layer_norm",
        lambda x, w, b: F.layer_norm(x, (3,), w, b, eps=1e-3),
        ROWS4,
        2,
        lambda: naive.layer_norm(ROWS4.numpy(), 1, W3.numpy(), np.zeros(3), 1e-3),
    ),
]:
    case(
        name,
        "computed weight and bias",
        run,
        (x, W3, B3),
        lambda w=want, s=x.shape, a=axis: [w(), None, to_channels(s, a)],
    )

# Where paths meet.
P, Q = numbers(2, 2, 3), numbers(2, 2, 3, seed=1)
ROW = numbers(2, 1)
C = weights(2, 3)


def times(x: Tensor, factor: Any, shift: Any = 0.0) -> Map:
    """y = factor x + shift, where x is broadcast to the shape of all."""
    factor, shift = np.asarray(factor, dtype=float), np.asarray(shift, dtype=float)
    shape = np.broadcast_shapes(x.shape, factor.shape, shift.shape)
    spread = naive.probed(lambda a: np.broadcast_to(a, shape), [x.numpy()])
    return naive.compose(naive.scaled(np.zeros(shape), factor, shift), spread)


def whole(array: Tensor | np.ndarray) -> np.ndarray:
    """An array of zeros that gives `times` the shape of the result."""
    return np.zeros(array.shape)


case("add", "two", lambda a, b: a + b, (P, Q), lambda: [times(P, 1), times(Q, 1)])
case("add", "itself", lambda a: a + a, P, lambda: times(P, 2))
case("add", "a number", lambda a: a + 2, P, lambda: times(P, 1, 2))
case("add", "a constant", lambda a: a + C, P, lambda: times(P, 1, C.numpy()))
case("add", "to a constant", lambda a: C + a, P, lambda: times(P, 1, C.numpy()))
case("add", "whole numbers", lambda a: a + torch.arange(3), P, lambda: times(P, 1, [0, 1, 2]))
case("add", "a mask", lambda a: a + (a > 0), P, lambda: times(P, 1, P.numpy() > 0))
case(
    "add",
    "alpha",
    lambda a, b: torch.add(a, b, alpha=-3),
    (P, Q),
    lambda: [times(P, 1), times(Q, -3)],
)
case("add", "in place", lambda a, b: a.add_(b, alpha=2), (P, Q), lambda: [times(P, 1), times(Q, 2)])
case(
    "add", "broadcast", lambda a, b: a + b, (P, ROW), lambda: [times(P, 1), times(ROW, 1, whole(P))]
)
case(
    "add",
    "outer",
    lambda a, b: a + b,
    (numbers(2, 1), numbers(3)),
    lambda: [times(numbers(2, 1), 1, np.zeros((2, 3))), times(numbers(3), 1, np.zeros((2, 3)))],
)
case("sub", "two", lambda a, b: a - b, (P, Q), lambda: [times(P, 1), times(Q, -1)])
case(
    "sub",
    "alpha",
    lambda a, b: torch.sub(a, b, alpha=2),
    (P, Q),
    lambda: [times(P, 1), times(Q, -2)],
)
case("sub", "a constant", lambda a: a - C, P, lambda: times(P, 1, -C.numpy()))
case("sub", "from a constant", lambda a: C - a, P, lambda: times(P, -1, C.numpy()))
case(
    "sub",
    "broadcast",
    lambda a, b: b - a,
    (P, ROW),
    lambda: [times(P, -1), times(ROW, 1, whole(P))],
)
case("sub", "in place", lambda a, b: a.sub_(b), (P, Q), lambda: [times(P, 1), times(Q, -1)])
case("rsub", "a number", lambda a: 3 - a, P, lambda: times(P, -1, 3))
case(
    "rsub",
    "alpha",
    lambda a, b: torch.rsub(a, b, alpha=2),
    (P, Q),
    lambda: [times(P, -2), times(Q, 1)],
)
case("mul", "a number", lambda a: a * -3, P, lambda: times(P, -3))
case("mul", "a constant", lambda a: C * a, P, lambda: times(P, C.numpy()))
case("mul", "outer constant", lambda a: a * C, ROW, lambda: times(ROW, C.numpy()))
case("mul", "a mask", lambda a: a * (a > 0), P, lambda: times(P, P.numpy() > 0))
case("mul", "a float mask", lambda a: a * (a > 0).double(), P, lambda: times(P, P.numpy() > 0))
case("mul", "itself", lambda a: a * a, P, lambda: times(P, P.numpy()))
case(
    "mul",
    "equals",
    lambda a, b: a * b,
    (P, Q),
    lambda: [times(P, Q.numpy() / 2), times(Q, P.numpy() / 2)],
)
case("mul", "smaller gate", lambda a, b: a * b, (P, ROW), lambda: [times(P, ROW.numpy()), None])
case(
    "mul", "smaller gate first", lambda a, b: b * a, (P, ROW), lambda: [times(P, ROW.numpy()), None]
)
case(
    "mul",
    "sigmoid gate",
    lambda a, b: a * b.sigmoid(),
    (P, Q),
    lambda: [times(P, 1 / (1 + np.exp(-Q.numpy()))), None],
)
case(
    "mul",
    "scaled sigmoid gate",
    lambda a, b: (b.sigmoid() * 2).view(2, 2, 3) * a,
    (P, Q),
    lambda: [times(P, 2 / (1 + np.exp(-Q.numpy()))), None],
)
case(
    "mul",
    "clamp gate",
    lambda a: a * (F.relu6(a + 3) / 6),
    P,
    lambda: times(P, np.clip(P.numpy() + 3, 0, 6) / 6),
)
case(
    "mul",
    "a clamp beyond 1 is no gate",
    lambda a, b: a * b.clamp(0, 1.5),
    (P, Q),
    lambda: [
        times(P, np.clip(Q.numpy(), 0, 1.5) / 2),
        times(Q, P.numpy() / 2 * np.clip(Q.numpy(), 0, 1.5) / np.where(Q == 0, 1, Q)),
    ],
)
case("mul", "in place", lambda a, b: a.mul_(b), (P, ROW), lambda: [times(P, ROW.numpy()), None])
case("div", "a number", lambda a: a / -4, P, lambda: times(P, -0.25))
case(
    "div",
    "a gate",
    lambda a, b: a / b,
    (P, Q.abs() + 1),
    lambda: [times(P, 1 / (Q.abs() + 1).numpy()), None],
)
case(
    "div",
    "of a constant",
    lambda a: C / (a + 5),
    P,
    lambda: naive.compose(
        times(P, -C.numpy() / (P.numpy() + 5), C.numpy() / (P.numpy() + 5) + C.numpy()),
        times(P, 1, 5),
    ),
)
case(
    "div",
    "of a constant by numbers of both signs",
    lambda a: C / a,
    P + 0.1,
    lambda: times(
        P,
        -C.numpy() / np.abs(P.numpy() + 0.1),
        C.numpy() / (P.numpy() + 0.1) + C.numpy() * np.sign(P.numpy() + 0.1),
    ),
)
ABOVE_NOUGHT = P.abs() + 1.5
case(
    "addcdiv",
    "constant numerator",
    lambda a, c: torch.addcdiv(a, C, c, value=3),
    (P, ABOVE_NOUGHT),
    lambda: [
        times(P, 1),
        times(P, -3 * C.numpy() / ABOVE_NOUGHT.numpy(), 3 * (C / ABOVE_NOUGHT + C).numpy()),
    ],
)
case("neg", "plain", lambda a: -a, P, lambda: times(P, -1))
case("neg", "in place", lambda a: a.neg_(), P, lambda: times(P, -1))
case(
    "div", "in place", lambda a: a.div_(C.abs() + 1), P, lambda: times(P, 1 / (C.abs() + 1).numpy())
)
for name, better in [
    ("maximum", np.greater_equal),
    ("minimum", np.less_equal),
    ("fmax", np.greater_equal),
    ("fmin", np.less_equal),
]:
    op = getattr(torch, name)
    first = better(P.numpy(), Q.numpy())  # the first wins a tie
    case(name, "two", op, (P, Q), lambda first=first: [times(P, first), times(Q, ~first)])
    against = better(P.numpy(), C.numpy())
    case(
        name,
        "a constant",
        lambda a, op=op: op(a, C),
        P,
        lambda g=against: times(P, g, np.where(g, 0, C.numpy())),
    )
    case(name, "itself", lambda a, op=op: op(a, a), P, lambda: times(P, 1))
WITHIN = (P.numpy() >= Q.numpy()) & (P.numpy() <= Q.numpy() + 1)
case(
    "clamp",
    "computed bounds",
    lambda a, b: a.clamp(b, b + 1),
    (P, Q),
    lambda: [
        times(P, WITHIN),
        times(Q, ~WITHIN, np.where(P.numpy() > Q.numpy() + 1, 1, 0)),
    ],
)
case(
    "clamp_max",
    "a computed bound",
    lambda a: aten.clamp_max(C, a),
    P,
    lambda: times(P, C.numpy() >= P.numpy(), np.where(C.numpy() < P.numpy(), C.numpy(), 0)),
)
case(
    "max",
    "other",
    Alone(aten.max.other, P, Q),
    (P, Q),
    lambda: [times(P, P.numpy() >= Q.numpy()), times(Q, P.numpy() < Q.numpy())],
)

# Products of two operands.
QUERY, KEY = weights(2, 4, 3), weights(2, 3, 4)
for batch in (1, 2):
    a, b = numbers(batch, 4, 3), numbers(batch, 3, 5, seed=1)
    attended = np.stack([[naive.softmax_row(row) for row in m] for m in a.numpy()])
    case(
        "bmm",
        f"attention-{batch}",
        lambda a, b: a.softmax(-1) @ b,
        (a, b),
        lambda b=b, w=attended: [None, naive.product_from_left(w, b.shape)],
    )
    turned, values = numbers(batch, 5, 4), numbers(batch, 4, 3, seed=2)
    case(
        "bmm",
        f"attention from the right-{batch}",
        lambda a, b: b @ a.softmax(-1),
        (a, turned),
        lambda b=turned, w=attended: [None, naive.product_from_right(b.shape, w)],
    )
    case(
        "bmm",
        f"heads mixed after the softmax-{batch}",
        lambda a, b: (F.linear(a.softmax(-1), W[:3]) * 2).transpose(1, 2) @ b,
        (a, values),
        lambda b=values, w=attended: [
            None,
            naive.product_from_left(2 * (w @ W[:3].numpy().T).swapaxes(1, 2), b.shape),
        ],
    )
    case(
        "bmm",
        f"half each-{batch}",
        lambda a, b: a @ b,
        (a, b),
        lambda a=a, b=b: [
            naive.product_from_right(a.shape, b.numpy() / 2),
            naive.product_from_left(a.numpy() / 2, b.shape),
        ],
    )
    each, left = weights(batch, 3, 5), weights(batch, 2, 3)
    for form, constant in [("constant", each), ("one", weights(3, 5).expand(batch, 3, 5))]:
        case(
            "bmm",
            f"{form} on the right-{batch}",
            lambda a, w=constant: torch.bmm(a, w),
            a,
            lambda a=a, w=constant: naive.product_from_right(a.shape, w.numpy()),
        )
    case(
        "bmm",
        f"constant on the left-{batch}",
        lambda b, w=left: torch.bmm(w, b),
        b,
        lambda b=b, w=left: naive.product_from_left(w.numpy(), b.shape),
    )
    c = numbers(batch, 4, 5, seed=3)
    case(
        "baddbmm",
        f"computed-{batch}",
        lambda c, a, b: torch.baddbmm(c, a.softmax(-1), b, beta=-2, alpha=0.5),
        (c, a, b),
        lambda c=c, b=b, w=attended: [
            times(c, -2),
            None,
            naive.product_from_left(w / 2, b.shape),
        ],
    )
    case(
        "baddbmm",
        f"constant-{batch}",
        lambda a, w=each: torch.baddbmm(weights(5), a, w, alpha=3),
        a,
        lambda a=a, w=each: naive.compose(
            times(torch.zeros(len(a), 4, 5), 1, weights(5).numpy()),
            naive.product_from_right(a.shape, 3 * w.numpy()),
        ),
    )
LEFT, RIGHT = numbers(4, 3), numbers(3, 5, seed=1)
# Weights that are stored without their zeros.
THIN = W * (W > 0)
for layout in (torch.sparse_coo, torch.sparse_csr):
    thin = THIN.to_sparse(layout=layout)
    case(
        "_sparse_addmm" if layout == torch.sparse_coo else "mm",
        f"{layout}",
        lambda b, w=thin: torch.sparse.mm(w, b) if w.layout == torch.sparse_coo else w @ b,
        RIGHT,
        lambda: naive.product_from_left(THIN.numpy(), RIGHT.shape),
    )
case(
    "_sparse_addmm",
    "plus a computed one",
    lambda c, b: torch.sparse.addmm(c, THIN.to_sparse(), b, beta=2, alpha=-3),
    (numbers(4, 5), RIGHT),
    lambda: [times(numbers(4, 5), 2), naive.product_from_left(-3 * THIN.numpy(), RIGHT.shape)],
)
# Equations: one matrix for all, one each, vectors, from the left and from the right.
SHARED, APART = weights(4, 4) + 4 * torch.eye(4), weights(2, 4, 4, seed=2) + 4 * torch.eye(4)
for label, a, shape, left in [
    ("one", SHARED, (2, 2, 4, 3), True),
    ("one from the right", SHARED, (2, 2, 3, 4), False),
    ("each", APART, (2, 4, 3), True),
    ("each from the right", APART, (2, 3, 4), False),
    ("each, many", APART, (3, 2, 4, 2), True),
    ("each, a vector", APART, (2, 4), True),
    ("a vector", SHARED, (4,), True),
]:

    def solved(a: Tensor = a, shape: Sequence[int] = shape, left: bool = left) -> Map:
        inverse = np.linalg.inv(a.numpy())
        if shape == tuple(a.shape[:-1]):
            return naive.product_from_left(inverse, (*shape, 1))
        inverse = np.broadcast_to(inverse, (*shape[:-2], 4, 4))
        if left:
            return naive.product_from_left(inverse, shape)
        return naive.product_from_right(shape, inverse)

    run = lambda b, a=a, o=left: torch.linalg.solve(a, b, left=o)
    case("_linalg_solve_ex", label, run, numbers(*shape), solved)
case(
    "_linalg_solve_ex",
    "a computed matrix",
    lambda a, b: torch.linalg.solve(a + 4 * torch.eye(4), b),
    (numbers(4, 4), numbers(4, 2)),
    lambda: [
        None,
        naive.product_from_left(np.linalg.inv((numbers(4, 4) + 4 * torch.eye(4)).numpy()), (4, 2)),
    ],
)
case(
    "mm",
    "half each",
    lambda a, b: a @ b,
    (LEFT, RIGHT),
    lambda: [
        naive.product_from_right(LEFT.shape, RIGHT.numpy() / 2),
        naive.product_from_left(LEFT.numpy() / 2, RIGHT.shape),
    ],
)
case(
    "mm",
    "itself",
    lambda a: a @ a,
    numbers(3, 3),
    lambda: naive.Map(
        naive.product_from_right((3, 3), numbers(3, 3).numpy() / 2).matrix
        + naive.product_from_left(numbers(3, 3).numpy() / 2, (3, 3)).matrix,
        np.zeros(9),
    ),
)
case(
    "mm",
    "constant on the left",
    lambda b: W @ b,
    RIGHT,
    lambda: naive.product_from_left(W.numpy(), RIGHT.shape),
)
case(
    "addmm",
    "computed bias",
    lambda c, a: torch.addmm(c, a, weights(3, 5), beta=3),
    (numbers(5), LEFT),
    lambda: [
        times(numbers(5), 3, np.zeros((4, 5))),
        naive.product_from_right(LEFT.shape, weights(3, 5).numpy()),
    ],
)
# Attention: query, key and value, a scale, a mask, causal or not.
Q3, K3, V3 = numbers(2, 2, 3, 4), numbers(2, 2, 5, 4, seed=1), numbers(2, 2, 5, 3, seed=2)
SEEN = weights(2, 1, 3, 5) > -0.5
if hasattr(aten, "_safe_softmax"):  # PyTorch 2.4 makes NaN of it
    SEEN[0, 0, 1] = False  # one that may look nowhere
ATTENTION = {
    "plain": {},
    "scale": {"scale": -0.3},
    "mask": {"attn_mask": weights(3, 5)},
    "boolean mask": {"attn_mask": SEEN},
    "causal": {"is_causal": True},
}
for label, options in ATTENTION.items():

    def attended_values(options: dict[str, Any] = options) -> list[Map | None]:
        mask = options.get("attn_mask")
        weight = naive.attention_weights(
            Q3.numpy(),
            K3.numpy(),
            scale=options.get("scale"),
            mask=None if mask is None else mask.numpy(),
            causal=options.get("is_causal", False),
        )
        return [None, None, naive.product_from_left(weight, V3.shape)]

    run = lambda q, k, v, o=options: F.scaled_dot_product_attention(q, k, v, **o)
    # PyTorch's own choice on the CPU, for values as wide as the keys, which is what flash takes.
    wide = {"scaled_dot_product_attention": aten.scaled_dot_product_attention.default}
    wide["_scaled_dot_product_attention_math"] = aten._scaled_dot_product_attention_math.default
    for name, op in wide.items():
        if label == "boolean mask" and name.endswith("math"):
            continue  # it is given numbers
        alone = Alone(op, Q3, K3, V3, **options)
        case(name, label, alone, (Q3, K3, V3), attended_values)
    case("bmm", f"taken apart-{label}", run, (Q3, K3, V3), attended_values)
V4 = numbers(2, 2, 5, 4, seed=2)


def flash(mask: Tensor | None, causal: bool, scale: float | None) -> Callable[[], list[Map | None]]:
    def want() -> list[Map | None]:
        weight = naive.attention_weights(
            Q3.numpy(),
            K3.numpy(),
            scale=scale,
            mask=None if mask is None else mask.numpy(),
            causal=causal,
        )
        return [None, None, naive.product_from_left(weight, V4.shape)]

    return want


FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
MATH = aten._scaled_dot_product_attention_math.default
for label, mask, causal, scale in [
    ("plain", None, False, None),
    ("scale", None, False, 0.7),
    ("mask", weights(3, 5), False, None),
    ("causal", None, True, None),
]:
    options = {"attn_mask": mask, "scale": scale}
    case(
        "_scaled_dot_product_flash_attention_for_cpu",
        label,
        lambda q, k, v, c=causal, o=options: F.scaled_dot_product_attention(
            q, k, v, is_causal=c, **o
        ),
        (Q3, K3, V4),
        flash(mask, causal, scale),
    )

# Heads that share keys and values: two and two, or all of them.
Q5 = numbers(2, 4, 3, 4)
for shared, options in [(2, {"enable_gqa": True}), (4, {"enable_gqa": True}), (4, {})]:
    if options and "enable_gqa" not in names_of(aten.scaled_dot_product_attention.default):
        continue  # in PyTorch 2.4 only all of them can
    few = 4 // shared
    k, v = numbers(2, few, 5, 4, seed=1), numbers(2, few, 5, 4, seed=2)

    def shared_values(k: Tensor = k, v: Tensor = v, shared: int = shared) -> list[Map | None]:
        weight = naive.attention_weights(Q5.numpy(), k.numpy().repeat(shared, 1))
        spread = probed(lambda v: v.repeat_interleave(shared, 1), v)()[0]
        return [None, None, naive.compose(naive.product_from_left(weight, (2, 4, 5, 4)), spread)]

    alone = Alone(aten.scaled_dot_product_attention.default, Q5, k, v, **options)
    case(
        "scaled_dot_product_attention",
        f"{shared} shared-{options}",
        alone,
        (Q5, k, v),
        shared_values,
    )


class Elsewhere(Alone):
    """A call of another device, with its own arguments; the CPU computes what it returns."""

    def tape(self, name: str, inputs: tuple[Tensor, ...]) -> Tape:
        values = [Value(x, i) for i, x in enumerate(inputs)]
        op = getattr(aten, name.removeprefix("aten.")).default
        args, kwargs = self.args
        result = MATH(*inputs, **self.kwargs)[0]
        call = Call(name, op, (*values, *args), kwargs, 0)
        call.outputs = (Value(result, 9, call),)
        return Tape(values, [call], call.outputs[0])


CUDNN = names_of(aten._scaled_dot_product_cudnn_attention.default)
for name, args, kwargs in [
    ("flash", (0.0, True, False), {"scale": 0.7}),
    ("efficient", (weights(3, 5), False, 0.0, False), {"scale": 0.7}),
    ("efficient", (None, False, 0.0, True), {}),
    ("cudnn", (weights(3, 5), False) if "attn_bias" in CUDNN else (), {}),
    ("fused_overrideable", (weights(3, 5),), {}),
    ("math_for_mps", (weights(3, 5),), {}),
]:
    full = {
        "fused_overrideable": "_scaled_dot_product_fused_attention_overrideable",
        "math_for_mps": "_scaled_dot_product_attention_math_for_mps",
    }.get(name, f"_scaled_dot_product_{name}_attention")
    mask = next((item for item in args if isinstance(item, Tensor)), None)
    causal, scale = any(item is True for item in args), kwargs.get("scale")
    options = {"attn_mask": mask, "is_causal": causal, "scale": scale}
    run = Elsewhere(None, args, kwargs, **options)
    case(full, f"{len(CASES)}", run, (Q3, K3, V4), flash(mask, causal, scale))

# Softmax inside, and running sums.
for axis in (0, -1):
    case(
        "_softmax",
        f"{axis}",
        lambda x, d=axis: x.softmax(d),
        (x := numbers(3, 4)),
        lambda x=x, d=axis: naive.softmax(x.numpy(), d),
    )
    case(
        "_safe_softmax",
        f"{axis}",
        lambda x, d=axis: aten._safe_softmax(x, d),
        x,
        lambda x=x, d=axis: naive.softmax(x.numpy(), d),
    )
    case(
        "_log_softmax",
        f"{axis}",
        lambda x, d=axis: x.log_softmax(d),
        x,
        lambda x=x, d=axis: times(
            x, 1, -np.log(np.exp(x.numpy()).sum(d, keepdims=True)) * np.ones((3, 4))
        ),
    )
for axis in (0, 1, -1):
    x = numbers(2, 3, 4)
    run = lambda x, d=axis: x.cumsum(d)
    case("cumsum", f"{axis}", run, x, probed(run, x))

# Norms, variances, logsumexp; one group is zero, and one element of others.
GROUPS = numbers(2, 2, 3)
GROUPS[0, 1] = 0
for axes in [(2,), (1, 2), (0,)]:
    for order in (1, 2, 3.5):

        def of_norm(group: list[float], p: float = order) -> list[float]:
            size = math.fsum(abs(v) ** p for v in group) ** (1 / p)
            return [math.copysign((abs(v) / size) ** (p - 1), v) if v else 0.0 for v in group]

        case(
            "linalg_vector_norm",
            f"{axes}-{order}",
            lambda x, a=axes, p=order: torch.linalg.vector_norm(x, p, a, keepdim=a == (2,)),
            GROUPS,
            lambda a=axes, f=of_norm: naive.weighted_total(GROUPS.numpy(), a, f),
        )
    for correction in (0, 1):

        def of_var(group: list[float], c: int = correction) -> list[float]:
            mean = math.fsum(group) / len(group)
            return [(v - mean) / (len(group) - c) for v in group]

        def of_std(group: list[float], f: Any = of_var) -> list[float]:
            var = math.fsum(v * w for v, w in zip(group, f(group), strict=True))
            return [w / math.sqrt(var) if var else 0.0 for w in f(group)]

        for name, want in [("var", of_var), ("std", of_std)]:
            run = getattr(torch, name)
            both = getattr(torch, f"{name}_mean")
            options = {"dim": axes, "correction": correction, "keepdim": correction == 1}
            result = lambda a=axes, f=want: naive.weighted_total(GROUPS.numpy(), a, f)
            case(
                name, f"{axes}-{correction}", lambda x, r=run, o=options: r(x, **o), GROUPS, result
            )
            case(
                f"{name}_mean",
                f"{axes}-{correction}",
                lambda x, r=both, o=options: r(x, **o)[0],
                GROUPS,
                result,
            )
            case(
                f"{name}_mean",
                f"{axes}-{correction}-mean",
                lambda x, r=both, o=options: r(x, **o)[1],
                GROUPS,
                lambda a=axes: naive.total(GROUPS.shape, a, mean=True),
            )
    entropy = lambda g: math.fsum(-p * math.log(p) for p in naive.softmax_row(g))
    case(
        "logsumexp",
        f"{axes}",
        lambda x, a=axes: x.logsumexp(a),
        GROUPS,
        lambda a=axes, h=entropy: naive.weighted_total(
            GROUPS.numpy(), a, naive.softmax_row
        )._replace(
            bias=naive.weighted_total(np.ones(GROUPS.shape), a, lambda g: [0.0] * len(g)).bias
            + np.array(
                [
                    h([float(v) for v in group])
                    for group in np.moveaxis(GROUPS.numpy(), a, range(3 - len(a), 3)).reshape(
                        -1, math.prod(GROUPS.shape[d] for d in a)
                    )
                ]
            )
        ),
    )
case(
    "var",
    "all",
    lambda x: x.var(),
    GROUPS,
    lambda: naive.weighted_total(
        GROUPS.numpy(), (0, 1, 2), lambda g: [(v - np.mean(g)) / (len(g) - 1) for v in g]
    ),
)
case(
    "std",
    "biased",
    lambda x: x.std(unbiased=False),
    GROUPS,
    lambda: naive.weighted_total(
        GROUPS.numpy(), (0, 1, 2), lambda g: [(v - np.mean(g)) / (len(g) * np.std(g)) for v in g]
    ),
)

for label, run, axes in [
    ("axis", lambda x: x.prod(2), (2,)),
    ("keep", lambda x: x.prod(0, keepdim=True), (0,)),
    ("all", lambda x: x.prod(), (0, 1, 2)),
]:
    case(
        "prod",
        label,
        run,
        GROUPS,
        lambda a=axes: naive.weighted_total(
            GROUPS.numpy(),
            a,
            lambda g: [math.prod(g[:i] + g[i + 1 :]) / len(g) for i in range(len(g))],
        ),
    )

case(
    "prod",
    "of a number",
    lambda x: x.prod(),
    numbers(1)[0] + 2,
    lambda: naive.total((), (), mean=False),
)

# What is sent to a place is added to what lies there.
HERE, SENT = weights(3, 4), weights(2, 4, seed=1)
ROWS, PLACES = torch.tensor([2, 0]), torch.tensor([[2, 0, 1], [2, 2, 0]])
for name, label, run in [
    ("index_add", "rows", lambda x, s: x.index_add(0, ROWS, s)),
    ("index_add", "the same row, twice", lambda x, s: x.index_add(0, ROWS * 0, s, alpha=-3)),
    ("scatter_add", "part", lambda x, s: x.scatter_add(0, PLACES, s)),
    ("scatter_add", "in place", lambda x, s: (x * 1).scatter_add_(0, PLACES, s)),
    ("scatter_reduce", "sum", lambda x, s: x.scatter_reduce(0, PLACES, s, "sum")),
    ("scatter", "add", lambda x, s: x.scatter(0, PLACES, s, reduce="add")),
    ("index_put", "add", lambda x, s: x.index_put((ROWS * 0,), s, accumulate=True)),
    ("index_put", "one", lambda x, s: x.index_put((ROWS,), s[0, 0], accumulate=True)),
    (
        "index_put",
        "columns",
        lambda x, s: aten.index_put(x, [None, ROWS], s[:, :1].mT, True),
    ),
]:
    by_map = lambda run=run: probed(run, HERE, SENT)()
    case(name, label, run, (HERE, SENT), by_map)
    case(
        name, f"{label}-to nought", lambda s, r=run: r(HERE, s), SENT, lambda m=by_map: _beside(m())
    )


def _beside(maps: Sequence[Map]) -> Map:
    """The map from what is sent, where what it is added to is constant."""
    here, sent = maps
    return Map(sent.matrix, here.matrix @ HERE.reshape(-1).numpy())


# What is made of all that is sent to a place: the mean, the product, the largest; nought and ties among them.
TABLE = torch.tensor([[2, 0, 1, 2], [2, 2, 0, 1]])


def gathered(
    how: str, own: bool, axis: int, index: Tensor, here: Tensor, sent: Tensor
) -> Callable[[], list[Map]]:
    """The maps of both, for the reduce of a scatter, or of rows where the index is a vector."""
    pairs = []
    for source in naive.places(index.shape if index.dim() > 1 else sent.shape):
        to = list(source)
        to[axis] = int(index[tuple(source) if index.dim() > 1 else source[axis]])
        pairs.append((to, source))
    return lambda: naive.gathered(here.numpy(), sent.numpy(), pairs, how, own)


KEEP, GIVEN, LINES = numbers(3, 4), numbers(3, 4, seed=1), torch.tensor([2, 0, 2, 3])
for how, own in itertools.product(["sum", "mean", "prod", "amax", "amin"], [True, False]):
    options = {"reduce": how, "include_self": own}
    reduced: list[tuple[str, Callable[..., Tensor], Callable[[], list[Map]]]] = [
        (
            "scatter_reduce",
            lambda x, s, o=options: x.scatter_reduce(0, TABLE, s, **o),
            gathered(how, own, 0, TABLE, KEEP, GIVEN),
        )
    ]
    if how != "sum":
        by_lines = lambda x, s, o=options: x.index_reduce(1, LINES, s, **o)
        reduced.append(("index_reduce", by_lines, gathered(how, own, 1, LINES, KEEP, GIVEN)))
    for name, run, want in reduced:
        case(name, f"{how}-{own}-both", run, (KEEP, GIVEN), want)
        case(
            name,
            f"{how}-{own}-to a constant",
            lambda s, r=run: r(KEEP, s),
            GIVEN,
            lambda w=want: Map(w()[1].matrix, w()[0].matrix @ KEEP.reshape(-1).numpy()),
        )
        case(
            name,
            f"{how}-{own}-of a constant",
            lambda x, r=run: r(x, GIVEN),
            KEEP,
            lambda w=want: Map(w()[0].matrix, w()[1].matrix @ GIVEN.reshape(-1).numpy()),
        )
case(
    "scatter",
    "multiply",
    lambda x, s: x.scatter(0, TABLE, s, reduce="multiply"),
    (KEEP, GIVEN),
    gathered("prod", True, 0, TABLE, KEEP, GIVEN),
)
case(
    "scatter",
    "multiply by a number",
    lambda x: x.scatter(0, TABLE[:1], 3.0, reduce="multiply"),
    KEEP,
    lambda: Map(
        (w := gathered("prod", True, 0, TABLE[:1], KEEP, torch.full((1, 4), 3.0))())[0].matrix,
        w[1].matrix @ np.full(4, 3.0),
    ),
)

# The choices of this image: the call says which elements it took.
for name, label, run in [
    ("topk", "last", lambda x: x.topk(2).values),
    ("topk", "smallest", lambda x: x.topk(2, 1, largest=False)[0]),
    ("sort", "last", lambda x: x.sort().values),
    ("sort", "stable", lambda x: x.sort(dim=0, descending=True, stable=True).values),
    ("kthvalue", "dim", lambda x: x.kthvalue(2, 1).values),
    ("kthvalue", "keep", lambda x: x.kthvalue(2, 1, keepdim=True).values),
    ("median", "dim", lambda x: x.median(2).values),
    ("nanmedian", "dim", lambda x: x.nanmedian(2).values),
    ("cummax", "dim", lambda x: x.cummax(1).values),
    ("cummin", "dim", lambda x: x.cummin(-1).values),
]:
    x = weights(2, 3, 4)
    place = torch.arange(24.0, dtype=torch.float64).reshape(2, 3, 4)
    # Numbers in the order of x: the same places are chosen.
    ranks = x.reshape(-1).argsort().argsort().double().reshape(x.shape)

    def by_rank(run: Any = run, ranks: Tensor = ranks) -> Map:
        taken = run(ranks).reshape(-1).long().tolist()
        result = naive.empty((24,), (len(taken),))
        for row, rank in enumerate(taken):
            result.matrix[row, ranks.reshape(-1).tolist().index(rank)] = 1
        return result

    case(name, label, run, x, by_rank)
for name, label, run, axes in [
    ("amin", "space", lambda x: x.amin((2, 3)), (2, 3)),
    ("amin", "keep", lambda x: x.amin((-1, 1), keepdim=True), (1, 3)),
    ("min", "all", lambda x: x.min(), (0, 1, 2, 3)),
    ("min", "dim", lambda x: x.min(2).values, (2,)),
]:
    x = numbers(2, 2, 3, 4)
    case(name, label, run, x, lambda x=x, axes=axes: naive.maximum_over(-x.numpy(), axes))
case(
    "min",
    "other",
    Alone(aten.min.other, P := numbers(2, 2, 3), Q := numbers(2, 2, 3, seed=1)),
    (P, Q),
    lambda: [times(P, P.numpy() <= Q.numpy()), times(Q, P.numpy() > Q.numpy())],
)

# Cubic interpolation, which has weights of both signs.
for space, outputs, align in [
    ((3, 4), (6, 8), False),
    ((3, 4), (5, 7), True),
    ((5, 6), (2, 4), False),
    ((5, 4), (3, 1), True),
]:
    x = numbers(2, 2, *space)
    case(
        "upsample_bicubic2d",
        f"{space}-{outputs}-{align}",
        lambda x, o=outputs, a=align: F.interpolate(x, o, mode="bicubic", align_corners=a),
        x,
        lambda s=x.shape, o=outputs, a=align: naive.bicubic(s, o, a),
    )
for space, outputs in [((3, 4), (6, 5)), ((7, 6), (3, 2))]:
    case(
        "_upsample_bicubic2d_aa",
        f"{space}-{outputs}",
        lambda x, o=outputs: F.interpolate(x, o, mode="bicubic", antialias=True),
        numbers(2, 2, *space),
        lambda s=space, o=outputs: naive.bicubic_antialiased((2, 2, *s), o),
    )

# Regions: across the border, outside, without extent, turned inside out, of one image and another.
REGIONS = torch.tensor(
    [
        [0, 0.3, 1.1, 4.7, 3.9],
        [1, -2.0, -1.5, 3.0, 2.0],
        [1, 2.0, 2.0, 2.0, 2.0],
        [0, 9.0, 9.0, 12.0, 11.0],
        [1, 1.0, 0.0, 9.0, 7.5],
        [0, 3.0, 3.0, 1.0, 2.0],
    ],
    dtype=torch.float64,
)
for number, (scale, bins, ratio, aligned) in enumerate(
    [
        (1.0, (2, 2), 2, True),
        (0.5, (2, 3), 1, False),
        (1.0, (2, 1), -1, True),
        (0.7, (1, 2), 0, False),
        (1.0, (3, 2), 3, False),
    ]
):
    x = numbers(2, 2, 4, 5)
    options = {"scale": scale, "bins": bins, "ratio": ratio, "aligned": aligned}
    case(
        "torchvision.roi_align",
        f"{number}",
        lambda x, o=options: ops.roi_align(
            x, REGIONS, o["bins"], o["scale"], o["ratio"], o["aligned"]
        ),
        x,
        lambda s=x.shape, o=options: naive.roi_align(s, REGIONS.numpy(), **o),
    )

for number, (scale, bins) in enumerate([(1.0, (2, 2)), (0.5, (2, 3)), (0.7, (3, 1))]):
    x = weights(2, 2, 4, 5)
    case(
        "torchvision.roi_pool",
        f"{number}",
        lambda x, b=bins, s=scale: ops.roi_pool(x, REGIONS, b, s),
        x,
        lambda x=x, b=bins, s=scale: naive.roi_pool(x.numpy(), REGIONS.numpy(), scale=s, bins=b),
    )

# Sampling at positions within, on the border, and far outside.
for space in ((4, 5), (1, 3), (3, 2, 4)):
    x = numbers(2, 2, *space)
    grid = 1.6 * numbers(2, *[3] * len(space), len(space), seed=3)
    for mode, padding, align in [
        ("bilinear", "zeros", False),
        ("bilinear", "zeros", True),
        ("bilinear", "border", False),
        ("bilinear", "reflection", False),
        ("bilinear", "reflection", True),
        ("nearest", "zeros", False),
        ("nearest", "reflection", True),
    ]:
        case(
            f"grid_sampler_{len(space)}d",
            f"{space}-{mode}-{padding}-{align}",
            lambda x, g=grid, o=(mode, padding, align): F.grid_sample(x, g, *o),
            x,
            lambda s=x.shape, g=grid, m=mode, p=padding, a=align: naive.grid_sample(
                s, g.numpy(), mode=m, padding=p, align=a
            ),
        )
for space, spread in [((4, 5), 1.6), ((4, 5), 0.7), ((1, 3), 1.6)]:
    x, grid = numbers(2, 2, *space), spread * weights(2, 3, 3, 2, seed=3)
    for padding, align in itertools.product(["zeros", "border", "reflection"], [False, True]):
        case(
            "grid_sampler_2d",
            f"{space}-{spread}-bicubic-{padding}-{align}",
            lambda x, g=grid, p=padding, a=align: F.grid_sample(x, g, "bicubic", p, a),
            x,
            lambda s=x.shape, g=grid, p=padding, a=align: naive.cubic_sample(
                s, g.numpy(), padding=p, align=a
            ),
        )
# A grid that was computed is taken as given; cuDNN's call has fewer arguments.
G = numbers(2, 3, 2, 2, seed=3)
case(
    "grid_sampler_2d",
    "computed grid",
    lambda x, g: F.grid_sample(x, g, align_corners=False),
    (x := numbers(2, 2, 4, 5), G),
    lambda s=x.shape: [
        naive.grid_sample(s, G.numpy(), mode="bilinear", padding="zeros", align=False),
        None,
    ],
)
case(
    "cudnn_grid_sampler",
    "alone",
    Alone(lambda x, g: aten.grid_sampler_2d(x, g, 0, 0, True), x, G),
    x,
    lambda s=x.shape: naive.grid_sample(s, G.numpy(), mode="bilinear", padding="zeros", align=True),
)

# Windows back to their places.
for number, (size_, options) in enumerate(
    [
        ((4, 5), {"kernel_size": 2}),
        ((4, 5), {"kernel_size": (2, 3), "padding": 1, "stride": 2}),
        ((5, 5), {"kernel_size": 2, "dilation": 2, "stride": (1, 2)}),
        ((6, 4), {"kernel_size": 2, "stride": 2}),
    ]
):
    columns = F.unfold(torch.zeros(1, 2, *size_), **options).shape
    x = numbers(2, *columns[1:])
    run = lambda x, s=size_, o=options: F.fold(x, s, **o)
    case("col2im", f"{number}", run, x, probed(run, x))

# Gates of other forms.
case(
    "glu",
    "channels",
    lambda x: F.glu(x, 1),
    (x := numbers(2, 4, 3)),
    lambda x=x: naive.compose(
        times(x[:, :2], 1 / (1 + np.exp(-x[:, 2:].numpy()))), probed(lambda x: x[:, :2], x)()[0]
    ),
)
case(
    "glu",
    "last",
    F.glu,
    (x := numbers(3, 4)),
    lambda x=x: naive.compose(
        times(x[:, :2], 1 / (1 + np.exp(-x[:, 2:].numpy()))), probed(lambda x: x[:, :2], x)()[0]
    ),
)

R = numbers(2, 2, 3, seed=4)
HALF = torch.tensor(0.25, dtype=torch.float64)
for name, label, run, inputs, want in [
    ("lerp", "number", lambda a, b: torch.lerp(a, b, 0.25), (P, Q), lambda: [0.75, 0.25]),
    ("lerp", "constant", lambda a, b: a.lerp(b, HALF), (P, Q), lambda: [0.75, 0.25]),
    (
        "lerp",
        "gate",
        torch.lerp,
        (P, Q, R),
        lambda: [1 - R.numpy(), R.numpy(), None],
    ),
    (
        "addcmul",
        "half each",
        lambda a, b, c: torch.addcmul(a, b, c, value=-3),
        (P, Q, R),
        lambda: [1, -1.5 * R.numpy(), -1.5 * Q.numpy()],
    ),
    (
        "addcmul",
        "gate",
        lambda a, b, c: torch.addcmul(a, b.sigmoid(), c),
        (P, Q, R),
        lambda: [1, None, 1 / (1 + np.exp(-Q.numpy()))],
    ),
    (
        "addcmul",
        "constants",
        lambda a, b: torch.addcmul(a, C, b, value=2),
        (P, Q),
        lambda: [1, 2 * C.numpy()],
    ),
    (
        "addcdiv",
        "computed",
        lambda a, b, c: torch.addcdiv(a, b, c, value=-2),
        (P, Q, R.abs() + 1),
        lambda: [1, -2 / (R.abs() + 1).numpy(), None],
    ),
    (
        "addcdiv",
        "as it comes",
        torch.addcdiv,
        (P, Q, R.abs() + 1),
        lambda: [1, 1 / (R.abs() + 1).numpy(), None],
    ),
]:
    case(
        name,
        label,
        run,
        inputs,
        lambda i=inputs, w=want: [
            None if factor is None else times(x, factor) for x, factor in zip(i, w(), strict=True)
        ],
    )
case(
    "lerp",
    "between two constants",
    lambda a: torch.lerp(C.expand(2, 2, 3), 2 * C.expand(2, 2, 3), a),
    P,
    lambda: times(P, C.expand(2, 2, 3).numpy(), C.expand(2, 2, 3).numpy()),
)
case(
    "lerp",
    "from a constant",
    lambda a: torch.lerp(C.expand(2, 2, 3), a, 0.25),
    P,
    lambda: times(P, 0.25, 0.75 * C.numpy()),
)
RMS = getattr(getattr(aten, "_fused_rms_norm", None), "default", None)  # PyTorch 2.4 has none
case(
    "_fused_rms_norm",
    "weight",
    Alone(RMS, P, [3], weights(3), 1e-3),
    P,
    lambda: times(
        P,
        weights(3).numpy() / np.sqrt((P.numpy() ** 2).mean(-1, keepdims=True) + 1e-3),
    ),
)
case(
    "_fused_rms_norm",
    "no weight",
    Alone(RMS, P, [3], None, 1e-3),
    P,
    lambda: times(P, 1 / np.sqrt((P.numpy() ** 2).mean(-1, keepdims=True) + 1e-3)),
)

# Calls that only pass values on, and calls that move them.
X = numbers(2, 4, 2, 3)
IDX = torch.tensor([[1, 0, 2], [2, 2, 0]])
MASK = numbers(2, 4, 2, 3, seed=5) > 0
MOVES: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
    ("view", "flat", lambda x: x.view(2, -1)),
    ("_unsafe_view", "flat", lambda x: aten._unsafe_view(x, [2, -1])),
    ("squeeze", "axis", lambda x: x[:, :1].squeeze(1)),
    ("squeeze", "in place", lambda x: x[:, :1].squeeze_(1)),
    ("unsqueeze", "axis", lambda x: x.unsqueeze(2)),
    ("unsqueeze", "in place", lambda x: (x * 1).unsqueeze_(0)),
    ("clone", "plain", lambda x: x.clone()),
    ("clone", "other strides", lambda x: (x + 0).permute(2, 1, 0, 3).contiguous()),
    ("detach", "plain", lambda x: x.detach()),
    ("alias", "plain", aten.alias),
    ("lift_fresh", "plain", aten.lift_fresh),
    ("_reshape_alias", "plain", lambda x: aten._reshape_alias(x, [8, 6], [6, 1])),
    ("_to_copy", "wider", lambda x: x.float().double()),
    ("permute", "axes", lambda x: x.permute(3, 1, 0, 2)),
    ("transpose", "axes", lambda x: x.transpose(1, -1)),
    ("transpose", "in place", lambda x: (x * 1).transpose_(0, 3)),
    ("t", "matrix", lambda x: x[0, 0].t()),
    ("slice", "steps", lambda x: x[:, 1::2, :, :2]),
    ("select", "row", lambda x: x[:, -1]),
    ("index", "list", lambda x: x[:, [2, 0, 0]]),
    ("index", "two lists", lambda x: x[[0, 1, 1], :, [1, 0, 1]]),
    ("index", "mask", lambda x: x[MASK]),
    ("index_select", "axis", lambda x: x.index_select(1, torch.tensor([3, 1, 1]))),
    ("gather", "axis", lambda x: x[0, 0].gather(1, IDX)),
    ("split", "second", lambda x: x.split(3, 1)[1]),
    ("split", "all", lambda x: torch.cat([part * 2 for part in x.split(3, 1)][::-1], 1)),
    ("split_with_sizes", "sizes", lambda x: x.split([1, 2, 1], 1)[1]),
    ("unsafe_split", "first", lambda x: x.unsafe_split(3, 1)[0]),
    ("unbind", "last", lambda x: x.unbind(3)[2]),
    ("cat", "itself", lambda x: torch.cat([x, x[:, :1], x], 1)),
    ("cat", "constant", lambda x: torch.cat([x, weights(2, 1, 2, 3)], 1)),
    ("cat", "whole numbers", lambda x: torch.cat([torch.full((2, 1, 2, 3), 5), x], 1)),
    ("stack", "itself", lambda x: torch.stack([x, x * 2], 2)),
    ("expand", "axis", lambda x: x[:, :1].expand(2, 3, 2, 3)),
    ("repeat", "axes", lambda x: x.repeat(1, 2, 1, 2)),
    ("roll", "axes", lambda x: x.roll((1, -1), (2, 3))),
    ("flip", "axes", lambda x: x.flip(1, 3)),
    ("rot90", "quarter", lambda x: x.rot90(1, (2, 3))),
    ("unfold", "windows", lambda x: x.unfold(3, 2, 1)),
    ("constant_pad_nd", "zeros", lambda x: F.pad(x, (1, 0, 2, 1))),
    ("constant_pad_nd", "value", lambda x: F.pad(x, (1, 1), value=-3.5)),
    ("constant_pad_nd", "crop", lambda x: F.pad(x, (-1, 1))),
    ("reflection_pad1d", "pad", lambda x: F.pad(x[0], (2, 1), mode="reflect")),
    ("reflection_pad2d", "pad", lambda x: F.pad(x, (2, 1, 1, 0), mode="reflect")),
    ("reflection_pad3d", "pad", lambda x: F.pad(x[None], (1, 2, 0, 1, 3, 1), mode="reflect")),
    ("replication_pad1d", "pad", lambda x: F.pad(x[0], (2, 1), mode="replicate")),
    ("replication_pad2d", "pad", lambda x: F.pad(x, (2, 1, 1, 0), mode="replicate")),
    ("replication_pad3d", "pad", lambda x: F.pad(x[None], (1, 2, 0, 1, 2, 1), mode="replicate")),
    ("hysm.reread", "circular pad", lambda x: F.pad(x, (1, 2, 0, 1), mode="circular")),
    ("pixel_shuffle", "2", lambda x: F.pixel_shuffle(x, 2)),
    ("channel_shuffle", "2", lambda x: F.channel_shuffle(x, 2)),
    ("native_channel_shuffle", "2", lambda x: aten.native_channel_shuffle(x, 2)),
    ("where", "two", lambda x: torch.where(MASK, x, x.flip(1))),
    ("where", "number", lambda x: torch.where(MASK, 3, x)),
    ("where", "constant", lambda x: torch.where(MASK, x, torch.tensor(2.5))),
    ("masked_fill", "number", lambda x: x.masked_fill(MASK, -7)),
    ("masked_fill", "in place", lambda x: x.masked_fill_(MASK, 7)),
    ("masked_fill", "tensor", lambda x: x.masked_fill(MASK, torch.tensor(2.0))),
    (
        "copy",
        "in place",
        lambda x: torch.zeros(4, 2, 2, 3).double().copy_(x.transpose(0, 1)[:, :1]),
    ),
    ("copy", "whole numbers", lambda x: [x := x * 1, x[:, 1].copy_(torch.arange(3)), x][2]),
    ("slice_scatter", "rows", lambda x: x.slice_scatter(x[:, :1] * 2, 1, 2, 3)),
    ("select_scatter", "row", lambda x: x.select_scatter(weights(2, 2, 3), 1, 2)),
    ("index_put", "list", lambda x: [x := x * 1, x.__setitem__((0, [2, 1]), x[1, :2] * 3), x][2]),
    ("index_put", "mask", lambda x: [x := x * 1, x.__setitem__(MASK, 4), x][2]),
    ("diagonal", "axes", lambda x: x.diagonal(0, 2, 3)),
    ("diagonal", "below", lambda x: x.diagonal(-1, 0, 1)),
    ("diagonal_copy", "of a matrix", lambda x: x[0, 0].diag()),
    (
        "_pack_padded_sequence",
        "rows",
        lambda x: torch._pack_padded_sequence(x[:, :, 0], torch.tensor([4, 2]), True)[0],
    ),
    (
        "resize_as",
        "piece by piece",
        lambda x: [
            m := x.new_empty(0).resize_as_(x),
            m[:, 0].copy_(x[:, 2]),
            m[:, 1:].copy_(m[:, :1] * 2),
            m,
        ][3],
    ),
    ("fill", "part", lambda x: [x := x * 1, x[:, 1].fill_(3), x][2]),
    ("fill", "computed", lambda x: [x := x * 1, x[:, 1].fill_(x[0, 0, 0, 1]), x][2]),
    ("zero", "part", lambda x: [x := x * 1, x[:, 1].zero_(), x][2]),
    ("_unsafe_index", "list", lambda x: aten._unsafe_index(x, [None, torch.tensor([2, 0, 0])])),
    ("tril", "below", lambda x: x.tril(-1)),
    ("triu", "plain", lambda x: x.triu()),
    ("scatter", "source", lambda x: x[0, 0].scatter(0, torch.tensor([[1, 0, 1]]), x[1, 0, :1])),
    ("scatter", "number", lambda x: x[0, 0].scatter(0, torch.tensor([[1, 0, 1]]), 7.0)),
    ("index_copy", "rows", lambda x: x.index_copy(1, torch.tensor([3, 0]), x[:, 1:3] * 2)),
    ("masked_scatter", "source", lambda x: x.masked_scatter(MASK, x.flip(0))),
    ("masked_select", "mask", lambda x: x.masked_select(MASK)),
    ("take", "places", lambda x: x.take(torch.tensor([[5, 0], [40, 5]]))),
    ("diag_embed", "plain", lambda x: x[0, 0].diag_embed()),
    ("diagonal_scatter", "axes", lambda x: x.diagonal_scatter(x[:, :, 0, :2] * 2, 0, 2, 3)),
    ("diagonal_scatter", "below", lambda x: x.diagonal_scatter(weights(2, 3, 1), -1, 0, 1)),
    ("block_diag", "two", lambda x: torch.block_diag(x[0, 0], x[1, :, 1])),
    ("block_diag", "a constant", lambda x: torch.block_diag(weights(1, 2), x[0, 0])),
    ("embedding", "rows", lambda x: F.embedding(IDX, x[0, 0].mT)),
    ("im2col", "plain", lambda x: F.unfold(x, 2)),
    ("im2col", "padded", lambda x: F.unfold(x, (2, 3), padding=1, stride=2)),
    ("as_strided", "windows", lambda x: (x * 1).as_strided((2, 3, 2), (24, 6, 2))),
    ("as_strided", "offset", lambda x: (x * 1).as_strided((3, 2), (2, 1), 5)),
    ("as_strided", "of a view", lambda x: (x * 1)[1].as_strided((3, 2), (2, 1))),
]
# What PyTorch takes apart before the tape sees it, on the CPU and in eval mode.
ALONE: list[tuple[str, Any, tuple[Any, ...], int]] = [
    ("reshape", aten.reshape.default, ([4, -1],), 0),
    ("flatten", aten.flatten.using_ints, (1, 2), 0),
    ("unflatten", aten.unflatten.int, (1, [2, 2]), 0),
    ("contiguous", aten.contiguous.default, (), 0),
    ("dropout", aten.dropout.default, (0.5, False), 0),
    ("to", aten.to.dtype, (torch.float64,), 0),
    ("movedim", aten.movedim.int, (1, 3), 0),
    ("swapaxes", aten.swapaxes.default, (0, 2), 0),
    ("narrow", aten.narrow.default, (1, 1, 2), 0),
    ("numpy_T", aten.numpy_T.default, (), 0),
    ("take_along_dim", aten.take_along_dim.default, (X.argsort(1), 1), 0),
    ("chunk", aten.chunk.default, (3, 1), 1),
    ("tensor_split", aten.tensor_split.sections, (3, 1), 2),
    ("tensor_split", aten.tensor_split.indices, ([1, 3], 1), 1),
]
UNPOOLED = torch.tensor([3, 0, 5])[None, None, None].expand(2, 4, 2, 3).clone()
UNPOOLED[:, :, 1] += 6
MOVES.append(
    ("max_unpool2d", "places", lambda x: F.max_unpool2d(x, UNPOOLED, (2, 2), output_size=(4, 6)))
)
MOVES.append(
    (
        "max_unpool3d",
        "places",
        lambda x: aten.max_unpool3d(x, UNPOOLED, [4, 4, 6], [2, 2, 2], [0, 0, 0]),
    )
)
for name, label, run in MOVES:
    for form, x in [("plain", X), ("last", X.to(memory_format=LAST))]:
        if form == "plain" or name not in {"view", "_unsafe_view", "_reshape_alias", "as_strided"}:
            case(name, f"{label}-{form}", run, x, probed(run, X))
for number, (name, op, arguments, pick) in enumerate(ALONE):

    def picked(x: Tensor, op: Any = op, a: tuple = arguments, pick: int = pick) -> Tensor:
        result = op(x, *a)
        return result if isinstance(result, Tensor) else result[pick]

    case(name, f"alone-{number}", Alone(op, X, *arguments, pick=pick), X, probed(picked, X))


class Picked(Alone):
    """What no call of PyTorch makes: some elements of a value, put on its tape afterwards."""

    def tape(self, name: str, inputs: tuple[Tensor, ...]) -> Tape:
        tape = record(Made(lambda x: x * 1), inputs)
        tape.output = picking(tape, tape.output, self.args[0])
        return tape


for label, places in [
    ("a table", torch.tensor([[3, 0, 3], [47, 5, 6]])),
    ("a row", torch.arange(4)),
]:
    case("hysm.pick", label, Picked(None, places), X, probed(lambda x, p=places: x.take(p), X))
case(
    "cat",
    "two",
    lambda a, b: torch.cat([a, b], 1),
    (P, Q),
    probed(lambda a, b: torch.cat([a, b], 1), P, Q),
)
case(
    "where",
    "two inputs",
    lambda a, b: torch.where(torch.tensor([True, False, True]), a, b),
    (P, Q),
    probed(lambda a, b: torch.where(torch.tensor([True, False, True]), a, b), P, Q),
)


# -- what is held against them --------------------------------------------------------------------


def by_forward(link: Link) -> np.ndarray:
    """J, column by column: the image of every basis vector."""
    inputs = math.prod(link.in_shape)
    columns = []
    for basis in torch.eye(inputs, dtype=torch.float64):
        y = link.forward(basis.reshape(link.in_shape))
        assert y.shape == link.out_shape
        columns.append(y.reshape(-1))
    return torch.stack(columns, 1).numpy()


def by_edges(link: Link) -> np.ndarray:
    """J, row by row: the edges of every element of the output."""
    outputs, inputs = math.prod(link.out_shape), math.prod(link.in_shape)
    nodes = torch.arange(outputs)
    edges = link.edges(nodes)
    index, weight = edges.index, edges.weight
    assert index.shape == weight.shape
    assert len(index) == outputs
    matrix = np.zeros((outputs, inputs))
    most = 0
    rows = zip(
        index.reshape(outputs, -1).tolist(), weight.reshape(outputs, -1).tolist(), strict=True
    )
    for row, (columns, values) in enumerate(rows):
        real = [column for column in columns if column >= 0]
        assert len(real) == len(set(real)), "two edges to the same element"
        most = max(most, len(real))
        for column, value in zip(columns, values, strict=True):
            if column == -1:
                assert value == 0, "a hole has weight 0"
            else:
                matrix[row, column] = value
    assert link.fan_in() >= most
    if link.one_to_one:
        assert most <= 1

    some = nodes.flip(0)[::2]  # a few of them, in another order
    partly = link.edges(some)
    assert sorted_rows(partly, len(some)) == sorted_rows(link.edges(nodes), outputs)[::-1][::2]
    assert link.edges(nodes[:0]).index.numel() == 0
    return matrix


def sorted_rows(edges: Any, count: int) -> list[list[tuple[int, float]]]:
    rows = zip(
        edges.index.reshape(count, -1).tolist(),
        edges.weight.reshape(count, -1).tolist(),
        strict=True,
    )
    return [sorted(e for e in zip(i, w, strict=True) if e[0] >= 0) for i, w in rows]


def checked(link: Link) -> np.ndarray:
    """J, after making sure that every way to see it agrees."""
    matrix = by_forward(link)
    np.testing.assert_allclose(by_edges(link), matrix, err_msg="edges", **EXACT)
    check_samples(link, matrix)
    back = link.transposed()
    check_samples(back, matrix.T)
    assert (back.in_shape, back.out_shape) == (link.out_shape, link.in_shape)
    np.testing.assert_allclose(by_forward(back), matrix.T, err_msg="transposed", **EXACT)
    np.testing.assert_allclose(by_edges(back), matrix.T, err_msg="transposed edges", **EXACT)
    np.testing.assert_allclose(by_forward(back.transposed()), matrix, err_msg="twice", **EXACT)
    for part, want in [
        (link.positive(), matrix.clip(min=0)),
        (link.negative(), matrix.clip(max=0)),
        (back.positive(), matrix.T.clip(min=0)),
        (back.negative(), matrix.T.clip(max=0)),
    ]:
        if part is None:
            assert not want.any(), "None stands for zero"
            continue
        np.testing.assert_allclose(by_forward(part), want, err_msg="one sign", **EXACT)
        np.testing.assert_allclose(by_edges(part), want, err_msg="edges of one sign", **EXACT)
    return matrix


def check_samples(link: Link, matrix: np.ndarray) -> None:
    """Samples are told apart only where no edge leads from one to another."""
    for batch in (2, 3, 5):
        if link.keeps_samples(batch):
            outputs, inputs = (size // batch for size in matrix.shape)
            assert matrix.shape == (batch * outputs, batch * inputs)
            blocks = matrix.reshape(batch, outputs, batch, inputs).any((1, 3))
            assert not blocks[~np.eye(batch, dtype=bool)].any()


def check_identity(value: Value, step: Step) -> None:
    """output = sum of link.forward(source) + bias"""
    total = step.bias_like(value.data).clone()
    for source, link in step.links:
        total += link.forward(source.data)
    torch.testing.assert_close(total, value.data, **EXACT)


def _filters(*shape: int, stride: int = 1, padding: int = 0, groups: int = 1) -> Convolution:
    """On a picture of 7 x 7 with so many channels as the filters take."""
    weight, x = weights(*shape), numbers(1, shape[1] * groups, 7, 7)
    y = F.conv2d(x, weight, stride=stride, padding=padding, groups=groups)
    options = [stride] * 2, [padding] * 2, [1] * 2, groups
    return Convolution(x.shape, y.shape, weight, *options)


SINGLE: dict[str, Callable[[], Link]] = {
    "diagonal": lambda: Diagonal((1, 2, 3), (1, 2, 3), weights(1, 2, 1)),
    "reshaped": lambda: Diagonal((1, 2, 3), (1, 6), weights(1, 2, 3)),
    "selection": lambda: Selection(
        (1, 2, 3), (1, 4), torch.tensor([5, 3, -1, 1]), weights(4)
    ),
    "pad": lambda: Pad((1, 2, 3), (1, 2, 6), (2, 1)),
    "permutation": lambda: Permutation((1, 2, 3), (1, 3, 2), (0, 2, 1)),
    "matrix": lambda: Matrix((1, 4, 3), (1, 4, 5), weights(5, 3)),
    "convolution": lambda: _filters(4, 2, 3, 3, padding=1),
    "strided": lambda: _filters(4, 3, 3, 3, stride=2),
    "grouped": lambda: _filters(4, 1, 3, 3, groups=2),
    "pointwise": lambda: _filters(4, 6, 1, 1),
    "pointwise, strided": lambda: _filters(4, 6, 1, 1, stride=2),
    "average": lambda: Separable((1, 2, 4), (1, 2, 2), {2: weights(2, 4).abs()}),
    "mean": lambda: Separable((1, 2, 4), (1, 2), {2: weights(1, 4).abs()}),
    "attention": lambda: BatchedMatrix((1, 2, 4, 3), (1, 2, 4, 5), weights(2, 5, 3)),
    "columns": lambda: BatchedMatrix((1, 3, 4), (1, 5, 4), weights(1, 5, 3), columns=4),
    "sparse": lambda: Sparse((1, 2, 4), (1, 2, 3), weights(3, 4).to_sparse(), channels=2),
}  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_a_link_of_one_sample_takes_a_stack_of_them(name: str) -> None:
    link = SINGLE[name]()
    for either in (link, link.transposed()):
        for part in (either, either.positive(), either.negative()):
            if part is None:
                continue
            assert part.stacks
            several = [numbers(*part.in_shape, seed=seed) for seed in range(3)]
            want = torch.cat([part.forward(x) for x in several])
            assert part is not either or not torch.equal(want[:1], want[1:2])
            torch.testing.assert_close(part.forward(torch.cat(several)), want, **EXACT)


def test_every_kind_of_link_is_stacked() -> None:
    made = {type(link) for make in SINGLE.values() for link in (make(), make().transposed())}
    kinds = {*Link.__subclasses__(), *Moves.__subclasses__()} - {Moves}
    assert made == {kind for kind in kinds if kind.__module__.startswith("howyouseeme.")}


@pytest.mark.parametrize(
    "link",
    [
        Diagonal((2, 3), (2, 3)),
        Diagonal((1, 6), (6,)),
        Pad((1, 2), (3, 2), (0, 0, 1, 1)),
        Permutation((1, 1, 3), (1, 1, 3), (1, 0, 2)),
        Separable((1, 2), (1, 2), {0: torch.ones(1, 1)}),
        Matrix((1,), (1,), torch.ones(1, 1)),
    ],
    ids=lambda link: f"{type(link).__name__} {tuple(link.in_shape)}",
)
def test_links_that_have_more_samples_or_move_them_take_no_stack(link: Link) -> None:
    assert not link.stacks


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_rule_is_the_map_of_its_call(case: Case) -> None:
    space, _, call = case.name.partition(".")
    if space == "aten" and not hasattr(aten, call):
        pytest.skip("this PyTorch has no such call")
    untouched = [x.clone() for x in case.inputs]
    tape = case.tape()
    output = tape.output
    walk = plan(tape, output)
    assert case.name in {value.call.name for value, _ in walk.steps}

    # The maps from each value to the output, link by link, and the bias that gathers on the way.
    outputs = output.numel
    maps = {output: np.eye(outputs)}
    bias = np.zeros(outputs)
    for value, step in walk.steps:
        check_identity(value, step)
        through = maps[value]
        bias += through @ step.bias_like(value.data).reshape(-1).numpy()
        for source, link in step.links:
            assert link.in_shape == source.shape
            assert link.out_shape == value.shape
            maps[source] = maps.get(source, 0) + through @ checked(link)

    wanted = case.want()
    assert len(wanted) == len(tape.inputs)
    for source, want in zip(tape.inputs, wanted, strict=True):
        if want is None:
            assert source not in maps
        else:
            np.testing.assert_allclose(maps[source], want.matrix, **EXACT)
    total_bias = sum(want.bias for want in wanted if want is not None)
    np.testing.assert_allclose(bias, total_bias, **EXACT)
    for x, before in zip(case.inputs, untouched, strict=True):
        assert torch.equal(x, before)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("back", [False, True])
def test_a_convolution_turned_around(back: bool, groups: int) -> None:
    shape = (6, 4 // groups, 3, 2)
    inputs, outputs = ((1, 6, 3, 3), (1, 4, 5, 4)) if back else ((1, 4, 5, 4), (1, 6, 3, 3))
    link = Convolution(inputs, outputs, weights(*shape), [1], [0], [1], groups, back)
    signs = torch.tensor([1.0, -1, -1, 1, -1, 1], dtype=torch.float64)[: outputs[1]]
    rows = signs.repeat_interleave(math.prod(outputs[2:]))
    want = by_forward(link) * rows.numpy()[:, None]
    np.testing.assert_allclose(checked(link.turned(signs)), want, **EXACT)


@pytest.mark.parametrize("way", ["place by place", "patch by patch", "neither"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_there_and_back_however_they_are_done(
    dims: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against PyTorch's own, and the gradients of it."""
    taken = []
    for name in ("_place_by_place", "_row_by_row", "_patch_by_patch"):
        done = getattr(Convolution, name)
        monkeypatch.setattr(Convolution, name, lambda *a, d=done: taken.append(d.__name__) or d(*a))
    conv = getattr(F, f"conv{dims}d")
    back = getattr(F, f"conv_transpose{dims}d")
    size = 1 if way == "place by place" else 3
    channels, padding = (5, 1) if way == "neither" else (3, 0)
    x = weights(2, channels, *(9, 8, 7)[:dims])
    for stride, dilation in itertools.product((1, 2, 3), (1, 2)):
        w = weights(4, channels, *[size] * dims)
        y = conv(x, w, None, stride, padding, dilation)
        link = Convolution(x.shape, y.shape, w, (stride,), (padding,), (dilation,), 1)
        torch.testing.assert_close(link.forward(x), y)
        found = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(conv(found, w, None, stride, padding, dilation), found, y)
        torch.testing.assert_close(link.transposed().forward(y), want)
        for extra in range(max(stride, dilation)):
            z = back(y, w, None, stride, padding, extra, 1, dilation)
            link = Convolution(
                y.shape, z.shape, w, (stride,), (padding,), (dilation,), 1, back=True
            )
            torch.testing.assert_close(link.forward(y), z)
            if dims == 2:
                last = link.forward(y.contiguous(memory_format=torch.channels_last))
                torch.testing.assert_close(last, z)
        if dims == 2:
            link = Convolution(x.shape, y.shape, w, (stride,), (padding,), (dilation,), 1)
            last = link.forward(x.contiguous(memory_format=torch.channels_last))
            torch.testing.assert_close(last, y)
    ways = {"place by place": {"_place_by_place"}, "patch by patch": {"_patch_by_patch"}}
    wanted = ways.get(way, set()) if dims == 2 or way != "patch by patch" else set()
    if way == "place by place" and dims == 2:
        wanted.add("_row_by_row")
    assert set(taken) == wanted


def test_every_rule_has_a_case() -> None:
    assert set(rules.rules()) == {case.name for case in CASES}


def test_float32_weights_stay_float32() -> None:
    """What the rules make must not drag a float32 model to float64, nor off its device."""
    x = torch.randn(1, 2, 4, 4)
    model = Made(lambda x: F.avg_pool2d(F.interpolate(F.pad(x, (1, 1)).relu(), scale_factor=2), 2))
    tape = record(model, [x])
    for value, step in plan(tape, tape.output).steps:
        assert step.bias_like(value.data).dtype == torch.float32
        for source, link in step.links:
            assert link.forward(source.data).dtype == torch.float32
            assert link.edges(torch.arange(3)).weight.dtype == torch.float32


# -- what is refused ------------------------------------------------------------------------------

SQUARE = numbers(3, 3)
REFUSED = [
    (
        "a norm of a constant",
        lambda x: F.layer_norm(numbers(2, 3), (3,), x[0]),
        "aten.native_layer_norm",
    ),
    (
        "a negative divisor",
        lambda x: F.avg_pool2d(x[None], 2, divisor_override=-4),
        "aten.avg_pool2d",
    ),
    (
        "another size of what was computed",
        lambda x: (x * 1).resize_as_(numbers(2, 2)),
        "aten.resize_as",
    ),
    (
        "kernel of a batch",
        lambda x: F.conv2d(x[:2, None, None], x[None, None, :1]),
        "aten.convolution",
    ),
    ("kernel in 1-d", lambda x: F.conv1d(x[None, :1], x[None, :1]), "aten.convolution"),
    (
        "an infinite norm",
        lambda x: torch.linalg.vector_norm(x, float("inf")),
        "aten.linalg_vector_norm",
    ),
    (
        "a matrix of equations",
        lambda x: torch.linalg.solve(x + 3 * torch.eye(3), numbers(3, 2)),
        "aten._linalg_solve_ex",
    ),
    (
        "a right side for several",
        lambda x: torch.linalg.solve(torch.eye(3).double().expand(2, 3, 3), x),
        "aten._linalg_solve_ex",
    ),
    ("a median without an axis", lambda x: x.median(), "aten.median"),
    ("two computed operands", lambda x: x.abs() ** (x + 1), "aten.pow"),
    ("computed slope", lambda x: F.prelu(x, x[0]), "aten._prelu_kernel"),
    ("rounded division", lambda x: torch.div(x, 2, rounding_mode="floor"), "aten.div"),
    ("broadcast", lambda x: torch.fmod(x, torch.ones(2, 3, 3)), "aten.fmod"),
    ("memory of others", lambda x: (x * 1)[1:].as_strided((2,), (1,), 0), "aten.as_strided"),
    ("no rule", lambda x: x.cumprod(0), "aten.cumprod"),
]


@pytest.mark.parametrize(("run", "name"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(run: Callable[[Tensor], Tensor], name: str) -> None:
    tape = record(Made(run), [SQUARE])
    with pytest.raises(UnsupportedCallError, match=rf"\n  {name}\(.*\) in .*: \w+"):
        plan(tape, tape.output)


def test_statistics_that_a_device_does_not_keep_are_refused() -> None:
    args = (NORM, SCALE, SHIFT, MEAN.clone(), VAR.clone(), True, 0.1, 1e-3)
    tape = Alone(aten.native_batch_norm.default, *args).tape("aten.cudnn_batch_norm", (NORM,))
    with pytest.raises(UnsupportedCallError, match="keeps none on this device"):
        plan(tape, tape.output)


def test_all_missing_calls_are_named_at_once() -> None:
    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumprod(1).renorm(2, 0, 1.0)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.ReLU(), Part())

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x.logcumsumexp(1).cumprod(0).sum()

    tape = record(Whole().eval(), [torch.rand(2, 3)])
    with pytest.raises(UnsupportedCallError) as caught:
        plan(tape, tape.output)
    assert isinstance(caught.value, ModelError)
    message = str(caught.value)
    assert "4 call(s)" in message
    lines = message.splitlines()
    for line, start in zip(
        lines[1:-1],
        [
            "  aten.cumprod(2x3) in stem.1: no rule",
            "  aten.renorm(2x3) in stem.1: no rule",
            "  aten.logcumsumexp(2x3) in the model itself: no rule",
            "  aten.cumprod(2x3) in the model itself: no rule",
        ],
        strict=True,
    ):
        assert line.startswith(start)
    assert "howyouseeme.rules.rule" in lines[-1]
    assert all(n in lines[-1] for n in ("aten.logcumsumexp", "aten.cumprod", "aten.renorm"))


def test_the_error_tells_the_target_function_from_the_model() -> None:
    tape = record(
        nn.Sequential(nn.ReLU()).eval(),
        [torch.rand(2, 3)],
        readers=[lambda y: y.cumprod(1), lambda y: (y * 2).renorm(2, 0, 1.0)],
    )
    with pytest.raises(UnsupportedCallError) as caught:
        plan(tape, tape.reads[0])
    first, line, *_ = str(caught.value).splitlines()
    assert first == "The target function makes 1 call(s) that can't be walked back through:"
    assert line == "  aten.cumprod(2x3) in the target function: no rule"
    assert [call.reads for call in tape.calls] == [False, True, True, True]

    odd = record(Made(lambda x: x.cumprod(1)), [torch.rand(2, 3)], readers=[lambda y: y.cumprod(0)])
    with pytest.raises(UnsupportedCallError, match=r"^The model and the target function make 2 "):
        plan(odd, odd.reads[0])
    with pytest.raises(
        UnsupportedCallError, match=r"^The model makes 1 .*\n.* the model itself: no"
    ):
        plan(odd, odd.output)


def test_a_call_beside_the_way_needs_no_rule() -> None:
    tape = record(Made(lambda x: (x * 2, x.cumprod(0))), [SQUARE])
    doubled, summed = tape.output
    assert [value.call.name for value, _ in plan(tape, doubled).steps] == ["aten.mul"]
    with pytest.raises(UnsupportedCallError):
        plan(tape, summed)


def test_a_target_that_does_not_depend_on_the_input() -> None:
    def overwritten(x: Tensor) -> Tensor:
        y = x * 2
        return y.fill_(3)

    tape = record(Made(overwritten), [SQUARE])
    with pytest.raises(ModelError, match="does not depend on the model's input"):
        plan(tape, tape.output)


# -- the registry ---------------------------------------------------------------------------------


def test_a_duplicate_raises() -> None:
    before = rules.rules()["aten.relu"]
    with pytest.raises(ValueError, match=r"aten\.relu has a rule already \(.*secant\)"):
        rule("aten.relu")(lambda call, output: Step([]))
    assert rules.rules()["aten.relu"] is before


def test_a_rule_may_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules.rules(), "aten.relu", rules.rules()["aten.relu"])

    @rule("aten.relu", replace=True)
    def other(call: Call, output: Value) -> Step:
        raise rules.Refusal("not today")

    tape = record(Made(torch.relu), [numbers(3, 4)])
    with pytest.raises(UnsupportedCallError, match="not today"):
        plan(tape, tape.output)


def test_a_rule_keeps_the_family_of_the_one_it_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sigmoid made is a gate also after calls whose rule is the user's."""
    flip = rules.rules()["aten.flip"]
    monkeypatch.setitem(rules.rules(), "aten.flip", flip)
    assert rules.family_of("aten.flip") == "movement"

    @rule("aten.flip", replace=True)
    def other(call: Call, output: Value) -> Step:
        return flip(call, output)

    assert rules.family_of("aten.flip") == "movement"
    tape = record(Made(lambda x: x * x.sigmoid().flip(0)), [numbers(3, 4)])
    ((value, step), *_) = plan(tape, tape.output).steps
    assert value is tape.output
    assert [source for source, _ in step.links] == tape.inputs  # not the gate
    assert rules.family_of("aten.nothing") == ""


def test_a_family_is_what_a_rule_was_registered_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def turn(call: Call, output: Value) -> Step:
        return Step([])

    ways = {"pooling": rule_of("pooling"), "shop": partial(rule, family="shop"), __name__: rule}
    for family, register in ways.items():
        monkeypatch.setitem(rules.rules(), f"shop.{family}", turn)  # taken away again at the end
        register(f"shop.{family}", replace=True)(turn)
        assert rules.family_of(f"shop.{family}") == family


def test_gates_are_told_by_families_that_there_are() -> None:
    """Another name of a family would make other gates, and fail nowhere else."""
    families = {rules.family_of(name) for name in rules.rules()}
    assert families > MOVING
    assert families > {"linear", "convolution", "pointwise"}


def test_a_rule_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(rules.rules(), "aten.cumsum")
    x = numbers(3, 4)
    tape = record(Made(lambda x: x.cumsum(1)), [x])
    with pytest.raises(UnsupportedCallError, match=r"aten\.cumsum"):
        plan(tape, tape.output)

    @rule("aten.cumsum")
    def cumsum(call: Call, output: Value) -> Step:
        (source,) = call.inputs
        lower = torch.ones(source.shape[-1], source.shape[-1]).tril().to(source.data)
        return Step([(source, Matrix(source.shape, output.shape, lower))])

    assert rules.find_rule("aten.cumsum") is cumsum
    ((value, step),) = plan(tape, tape.output).steps
    check_identity(value, step)
    want = probed(lambda x: x.cumsum(1), x)()[0]
    np.testing.assert_allclose(checked(step.links[0][1]), want.matrix, **EXACT)
