"""Constants of a pass that are none: contents of activations that left PyTorch, and random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .facts import Facts

__all__ = ["LEAVES", "MAKERS", "Looks", "Stray", "Strays", "memory_of"]


class Stray(NamedTuple):
    """Where a constant that is none came from, or where it met activations."""

    call: str
    owner: nn.Module | None


class _Taint(NamedTuple):
    tensor: Tensor  # kept alive, as other memory could be called the same
    drawn: Stray | None  # where it was drawn at random; None where it came from outside of PyTorch


class Strays:
    """Follows such constants, by the memory that they lie in, until they meet an activation.

    What is looked at is seldom used, and constants are made of numbers all the time: only what is sure to
    have come back counts, which is memory that is not PyTorch's own and numbers that were given away.
    """

    def __init__(self) -> None:
        self._tainted: dict[int, _Taint] = {}
        self._numbers: set[float] = set()  # that Python was told
        self._away = False  # whether contents were given away as a whole
        self.paused = False  # while it is not the model that calls
        self.back: Stray | None = None  # where contents that left first met activations again
        # Where random numbers that met activations were drawn first.
        self.drawn: Stray | None = None

    # -- leaving and coming back ------------------------------------------------------------------

    def leave(self) -> None:
        """The contents of an activation are given away as a whole, to NumPy say."""
        self._away = True

    def tell(self, numbers: Iterable[Any]) -> None:
        """Numbers of an activation are given to Python. Whole ones are too common to be known again."""
        floats = {n for n in numbers if isinstance(n, float)}
        self._numbers |= {n for n in floats if math.isfinite(n) and not n.is_integer()}

    def returned(self, numbers: Iterable[Any]) -> bool:
        """Whether some were given to Python before."""
        return bool(self._numbers) and any(
            isinstance(n, float) and n in self._numbers for n in numbers
        )

    def taint(self, tensor: Any, drawn: Stray | None = None) -> None:
        """A tensor is such a constant, with all that shares its memory."""
        if isinstance(tensor, Tensor) and (drawn is not None or tensor.is_floating_point()):
            key = memory_of(tensor)
            if key is not None:
                self._tainted.setdefault(key, _Taint(tensor, drawn))

    # -- calls ------------------------------------------------------------------------------------

    def idle(self, facts: Facts) -> bool:
        """Whether nothing about a call can matter."""
        seen = facts.random or self._tainted or self._away or self._numbers
        return self.paused or not seen

    def follow(
        self,
        op: Any,
        facts: Facts,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        made: list[Tensor],
        depends: bool,
        where: nn.Module | None,
        theirs: Callable[[int], bool],
    ) -> None:
        """See what a call does with them: of its arguments, the tensors are those that are no activations.

        `theirs` tells memory that was there before the forward pass.
        """
        drawn = Stray(facts.name, where) if facts.random and draws(op, args, kwargs) else None
        outside = facts.name in _FILLS and self.returned((*args, *kwargs.values()))
        if not facts.factory:
            given = args[1:] if facts.name == "aten.copy" else args  # the first is written over
            for tensor in pytree.tree_leaves((given, kwargs)):
                found = self._taint_of(tensor, theirs) if isinstance(tensor, Tensor) else None
                if found is not None:
                    drawn = drawn or found.drawn
                    outside = outside or found.drawn is None
        if depends and any(tensor.is_floating_point() for tensor in made):
            self.drawn = self.drawn or drawn
            if outside and facts.name not in _PLACED:
                self.back = self.back or Stray(facts.name, where)
        elif drawn is not None or outside:
            for tensor in made:
                self.taint(tensor, drawn)

    def _taint_of(self, tensor: Tensor, theirs: Callable[[int], bool]) -> _Taint | None:
        key = memory_of(tensor)
        if key is None:
            return None
        # No call tells of memory that DLPack or a buffer lends.
        lent = self._away and not tensor.untyped_storage().resizable()
        if lent and key not in self._tainted and not theirs(key):
            self.taint(tensor)
        return self._tainted.get(key)


def memory_of(tensor: Tensor) -> int | None:
    """Identifies the memory behind a tensor; None where it has none of its own (sparse, mkldnn)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


#: What makes a tensor of one number.
_FILLS = {f"aten.{name}" for name in ("full", "full_like", "new_full", "fill", "scalar_tensor")}

#: What takes floats for places, by which no evidence goes anyway.
_PLACED = {
    *(f"torchvision.{name}" for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")),
    *("aten.grid_sampler_2d", "aten.grid_sampler_3d"),
}


def draws(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call that can draw random numbers does, and of a generator that is not its own.

    >>> draws(torch.ops.aten.native_dropout.default, (x, 0.5, False), {})
    False
    """
    for position, argument in enumerate(op._schema.arguments):
        name = argument.name
        given = args[position] if position < len(args) else kwargs.get(name, argument.default_value)
        if name == "generator" and given is not None:
            return False
        if name in {"train", "training"} and given is False:
            return False
        if name in {"dropout", "dropout_p", "p"} and given in (0, 1):
            return False
    return True


class Looks(TorchFunctionMode):
    """Notices what takes contents out of PyTorch, and brings numbers in, without a call of ATen."""

    def __init__(self, strays: Strays, is_activation: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self._strays = strays
        self._is_activation = is_activation

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in _NOTICED:  # most are not, and it is asked each time
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if func is Tensor.__deepcopy__ and self._is_activation(args[0]):
            return args[0].clone()  # its own copies memory, which no call shows
        result = func(*args, **kwargs)
        if self._strays.paused:
            return result
        if func in LEAVES:
            if self._is_activation(args[0]):
                self._strays.leave()
        elif func is Tensor.tolist:
            if self._is_activation(args[0]):
                if isinstance(result, list):
                    self._strays.leave()
                self._strays.tell(pytree.tree_leaves(result))
        elif func in MAKERS:
            self._made(result, [*args, *kwargs.values()])
        return result

    def _made(self, result: Any, given: list[Any]) -> None:
        """A tensor was made of numbers, which may be those of activations."""
        listed = pytree.tree_leaves([item for item in given if isinstance(item, (list, tuple))])
        numbers = [n.item() if isinstance(n, np.generic) else n for n in (*given, *listed)]
        inside = (item for item in listed if isinstance(item, Tensor))
        if self._strays.returned(numbers) or any(map(self._is_activation, inside)):
            self._strays.taint(result)


#: The functions that give contents away as a whole, without a call of ATen.
LEAVES: set[Callable[..., Any]] = {Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}

#: The functions that make a tensor of numbers, which may be in tensors in lists.
MAKERS: set[Callable[..., Any]] = {
    *(torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
}

_NOTICED = LEAVES | MAKERS | {Tensor.tolist, Tensor.__deepcopy__}
