"""What the tape says about a forward pass, and what it leaves untouched."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

import howyouseeme as hysm
from howyouseeme import Explainer, backtrack
from howyouseeme.backtrack import multipliers, plan
from howyouseeme.errors import ModelError
from howyouseeme.methods import Evidence
from howyouseeme.tape import Tape, Value, record, recorder


class Made(nn.Module):
    """A model whose forward is a function of the model and its inputs."""

    def __init__(self, function: Callable[..., Any], **buffers: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def made(function: Callable[..., Any]) -> Made:
    return Made(lambda _, *args, **kwargs: function(*args, **kwargs))


def picture(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (2, 4, 3, 3), generator=generator, dtype=torch.float64)


def names(tape: Tape) -> list[str]:
    return [call.name for call in tape.calls]


def modules(tape: Tape) -> list[str]:
    return [call.module for call in tape.calls]


# -- the output, bit by bit -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_output_is_that_of_the_plain_forward(name: str, form: torch.memory_format) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.randn(2, 3, 64, 64).to(memory_format=form)
    with torch.no_grad():
        want = model(x)
    tape = record(model, [x])
    assert torch.equal(tape.output.data, want)
    assert plan(tape, tape.output).separable(2)


def test_outputs_of_any_structure() -> None:
    def forward(x: Tensor) -> Any:
        return {"twice": x * 2, "parts": (x.relu(), [x[0], 5, None]), "constant": torch.ones(2)}

    x = picture()
    output = record(made(forward), [x]).output
    assert torch.equal(output["twice"].data, x * 2)
    assert isinstance(output["parts"], tuple)
    assert torch.equal(output["parts"][0].data, x.relu())
    assert torch.equal(output["parts"][1][0].data, x[0])
    assert output["parts"][1][1:] == [5, None]
    assert torch.equal(output["constant"], torch.ones(2))
    assert not isinstance(output["constant"], Value)


def test_the_input_itself_as_output() -> None:
    tape = record(made(lambda x: x), [picture()])
    assert tape.output is tape.inputs[0]
    assert tape.calls == []


# -- inputs ---------------------------------------------------------------------------------------


def test_several_inputs_wherever_they_are() -> None:
    def forward(first: Tensor, rest: dict, index: Tensor, *, scale: Tensor, name: str) -> Tensor:
        assert name == "kept"
        return first[:, index] * scale + rest["inner"][0] * rest["inner"][1]

    a, b, c, d = (picture(seed=i) for i in range(4))
    index = torch.tensor([3, 2, 1, 0])
    tape = record(made(forward), [a, {"inner": [b, c]}, index], {"scale": d, "name": "kept"})
    assert len(tape.inputs) == 4  # whole numbers carry no evidence
    for value, tensor in zip(tape.inputs, [a, b, c, d], strict=True):
        assert value.call is None
        assert torch.equal(value.data, tensor)
    assert torch.equal(tape.output.data, a[:, index] * d + b * c)


def test_the_same_tensor_twice_is_two_inputs() -> None:
    x = picture()
    tape = record(made(lambda a, b: a * 2 + b), [x, x])
    first, second = tape.inputs
    assert first is not second
    shares = dict(multipliers(plan(tape, tape.output), torch.ones_like(x)))
    assert torch.equal(shares[first], torch.full_like(x, 2))
    assert torch.equal(shares[second], torch.full_like(x, 1))


def test_one_of_two_inputs_that_share_memory_is_written() -> None:
    x = picture()
    before = x.clone()
    tape = record(made(lambda a, b: a.mul_(2) + b), [x, x])
    assert torch.equal(x, before)
    assert torch.equal(tape.output.data, before * 4)


# -- in-place: each program does the same as its twin, which writes nothing ------------------------


def _piecewise(buffer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = buffer(x)
        y[:, :2] = x[:, 2:] * 3
        y[:, 2:3] = x[:, :1]
        y[:, 3] = -x[:, 1]
        return y * 2

    return forward


def _pieces(x: Tensor) -> Tensor:
    return torch.cat([x[:, 2:] * 3, x[:, :1], -x[:, 1:2]], 1) * 2


def _half_filled(x: Tensor) -> Tensor:
    y = torch.zeros(2, 6, 3, 3, dtype=x.dtype)
    y[:, 1:3] = x[:, :2]
    return y + 1


def _in_place_view(x: Tensor) -> Tensor:
    y = x * 1
    y[0].mul_(3)
    return y


def _twice_on_a_view(part: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What is written to a part of a tensor is overwritten there."""

    def program(x: Tensor) -> Tensor:
        y = x * 2
        view = part(y)
        view.add_(part(x))
        view.add_(part(x) * part(x))
        return y * 3

    return program


def _twice_twin(part: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def twin(x: Tensor) -> Tensor:
        inside = part(torch.arange(x.numel()).reshape(x.shape))
        there = torch.isin(torch.arange(x.numel()), inside.reshape(-1)).reshape(x.shape).to(x)
        return (x * 2 + there * x + there * (x * x)) * 3

    return twin


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "the latter channels": lambda x: x[:, 2:],
    "a window": lambda x: x[:, :, 1:, 1:2],
    "all": lambda x: x[:],
}


def _slice_assignment(x: Tensor) -> Tensor:
    y = x * 1
    y[:, 0] = x[:, 1] * 2
    return y


def _older_view(x: Tensor) -> Tensor:
    y = x + 1
    view = y[0]
    y.relu_()
    y.mul_(2)
    return view * 3


def _older_views_of_views(x: Tensor) -> Tensor:
    y = x * 1
    outer = y[:, 1:]
    inner = outer.transpose(2, 3)[..., ::2]
    y.mul_(2)
    inner.relu_()
    outer[:, 0].sub_(x[:, 0])
    return torch.cat([y.sum(3), outer.sum(3), inner.sum(2)[..., [0, 1, 1]]], 1)


def _views_of_views_twin(x: Tensor) -> Tensor:
    y = x * 2
    tail = y[:, 1:]
    tail = torch.stack([tail[:, :, 0].relu(), tail[:, :, 1], tail[:, :, 2].relu()], 2)
    outer = torch.cat([tail[:, :1] - x[:, :1], tail[:, 1:]], 1)
    inner = outer.transpose(2, 3)[..., ::2]
    y = torch.cat([y[:, :1], outer], 1)
    return torch.cat([y.sum(3), outer.sum(3), inner.sum(2)[..., [0, 1, 1]]], 1)


def _before_and_after(x: Tensor) -> Tensor:
    y = x * 2
    early = y * 3
    y.relu_()
    middle = y * 5
    y.add_(x)
    return early + middle + y


def _through_data(x: Tensor) -> Tensor:
    y = x * 2
    y.data.relu_()
    y.data[0] = x[1] * 4
    return y + 1


def _through_detach(x: Tensor) -> Tensor:
    y = x * 2
    y.detach().relu_()
    return y + 1


def _other_data(x: Tensor) -> Tensor:
    y = x * 2
    y.data = x * 3
    return y + x


def _own_input(x: Tensor) -> Tensor:
    x.relu_()
    x[:, 0] = 1
    return x.mul_(2)


def _new_shapes(x: Tensor) -> Tensor:
    y = x * 2
    view = y.flatten(1)
    y.unsqueeze_(1)
    y.transpose_(1, 2).squeeze_(2)
    y.relu_()
    return y.flatten(1) + view


