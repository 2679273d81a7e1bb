"""What a module is made of, but for the contents of its tensors: a trace holds while that is the same."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _everywhere

__all__ = ["State", "unseen"]

#: Collections with more in them are told by their object and their size.
_MOST = 256


class State:
    """The parts of a module as they were.

    >>> state = State(module)
    >>> module.head = nn.Linear(8, 2)
    >>> state.holds()
    False

    Modules, whatever holds them, and their attributes, classes and hooks; lists, tuples, sets and dicts in them;
    the attributes of other objects, such as a configuration, and of objects in these; and where tensors lie. Not
    seen are attributes of classes of other objects, in `__slots__`, and what arrays of NumPy hold. Objects are
    held, as new ones may come to lie where they lay.
    """

    def __init__(self, module: nn.Module) -> None:
        self.of = module
        self._owners: list[Any] = []  # of attributes
        self._classes: list[type] = []
        self._collections: list[Collection[Any]] = []  # what is in them is told by `_readers`
        self._readers: list[Callable[[], Iterable[Any]]] = []
        self._tensors: list[Tensor] = []
        met: set[int] = set()
        self._visit([module], _DEEP, met)
        for hooks in (_everywhere._global_forward_hooks, _everywhere._global_forward_pre_hooks):
            self._visit_collection(hooks, _DEEP, met)
        self._found = self._look()

    def holds(self) -> bool:
        """Whether all is as it was: the same objects, or equal numbers and strings, and tensors in the same places."""
        places, *found = self._look()
        return places == self._found[0] and all(
            len(here) == len(there)
            and (all(map(operator.is_, here, there)) or all(map(_same, here, there)))
            for here, there in zip(found, self._found[1:], strict=True)
        )

    def _look(self) -> tuple[list[Any], ...]:
        """What there is where it was found, without a decision on each: a look takes milliseconds."""
        return (
            list(map(_place, self._tensors)),
            list(map(type, self._owners)),
            [kind.__mro__ for kind in self._classes],
            list(map(vars, self._owners)),
            [*map(len, self._collections), *map(len, map(vars, self._owners))],
            list(chain.from_iterable(reader() for reader in self._readers)),
        )

    def _visit(self, items: Iterable[Any], deep: int, met: set[int]) -> None:
        """Remember where these are found, and what they hold; `deep` in objects that are no modules."""
        for item in items:
            if type(item) in _PLAIN:  # most are
                continue
            if isinstance(item, Tensor):
                self._tensors.append(item)
            elif id(item) not in met:
                met.add(id(item))
                if isinstance(item, nn.Module):
                    self._visit_class(type(item), met)
                    self._visit_attributes(item, deep, met)
                elif isinstance(item, _COLLECTIONS):
                    self._visit_collection(item, deep, met)
                elif deep and not isinstance(item, _CODE) and hasattr(item, "__dict__"):
                    self._visit_attributes(item, deep - 1, met)

    def _visit_collection(self, item: Collection[Any], deep: int, met: set[int]) -> None:
        self._collections.append(item)
        plain = isinstance(item, tuple) and _PLAIN.issuperset(map(type, item))
        if item and len(item) <= _MOST and not plain:  # which stays what it is
            self._visit_held(item, deep, met)

    def _visit_attributes(self, item: Any, deep: int, met: set[int]) -> None:
        self._owners.append(item)
        self._visit_held(vars(item), deep, met)

    def _visit_held(self, item: Collection[Any], deep: int, met: set[int]) -> None:
        self._readers.append(item.__iter__)  # of a dict the keys
        if isinstance(item, Mapping):
            self._readers.append(item.values)
        self._visit(item.values() if isinstance(item, Mapping) else item, deep, met)

    def _visit_class(self, kind: type, met: set[int]) -> None:
        """The class of a module, with the methods and attributes that it has and inherits."""
        if id(kind) in met:
            return
        met.add(id(kind))
        self._classes.append(kind)
        for each in kind.__mro__[: kind.__mro__.index(nn.Module)]:
            self._readers += [vars(each).__iter__, vars(each).values]


def _same(one: object, other: object) -> bool:
    return one is other or (type(one) is type(other) and type(one) in _PLAIN and one == other)


#: Objects in objects, as a part of a configuration, are looked into so far.
_DEEP = 2

_PLAIN = {bool, int, float, str, type(None)}
_COLLECTIONS = (dict, list, tuple, set, frozenset, deque)
_CODE = (type, FunctionType, MethodType, BuiltinFunctionType, ModuleType)


def _place(tensor: Tensor) -> Any:
    try:
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
    except (RuntimeError, NotImplementedError):  # sparse, or of no memory yet
        return None


def unseen(module: nn.Module) -> str | None:
    """What of a module doesn't show in its state, or in calls."""
    parts = list(module.modules())
    if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        return "it has hooks, which a replay would not run"
    if _everywhere._global_forward_hooks or _everywhere._global_forward_pre_hooks:
        return "there are hooks on all modules, which a replay would not run"
    if any(isinstance(part, torch.jit.ScriptModule) for part in parts):
        return "it is of TorchScript, which keeps its attributes to itself"
    if torch.nn.utils.parametrize._cache_enabled:
        return "torch.nn.utils.parametrize.cached() keeps weights that may change"
    return None
