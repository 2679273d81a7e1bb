"""Walks back from what was asked for: what each input shows of each target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import backtrack
from .asking import Asked
from .errors import ModelError
from .likeness import Likeness, likeness
from .methods import Method
from .methods.base import Walked
from .tape import Tape, Value
from .views import Views

__all__ = ["Seen", "walk_back"]


@dataclass(frozen=True, eq=False)
class Seen:
    """What an input [batch, ...] shows of a target, and how it is like itself.

    - `evidence`: at its places, summed over channels [batch, ...];
    - `share`: the same as a share of the evidence that the walk set out with, above zero;
    - `alike`: how the network describes the places of each picture;
    - `views`: what is drawn of the evidence, where that was made ahead.
    """

    evidence: Tensor
    share: Tensor
    alike: tuple[Likeness | None, ...]
    views: Views | None = None

    @classmethod
    def of(
        cls, method: Method, walked: Walked, given: Value, alike: tuple[Likeness | None, ...]
    ) -> Seen:
        """What a walk found at an input.

        Raises:
            ModelError: the evidence overflows.
        """
        nothing = torch.zeros_like(given.data)
        strength = walked.strength.get(given, nothing)
        share = walked.share.get(given, nothing).clamp(min=0)
        if not bool(torch.isfinite(strength).all()):
            raise ModelError(
                "The evidence overflows: the model's activations or weights are too large or too "
                "small for their type; try it in float64, model.double()."
            )
        if strength.dim() > 2:  # places, and channels in each
            strength, share = method.clean(strength.sum(1)), share.sum(1)
        elif strength.dim() == 1:  # a single number for each sample
            strength, share = strength[:, None], share[:, None]
        return cls(strength, share, alike)

    def viewed(self, method: Method) -> Seen:
        """The same with what is drawn of it, made now."""
        return replace(self, views=Views(self.evidence, self.alike, method).made())

    @property
    def found(self) -> list[Tensor]:
        """All that was found, in order."""
        features = [one.features for one in self.alike if one is not None]
        return [self.evidence, self.share, *features]

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds, in order."""
        return self.found + ([] if self.views is None else self.views.tensors)

    def filled(self, tensors: Iterator[Tensor]) -> Seen:
        """The same with other contents, taken in the order of `tensors`."""
        evidence, share = next(tensors), next(tensors)
        alike = tuple(
            None if one is None else replace(one, features=next(tensors)) for one in self.alike
        )
        views = None if self.views is None else self.views.filled(evidence, alike, tensors)
        return Seen(evidence, share, alike, views)


@torch.no_grad()
def walk_back(
    method: Method, tape: Tape, asked: Sequence[Asked], batch: int, spend: bool = False
) -> list[list[Seen]] | None:
    """For each target what each of the tape's inputs shows; None if the samples of the batch mix.

    To `spend` the tape is to let go of activations on the way, which nobody may ask for afterwards.

    >>> seen = walk_back(Evidence(), tape, [asker.find(tape, 281, iter(()), 1)], 1)
    >>> seen[0][0].evidence.shape
    torch.Size([1, 224, 224])
    """
    alike: dict[object, list[int]] = {}  # classes, not the elements of functions
    for i, item in enumerate(asked):
        alike.setdefault((item.start, item.exclusive), []).append(i)
    found: dict[int, list[Seen]] = {}
    for members in alike.values():
        first = asked[members[0]]
        plan = backtrack.plan(tape, first.start, first.exclusive)
        if not plan.separable(batch):
            return None
        plan.spends = spend and len(alike) == 1
        described = [likeness(plan, given) for given in tape.inputs]
        for i, walked in zip(
            members, method.walk_each(plan, [asked[i].nodes for i in members]), strict=True
        ):
            found[i] = [
                Seen.of(method, walked, given, places)
                for given, places in zip(tape.inputs, described, strict=True)
            ]
    return [found[i] for i in range(len(asked))]
