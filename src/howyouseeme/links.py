"""The linear maps that calls are made of, once a forward pass has frozen them.

On one image every call is an affine map of its inputs, `output = sum of link(input) + bias`: a
convolution is one already, a ReLU multiplies by a constant that this image fixed, a max-pool
selects. A `Link` is the linear map J from one input to the output. It can do three things:

- `forward(x)`: J x, dense;
- `edges(nodes)`: the rows of J for a few elements of the output, sparse: which inputs, what weight;
- `transposed()`: the link from the output to the input with the map Jᵀ.

`positive()` and `negative()` split J by the sign of its entries, J = J⁺ + J⁻; None stands for zero.
Elements are addressed by their flat, row-major index.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import fold

from .tape import at_hand

__all__ = [
    "BatchedMatrix",
    "Convolution",
    "Diagonal",
    "Edges",
    "Link",
    "Matrix",
    "Moves",
    "Pad",
    "Permutation",
    "Selection",
    "Separable",
    "Sparse",
    "Spread",
]

Shape = Sequence[int]

#: Up to so many channels, as an image has, patches take less time than a transposed convolution.
_FEW = 4


@dataclass(frozen=True, slots=True)
class Edges:
    """Rows of a link for n elements of its output.

    `index` and `weight` have the shape [n, channels, positions] for maps over space, [n, inputs]
    for a matrix, and [n] where each output has one input. Where a row has fewer edges than others (at
    the border of a convolution), the missing ones have index -1 and weight 0.
    """

    index: Tensor
    weight: Tensor


class Link(ABC):
    """A linear map from a tensor of `in_shape` to one of `out_shape`."""

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


class Diagonal(Link):
    """The same place, times a weight: y = weight · x, also where only the shape changes.

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


class Moves(Link):
    """Each output element is one input element or none, times a weight."""

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
    """The same elements with the axes in another order: axis i of the output is axis `axes[i]` of the input."""

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
    """The transpose of a `Selection`: each input element is added up over the places it went to."""

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


class Matrix(Link):
    """y[..., o] = Σᵢ weight[o, i] · x[..., i], over the last axis."""

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


