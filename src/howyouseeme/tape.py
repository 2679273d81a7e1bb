"""A forward pass, recorded: every ATen call that the network made for this input.

The tape sees what really ran - functional or module ops, reused modules, data-dependent control
flow - because it listens below the modules, at PyTorch's dispatcher. It changes nothing: the model's
mode, gradients, hooks and buffers are as they were.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .decompositions import decompositions
from .errors import ModelError

__all__ = ["Call", "Reader", "Tape", "Value", "at_hand", "record"]


def at_hand(tensor: Tensor) -> bool:
    """Whether its contents can be looked at right away: on a device, a look waits for all its work."""
    return tensor.is_cpu


class Value:
    """One tensor of the forward pass, with the contents that it had when it was made.

    Rules treat it as a flat array in row-major order, whatever its strides are. Where the network wrote
    over the contents, they are made again when `data` is asked for; `shape`, `dtype` and `device` tell
    without.
    """

    __slots__ = (
        *("_data", "_flat", "_signed", "_strides"),
        *("call", "device", "dtype", "index", "output", "seen_writes", "shape"),
    )

    def __init__(self, data: Tensor, index: int, call: Call | None = None, output: int = 0) -> None:
        self._data: Tensor | None = data
        self._strides: tuple[int, ...] = ()
        self.shape, self.dtype, self.device = data.shape, data.dtype, data.device
        self.index = index
        self.call = call  # None for an input of the model
        self.output = output
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

    def _make_again(self) -> None:
        """Run the calls again that made the contents, those first that made their inputs."""
        waiting = [self]
        with torch.inference_mode(False), torch.no_grad():
            while waiting:
                value = waiting[-1]
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
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf.data if isinstance(leaf, Value) else leaf, (call.args, call.kwargs)
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

    `args` and `kwargs` are those of the call, with a `Value` wherever a tensor depends on the input
    and a plain tensor wherever it does not (weights, constants), or where it holds whole numbers or
    booleans (indices, masks): those carry no evidence, and are constants on this image.

    An in-place call appears as the call that writes nothing, with the value as it was before the
    write; its output is the value after it. So does a call with `out=`.
    """

    name: str  # 'aten.relu': the packet's name, without the underscore of an in-place variant
    op: Any  # the overload that writes nothing, if there is one
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int
    owner: nn.Module | None = None
    module: str = ""
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
        """The argument at `position`, or called `name`, or `default`."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def describe(self) -> str:
        """'aten.relu(1x3x8x8) in module features.0'"""
        shapes = ", ".join("x".join(map(str, value.shape)) or "scalar" for value in self.inputs)
        return f"{self.name}({shapes}) in {self.module or 'the model itself'}"


@dataclass(eq=False)
class Tape:
    """What `record` returns: the inputs, the calls in order, and the output of one forward pass."""

    inputs: list[Value]
    calls: list[Call]
    output: Any  # the model's output, with a Value wherever a tensor depends on the input
    reads: list[Any] = field(default_factory=list)  # what each reader made of what it was given

    def __del__(self) -> None:
        # Calls and their outputs know each other: left to the garbage collector, the memory of all
        # activations would stay for a while, and the next tape would have to get fresh one.
        for call in self.calls:
            call.outputs = ()

    def append(self, name: str, op: Any, args: tuple[Any, ...], data: Tensor) -> Value:
        """The value of one call more, which the network did not make: what `op` makes of `args`."""
        call = Call(name, op, args, {}, len(self.calls))
        last = max(value.index for value in self.values)
        call.outputs = (Value(data, last + 1, call),)
        self.calls.append(call)
        return call.output

    @property
    def values(self) -> Iterator[Value]:
        yield from self.inputs
        for call in self.calls:
            yield from (value for value in call.outputs if value is not None)


@dataclass(frozen=True)
class Reader:
    """A function of the model's output, or of the output that a module in it gave last.

    What the function makes of it is recorded too.
    """

    function: Callable[[Any], Any]
    module: nn.Module | None = None


@dataclass(eq=False, slots=True)
class _Facts:
    """What there is to know about an overload, found out once."""

    name: str
    writes: tuple[int, ...]  # positions of the arguments that the call writes to
    targets: list[Any]  # those arguments, as the schema has them
    outs: frozenset[str]  # the names of those that can be given by name only
    fresh: bool  # whether it returns a tensor that it made
    moves: bool  # whether it changes but sizes and strides
    factory: bool
    uninitialised: bool
    silent: bool
    parts: Callable[..., Any] | None  # what it is made of, where that is what gets recorded
    functional: Any = None  # the overload that does the same and writes nothing, once asked for


def _facts(op: Any) -> _Facts:
    arguments = op._schema.arguments
    writes = _writes(op)
    name = str(op.overloadpacket)
    base = name.rsplit(".", 1)[-1]
    if base.endswith("_") and not base.startswith("__"):
        name = name[:-1]
    facts = _FACTS[op] = _Facts(
        name=name,
        writes=writes,
        targets=[arguments[i] for i in writes],
        outs=frozenset(arguments[i].name for i in writes if arguments[i].kwarg_only),
        fresh=any(item.alias_info is None for item in op._schema.returns),
        moves=torch.Tag.inplace_view in op.tags,
        factory=name in _FACTORIES,
        uninitialised=name in _UNINITIALISED,
        silent=name in _SILENT_WRITES,
        parts=decompositions().get(name),
    )
    return facts


def _writes(op: Any) -> tuple[int, ...]:
    return tuple(
        position
        for position, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _functional(op: Any, facts: _Facts) -> Any:
    """The overload that does the same and writes nothing: relu for relu_, add.Tensor for add.out"""
    if facts.functional is None:
        wanted = [
            (argument.name, str(argument.type))
            for argument in op._schema.arguments
            if not (argument.kwarg_only and argument.alias_info and argument.alias_info.is_write)
        ]
        namespace, _, name = facts.name.rpartition(".")
        packet = getattr(getattr(torch.ops, namespace), name, None)
        facts.functional = op
        for overload in packet.overloads() if packet is not None else ():
            other = getattr(packet, overload)
            has = [(argument.name, str(argument.type)) for argument in other._schema.arguments]
            if has == wanted and not _writes(other):
                facts.functional = other
    return facts.functional


_FACTS: dict[Any, _Facts] = {}

# They read the shape of their argument, never its contents.
_FACTORIES = {
    f"aten.{name}"
    for name in (
        *("empty_like", "zeros_like", "ones_like", "full_like"),
        *("rand_like", "randn_like", "randint_like"),
        *("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"),
    )
}

# What they return has no contents yet. Zeros keep chance NaNs out of the evidence: 0 · NaN is NaN.
_UNINITIALISED = {
    f"aten.{name}"
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}

# With training=True they write to the running mean and variance, and their schema does not say so.
_SILENT_WRITES = {"aten.native_batch_norm", "aten.cudnn_batch_norm", "aten.miopen_batch_norm"}


# They take whole numbers for positions, which this image fixed.
_INDEXED = {
    f"aten.{name}"
    for name in (
        *("index", "_unsafe_index", "index_select", "gather", "take", "embedding"),
        *("scatter", "scatter_add", "index_put", "index_copy", "index_add", "index_fill"),
    )
}


def _storage(tensor: Tensor) -> int | None:
    """Identifies the memory behind a tensor; None where it has none of its own (sparse, mkldnn)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