def _transposed_then_written(x: Tensor) -> Tensor:
    y = x * 2
    first = y * 1
    y.transpose_(2, 3)
    y[:, :, 0].mul_(5)
    return y.transpose(2, 3) + first


def _out(x: Tensor) -> Tensor:
    y = torch.empty(2, 4, 3, 3, dtype=x.dtype)
    torch.clamp(x, min=0, out=y)
    first = y * 1
    torch.add(x, y, alpha=2, out=y)
    return first * y.sign() + y


def _out_in_a_slice(x: Tensor) -> Tensor:
    y = x * 1
    torch.mul(x[0], 5, out=y[1])
    return y


def _swap(x: Tensor) -> Tensor:
    y = x * 1
    y[:, :2], y[:, 2:] = y[:, 2:].clone(), y[:, :2].clone()
    return y


def _chunks(x: Tensor) -> Tensor:
    y = x * 1
    first, second = y.chunk(2, 1)
    first.relu_()
    second.mul_(-1)
    return torch.cat([second, first, y], 1)


def _constant_written(x: Tensor) -> Tensor:
    y = torch.full((2, 4, 3, 3), 2.0, dtype=x.dtype)
    y.mul_(x)
    return y.add_(1)


def _constant_changed_after_use(x: Tensor) -> Tensor:
    scale = torch.full((4, 1, 1), 3.0, dtype=x.dtype)
    y = x * scale
    scale.mul_(2)
    return y + x * scale


def _mask_changed_after_use(x: Tensor) -> Tensor:
    mask = x > 0
    y = x * mask
    mask.logical_not_()
    return y - x * mask


def _index_changed_after_use(x: Tensor) -> Tensor:
    index = torch.tensor([0, 1])
    y = x[:, index]
    index.add_(2)
    return y - x[:, index]


def _masked(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1].masked_fill_(x[:, 1] > 0, -1)
    y[x < -1] = 5
    return y


def _overlapping_writes(x: Tensor) -> Tensor:
    y = x * 1
    y[:, :3].add_(1)
    y[:, 1:].mul_(2)
    y[:, 2] = x[:, 0]
    return y


def _empty_view(x: Tensor) -> Tensor:
    y = x * 2
    nothing = y[:0]
    y.relu_()
    return torch.cat([nothing, y])


def _conv(x: Tensor) -> Tensor:
    return F.conv2d(x, picture(3, 4, 2, 2, seed=3), picture(3, seed=4), padding=1)


PROGRAMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu_": (lambda x: (x * 2).relu_() + 1, lambda x: (x * 2).relu() + 1),
    "add_": (lambda x: (x * 2).add_(x), lambda x: x * 2 + x),
    "hardtanh_": (lambda x: F.hardtanh_(_conv(x)), lambda x: F.hardtanh(_conv(x))),
    "two in a row": (lambda x: _conv(x).relu_().mul_(2), lambda x: _conv(x).relu() * 2),
    "on a view": (_in_place_view, lambda x: torch.cat([x[:1] * 3, x[1:]])),
    **{
        f"twice on {name}": (_twice_on_a_view(part), _twice_twin(part))
        for name, part in PARTS.items()
    },
    "slice assignment": (_slice_assignment, lambda x: torch.cat([x[:, 1:2] * 2, x[:, 1:]], 1)),
    "zeros": (_piecewise(lambda x: torch.zeros(2, 4, 3, 3).to(x)), _pieces),
    "zeros_like": (_piecewise(torch.zeros_like), _pieces),
    "empty_like": (_piecewise(torch.empty_like), _pieces),
    "new_zeros": (_piecewise(lambda x: x.new_zeros(2, 4, 3, 3)), _pieces),
    "clone": (_piecewise(torch.clone), _pieces),
    "filled in part": (_half_filled, lambda x: F.pad(x[:, :2], (0, 0, 0, 0, 1, 3)) + 1),
    "older view": (_older_view, lambda x: (x + 1)[0].relu() * 2 * 3),
    "older views of views": (_older_views_of_views, _views_of_views_twin),
    "before and after": (
        _before_and_after,
        lambda x: x * 6 + (x * 2).relu() * 5 + ((x * 2).relu() + x),
    ),
    ".data": (_through_data, lambda x: torch.stack([x[1] * 4, (x[1] * 2).relu()]) + 1),
    ".detach()": (_through_detach, lambda x: (x * 2).relu() + 1),
    ".data = other": (_other_data, lambda x: x * 3 + x),
    "own input": (
        _own_input,
        lambda x: torch.cat([torch.ones_like(x[:, :1]), x[:, 1:].relu()], 1) * 2,
    ),
    "size and strides": (_new_shapes, lambda x: (x * 2).relu().flatten(1) * 2),
    "transposed, then written": (
        _transposed_then_written,
        lambda x: torch.cat([x[..., :1] * 2 * 5, x[..., 1:] * 2], 3) + x * 2,
    ),
    "out=": (
        _out,
        lambda x: x.clamp(min=0) * (x + x.clamp(min=0) * 2).sign() + (x + x.clamp(min=0) * 2),
    ),
    "out= in a slice": (_out_in_a_slice, lambda x: torch.stack([x[0], x[0] * 5])),
    "swap": (_swap, lambda x: torch.cat([x[:, 2:], x[:, :2]], 1)),
    "chunks": (
        _chunks,
        lambda x: torch.cat([-x[:, 2:], x[:, :2].relu(), x[:, :2].relu(), -x[:, 2:]], 1),
    ),
    "constant written": (_constant_written, lambda x: x * 2 + 1),
    "constant changed after use": (_constant_changed_after_use, lambda x: x * 3 + x * 6),
    "mask changed after use": (_mask_changed_after_use, torch.abs),
    "index changed after use": (_index_changed_after_use, lambda x: x[:, :2] - x[:, 2:]),
    "masked": (
        _masked,
        lambda x: torch.cat(
            [(x * 2)[:, :1], (x * 2)[:, 1:2].masked_fill(x[:, 1:2] > 0, -1), (x * 2)[:, 2:]], 1
        ).masked_fill(x < -1, 5),
    ),
    "overlapping writes": (
        _overlapping_writes,
        lambda x: torch.cat([x[:, :1] + 1, (x[:, 1:2] + 1) * 2, x[:, :1], x[:, 3:] * 2], 1),
    ),
    "circular pad": (
        lambda x: F.pad(x, (1, 2, 0, 0), mode="circular"),
        lambda x: torch.cat([x[..., 2:], x, x[..., :2]], 3),
    ),
    "empty view": (_empty_view, lambda x: (x * 2).relu()),
}


