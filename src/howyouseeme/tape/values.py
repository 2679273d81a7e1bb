"""What a tape holds: the values and calls of one forward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = [
    "Call",
    "Dropped",
    "Tape",
    "Value",
    "at_hand",
    "harmless",
    "looks_are_harmless",
    "with_looks",
    "without_looks",
]


def at_hand(tensor: Tensor) -> bool:
    """Whether its contents can be looked at right away: on a device, a look waits for all its work."""
    return tensor.is_cpu and not getattr(_LOOKS, "dear", False)


_LOOKS = threading.local()


@contextmanager
def without_looks() -> Iterator[None]:
    """Take nothing of this thread to be at hand, so that as little as can be is decided by contents."""
    with _looks(dear=True):
        yield


@contextmanager
def with_looks() -> Iterator[None]:
    """Within `without_looks`: take what is on a CPU to be at hand again."""
    with _looks(dear=False):
        yield


@contextmanager
def _looks(dear: bool) -> Iterator[None]:
    before = getattr(_LOOKS, "dear", False)
    _LOOKS.dear = dear
    try:
        yield
    finally:
        _LOOKS.dear = before


@contextmanager
def harmless() -> Iterator[None]:
    """Looks of this thread by which nothing but time is won: what they decide is right for other contents too."""
    _LOOKS.harmless = True
    try:
        yield
    finally:
        _LOOKS.harmless = False


def looks_are_harmless() -> bool:
    """Whether the looks that this thread takes now are `harmless`."""
    return getattr(_LOOKS, "harmless", False)


def _is_narrow(dtype: torch.dtype) -> bool:
    """Whether evidence, spread thin, would become 0 in it, or sums can't be made."""
    return dtype == torch.float16 or (dtype.is_floating_point and dtype.itemsize == 1)


class Dropped(Exception):  # noqa: N818 - no error for users
    """The contents of a `value`, or of something else, were let go of for good."""

    def __init__(self, value: Value | None) -> None:
        super().__init__(value)
        self.value = value


