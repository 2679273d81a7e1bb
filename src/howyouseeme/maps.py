"""From evidence at the pixels to points, saliency and attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from .tape import at_hand

__all__ = [
    "Point",
    "Points",
    "gaussian_blur",
    "inliers",
    "levels",
    "precise",
    "scale_each_to_one",
    "scale_to_one",
    "strongest_elements",
    "strongest_points",
]


@dataclass(frozen=True)
class Point:
    """One pixel: its place and how much evidence it carries.

    >>> y, x, strength = point          # of a picture; as many coordinates as the input has axes
    >>> point.y, point.position, point.strength

    - `position`: in pixels of the user's image, along y and x (of a picture), 0 being the centre of
      the first pixel;
    - `strength`: evidence in the method's unit (see `Explanation`), above 0.
    """

    position: tuple[float, ...]
    strength: float

    @property
    def y(self) -> float:
        """The row; for a picture."""
        return self.position[-2]

    @property
    def x(self) -> float:
        """The column."""
        return self.position[-1]

    def __iter__(self) -> Iterator[float]:
        yield from self.position
        yield self.strength


@dataclass(frozen=True, eq=False)
class Points:
    """n pixels responsible, the strongest first.

    >>> points = explanation.points[0]
    >>> points[0]                        # the strongest Point
    >>> points.y, points.x, points.strength

    - `position` [n, axes] float32: in pixels of the user's image, along y and x (of a picture), 0
      being the centre of the first pixel;
    - `strength` [n] float64: evidence in the method's unit (see `Explanation`), above 0.
    """

    position: np.ndarray
    strength: np.ndarray

    @property
    def y(self) -> np.ndarray:
        """Rows [n]; for a picture."""
        return self.position[:, -2]

    @property
    def x(self) -> np.ndarray:
        """Columns [n]."""
        return self.position[:, -1]

    def __len__(self) -> int:
        return len(self.strength)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """[n, axes + 1]: the position and the strength of each.

        >>> np.asarray(points).shape
        (2000, 3)
        """
        made = np.column_stack([self.position, self.strength])
        return made if dtype is None else made.astype(dtype)

    def __iter__(self) -> Iterator[Point]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, i: int) -> Point: ...

    @overload
    def __getitem__(self, i: slice) -> Points: ...

    def __getitem__(self, i: int | slice) -> Point | Points:
        if isinstance(i, slice):
            return Points(self.position[i], self.strength[i])
        return Point(tuple(self.position[i].tolist()), float(self.strength[i]))

    def __repr__(self) -> str:
        return f"Points({len(self)})"


def strongest_points(evidence: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The elements of a map above zero, the strongest first, ties by place: (place [n, axes], value [n]).

    `evidence` has any number of axes; at most `count` are returned.
    """
    flat = evidence.reshape(-1)
    least = flat.topk(min(count, len(flat))).values[-1:].clamp(min=0) if len(flat) else flat
    candidates = torch.nonzero((flat >= least) & (flat > 0))[:, 0]
    order = candidates[flat[candidates].sort(descending=True, stable=True).indices[:count]]
    return torch.stack(torch.unravel_index(order, evidence.shape), 1), flat[order]


