"""Threads that lend the compiled kernels a hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

__all__ = ["MOST", "run"]

T = TypeVar("T")

#: More than these have nothing to do.
MOST = 8


def run(function: Callable[[int, int], T], pieces: Sequence[tuple[int, int]]) -> list[T]:
    """The function of each piece, in their order; the first one in this thread, the others beside it.

    >>> run(lambda first, last: sum(range(first, last)), [(0, 3), (3, 5)])
    [3, 7]
    """
    others = [_pool().submit(function, *piece) for piece in pieces[1:]]
    return [function(*pieces[0]), *(other.result() for other in others)]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST, "howyouseeme")


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
