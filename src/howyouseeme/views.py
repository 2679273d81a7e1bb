"""What evidence shows over the model's input: where it is strongest, and what maps are drawn of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from .likeness import Likeness
from .maps import (
    gaussian_blur,
    levels,
    precise,
    scale_each_to_one,
    strongest_elements,
    strongest_points,
)
from .methods import Method

__all__ = ["Views"]

#: So many points are kept of an image; evidence beyond them shows in the maps, not in the points.
MOST_POINTS = 2000

#: The power of the evidence, beside that of likeness, 1, in levels of saliency.
_EVIDENCE = 0.8

#: What can be made ahead; all else is made of these.
_TENSORS = ("counted", "levels", "attention", "saliency", "_ranked")


class Views:
    """What is seen of the evidence of a batch of images, each made when it is asked for.

    >>> views = Views(evidence, alike, method)      # evidence [batch, height, width]
    >>> views.saliency[0]                           # [height, width], 0..1
    >>> views[2:4].levels

    All maps are over the model's input, where the evidence lies, one after the other along the batch.
    """

    def __init__(self, evidence: Tensor, alike: Sequence[Likeness | None], method: Method) -> None:
        self.evidence, self.alike, self.method = evidence, alike, method

    def __getitem__(self, some: slice) -> Views:
        part = Views(self.evidence[some], self.alike[some], self.method)
        known = {name: item for name, item in vars(self).items() if name not in vars(part)}
        vars(part).update(
            (name, tuple(one[some] for one in item) if name == "_ranked" else item[some])
            for name, item in known.items()
        )
        return part

    def made(self) -> Views:
        """These, with all made that can be made ahead."""
        for name in _TENSORS:
            getattr(self, name)
        return self

    @property
    def tensors(self) -> list[Tensor]:
        """All that can be made ahead, in order."""
        made = [getattr(self, name) for name in _TENSORS]
        return [*made[:-1], *made[-1]]

    def filled(
        self, evidence: Tensor, alike: Sequence[Likeness | None], tensors: Iterator[Tensor]
    ) -> Views:
        """The same of other evidence, with what was made ahead, taken in the order of `tensors`."""
        other = Views(evidence, alike, self.method)
        *made, value, place = (next(tensors) for _ in self.tensors)
        vars(other).update(zip(_TENSORS, [*made, (value, place)], strict=True))
        return other

    @cached_property
    def around(self) -> Tensor:
        """The evidence for the answer, blurred: [batch, ...] float64."""
        positive = precise(self.evidence).clamp(min=0)
        sigma = self.method.blur * min(positive.shape[1:])
        return gaussian_blur(positive, sigma, first=1)

    @cached_property
    def counted(self) -> Tensor:
        """What each pixel counts with, its own evidence for the answer and that of its surroundings: as `around`."""
        own = precise(self.evidence).clamp(min=0)
        return own + self.method.surroundings * self.around

    @cached_property
    def levels(self) -> Tensor:
        """For each pixel the share of what is `counted` in pixels with no more of it: [batch, ...] float64, 0..1."""
        return _stacked([levels(item) for item in self.counted], self.counted)

    @cached_property
    def attention(self) -> Tensor:
        """[batch, ...] float32, 0..1: the evidence for the answer, blurred."""
        return scale_each_to_one(self.around).float()

    @cached_property
    def saliency(self) -> Tensor:
        """[batch, ...] float32, 0..1: which pixels answer for it, level by level."""
        maps = list(self.levels)
        for i, alike in enumerate(self.alike):
            if self.method.likeness and alike is not None:
                maps[i] = levels(self.counted[i] ** _EVIDENCE * alike.reach(maps[i]))
        return scale_each_to_one(_stacked(maps, self.counted)).float()

    @cached_property
    def strongest(self) -> list[tuple[Tensor, Tensor]]:
        """Of each image the strongest pixels, strongest first, on the CPU: (place [n, axes], value [n])."""
        if not self.evidence.is_cuda and "_ranked" not in vars(self):
            return [strongest_points(item, MOST_POINTS) for item in self.evidence.cpu()]
        values, places = (item.cpu() for item in self._ranked)  # waits for the device but once
        shape, found = self.evidence.shape[1:], []
        for value, place in zip(values, places, strict=True):
            count = int((value > 0).sum())
            found.append((torch.stack(torch.unravel_index(place[:count], shape), 1), value[:count]))
        return found

    @cached_property
    def _ranked(self) -> tuple[Tensor, Tensor]:
        return strongest_elements(self.evidence, MOST_POINTS)


def _stacked(maps: list[Tensor], like: Tensor) -> Tensor:
    """Maps one after the other; of no image none, `like` others."""
    return torch.stack(maps) if maps else like