def strongest_elements(evidence: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The strongest elements of each map of a batch, ties by place: (value, flat place), each [batch, count].

    As `strongest_points`, but for those that are not above zero, and without a look at the contents.
    """
    value, place = evidence.flatten(1).sort(dim=1, descending=True, stable=True)
    return value[:, :count].clone(), place[:, :count].clone()  # all of it is large


def inliers(evidence: Tensor, radius: float = 0.1, share: float = 0.05) -> Tensor:
    """Drop outliers: elements with too few others around them become 0.

    An element above zero is an outlier if at most `share` of all elements above zero, itself
    included, lie within `radius` times the map's diagonal (How You See Me, arXiv 1811.08152). The
    distance is Euclidean, the counts are exact.
    """
    there = (evidence > 0).double()
    reach = radius * float(sum(size**2 for size in evidence.shape)) ** 0.5
    ends = [min(size - 1, int(reach)) for size in evidence.shape]
    offsets = [torch.arange(-end, end + 1, device=evidence.device) for end in ends]
    grid = torch.meshgrid(*offsets, indexing="ij")
    disk = (sum(axis.double() ** 2 for axis in grid) <= reach**2).double()  # type: ignore[union-attr]
    # The number of neighbours is a convolution with the disk; by FFT, rounded to the exact integer.
    size = [_quick(n + 2 * end) for n, end in zip(evidence.shape, ends, strict=True)]
    axes = list(range(evidence.dim()))
    product = torch.fft.rfftn(there, size, axes) * torch.fft.rfftn(disk, size, axes)
    counts = torch.fft.irfftn(product, size, axes)
    centre = tuple(slice(end, end + n) for n, end in zip(evidence.shape, ends, strict=True))
    near = counts[centre].round()
    return evidence.masked_fill(near <= share * there.sum(), 0)


def _quick(size: int) -> int:
    """The next size with no prime factor above 5, which FFT is quick with."""
    rest = size
    for factor in (2, 3, 5):
        while rest % factor == 0:
            rest //= factor
    return size if rest == 1 else _quick(size + 1)


def gaussian_blur(evidence: Tensor, sigma: float, first: int = 0) -> Tensor:
    """A map of any number of axes, blurred along each from the `first` on by a Gaussian of `sigma` elements.

    The kernel reaches 4 sigma; outside of the map there is nothing.
    """
    for axis in range(first, evidence.dim()):
        near = _gaussian(evidence.shape[axis], sigma).to(evidence)
        evidence = torch.tensordot(evidence, near, dims=([axis], [0])).movedim(-1, axis)
    return evidence


@lru_cache(maxsize=8)
def _gaussian(size: int, sigma: float) -> Tensor:
    """[size, size] float64: what each element of a line gets of each other."""
    reach = max(int(4 * sigma + 0.5), 1)
    place = torch.arange(size, dtype=torch.float64, device="cpu")
    offset = (place[:, None] - place).abs()
    near = torch.exp(-0.5 * (offset / sigma) ** 2).masked_fill(offset > reach, 0)
    whole = torch.arange(-reach, reach + 1, dtype=torch.float64, device="cpu")
    return near / torch.exp(-0.5 * (whole / sigma) ** 2).sum()


def levels(evidence: Tensor) -> Tensor:
    """For each element of a map above zero, the share of the evidence in elements no stronger than it.

    >>> levels(torch.tensor([3.0, 1.0, -2.0, 1.0]))
    tensor([1.0000, 0.4000, 0.0000, 0.4000])

    0..1, the strongest has 1; what reaches the level t holds 1 - t of all evidence, or a little more. The
    order of the elements stays.
    """
    if not at_hand(evidence):
        return _levels_there(evidence.clamp(min=0).reshape(-1)).reshape(evidence.shape)
    flat = evidence.clamp(min=0).reshape(-1).numpy()
    order = _order(flat)
    rising = flat[order]
    total = rising.cumsum()
    whole = max(total[-1:].sum(), np.finfo(flat.dtype).tiny)
    equal = rising[1:] == rising[:-1]
    if equal[np.searchsorted(rising, 0, side="right") :].any():  # zeros add up to zero anyway
        last = np.append(~equal, True)[: len(rising)]
        total = total[last][last.cumsum() - last]
    level = np.empty_like(flat)
    level[order] = total / whole
    return torch.from_numpy(level).reshape(evidence.shape)


def _order(flat: np.ndarray) -> np.ndarray:
    """`np.argsort` of numbers from 0 on, by sorting whole numbers, which NumPy does several times as fast.

    Floats that are not negative have the order of their bits. The lowest ones, less than rounding in the sums that
    evidence is, make room for the place; what was told apart by them alone is put right after that.
    """
    if flat.dtype not in (np.float32, np.float64):
        return np.argsort(flat)
    bits = (flat.astype(np.float64) + 0.0).view(np.uint64)  # -0 becomes 0
    low = np.uint64((1 << len(flat).bit_length()) - 1)
    keys = bits & ~low | np.arange(len(flat), dtype=np.uint64)
    keys.sort()
    order: np.ndarray = (keys & low).astype(np.intp)
    rising = flat[order]
    if not (rising[1:] >= rising[:-1]).all():
        order = order[np.argsort(rising, kind="stable")]  # quick on what is nearly sorted
    return order


def _levels_there(flat: Tensor) -> Tensor:
    """The same on a device, where PyTorch sorts faster than NumPy."""
    rising, order = flat.sort()
    total = rising.cumsum(0)
    last = torch.searchsorted(rising, rising, right=True) - 1  # of those that are equal
    share = total[last] / total[-1:].sum().clamp(min=torch.finfo(flat.dtype).tiny)
    return torch.empty_like(flat).scatter_(0, order, share)


def precise(evidence: Tensor) -> Tensor:
    """In float64, where it is: but for CUDA, devices may have none, and it goes to the CPU."""
    return (evidence if evidence.is_cuda else evidence.cpu()).double()


def scale_to_one(evidence: Tensor) -> Tensor:
    """The positive part, divided by its maximum; all zero where nothing is positive."""
    return scale_each_to_one(evidence[None])[0]


def scale_each_to_one(evidence: Tensor) -> Tensor:
    """The same of each map of a batch."""
    positive = evidence.clamp(min=0)
    axes = tuple(range(1, positive.dim()))
    most = positive.amax(axes, keepdim=True) if axes else positive
    return positive / most.clamp(min=torch.finfo(positive.dtype).tiny)