def evidence(forward: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output, its exact multiplier at the input, and the share of the biases.

    Every step on the way must explain its value by the values that it came from.
    """
    tape = record(made(forward), [x])
    walk = plan(tape, tape.output)
    for value, step in walk.steps:
        total = step.bias_like(value.data).clone()
        for source, link in step.links:
            total += link.forward(source.data)
        torch.testing.assert_close(total, value.data, rtol=1e-12, atol=1e-12)
    biases: list[Tensor] = []
    seed = picture(*tape.output.shape, seed=9)
    arrived = dict(multipliers(walk, seed, on_bias=lambda call, share: biases.append(share.sum())))
    assert torch.equal(tape.inputs[0].data, x)
    return tape.output.data, arrived[tape.inputs[0]], sum(biases, x.new_zeros(()))


@pytest.fixture
def nan_in_fresh_memory() -> Iterator[None]:
    """What `torch.empty` returns is full of NaN, as it may be by chance."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("program", ["empty_like", "out=", "circular pad"])
def test_memory_that_was_never_written_is_no_evidence(program: str) -> None:
    assert torch.empty(1).isnan().all()
    output, multiplier, bias = evidence(PROGRAMS[program][0], picture())
    for tensor in (output, multiplier, bias):
        assert tensor.isfinite().all()


SHAPE = (2, 4, 3, 3)
STRIDES = (36, 1, 12, 4)

#: All ways to get memory that nothing was written to.
UNWRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "empty": lambda x: torch.empty(SHAPE, dtype=x.dtype),
    "empty_like": torch.empty_like,
    "empty_permuted": lambda x: torch.empty_permuted(SHAPE, (0, 2, 3, 1), dtype=x.dtype),
    "empty_strided": lambda x: torch.empty_strided(SHAPE, STRIDES, dtype=x.dtype),
    "new_empty": lambda x: x.new_empty(SHAPE),
    "new_empty_strided": lambda x: x.new_empty_strided(SHAPE, STRIDES),
}


@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("make", UNWRITTEN.values(), ids=UNWRITTEN)
def test_what_is_never_written_is_zero(make: Callable[[Tensor], Tensor]) -> None:
    def half_written(x: Tensor) -> Tensor:
        y = make(x)
        y[:, :2] = x[:, :2]
        return y * 2

    x = picture()
    assert half_written(x)[:, 2:].isnan().all()
    output, multiplier, bias = evidence(half_written, x)
    assert torch.equal(output, torch.cat([x[:, :2] * 2, torch.zeros_like(x[:, 2:])], 1))
    assert torch.equal(multiplier[:, 2:], torch.zeros_like(x[:, 2:]))
    assert bias == 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_in_place_is_the_same_as_its_twin(program: str) -> None:
    in_place, twin = PROGRAMS[program]
    x = picture()
    before = x.clone()
    want = in_place(x.clone())
    torch.testing.assert_close(twin(x.clone()), want, rtol=1e-12, atol=1e-12)  # a twin it is

    output, multiplier, bias = evidence(in_place, x)
    assert torch.equal(output, want)
    assert torch.equal(x, before)
    _, twin_multiplier, twin_bias = evidence(twin, x)
    torch.testing.assert_close(multiplier, twin_multiplier, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bias, twin_bias, rtol=1e-12, atol=1e-11)


def overwritten(kind: str) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    """A network that overwrites what its last call but one made, and what that was."""
    conv, norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.running_mean += 0.1  # type: ignore[operator]
        norm.bias += 0.2
    relu = nn.ReLU(inplace=True)
    if kind == "convolution":
        return nn.Sequential(conv, relu), lambda m, x: m[0](x)
    if kind == "batch norm":
        return nn.Sequential(conv, norm, relu), lambda m, x: m[1](m[0](x))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv, norm

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            y += x[..., 1:-1, 1:-1]
            return F.relu_(y)

    return Residual(), lambda m, x: m.norm(m.conv(x)) + x[..., 1:-1, 1:-1]


@pytest.mark.parametrize("kind", ["convolution", "batch norm", "sum"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_what_a_network_overwrites_is_made_again_when_asked_for(
    kind: str, form: torch.memory_format
) -> None:
    torch.manual_seed(0)
    model, before = overwritten(kind)
    model.eval()
    x = torch.randn(2, 4, 6, 6).to(memory_format=form)
    tape = record(model, [x])
    last = tape.calls[-1]
    (value,) = last.inputs
    assert value.forgotten  # no memory is kept for it
    assert value.shape == last.output.shape
    assert value.dtype == torch.float32
    assert value.forgotten
    with torch.no_grad():
        expected = before(model, x)
    torch.testing.assert_close(value.data, expected, rtol=0, atol=0)
    assert value.data.stride() == expected.stride()
    assert (value.data < 0).any()  # which the output isn't


def test_what_is_made_again_is_made_of_the_weights_that_there_were() -> None:
    """Weights, and the call's own input, are overwritten after it."""
    conv = nn.Conv2d(4, 4, 3).double()

    def forward(model: Made, x: Tensor) -> Tensor:
        first = model.conv(x)
        second = model.conv(first)
        first.mul_(2)
        second.relu_()
        model.conv.weight.mul_(3)
        return second + first.sum()

    model = made(lambda x: x)
    model.function, model.conv = forward, conv.eval()
    x = picture(1, 4, 7, 7)
    with torch.no_grad():
        expected = conv(conv(x))
    tape = record(model, [x])
    second = tape.calls[1].output
    assert second.forgotten
    torch.testing.assert_close(second.data, expected, rtol=0, atol=0)


def test_a_long_row_of_overwritten_sums_is_made_again() -> None:
    """Each of them needs the one before."""

    def forward(x: Tensor) -> Tensor:
        y = x + 1
        for _ in range(2000):
            y += x
        return y

    x = picture(1, 2)
    last = record(made(forward), [x]).calls[-1]
    assert last.inputs[0].forgotten
    torch.testing.assert_close(last.inputs[0].data, 2000 * x + 1)


def test_what_is_made_again_has_the_type_that_it_had() -> None:
    def mixed(x: Tensor) -> Tensor:
        y = x.half() + 1
        y.add_(x)  # summed in float32, kept in half precision
        return y.relu_()

    def wide(x: Tensor) -> Tensor:
        y = torch.empty(x.shape, dtype=torch.float64)
        torch.add(x, 1, out=y)
        return y.relu_()

    x = picture(2, 3).float()
    for forward, expected in ((mixed, (x.half() + 1).add_(x)), (wide, (x + 1).double())):
        (value,) = record(made(forward), [x]).calls[-1].inputs
        assert value.forgotten
        assert value.dtype == expected.dtype
        assert value.data.dtype == expected.dtype
        torch.testing.assert_close(value.data, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("forward", "signed"),
    [
        (lambda x: F.hardtanh(x, -1, 1), True),
        (lambda x: F.hardtanh(x, 0, 6), False),
        (lambda x: x.clamp(-0.5), True),
        (lambda x: x.clamp(max=1), True),
        (lambda x: x.clamp(min=0), False),
        (lambda x: x.relu(), False),
        (lambda x: x.sigmoid(), False),
        (lambda x: x.tanh(), True),
    ],
)
def test_the_sign_is_known_from_the_call_or_looked_up(
    forward: Callable[[Tensor], Tensor], signed: bool
) -> None:
    tape = record(made(forward), [torch.linspace(-2, 2, 9)])
    assert tape.output.signed is signed
    assert bool((tape.output.data < 0).any()) is signed


def test_a_plan_makes_nothing_again_for_its_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device signs are looked at ahead, but for those of what was overwritten."""
    monkeypatch.setattr(backtrack, "at_hand", lambda tensor: False)
    model = nn.Sequential(
        *(nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True))
    ).eval()
    tape = record(model, [torch.randn(1, 4, 8, 8)])
    plan(tape, tape.output)
    overwritten = [call.output for call in tape.calls if call.name == "aten.convolution"]
    assert all(value.forgotten for value in overwritten)


def test_what_a_view_still_shows_is_kept() -> None:
    """An overwritten tensor that something else shares memory with is kept as it was."""
    conv = nn.Conv2d(4, 4, 3).double()

    def forward(model: Made, x: Tensor) -> Tensor:
        y = model.conv(x)
        flat = y.view(-1)
        y.relu_()
        return flat * 2

    model = made(lambda x: x)
    model.function, model.conv = forward, conv.eval()
    x = picture(1, 4, 7, 7)
    tape = record(model, [x])
    with torch.no_grad():
        expected = conv(x)
    torch.testing.assert_close(tape.calls[0].output.data, expected, rtol=0, atol=0)
    torch.testing.assert_close(tape.output.data, 2 * expected.relu().view(-1), rtol=0, atol=0)


def test_an_in_place_call_has_its_value_before_and_after() -> None:
    x = picture()
    tape = record(made(lambda x: x.mul(2).relu_().add_(1)), [x])
    assert names(tape) == ["aten.mul", "aten.relu", "aten.add"]
    doubled, clipped, shifted = (call.output for call in tape.calls)
    assert torch.equal(doubled.data, x * 2)
    assert torch.equal(clipped.data, (x * 2).relu())
    assert torch.equal(shifted.data, (x * 2).relu() + 1)
    assert tape.calls[1].args[0] is doubled
    assert tape.calls[2].args[0] is clipped
    assert tape.output is shifted
    # The calls on the tape write nothing, so that a rule may make them again.
    assert [call.op for call in tape.calls[1:]] == [
        torch.ops.aten.relu.default,
        torch.ops.aten.add.Tensor,
    ]


def test_a_write_is_read_anew_only_where_it_has_to_be() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 2
        y.relu_()
        return y.view(-1) + 1

    assert "hysm.reread" not in names(record(made(forward), [picture()]))


def test_outs_are_no_arguments() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 2
        torch.exp(x, out=y)
        return y

    tape = record(made(forward), [picture()])
    assert names(tape) == ["aten.mul", "aten.exp"]
    assert tape.calls[1].inputs == tape.inputs
    assert tape.calls[1].kwargs == {}
    assert tape.calls[1].op is torch.ops.aten.exp.default


def test_a_call_that_writes_and_returns() -> None:
    """rrelu fills its noise in place and returns its output as well."""
    x = picture()
    tape = record(made(lambda x: F.rrelu(x, 0.1, 0.3)), [x])
    assert torch.equal(tape.output.data, F.leaky_relu(x, 0.2))
    assert tape.output is tape.calls[0].output


def test_the_shape_of_the_input_is_no_dependence() -> None:
    tape = record(made(lambda x: torch.zeros_like(x) + x.new_full((3,), 2.0)), [picture()])
    assert tape.calls == []
    assert not isinstance(tape.output, Value)


# -- modules --------------------------------------------------------------------------------------


class Shared(nn.Module):
    """Module names of every sort: nested, reused, called twice, called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), self.act)
        self.twice = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        x = self.block(x)
        x = self.twice(self.twice(x))
        return F.relu(x) * 2


