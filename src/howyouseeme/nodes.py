"""The sparse, weighted set of nodes that a walk has reached at one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backtrack import signs

__all__ = ["Nodes"]


@dataclass(frozen=True, eq=False)
class Nodes:
    """n nodes of one value, each at most once, in ascending order of their index.

    - `index` [n]: flat, row-major place in the value;
    - `count` [n]: how many paths reached it;
    - `sign` [n]: +1 if what made it large is asked for, -1 if what made it small;
    - `share` [n]: the share of the evidence that these paths account for.
    """

    index: Tensor
    count: Tensor
    sign: Tensor
    share: Tensor

    def __len__(self) -> int:
        return len(self.index)

    @staticmethod
    def start(index: Tensor) -> Nodes:
        """One path from each node."""
        ones = torch.ones(len(index), dtype=torch.float64, device=index.device)
        return Nodes(index, ones, ones, ones)

    @staticmethod
    def merge(parts: Sequence[Nodes]) -> Nodes:
        """Add up the paths that meet in a node; the sign that most of them ask for wins."""
        index, place = torch.unique(torch.cat([p.index for p in parts]), return_inverse=True)
        count, sign, share = (
            torch.zeros(len(index), dtype=torch.float64, device=index.device).index_add_(
                0, place, torch.cat(terms)
            )
            for terms in zip(*[(p.count, p.count * p.sign, p.share) for p in parts], strict=True)
        )
        return Nodes(index, count, signs(sign), share)

    @staticmethod
    def join(parts: Sequence[Nodes]) -> Nodes:
        """All of them, one part after the other; a node may be there several times."""
        return Nodes(*(torch.cat(items) for items in zip(*(p._all() for p in parts), strict=True)))

    def pick(self, which: Tensor | slice) -> Nodes:
        """Some of them."""
        return Nodes(*(item[which] for item in self._all()))

    def _all(self) -> tuple[Tensor, ...]:
        return self.index, self.count, self.sign, self.share

    def dense(self, values: Tensor, like: Tensor) -> Tensor:
        """`values` [n] at the nodes, 0 elsewhere, in the shape of `like`."""
        full = torch.zeros(like.numel(), dtype=values.dtype, device=like.device)
        full[self.index] = values
        return full.reshape(like.shape)
