"""What there is to know about a call of PyTorch, whatever it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..decompositions import decompositions

__all__ = ["Facts", "facts_of", "functional_of"]


@dataclass(frozen=True, eq=False, slots=True)
class Facts:
    """What there is to know about an overload."""

    name: str
    writes: tuple[int, ...]  # positions of the arguments that the call writes to
    targets: list[Any]  # those arguments, as the schema has them
    outs: frozenset[str]  # the names of those that can be given by name only
    fresh: bool  # whether it returns a tensor that it made
    moves: bool  # whether it changes but sizes and strides
    factory: bool
    uninitialised: bool
    silent: bool  # whether it may write without saying so
    random: bool  # whether it can draw random numbers
    indexed: bool  # whether whole numbers are positions to it
    parts: Callable[..., Any] | None  # what it is made of, where that is what gets recorded

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors, of those that the call is given, that it writes to.

        >>> facts_of(torch.ops.aten.add.out).written((x, y), {"out": z})[0] is z
        True
        """
        items = [
            args[i] if i < len(args) else kwargs.get(target.name)
            for i, target in zip(self.writes, self.targets, strict=True)
        ]
        return [leaf for leaf in pytree.tree_leaves(items) if isinstance(leaf, Tensor)]


@cache
def facts_of(op: Any) -> Facts:
    """What there is to know about an overload, found out once."""
    arguments = op._schema.arguments
    writes = _writes(op)
    name = str(op.overloadpacket)
    base = name.rsplit(".", 1)[-1]
    if base.endswith("_") and not base.startswith("__"):
        name = name[:-1]
    return Facts(
        name=name,
        writes=writes,
        targets=[arguments[i] for i in writes],
        outs=frozenset(arguments[i].name for i in writes if arguments[i].kwarg_only),
        fresh=any(item.alias_info is None for item in op._schema.returns),
        moves=torch.Tag.inplace_view in op.tags,
        factory=name in _FACTORIES,
        uninitialised=name in _UNINITIALISED,
        silent=name in _SILENT_WRITES,
        random=torch.Tag.nondeterministic_seeded in op.tags,
        indexed=name in _INDEXED,
        parts=decompositions().get(name),
    )


def _writes(op: Any) -> tuple[int, ...]:
    return tuple(
        position
        for position, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@cache
def functional_of(op: Any) -> Any:
    """The overload that does the same and writes nothing: relu for relu_, add.Tensor for add.out"""
    wanted = [
        (argument.name, str(argument.type))
        for argument in op._schema.arguments
        if not (argument.kwarg_only and argument.alias_info and argument.alias_info.is_write)
    ]
    namespace, _, name = facts_of(op).name.rpartition(".")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    found = op
    for overload in packet.overloads() if packet is not None else ():
        other = getattr(packet, overload)
        has = [(argument.name, str(argument.type)) for argument in other._schema.arguments]
        if has == wanted and not _writes(other):
            found = other
    return found


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
    for name in (
        *("empty", "empty_like", "empty_permuted", "empty_strided"),
        *("new_empty", "new_empty_strided"),
        *("resize", "resize_as"),  # of an empty tensor
    )
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
