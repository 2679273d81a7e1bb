"""An explanation that was traced: two programs, and how the answer is told between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, repeat

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..asking import Asked
from ..tape import Dropped, Tape, Value, without_looks
from ..walks import Seen
from .graph import Turns
from .program import Program
from .tracer import Tracer, Unfit

__all__ = ["Told", "Traced", "Way", "trace"]


@dataclass(frozen=True)
class Way:
    """How an explanation is made, step by step."""

    record: Callable[[], Tape]
    find: Callable[[Tape], list[Asked]]
    walk: Callable[[Tape, list[Asked]], list[list[Seen]] | None]


#: The nodes that were asked for, and what each input shows of each target.
Told = tuple[list[Asked], list[list[Seen]]]


@dataclass(eq=False)
class Traced:
    """What replays an explanation.

    - `handed`: how many of what the `forward` program makes the walk `back` is given;
    - `tape`: as it was traced, with nothing in it but what is `read` to tell the answer: values, and where the
      `forward` program has them;
    - `starts`: where the walk `back` set out; `seen`: what came of it, with nothing in it;
    - `numbers`: whole ones that are the network's, and what they were;
    - `begun`: what the `forward` program has made ahead of the next call.
    """

    forward: Program
    back: Program
    handed: int
    tape: Tape
    read: list[tuple[Value, int]]
    starts: list[tuple[Value, bool]]
    seen: list[list[Seen]]
    numbers: list[tuple[Tensor, Tensor]]
    turns: Turns
    begun: list[Tensor] | None = None
    hits: int = 0
    misses: int = 0

    def holds(self) -> bool:
        """Whether the network's whole numbers, such as places, are what they were."""
        return all(torch.equal(now, before) for now, before in self.numbers)

    def begin(self, tensors: Sequence[Tensor]) -> None:
        """Start with other contents what goes on by itself: the next call takes it up.

        Not where whole numbers of the network may have become places that there aren't, which breaks a GPU.
        """
        if self.forward.lasts and not self.numbers:
            with _as_traced(tensors[0].device.type), self.turns:
                self.begun = self.forward.started(tensors)

    def __call__(self, tensors: Sequence[Tensor], way: Way) -> Told | None:
        """The explanation of other contents; None where something is decided otherwise on them."""
        with _as_traced(tensors[0].device.type), self.turns:
            told = self._replay(tensors, way)
        self.hits += told is not None
        self.misses += told is None
        return told

    def _replay(self, tensors: Sequence[Tensor], way: Way) -> Told | None:
        started, self.begun = self.begun, None
        made = self.forward.looked_at(started or self.forward.started(tensors))
        if made is None:
            return None
        for value, position in self.read:
            value.refill(made[position].clone())  # as the next replay may write over it
        calls = len(self.tape.calls)
        try:
            asked = way.find(self.tape)
        except Dropped:  # another part of the network tells this answer
            return None
        finally:
            del self.tape.calls[calls:]
        if [(item.start, item.exclusive) for item in asked] != self.starts:
            return None
        steady = self.handed if self.forward.lasts else 0
        try:
            found = self.back([*made[: self.handed], *(item.nodes for item in asked)], steady)
        except Dropped:  # a walk chose nodes by what was not needed when it was traced
            return None
        if found is None:
            return None
        filled = (
            (tensor.clone() for tensor in found)
            if self.forward.lasts or self.back.lasts
            else iter(found)
        )
        return asked, [[seen.filled(filled) for seen in each] for each in self.seen]

    def agrees(self, replayed: Told, way: Way) -> bool:
        """Whether the explanation is what it is as usual, up to rounding."""
        tape = way.record()
        asked = way.find(tape)
        walked = way.walk(tape, asked)
        if walked is None or [one.classes for one in asked] != [one.classes for one in replayed[0]]:
            return False
        return all(
            usual.shape == again.shape and _close(usual, again)
            for one, other in zip(chain(*walked), chain(*replayed[1]), strict=True)
            for usual, again in zip(one.found, other.found, strict=True)
        )


