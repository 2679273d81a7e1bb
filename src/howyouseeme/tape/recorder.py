"""How a forward pass is recorded, call by call."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import InputError, ModelError
from .facts import Facts, facts_of, functional_of
from .strays import Looks, Strays, memory_of
from .values import Call, Tape, Value

__all__ = ["Reader", "opened", "record", "refuse_training"]


@dataclass(frozen=True)
class Reader:
    """A function of the model's output, or of the output that a module in it gave last.

    What the function makes of it is recorded too.
    """

    function: Callable[[Any], Any]
    module: nn.Module | None = None


_UNKNOWN: tuple[None, None] = None, None
_NOWHERE = -1


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

#: Sizes, strides and offset of a view.
_Geometry = tuple[tuple[int, ...], tuple[int, ...], int]


class _Recorder(TorchDispatchMode):
    """Builds the tape, call by call.

    In-place writes are what makes this hard. Every storage keeps a log of the values written to it:
    first by the call that allocated it, then by each in-place call. A tensor that saw fewer
    writes than its storage is read anew (`hysm.reread`): its elements come from the later writes
    where they overlap, and from what it held before everywhere else. That covers views of views,
    slice assignment and buffers filled piece by piece, with one mechanism.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, readers: Sequence[Reader] = ()) -> None:
        super().__init__()
        self.readers = readers
        self.reads: list[Any] = [None] * len(readers)
        self.calls: list[Call] = []
        self.count = 0
        self._rounded: dict[int, Tensor] = {}  # whole numbers made of activations, by id
        self._given_rounded = False  # whether the call that is being made is given some of them
        self.back_from_rounded: nn.Module | None = None  # what made floats of them
        self.strays = Strays()
        self._reading = False  # whether what is being made is a reader's
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
        self._attributes: set[int | None] | None = None  # of the modules; found when first asked
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
        self._given.add(memory_of(tensor))

    def _is_theirs(self, key: int) -> bool:
        """Whether memory is that of the model or the caller, and not of this forward pass."""
        if self._theirs is None:
            tensors = (*self._model.parameters(), *self._model.buffers())
            self._theirs = self._given.union(map(memory_of, tensors))
        return key in self._theirs

    def _was_there(self, key: int) -> bool:
        """Whether memory is that of the model or the caller, attributes that are no buffers among it."""
        if self._attributes is None:
            held = pytree.tree_leaves([list(vars(m).values()) for m in self._model.modules()])
            self._attributes = {memory_of(item) for item in held if isinstance(item, Tensor)}
        return key in self._attributes or self._is_theirs(key)

    def track(self, tensor: Tensor, call: Call | None = None, output: int = 0) -> Value:
        """A value for a tensor that was just made or written."""
        if tensor.is_nested and tensor.layout == torch.strided:  # which has no shape
            raise ModelError(
                "The model makes nested tensors (torch.nested), which can't be walked back through: let it "
                "work on padded ones."
            )
        # Under an object of its own: the network may give its tensor other memory (`h.data = ...`).
        value = Value(tensor.detach(), self.count, call, output)
        self.count += 1
        key = memory_of(tensor)
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
        return self._find(tensor, memory_of(tensor))

    def is_activation(self, item: Any) -> bool:
        """Whether a tensor holds floats that depend on the input."""
        if not isinstance(item, Tensor) or not item.is_floating_point():
            return False
        key = memory_of(item)
        return key in self._log or self._known.get(id(item), (None, _NOWHERE))[1] == key

    def _find(self, tensor: Tensor, key: int | None) -> Value | None:
        value, place = self._known.get(id(tensor), _UNKNOWN)
        if place != key:  # `tensor.data = other` gave it other memory
            value = None
        log = self._log.get(key) if key is not None else None
        if log is None or (value is not None and value.seen_writes == len(log)):
            return value
        # Stale, or an alias made behind the dispatcher's back (`.data`, a buffer written piecemeal).
        writes = log[value.seen_writes if value is not None else 0 :]
        if value is not None:
            mine = _geometry(tensor)
            writes = [write for write in writes if not _apart(mine, _geometry(write.data))]
            if not writes:  # other parts of the memory were written, as the gates of an LSTM are
                value.seen_writes = len(log)
                return value
        before: Any = value if value is not None else tensor.detach().clone()
        geometry = [_geometry(item) for item in (tensor, *(write.data for write in writes))]
        call = self._add("hysm.reread", None, (before, list(writes), geometry), {})
        fresh = self.track(tensor, call)
        call.outputs = (fresh,)
        return fresh

    def _add(self, name: str, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        call = Call(name, op, args, kwargs, len(self.calls), _running(), reads=self._reading)
        self.calls.append(call)
        return call

    def _lift(self, item: Any, values: list[Value], constants: list[int | None]) -> Any:
        """An argument as the tape keeps it; notes the values in it, and the memory of constants."""
        if isinstance(item, Tensor):
            key = memory_of(item)
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
        kwargs = kwargs or {}
        if isinstance(op, HigherOrderOperator):
            return self._higher(op, args, kwargs)
        facts = facts_of(op)
        # In the network's own inference mode whole layers come, and not the calls that they are made of.
        if torch.is_inference_mode_enabled() and not any(
            tensor.is_inference() for tensor in facts.written(args, kwargs)
        ):
            with torch.inference_mode(False), torch.no_grad(), self:
                return op(*args, **kwargs)
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
        rounded = self._given_rounded and not facts.factory and not facts.indexed
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
            result = self._write(
                op, facts, args, kwargs, lifted, lifted_kwargs, constants if depends else None
            )
            self._follow_strays(op, facts, (args, kwargs), (lifted, lifted_kwargs), result, depends)
            return result
        result = op(*args, **kwargs)
        if facts.uninitialised:
            result.zero_()
        if depends:
            call = self._add(facts.name, op, lifted, lifted_kwargs)
            self._hold(call, constants)
            call.outputs = self._outputs(result, call)
        if rounded or (depends and facts.name == "aten._to_copy"):
            self._follow_rounded(result, rounded)
        self._follow_strays(op, facts, (args, kwargs), (lifted, lifted_kwargs), result, depends)
        return result

    def _higher(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make what takes functions, by the calls that these make."""
        known = {
            "cond": lambda chosen, one, other, given: (one if chosen else other)(*given),
            "flex_attention": op.py_kernels.get(DispatchKey.CompositeExplicitAutograd),
        }
        made = known.get(op.name())
        if made is None:
            raise ModelError(
                f"The model makes a call of torch's {op.name()}, which can't be followed: let it make in "
                "plain Python what that does."
            )
        self._taking_apart += 1
        try:
            with self:
                return made(*args, **kwargs)
        finally:
            self._taking_apart -= 1

    def _follow_strays(
        self,
        op: Any,
        facts: Facts,
        given: tuple[tuple[Any, ...], dict[str, Any]],
        lifted: tuple[tuple[Any, ...], dict[str, Any]],
        result: Any,
        depends: bool,
    ) -> None:
        """Remember numbers that left PyTorch, or that were drawn at random, and where activations meet them."""
        if depends and facts.name == "aten._local_scalar_dense" and not self.strays.paused:
            self.strays.tell([result])
        elif not self.strays.idle(facts):
            made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            made += facts.written(*given)
            where = _running()
            self.strays.follow(op, facts, *lifted, made, depends, where, self._was_there)

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
        facts: Facts,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        lifted: tuple[Any, ...],
        lifted_kwargs: dict[str, Any],
        constants: list[int | None] | None,
    ) -> Any:
        """Make a call that writes to some of its arguments; `constants` is None if none depends on the input."""
        depends = constants is not None
        tensors = facts.written(args, kwargs)
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
        grown = facts.uninitialised and not any(tensor.numel() for tensor in tensors)
        result = op(*args, **kwargs)
        if grown:
            result.zero_()
        for tensor, value in zip(tensors, before, strict=True):
            if value is not None and not facts.moves:
                put = (value, tensor.detach().clone())
                call = self._add("aten.copy", torch.ops.aten.copy.default, put, {})
                call.outputs = (self._written(tensor, call, 0, moves=False),)
        if constants is not None:
            call = self._add(facts.name, functional_of(op), lifted, lifted_kwargs)
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
        facts: Facts,
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
                (given,) = facts.written(args, kwargs)
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
        key = memory_of(tensor)
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
        kept: dict[torch.dtype, Tensor] = {}  # all of the memory, by calls that others may follow

        def moved(data: Tensor) -> Tensor:
            if data.dtype not in kept:
                size = memory.nbytes() // data.element_size()
                kept[data.dtype] = data.as_strided((size,), (1,), 0).clone()
            return kept[data.dtype].as_strided(data.size(), data.stride(), data.storage_offset())

        for item in sharing:
            item.data = moved(item.data)
        for call in holders:
            call.args, call.kwargs = pytree.tree_map(
                lambda leaf: (
                    moved(leaf) if isinstance(leaf, Tensor) and memory_of(leaf) == key else leaf
                ),
                (call.args, call.kwargs),
            )

    def _written(self, tensor: Tensor, call: Call, output: int, moves: bool) -> Value:
        key = memory_of(tensor)
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
                self._reading = self.strays.paused = True
                try:
                    made = reader.function(output)
                    self.reads[position] = pytree.tree_map(self.result, made)
                finally:
                    self._reading = self.strays.paused = False

    def hook(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """The forward hook of modules that are read."""
        if threading.get_ident() == self._thread and output is not None:
            self.read(module, output)

    def result(self, item: Any) -> Any:
        """A part of the model's output: a value, or a constant that `restore` won't change."""
        item = self._lift(item, [], [])
        if isinstance(item, Tensor) and memory_of(item) in self._restore:
            return item.clone()
        return item

    def restore(self) -> None:
        """Give parameters, buffers and the caller's input the contents back that they had."""
        for key, (memory, before) in self._restore.items():
            self._move_out(key, memory)
            memory.copy_(before)

    def doubts(self, names: Mapping[nn.Module, str]) -> Iterator[str]:
        """What of the pass no evidence follows, or is otherwise the next time; a sentence each."""

        def name(module: nn.Module | None) -> str:
            return ("" if module is None else names.get(module, "")) or "the model itself"

        if self.back_from_rounded is not None:
            yield (
                "The model rounds activations to whole numbers, and goes on with them in "
                f"{name(self.back_from_rounded)}: what goes that way gets no evidence. Explain it in floating "
                "point, if it can be had so."
            )
        if (back := self.strays.back) is not None:
            yield (
                "Contents of activations leave PyTorch (by numpy(), tolist() or item(), say) and come back in "
                f"{name(back.owner)} ({back.call}): what goes that way gets no evidence. Write that part in "
                "calls of PyTorch."
            )
        if (drawn := self.strays.drawn) is not None:
            yield (
                f"The model draws random numbers ({drawn.call} in {name(drawn.owner)}) that reach its "
                "activations: it answers, and is explained, differently each time. Switch that off in eval "
                "mode; F.dropout takes training=self.training."
            )


def opened(output: Any) -> Any:
    """An answer with dicts in place of dataclasses, which PyTorch takes for leaves unless they are registered.

    >>> opened([Found(scores=x)])
    [{'scores': x}]
    """

    def is_open(item: Any) -> bool:
        return is_dataclass(item) and not isinstance(item, (type, Mapping))

    def inside(item: Any, around: tuple[int, ...]) -> Any:
        if not is_open(item) or id(item) in around:
            return item
        held = {
            one.name: getattr(item, one.name) for one in fields(item) if hasattr(item, one.name)
        }
        around = (*around, id(item))
        return pytree.tree_map(lambda part: inside(part, around), held, is_leaf=is_open)

    return pytree.tree_map(lambda item: inside(item, ()), output, is_leaf=is_open)


@cache
def _shielded() -> type[_Recorder]:
    """A recorder that torch's compiler leaves alone, where that is at work already."""
    methods = {
        "__torch_dispatch__": _Recorder.__torch_dispatch__,
        "_should_skip_dynamo": classmethod(lambda cls: True),
    }
    return type("_Shielded", (_Recorder,), methods)


def _apart(one: _Geometry, other: _Geometry) -> bool:
    """Whether two views surely share no element: boxes on the grid of one base, apart along some axis."""
    (size, stride, at), (others, strides, there) = one, other
    if stride != strides:
        return False
    axes = sorted(zip(stride, size, others, strict=True), reverse=True)
    apart, whole = False, 0
    for step, n, m in axes:
        if n == m == 1:
            continue
        if step == 0:
            return False
        (i, at), (j, there) = divmod(at, step), divmod(there, step)
        if whole and max(i + n, j + m) * step > whole:  # a box that goes on in the next row
            return False
        apart, whole = apart or i + n <= j or j + m <= i, step
    return apart


def _geometry(tensor: Tensor) -> _Geometry:
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
def _attention_not_compiled() -> Iterator[None]:
    """Let FlexAttention make its calls as it would while it is debugged, and not through the compiler."""
    flex: Any = sys.modules.get("torch.nn.attention.flex_attention")
    if not hasattr(flex, _PLAINLY):
        yield
        return
    with _PLAIN:  # a setting of the process, in which several threads may record
        _BEFORE.append(getattr(flex, _PLAINLY) if not _BEFORE else True)
        setattr(flex, _PLAINLY, True)
    try:
        yield
    finally:
        with _PLAIN:
            setattr(flex, _PLAINLY, _BEFORE.pop())


_PLAINLY = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
_PLAIN = threading.Lock()
_BEFORE: list[bool] = []  # what it was before each of the passes that are being recorded


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


#: Packages of modules that are made with the flag of training set, which nothing in them reads.
_WITHOUT_MODE = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")

#: Where PyTorch has modules that answer the same in either mode, such as those that a new head is made of.
_EITHER_MODE = tuple(
    f"torch.nn.modules.{name}"
    for name in "activation container conv flatten linear normalization padding pooling upsampling".split()
)

#: Of these, those that do not.
_BY_MODE = (nn.RReLU, nn.MultiheadAttention)


def refuse_training(model: nn.Module) -> None:
    """See that batch norm and dropout answer as they are meant to, and keep no statistics of what they are given.

    >>> refuse_training(model.eval())

    Raises:
        ModelError: the model, or a part of it, is in training mode.
    """
    # A head that was put on after model.eval() may be one of these.
    harmless = _WITHOUT_MODE if getattr(model, "training", False) else _WITHOUT_MODE + _EITHER_MODE
    training = [
        name or type(model).__name__
        for name, module in model.named_modules()
        # Frozen TorchScript has no mode, and torch.fx's empty containers one that means nothing.
        if getattr(module, "training", False)
        and type(module) is not nn.Module
        and (isinstance(module, _BY_MODE) or not type(module).__module__.startswith(harmless))
    ]
    if training:
        # Which refuses: the mode was fixed by the export, and can't be told.
        if "eval" in vars(model):
            raise ModelError(
                "The model is the module() of a program of torch.export, which can't say whether it was "
                "exported in eval mode: give the program itself."
            )
        raise ModelError(
            f"The model is in training mode ({', '.join(training[:3])}"
            f"{', ...' if len(training) > 3 else ''}), where batch norm and dropout answer "
            "differently each time: call model.eval() first."
        )


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
        InputError: `args` are no list of arguments, but a tensor.
    """
    refuse_training(model)
    if isinstance(args, Tensor):
        raise InputError("The arguments of a model are a list or tuple of them: give [images].")
    names = {module: name for name, module in model.named_modules()}
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
            looks = Looks(recorder.strays, recorder.is_activation)
            with (
                _layers_taken_apart(),
                _attention_not_compiled(),
                _read_by(recorder),
                looks,
                recorder,
            ):
                output = model(*args, **kwargs)
                recorder.read(None, output)
            output = pytree.tree_map(recorder.result, opened(output))
        finally:
            recorder.restore()
    for doubt in recorder.doubts(names):
        warnings.warn(doubt, stacklevel=2)
    for call in recorder.calls:
        call.module = names.get(call.owner, "") if call.owner is not None else ""
    return Tape(inputs, recorder.calls, output, recorder.reads)


_RECORD = record.__code__
