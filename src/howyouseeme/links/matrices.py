"""Calls that are products of matrices: dense, along axes, batched, sparse."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from .base import Edges, Link, Shape

__all__ = ["BatchedMatrix", "Matrix", "Separable", "Sparse", "sparse"]


class Matrix(Link):
    """y[..., o] = Σᵢ weight[o, i] · x[..., i], over the last axis.

    >>> Matrix((1, 3), (1, 2), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).forward(torch.ones(1, 3))
    tensor([[ 6., 15.]])

    `weight` is [outputs, inputs].
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, weight: Tensor) -> None:
        super().__init__(in_shape, out_shape)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T).reshape(self.shape_of(x))

    def edges(self, nodes: Tensor) -> Edges:
        outputs, inputs = self.weight.shape
        row = torch.div(nodes, outputs, rounding_mode="floor")
        index = row[:, None] * inputs + torch.arange(inputs, device=nodes.device)
        return Edges(index, self.weight[nodes % outputs])

    @property
    def stacks(self) -> bool:
        return len(self.in_shape) > 1 and super().stacks

    def transposed(self) -> Matrix:
        return Matrix(self.out_shape, self.in_shape, self.weight.T)

    def positive(self) -> Matrix:
        return Matrix(self.in_shape, self.out_shape, self.weight.clamp(min=0))

    def negative(self) -> Matrix:
        return Matrix(self.in_shape, self.out_shape, self.weight.clamp(max=0))

    def magnitude(self) -> Matrix:
        """The link of the entries' absolute values."""
        return Matrix(self.in_shape, self.out_shape, self.weight.abs())

    def keeps_samples(self, batch: int) -> bool:
        return prod(self.in_shape[:-1]) % batch == 0

    def fan_in(self) -> int:
        return self.weight.shape[1]


class Separable(Link):
    """One small matrix along each of some axes: average pooling, means, sums, interpolation.

    >>> mean = torch.full((1, 4), 0.25)
    >>> Separable((1, 3, 4, 4), (1, 3, 1, 1), {2: mean, 3: mean}).forward(torch.ones(1, 3, 4, 4)).shape
    torch.Size([1, 3, 1, 1])

    `matrices` maps an axis of the input to a matrix [out, in] without negative entries.
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, matrices: dict[int, Tensor]) -> None:
        super().__init__(in_shape, out_shape)
        self.matrices = matrices

    @property
    def _kept_shape(self) -> list[int]:
        """The output's shape with every reduced axis kept."""
        return [
            self.matrices[axis].shape[0] if axis in self.matrices else size
            for axis, size in enumerate(self._expanded_shape)
        ]

    @property
    def _expanded_shape(self) -> list[int]:
        """The input's shape with every reduced axis kept, which `transposed` may have dropped."""
        if len(self.in_shape) >= len(self.out_shape):
            return list(self.in_shape)
        return [
            self.matrices[axis].shape[1] if axis in self.matrices else size
            for axis, size in enumerate(self.out_shape)
        ]

    def forward(self, x: Tensor) -> Tensor:
        shape = self._expanded_shape
        y = x.reshape(len(x), *shape[1:]) if self._is_stack(x) else x.reshape(shape)
        for axis, matrix in self.matrices.items():
            y = torch.tensordot(y, matrix.to(y.dtype), dims=([axis], [1])).movedim(-1, axis)
        return y.reshape(self.shape_of(x))

    def edges(self, nodes: Tensor) -> Edges:
        place = torch.unravel_index(nodes, self._kept_shape)
        index = nodes.new_zeros(len(nodes), 1)
        weight = torch.ones(len(nodes), 1, device=nodes.device)
        for axis, size in enumerate(self._expanded_shape):
            at, factor = place[axis][:, None], None
            if axis in self.matrices:
                taps, values = _taps(self.matrices[axis])
                at, factor = taps[place[axis]], values[place[axis]]
            index = (index[:, :, None] * size + at[:, None, :]).flatten(1)
            if factor is not None:
                weight = (weight[:, :, None] * factor[:, None, :]).flatten(1)
        return Edges(index.masked_fill(weight == 0, -1)[:, None], weight[:, None])

    def transposed(self) -> Separable:
        flipped = {axis: matrix.T for axis, matrix in self.matrices.items()}
        return Separable(self.out_shape, self.in_shape, flipped)

    def positive(self) -> Link:
        return self

    def negative(self) -> None:
        return None

    def keeps_samples(self, batch: int) -> bool:
        return 0 not in self.matrices and super().keeps_samples(batch)

    @property
    def stacks(self) -> bool:
        return 0 not in self.matrices and super().stacks

    def fan_in(self) -> int:
        return prod(int((m != 0).sum(1).max()) for m in self.matrices.values())


