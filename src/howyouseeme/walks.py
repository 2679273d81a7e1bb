"""Walks back from what was asked for: what each input shows of each target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .asking import Asked
from .backtrack import plan
from .likeness import Likeness, likeness
from .methods import Method
from .tape import Tape

__all__ = ["Seen", "walk_back"]


@dataclass(frozen=True, eq=False)
class Seen:
    """What an input [batch, ...] shows of a target: evidence in its shape, and how it is like itself.

    - `strength`, `share`: as in `howyouseeme.methods.base.Walked`;
    - `alike`: how the network describes the places of each picture.
    """

    strength: Tensor
    share: Tensor
    alike: tuple[Likeness | None, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds, in order."""
        features = [one.features for one in self.alike if one is not None]
        return [self.strength, self.share, *features]

    def filled(self, tensors: Iterator[Tensor]) -> Seen:
        """The same with other contents, taken in the order of `tensors`."""
        strength, share = next(tensors), next(tensors)
        alike = (
            None if one is None else replace(one, features=next(tensors)) for one in self.alike
        )
        return Seen(strength, share, tuple(alike))


@torch.no_grad()
def walk_back(
    method: Method, tape: Tape, asked: Sequence[Asked], batch: int
) -> list[list[Seen]] | None:
    """For each target what each of the tape's inputs shows; None if the samples of the batch mix.

    >>> seen = walk_back(Evidence(), tape, [asker.find(tape, 281, iter(()), 1)], 1)
    >>> seen[0][0].strength.shape
    torch.Size([1, 3, 224, 224])
    """
    alike: dict[object, list[int]] = {}  # classes, not the elements of functions
    for i, item in enumerate(asked):
        alike.setdefault((item.start, item.exclusive), []).append(i)
    found: dict[int, list[Seen]] = {}
    for members in alike.values():
        first = asked[members[0]]
        way = plan(tape, first.start, first.exclusive)
        if not way.separable(batch):
            return None
        described = [likeness(way, given) for given in tape.inputs]
        for i, walked in zip(
            members, method.walk_each(way, [asked[i].nodes for i in members]), strict=True
        ):
            found[i] = []
            for given, places in zip(tape.inputs, described, strict=True):
                nothing = torch.zeros_like(given.data)
                strength = walked.strength.get(given, nothing)
                found[i].append(Seen(strength, walked.share.get(given, nothing), places))
    return [found[i] for i in range(len(asked))]
