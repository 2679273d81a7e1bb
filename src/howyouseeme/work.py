"""Work that is one call to whoever notes calls, however many it makes itself.

A walk that chooses nodes goes where contents lead it, so that its calls are others for each image. A replay
makes it anew, as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

__all__ = ["Note", "Work", "note", "noted"]

#: Fresh tensors, as many of the same shapes each time, made of others.
Work = Callable[[Sequence[Tensor]], list[Tensor]]

#: Does work on tensors, and keeps in mind that it was done on them.
Note = Callable[[Work, Sequence[Tensor]], list[Tensor]]

_NOTED = threading.local()


def note() -> Note | None:
    """How the work of this thread is to be done, if somebody notes its calls."""
    return getattr(_NOTED, "by", None)


@contextmanager
def noted(by: Note) -> Iterator[None]:
    """Let somebody note the work of this thread, and do it."""
    before, _NOTED.by = note(), by
    try:
        yield
    finally:
        _NOTED.by = before
