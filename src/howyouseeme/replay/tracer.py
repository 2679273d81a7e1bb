"""What an explanation asks PyTorch for, call by call, so that it can be asked again for another image."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..rounding import is_unrounded
from ..tape import looks_are_harmless, with_looks
from ..tape.facts import facts_of
from ..tape.strays import LEAVES, MAKERS, memory_of
from ..work import Work, noted

__all__ = ["Guard", "Instruction", "Part", "Slot", "Tracer", "Unfit"]


class Unfit(Exception):  # noqa: N818 - no error for users, who are told of it by a warning
    """Why something can't be replayed."""


class Slot:
    """Stands for a tensor: the `index` of the place that it has in a program."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __repr__(self) -> str:
        return f"v{self.index}"


@dataclass(eq=False)
class Instruction:
    """One call: `args` and `kwargs` with a `Slot` for each tensor, and the slots of what it returns."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: list[int | None]
    listed: bool  # whether it returns several
    reads: list[int]  # slots
    writes: list[int]  # memory: see `Tracer.memory`
    unrounded: bool = False  # see `howyouseeme.rounding`


class Guard(NamedTuple):
    """A look at the contents of a slot, on which Python decided something: a replay must find the same."""

    slot: int
    expected: Any


class Kind(NamedTuple):
    """What a tensor is like, whatever is in it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: torch.device


@dataclass(eq=False)
class _Known:
    """A tensor that has a slot."""

    slot: int
    tensor: weakref.ref[Tensor]
    storage: int


@dataclass(eq=False)
class Part:
    """The calls between two cuts, and the looks that were taken."""

    made_anew: bool = False
    instructions: list[Instruction] = field(default_factory=list)
    guards: list[Guard] = field(default_factory=list)
    reads: set[int] = field(default_factory=set)  # slots, also by looks
    made: set[int] = field(default_factory=set)  # slots


class Tracer(TorchDispatchMode):
    """Follows all calls of a thread, of PyTorch's ATen, and which tensor went from where to where.

    >>> tracer = Tracer()
    >>> place = tracer.enter(image)
    >>> with tracer:
    ...     answer = model(image)
    >>> tracer.parts[0].instructions, tracer.slot(answer)

    What is not made by these calls is a constant: weights, and what Python made of numbers. It is known by
    the object, so that a replay sees weights as they are then; whole numbers, such as places, are not to
    change. Contents that Python looks at are guarded.

    Raises:
        Unfit: what was done can't be replayed, as it doesn't show in calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts = [Part()]
        self.device = torch.device("cpu")  # of what is given first
        self._found: dict[int, Tensor] = {}  # by slot: what was there before
        self.memory: list[int] = []  # of each slot: the same number for what shares memory
        self.kinds: list[Kind] = []  # of each slot
        self._known: dict[int, _Known] = {}  # by id of the tensor
        self._lent: dict[int, int] = {}  # memory that was there before, by storage
        self.fixed: dict[int, Tensor] = {}  # by slot: what is the same for all inputs and weights
        self.numbers: list[tuple[Tensor, Tensor]] = []  # whole ones that must stay what they are
        # Memory that was read for something that is not always the same, and that Python looked at.
        self._used: set[int] = set()
        self._seen: set[int] = set()
        self._makers: dict[int, list[weakref.ref[Tensor]]] = {}  # what calls made, by storage
        self._given: set[int] = set()  # storages of what is given
        self._memories = 0
        self._refused: Unfit | None = None
        self._functions = _Functions(self)
        self._entered: list[ExitStack] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which takes seconds, to import the compiler

    def __enter__(self) -> Any:
        self._entered.append(stack := ExitStack())
        stack.enter_context(noted(self.work))
        stack.enter_context(self._functions)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._entered.pop().__exit__(*error)

    @property
    def part(self) -> Part:
        """What is going on now."""
        return self.parts[-1]

    def cut(self, *, made_anew: bool = False) -> None:
        """What comes is a part of its own; one that is made anew by Python each time may do what it likes."""
        self.parts.append(Part(made_anew))

    def refuse(self, reason: str) -> Unfit:
        """Why this can't be replayed, remembered: the network may catch it."""
        self._refused = Unfit(reason)
        return self._refused

    def check(self) -> None:
        """Raise what the network has caught."""
        if self._refused is not None:
            raise self._refused

    # -- tensors ----------------------------------------------------------------------------------

    def enter(self, tensor: Tensor) -> int:
        """The slot of something that is given for each replay."""
        storage = self._storage(tensor)
        if not self._given:
            self.device = tensor.device
        self._given.add(storage)
        return self._add(tensor, self._lent_memory(storage))

    def slot(self, tensor: Tensor) -> int:
        """The slot of a tensor; that of a constant if it was not made by a call."""
        known = self._known.get(id(tensor))
        storage = self._storage(tensor)
        if known is not None and known.tensor() is tensor:
            if known.storage != storage:
                raise self.refuse("a tensor is given other memory (`.data = ...`)")
            return known.slot
        behind = any(maker() is not None for maker in self._makers.get(storage, ()))
        if behind or storage in self._given:
            raise self.refuse(
                "a tensor shares memory with what was made or given, which no call tells"
            )
        # On its way to the device: made of numbers by the walk, as the network's weights are there.
        elsewhere = tensor.device != self.device and storage not in self._lent
        slot = self._add(tensor, self._lent_memory(storage))
        self._found[slot] = tensor
        whole = not (tensor.is_floating_point() or tensor.is_complex())
        if whole or (elsewhere and len(self.parts) > 1):
            self.fixed[slot] = tensor
        if whole:
            self.numbers.append((tensor, tensor.clone()))
        return slot

    def _storage(self, tensor: Tensor) -> int:
        """Which memory a tensor lies in."""
        memory = memory_of(tensor)
        if memory is None:
            raise self.refuse("there are tensors without memory of their own (sparse, mkldnn)")
        return memory

    def _geometry(self, tensor: Tensor) -> tuple[Any, ...]:
        """Where the elements of a tensor lie, and what they are."""
        return (
            self._storage(tensor),
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            tensor.storage_offset(),
            tensor.is_conj(),
            tensor.is_neg(),
        )

    @property
    def lent(self) -> set[int]:
        """The memory that was there before, which nothing may be written to."""
        return set(self._lent.values())

    @property
    def constants(self) -> dict[int, Tensor]:
        """What a program needs not be given, by slot: what was there before, and what is always the same."""
        return self._found | self.fixed

    def alias(self, tensor: Tensor, other: Tensor) -> None:
        """A tensor is another one under a new object."""
        self._known[id(tensor)] = _Known(
            self.slot(other), weakref.ref(tensor), self._storage(tensor)
        )

    def known(self, tensor: Tensor) -> int | None:
        """The slot of a tensor that has one."""
        known = self._known.get(id(tensor))
        return known.slot if known is not None and known.tensor() is tensor else None

    def _add(self, tensor: Tensor, memory: int) -> int:
        slot = len(self.memory)
        self.memory.append(memory)
        self.kinds.append(Kind(tensor.dtype, tensor.shape, tensor.stride(), tensor.device))
        self._known[id(tensor)] = _Known(slot, weakref.ref(tensor), self._storage(tensor))
        return slot

    def _lent_memory(self, storage: int) -> int:
        if storage not in self._lent:
            self._lent[storage] = self._fresh_memory()
        return self._lent[storage]

    def _fresh_memory(self) -> int:
        self._memories += 1
        return self._memories

    # -- calls ------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.part.made_anew:
            return self._follow(op, args, kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        given = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
        reads = {key: self.slot(tensor) for key, tensor in given.items()}
        fixed = self.fixed.keys() >= set(reads.values())
        unsized = _unsized(op, args)
        if (reason := _unfit(op, args)) is not None or (unsized and not fixed):
            raise self.refuse(reason or f"what {op} returns has a size that depends on contents")
        if op is torch.ops.aten.equal.default and args[0].shape == args[1].shape:
            with self:  # as a look at a tensor
                return bool((args[0] == args[1]).all())
        if self._looks_up(op, args, kwargs, reads):
            raise self.refuse(
                f"{op} looks up places after a look at contents, which might have kept it from others"
            )
        result = op(*args, **kwargs)
        if op in _SCALARS:
            self.look(reads[id(args[0])], args[0].tolist())
        elif not _holds_tensors(result):  # of types, say
            if not fixed:
                raise self.refuse(f"{op} returns numbers")
        else:
            self._note(op, (args, kwargs), list(given.values()), result, fixed)
        return result

    def _looks_up(
        self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], slots: dict[int, int]
    ) -> bool:
        """Whether a network's call on a GPU takes places that a look could have found too high: that breaks
        the device, while the CPU has an error for it."""
        if self.device.type == "cpu" or len(self.parts) > 1 or not self.part.guards:
            return False
        named = zip(op._schema.arguments, args, strict=False)
        places = [item for argument, item in named if argument.name in _PLACES]
        places += [item for name, item in kwargs.items() if name in _PLACES]
        return any(
            isinstance(leaf, Tensor) and slots[id(leaf)] not in self.fixed
            for leaf in pytree.tree_leaves(places)
        )

    def _note(
        self,
        op: Any,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        given: list[Tensor],
        result: Any,
        fixed: bool,
    ) -> None:
        """Keep a call as an instruction, unless all that it makes is there already."""
        made = pytree.tree_leaves(result)
        writes = self._writes(op, *arguments, fixed)
        if not writes and (self._same(made, given) or self._views(made, given)):
            return
        args, kwargs = pytree.tree_map(
            lambda leaf: Slot(self.slot(leaf)) if isinstance(leaf, Tensor) else leaf, arguments
        )
        reads = [self.slot(tensor) for tensor in given]
        if not fixed:
            self._used.update(self.memory[slot] for slot in reads)
        fixed = fixed and not writes and not facts_of(op).uninitialised
        outs = [None if leaf is None else self._made(leaf, given, fixed) for leaf in made]
        self.part.reads.update(reads)
        self.part.made.update(out for out in outs if out is not None)
        listed = isinstance(result, (list, tuple))
        self.part.instructions.append(
            Instruction(op, args, kwargs, outs, listed, reads, writes, is_unrounded())
        )

    def work(self, work: Work, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Do work, and keep it as one instruction: whatever it decides by contents it decides anew."""
        if self.device.type != "cpu":
            raise self.refuse("nodes are chosen by contents, which a GPU would be waited for")
        reads = [self.slot(tensor) for tensor in tensors]
        self.__exit__(None, None, None)
        try:
            with with_looks():
                made = work(tensors)
        finally:
            self.__enter__()
        outs = [self._made(tensor, (), False) for tensor in made]
        self._used.update(self.memory[slot] for slot in reads)
        self.part.reads.update(reads)
        self.part.made.update(outs)
        given = ([Slot(slot) for slot in reads],)
        self.part.instructions.append(Instruction(work, given, {}, [*outs], True, reads, []))
        return made

    def _follow(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a part that is made anew: only what it reads is of interest."""
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.part.reads.add(self.slot(leaf))
        result = op(*args, **kwargs)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and self.known(leaf) is None:
                self.part.made.add(self._add(leaf, self._fresh_memory()))
        return result

    def look(self, slot: int, found: Any) -> None:
        """Python looked at the contents of a slot."""
        if slot not in self.fixed and not looks_are_harmless():
            self.part.reads.add(slot)
            self._seen.add(self.memory[slot])
            guard = Guard(slot, found)
            if guard not in self.part.guards:
                self.part.guards.append(guard)

    def is_fixed(self, tensor: Tensor) -> bool:
        """Whether a tensor is the same for all inputs and weights, as far as calls tell."""
        return self.slot(tensor) in self.fixed

    def _same(self, made: list[Tensor | None], given: list[Tensor]) -> bool:
        """Whether a call returned one of its arguments, under another object; it has the same slot then."""
        if len(made) != 1 or made[0] is None:
            return False
        for tensor in given:
            if self._geometry(made[0]) == self._geometry(tensor):
                if made[0] is not tensor:
                    self.alias(made[0], tensor)
                return True
        return False

    def _views(self, made: list[Tensor | None], given: list[Tensor]) -> bool:
        """Whether a call returned views of what was there before, which stay such: constants as well."""
        tensors = [item for item in made if item is not None]
        storages = {self._storage(tensor) for tensor in given}
        if (
            not given
            or not all(self.slot(tensor) in self._found for tensor in given)
            or not all(self._storage(tensor) in storages for tensor in tensors)
        ):
            return False
        for tensor in tensors:
            self.slot(tensor)
        return True

    def _made(self, tensor: Tensor, given: Iterable[Tensor], fixed: bool) -> int:
        known = self.known(tensor)
        if known is not None:  # it was written to
            return known
        storage = self._storage(tensor)
        shared = next((item for item in given if self._storage(item) == storage), None)
        slot = self._add(
            tensor, self._fresh_memory() if shared is None else self.memory[self.slot(shared)]
        )
        self._makers.setdefault(storage, []).append(weakref.ref(tensor))
        if fixed:
            self.fixed[slot] = tensor
        return slot

    def _writes(
        self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], fixed: bool
    ) -> list[int]:
        """The memory that a call writes to, which must be the explanation's own."""
        writes = []
        for tensor in facts_of(op).written(args, kwargs):
            memory = self.memory[self.slot(tensor)]
            if memory in self._lent.values():
                raise self.refuse(f"{op} writes to the input, to weights or to another constant")
            if memory in self._seen:
                raise self.refuse(f"{op} writes to what Python has looked at")
            if not fixed or memory in self._used:  # it is another thing from now on
                for other in [one for one in self.fixed if self.memory[one] == memory]:
                    del self.fixed[other]
            writes.append(memory)
        return writes


