"""Explanations replayed: for images of one shape, the same calls of PyTorch without Python between them.

An explanation is some thousand small calls, and Python that decides which. For the same network and
shape it decides the same. So the calls are traced once (`tracer`), those that the result depends on
make a `program`, and the next image goes through that. What Python looked at on the way is looked at again:
where anything differs, the image is explained as usual.

There are two programs (`traced`). One makes the network's own calls, of which the answer is told, as always,
by `howyouseeme.asking`; the other walks back from the nodes that were asked for. They hold while the network
is made of the same parts (`state`).
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..rounding import settings
from .graph import makes_graphs
from .state import State, unseen
from .traced import Told, Traced, Way, trace
from .tracer import Unfit

__all__ = ["Replays", "Way", "makes_graphs"]

#: So many kinds of inputs are kept, and remembered as met before.
_KEPT, _MET = 8, 1024

#: So many more images than were replayed may turn out to be made otherwise, or kinds be traced in vain.
_MISSES = 4


class Replays:
    """What was traced of a network, and is replayed, for inputs of the same kind.

    >>> replays = Replays()
    >>> told = replays(module, method, tensors, targets, way)    # None: explain it as usual

    The first ones, `usual` many, are explained as usual, as more may never come. The next is traced, which takes
    several times as long, and the one after that is explained both ways, to see that they agree. `warn`: say so
    once where it can't be.
    """

    def __init__(self, *, usual: int = 1, warn: bool = True) -> None:
        self._usual, self._warn, self._warned = usual, warn, False
        self._kept: dict[Hashable, Traced | None] = {}  # the last used last; None: can't be
        self._met: Counter[Hashable] = Counter()
        self._state: State | None = None
        self._hits = self._lost = 0  # images that were replayed, and traces that were let go of
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"usual": self._usual, "warn": self._warn}  # what was traced is traced again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(
        self,
        module: nn.Module,
        method: Hashable,
        tensors: Sequence[Tensor],
        targets: Sequence[Any],
        way: Way,
    ) -> Told | None:
        """The explanation of classes, replayed or traced; None where neither can be."""
        device = tensors[0].device
        elsewhere = any(item.device != device for item in tensors)
        if any(map(callable, targets)) or elsewhere or device.type not in {"cpu", "cuda"}:
            return None
        if not self._lock.acquire(blocking=False):  # another thread is at it
            return None
        try:
            key = (
                tuple((item.shape, item.dtype, item.stride(), item.device) for item in tensors),
                *(len(targets), method, torch.get_default_dtype()),
                *_settings(device),
            )
            if (known := self._kept.get(key)) is not None:
                known.begin(tensors)  # while the network is looked at
            self._look_at(module)
            return self._explain(key, module, tensors, way)
        finally:
            self._lock.release()

    def _look_at(self, module: nn.Module) -> None:
        """Forget all if the network is no longer what it was."""
        if self._state is not None and self._state.of is module and self._state.holds():
            return
        self._lost += len(self._kept)
        for known in self._kept.values():
            if known is not None:
                known.turns.finish()  # of what was begun
        self._kept.clear()
        self._met.clear()
        self._state = State(module)

    def _explain(
        self, key: Hashable, module: nn.Module, tensors: Sequence[Tensor], way: Way
    ) -> Told | None:
        if self._met[key] < self._usual:
            if len(self._met) > _MET:
                self._met.clear()
            self._met[key] += 1
            return None
        known = self._kept.get(key)
        if known is not None and not known.holds():
            known.turns.finish()
            self._lost += 1
            del self._kept[key]
        if key not in self._kept:
            return self._trace(key, module, tensors, way)
        if known is None:
            return None
        self._kept[key] = self._kept.pop(key)
        told = known(tensors, way)
        if told is not None and known.hits == 1 and not known.agrees(told, way):
            self._give_up(key, "contents go ways that no call tells")
            return None
        self._hits += told is not None
        if known.misses > known.hits + _MISSES:
            self._give_up(key, "what it computes differs from image to image")
        return told

    def _trace(
        self, key: Hashable, module: nn.Module, tensors: Sequence[Tensor], way: Way
    ) -> Told | None:
        reason, told = unseen(module), None
        if self._lost > self._hits + _KEPT:
            reason = "the network, or the shape of its input, changes too often"
        if reason is None:
            try:
                self._kept[key], told = trace(tensors, way)
            except Unfit as unfit:
                reason = str(unfit)
        if reason is not None:
            self._give_up(key, reason)
        if len(self._kept) > _KEPT:
            oldest = next(iter(self._kept))
            self._lost += self._kept.pop(oldest) is not None
            del self._met[oldest]
        return told

    def _give_up(self, key: Hashable, reason: str) -> None:
        self._kept[key] = None
        if self._warn and not self._warned:
            self._warned = True
            warnings.warn(
                f"Explanations of this network are not replayed, but made anew for each image: {reason}.",
                stacklevel=2,
            )


def _settings(device: torch.device) -> tuple[Hashable, ...]:
    """What PyTorch is told that changes its calls, or how they are made."""
    autocast = [
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", device.type)
    ]
    chosen = torch.backends.cudnn
    exact = torch.are_deterministic_algorithms_enabled()
    return (*autocast, *settings(), exact, chosen.enabled, chosen.benchmark, chosen.deterministic)