_UNKNOWN: tuple[None, None] = None, None


def _running() -> nn.Module | None:
    """The module that is running: the innermost one whose call this is part of.

    Read off the stack, as a hook on every module costs more than the call itself.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _RECORD:
        if frame.f_code is _CALL:
            module: nn.Module = frame.f_locals["self"]
            return module
        frame = frame.f_back  # type: ignore[assignment]
    return None


_CALL = nn.Module._wrapped_call_impl.__code__


class _Recorder(TorchDispatchMode):
    """Builds the tape, call by call.

    In-place writes are what makes this hard. Every storage keeps a log of the values written to it:
    first by the call that allocated it, then by each in-place call. A tensor that saw fewer
    writes than its storage is read anew (`hysm.reread`): its elements come from the later writes
    where they overlap, and from what it held before everywhere else. That covers views of views,
    slice assignment and buffers filled piece by piece, with one mechanism.
    """

    def __init__(self, model: nn.Module, readers: Sequence[Reader] = ()) -> None:
        super().__init__()
        self.readers = readers
        self.reads: list[Any] = [None] * len(readers)
        self.calls: list[Call] = []
        self.count = 0
        self._rounded: dict[int, Tensor] = {}  # whole numbers made of activations, by id
        self._given_rounded = False  # whether the call that is being made is given some of them
        self.back_from_rounded: nn.Module | None = None  # what made floats of them
        self._taking_apart = 0  # calls that are being made as the calls that they are made of
        self._thread = threading.get_ident()
        # By id of the tensor, which `_alive` keeps alive: its value, and the memory it had then.
        self._known: dict[int, tuple[Value, int | None]] = {}
        self._alive: list[Tensor] = []
        self._log: dict[int, list[Value]] = {}
        self._sharing: dict[int, list[Value]] = {}
        self._holders: dict[int, list[Call]] = {}  # calls with a constant in that memory
        self._model = model
        self._given: set[int | None] = set()  # the memory of the caller's tensors
        self._theirs: set[int | None] | None = None  # that, and the model's; found when first asked
        self._restore: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Telling torch's compiler to leave this alone takes seconds, to import the compiler."""
        return False

    # -- values ---------------------------------------------------------------------------------

    def enter(self, tensor: Tensor) -> tuple[Tensor, Value]:
        """An input of the model: the same memory under a new object, which is not to be changed."""
        alias = tensor.clone() if tensor.is_inference() else tensor.detach()
        return alias, self.track(alias)

    def protect(self, tensor: Tensor) -> None:
        """What the forward pass writes to the memory of this tensor is undone at the end."""
        self._given.add(_storage(tensor))

    def _is_theirs(self, key: int) -> bool:
        """Whether memory is that of the model or the caller, and not of this forward pass."""
        if self._theirs is None:
            tensors = (*self._model.parameters(), *self._model.buffers())
            self._theirs = self._given.union(map(_storage, tensors))
        return key in self._theirs

    def track(self, tensor: Tensor, call: Call | None = None, output: int = 0) -> Value:
        """A value for a tensor that was just made or written."""
        # Under an object of its own: the network may give its tensor other memory (`h.data = ...`).
        value = Value(tensor.detach(), self.count, call, output)
        self.count += 1
        key = _storage(tensor)
        self._known[id(tensor)] = value, key
        self._alive.append(tensor)
        if key is not None:
            log = self._log.setdefault(key, [])
            if not log:
                log.append(value)
            value.seen_writes = len(log)
            self._sharing.setdefault(key, []).append(value)
        return value

    def find(self, tensor: Tensor) -> Value | None:
        """The value that a tensor holds now, or None if it does not depend on the input."""
        return self._find(tensor, _storage(tensor))

    def _find(self, tensor: Tensor, key: int | None) -> Value | None:
        value, place = self._known.get(id(tensor), _UNKNOWN)
        if place != key:  # `tensor.data = other` gave it other memory
            value = None
        log = self._log.get(key) if key is not None else None
        if log is None or (value is not None and value.seen_writes == len(log)):
            return value
        # Stale, or an alias made behind the dispatcher's back (`.data`, a buffer written piecemeal).
        writes = log[value.seen_writes if value is not None else 0 :]
        before: Any = value if value is not None else tensor.detach().clone()
        geometry = [_geometry(item) for item in (tensor, *(write.data for write in writes))]
        call = self._add("hysm.reread", None, (before, list(writes), geometry), {})
        fresh = self.track(tensor, call)
        call.outputs = (fresh,)
        return fresh

    def _add(self, name: str, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        call = Call(name, op, args, kwargs, len(self.calls), _running())
        self.calls.append(call)
        return call

    def _lift(self, item: Any, values: list[Value], constants: list[int | None]) -> Any:
        """An argument as the tape keeps it; notes the values in it, and the memory of constants."""
        if isinstance(item, Tensor):
            key = _storage(item)
            floats = item.is_floating_point() or item.is_complex() or item.is_quantized
            value = self._find(item, key) if floats else None
            if value is None:
                self._given_rounded |= id(item) in self._rounded
                constants.append(key)
                return item.detach()  # under an object whose memory, size and strides stay
            values.append(value)
            return value
        if isinstance(item, (list, tuple)):
            return type(item)([self._lift(part, values, constants) for part in item])
        return item

    # -- calls ----------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        facts = _FACTS.get(op) or _facts(op)
        kwargs = kwargs or {}
        values: list[Value] = []
        constants: list[int | None] = []
        self._given_rounded = False
        lifted = tuple([self._lift(item, values, constants) for item in args])
        lifted_kwargs = {
            key: self._lift(item, values, constants)
            for key, item in kwargs.items()
            if key not in facts.outs
        }
        depends = bool(values) and not facts.factory
        rounded = self._given_rounded and not facts.factory and facts.name not in _INDEXED
        parts = facts.parts if depends else None
        if parts is None and self._taking_apart:  # where composite calls may come, as nowhere else
            parts = op.decompose
        if parts is not None:
            result = self._in_parts(parts, facts, args, kwargs)
            if result is not NotImplemented:
                return result
        if facts.silent and args[5]:
            for statistic in args[3:5]:
                if statistic is not None:
                    self._preserve(statistic)
        if facts.writes:
            return self._write(
                op, facts, args, kwargs, lifted, lifted_kwargs, constants if depends else None
            )
        result = op(*args, **kwargs)
        if facts.uninitialised:
            result.zero_()
        if depends:
            call = self._add(facts.name, op, lifted, lifted_kwargs)
            self._hold(call, constants)
            call.outputs = self._outputs(result, call)
        if rounded or (depends and facts.name == "aten._to_copy"):
            self._follow_rounded(result, rounded)
        return result

    def _follow_rounded(self, result: Any, rounded: bool) -> None:
        """Remember whole numbers made of activations, and where they become floats again."""
        for item in pytree.tree_leaves(result):
            if not isinstance(item, Tensor) or item.dtype == torch.bool:
                continue
            if not (item.is_floating_point() or item.is_complex() or item.is_quantized):
                self._rounded[id(item)] = item
            elif rounded and self.back_from_rounded is None:
                self.back_from_rounded = _running() or self._model

    def _write(
        self,
        op: Any,
        facts: _Facts,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        lifted: tuple[Any, ...],
        lifted_kwargs: dict[str, Any],
        constants: list[int | None] | None,
    ) -> Any:
        """Make a call that writes to some of its arguments; `constants` is None if none depends on the input."""
        depends = constants is not None
        written = [
            args[i] if i < len(args) else kwargs.get(target.name)
            for i, target in zip(facts.writes, facts.targets, strict=True)
        ]
        tensors = [item for item in pytree.tree_leaves(written) if isinstance(item, Tensor)]
        if depends:  # a constant that is written to: keep what it was
            lifted = tuple(
                item.clone() if i in facts.writes and isinstance(item, Tensor) else item
                for i, item in enumerate(lifted)
            )
        # A constant may be put into what was an activation, by `out=`.
        before = [
            None if depends or not tensor.is_floating_point() else self.find(tensor)
            for tensor in tensors
        ]
        for tensor in tensors:
            self._preserve(tensor, facts.moves)
        result = op(*args, **kwargs)
        for tensor, value in zip(tensors, before, strict=True):
            if value is not None and not facts.moves:
                put = (value, tensor.detach().clone())
                call = self._add("aten.copy", torch.ops.aten.copy.default, put, {})
                call.outputs = (self._written(tensor, call, 0, moves=False),)
        if constants is not None:
            call = self._add(facts.name, _functional(op, facts), lifted, lifted_kwargs)
            self._hold(call, constants)
            returned = self._outputs(result, call) if facts.fresh else ()
            call.outputs = returned + tuple(
                self._written(tensor, call, len(returned) + i, facts.moves)
                for i, tensor in enumerate(tensors)
            )
        return result

    def _in_parts(
        self,
        parts: Callable[..., Any],
        facts: _Facts,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Make a call as the calls that it is made of, which are recorded in its place."""
        self._taking_apart += 1
        try:
            with self:
                result = parts(*args, **{k: v for k, v in kwargs.items() if k not in facts.outs})
                if result is NotImplemented or not facts.writes or parts is not facts.parts:
                    return result
                (position,) = facts.writes
                given = args[position] if position < len(args) else kwargs[facts.targets[0].name]
                if given.shape != result.shape:
                    given.resize_(result.shape)
                return given.copy_(result)
        finally:
            self._taking_apart -= 1

    def _hold(self, call: Call, constants: list[int | None]) -> None:
        """Remember where the call's constants lie, in case that they are overwritten later."""
        for key in constants:
            if key is not None:
                self._holders.setdefault(key, []).append(call)

    def _outputs(self, result: Any, call: Call) -> tuple[Value | None, ...]:
        items = result if isinstance(result, (list, tuple)) else (result,)
        return tuple(
            self.track(item, call, i) if isinstance(item, Tensor) else None
            for i, item in enumerate(items)
        )

    def _preserve(self, tensor: Tensor, moves: bool = False) -> None:
        """Keep what a write is about to destroy: values on the tape, constants, buffers."""
        key = _storage(tensor)
        if key is None or (moves and id(tensor) in self._known):  # its value is another object
            return
        sharing = self._sharing.get(key, ())
        if len(sharing) == 1 and not self._holders.get(key) and sharing[0].forget():
            del self._sharing[key]  # made by a call, so neither the model's nor the caller's
            return
        memory = tensor.untyped_storage()
        if key not in self._restore and self._is_theirs(key):
            self._restore[key] = (memory, memory.clone())
        self._move_out(key, memory)

    def _move_out(self, key: int, memory: torch.UntypedStorage) -> None:
        """Give all that is on the tape, and lies in this memory, a copy of it."""
        sharing, holders = self._sharing.pop(key, ()), self._holders.pop(key, ())
        if not sharing and not holders:
            return
        kept = memory.clone()

        def moved(data: Tensor) -> Tensor:
            return torch.empty(0, dtype=data.dtype, device=data.device).set_(
                kept, data.storage_offset(), data.size(), data.stride()
            )

        for item in sharing:
            item.data = moved(item.data)
        for call in holders:
            call.args, call.kwargs = pytree.tree_map(
                lambda leaf: (
                    moved(leaf) if isinstance(leaf, Tensor) and _storage(leaf) == key else leaf
                ),
                (call.args, call.kwargs),
            )

    def _written(self, tensor: Tensor, call: Call, output: int, moves: bool) -> Value:
        key = _storage(tensor)
        value = self.track(tensor, call, output)
        if key is not None and not moves:
            log = self._log[key]
            if log[-1] is not value:
                log.append(value)
            value.seen_writes = len(log)
        return value

    def read(self, module: nn.Module | None, output: Any) -> None:
        """Let the readers of a module see its output, before anything can be written to it."""
        for position, reader in enumerate(self.readers):
            if reader.module is module:
                made = reader.function(output)
                self.reads[position] = pytree.tree_map(self.result, made)

    def hook(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """The forward hook of modules that are read."""
        if threading.get_ident() == self._thread and output is not None:
            self.read(module, output)

    def result(self, item: Any) -> Any:
        """A part of the model's output: a value, or a constant that `restore` won't change."""
        item = self._lift(item, [], [])
        if isinstance(item, Tensor) and _storage(item) in self._restore:
            return item.clone()
        return item

    def restore(self) -> None:
        """Give parameters, buffers and the caller's input the contents back that they had."""
        for key, (memory, before) in self._restore.items():
            self._move_out(key, memory)
            memory.copy_(before)


@cache
def _shielded() -> type[_Recorder]:
    """A recorder that torch's compiler leaves alone, where that is at work already."""
    methods = {
        "__torch_dispatch__": _Recorder.__torch_dispatch__,
        "_should_skip_dynamo": classmethod(lambda cls: True),
    }
    return type("_Shielded", (_Recorder,), methods)


def _geometry(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())


_HOOKS = threading.Lock()
_taken_apart = 0  # recordings under way, with PyTorch's fused layers switched off
_fused = True


@contextmanager
def _layers_taken_apart() -> Iterator[None]:
    """Record transformer layers call by call, not as a whole layer in one call."""
    global _taken_apart, _fused  # noqa: PLW0603 - the switch is PyTorch's, and global as well
    with _HOOKS:
        if not _taken_apart:
            _fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        _taken_apart += 1
    try:
        yield
    finally:
        with _HOOKS:
            _taken_apart -= 1
            if not _taken_apart:
                torch.backends.mha.set_fastpath_enabled(_fused)


@contextmanager
def _read_by(recorder: _Recorder) -> Iterator[None]:
    """Show the recorder the outputs of the modules that it reads."""
    asked = {reader.module for reader in recorder.readers if reader.module is not None}
    with _HOOKS:
        handles = [module.register_forward_hook(recorder.hook, prepend=True) for module in asked]
    try:
        yield
    finally:
        with _HOOKS:
            for handle in handles:
                handle.remove()


@contextmanager
def _same_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Undo reassigned buffers (`self.count = self.count + 1`), which no dispatcher sees."""
    # A ScriptModule's are a view of what TorchScript holds, and no dict.
    before = [
        (m._buffers, dict(m._buffers))
        for m in modules
        if m._buffers and isinstance(m._buffers, dict)
    ]
    try:
        yield
    finally:
        for buffers, kept in before:
            if any(buffers.get(name) is not tensor for name, tensor in kept.items()):
                buffers.clear()
                buffers.update(kept)


def record(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    readers: Sequence[Reader | Callable[[Any], Any]] = (),
) -> Tape:
    """Run `model(*args, **kwargs)` once and return its tape.

    >>> tape = record(model, [torch.rand(1, 3, 224, 224)])
    >>> [call.name for call in tape.calls][:3]
    ['aten.convolution', 'aten.native_batch_norm', 'aten.relu']

    Every floating-point tensor found in `args` and `kwargs` (lists, tuples and dicts are searched)
    becomes an input of the tape. The model must be in eval mode. What each of the `readers` makes of
    the model's output (or, for a `Reader` with a module, of that module's) is recorded too, and
    returned in `Tape.reads`; it is None there if the module did not run.

    Walk before weights or the input change: the tape holds them as they are, and makes some activations
    again from them.

    Raises:
        ModelError: the model, or a part of it, is in training mode.
    """
    names = {module: name for name, module in model.named_modules()}
    training = [
        name or type(model).__name__
        for module, name in names.items()
        # Frozen TorchScript has no mode, and torch.fx's empty containers one that means nothing.
        if getattr(module, "training", False) and type(module) is not nn.Module
    ]
    if training:
        if "eval" in vars(
            model
        ):  # which refuses: the mode was fixed by the export, and can't be told
            raise ModelError(
                "The model is the module() of a program of torch.export, which can't say whether it was "
                "exported in eval mode: give the program itself."
            )
        raise ModelError(
            f"The model is in training mode ({', '.join(training[:3])}"
            f"{', ...' if len(training) > 3 else ''}), where batch norm and dropout answer "
            "differently each time: call model.eval() first."
        )
    kwargs = kwargs or {}
    asked = [item if isinstance(item, Reader) else Reader(item) for item in readers]
    kind = _shielded() if "torch._dynamo" in sys.modules else _Recorder
    recorder = kind(model, asked)
    inputs = []
    leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
    # In inference mode the dispatcher shows whole layers, not the calls that they are made of.
    with torch.inference_mode(False), torch.no_grad(), _same_buffers(names):
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                recorder.protect(leaf)
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaves[position], value = recorder.enter(leaf)
                inputs.append(value)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        try:
            with _layers_taken_apart(), _read_by(recorder), recorder:
                output = model(*args, **kwargs)
                recorder.read(None, output)
            output = pytree.tree_map(recorder.result, output)
        finally:
            recorder.restore()
    if recorder.back_from_rounded is not None:
        where = names.get(recorder.back_from_rounded, "") or "the model itself"
        warnings.warn(
            f"The model rounds activations to whole numbers, and goes on with them in {where}: what goes that "
            "way gets no evidence. Explain it in floating point, if it can be had so.",
            stacklevel=2,
        )
    for call in recorder.calls:
        call.module = names.get(call.owner, "") if call.owner is not None else ""
    return Tape(inputs, recorder.calls, output, recorder.reads)


_RECORD = record.__code__