class Value:
    """One tensor of the forward pass, with the contents that it had when it was made.

    >>> value = tape.output                    # of a tape by `record`
    >>> value.shape, value.call.name, value.data.dtype
    (torch.Size([1, 1000]), 'aten.addmm', torch.float32)

    Rules treat it as a flat array in row-major order, whatever its strides are. Where the network wrote
    over the contents, they are made again when `data` is asked for; `shape`, `dtype` and `device` tell
    without.
    """

    __slots__ = (
        *("_data", "_dropped", "_flat", "_signed", "_strides"),
        *("call", "device", "dtype", "index", "output", "rounded", "seen_writes", "shape"),
    )

    def __init__(self, data: Tensor, index: int, call: Call | None = None, output: int = 0) -> None:
        self._data: Tensor | None = data
        self._strides: tuple[int, ...] = ()
        self._dropped = False
        self.shape, self.dtype, self.device = data.shape, data.dtype, data.device
        self.index = index
        self.call = call  # None for an input of the model
        self.output = output
        self.rounded = False  # whether the contents were float16 when they were made
        self.seen_writes = 0  # how many writes to its storage it has seen
        self._flat: Tensor | None = None
        self._signed: bool | None = None

    @property
    def data(self) -> Tensor:
        """The contents."""
        if self._data is None:
            self._make_again()
            assert self._data is not None
        return self._data

    @data.setter
    def data(self, data: Tensor) -> None:
        self._data, self.shape, self.dtype, self.device = data, data.shape, data.dtype, data.device

    @property
    def forgotten(self) -> bool:
        """Whether the contents have to be made again before they can be looked at."""
        return self._data is None

    def forget(self) -> bool:
        """Let go of the contents, if the same call can make them again; return whether it can."""
        call, data = self.call, self.data
        if call is None or call.name not in _AGAIN:
            return False
        if call.name == "aten.native_batch_norm" and call.args[5]:  # which notes statistics
            return False
        if data.numel() * data.element_size() != data.untyped_storage().nbytes():
            return False  # a part of something larger, in which it has its place
        self._strides = data.stride()
        self._data = None
        return True

    def widen(self) -> None:
        """Take the contents as float32 from now on, where they are float16 or float8."""
        if _is_narrow(self.dtype):
            self._data = None if self._data is None else self._data.float()
            self._flat, self.dtype, self.rounded = None, torch.float32, True

    def drop(self) -> None:
        """Let go of the contents for good, until there are others."""
        self._data = self._flat = self._signed = None
        self._dropped = True

    def refill(self, data: Tensor | None) -> None:
        """Take other contents of the same kind, those of another pass; or make them again when asked."""
        self._data, self._flat, self._signed, self._dropped = data, None, None, False

    def _make_again(self) -> None:
        """Run the calls again that made the contents, those first that made their inputs."""
        waiting = [self]
        with torch.inference_mode(False), torch.no_grad():
            while waiting:
                value = waiting[-1]
                if value._dropped:
                    raise Dropped(value)
                assert value.call is not None
                before = [item for item in value.call.inputs if item.forgotten]
                if not before:
                    waiting.pop()
                    if value.forgotten:
                        value._data = value._made_again()
                waiting += before

    def _made_again(self) -> Tensor:
        call = self.call
        assert call is not None
        args, kwargs = pytree.tree_map_only(
            Value,
            lambda value: value.data.half() if value.rounded else value.data,
            (call.args, call.kwargs),
        )
        made = call.op(*args, **kwargs)
        data: Tensor = made[self.output] if isinstance(made, (list, tuple)) else made
        data = data.to(self.dtype)  # a sum of two types went into the memory of the first
        if data.stride() == self._strides:
            return data
        same = torch.empty_strided(self.shape, self._strides, dtype=self.dtype, device=data.device)
        return same.copy_(data)

    @property
    def signed(self) -> bool:
        """Whether any element is below zero."""
        if self._signed is None:
            pending = self.pending
            self._signed = pending is not None and bool(pending)
        return self._signed

    @property
    def pending(self) -> Tensor | None:
        """What `signed` has not looked at yet, and must."""
        looks = self._signed is None and self.numel and self.dtype.is_floating_point
        return self.data.amin() < 0 if looks and not _never_below_zero(self.call) else None

    def settle(self, found: bool) -> None:
        """Take what a look at `pending` found."""
        self._signed = found

    @property
    def positive(self) -> Tensor:
        """The contents where they are above zero, 0 elsewhere."""
        return self.data.clamp(min=0) if self.signed else self.data

    @property
    def negative(self) -> Tensor:
        """The contents where they are below zero, 0 elsewhere."""
        return self.data.clamp(max=0)

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def flat(self) -> Tensor:
        """The contents as a vector of `numel` elements, row-major."""
        if self._flat is None:
            self._flat = self.data.reshape(-1)
        return self._flat

    def __repr__(self) -> str:
        return f"Value({self.index}, shape={tuple(self.shape)})"


#: Calls that make the same of the same, and so may be made again: those whose outputs networks overwrite.
_AGAIN = {"aten.convolution", "aten.native_batch_norm", "aten.add"}


def _never_below_zero(call: Call | None) -> bool:
    """Whether a call makes nothing below zero, whatever it is given."""
    if call is None:
        return False
    return call.name in _ABOVE_ZERO or (
        call.name in {"aten.hardtanh", "aten.clamp"}
        and isinstance(least := call.argument(1, ""), (int, float))
        and least >= 0
    )


_ABOVE_ZERO = {"aten.relu", "aten.relu6", "aten.sigmoid", "aten.hardsigmoid", "aten._softmax"}


