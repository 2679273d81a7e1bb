"""What a link is, and what it can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

__all__ = ["Edges", "Link", "Shape"]

Shape = Sequence[int]


@dataclass(frozen=True, slots=True)
class Edges:
    """Rows of a link for n elements of its output.

    >>> edges = Matrix((1, 3), (1, 2), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).edges(torch.tensor([1]))
    >>> edges.index, edges.weight
    (tensor([[0, 1, 2]]), tensor([[4., 5., 6.]]))

    `index` and `weight` have the shape [n, channels, positions] for maps over space, [n, inputs]
    for a matrix, and [n] where each output has one input. Where a row has fewer edges than others (at
    the border of a convolution), the missing ones have index -1 and weight 0.
    """

    index: Tensor
    weight: Tensor


class Link(ABC):
    """A linear map J from a tensor of `in_shape` to one of `out_shape`.

    >>> link = Matrix((1, 3), (1, 2), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    >>> link.forward(torch.ones(1, 3)), link.transposed().forward(torch.ones(1, 2))
    (tensor([[ 6., 15.]]), tensor([[5., 7., 9.]]))

    Elements go by their flat, row-major index. How to write one: docs/writing-a-rule.md.
    """

    #: Each output element has at most one input element.
    one_to_one = False

    def __init__(self, in_shape: Shape, out_shape: Shape) -> None:
        self.in_shape = torch.Size(in_shape)
        self.out_shape = torch.Size(out_shape)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """J x: from `in_shape` to `out_shape`.

        Where the link `stacks`, x may be several such tensors one after the other, and so is J x.
        """

    @abstractmethod
    def edges(self, nodes: Tensor) -> Edges:
        """The rows of J at `nodes`, flat indices [n] into the output."""

    @abstractmethod
    def transposed(self) -> Link:
        """The link whose map is Jᵀ."""

    @abstractmethod
    def positive(self) -> Link | None:
        """The link of the positive entries of J, or None if there are none."""

    @abstractmethod
    def negative(self) -> Link | None:
        """The link of the negative entries of J, or None if there are none."""

    def fan_in(self) -> int:
        """At most so many edges leave one element of the output."""
        return 1

    def keeps_samples(self, batch: int) -> bool:
        """True if no edge leads from one of `batch` equal parts of the tensors to another."""
        return prod(self.in_shape[:1]) % batch == 0 and prod(self.out_shape[:1]) % batch == 0

    @property
    def stacks(self) -> bool:
        """Whether input and output are a single sample, so that several fit on their first axis."""
        return self.in_shape[:1] == self.out_shape[:1] == (1,)

    def _is_stack(self, x: Tensor) -> bool:
        return self.stacks and len(x) > 1

    def shape_of(self, x: Tensor) -> torch.Size:
        """The shape of J x, which has as many samples as x."""
        return torch.Size((len(x), *self.out_shape[1:])) if self._is_stack(x) else self.out_shape

    def _one_by_one(self, stack: Tensor) -> Tensor:
        return torch.cat([self.forward(x) for x in stack.split(1)])