def test_module_names() -> None:
    model = Shared().double().eval()
    tape = record(model, [picture()])
    assert list(zip(names(tape), modules(tape), strict=True)) == [
        ("aten.relu", "act"),
        ("aten.convolution", "block.0"),
        ("aten.relu", "act"),  # the same module as block.1, under its first name
        ("aten.convolution", "twice"),
        ("aten.convolution", "twice"),
        ("aten.relu", ""),
        ("aten.mul", ""),
    ]
    assert [call.index for call in tape.calls] == list(range(7))
    assert tape.calls[1].owner is model.block[0]
    assert tape.calls[5].owner is model
    assert tape.calls[1].describe() == "aten.convolution(2x4x3x3) in block.0"
    assert tape.calls[6].describe() == "aten.mul(2x4x3x3) in the model itself"


def test_a_module_that_is_made_in_forward_has_no_name() -> None:
    tape = record(made(lambda x: nn.ReLU().eval()(x) * 2), [picture()])
    assert modules(tape) == ["", ""]
    assert isinstance(tape.calls[0].owner, nn.ReLU)


def test_module_names_after_an_exception_inside() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("tried and failed")

    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails = Fails()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.fails(x)
            except KeyError:
                x = x * 2
            return self.act(x)

    tape = record(Tries().eval(), [picture()])
    assert list(zip(names(tape), modules(tape), strict=True)) == [
        ("aten.mul", ""),
        ("aten.relu", "act"),
    ]


def test_control_flow_that_depends_on_the_data() -> None:
    def forward(x: Tensor) -> Tensor:
        while x.abs().max() > 1:
            x = x / 2
        return x.relu() if x.sum() > 0 else -x

    model = made(forward)
    small, large = torch.full((1, 2), 0.5), torch.tensor([[-5.0, 3.0]])
    first, second = record(model, [small]), record(model, [large])
    assert names(first).count("aten.div") == 0
    assert names(second).count("aten.div") == 3
    assert first.output.call.name == "aten.relu"
    assert second.output.call.name == "aten.neg"
    assert torch.equal(second.output.data, -large / 8)


# -- nothing is changed ---------------------------------------------------------------------------


def test_buffers_are_restored() -> None:
    def forward(model: Made, x: Tensor) -> Tensor:
        model.written.add_(x.mean())  # in place, by something that depends on the input
        model.count += 1  # in place
        model.assigned = model.assigned * 2  # another tensor
        y = x * model.written + model.assigned
        model.written.zero_()
        return y + model.written

    buffers = {
        "written": torch.ones(3, dtype=torch.float64),
        "count": torch.tensor(4),
        "assigned": torch.full((3,), 2.0, dtype=torch.float64),
    }
    model = Made(forward, **buffers)
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    x = picture()
    for _ in range(2):
        tape = record(model, [x])
        assert dict(model.named_buffers()).keys() == before.keys()
        for name, buffer in model.named_buffers():
            assert buffer is buffers[name]
            assert torch.equal(buffer, before[name])
    torch.testing.assert_close(tape.output.data, x * (1 + x.mean()) + 4)
    for value, step in plan(tape, tape.output).steps:  # what was written is still on the tape
        total = step.bias_like(value.data).clone()
        for source, link in step.links:
            total += link.forward(source.data)
        torch.testing.assert_close(total, value.data, rtol=1e-12, atol=1e-12)


def test_a_buffer_as_output_has_the_contents_that_forward_gave_it() -> None:
    def forward(model: Made, x: Tensor) -> tuple[Tensor, Tensor]:
        model.calls += 1
        model.seen += x.sum()
        return model.calls, model.seen

    model = Made(forward, calls=torch.tensor(4), seen=torch.zeros((), dtype=torch.float64))
    x = picture()
    calls, seen = record(model, [x]).output
    assert int(calls) == 5
    assert float(seen.data) == float(x.sum())
    assert int(model.calls) == 4
    assert float(model.seen) == 0


def test_running_statistics_are_restored() -> None:
    """Batch norm in training writes to them without its schema saying so."""
    norm = nn.BatchNorm2d(4).double().eval()

    def forward(x: Tensor) -> Tensor:
        return F.batch_norm(x, norm.running_mean, norm.running_var, training=True)

    model = made(forward)
    model.norm = norm
    x = picture() + 3
    tape = record(model, [x])
    assert torch.equal(norm.running_mean, torch.zeros(4).double())
    assert torch.equal(norm.running_var, torch.ones(4).double())
    torch.testing.assert_close(tape.output.data, F.batch_norm(x, None, None, training=True))


