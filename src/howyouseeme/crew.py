"""Threads that lend the compiled kernels a hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TypeVar

import torch

__all__ = ["MOST", "run", "shares", "threads"]

T = TypeVar("T")

#: So many edges are worth a thread.
_WORTH = 200_000

#: More than these have nothing to do.
MOST = 8


def run(function: Callable[[int, int], T], pieces: Sequence[tuple[int, int]]) -> list[T]:
    """The function of each piece, in their order; the first one in this thread, the others beside it.

    >>> run(lambda first, last: sum(range(first, last)), [(0, 3), (3, 5)])
    [3, 7]
    """
    others = [_pool().submit(function, *piece) for piece in pieces[1:]]
    return [function(*pieces[0]), *(other.result() for other in others)]


def threads(edges: int) -> int:
    """How many threads so many edges are worth."""
    return min(torch.get_num_threads(), max(edges // _WORTH, 1), MOST)


def shares(count: int, edges: int) -> list[tuple[int, int]]:
    """The first and last of the nodes [count] that each thread takes, having so many edges each.

    >>> shares(1000, edges=576)          # of two threads
    [(0, 500), (500, 1000)]
    """
    most = min(threads(count * edges), count) or 1
    cuts = [count * i // most for i in range(most + 1)]
    return list(pairwise(cuts))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST, "howyouseeme")


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
