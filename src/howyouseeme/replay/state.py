"""What a module is made of, but for the contents of its tensors: a trace holds while that is the same."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable
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
    """The parts of a module as they are now.

    >>> before = State(module)
    >>> module.head = nn.Linear(8, 2)
    >>> State(module).same(before)
    False

    Modules, whatever holds them, and their attributes, classes and hooks; lists, tuples and dicts in them;
    the attributes of other objects, such as a configuration; and where tensors lie. Objects are held, as
    new ones may come to lie where they lay.
    """

    def __init__(self, module: nn.Module) -> None:
        self.of = module
        self.items: list[Any] = []
        self.places: list[Any] = []
        self._met: set[int] = set()
        # Where these were found, to be looked up again without a decision on each.
        self._owners: list[Any] = []  # of attributes
        self._collections: list[Any] = []
        self._readers: list[Callable[[], Iterable[Any]]] = []
        self._tensors: list[Tensor] = []
        self._note([module])
        for hooks in (_everywhere._global_forward_hooks, _everywhere._global_forward_pre_hooks):
            self._collections.append(hooks)
            self._readers.append(hooks.values)
            self.items += hooks.values()
        self._found = self._look()

    def holds(self) -> bool:
        """Whether all that was found is where it was, the same objects; a quick look, which may be wrong to deny it."""
        now, before = self._look(), self._found
        return now[0] == before[0] and all(
            len(here) == len(there) and all(map(operator.is_, here, there))
            for here, there in zip(now[1:], before[1:], strict=True)
        )

    def _look(self) -> tuple[list[Any], ...]:
        """Sizes and places, which are to be equal; attributes' owners, attributes, and what collections hold."""
        sizes: list[Any] = [*map(len, self._collections), *map(_place, self._tensors)]
        return (
            sizes,
            list(map(type, self._owners)),
            list(map(vars, self._owners)),
            list(chain.from_iterable(reader() for reader in self._readers)),
        )

    def same(self, other: State) -> bool:
        """Whether two states hold the same objects, or equal numbers and strings, and tensors in the same places."""
        if self.places != other.places or len(self.items) != len(other.items):
            return False
        if all(map(operator.is_, self.items, other.items)):
            return True
        return all(
            one is two or (type(one) is type(two) and type(one) in _PLAIN and one == two)
            for one, two in zip(self.items, other.items, strict=True)
        )

    def _note(self, items: Iterable[Any], deep: bool = True) -> None:
        """Note these, and what they hold."""
        items = list(items)
        self.items.append(len(items))
        self.items += items
        for item in items:
            kind = type(item)
            if kind in _PLAIN:  # most are
                continue
            if kind in _DICTS and not item:
                self._collections.append(item)
                continue
            if isinstance(item, Tensor):
                self.places.append(_place(item))
                self._tensors.append(item)
            elif id(item) not in self._met:
                self._met.add(id(item))
                self._note_inside(item, deep)

    def _note_inside(self, item: Any, deep: bool) -> None:
        if isinstance(item, nn.Module):
            self._note_class(type(item))
            self._note_attributes(item)
        elif isinstance(item, dict):
            self.items.append(len(item))
            self._collections.append(item)
            if len(item) <= _MOST:
                self._readers.append(item.values)
                self._note(item.values(), deep)
        elif isinstance(item, (list, tuple)):
            self.items.append(len(item))
            self._collections.append(item)
            plain = isinstance(item, tuple) and _PLAIN.issuperset(map(type, item))
            if len(item) <= _MOST and not plain:  # which stays what it is
                self._readers.append(item.__iter__)
                self._note(item, deep)
        elif deep and not isinstance(item, _CODE) and hasattr(item, "__dict__"):
            self.items.append(type(item))
            self._note_attributes(item, deep=False)

    def _note_attributes(self, item: Any, deep: bool = True) -> None:
        self._owners.append(item)
        self._readers.append(vars(item).values)
        self._note(vars(item).values(), deep)

    def _note_class(self, kind: type) -> None:
        """The class of a module, with the methods and attributes that it has and inherits."""
        self.items.append(kind)
        if id(kind) in self._met:
            return
        self._met.add(id(kind))
        for each in kind.__mro__[: kind.__mro__.index(nn.Module)]:
            self._readers.append(vars(each).values)
            self.items += vars(each).values()


_PLAIN = {bool, int, float, str, type(None)}
_DICTS = {dict, OrderedDict}
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