class _Functions(TorchFunctionMode):
    """Notices what takes contents out of PyTorch without a call of ATen."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tracer, kwargs = self._tracer, kwargs or {}
        if func == _DATA:
            tracer.alias(result, args[0])
        elif func in _LOOKS:
            self._look(args[0])
        elif func in _SPLITS and isinstance(args[1], Tensor):  # reads where to split
            self._look(args[1])
        elif func in _LEAVES or func in _LISTS:
            taken = _listed(args, kwargs) if func in _LISTS else [args[0]]
            if tracer.part.made_anew:
                tracer.part.reads.update(map(tracer.slot, taken))
            elif not all(map(tracer.is_fixed, taken)) or (
                func in _LEAVES and len(tracer.parts) == 1  # of a network, which may write to it
            ):
                raise tracer.refuse("contents are taken by NumPy or other code outside of PyTorch")
        return result

    def _look(self, tensor: Tensor) -> None:
        slot = self._tracer.slot(tensor)
        if self._tracer.part.made_anew:
            self._tracer.part.reads.add(slot)
        else:
            self._tracer.look(slot, tensor.tolist())


def _listed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors in lists among the arguments, or in lists in tuples: their contents are read one by one."""
    lists = [
        part
        for item in (*args, *kwargs.values())
        for part in (item if isinstance(item, tuple) else (item,))
        if isinstance(part, list)
    ]
    return [leaf for leaf in pytree.tree_leaves(lists) if isinstance(leaf, Tensor)]


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]

