"""Calls that stay in place: activations, scales, a change of shape."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from .base import Edges, Link, Shape

__all__ = ["Diagonal"]


class Diagonal(Link):
    """The same place, times a weight: y = weight · x, also where only the shape changes.

    >>> Diagonal((1, 2), (1, 2), torch.tensor([0.0, 0.5])).forward(torch.ones(1, 2))
    tensor([[0.0000, 0.5000]])

    `weight` broadcasts against `in_shape`; None is 1. A function of no arguments is called when the
    weight is first needed, for slopes that cost a tensor of the activation's size; `rising` promises
    that none of them is negative (a tensor that tells is looked at when it is first needed).
    """

    one_to_one = True

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        weight: Tensor | Callable[[], Tensor] | None = None,
        rising: bool | Tensor = False,
    ) -> None:
        super().__init__(in_shape, out_shape)
        self._weight = weight
        self._rising = True if weight is None else rising

    @property
    def rising(self) -> bool:
        self._rising = bool(self._rising)
        return self._rising

    @property
    def pending(self) -> Tensor | None:
        """What `rising` has not looked at yet."""
        return self._rising if isinstance(self._rising, Tensor) else None

    def settle(self, found: bool) -> None:
        """Take what a look at `pending` found."""
        self._rising = found

    @property
    def plain(self) -> bool:
        """Whether the weight is 1."""
        return self._weight is None

    @property
    def weight(self) -> Tensor | None:
        if self._weight is not None and not isinstance(self._weight, Tensor):
            self._weight = self._weight()
        return self._weight

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return (x if weight is None else x * weight).reshape(self.shape_of(x))

    def edges(self, nodes: Tensor) -> Edges:
        weight = self.weight
        if weight is None:
            return Edges(nodes, torch.ones(nodes.shape, device=nodes.device))
        if weight.dim() == 0:
            return Edges(nodes, weight.expand(nodes.shape))
        if weight.dim() == len(self.in_shape) > 1 and weight.numel() == weight.shape[1]:
            inner = prod(self.in_shape[2:])  # one a channel
            channel = torch.div(nodes, inner, rounding_mode="floor") % weight.shape[1]
            return Edges(nodes, weight.reshape(-1)[channel])
        return Edges(nodes, weight.expand(self.in_shape)[torch.unravel_index(nodes, self.in_shape)])

    def back(self, y: Tensor) -> Tensor:
        """y in the shape of the input, if it isn't yet, with no weight."""
        return y.reshape(Diagonal(self.out_shape, self.in_shape).shape_of(y))

    def transposed(self) -> Diagonal:
        if self._weight is None:
            return Diagonal(self.out_shape, self.in_shape)
        return Diagonal(self.out_shape, self.in_shape, self._reshaped, self._rising)

    def _reshaped(self) -> Tensor:
        weight = self.weight
        assert weight is not None
        if self.in_shape == self.out_shape:
            return weight
        return weight.expand(self.in_shape).reshape(self.out_shape)

    def keeps_samples(self, batch: int) -> bool:
        return prod(self.in_shape) % batch == 0

    def positive(self) -> Link | None:
        if self.rising:
            return self
        weight = self.weight
        assert weight is not None
        return Diagonal(self.in_shape, self.out_shape, weight.clamp(min=0))

    def negative(self) -> Link | None:
        if self.rising:
            return None
        weight = self.weight
        assert weight is not None
        return Diagonal(self.in_shape, self.out_shape, weight.clamp(max=0))