class Convolution(Link):
    """A convolution or transposed convolution in any number of dimensions.

    `weight` is laid out as PyTorch does: [out, in / groups, *kernel], or, where `back` is true (a
    transposed convolution), [in, out / groups, *kernel].
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        weight: Tensor,
        stride: Shape,
        padding: Shape,
        dilation: Shape,
        groups: int,
        back: bool = False,
    ) -> None:
        super().__init__(in_shape, out_shape)
        dims = weight.dim() - 2
        self.weight, self.groups, self.back = weight, groups, back
        self.stride, self.padding, self.dilation = (
            tuple(option) * (dims if len(option) == 1 else 1)
            for option in (stride, padding, dilation)
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.is_contiguous() and self.groups == 1:
            if prod(self.weight.shape[2:]) == 1 and not any(self.padding):
                return self._place_by_place(x)
            if self._in_patches:
                return self._patch_by_patch(x)
        extra = [0] * len(self.stride)
        if self.back:
            extra = [
                out - ((size - 1) * stride - 2 * pad + step * (kernel - 1) + 1)
                for out, size, stride, pad, step, kernel in zip(
                    self.out_shape[2:],
                    self.in_shape[2:],
                    self.stride,
                    self.padding,
                    self.dilation,
                    self.weight.shape[2:],
                    strict=True,
                )
            ]
        y: Tensor = torch.ops.aten.convolution(
            x,
            self.weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.back,
            extra,
            self.groups,
        )
        # An output padding as large as the stride makes the way back longer than the input was.
        for axis, size in enumerate(self.out_shape[2:], start=2):
            y = y.narrow(axis, 0, size)
        return y

    def _place_by_place(self, x: Tensor) -> Tensor:
        """Each place is made of one: a product of matrices, which takes less time than a convolution."""
        places = (self.in_shape if self.back else self.out_shape)[2:]
        steps = zip(places, self.stride, strict=True)
        taken = (slice(None), slice(None), *(slice(0, (n - 1) * by + 1, by) for n, by in steps))
        matrix = self.weight.flatten(1)
        if not self.back:
            return (matrix @ x[taken].flatten(2)).reshape(self.shape_of(x))
        made, shape = matrix.T @ x.flatten(2), self.shape_of(x)
        if made.numel() == prod(shape):
            return made.reshape(shape)
        y = x.new_zeros(shape)
        y[taken] = made.reshape(*made.shape[:2], *x.shape[2:])
        return y

    @property
    def _in_patches(self) -> bool:
        """Whether places become patches of few channels: the way back to an image, with a stride."""
        if not self.back or len(self.stride) != 2 or max(self.stride) == 1:
            return False
        fits = (
            (size + 2 * pad - step * (kernel - 1) - 1) // stride + 1 == places
            for size, pad, step, kernel, stride, places in zip(
                self.out_shape[2:],
                self.padding,
                self.dilation,
                self.weight.shape[2:],
                self.stride,
                self.in_shape[2:],
                strict=True,
            )
        )
        return self.weight.shape[1] <= _FEW and all(fits)

    def _patch_by_patch(self, x: Tensor) -> Tensor:
        """All patches by a product of matrices, then added where they overlap."""
        patches = self.weight.flatten(1).T @ x.flatten(2)
        size, kernel = self.out_shape[2:], self.weight.shape[2:]
        return fold(patches, size, kernel, self.dilation, self.padding, self.stride)

    def edges(self, nodes: Tensor) -> Edges:
        sample, channel, *place = torch.unravel_index(nodes, self.out_shape)
        kernel, space = self.weight.shape[2:], self.in_shape[2:]
        group_in = self.in_shape[1] // self.groups
        group_out = self.out_shape[1] // self.groups
        group = torch.div(channel, group_out, rounding_mode="floor")

        # Where each tap of the kernel looks, axis by axis: flat position [n, taps] and validity.
        position = nodes.new_zeros(len(nodes), 1)
        valid = torch.ones(len(nodes), 1, dtype=torch.bool, device=nodes.device)
        for axis, (taps, size) in enumerate(zip(kernel, space, strict=True)):
            tap = torch.arange(taps, device=nodes.device) * self.dilation[axis]
            if self.back:
                far = place[axis][:, None] + self.padding[axis] - tap
                at = torch.div(far, self.stride[axis], rounding_mode="floor")
                inside = (far % self.stride[axis] == 0) & (at >= 0) & (at < size)
            else:
                at = place[axis][:, None] * self.stride[axis] - self.padding[axis] + tap
                inside = (at >= 0) & (at < size)
            position = (position[:, :, None] * size + at[:, None, :]).flatten(1)
            valid = (valid[:, :, None] & inside[:, None, :]).flatten(1)

        channels = group[:, None] * group_in + torch.arange(group_in, device=nodes.device)
        plane = sample[:, None] * self.in_shape[1] + channels  # [n, channels]
        index = plane[:, :, None] * prod(space) + position[:, None, :]
        if self.back:
            weight = self.weight.flatten(2)[channels, (channel % group_out)[:, None]]
        else:
            weight = self.weight.flatten(2)[channel]
        hole = ~valid[:, None, :]
        return Edges(index.masked_fill(hole, -1), weight.masked_fill(hole, 0))

    def _with(self, weight: Tensor) -> Convolution:
        return Convolution(
            self.in_shape,
            self.out_shape,
            weight,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.back,
        )

    def transposed(self) -> Convolution:
        return Convolution(
            self.out_shape,
            self.in_shape,
            self.weight,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            not self.back,
        )

    def turned(self, signs: Tensor) -> Convolution:
        """The link with its outputs times `signs`, one a channel."""
        weight, signs = self.weight, signs.reshape(-1)
        if self.back:  # [in, out / groups, ...]
            inputs = weight.shape[0] // self.groups
            rows = signs.reshape(self.groups, 1, -1).expand(-1, inputs, -1).flatten(0, 1)
            return self._with(weight * rows.reshape(*rows.shape, *[1] * (weight.dim() - 2)))
        return self._with(weight * signs.reshape(-1, *[1] * (weight.dim() - 1)))

    def positive(self) -> Convolution:
        return self._with(self.weight.clamp(min=0))

    def negative(self) -> Convolution:
        return self._with(self.weight.clamp(max=0))

    def magnitude(self) -> Convolution:
        """The link of the entries' absolute values."""
        return self._with(self.weight.abs())

    def fan_in(self) -> int:
        return (self.in_shape[1] // self.groups) * prod(self.weight.shape[2:])


class Separable(Link):
    """One small matrix along each of some axes: average pooling, means, sums, interpolation.

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
