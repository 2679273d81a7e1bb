"""Explanations replayed: for images of one shape, the same calls of PyTorch without Python between them.

An explanation is some thousand small calls, and Python that decides which. For the same network and
shape it decides the same. So the calls are traced once (`Tracer`), those that the result depends on
make a `Program`, and the next image goes through that. What Python looked at on the way is looked at again:
where anything differs, the image is explained as usual.

There are two programs. One makes the network's own calls, of which the answer is told, as always, by
`howyouseeme.asking`; the other walks back from the nodes that were asked for.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from ..asking import Asked
from ..tape import Dropped, Tape, Value, without_looks
from ..walks import Seen
from .program import Program
from .tracer import Tracer, Unfit

__all__ = ["Replays", "Way"]

#: So many kinds of inputs are kept.
_KEPT = 8

#: So many kinds are remembered as met before.
_MET = 1024

#: So many images more than were replayed may turn out to be made otherwise.
_MISSES = 4


@dataclass(frozen=True)
class Way:
    """How an explanation is made, step by step."""

    record: Callable[[], Tape]
    find: Callable[[Tape], list[Asked]]
    walk: Callable[[Tape, list[Asked]], list[list[Seen]] | None]


#: The nodes that were asked for, and what each input shows of each target.
Told = tuple[list[Asked], list[list[Seen]]]


class Replays:
    """What was traced of a network, and is replayed: from the third image of a kind on.

    >>> replays = Replays(module)
    >>> told = replays(tensors, targets, way)    # None: explain it as usual

    The first is explained as usual, as more may never come; the second is traced, which takes about twice as long.
    `warn`: say so once for a kind of input that can't be replayed.
    """

    def __init__(self, module: nn.Module, *, warn: bool = True) -> None:
        self._module, self._warn = module, warn
        self._kept: dict[Any, _Replay | None] = {}  # None: can't be
        self._met: set[Any] = set()
        self._state: list[Any] = []
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_module": self._module, "_warn": self._warn}  # what was traced is traced again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_module"], warn=state["_warn"])  # type: ignore[misc]

    def __call__(self, tensors: Sequence[Tensor], targets: Sequence[Any], way: Way) -> Told | None:
        """The explanation of classes, replayed or traced; None where neither can be."""
        if any(callable(target) for target in targets) or not all(item.is_cpu for item in tensors):
            return None
        if not self._lock.acquire(blocking=False):  # another thread is at it
            return None
        try:
            return self._replay(tensors, len(targets), way)
        finally:
            self._lock.release()

    def _replay(self, tensors: Sequence[Tensor], targets: int, way: Way) -> Told | None:
        state = _state(self._module)
        if not _same(state, self._state):
            self._kept.clear()
            self._met.clear()
            self._state = state
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        kinds = tuple((item.shape, item.dtype, item.stride()) for item in tensors)
        key = kinds, targets, autocast, torch.get_default_dtype()
        if key not in self._met:
            if len(self._met) >= _MET:
                self._met.clear()
            self._met.add(key)
            return None
        if key not in self._kept:
            try:
                if _has_hooks(self._module):
                    raise Unfit("it has hooks, which a replay would not run")
                self._kept[key], told = _trace(tensors, way)
            except Unfit as reason:
                self._give_up(key, str(reason))
                return None
            while len(self._kept) > _KEPT:
                del self._kept[next(iter(self._kept))]
            return told
        known = self._kept[key]
        if known is None:
            return None
        again = known(tensors, way)
        if known.misses > known.hits + _MISSES:
            self._give_up(key, "what it computes differs from image to image")
        return again

    def _give_up(self, key: Any, reason: str) -> None:
        self._kept[key] = None
        if self._warn:
            warnings.warn(
                f"Explanations of this network are not replayed, but made anew for each image: {reason}.",
                stacklevel=2,
            )


class _Replay:
    """Two programs for one kind of input."""

    def __init__(
        self,
        forward: Program,
        back: Program,
        tape: Tape,
        read: list[tuple[Value, int]],
        asked: Sequence[Asked],
        seen: list[list[Seen]],
        numbers: list[tuple[Tensor, Tensor]],
    ) -> None:
        self._forward, self._back = forward, back
        self._tape = tape  # as it was traced, with nothing in it but what is read
        self._read = read  # values that tell the answer, and where the first program has them
        self._starts = [(asked.start, asked.exclusive) for asked in asked]
        self._seen = seen  # as it was traced, with nothing in it
        self._numbers = numbers  # and what they were
        self.hits = self.misses = 0

    def __call__(self, tensors: Sequence[Tensor], way: Way) -> Told | None:
        told = self._replay(tensors, way)
        self.hits += told is not None
        self.misses += told is None
        return told

    @torch.inference_mode(False)
    @torch.no_grad()
    def _replay(self, tensors: Sequence[Tensor], way: Way) -> Told | None:
        if not all(torch.equal(now, before) for now, before in self._numbers):
            return None
        made = self._forward(tensors)
        if made is None:
            return None
        for value, position in self._read:
            value.refill(made[position])
        try:
            asked = way.find(self._tape)
        except Dropped:  # another part of the network tells this answer
            return None
        if [(item.start, item.exclusive) for item in asked] != self._starts:
            return None
        found = self._back([*made, *(item.nodes for item in asked)])
        if found is None:
            return None
        filled = iter(found)
        return asked, [[seen.filled(filled) for seen in each] for each in self._seen]


def _trace(tensors: Sequence[Tensor], way: Way) -> tuple[_Replay, Told]:
    """An explanation, and what replays it.

    Raises:
        Unfit: something in it can't be replayed.
    """
    tracer = Tracer()
    with torch.inference_mode(False), torch.no_grad(), without_looks(), tracer:
        given = [tracer.enter(item) for item in tensors]
        tape = way.record()
        tracer.cut(made_anew=True)
        asked, read = _find(tape, way)
        nodes = [tracer.enter(item.nodes) for item in asked]
        tracer.cut()
        walked = way.walk(tape, asked)
        if walked is None:
            raise Unfit("the images of a batch share axes with other things")
    tracer.check()
    shown = [tensor for each in walked for seen in each for tensor in seen.tensors]
    wanted = [tracer.slot(tensor) for tensor in shown]
    recorded, telling, back = tracer.parts
    reading = {value: tracer.slot(value.data) for value in read}
    before = recorded.made | set(given)
    if back.reads & (telling.made - set(nodes)):
        raise Unfit("the walk depends on how the answer is told")
    if telling.reads & recorded.made - set(reading.values()):
        raise Unfit("masks or places that the image makes decide what its scores are")
    handed = sorted((back.reads | set(wanted)) & before)
    made = [*handed, *sorted(set(reading.values()) - set(handed))]
    forward = Program(recorded, given, made, tracer)
    walk = Program(back, [*made, *nodes], wanted, tracer)
    places = [(value, made.index(slot)) for value, slot in reading.items()]
    for value in tape.values:
        value.drop()
    empty = [[seen.filled(repeat(torch.empty(0))) for seen in each] for each in walked]
    return _Replay(forward, walk, tape, places, asked, empty, tracer.numbers), (asked, walked)


def _find(tape: Tape, way: Way) -> tuple[list[Asked], list[Value]]:
    """What is asked for on a tape, and the values that it takes to tell.

    Raises:
        Unfit: it takes more than contents of the tape.
    """
    held = {value: None if value.forgotten else value.data for value in tape.values}
    for value in held:
        value.drop()
    calls, read = len(tape.calls), []
    while True:
        try:
            asked = way.find(tape)
            break
        except Dropped as missing:
            value = missing.value
            if held[value] is None:
                raise Unfit("its scores are told by what the network has overwritten") from None
            value.refill(held[value])
            read.append(value)
    if len(tape.calls) > calls:
        raise Unfit("its scores are made of what the network says")
    for value, data in held.items():
        value.refill(data)
    return asked, read


def _state(module: nn.Module) -> list[Any]:
    """What a module is made of, but for the contents of its tensors: a replay holds while it is the same."""
    state: list[Any] = []
    for part in module.modules():
        for name, item in vars(part).items():
            if isinstance(item, dict):  # parameters, buffers, modules, hooks
                if item:
                    state += (name, *item, *item.values())
            else:
                state.append(item)
        state += [item.data_ptr() for item in part._parameters.values() if item is not None]
        state += [item.data_ptr() for item in part._buffers.values() if item is not None]
    return state


def _same(state: list[Any], before: list[Any]) -> bool:
    """Whether two states hold the same objects, or equal numbers and strings."""
    return len(state) == len(before) and all(
        one is other or (isinstance(one, _PLAIN) and type(one) is type(other) and one == other)
        for one, other in zip(state, before, strict=True)
    )


_PLAIN = (bool, int, float, str)


def _has_hooks(module: nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