def test_the_tensors_of_the_caller_are_restored() -> None:
    def forward(x: Tensor, mask: Tensor, nested: dict) -> Tensor:
        mask.logical_not_()
        nested["inner"][0].fill_(7)
        x[0].zero_()
        return x * mask + nested["inner"][0]

    x, other = picture(), picture(seed=1)
    mask = x > 0
    kept = [item.clone() for item in (x, mask, other)]
    want = forward(*[x.clone(), mask.clone(), {"inner": [other.clone()]}])
    tape = record(made(forward), [x, mask, {"inner": [other]}])
    assert torch.equal(tape.output.data, want)
    for item, before in zip((x, mask, other), kept, strict=True):
        assert torch.equal(item, before)
    assert torch.equal(tape.inputs[0].data, kept[0])
    assert torch.equal(tape.inputs[1].data, kept[2])


def test_gradients_hooks_and_flags_are_unchanged() -> None:
    model = Shared().double().eval()
    model.twice.weight.requires_grad_(False)
    model.block[0].weight.grad = torch.ones_like(model.block[0].weight)
    handle = model.act.register_forward_hook(lambda *_: None)
    x = picture().requires_grad_()

    def state() -> list[Any]:
        return [
            [(n, p.requires_grad, p.grad is None, p._version) for n, p in model.named_parameters()],
            [(n, m.training, len(m._forward_hooks)) for n, m in model.named_modules()],
            [(len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
            [{k: v.clone() for k, v in model.state_dict().items()}.keys()],
            [x.requires_grad, x.grad, x.is_leaf, x._version, torch.is_grad_enabled()],
        ]

    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = state()
    tape = record(model, [x])
    assert state() == before
    assert torch.equal(model.block[0].weight.grad, torch.ones_like(model.block[0].weight))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert all(not value.data.requires_grad for value in tape.values)
    model(x).sum().backward()  # and the model can still be trained
    assert x.grad is not None
    handle.remove()


def global_hooks() -> tuple[int, ...]:
    return tuple(
        len(hooks)
        for hooks in (
            nn_module._global_forward_hooks,
            nn_module._global_forward_pre_hooks,
            nn_module._global_forward_hooks_always_called,
        )
    )


def test_nothing_is_left_after_an_exception() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(3))
            self.register_buffer("other", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(0)
            self.count.add_(1)
            self.other = self.other + 1
            raise RuntimeError("out of luck")

    model = nn.Sequential(nn.ReLU(inplace=True), Fails()).eval()
    hooks = global_hooks()
    x = torch.randn(2, 3)
    before = x.clone()
    with pytest.raises(RuntimeError, match="out of luck"):
        record(model, [x])
    assert global_hooks() == hooks == (0, 0, 0)
    assert torch.equal(x, before)
    assert torch.equal(model[1].count, torch.zeros(3))
    assert torch.equal(model[1].other, torch.ones(3))
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0
    assert torch.is_grad_enabled()
    assert names(record(model[0], [x])) == ["aten.relu"]


def test_the_hooks_of_the_user_still_run() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()).double().eval()
    seen: list[str] = []
    model[0].register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    everywhere = nn_module.register_module_forward_hook(
        lambda module, inputs, output: seen.append(type(module).__name__)
    )
    try:
        x = picture()
        want = model(x).detach()
        seen.clear()
        tape = record(model, [x])
        assert global_hooks()[0] == 1
    finally:
        everywhere.remove()
    assert seen == ["before", "Conv2d", "ReLU", "Sequential"]
    assert torch.equal(tape.output.data, want)
    assert names(tape) == ["aten.convolution", "aten.mul", "aten.relu"]


def quantisable() -> nn.Module:
    torch.manual_seed(0)
    quantising = torch.ao.quantization
    return nn.Sequential(
        *(quantising.QuantStub(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(4 * 16, 3), quantising.DeQuantStub()),
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_quantised_networks_are_refused_for_what_they_are(kind: str) -> None:
    """Their modules have the flag of training set, whatever the float model's was."""
    quantising, model = torch.ao.quantization, quantisable().eval()
    if kind == "dynamic":
        model = quantising.quantize_dynamic(model, {nn.Linear})
    else:
        model.qconfig = quantising.get_default_qconfig("fbgemm")
        quantising.prepare(model, inplace=True)(torch.rand(2, 3, 6, 6))
        quantising.convert(model, inplace=True)
    assert any(module.training for module in model.modules())
    with pytest.raises(ModelError, match=r"was quantised by PyTorch.*: explain the float model"):
        hysm.explain(model, torch.rand(1, 3, 6, 6))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_training_for_quantisation_is_explained_and_its_buffers_left_as_they_were() -> None:
    quantising, model = torch.ao.quantization, quantisable()
    model[2] = model[0]  # what runs twice has observed an activation when it runs again
    model.qconfig = quantising.get_default_qat_qconfig("fbgemm")
    quantising.prepare_qat(model.train(), inplace=True)(torch.rand(4, 3, 6, 6))
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.rand(1, 3, 6, 6) * 3  # beyond all that was observed
    found = hysm.explain(model, x, 1, method="exact")
    assert found.evidence.abs().sum() > 0
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model(x)
    assert not all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_training_mode_is_refused() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout()), nn.BatchNorm2d(4), nn.ReLU()
    ).eval()
    model[0][1].train()
    with pytest.raises(ModelError, match=r"training mode \(0\.1\)"):
        record(model, [torch.rand(1, 4, 2, 2)])
    model[0][1].eval()
    model[0][0], model[2] = (
        nn.Identity(),
        nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.LayerNorm(3)),
    )
    assert model[2].training  # which is no matter
    assert record(model, [torch.rand(1, 4, 2, 2)]).calls
    model[2].append(nn.RReLU())
    with pytest.raises(ModelError, match=r"training mode \(2\.3\)"):
        record(model, [torch.rand(1, 4, 2, 2)])
    model.train()
    with pytest.raises(ModelError, match=r"training mode \(Sequential, 0, 0\.0, \.\.\.\)"):
        record(model, [torch.rand(1, 4, 2, 2)])
    assert model.training
    assert torch.equal(model[1].running_mean, torch.zeros(4))
    assert global_hooks() == (0, 0, 0)


# -- threads --------------------------------------------------------------------------------------


class Waits(nn.Module):
    """Meets the other thread in the middle of its forward."""

    def __init__(self, barrier: threading.Barrier, layer: nn.Module) -> None:
        super().__init__()
        self.barrier, self.layer = barrier, layer

    def forward(self, x: Tensor) -> Tensor:
        self.barrier.wait(timeout=10)
        x = self.layer(x)
        self.barrier.wait(timeout=10)
        return x


