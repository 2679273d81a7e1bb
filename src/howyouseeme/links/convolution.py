"""Convolutions, there and back."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn.functional import fold

from .base import Edges, Link, Shape

__all__ = ["Convolution"]

#: Up to so many channels, as an image has, patches take less time than a transposed convolution.
_FEW = 4


class Convolution(Link):
    """A convolution or transposed convolution in any number of dimensions.

    >>> link = Convolution((1, 3, 8, 8), (1, 4, 6, 6), torch.rand(4, 3, 3, 3), [1, 1], [0, 0], [1, 1], 1)
    >>> link.forward(torch.rand(1, 3, 8, 8)).shape
    torch.Size([1, 4, 6, 6])

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
        if self.groups == 1 and prod(self.weight.shape[2:]) == 1 and not any(self.padding):
            if x.is_contiguous():
                return self._place_by_place(x)
            if self.in_shape[2:] == self.out_shape[2:] and _channels_last(x):
                return self._row_by_row(x)
        elif self.groups == 1 and x.is_contiguous() and self._in_patches:
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

    def _row_by_row(self, x: Tensor) -> Tensor:
        """Each place is made of the one where it lies, as a row of channels: a product of matrices."""
        matrix = self.weight.flatten(1)
        rows = x.permute(0, 2, 3, 1) @ (matrix if self.back else matrix.T)
        return rows.permute(0, 3, 1, 2)

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


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