def _tensors(seen: list[list[Seen]]) -> list[Tensor]:
    return [tensor for one in chain(*seen) for tensor in one.tensors]


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.numel():
        return True
    most = one.abs().max()
    exact = max(torch.finfo(one.dtype).eps, torch.finfo(torch.float32).eps)
    return bool(((one - other).abs().max() <= 1000 * exact * most) | (most == 0) | ~most.isfinite())


@contextmanager
def _as_traced(device: str) -> Iterator[None]:
    """As calls were made when they were noted: below autocast, which had its say already."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast(device, enabled=False),
    ):
        yield


@contextmanager
def _as_usual() -> Iterator[None]:
    """As an explanation is made, but nothing that autocast keeps from before is taken for constant."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.inference_mode(False), torch.no_grad(), without_looks():
            yield
    finally:
        torch.set_autocast_cache_enabled(kept)


def trace(tensors: Sequence[Tensor], way: Way) -> tuple[Traced, Told]:
    """An explanation, and what replays it.

    Raises:
        Unfit: something in it can't be replayed.
    """
    tracer = Tracer()
    try:
        with _as_usual(), tracer:
            given = [tracer.enter(item) for item in tensors]
            tape = way.record()
            tracer.cut(made_anew=True)
            asked, read = _find(tape, way)
            nodes = [tracer.enter(item.nodes) for item in asked]
            tracer.cut()
            walked = way.walk(tape, asked)
    except Exception:
        tracer.check()  # the network may have made something else of it
        raise
    tracer.check()
    if walked is None:
        raise Unfit("the images of a batch share axes with other things")
    recorded, telling, back = tracer.parts
    reading = {value: tracer.slot(value.data) for value in read}
    if back.reads & (telling.made - set(nodes)):
        raise Unfit("the walk depends on how the answer is told")
    if telling.reads & recorded.made - set(reading.values()):
        raise Unfit("masks or places that the image makes decide what its scores are")
    wanted = [tracer.slot(tensor) for tensor in _tensors(walked)]
    before = recorded.made | set(given)
    handed = sorted(((back.reads | set(wanted)) & before) - tracer.constants.keys())
    made = [*handed, *sorted(set(reading.values()) - set(handed))]
    traced = Traced(
        Program(recorded, given, made, tracer),
        Program(back, [*handed, *nodes], wanted, tracer),
        len(handed),
        tape,
        [(value, made.index(slot)) for value, slot in reading.items()],
        [(item.start, item.exclusive) for item in asked],
        [[seen.filled(repeat(torch.empty(0))) for seen in each] for each in walked],
        tracer.numbers,
        Turns(tracer.device),
    )
    _empty(tape, tracer, recorded.made)
    return traced, (asked, walked)


def _find(tape: Tape, way: Way) -> tuple[list[Asked], list[Value]]:
    """What is asked for on a tape, and the values that it takes to tell.

    Raises:
        Unfit: it takes more than contents of the tape.
    """
    held = {value: None if value.forgotten else value.data for value in tape.values}
    for each in held:
        each.drop()
    calls = len(tape.calls)
    read: list[Value] = []
    while True:
        try:
            asked = way.find(tape)
            break
        except Dropped as missing:
            if (value := missing.value) is None or held[value] is None:
                raise Unfit("its scores are told by what the network has overwritten") from None
            value.refill(held[value])
            read.append(value)
    if len(tape.calls) > calls:
        raise Unfit("its scores are made of what the network says")
    for each, data in held.items():
        each.refill(data)
    return asked, read


class _Gone:
    """What the traced image made, in place of which a replay would have something else."""

    def __getattr__(self, name: str) -> object:
        raise Dropped(None)


def _empty(tape: Tape, tracer: Tracer, made: set[int]) -> None:
    """Let go of all that is the traced image's."""
    for value in tape.values:
        value.drop()
    gone = _Gone()
    for call in tape.calls:
        call.args, call.kwargs = pytree.tree_map(
            lambda leaf: gone if isinstance(leaf, Tensor) and tracer.known(leaf) in made else leaf,
            (call.args, call.kwargs),
        )
