"""Walks that go where contents lead them, as one piece of work for whoever notes calls.

A replay gives such a walk the contents of another image: its plan is kept without any (`_Hollow`), and filled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from ..backtrack import Plan
from ..links import BatchedMatrix, Diagonal, Link
from ..rules import Step
from ..tape import Value
from ..work import note

__all__ = ["at_once"]

#: What a walk makes of the contents of a plan, and of tensors: fresh ones, as many of the same shapes each time.
_Walk = Callable[[Plan, Sequence[Tensor]], list[Tensor]]


def at_once(
    walk: _Walk, plan: Plan, starts: Iterable[Value], given: Sequence[Tensor], *, moved: bool
) -> list[Tensor]:
    """What a walk from the values `starts` of a plan makes of `given`, as one call where calls are noted.

    >>> lost, *found = at_once(descent, plan, maps, list(maps.values()), moved=False)

    It reads the contents of inputs, of values where ways meet, and of what calls make sums of; if `moved`, also
    those that a call selects from.
    """
    if (do := note()) is None:
        return walk(plan, given)
    try:
        hollow = _Hollow(plan, starts, moved)
    except _Unknown:  # whoever notes calls has to do with those that there are
        return walk(plan, given)
    count = len(given)

    def work(tensors: Sequence[Tensor]) -> list[Tensor]:
        with hollow.filled(tensors[count:]) as filled:
            return walk(filled, tensors[:count])

    found = do(work, [*given, *hollow.contents])
    hollow.contents.clear()
    return found


class _Unknown(Exception):  # noqa: N818 - no error for users
    """A link holds something that may be, or have, contents of the image."""


@dataclass(frozen=True)
class _Place:
    """Stands for the tensor at this place of the contents."""

    index: int


class _Hollow:
    """The part of a plan below the values `starts`: its contents, and what it is without them."""

    def __init__(self, plan: Plan, starts: Iterable[Value], moved: bool) -> None:
        self._bare = Plan(plan.start, [], plan.inputs, plan.exclusive)
        below = set(starts)
        ways = Counter(below)
        read = below | set(plan.inputs)
        self._steps: list[tuple[Value, Step]] = []
        for value, step in plan.steps:
            if value not in below:
                continue
            ways.update(source for source, _ in step.links)
            below.update(source for source, _ in step.links)
            if not step.moves or (moved and not _stays(step)):
                read.update(source for source, _ in step.links)
        # Where ways meet, the sign of what is there tells what is asked.
        read.update(value for value, count in ways.items() if count > 1)
        self._values = sorted(read, key=lambda value: value.index)
        self.contents = [value.data for value in self._values]
        for value, step in plan.steps:  # all of them: their number tells their pattern
            if value not in below:
                self._steps.append((value, Step([])))
                continue
            stays = _stays(step)
            emptied = [(source, self._emptied(link, stays)) for source, link in step.links]
            self._steps.append((value, replace(step, links=emptied, bias=None)))

    @contextmanager
    def filled(self, contents: Sequence[Tensor]) -> Iterator[Plan]:
        """The plan with other contents, in the order of `contents`."""
        empty = [value for value in self._values if value.forgotten]
        try:
            for value, data in zip(self._values, contents[: len(self._values)], strict=True):
                value.refill(data)
            yield replace(
                self._bare,
                steps=[
                    (
                        value,
                        replace(
                            step, links=[(of, _filled(link, contents)) for of, link in step.links]
                        ),
                    )
                    for value, step in self._steps
                ],
            )
        finally:
            for value in empty:
                value.drop()

    def _emptied(self, link: Link, stays: bool) -> Link:
        if stays:  # by which slope is not asked
            return Diagonal(link.in_shape, link.out_shape)
        if isinstance(link, Diagonal | BatchedMatrix):
            _ = link.weight  # made now, if it was not
        emptied: Link = _each(link, self._out)
        return emptied

    def _out(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        self.contents.append(item)
        return _Place(len(self.contents) - 1)


def _stays(step: Step) -> bool:
    """Whether all evidence stays at its place, and asks for what it asked."""
    link = step.links[0][1] if len(step.links) == 1 else None
    return isinstance(link, Diagonal) and link.rising


def _filled(link: Link, contents: Sequence[Tensor]) -> Link:
    filled: Link = _each(
        link, lambda item: contents[item.index] if isinstance(item, _Place) else item
    )
    return filled


#: What has no contents, and changes not.
_PLAIN = (Number, str, type(None), torch.Size, torch.dtype, torch.device, _Place)


def _each(item: Any, change: Callable[[Any], Any]) -> Any:
    """A link with all that it holds changed, also what is in dicts, lists, tuples, and other links.

    Raises:
        _Unknown: it holds something else, such as a function.
    """
    if isinstance(item, Link):
        if any(getattr(kind, "__slots__", ()) for kind in type(item).__mro__):
            raise _Unknown
        made = copy(item)
        vars(made).update({name: _each(part, change) for name, part in vars(item).items()})
        return made
    if type(item) is dict:
        return {key: _each(part, change) for key, part in item.items()}
    if type(item) in {list, tuple}:
        return type(item)(_each(part, change) for part in item)
    if not isinstance(item, (Tensor, *_PLAIN)):
        raise _Unknown
    return change(item)