#: What gives contents to Python.
_LOOKS: set[Callable[..., Any]] = {
    *(Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__)
}

#: What gives the memory itself away.
_LEAVES = LEAVES | {Tensor.data_ptr}

#: What makes a tensor, or places, of numbers, which may be in tensors in lists.
_LISTS = MAKERS | {Tensor.__getitem__, Tensor.__setitem__}

_SPLITS: set[Callable[..., Any]] = {torch.tensor_split, Tensor.tensor_split}


def _unfit(op: Any, args: tuple[Any, ...]) -> str | None:
    """Why a call can't be replayed."""
    if op.namespace != "aten":
        return f"{op} is no call of PyTorch's own"
    if torch.Tag.nondeterministic_seeded in op.tags and not _drops_nothing(op, args):
        return f"{op} makes random numbers"
    moved = torch.Tag.inplace_view in op.tags or op.overloadpacket is torch.ops.aten.set_
    if moved and not (op is torch.ops.aten.as_strided_.default and _same_places(*args)):
        return f"{op} gives a tensor another shape or memory"
    notes = facts_of(op).silent and args[5] and args[3] is not None
    return f"{op} notes statistics" if notes else None


def _unsized(op: Any, args: tuple[Any, ...]) -> bool:
    """Whether the size of what a call returns depends on contents."""
    if op is torch.ops.aten.index.Tensor:  # by masks, or by places
        return any(isinstance(index, Tensor) and index.dtype in _MASKS for index in args[1])
    return torch.Tag.dynamic_output_shape in op.tags


def _holds_tensors(result: Any) -> bool:
    """Whether a call returned tensors, and else nothing."""
    return all(leaf is None or isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result))


_SCALARS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default}

#: What calls name the places that they look up.
_PLACES = {"index", "indices"}

_MASKS = {torch.bool, torch.uint8}


def _drops_nothing(op: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call that could make random numbers has a dropout of 0."""
    for position, argument in enumerate(op._schema.arguments):
        if argument.name in {"dropout_p", "dropout"}:
            return not (args[position] if position < len(args) else argument.default_value)
    return False


def _same_places(
    tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> bool:
    """Whether other strides leave all elements where they are."""
    here = (tensor.shape, tensor.stride(), tensor.storage_offset())
    there = (tuple(size), tuple(stride), here[2] if offset is None else offset)
    return here[::2] == there[::2] and all(
        one == other or count == 1
        for count, one, other in zip(size, here[1], there[1], strict=True)
    )