def test_two_threads_record_two_models() -> None:
    barrier = threading.Barrier(2)
    left = nn.Sequential()
    right = nn.Sequential()
    for i in range(4):
        left.add_module(f"left{i}", Waits(barrier, nn.ReLU(inplace=bool(i % 2))))
        right.add_module(f"right{i}", Waits(barrier, nn.Sequential(nn.Conv2d(4, 4, 1))))
    tapes: dict[str, Tape] = {}
    failures: list[BaseException] = []

    def work(name: str, model: nn.Module) -> None:
        try:
            tapes[name] = record(model.double().eval(), [picture()])
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=("left", left)),
        threading.Thread(target=work, args=("right", right)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not failures
    assert names(tapes["left"]) == ["aten.relu"] * 4
    assert modules(tapes["left"]) == [f"left{i}.layer" for i in range(4)]
    assert names(tapes["right"]) == ["aten.convolution"] * 4
    assert modules(tapes["right"]) == [f"right{i}.layer.0" for i in range(4)]
    assert global_hooks() == (0, 0, 0)


def test_a_thread_that_does_not_record_is_not_on_the_tape() -> None:
    barrier = threading.Barrier(2)
    recorded = nn.Sequential(Waits(barrier, nn.ReLU())).eval()
    other = nn.Sequential(Waits(barrier, nn.Sigmoid())).eval()
    thread = threading.Thread(target=other, args=(torch.rand(2),))
    thread.start()
    tape = record(recorded, [torch.rand(3)])
    thread.join(timeout=30)
    assert names(tape) == ["aten.relu"]
    assert modules(tape) == ["0.layer"]


# -- small things that rules rely on --------------------------------------------------------------


def test_flat_is_row_major_whatever_the_strides() -> None:
    x = picture().to(memory_format=torch.channels_last)
    tape = record(made(lambda x: x.permute(0, 2, 3, 1)), [x])
    assert torch.equal(tape.inputs[0].flat, x.contiguous().view(-1))
    assert torch.equal(tape.output.flat, x.permute(0, 2, 3, 1).contiguous().view(-1))


def test_masks_and_indices_are_constants() -> None:
    x = picture(2, 4)
    tape = record(made(lambda x: x * (x > 0) + x.gather(1, x.argsort(1)).long()), [x])
    for call in tape.calls:
        assert all(value.data.is_floating_point() for value in call.inputs)


def test_the_arguments_of_a_call_by_position_or_name() -> None:
    tape = record(made(lambda x: torch.add(x, x, alpha=3)), [picture()])
    (call,) = tape.calls
    assert call.argument(1, "other") is tape.inputs[0]
    assert call.argument(2, "alpha", 1) == 3
    assert call.argument(3, "missing", "default") == "default"


def test_samples_that_mix_are_not_separable() -> None:
    x = picture()

    def separable(forward: Any, x: Tensor) -> bool:
        tape = record(made(forward), [x])
        return plan(tape, tape.output).separable(len(x))

    assert separable(lambda x: x.relu().flatten(1), x)
    assert separable(lambda x: x.flatten(), x)  # one sample after the other
    assert separable(lambda x: x - x.mean(), x[:1])
    whole = 2**63 - 1  # as exported programs write x[:, :, 1:] out
    assert separable(lambda x: torch.ops.aten.slice(x, 0, 0, whole)[:, :, 1:], x)
    for mixes in (
        lambda x: x - x.mean(),
        lambda x: x - x.mean(0),
        lambda x: x + x.flip(0),
        lambda x: x.transpose(0, 1).relu(),
        lambda x: x.reshape(2, -1).t(),
        lambda x: torch.cat([x[1:], x[:1]]),
    ):
        assert not separable(mixes, x)


def test_a_write_that_failed_guards_nothing_less() -> None:
    def function(x: Tensor) -> Tensor:
        h = x * 1
        with contextlib.suppress(RuntimeError):
            h.add_(torch.zeros(7))
        h.transpose_(0, 1)
        doubled = h * 2
        h.mul_(0)
        return doubled + h

    x = torch.rand(3, 4)
    tape = record(made(function), [x])
    first = next(call for call in tape.calls if call.name == "aten.mul")
    assert torch.equal(first.output.data, x)


# -- networks that say the same by other means ----------------------------------------------------------


class Twin(nn.Module):
    """Two convolutions and a head; `change` stands between them, and gets the first one's module too."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.head, self.place = nn.Linear(6, 5), nn.Parameter(torch.randn(1, 8, 16, 16))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.change(self, x)).relu().mean((2, 3)))


def _other_memory(net: Twin, x: Tensor) -> Tensor:
    h = net.first(x)
    h.data = -h.data
    return h.relu()


def _weights_for_a_while(net: Twin, x: Tensor) -> Tensor:
    weight = net.first.weight.data
    net.first.weight.data = weight.sign() * weight.abs().mean()
    h = net.first(x).relu()
    net.first.weight.data = weight
    return h


def _binary(net: Twin, x: Tensor) -> Tensor:
    weight = net.first.weight.sign() * net.first.weight.abs().mean()
    return nn.functional.conv2d(x, weight, net.first.bias, padding=1).relu()


def _constant_over_an_activation(net: Twin, x: Tensor) -> Tensor:
    h = net.first(x).relu()
    over = h * 1
    torch.mul(net.place, 2, out=over)
    return h + over


def _masked(net: Twin, x: Tensor, mask: Any) -> Tensor:
    h = net.first(x).relu()
    return h * mask(h > 0.1)


TWINS: dict[str, tuple[Any, Any]] = {
    "memory": (_other_memory, lambda net, x: (-net.first(x)).relu()),
    "weights": (_weights_for_a_while, _binary),
    "out": (_constant_over_an_activation, lambda net, x: net.first(x).relu() + net.place * 2),
    "bool": (lambda net, x: _masked(net, x, Tensor.bool), lambda net, x: _masked(net, x, Tensor.float)),
    "byte": (lambda net, x: _masked(net, x, Tensor.byte), lambda net, x: _masked(net, x, Tensor.float)),
    "where": (
        lambda net, x: torch.where((h := net.first(x)) > 0, h, 0.0),
        lambda net, x: net.first(x).relu(),
    ),
    "fill": (
        lambda net, x: (h := net.first(x)).masked_fill(h < 0, 0),
        lambda net, x: net.first(x).relu(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ["evidence", "seed", "exact"])
@pytest.mark.parametrize("name", TWINS)
def test_what_says_the_same_by_other_means_is_explained_the_same(name: str, method: str) -> None:
    if name == "out" and method != "exact":
        pytest.skip("a constant that is added as a value takes its share")
    one, other = (Twin(change).eval() for change in TWINS[name])
    for seed in range(5):
        x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        found, expected = (hysm.explain(net, x, 1, method).evidence for net in (one, other))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_infinity_that_counts_for_nothing_is_no_matter() -> None:
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[..., :3] = True

    class Masked(Twin):
        def forward(self, x: Tensor) -> Tensor:
            h = self.second(self.first(x).relu()).masked_fill(mask, self.change)
            return self.head(h.amax((2, 3)))

    x = torch.rand(1, 3, 16, 16)
    for method in ("evidence", "seed", "exact"):
        found, expected = (
            hysm.explain(Masked(low).eval(), x, 1, method).evidence for low in (-torch.inf, -1e4)
        )
        torch.testing.assert_close(found, expected)


def test_a_part_without_channels() -> None:
    class Split(Twin):
        def forward(self, x: Tensor) -> Tensor:
            h = self.second(self.first(x).relu())
            h = torch.cat(h.split([0, 6], 1), 1) if self.change else h
            return self.head(h.mean((2, 3)))

    x = torch.rand(1, 3, 16, 16)
    for method in ("evidence", "seed", "exact"):
        found, expected = (
            hysm.explain(Split(change).eval(), x, 1, method).evidence for change in (True, False)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: (x * 50).round().to(torch.int8).float() / 50 + x * 0,
        lambda x: (x * 50).long().view(-1).float().sum() + x,
        lambda x: ((x * 50).int() * 2 + 1) / 50 + x,
        lambda x: (x * 50).byte().double() * 0.02 + x,
    ],
)
def test_activations_that_are_rounded_and_used_are_told(
    forward: Callable[[Tensor], Tensor],
) -> None:
    with pytest.warns(UserWarning, match="rounds activations to whole numbers"):
        record(made(forward), [torch.rand(2, 3)])


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x[(x[:, 0] * 2).long()],
        lambda x: x.gather(1, x.argsort(1)),
        lambda x: x * (x > 0.5).float(),
        lambda x: x.gather(1, (x * 2).long().clamp(0, 2)),
        lambda x: x.floor() + x,
        lambda x: x + torch.zeros_like(x.long()).float(),
        lambda x: x + x.int().new_ones(3, dtype=torch.float32),
    ],
)
def test_positions_and_masks_are_no_rounded_activations(
    forward: Callable[[Tensor], Tensor], recwarn: pytest.WarningsRecorder
) -> None:
    record(made(forward), [torch.rand(2, 3)])
    assert not [w for w in recwarn if "whole numbers" in str(w.message)]


# -- inference mode -------------------------------------------------------------------------------


def _inferred(decorated: bool) -> Callable[[Tensor], Tensor]:
    def inside(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return _layers(x)

    return torch.inference_mode()(_layers) if decorated else inside


def _layers(x: Tensor) -> Tensor:
    h = F.batch_norm(x, torch.zeros(4).double(), torch.ones(4).double())
    h[:, :2] += 1
    weight = torch.linspace(-1, 1, 32).double()
    y = F.linear(h.relu_().mean((2, 3)), weight.reshape(8, 4))
    sums = torch.tensor([1.0, 2.0], dtype=torch.float64)  # made in inference mode
    sums.add_(y.sum())
    return y[:, :2] + sums


@pytest.mark.parametrize("decorated", [True, False])
def test_a_model_in_inference_mode_is_explained_as_without(decorated: bool) -> None:
    model, plain = made(_inferred(decorated)), made(_layers)
    tape = record(model, [picture()])
    assert names(tape) == names(record(plain, [picture()]))
    assert torch.equal(tape.output.data, plain(picture()))
    assert not torch.is_inference_mode_enabled()
    one = picture()[:1]  # the sum is that of a batch
    found, expected = (hysm.explain(m, one, 0).evidence for m in (model, plain))
    torch.testing.assert_close(found, expected)
    assert model(picture()).is_inference()  # the model is left as it was


# -- what leaves PyTorch, and what is drawn -------------------------------------------------------


class Branches(nn.Module):
    """One branch as it is, and one through a function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.function = function
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).mean((2, 3)) + 10 * self.function(self.second(x).mean((2, 3)))


