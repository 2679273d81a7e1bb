"""Work that is one call to whoever notes calls, however many it makes itself.

A walk by a few nodes goes where contents lead it, so that its calls are others for each image. A replay makes
it anew, as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

__all__ = ["Work", "as_one", "is_noted", "noted"]

#: Fresh tensors, as many of the same shapes each time, made of others.
Work = Callable[[Sequence[Tensor]], list[Tensor]]

_NOTED = threading.local()


def is_noted() -> bool:
    """Whether somebody notes the calls of this thread."""
    return getattr(_NOTED, "by", None) is not None


def as_one(work: Work, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What work makes of tensors, noted as one call where calls are.

    >>> found, lost = as_one(work, [evidence, activation])
    """
    by = getattr(_NOTED, "by", None)
    return work(tensors) if by is None else by(work, tensors)  # type: ignore[no-any-return]


@contextmanager
def noted(by: Callable[[Work, Sequence[Tensor]], list[Tensor]] | None) -> Iterator[None]:
    """Let somebody note the work of this thread, and do it."""
    before, _NOTED.by = getattr(_NOTED, "by", None), by
    try:
        yield
    finally:
        _NOTED.by = before
