"""Where the pixels of a model's input lie in the picture that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..regions import Box

__all__ = ["Geometry"]


@dataclass(frozen=True)
class Geometry:
    """Where the pixels of a model's input lie in the picture that it was made from.

    >>> tensor, geometry = preprocess(image)
    >>> y, x = geometry.points_to_image(np.array([112.0]), np.array([112.0]))
    >>> heat = geometry.map_to_image(attention)              # [H, W], over the picture

    Sizes are (height, width); `scale` and `offset` are (along y, along x), in picture pixels: the
    input's pixel i covers the picture from i * scale + offset to (i + 1) * scale + offset.
    """

    image_size: tuple[int, int]
    input_size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]

    @classmethod
    def identity(cls, size: tuple[int, int]) -> Geometry:
        """The geometry of an input that is itself the picture, `size` = (height, width).

        >>> Geometry.identity((224, 224))
        """
        return cls(size, size, (1.0, 1.0), (0.0, 0.0))

    def points_to_image(self, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Picture coordinates (y, x) of the input's pixel centres (y, x), arrays of one shape.

        >>> geometry.points_to_image(np.array([0]), np.array([0]))

        Whole numbers are pixel centres on both sides, and results are clipped to 0..H-1, 0..W-1.
        """
        image_y, image_x = (
            np.clip((np.asarray(at) + 0.5) * scale + offset - 0.5, 0, side - 1)
            for at, scale, offset, side in zip(
                (y, x), self.scale, self.offset, self.image_size, strict=True
            )
        )
        return image_y, image_x

    def box_to_image(self, box: Sequence[float]) -> Box:
        """A box (x0, y0, x1, y1) in pixels of the input, in pixels of the picture; cut at its edges.

        >>> geometry.box_to_image((10, 10, 20, 20))
        """
        x0, y0, x1, y1 = (
            min(max(side * self.scale[axis] + self.offset[axis], 0.0), float(self.image_size[axis]))
            for side, axis in zip(box, (1, 0, 1, 0), strict=True)
        )
        return x0, y0, x1, y1

    @property
    def pads(self) -> bool:
        """Whether the input reaches beyond the picture."""
        return any(
            offset < 0 or offset + scale * given > side + scale / 2
            for offset, scale, given, side in zip(
                self.offset, self.scale, self.input_size, self.image_size, strict=True
            )
        )

    def cut(self, map: Tensor) -> Tensor:
        """A map over the input [h, w] with zeros in the padding, where the input shows nothing of the picture.

        >>> geometry.cut(evidence)
        """
        for axis, side in enumerate(self.image_size):
            centre = torch.arange(map.shape[axis], device=map.device) + 0.5
            place = centre * self.scale[axis] + self.offset[axis]
            inside = ((place > 0) & (place < side)).to(map)
            map = map * (inside[:, None] if axis == 0 else inside)
        return map

    def shows(self, place: np.ndarray) -> np.ndarray:
        """Whether places of the input [n, 2] lie in the picture, and not in padding: [n].

        >>> geometry.shows(np.array([[0.0, 0.0]]))
        """
        at = (place + 0.5) * np.array(self.scale) + np.array(self.offset)
        inside: np.ndarray = ((at > 0) & (at < np.array(self.image_size))).all(1)
        return inside

    def map_to_image(self, map: np.ndarray) -> np.ndarray:
        """A map over the input [h, w], resampled over the picture: [H, W] float32.

        >>> geometry.map_to_image(attention)

        Bilinear, averaged where the picture is the smaller one; zero where the model didn't look.
        Raises:
            InputError: the map isn't of the input's size.
        """
        if map.shape != self.input_size:
            raise InputError(f"The map is {map.shape}, but the model's input is {self.input_size}.")
        if self == Geometry.identity(self.input_size):
            return map.astype(np.float32)
        rows, columns = (
            _resampling(*axis)
            for axis in zip(self.image_size, self.input_size, self.scale, self.offset, strict=True)
        )
        # By PyTorch: numpy's threads would get in the way of its.
        drawn = torch.from_numpy(map.astype(np.float32))
        resampled: np.ndarray = (rows @ drawn @ columns.T).numpy()
        return resampled


@lru_cache(maxsize=8)
def _resampling(outputs: int, inputs: int, scale: float, offset: float) -> Tensor:
    """[outputs, inputs] float32: how much of each input pixel goes into each output pixel."""
    position = (np.arange(outputs) + 0.5 - offset) / scale
    distance = np.abs(position[:, None] - np.arange(inputs) - 0.5)
    weights: np.ndarray = np.maximum(1 - distance / max(1.0, 1 / scale), 0, dtype=np.float32)
    inside = (position >= 0) & (position < inputs)
    weights[inside] /= weights[inside].sum(axis=1, keepdims=True)
    weights[~inside] = 0
    return torch.from_numpy(weights)