def _told(model: nn.Module) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        record(model, [torch.rand(2, 3, 8, 8)])
    return [str(one.message) for one in caught]


@pytest.mark.parametrize(
    "function",
    [
        lambda z: torch.from_numpy(z.numpy()),
        lambda z: torch.tensor(z.tolist()),
        lambda z: torch.tensor([[float(v) for v in row] for row in z]),
        lambda z: torch.tensor([z[0, 0], z[0, 1], 0.1, 0.2]),
        lambda z: torch.tensor([np.float64(z[0, i].item()) for i in range(4)]),
        lambda z: torch.as_tensor(np.asarray(z) * 2),
        lambda z: torch.tensor(np.array(z.tolist()), dtype=torch.float32),
        torch.from_dlpack,
        lambda z: torch.full((4,), z.max().item()),
        lambda z: torch.zeros(4).fill_(z.max().item()),
        lambda z: torch.zeros(2, 4).copy_(torch.from_numpy(z.numpy())),
    ],
)
def test_activations_that_leave_pytorch_and_come_back_are_told(
    function: Callable[[Tensor], Any],
) -> None:
    (told,) = _told(Branches(function))
    assert "leave PyTorch" in told
    assert "come back in the model itself (aten.add)" in told


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z if z.sum() > 0 else -z,
        lambda z: (z.max().item(), z + torch.tensor([0.1, 0.2, 0.3, 0.4]))[1],
        lambda z: (z.tolist(), z + torch.tensor([0.1, 0.2, 0.3, 0.4]) + torch.full((4,), 0.5))[1],
        lambda z: (z.relu().tolist(), torch.relu(z * 0), z + torch.full((4,), 0.0))[2],
        lambda z: z[:, torch.from_numpy(z.numpy().mean(0).argsort())],
        lambda z: z * (z > torch.from_numpy(z.numpy().mean(0))),
        lambda z: (torch.from_numpy(z.numpy()), z)[1],
        lambda z: z + torch.zeros_like(torch.from_numpy(z.numpy())),
        lambda z: torch.from_numpy(np.ones(4, np.float32)) + z,
    ],
)
def test_looks_and_constants_are_nothing_that_comes_back(function: Callable[[Tensor], Any]) -> None:
    assert _told(Branches(function)) == []


def test_tables_and_weights_in_memory_of_numpy_are_nothing_that_comes_back() -> None:
    model = Branches(
        lambda z: (z.numpy(), model.scale(model.table * z[:, :, None, None]))[1].mean((2, 3))
    )
    model.scale = nn.Conv2d(4, 4, 1).eval()
    model.table = torch.from_numpy(np.ones((4, 1, 1), np.float32))  # no buffer
    weight = np.ones((4, 4, 1, 1), np.float32)
    model.scale.weight = nn.Parameter(torch.from_numpy(weight))
    assert _told(model) == []


def test_places_from_outside_carry_no_evidence_anyway() -> None:
    def sampled(z: Tensor) -> Tensor:
        grid = torch.from_numpy(z.numpy()).reshape(2, 2, 1, 2)
        return F.grid_sample(z.reshape(2, 4, 1, 1), grid, align_corners=False).sum((2, 3))

    assert _told(Branches(sampled)) == []


def test_what_targets_look_at_is_not_the_models() -> None:
    def target(output: Tensor) -> Tensor:
        return output[:, 0] * torch.from_numpy(output.numpy()).max() + torch.rand(2)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record(Branches(nn.Identity()), [torch.rand(2, 3, 8, 8)], readers=[target])


def test_a_deep_copy_is_followed() -> None:
    x = torch.rand(2, 3, 8, 8)
    copied, plain = (
        Branches(lambda z: copy.deepcopy({"z": z})["z"].mul_(2)),
        Branches(lambda z: z * 2),
    )
    copied.load_state_dict(plain.state_dict())
    assert _told(copied) == []
    found, expected = (hysm.explain(model, x, 1).evidence for model in (copied, plain))
    torch.testing.assert_close(found, expected)


