"""Operators of ONNX that move elements, and choose among them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import Attributes, operator, padded

__all__: list[str] = []


@operator("Reshape")
def _reshape(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sides = shape.tolist()
    if not attributes.get("allowzero", 0):
        sides = [x.shape[axis] if side == 0 else side for axis, side in enumerate(sides)]
    return x.reshape(sides)


@operator("Flatten")
def _flatten(attributes: Attributes, x: Tensor) -> Tensor:
    axis = attributes.get("axis", 1)
    axis += x.dim() if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Transpose")
def _transpose(attributes: Attributes, x: Tensor) -> Tensor:
    return x.permute(attributes.get("perm", list(reversed(range(x.dim())))))


@operator("Squeeze")
def _squeeze(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = attributes.get("axes") if axes is None else axes.reshape(-1).tolist()
    return x.squeeze() if chosen is None else x.squeeze(tuple(chosen))


@operator("Unsqueeze")
def _unsqueeze(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = attributes.get("axes") if axes is None else axes.reshape(-1).tolist()
    dims = x.dim() + len(chosen)
    for axis in sorted(axis % dims for axis in chosen):
        x = x.unsqueeze(axis)
    return x


@operator("Concat")
def _concat(attributes: Attributes, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, attributes.get("axis"))


@operator("Split")
def _split(attributes: Attributes, x: Tensor, sizes: Tensor | None = None) -> Sequence[Tensor]:
    axis = attributes.get("axis", 0)
    given = attributes.get("split") if sizes is None else sizes.tolist()
    if given is None:
        given = math.ceil(x.shape[axis] / attributes.get("num_outputs", attributes.outputs))
    return torch.split(x, given, axis)


@operator("Slice")
def _slice(
    attributes: Attributes,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first = attributes.get("starts") if starts is None else starts.tolist()
    last = attributes.get("ends") if ends is None else ends.tolist()
    chosen = (
        attributes.get("axes", [*range(len(first))]) if axes is None else axes.reshape(-1).tolist()
    )
    strides = [1] * len(first) if steps is None else steps.tolist()
    for axis, start, end, step in zip(chosen, first, last, strides, strict=True):
        # Python means the same by its slices, of which PyTorch takes only those that go forwards.
        index = range(x.shape[axis])[start:end:step]
        if step < 0:
            x = x.index_select(axis, torch.tensor(index, dtype=torch.int64, device=x.device))
        else:
            x = x.narrow(axis, index.start, max(index.stop - index.start, 0))
            x = (
                x
                if step == 1
                else x[(slice(None),) * (axis % x.dim()) + (slice(None, None, step),)]
            )
    return x


@operator("Pad")
def _pad(
    attributes: Attributes,
    x: Tensor,
    pads: Tensor | None = None,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    mode = attributes.only("mode", "constant", "reflect", "edge", "wrap")
    sides = attributes.get("pads") if pads is None else pads.tolist()
    chosen = (
        [*range(x.dim())]
        if axes is None
        else [axis % x.dim() for axis in axes.reshape(-1).tolist()]
    )
    before, after = [0] * x.dim(), [0] * x.dim()
    for place, axis in enumerate(chosen):
        before[axis], after[axis] = sides[place], sides[place + len(chosen)]
    if mode == "constant":
        fill = attributes.get("value", 0.0) if value is None else value.item()
        return padded(x, before, after, fill)
    for axis, (low, high) in enumerate(zip(before, after, strict=True)):
        if low or high:
            side = x.shape[axis]
            at = torch.arange(-low, side + high, device=x.device)
            if mode == "edge":
                at = at.clamp(0, side - 1)
            elif mode == "wrap":
                at = at % side
            else:  # there and back again
                at = side - 1 - (side - 1 - at % max(2 * side - 2, 1)).abs()
            x = x.index_select(axis, at)
    return x


@operator("Expand")
def _expand(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, shape.tolist()))


@operator("Tile")
def _tile(attributes: Attributes, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(repeats.tolist())


@operator("DepthToSpace")
def _depth_to_space(attributes: Attributes, x: Tensor) -> Tensor:
    size = attributes.get("blocksize")
    if attributes.only("mode", "DCR", "CRD") == "CRD":
        return F.pixel_shuffle(x, size)
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, size, size, channels // size**2, height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, height * size, width * size)


@operator("SpaceToDepth")
def _space_to_depth(attributes: Attributes, x: Tensor) -> Tensor:
    size = attributes.get("blocksize")
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, channels, height // size, size, width // size, size)
    order = (3, 5, 1) if attributes.only("mode", "DCR", "CRD") == "DCR" else (1, 3, 5)
    return blocks.permute(0, *order, 2, 4).reshape(batch, -1, height // size, width // size)