@dataclass(eq=False)
class Call:
    """One ATen call that depends on the input.

    >>> call = tape.calls[1]
    >>> call.name, call.module, call.inputs[0].shape
    ('aten.convolution', '_conv_stem', torch.Size([1, 3, 225, 225]))

    `args` and `kwargs` are those of the call, with a `Value` wherever a tensor depends on the input
    and a plain tensor wherever it does not (weights, constants), or where it holds whole numbers or
    booleans (indices, masks): those carry no evidence, and are constants on this image.

    An in-place call appears as the call that writes nothing, with the value as it was before the
    write; its output is the value after it. So does a call with `out=`.

    - `name`: the packet's name, 'aten.relu', without the underscore of an in-place variant;
    - `op`: the overload that writes nothing, if there is one;
    - `index`: its number on the tape, from 0;
    - `owner`: the module that made it; `module`: its name in `model.named_modules()`, '' for the model itself;
    - `reads`: whether it is no call of the model, but of what reads its output;
    - `outputs`: a `Value` for each tensor that it returned, None for anything else.
    """

    name: str
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int
    owner: nn.Module | None = None
    module: str = ""
    reads: bool = False
    outputs: tuple[Value | None, ...] = ()

    @property
    def output(self) -> Value:
        """The first output, which is the one that carries evidence."""
        value = self.outputs[0]
        assert value is not None
        return value

    @property
    def inputs(self) -> list[Value]:
        """The values that the call read, in the order of its arguments."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Value)]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at `position`, or called `name`, or `default`.

        >>> stride = call.argument(3, "stride")              # of a convolution
        """
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def widened(self) -> Call:
        """The same call with its constants in float32 where they are float16, as its values may be by now."""
        args, kwargs = pytree.tree_map_only(
            Tensor,
            lambda constant: constant.float() if constant.dtype == torch.float16 else constant,
            (self.args, self.kwargs),
        )
        return replace(self, args=args, kwargs=kwargs)

    def describe(self) -> str:
        """The call in a line, for messages.

        >>> call.describe()
        'aten.convolution(1x3x225x225) in _conv_stem'
        """
        shapes = ", ".join("x".join(map(str, value.shape)) or "scalar" for value in self.inputs)
        module = "the target function" if self.reads else self.module or "the model itself"
        return f"{self.name}({shapes}) in {module}"


@dataclass(eq=False)
class Tape:
    """What `record` returns: the inputs, the calls in order, and the output of one forward pass.

    >>> tape = record(model, [torch.rand(1, 3, 224, 224)])
    >>> tape.inputs, len(tape.calls), tape.output
    ([Value(0, shape=(1, 3, 224, 224))], 160, Value(258, shape=(1, 1000)))

    - `inputs`: one for each floating-point tensor that the model was given;
    - `calls`: those that depend on the inputs, in the order in which they were made;
    - `output`: the model's, with a `Value` wherever a tensor depends on the inputs;
    - `reads`: what each reader made of what it was given.
    """

    inputs: list[Value]
    calls: list[Call]
    output: Any
    reads: list[Any] = field(default_factory=list)

    def __del__(self) -> None:
        # Calls and their outputs know each other: left to the garbage collector, the memory of all
        # activations would stay for a while, and the next tape would have to get fresh one.
        for call in self.calls:
            call.outputs = ()

    def widen(self) -> None:
        """Go on in float32 where the pass was made in float16, in which evidence, spread thin, becomes 0.

        Calls keep what they were given; rules get it `widened`.
        """
        for value in self.values:
            value.widen()

    def append(self, name: str, op: Any, args: tuple[Any, ...], data: Tensor) -> Value:
        """The value of one call more, which the network did not make: what `op` makes of `args`.

        >>> op = torch.ops.aten.sum.default
        >>> total = tape.append("aten.sum", op, (tape.output,), op(tape.output.data))
        """
        call = Call(name, op, args, {}, len(self.calls))
        last = max(value.index for value in self.values)
        call.outputs = (Value(data, last + 1, call),)
        self.calls.append(call)
        return call.output

    @property
    def values(self) -> Iterator[Value]:
        """The inputs, and then the outputs of all calls."""
        yield from self.inputs
        for call in self.calls:
            yield from (value for value in call.outputs if value is not None)
