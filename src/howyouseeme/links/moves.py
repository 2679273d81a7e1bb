"""Calls that move elements: selections, paddings, permutations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..tape import at_hand
from .base import Edges, Link, Shape

__all__ = ["Moves", "Pad", "Permutation", "Selection", "Spread"]


class Moves(Link):
    """Each output element is one input element or none, times a weight: what a link that moves elements is.

    >>> isinstance(Permutation((1, 2, 3), (1, 3, 2), (0, 2, 1)), Moves)
    True
    """

    one_to_one = True
    #: One for each output [outputs]; None is 1 for all.
    weight: Tensor | None = None

    @abstractmethod
    def ended(self, y: Tensor) -> Tensor:
        """What of a tensor of the output's shape lies where nothing was selected; 0 elsewhere."""

    def unweighted(self) -> Moves:
        """The same, each weight being 1."""
        return self

    def positive(self) -> Link | None:
        return self

    def negative(self) -> Link | None:
        return None


class Selection(Moves):
    """Each output element is the input element at `index` [outputs], times a weight.

    >>> Selection((1, 4), (1, 3), torch.tensor([3, 0, -1])).forward(torch.tensor([[5.0, 6.0, 7.0, 8.0]]))
    tensor([[8., 5., 0.]])

    An index of -1 selects nothing: the output is 0 there. `weight` [outputs] may be None, for 1.

    Where the contents of a window decide, as in max-pooling, `centres` tells for some axes, which stay
    in their order, where on the input's axis the centre of each output's window lies.
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        index: Tensor,
        weight: Tensor | None = None,
        centres: dict[int, Tensor] | None = None,
    ) -> None:
        super().__init__(in_shape, out_shape)
        self.index = index.reshape(-1)
        self.weight = None if weight is None else weight.reshape(-1)
        self.centres = centres

    def forward(self, x: Tensor) -> Tensor:
        if self._is_stack(x):
            return self._one_by_one(x)
        chosen = x.reshape(-1)[self.index.clamp(min=0)].masked_fill(self.index < 0, 0)
        return (chosen if self.weight is None else chosen * self.weight).reshape(self.out_shape)

    def edges(self, nodes: Tensor) -> Edges:
        index = self.index[nodes]
        weight = (index >= 0).float()
        if self.weight is not None:
            weight = weight * self.weight[nodes]
        return Edges(index, weight)

    def transposed(self) -> Link:
        return Spread(self)

    def unweighted(self) -> Selection:
        return self if self.weight is None else Selection(self.in_shape, self.out_shape, self.index)

    def ended(self, y: Tensor) -> Tensor:
        return y.masked_fill((self.index >= 0).reshape(self.out_shape), 0)

    def keeps_samples(self, batch: int) -> bool:
        if prod(self.in_shape) % batch or prod(self.out_shape) % batch:
            return False
        part = torch.arange(batch, device=self.index.device)[:, None]
        source = torch.div(self.index, prod(self.in_shape) // batch, rounding_mode="floor")
        return bool(
            ((source.reshape(batch, -1) == part) | (self.index < 0).reshape(batch, -1)).all()
        )

    def _with(self, weight: Tensor) -> Selection:
        return Selection(self.in_shape, self.out_shape, self.index, weight)

    def positive(self) -> Link | None:
        return self if self.weight is None else self._with(self.weight.clamp(min=0))

    def negative(self) -> Link | None:
        return None if self.weight is None else self._with(self.weight.clamp(max=0))


class Pad(Moves):
    """A tensor with constants around it, or, where `margins` are negative, without its edges.

    >>> Pad((1, 2), (1, 4), (1, 1)).forward(torch.ones(1, 2))
    tensor([[0., 1., 1., 0.]])

    `margins` are those of `torch.nn.functional.pad`: for the last axis before and after, then for the
    one before it.
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, margins: Sequence[int]) -> None:
        super().__init__(in_shape, out_shape)
        self.margins = tuple(margins)

    @property
    def axes(self) -> list[tuple[int, int, int]]:
        """Each axis, last first: its size in the input and in the output, and the margin before it.

        Neighbours without margins count as one.
        """
        margins = [*self.margins, *[0] * (2 * len(self.in_shape) - len(self.margins))]
        axes: list[tuple[int, int, int]] = []
        for size, whole, before, after in zip(
            reversed(self.in_shape),
            reversed(self.out_shape),
            margins[::2],
            margins[1::2],
            strict=True,
        ):
            if axes and not (before or after or axes[-1][2]) and axes[-1][0] == axes[-1][1]:
                axes[-1] = axes[-1][0] * size, axes[-1][1] * whole, 0
            else:
                axes.append((size, whole, before))
        return axes

    def _padded(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, self.margins)

    def forward(self, x: Tensor) -> Tensor:
        return self._padded(x)

    def ended(self, y: Tensor) -> Tensor:
        return y - self.forward(self.transposed().forward(y))

    @property
    def stacks(self) -> bool:
        return not any(self._first) and super().stacks

    @property
    def _first(self) -> tuple[int, ...]:
        """The margins of the first axis."""
        return self.margins[2 * len(self.in_shape) - 2 :]

    def transposed(self) -> Pad:
        return Pad(self.out_shape, self.in_shape, [-margin for margin in self.margins])

    def edges(self, nodes: Tensor) -> Edges:
        index, inside = torch.zeros_like(nodes), torch.ones_like(nodes, dtype=torch.bool)
        behind, rest = 1, nodes
        for size, whole, before in self.axes:
            at = rest % whole - before
            rest = torch.div(rest, whole, rounding_mode="floor")
            if size != whole or before:
                inside &= (at >= 0) & (at < size)
            index += at * behind
            behind *= size
        return Edges(index.masked_fill(~inside, -1), inside.float())

    def keeps_samples(self, batch: int) -> bool:
        return not any(self._first) and super().keeps_samples(batch)