class BatchedMatrix(Link):
    """y[b, p, o, s] = Σᵢ weight[b, o, i] · x[b, p, i, s]: attention, and other products of matrices.

    >>> link = BatchedMatrix((8, 5, 16), (8, 7, 16), torch.rand(8, 7, 5), columns=16)    # 8 heads
    >>> link.forward(torch.rand(8, 5, 16)).shape
    torch.Size([8, 7, 16])

    `weight` [batch, outputs, inputs] may be a function of no arguments, called when it is first
    needed. s runs over `columns`, and p over what is left of the tensors.
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        weight: Tensor | Callable[[], Tensor],
        columns: int = 1,
    ) -> None:
        super().__init__(in_shape, out_shape)
        self._weight = weight
        self.columns = columns

    @property
    def weight(self) -> Tensor:
        if not isinstance(self._weight, Tensor):
            self._weight = self._weight()
        return self._weight

    def _rows(self) -> int:
        """The length of p."""
        batch, _, inputs = self.weight.shape
        return prod(self.in_shape) // max(batch * inputs * self.columns, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, inputs = self.weight.shape
        count = len(x) if self._is_stack(x) else 1
        # The samples of a stack go beside the rows, for else each would get a copy of the weight.
        rows = x.reshape(count, batch, self._rows(), inputs, self.columns).transpose(0, 1)
        rows = rows.flatten(1, 2)
        y: Tensor = (
            rows[..., 0] @ self.weight.mT if self.columns == 1 else self.weight[:, None] @ rows
        )
        y = y.unflatten(1, (count, self._rows())).transpose(0, 1)
        return y.reshape(self.shape_of(x))

    def edges(self, nodes: Tensor) -> Edges:
        batch, outputs, inputs = self.weight.shape
        rows, columns = self._rows(), self.columns
        b, p, o, s = torch.unravel_index(nodes, (batch, rows, outputs, columns))
        first = (b * rows + p) * inputs * columns + s
        index = first[:, None] + torch.arange(inputs, device=nodes.device) * columns
        return Edges(index, self.weight[b, o])

    def _with(self, change: Callable[[Tensor], Tensor]) -> BatchedMatrix:
        return BatchedMatrix(
            self.in_shape, self.out_shape, lambda: change(self.weight), self.columns
        )

    def transposed(self) -> BatchedMatrix:
        return BatchedMatrix(self.out_shape, self.in_shape, lambda: self.weight.mT, self.columns)

    def positive(self) -> BatchedMatrix:
        return self._with(lambda weight: weight.clamp(min=0))

    def negative(self) -> BatchedMatrix:
        return self._with(lambda weight: weight.clamp(max=0))

    def keeps_samples(self, batch: int) -> bool:
        matrices = self.weight.shape[0]
        return (matrices if matrices > 1 else self._rows()) % batch == 0

    def fan_in(self) -> int:
        return self.weight.shape[2]


def sparse(index: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """A sparse matrix with the entries `weight` [n] at (row, column) `index` [2, n]."""
    return torch.sparse_coo_tensor(index, weight, size, check_invariants=False)


class Sparse(Link):
    """One sparse matrix for every channel: y[r, c, o] = Σ weight · x[s, c, i] over its entries.

    >>> entries = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]).to_sparse()
    >>> Sparse((1, 1, 3), (1, 1, 2), entries).forward(torch.tensor([[[1.0, 3.0, 5.0]]]))
    tensor([[[2., 5.]]])

    `entries` is a sparse COO matrix [r · o, s · i], and `parts` (s, r) says what comes before the
    channels: images and regions for a RoI align; (1, 1) where all that comes before the places is
    one stack of channels, as in an interpolation.
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        entries: Tensor,
        channels: int = 1,
        parts: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__(in_shape, out_shape)
        self.entries = entries.coalesce()
        self.channels, self.parts = channels, parts
        self.places = entries.shape[1] // max(parts[0], 1), entries.shape[0] // max(parts[1], 1)

    def forward(self, x: Tensor) -> Tensor:
        (images, regions), (inputs, outputs) = self.parts, self.places
        if self._is_stack(x):
            return self._one_by_one(x)
        entries = self.entries
        dtype = torch.promote_types(x.dtype, entries.dtype)
        if dtype in {torch.half, torch.bfloat16}:  # no sparse product in half precision
            dtype = torch.float32
        columns = x.reshape(images, self.channels, inputs).movedim(1, 2).to(dtype)
        columns = columns.reshape(images * inputs, self.channels)
        y: Tensor = torch.sparse.mm(entries.to(dtype), columns)
        y = y.reshape(regions, outputs, self.channels).movedim(2, 1)
        return y.reshape(self.out_shape).to(x.dtype)

    def edges(self, nodes: Tensor) -> Edges:
        (_, regions), (inputs, outputs) = self.parts, self.places
        part, channel, place = torch.unravel_index(nodes, (regions, self.channels, outputs))
        rows, columns = self.entries.indices()
        row = (part * outputs + place).contiguous()
        first = torch.searchsorted(rows, row)
        count = torch.searchsorted(rows, row, right=True) - first
        slots = torch.arange(max(int(count.max()), 1) if count.numel() else 1, device=nodes.device)
        hole = slots >= count[:, None]
        if not len(columns):
            index = torch.zeros_like(hole, dtype=torch.long)
            weight = self.entries.values().new_zeros(hole.shape)
        else:
            at = (first[:, None] + slots).masked_fill(hole, 0)
            index, weight = columns[at], self.entries.values()[at]
        image = torch.div(index, inputs, rounding_mode="floor")
        index = (image * self.channels + channel[:, None]) * inputs + index % inputs
        return Edges(index.masked_fill(hole, -1)[:, None], weight.masked_fill(hole, 0)[:, None])

    def transposed(self) -> Sparse:
        images, regions = self.parts
        back = self.entries.t()
        return Sparse(self.out_shape, self.in_shape, back, self.channels, (regions, images))

    def _with(self, weight: Tensor) -> Sparse:
        height, width = self.entries.shape
        entries = sparse(self.entries.indices(), weight, (height, width))
        return Sparse(self.in_shape, self.out_shape, entries, self.channels, self.parts)

    def positive(self) -> Sparse:
        return self._with(self.entries.values().clamp(min=0))

    def negative(self) -> Sparse | None:
        values = self.entries.values()
        return self._with(values.clamp(max=0)) if bool((values < 0).any()) else None

    def keeps_samples(self, batch: int) -> bool:
        (images, regions), (inputs, outputs) = self.parts, self.places
        if self.parts == (1, 1) and self.channels > 1:  # the samples are among the channels
            return self.channels % batch == 0
        if (images * inputs) % batch or (regions * outputs) % batch:
            return False
        rows, columns = self.entries.indices()
        parts = (
            torch.div(rows, max(regions * outputs // batch, 1), rounding_mode="floor"),
            torch.div(columns, max(images * inputs // batch, 1), rounding_mode="floor"),
        )
        return bool((parts[0] == parts[1]).all())

    def fan_in(self) -> int:
        rows = self.entries.indices()[0]
        return int(torch.bincount(rows).max()) if len(rows) else 1


def _taps(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The non-zero entries of each row, padded with zeros: columns and values, both [rows, most]."""
    most = max(int((matrix != 0).sum(1).max()), 1)
    order = torch.argsort((matrix == 0).to(torch.int8), dim=1, stable=True)[:, :most]
    return order, matrix.gather(1, order)