class Drawing(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.noisy = made(function)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.noisy(self.stem(x))
        return out


@pytest.mark.parametrize(
    ("function", "call"),
    [
        (F.dropout, "bernoulli"),
        (F.alpha_dropout, None),
        (lambda x: F.alpha_dropout(x, training=True), "bernoulli"),
        (lambda x: x + torch.randn_like(x), "randn_like"),
        (lambda x: x + torch.empty(6).normal_() * 2, "normal"),
        (lambda x: x * (torch.rand(6) > 0.5), "rand"),
        (lambda x: x[:, torch.randperm(4)], "randperm"),
        (lambda x: F.rrelu(x, training=True), "rrelu_with_noise"),
        (nn.RReLU().eval(), None),
        (nn.Dropout().eval(), None),
        (lambda x: F.fractional_max_pool2d(x, 2, output_size=3), "rand"),
        (lambda x: F.scaled_dot_product_attention(x, x, x), None),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5), "bernoulli"),
        (lambda x: F.dropout(x, 0.0, training=True), None),
        (lambda x: x + torch.rand(6, generator=torch.Generator().manual_seed(0)), None),
        (lambda x: (torch.rand(3), x)[1], None),
        (lambda x: x + torch.zeros_like(torch.rand(6)), None),
    ],
)
def test_random_numbers_that_reach_activations_are_told(
    function: Callable[[Tensor], Tensor], call: str | None
) -> None:
    told = _told(Drawing(function))
    assert len(told) == (call is not None)
    if call is not None:
        assert f"draws random numbers (aten.{call} in noisy" in told[0]


# -- views that share no element ------------------------------------------------------------------


def places(view: Tensor) -> set[int]:
    base = torch.arange(view.untyped_storage().nbytes() // view.element_size())
    return set(base.as_strided(view.shape, view.stride(), view.storage_offset()).flatten().tolist())


def test_views_that_are_told_apart_share_no_element() -> None:
    base = torch.zeros(4, 6, 5)
    views = [
        base,
        base.transpose(0, 2),
        base[0],
        base[1],
        base[:, 2],
        base[:0],
        base.expand(2, 4, 6, 5),
    ]
    for axis, parts in ((0, 2), (1, 3), (2, 5)):
        views += base.chunk(parts, axis)
    views += [
        base[a:b, c:d, e:f]
        for a, b in ((0, 2), (1, 4))
        for c, d in ((0, 3), (2, 6))
        for e, f in ((0, 5), (3, 5))
    ]
    views += [
        base[::2],
        base[1::2],
        base[:, ::3, 1:],
        base.flatten()[7:40],
        base.view(24, 5)[3:9, :2],
    ]
    told = 0
    for one, other in product(views, views):
        if recorder._apart(recorder._geometry(one), recorder._geometry(other)):
            told += 1
            assert not places(one) & places(other)
    gates = torch.zeros(3, 32).chunk(4, 1)
    assert all(
        recorder._apart(recorder._geometry(a), recorder._geometry(b)) == (a is not b)
        for a, b in product(gates, gates)
    )
    assert told > 50


@pytest.mark.parametrize("method", ["evidence", "exact"])
def test_an_lstm_is_explained_the_same_in_any_precision(method: str) -> None:
    """By one kernel in float32, by writes into parts of a memory in float64."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    torch.manual_seed(0)
    net, x = Last().eval(), torch.rand(2, 5, 6)
    one = hysm.explain(net, x, 1, method=method)
    other = hysm.explain(copy.deepcopy(net).double(), x.double(), 1, method=method)
    torch.testing.assert_close(one.evidence, other.evidence.float(), rtol=1e-3, atol=1e-6)
    assert one.coverage == pytest.approx(other.coverage, rel=1e-3)


@pytest.mark.parametrize(
    "ask",
    [
        lambda explainer, x: explainer(x).saliency,
        lambda explainer, x: explainer(x, lambda output: output[:, 1]).points,
        lambda explainer, x: explainer.many(x, [0, 1]),
        lambda explainer, x: explainer(x).layers(),
        lambda explainer, x: explainer(torch.cat([x, x])).attention,
    ],
    ids=["a class", "a function", "two classes", "its layers", "a batch"],
)
@pytest.mark.parametrize("method", ["evidence", "exact", "seed", Evidence(nodes=50)])
def test_activations_are_let_go_of_at_once(method: Any, ask: Callable[..., Any]) -> None:
    """And not when the garbage collector comes by: the next explanation would have two tapes in memory."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    ).eval()
    explainer, x = Explainer(net, method), torch.rand(1, 3, 16, 16)
    made = ask(explainer, x)  # what is imported, and kept, at first use
    gc.collect()
    before = {id(item) for item in gc.get_objects() if isinstance(item, Value)}  # of other tests
    gc.disable()
    try:
        made = ask(explainer, x)
        alive = [item for item in gc.get_objects() if isinstance(item, Value)]
        alive = [item for item in alive if id(item) not in before]
    finally:
        gc.enable()
    assert not alive
    del made


class Branching(nn.Module):
    """One of two convolutions, by PyTorch's own `if` or by Python's."""

    def __init__(self, choose: Callable[..., Tensor]) -> None:
        super().__init__()
        self.stem, self.one, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)
        self.choose = choose

    def forward(self, x: Tensor) -> Tensor:
        return self.choose(x.mean() > 0, self.one, self.other, (self.stem(x),)).mean((2, 3))


def test_a_call_that_takes_functions_is_recorded_as_what_these_call() -> None:
    net = Branching(torch.cond).eval()
    plain = Branching(lambda first, one, other, given: (one if first else other)(*given)).eval()
    plain.load_state_dict(net.state_dict())
    picture = torch.rand(1, 3, 5, 5)
    net.other.padding = plain.other.padding = (1, 1)  # both answer in one shape
    program = torch.export.export(net, (picture,))
    for image in (picture, -picture):
        found, want = (hysm.explain(one, image, 1, method="exact") for one in (program, plain))
        assert want.evidence.any()
        torch.testing.assert_close(found.evidence, want.evidence)


def test_attention_that_would_be_compiled_is_recorded() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    if not hasattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"):
        pytest.skip("this PyTorch always compiles it")
    x = torch.rand(1, 2, 6, 8)
    tape = record(Made(lambda _, x: flex.flex_attention(x, x, x * 2)), [x])
    want = F.scaled_dot_product_attention(x, x, x * 2)
    torch.testing.assert_close(tape.output.data, want)
    assert plan(tape, tape.output).inputs == tape.inputs
    assert flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG is False


def test_passes_in_several_threads_leave_the_setting_of_attention_as_it_was() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    both = threading.Barrier(2, timeout=60)
    first = threading.Event()

    def forward(which: int) -> Callable[..., Tensor]:
        def run(_: nn.Module, x: Tensor) -> Tensor:
            both.wait()  # both have begun
            if which:
                first.wait(60)  # and this one ends after the other
            return x * 2

        return run

    def go(which: int) -> None:
        record(Made(forward(which)), [torch.rand(2)])
        first.set()

    threads = [threading.Thread(target=go, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert getattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False) is False


def test_other_calls_that_take_functions_are_refused() -> None:
    from torch._higher_order_ops.while_loop import while_loop  # noqa: PLC0415 - private, and may move

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        ended, more = lambda i, x: i < 3, lambda i, x: (i + 1, x * 2)
        return while_loop(ended, more, (torch.tensor(0), x))[1]

    with pytest.raises(ModelError, match="call of torch's while_loop"):
        record(Made(forward), [torch.rand(1, 3)])