class Permutation(Moves):
    """The same elements with the axes in another order: axis i of the output is axis `axes[i]` of the input.

    >>> Permutation((1, 2, 3), (1, 3, 2), (0, 2, 1)).forward(torch.rand(1, 2, 3)).shape
    torch.Size([1, 3, 2])
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, axes: Sequence[int]) -> None:
        super().__init__(in_shape, out_shape)
        self.axes = tuple(axes)

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.axes)

    def ended(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y)

    @property
    def stacks(self) -> bool:
        return self.axes[:1] == (0,) and super().stacks

    def transposed(self) -> Permutation:
        back = [self.axes.index(axis) for axis in range(len(self.axes))]
        return Permutation(self.out_shape, self.in_shape, back)

    def edges(self, nodes: Tensor) -> Edges:
        index, rest = torch.zeros_like(nodes), nodes
        for axis, size in zip(reversed(self.axes), reversed(self.out_shape), strict=True):
            index += rest % size * prod(self.in_shape[axis + 1 :])
            rest = torch.div(rest, size, rounding_mode="floor")
        return Edges(index, torch.ones(nodes.shape, device=nodes.device))

    def keeps_samples(self, batch: int) -> bool:
        stays = not self.axes or self.axes[0] == 0
        return stays and super().keeps_samples(batch)


class Spread(Link):
    """The transpose of a `Selection`: each input element is added up over the places it went to.

    >>> Spread(Selection((1, 4), (1, 3), torch.tensor([3, 0, 3]))).forward(torch.tensor([[1.0, 2.0, 4.0]]))
    tensor([[2., 0., 0., 5.]])
    """

    def __init__(self, selection: Selection) -> None:
        super().__init__(selection.out_shape, selection.in_shape)
        self.selection = selection
        self._ordered: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._is_stack(x):
            return self._one_by_one(x)
        index, x = self.selection.index, x.reshape(-1)
        if self.selection.weight is not None:
            x = x * self.selection.weight
        total = x.new_zeros(prod(self.out_shape))
        if not at_hand(index) and len(total):
            index, x = index.clamp(min=0), x.masked_fill(index < 0, 0)
        elif len(index) and int(index.min()) < 0:
            used = index >= 0
            index, x = index[used], x[used]
        return total.index_add_(0, index, x).reshape(self.out_shape)

    def _order(self) -> tuple[Tensor, Tensor]:
        if self._ordered is None:
            ordered, places = torch.sort(self.selection.index, stable=True)
            self._ordered = ordered, places
        return self._ordered

    def keeps_samples(self, batch: int) -> bool:
        return self.selection.keeps_samples(batch)

    def fan_in(self) -> int:
        ordered, _ = self._order()
        counts = torch.unique_consecutive(ordered[ordered >= 0], return_counts=True)[1]
        return int(counts.max()) if counts.numel() else 1

    def edges(self, nodes: Tensor) -> Edges:
        ordered, places = self._order()
        first = torch.searchsorted(ordered, nodes.contiguous())
        count = torch.searchsorted(ordered, nodes.contiguous(), right=True) - first
        slots = torch.arange(max(int(count.max()), 1) if count.numel() else 1, device=nodes.device)
        valid = slots < count[:, None]
        at = places[(first[:, None] + slots).masked_fill(~valid, 0)]
        weight = valid.float()
        if self.selection.weight is not None:
            weight = weight * self.selection.weight[at]
        return Edges(at.masked_fill(~valid, -1), weight)

    def transposed(self) -> Selection:
        return self.selection

    def positive(self) -> Link | None:
        part = self.selection.positive()
        return None if part is None else part.transposed()

    def negative(self) -> Link | None:
        part = self.selection.negative()
        return None if part is None else part.transposed()
